"""Loss and gradient of distillation from hidden states: against the matrix products, full logits, TRL and Liger.

    python -m benchmarks.opd_divergence [--quick] [--json FILE] [--device cpu|cuda]

Every contender gets the same bfloat16 hidden states [N, d] and heads [V, d] and ends with the gradients of the
student's two. ``floor`` is the four matrix products that none can avoid: two of logits, two of gradients. All compute
reverse KL; at the first shape posttrain's other divergences are timed as well.

On a CPU ``import posttrain`` lets PyTorch allocate huge pages, which spares the kernel most of its work. The floor, TRL
and "naive, huge pages" run in this process and have that advantage; ``naive`` is full logits as users know them, in a
process of its own (see ``benchmarks.full_logits``).
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.full_logits import Case, naive, seconds_in_a_plain_process
from benchmarks.measure import MIB, Metric, PeakMemory, arguments, report, seconds_in_turns
from posttrain.divergence import divergence_sum
from posttrain.divergence.reference import divergence_reference

Shape = tuple[int, int, int]
Row = dict[str, Any]
Contender = Callable[[Case], Callable[[], object]]

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
FORMS: dict[str, dict[str, Any]] = {
    "reverse_kl": {},
    "forward_kl": {"divergence": "forward_kl"},
    "jsd": {"divergence": "jsd"},
    "capped_reverse_kl": {"teacher_logit_cap": 30.0},
}
QUICK_SHAPES = {"cpu": [(512, 576, 49_152)], "cuda": SHAPES["cuda"][:2]}


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


def posttrain(case: Case, **form: Any) -> Callable[[], object]:
    return case.with_gradients(lambda: divergence_sum(*case.inputs, **form)[0])


def trl(case: Case) -> Callable[[], object]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    hidden, head, teacher_hidden, teacher_head = case.inputs

    def loss() -> torch.Tensor:
        kl, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, 1.0)
        return kl.sum()

    return case.with_gradients(loss)


def liger(case: Case) -> Callable[[], object]:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    labels = torch.zeros(len(case.hidden), dtype=torch.long, device=case.hidden.device)

    def loss() -> torch.Tensor:
        # No hard loss; beta 1 is the reverse KL.
        return LigerFusedLinearJSDFunction.apply(*case.inputs, labels, None, None, 0.0, 1.0, 1.0)

    return case.with_gradients(loss)


def relative_error(device: str, dtype: torch.dtype) -> float:
    """Largest relative error of divergence and gradients against float64 on full logits, over all forms."""
    worst = 0.0
    for form, (tokens, width, vocabulary) in itertools.product(FORMS.values(), ((67, 576, 5_003), (66, 64, 49_152))):
        case = Case.random(tokens, width, vocabulary, device, dtype)
        loss, divergence = divergence_sum(*case.inputs, **form)
        found = (divergence, *torch.autograd.grad(loss, (case.hidden, case.head)))
        exact = [tensor.detach().double().requires_grad_() for tensor in (case.hidden, case.head)]
        reference = divergence_reference(*exact, case.teacher_hidden, case.teacher_head, **form)
        want = (reference, *torch.autograd.grad(reference.sum(), exact))
        worst = max(worst, *(((f.double() - w).norm() / w.norm()).item() for f, w in zip(found, want, strict=True)))
    return worst


def measured(shape: Shape, contenders: dict[str, Contender], device: str, repeats: int) -> list[Row]:
    """Time and memory of the floor and of each contender at one shape."""
    case = Case.random(*shape, device, torch.bfloat16)
    runs = {"floor": floor(case)} | {name: make(case) for name, make in contenders.items()}
    taken = seconds_in_turns(runs, device, repeats=repeats)
    rows: list[Row] = [{"shape": shape, "name": "floor", "s": taken["floor"]}]
    for name in contenders:
        case.hidden.grad = case.head.grad = None
        peak = PeakMemory(device)
        runs[name]()
        extra = peak.mib() - case.result_bytes / MIB
        rows.append({"shape": shape, "name": name, "s": taken[name], "extra_mib": extra})
    return rows


def print_table(rows: list[Row], device: str) -> None:
    table = Table(title=f"divergences with gradients, bfloat16, {device}", title_justify="left")
    for heading in ("tokens", "width", "vocabulary", "", "ms", "over floor", "extra MiB"):
        table.add_column(heading, justify="right")
    for shape, of_shape in itertools.groupby(rows, key=lambda row: row["shape"]):
        group = list(of_shape)
        for row in group:
            cells = [f"{row['s'] * 1e3:.2f}", f"{row['s'] / group[0]['s']:.2f}"]
            extra = f"{row['extra_mib']:,.0f}" if "extra_mib" in row else ""
            table.add_row(*(f"{n:,}" for n in shape), row["name"], *cells, extra)
        table.add_section()
    Console(width=110).print(table)


def main() -> None:
    options = arguments(__doc__).parse_args()
    device = options.device
    shapes = (QUICK_SHAPES if options.quick else SHAPES)[device]
    contenders: dict[str, Contender] = {"posttrain": posttrain, "naive, huge pages": naive, "trl": trl}
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        contenders["liger"] = liger
    other_forms = {name: functools.partial(posttrain, **form) for name, form in FORMS.items() if form}
    repeats = 20 if device == "cuda" else 5 if options.quick else 3
    rows = []
    for shape in shapes:
        chosen = contenders | (other_forms if shape == shapes[0] else {})
        rows += measured(shape, chosen, device, repeats)
        rows.append({"shape": shape, "name": "naive", "s": seconds_in_a_plain_process(shape, device, repeats)})
    print_table(rows, device)

    def ratios(other: str, name: str = "posttrain") -> list[float]:
        taken = {(row["shape"], row["name"]): row["s"] for row in rows}
        return [taken[shape, name] / taken[shape, other] for shape in shapes if (shape, name) in taken]

    metrics = [
        Metric("time_over_floor", max(ratios("floor")), "worst ratio", "<= 1.5"),
        Metric("time_over_naive", max(ratios("naive")), "worst ratio", "<= 0.5"),
        Metric("time_over_naive_huge_pages", max(ratios("naive, huge pages")), "worst ratio", ""),
        Metric("speedup_over_trl", 1 / max(ratios("trl")), "least ratio", ">= 4"),
    ]
    if "liger" in contenders:
        metrics.append(Metric("speedup_over_liger", 1 / max(ratios("liger")), "least ratio", ""))
    for name in other_forms:
        metrics.append(Metric(f"{name}_time_over_floor", *ratios("floor", name), "ratio", ""))
    extra = max(row["extra_mib"] for row in rows if row["name"] in ("posttrain", *other_forms))
    metrics += [
        Metric("extra_mib", extra, "MiB, most", "<= 256"),
        Metric("error_fp32", relative_error(device, torch.float32), "relative, worst", "<= 1e-5"),
        Metric("error_bf16", relative_error(device, torch.bfloat16), "relative, worst", "<= 1e-2"),
    ]
    report("opd_divergence", metrics, options.json, device=device, rows=rows)


if __name__ == "__main__":
    main()
