"""Held-out scores of base, SFT, specialist and student, and the report drawn from them.

Each (model, domain) is one file, written when it is complete, so an interrupted evaluation goes on with the
next missing file.

Shapes: N tasks, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from posttrain.runs.durable import read_json, write_json
from posttrain.runs.stats import Bootstrap, Estimate, Scores, bootstrap_gain, bootstrap_kept, task_means

Mode = Literal["greedy", "sampled"]
ModelName = Literal["base", "sft", "specialist", "student"]
MODES: tuple[Mode, ...] = ("greedy", "sampled")
MODELS: tuple[ModelName, ...] = ("base", "sft", "specialist", "student")


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelScores:
    """What one model scored on one domain's held-out tasks."""

    model: ModelName
    domain: str
    task_ids: tuple[str, ...]
    greedy: Scores
    """[N, 1], NaN where a rollout could not be scored; [N, 0] where none was played."""
    sampled: Scores
    """[N, S]."""

    def __post_init__(self) -> None:
        for mode in MODES:
            matrix = np.asarray(getattr(self, mode), np.float64)
            if matrix.ndim != 2 or len(matrix) != len(self.task_ids):
                raise ValueError(
                    f"{mode} scores of {self.model} on {self.domain!r} have shape {matrix.shape}; "
                    f"expected [{len(self.task_ids)}, num_samples], one row per task"
                )
            object.__setattr__(self, mode, matrix)

    def save(self, directory: Path) -> Path:
        """Write the file of this (model, domain), atomically."""
        path = scores_path(directory, self.model, self.domain)
        write_json(
            path,
            {
                "model": self.model,
                "domain": self.domain,
                "task_ids": self.task_ids,
                "greedy": self.greedy,
                "sampled": self.sampled,
            },
        )
        return path

    @classmethod
    def load(cls, path: Path) -> ModelScores:
        """Read a file written by ``save``."""
        data = read_json(path)
        # None becomes NaN in a float array. A matrix without rows keeps its two dimensions.
        matrices = {mode: np.array(data[mode], np.float64).reshape(len(data["task_ids"]), -1) for mode in MODES}
        return cls(model=data["model"], domain=data["domain"], task_ids=tuple(data["task_ids"]), **matrices)


@dataclass(frozen=True, kw_only=True, eq=False)
class DomainEvaluation:
    """All models' scores on the same held-out tasks of one domain."""

    domain: str
    task_ids: tuple[str, ...]
    models: Mapping[ModelName, ModelScores]

    @classmethod
    def of(cls, scores: Sequence[ModelScores]) -> DomainEvaluation:
        """Join models evaluated on one domain. ``ValueError`` when their tasks differ."""
        first = scores[0]
        for other in scores:
            if (other.domain, other.task_ids) != (first.domain, first.task_ids):
                raise ValueError(
                    f"{other.model} on {other.domain!r} was evaluated on other tasks than {first.model} on "
                    f"{first.domain!r}; expected the same ones, since models are compared task by task; "
                    "delete the older file and evaluate again"
                )
        return cls(
            domain=first.domain,
            task_ids=first.task_ids,
            models={name: model for name in MODELS for model in scores if model.model == name},
        )

    def scores(self, model: ModelName, mode: Mode) -> Scores | None:
        """[N, S] scores, or None where there is no such model."""
        found = self.models.get(model)
        return None if found is None else getattr(found, mode)

    def common_scores(self, mode: Mode) -> dict[ModelName, Scores]:
        """Scores per model on the tasks where every model has at least one scored rollout."""
        matrices = {name: getattr(model, mode) for name, model in self.models.items()}
        everywhere = np.all([np.isfinite(task_means(matrix)) for matrix in matrices.values()], axis=0)
        return {name: matrix[everywhere] for name, matrix in matrices.items()}


def scores_path(directory: Path, model: ModelName, domain: str) -> Path:
    """File of one (model, domain) in the evaluate stage's directory."""
    return directory / "scores" / f"{model}-{domain}.json"


def load_evaluations(directory: Path) -> tuple[DomainEvaluation, ...]:
    """Everything evaluated so far, by domain name."""
    scores = [ModelScores.load(path) for path in sorted((directory / "scores").glob("*.json"))]
    domains = sorted({item.domain for item in scores})
    return tuple(DomainEvaluation.of([item for item in scores if item.domain == domain]) for domain in domains)


def summarise(evaluation: DomainEvaluation, options: Bootstrap) -> dict[str, Any]:
    """One entry of the report's ``domains``.

    ``base``, ``sft``, ``specialist``, ``student`` are means of sampled rollouts and ``n`` the number of
    tasks they are taken over: those with a score from every model, so that the difference of two columns is
    the paired gain its interval belongs to. ``unscored`` counts the rollouts without a score per model.
    ``greedy`` holds the same fields for the greedy rollout. What a run does not have is None; an infinite
    bound of ``kept_ci`` is None too.
    """
    return {
        "domain": evaluation.domain,
        **_mode_summary(evaluation, "sampled", options),
        "greedy": _mode_summary(evaluation, "greedy", options),
    }


def _mode_summary(evaluation: DomainEvaluation, mode: Mode, options: Bootstrap) -> dict[str, Any]:
    scores = evaluation.common_scores(mode)
    base, sft = scores.get("base"), scores.get("sft")
    specialist, student = scores.get("specialist"), scores.get("student")
    gain = rl_gain = student_gain = kept = None
    if specialist is not None and base is not None:
        gain = bootstrap_gain(specialist, base, options)
        kept = None if student is None else bootstrap_kept(student, specialist, base, options)
    if student is not None and base is not None:
        student_gain = bootstrap_gain(student, base, options)
    if specialist is not None and sft is not None:
        rl_gain = bootstrap_gain(specialist, sft, options)
    return {
        "n": len(next(iter(scores.values()))),
        **{name: _mean(scores.get(name)) for name in MODELS},
        "gain_ci": _interval(gain),
        "rl_gain_ci": _interval(rl_gain),
        "student_gain_ci": _interval(student_gain),
        "kept": None if kept is None else _finite(kept.value),
        "kept_ci": _interval(kept),
        "unscored": {name: int(np.isnan(getattr(model, mode)).sum()) for name, model in evaluation.models.items()},
    }


def _mean(scores: Scores | None) -> float | None:
    return None if scores is None or not len(scores) else float(task_means(scores).mean())


def _interval(estimate: Estimate | None) -> list[float | None] | None:
    if estimate is None or math.isnan(estimate.value):
        return None
    return [_finite(estimate.low), _finite(estimate.high)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
