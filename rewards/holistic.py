"""One mark for a whole response, with the criteria of a rubric as its guide (implicit grading)."""

from __future__ import annotations

from collections.abc import Sequence

from rewards.criteria import Criterion

OVERALL = "overall"
"""Id of the criterion that stands for the others."""
SCALE = tuple(map(str, range(11)))


def merge_judged(criteria: Sequence[Criterion], scale: Sequence[str] = SCALE) -> tuple[Criterion, ...]:
    """The criteria with all that a judge decides, vetoes apart, merged into one graded on ``scale``.

    It weighs as much as the rewards it stands for, or as the penalties where there are none, so that code criteria keep
    their share. Criteria of weight 0 without a veto are left out: a mark cannot report them.
    """
    merged = [c for c in criteria if c.kind == "judge" and not c.veto and c.weight > 0]
    kept = [c for c in criteria if c.kind == "code" or c.veto]
    if not merged:
        return tuple(kept)
    weight = sum(c.weight for c in merged if c.polarity == "reward") or sum(c.weight for c in merged)
    overall = Criterion(
        id=_free_id({c.id for c in kept}), text=guide(merged, scale), weight=weight, choices=tuple(scale)
    )
    return (overall, *kept)


def guide(criteria: Sequence[Criterion], scale: Sequence[str] = SCALE) -> str:
    """The criteria in words, for one mark."""
    lines = [
        f"Overall quality, from {scale[0]} (worst) to {scale[-1]} (best). What counts, with how much it weighs:",
        *(f"- {'adds' if c.polarity == 'reward' else 'takes away'} {c.weight:g}: {_in_words(c)}" for c in criteria),
    ]
    return "\n".join(lines)


def _in_words(criterion: Criterion) -> str:
    graded = f" ({', '.join(criterion.choices)}; worst first)" if criterion.choices else ""
    return criterion.claim + graded


def _free_id(taken: set[str]) -> str:
    name = OVERALL
    while name in taken:
        name += "_"
    return name
