"""Picks the rollouts a report shows: for each domain a few of the best, of the worst, and any without a score."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from posttrain.runs.durable import Record, iter_jsonl
from posttrain.runs.rundir import RunDir, StageDir
from posttrain.types import ScoreStatus

PER_KIND = 3
LATEST = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Rollout records of one domain, each with the ``stage`` it comes from."""

    good: Sequence[Record] = field(default_factory=list)
    bad: Sequence[Record] = field(default_factory=list)
    unscored: Sequence[Record] = field(default_factory=list)


def pick_examples(rundir: RunDir) -> Mapping[str, Examples]:
    """Examples per domain, from the evaluation where it kept rollouts, else from the latest training steps."""
    by_domain: dict[str, list[Record]] = {}
    stages = sorted(rundir.stages(), key=lambda stage: (stage.name != "evaluate", stage.name))
    for stage in stages:
        for domain, records in _latest(stage).items():
            by_domain.setdefault(domain, records)
    return {domain: _pick(records) for domain, records in sorted(by_domain.items())}


def _latest(stage: StageDir) -> Mapping[str, list[Record]]:
    """The last rollouts of a stage by domain, the student's first. Those nobody meant to score are left out."""
    found: dict[str, list[Record]] = {}
    for record in iter_jsonl(stage.rollouts):
        if record["score"] is not None or record["status"] != ScoreStatus.OK:
            found.setdefault(record["domain"], []).append({**record, "stage": stage.name})
    # A stage's log can be long; its last rollouts show what was learnt.
    return {
        domain: heapq.nlargest(LATEST, records, key=lambda record: (record["model"] == "student", record["step"]))
        for domain, records in found.items()
    }


def _pick(records: Sequence[Record]) -> Examples:
    scored = sorted((r for r in records if r["score"] is not None), key=lambda r: r["score"])
    if not scored:
        return Examples(unscored=records[:PER_KIND])
    lowest, highest = scored[0]["score"], scored[-1]["score"]
    # Where all scores are equal, only their sign tells good from bad.
    middle = (lowest + highest) / 2 if lowest < highest else 0.0
    good = [record for record in reversed(scored) if record["score"] > middle]
    bad = [record for record in scored if record["score"] <= middle]
    return Examples(
        good=_distinct(good), bad=_distinct(bad), unscored=_distinct([r for r in records if r["score"] is None])
    )


def _distinct(records: Sequence[Record]) -> list[Record]:
    """The first few, one per task."""
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record["task"], record)
        if len(first) == PER_KIND:
            break
    return list(first.values())
