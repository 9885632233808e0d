"""Loss and gradient of distillation from hidden states: against the matrix products, full logits, TRL and Liger.

    python -m benchmarks.opd_divergence [--quick] [--json FILE] [--device cpu|cuda]

Every contender gets the same bfloat16 hidden states [N, d] and heads [V, d] and ends with the gradients of the
student's two. ``floor`` is the four matrix products that none can avoid: two of logits, two of gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import MIB, Metric, PeakMemory, arguments, report, seconds
from posttrain.divergence import divergence_sum
from posttrain.divergence.reference import divergence_reference

SHAPES = {
    "cpu": [(1024, 576, 49_152), (4096, 576, 49_152), (1024, 1024, 129_280), (1024, 2048, 151_936)],
    "cuda": [
        (8192, 576, 49_152),
        (8192, 2048, 129_280),
        (8192, 1024, 151_936),
        (8192, 2048, 151_936),
        (1024, 2048, 151_936),
    ],
}
"""Tokens, width and vocabulary."""
QUICK_SHAPES = {"cpu": [(512, 576, 49_152)], "cuda": SHAPES["cuda"][:2]}


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


def floor(case: Case) -> Callable[[], object]:
    hidden, head, teacher_hidden, teacher_head = (tensor.detach() for tensor in case.inputs)
    logits = torch.empty(len(hidden), len(head), dtype=hidden.dtype, device=hidden.device)
    gradient = torch.randn_like(logits)
    grad_hidden, grad_head = torch.empty_like(hidden), torch.empty_like(head)

    def run() -> None:
        torch.mm(hidden, head.T, out=logits)
        torch.mm(teacher_hidden, teacher_head.T, out=logits)
        torch.mm(gradient, head, out=grad_hidden)
        torch.mm(gradient.T, hidden, out=grad_head)

    return run


def posttrain(case: Case) -> Callable[[], object]:
    return _backward(case, lambda: divergence_sum(*case.inputs)[0])


def naive(case: Case) -> Callable[[], object]:
    def loss() -> torch.Tensor:
        p, q = (
            (hidden @ head.T).float().log_softmax(-1)
            for hidden, head in ((case.hidden, case.head), (case.teacher_hidden, case.teacher_head))
        )
        return (p.exp() * (p - q)).sum()

    return _backward(case, loss)


def trl(case: Case) -> Callable[[], object]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, head, teacher_hidden, teacher_head = case.inputs

    def loss() -> torch.Tensor:
        kl, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, 1.0)
        return kl.sum()

    return _backward(case, loss)


def liger(case: Case) -> Callable[[], object]:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    labels = torch.zeros(len(case.hidden), dtype=torch.long, device=case.hidden.device)

    def loss() -> torch.Tensor:
        # No hard loss; beta 1 is the reverse KL.
        return LigerFusedLinearJSDFunction.apply(*case.inputs, labels, None, None, 0.0, 1.0, 1.0)

    return _backward(case, loss)


def _backward(case: Case, loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
    def run() -> None:
        case.hidden.grad = case.head.grad = None
        loss().backward()

    return run


def relative_error(device: str, dtype: torch.dtype) -> float:
    """Largest relative error of KL and gradients against float64 on full logits."""
    worst = 0.0
    for tokens, width, vocabulary in ((67, 576, 5_003), (130, 64, 49_152)):
        case = Case.random(tokens, width, vocabulary, device, dtype)
        loss, kl = divergence_sum(*case.inputs)
        found = (kl, *torch.autograd.grad(loss, (case.hidden, case.head)))
        exact = [tensor.detach().double().requires_grad_() for tensor in (case.hidden, case.head)]
        want_kl = divergence_reference(*exact, case.teacher_hidden, case.teacher_head)
        want = (want_kl, *torch.autograd.grad(want_kl.sum(), exact))
        worst = max(worst, *(((f.double() - w).norm() / w.norm()).item() for f, w in zip(found, want, strict=True)))
    return worst


def main() -> None:
    options = arguments(__doc__).parse_args()
    device = options.device
    shapes = (QUICK_SHAPES if options.quick else SHAPES)[device]
    contenders: dict[str, Callable[[Case], Callable[[], object]]] = {"posttrain": posttrain, "naive": naive, "trl": trl}
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        contenders["liger"] = liger
    table = Table(title=f"reverse KL with gradients, bfloat16, {device}", title_justify="left")
    for heading in ("tokens", "width", "vocabulary", "", "ms", "over floor", "extra MiB"):
        table.add_column(heading, justify="right")
    rows = []
    repeats = 20 if device == "cuda" else 3
    for shape in shapes:
        case = Case.random(*shape, device, torch.bfloat16)
        lowest = seconds(floor(case), device, repeats=repeats)
        rows.append({"shape": shape, "name": "floor", "s": lowest, "extra_mib": 0.0})
        for name, make in contenders.items():
            run = make(case)
            taken = seconds(run, device, repeats=repeats)
            case.hidden.grad = case.head.grad = None
            peak = PeakMemory(device)
            run()
            extra = peak.mib() - case.result_bytes / MIB
            rows.append({"shape": shape, "name": name, "s": taken, "extra_mib": extra})
        for row in rows[-len(contenders) - 1 :]:
            cells = [*(f"{n:,}" for n in shape), row["name"], f"{row['s'] * 1e3:.2f}", f"{row['s'] / lowest:.2f}"]
            table.add_row(*cells, "" if row["name"] == "floor" else f"{row['extra_mib']:,.0f}")
        table.add_section()
    Console(width=110).print(table)

    def ratios(other: str) -> list[float]:
        taken = {(row["shape"], row["name"]): row["s"] for row in rows}
        return [taken[shape, "posttrain"] / taken[shape, other] for shape in shapes]

    metrics = [
        Metric("time_over_floor", max(ratios("floor")), "worst ratio", "<= 1.5"),
        Metric("time_over_naive", max(ratios("naive")), "worst ratio", "<= 0.5"),
        Metric("speedup_over_trl", 1 / max(ratios("trl")), "least ratio", ">= 4"),
    ]
    if "liger" in contenders:
        metrics.append(Metric("speedup_over_liger", 1 / max(ratios("liger")), "least ratio", ""))
    metrics += [
        Metric("extra_mib", max(row["extra_mib"] for row in rows if row["name"] == "posttrain"), "MiB, most", "<= 256"),
        Metric("error_fp32", relative_error(device, torch.float32), "relative, worst", "<= 1e-5"),
        Metric("error_bf16", relative_error(device, torch.bfloat16), "relative, worst", "<= 1e-2"),
    ]
    report("opd_divergence", metrics, options.json, device=device, rows=rows)


if __name__ == "__main__":
    main()
