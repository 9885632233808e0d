"""Processes that hold a slice each of the vocabulary and compute divergences together."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from posttrain.divergence import divergence_sum
from posttrain.divergence.measure import Measure
from posttrain.divergence.triton_tiles import TritonTiles

CUTS = {2: (0, 33, 57), 3: (0, 5, 26, 57)}
"""Where the slices of a vocabulary of 57 begin and end, by the number of processes."""


def main(rank: int, folder: Path) -> None:
    """Answers every request, a case with the other arguments of ``divergence_sum``, in groups of 2 and of 3."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    groups = {size: distributed.new_group(list(range(size))) for size in CUTS}
    requests = torch.load(folder / "requests.pt")
    answers = {
        (size, name): _answer(case, arguments, slice(*CUTS[size][rank : rank + 2]), group)
        for size, group in groups.items()
        if rank < size
        for name, (case, arguments) in requests.items()
    }
    tiles_case = torch.load(folder / "tiles.pt")
    for size, group in groups.items():
        if rank < size:
            answers[size, "tiles"] = _triton_answer(tiles_case, rank, size, group)
    case, _ = requests["reverse_kl"]
    try:
        divergence_sum(case[0][rank:], case[1], case[2][rank:], case[3], vocabulary_group=groups[3])
    except ValueError as refusal:
        answers[3, "other positions"] = str(refusal)
    torch.save(answers, folder / f"answers-{rank}.pt")
    distributed.destroy_process_group()


def _answer(
    case: tuple[torch.Tensor, ...], arguments: dict[str, Any], mine: slice, group: distributed.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """Loss, divergences, and the gradients of the hidden states and of this process's slice of the head."""
    hidden, head, teacher_hidden, teacher_head = case
    student = [tensor.clone().requires_grad_() for tensor in (hidden, head[mine])]
    loss, divergence = divergence_sum(*student, teacher_hidden, teacher_head[mine], vocabulary_group=group, **arguments)
    return (loss.detach(), divergence, *torch.autograd.grad(loss, student))


def _triton_answer(
    case: tuple[torch.Tensor, ...], rank: int, size: int, group: distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Divergences, and the gradient of the logits of this process's slice, which is not a whole number of blocks."""
    hidden, head, teacher_hidden, teacher_head = case
    mine = slice(len(head) * rank // size, len(head) * (rank + 1) // size)
    measure = Measure(temperature=0.7, vocabulary_group=group)
    tiles = TritonTiles(len(hidden), head[mine], teacher_head[mine], measure)
    weights = torch.linspace(0.0, 2.0, len(hidden))
    return tiles.divergence_and_logit_gradient(hidden, teacher_hidden, weights_C=weights)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
