"""What happened to a run, read from its events: when it began, what was resumed, how long each stage took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.runs.durable import Record
from posttrain.runs.rundir import EventKind


def created(events: Sequence[Record]) -> float | None:
    """Unix time of the run's first event."""
    return events[0]["time"] if events else None


def resumptions(events: Sequence[Record]) -> list[dict[str, Any]]:
    """Every time the run was taken up again: ``{"time", "stage", "step"}``."""
    return [
        {"time": event["time"], "stage": event.get("stage"), "step": event.get("step")}
        for event in events
        if event["kind"] == EventKind.RESUMED
    ]


def warnings(events: Sequence[Record]) -> list[str]:
    """The messages of all warnings, each once, in order."""
    return list(dict.fromkeys(str(event.get("message")) for event in events if event["kind"] == EventKind.WARNING))


def stage_timings(events: Sequence[Record], metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per stage, in order of start: ``{"stage", "started", "finished", "wall_s", "sessions"}``.

    ``wall_s`` adds up the sessions in which the stage ran, without the time in which no process did. A
    session that was killed ends at its last metrics line kept, so work that was lost is not counted.
    """
    stages: dict[str, list[float]] = {}
    finished: dict[str, float] = {}
    for event in events:
        stage = event.get("stage")
        if event["kind"] in (EventKind.STAGE_STARTED, EventKind.RESUMED) and stage is not None:
            stages.setdefault(stage, []).append(event["time"])
        elif event["kind"] == EventKind.STAGE_FINISHED and stage is not None:
            finished[stage] = event["time"]
    logged: dict[str, list[float]] = {}
    for line in metrics:
        logged.setdefault(line["stage"], []).append(line["time"])
    return [
        {
            "stage": stage,
            "started": starts[0],
            "finished": finished.get(stage),
            "wall_s": _active_seconds(starts, finished.get(stage), logged.get(stage, [])),
            "sessions": len(starts),
        }
        for stage, starts in stages.items()
    ]


def _active_seconds(starts: list[float], finished: float | None, logged: list[float]) -> float:
    limits = [*starts[1:], float("inf")]
    total = 0.0
    for index, (start, limit) in enumerate(zip(starts, limits, strict=True)):
        is_last = index == len(starts) - 1
        end = finished if is_last and finished is not None else None
        total += max(0.0, (end or max((t for t in logged if start <= t < limit), default=start)) - start)
    return total
