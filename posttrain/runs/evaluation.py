"""Held-out scores of base, SFT, specialist and student, and the report drawn from them.

Each (model, domain) is one file, or each (model, domain, effort mode) where the modes have a specialist each, written
when it is complete, so an interrupted evaluation goes on with the next missing file.

Shapes: N tasks, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from posttrain.config import specialist_name
from posttrain.runs.durable import read_json, write_json
from posttrain.runs.stats import Bootstrap, Estimate, Scores, bootstrap_gain, bootstrap_kept, bootstrap_mean, task_means

Mode = Literal["greedy", "sampled"]
ModelName = Literal["base", "sft", "specialist", "student"]
MODES: tuple[Mode, ...] = ("greedy", "sampled")
MODELS: tuple[ModelName, ...] = ("base", "sft", "specialist", "student")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EffortScores:
    """The sampled rollouts of one effort mode."""

    sampled: Scores
    """[N, S], NaN where a rollout could not be scored, or a task is not played in this mode."""
    thinking_tokens: Scores
    """[N, S], generated tokens of reasoning; NaN where a rollout failed, or there is none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelScores:
    """What one model scored on one domain's held-out tasks."""

    model: ModelName
    domain: str
    effort: str | None = None
    """The only mode of the domain that these are of; None: of all."""
    task_ids: tuple[str, ...]
    greedy: Scores
    """[N, 1] for each mode, side by side, NaN where a rollout could not be scored; [N, 0] where none was played."""
    sampled: Scores
    """[N, S] for each mode, side by side."""
    efforts: Mapping[str, EffortScores] = field(default_factory=dict)
    """By mode, where the domain has any."""
    unscored: Mapping[Mode, int] = field(default_factory=dict)
    """Rollouts that could not be scored; the NaNs, where it is not given."""

    def __post_init__(self) -> None:
        for mode in MODES:
            matrix = np.asarray(getattr(self, mode), np.float64)
            if matrix.ndim != 2 or len(matrix) != len(self.task_ids):
                raise ValueError(
                    f"{mode} scores of {self.model} on {self.domain!r} have shape {matrix.shape}; "
                    f"expected [{len(self.task_ids)}, num_samples], one row per task"
                )
            object.__setattr__(self, mode, matrix)
        if not self.unscored:
            object.__setattr__(self, "unscored", {mode: int(np.isnan(getattr(self, mode)).sum()) for mode in MODES})

    def save(self, directory: Path) -> Path:
        """Write the file of these scores, atomically."""
        path = scores_path(directory, self.model, self.domain, self.effort)
        write_json(
            path,
            {
                "model": self.model,
                "domain": self.domain,
                "effort": self.effort,
                "task_ids": self.task_ids,
                "greedy": self.greedy,
                "sampled": self.sampled,
                "efforts": {
                    name: {"sampled": effort.sampled, "thinking_tokens": effort.thinking_tokens}
                    for name, effort in self.efforts.items()
                },
                "unscored": self.unscored,
            },
        )
        return path

    @classmethod
    def load(cls, path: Path) -> ModelScores:
        """Read a file written by ``save``."""
        data = read_json(path)

        def matrix(rows: Any) -> Scores:
            # None becomes NaN in a float array. A matrix without rows keeps its two dimensions.
            return np.array(rows, np.float64).reshape(len(data["task_ids"]), -1)

        return cls(
            model=data["model"],
            domain=data["domain"],
            effort=data.get("effort"),
            task_ids=tuple(data["task_ids"]),
            greedy=matrix(data["greedy"]),
            sampled=matrix(data["sampled"]),
            efforts={
                name: EffortScores(**{part: matrix(rows) for part, rows in parts.items()})
                for name, parts in data.get("efforts", {}).items()
            },
            unscored=data.get("unscored", {}),
        )

    @classmethod
    def join(cls, parts: Sequence[ModelScores]) -> ModelScores:
        """Those of several modes of one domain as one."""
        first = parts[0]
        if any(part.task_ids != first.task_ids for part in parts):
            raise ValueError(
                f"{first.model} on {first.domain!r} was evaluated on other tasks at effort {first.effort!r} than at "
                "others; expected the same ones; delete these files and evaluate again"
            )
        return replace(
            first,
            effort=None,
            greedy=np.hstack([part.greedy for part in parts]),
            sampled=np.hstack([part.sampled for part in parts]),
            efforts={name: effort for part in parts for name, effort in part.efforts.items()},
            unscored={mode: sum(part.unscored[mode] for part in parts) for mode in MODES},
        )


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


def scores_path(directory: Path, model: ModelName, domain: str, effort: str | None = None) -> Path:
    """File of one (model, domain), or one mode of it, in the evaluate stage's directory."""
    name = domain if effort is None else specialist_name(domain, effort)
    return directory / "scores" / f"{model}-{name}.json"


def load_evaluations(directory: Path) -> tuple[DomainEvaluation, ...]:
    """Everything evaluated so far, by domain name; a model counts when it has played in as many modes as any other."""
    by_model: dict[tuple[str, ModelName], list[ModelScores]] = {}
    for path in sorted((directory / "scores").glob("*.json")):
        scores = ModelScores.load(path)
        by_model.setdefault((scores.domain, scores.model), []).append(scores)
    whole = [ModelScores.join(parts) if len(parts) > 1 else parts[0] for parts in by_model.values()]
    num_modes = {domain: max(len(s.efforts) for s in whole if s.domain == domain) for domain, _ in by_model}
    return tuple(
        DomainEvaluation.of([s for s in whole if s.domain == domain and len(s.efforts) == count])
        for domain, count in sorted(num_modes.items())
    )


def summarise(evaluation: DomainEvaluation, options: Bootstrap) -> dict[str, Any]:
    """One entry of the report's ``domains``, with what ``summarise_efforts`` gives under ``efforts``.

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
        "efforts": summarise_efforts(evaluation, options),
    }


def summarise_efforts(evaluation: DomainEvaluation, options: Bootstrap) -> dict[str, dict[str, Any]]:
    """Per effort mode and model, the mean score of sampled rollouts and the mean number of thinking tokens, with their
    intervals. Empty where the domain has no modes."""
    found: dict[str, dict[str, Any]] = {}
    for model, scores in evaluation.models.items():
        for name, effort in scores.efforts.items():
            measured = {"score": effort.sampled, "thinking_tokens": effort.thinking_tokens}
            estimates = {key: bootstrap_mean(matrix, options) for key, matrix in measured.items()}
            found.setdefault(name, {})[model] = {
                **{key: _finite(estimate.value) for key, estimate in estimates.items()},
                **{f"{key}_ci": _interval(estimate) for key, estimate in estimates.items()},
            }
    return found


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
        "unscored": {name: model.unscored[mode] for name, model in evaluation.models.items()},
    }


def _mean(scores: Scores | None) -> float | None:
    return None if scores is None or not len(scores) else float(task_means(scores).mean())


def _interval(estimate: Estimate | None) -> list[float | None] | None:
    if estimate is None or math.isnan(estimate.value):
        return None
    return [_finite(estimate.low), _finite(estimate.high)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
