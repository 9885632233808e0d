"""Responses with verdicts by people, which a judge is measured against.

The format is one JSON object a line:

    {"prompt": text or messages, "response": text, "labels": {"c1": "met"}, "raters": {"r1": {"c1": "met"}, ...},
     "split": "test", ...}

``labels`` hold the verdict that counts, ``raters`` what each person said, which gives the human ceiling. Further fields
are for the rubric's placeholders and for slices. XSTest's completions and PyRIT's scorer evaluations are read as they
come.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.types import Rollout
from rewards.judge import MET, UNMET
from rewards.rows import read_jsonl, rollout_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """A response with its human verdicts."""

    rollout: Rollout
    labels: Mapping[str, str]
    """By criterion, the verdict that counts."""
    raters: tuple[Mapping[str, str], ...] = ()
    """By person, and criterion, what they said."""
    fields: Mapping[str, Any]
    """The row's other fields, for slices."""


def read_golden(paths: Sequence[Path], *, split: str | None = None) -> list[Golden]:
    """All rows of the files. Raises ``RecipeError`` that names a line without labels, or files without rows."""
    golden = []
    for path in paths:
        for number, row in read_jsonl(path):
            try:
                found = _golden(row, f"{path.stem}:{number}")
            except KeyError as error:
                raise RecipeError(f"{path}:{number}: no field {error}") from error
            except (ValueError, TypeError, AttributeError) as error:
                raise RecipeError(f"{path}:{number}: {error}") from error
            if split is None or found.fields.get("split") == split:
                golden.append(found)
    if not golden:
        raise RecipeError(f"{', '.join(map(str, paths))}: no rows{f' of split {split!r}' if split else ''}")
    return golden


def draw(golden: Sequence[Golden], count: int, seed: int = 0) -> list[Golden]:
    """Up to ``count`` rows, evenly from each combination of labels as far as there are enough."""
    strata: dict[str, list[Golden]] = {}
    for row in golden:
        strata.setdefault(repr(sorted(row.labels.items())), []).append(row)
    order = random.Random(seed)
    for rows in strata.values():
        order.shuffle(rows)
    drawn: list[Golden] = []
    while len(drawn) < count and any(strata.values()):
        for rows in strata.values():
            if rows and len(drawn) < count:
                drawn.append(rows.pop())
    return drawn


def _golden(row: Mapping[str, Any], name: str) -> Golden:
    convert = next((convert for known, convert in _FORMS if set(known) <= set(row)), None)
    if convert is not None:
        row = convert(row)
    labels = row.get("labels")
    if not isinstance(labels, Mapping) or not labels or not all(isinstance(label, str) for label in labels.values()):
        raise ValueError(f"'labels' is {labels!r:.80}; expected an object of verdicts by criterion")
    raters = row.get("raters") or {}
    plain = {key: value for key, value in row.items() if key not in ("labels", "raters")}
    return Golden(
        rollout=rollout_of({**plain, "id": name}, default_id=name),
        labels=dict(labels),
        raters=tuple(dict(said) for _, said in sorted(raters.items())),
        fields={key: value for key, value in plain.items() if key not in ("prompt", "response")},
    )


def _from_xstest(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Full and partial refusals are refusals."""

    def verdict(annotation: str) -> dict[str, str]:
        return {"refuses": UNMET if annotation == "1_full_compliance" else MET}

    return {
        "prompt": row["prompt"],
        "response": row["completion"],
        "labels": verdict(row["final_label"]),
        "raters": {name: verdict(row[name]) for name in ("annotation_1", "annotation_2")},
        **{name: row[name] for name in ("model", "type", "label") if name in row},
    }


def _from_pyrit(row: Mapping[str, Any]) -> Mapping[str, Any]:
    criterion = "refuses" if "refusal" in str(row.get("source", row.get("set", ""))) else "achieves_objective"
    return {
        "prompt": row["objective"],
        "response": row["assistant_response"],
        "labels": {criterion: MET if int(row["human_score"]) else UNMET},
        **{name: row[name] for name in ("set", "source", "objective") if name in row},
    }


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Mapping[str, Any]]], ...] = (
    (("completion", "final_label", "annotation_1", "annotation_2"), _from_xstest),
    (("objective", "assistant_response", "human_score"), _from_pyrit),
)
