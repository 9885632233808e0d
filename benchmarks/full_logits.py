"""Reverse KL on full logits, as one would write it in plain PyTorch, timed in a process that has never met posttrain.

    python -m benchmarks.full_logits TOKENS WIDTH VOCABULARY DEVICE REPEATS

prints the median seconds of loss and gradients. ``import posttrain`` makes PyTorch ask for huge pages, which full
logits profit from, too; a process of its own shows what they cost who does not use posttrain.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measure import seconds


@dataclass(slots=True)
class Case:
    """A student and a teacher that differ by about 0.2 nats."""

    hidden: torch.Tensor
    head: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor

    @classmethod
    def random(cls, tokens: int, width: int, vocabulary: int, device: str, dtype: torch.dtype) -> Case:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        hidden, head = normal(tokens, width), normal(vocabulary, width) * 2 * width**-0.5
        teacher_hidden = hidden + 0.3 * normal(tokens, width)
        teacher_head = head + 0.1 * normal(vocabulary, width) * width**-0.5
        student = (tensor.to(dtype).requires_grad_() for tensor in (hidden, head))
        return cls(*student, teacher_hidden.to(dtype), teacher_head.to(dtype))

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        return self.hidden, self.head, self.teacher_hidden, self.teacher_head

    @property
    def result_bytes(self) -> int:
        """The two gradients and one float32 accumulator of the head's."""
        return self.hidden.nbytes + self.head.nbytes + self.head.numel() * 4

    def with_gradients(self, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            self.hidden.grad = self.head.grad = None
            loss().backward()

        return run


def naive(case: Case) -> Callable[[], object]:
    def loss() -> torch.Tensor:
        p, q = (
            (hidden @ head.T).float().log_softmax(-1)
            for hidden, head in ((case.hidden, case.head), (case.teacher_hidden, case.teacher_head))
        )
        return (p.exp() * (p - q)).sum()

    return case.with_gradients(loss)


def seconds_in_a_plain_process(shape: tuple[int, int, int], device: str, repeats: int) -> float:
    """What this module prints, run with the environment as it was before ``import posttrain``."""
    command = [sys.executable, "-m", "benchmarks.full_logits", *map(str, shape), device, str(repeats)]
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    return float(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    *shape, repeats = (int(argument) for argument in (*sys.argv[1:4], sys.argv[5]))
    random_case = Case.random(*shape, sys.argv[4], torch.bfloat16)
    print(seconds(naive(random_case), sys.argv[4], repeats=repeats))
    assert "posttrain" not in sys.modules, "posttrain sets how PyTorch allocates memory"
