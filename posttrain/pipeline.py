"""Runs a recipe's stages in order and resumes where a run was cut off.

A stage is finished when its ``done.json`` exists; a finished stage is never repeated. Within a stage the newest
complete checkpoint brings back weights, optimizer, data order and random state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import Recipe
from posttrain.errors import RecipeError
from posttrain.overrides import describe
from posttrain.preflight import check_recipe
from posttrain.runs.metrics import MetricsLog
from posttrain.runs.progress import Progress
from posttrain.runs.report import write_report
from posttrain.runs.rundir import RunDir
from posttrain.stages.session import Session

EVALUATE = "evaluate"
DISTILL = "distill"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the plan: ``kind`` is sft, grpo, distill or evaluate."""

    kind: str
    domain: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.domain}" if self.domain else self.kind


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe: each specialist's, then the merge, then the proof."""
    stages = []
    for name, domain in recipe.domains.items():
        if domain.sft is not None:
            stages.append(Stage(kind="sft", domain=name))
        if domain.grpo is not None:
            stages.append(Stage(kind="grpo", domain=name))
    if recipe.distill is not None:
        stages.append(Stage(kind=DISTILL))
    return [*stages, Stage(kind=EVALUATE)]


def run_recipe(recipe: Recipe, *, target: str, overrides: tuple[str, ...], path: Path, resume: bool) -> dict[str, Any]:
    """Run all stages into ``path`` and return the report. Raises ``RecipeError`` before anything is lost."""
    with RunDir.open(path) as run:
        started_before = run.recipe_file.exists()
        if started_before and not resume:
            raise RecipeError(
                f"run directory {path} already holds a run; add --resume to go on with it, or choose another --run-dir"
            )
        if started_before:
            _check_same_recipe(run, recipe)
        check_recipe(recipe)
        run.write_json(run.recipe_file, {"target": target, "overrides": list(overrides), "resolved": describe(recipe)})
        metrics = MetricsLog(run)
        with Progress() as progress, Session(recipe, run, metrics, progress) as session:
            _run_stages(session, resumed=started_before)
        return write_report(run)


def _run_stages(session: Session, *, resumed: bool) -> None:
    for stage in plan(session.recipe):
        run = session.run
        if run.is_done(stage.name):
            session.progress.skip(stage.name)
            continue
        started_before = run.stage_dir(stage.name, create=False).exists()
        run.event("resumed" if resumed and started_before else "started", stage=stage.name)
        begun = time.monotonic()
        result = _RUN[stage.kind](session, stage)
        run.mark_done(stage.name, {"seconds": time.monotonic() - begun, **result})


def _run_sft(session: Session, stage: Stage) -> dict[str, Any]:
    from posttrain.stages.sft import run_sft_stage

    assert stage.domain is not None
    return {"checkpoint": str(run_sft_stage(session, stage.name, stage.domain, session.base_path))}


def _run_grpo(session: Session, stage: Stage) -> dict[str, Any]:
    from posttrain.stages.grpo import run_grpo_stage

    assert stage.domain is not None
    start = _finals(session, "sft").get(stage.domain, session.base_path)
    return {"checkpoint": str(run_grpo_stage(session, stage.name, stage.domain, start))}


def _run_distill(session: Session, stage: Stage) -> dict[str, Any]:
    from posttrain.stages.distill import run_distill_stage

    return {"checkpoint": str(run_distill_stage(session, stage.name, specialists(session), session.base_path))}


def _run_evaluate(session: Session, stage: Stage) -> dict[str, Any]:
    from posttrain.stages.evaluate import contestants, run_evaluate_stage

    student = session.run.final(DISTILL) if session.run.is_done(DISTILL) else None
    entrants = contestants(
        session, _finals(session, "sft"), _finals(session, "grpo"), str(student) if student else None
    )
    run_evaluate_stage(session, stage.name, list(entrants))
    return {}


_RUN: Mapping[str, Callable[[Session, Stage], dict[str, Any]]] = {
    "sft": _run_sft,
    "grpo": _run_grpo,
    DISTILL: _run_distill,
    EVALUATE: _run_evaluate,
}


def _finals(session: Session, kind: str) -> dict[str, str]:
    """Domain -> final checkpoint of every finished stage of one kind."""
    done = [s for s in plan(session.recipe) if s.kind == kind and s.domain and session.run.is_done(s.name)]
    return {s.domain: str(session.run.final(s.name)) for s in done if s.domain}


def specialists(session: Session) -> dict[str, str]:
    """Domain -> checkpoint of the most trained model of that domain."""
    return _finals(session, "sft") | _finals(session, "grpo")


def _check_same_recipe(run: RunDir, recipe: Recipe) -> None:
    """A resumed run must be the run it was, or its numbers mean nothing."""
    before, now = run.read_json(run.recipe_file)["resolved"], describe(recipe)
    changed = sorted(_differences(before, now))
    if changed:
        raise RecipeError(
            f"run directory {run.path} was started with other settings: {', '.join(changed[:8])} differ; resume with "
            "the same recipe and overrides, or choose another --run-dir"
        )


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in before.keys() | now.keys()
            for found in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if before == now else [path]
