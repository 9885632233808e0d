"""Rollouts on disk with all it takes to explain, later, why each got the reward it got."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from posttrain.runs.durable import JsonLines, Record
from posttrain.runs.rundir import StageDir
from posttrain.types import AnyRollout, Group, Score


class RolloutLog:
    """Writes the ``rollouts.jsonl`` of one stage."""

    def __init__(self, stage: StageDir) -> None:
        self._lines = JsonLines(stage.rollouts)

    def write_groups(
        self,
        groups: Sequence[Group],
        step: int,
        *,
        advantages: Sequence[Sequence[float]] | None = None,
        model: str | None = None,
    ) -> None:
        """Append every rollout of the groups.

        ``advantages`` has one row per group and one number per rollout (NaN: left out of the update).
        ``model`` says who played where a stage plays several, as evaluation does.
        """
        rows = advantages if advantages is not None else [[None] * len(group.rollouts) for group in groups]
        self._lines.append(
            {"step": step, "model": model, **rollout_record(rollout, score), "advantage": advantage}
            for group, row in zip(groups, rows, strict=True)
            for rollout, score, advantage in zip(group.rollouts, group.scores, row, strict=True)
        )

    def rewind(self, step: int) -> int:
        """Drop the rollouts of later steps when the stage resumes from ``step``; returns how many."""
        return self._lines.keep(lambda record: record["step"] <= step)


def rollout_record(rollout: AnyRollout, score: Score) -> Record:
    """One rollout and its score as JSON data, the task first and the verdict last."""
    tokens = rollout.tokens
    return {
        "id": rollout.id,
        "task": rollout.task.id,
        "domain": rollout.task.domain,
        "effort": rollout.task.effort,
        "prompt": list(rollout.task.prompt),
        "answer": rollout.task.answer,
        "conversation": list(rollout.messages),
        "stop": rollout.stop.value,
        "error": rollout.error,
        "failures": list(rollout.failures),
        "tokens": {"generated": tokens.num_loss_tokens, "total": tokens.num_tokens},
        "versions": None if tokens.version_range is None else list(tokens.version_range),
        "wall_s": round(rollout.wall_s, 3),
        "score": score.value,
        "status": score.status.value,
        "parts": dict(score.parts),
        "explanation": score.explanation,
        "judgments": [dataclasses.asdict(judgment) for judgment in score.judgments],
        "rubric_version": score.rubric_version,
        "flags": list(score.flags),
        "score_error": score.error,
    }
