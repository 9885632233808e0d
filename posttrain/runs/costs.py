"""What a run cost, from its metrics: the numbers a distillation must not hide."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def summarise_costs(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals over the rollout stages, and the teacher costs of the distillation per step and per token."""
    played = [line for line in metrics if "generated_tokens" in line]
    distilled = [line for line in metrics if "teacher/bytes_cached" in line]
    costs: dict[str, Any] = {
        "generated tokens": _total(played, "generated_tokens"),
        "rollouts that failed": _total(played, "failed_rollouts"),
        "rollouts unscored": _total(played, "unscored"),
        "engines and workers replaced": _total(played, "engines_replaced") + _total(played, "workers_replaced"),
        "tokens taken up from the journal": _total(played, "resumed_tokens"),
        "rollouts taken up finished": _total(played, "resumed_rollouts"),
        "seconds paused": _total(played, "paused_s"),
    }
    if distilled:
        cached_tokens = _total(distilled, "loss_tokens")
        costs["distillation"] = {
            "bytes cached per token": _total(distilled, "teacher/bytes_cached") / cached_tokens
            if cached_tokens
            else math.nan,
            "teacher loads per step": _mean(distilled, "teacher/teacher_loads"),
            "head loads per step": _mean(distilled, "teacher/head_loads"),
            "seconds waiting for loads": _total(distilled, "teacher/load_wait_s"),
            "clamped share of positions, worst step": _most(distilled, "clamped_share"),
            "non-finite share of positions, worst step": _most(distilled, "nonfinite_share"),
            **{
                f"KL in {name.removeprefix('kl/')}, first and last step": f"{line[name]:.3g}, {last[name]:.3g}"
                for name, line, last in _ends(distilled, "kl/")
            },
        }
    return costs


def _total(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(line[name] for line in lines if name in line and not math.isnan(line[name])))


def _most(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return max((line[name] for line in lines if name in line), default=math.nan)


def _ends(
    lines: Sequence[Mapping[str, Any]], prefix: str
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Each metric whose name begins so, with the first and the last line that have it."""
    for name in sorted({name for line in lines for name in line if name.startswith(prefix)}):
        having = [line for line in lines if name in line]
        yield name, having[0], having[-1]


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    found = [line[name] for line in lines if name in line and not math.isnan(line[name])]
    return sum(found) / len(found) if found else math.nan
