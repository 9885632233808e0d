"""Runs a recipe's stages in order and resumes where a run was cut off.

A stage is finished when its ``done.json`` exists; a finished stage is never repeated. Within a stage the newest
complete checkpoint brings back weights, optimizer, data order and random state.
"""

from __future__ import annotations

import errno
import itertools
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import Distill, Evaluation, MixedRL, Recipe
from posttrain.errors import RecipeError
from posttrain.preflight import check_disk, check_recipe, disk_needed
from posttrain.protocols import Playable
from posttrain.runs.costs import summarise_costs
from posttrain.runs.durable import read_json
from posttrain.runs.evaluation import DomainEvaluation, load_evaluations, summarise_efforts
from posttrain.runs.metrics import MetricsLog, read_metrics
from posttrain.runs.progress import Progress
from posttrain.runs.report import write_report
from posttrain.runs.rundir import EventKind, RunDir, StageDir
from posttrain.runs.stats import Bootstrap, bootstrap_mean
from posttrain.stages.session import Session, finals


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the plan: ``kind`` is sft, grpo, distill or evaluate."""

    kind: str
    subject: str | None = None
    """The domain of an SFT, the specialist of a GRPO."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.subject}" if self.subject else self.kind


def plan(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe: each specialist's, then the merge, then the proof."""
    stages = []
    for name, specialty in recipe.specialties().items():
        # Where effort modes have specialists of their own, these start from one SFT.
        sft = Stage(kind="sft", subject=specialty.domain_name)
        if specialty.domain.sft is not None and sft not in stages:
            stages.append(sft)
        if specialty.domain.grpo is not None:
            stages.append(Stage(kind="grpo", subject=name))
    if recipe.distill is not None:
        stages.append(Stage(kind="distill"))
    return [*stages, Stage(kind="evaluate")]


def run_recipe(recipe: Recipe, path: Path, *, resume: bool, stop_before: str | None = None) -> dict[str, Any]:
    """Run all stages into ``path``, or those before the first of kind ``stop_before``, and return the report.

    Raises ``RecipeError`` before anything is lost.
    """
    run = RunDir(path)
    if run.recipe.exists() and not resume:
        raise RecipeError(
            f"run directory {path} already holds a run; add --resume to go on with it, or choose another --run-dir"
        )
    check_recipe(recipe)
    finished = sum(stage.done is not None for stage in run.stages())
    check_disk(path, needed_bytes=disk_needed(recipe, finished_stages=finished))
    with run.lock():
        goes_on = run.recipe.exists()
        run.write_recipe(recipe)
        if not goes_on:
            run.log_event(EventKind.STARTED, name=recipe.name)
        with (
            MetricsLog(run) as metrics,
            Progress() as progress,
            Session(recipe=recipe, run=run, metrics=metrics, progress=progress) as session,
        ):
            for stage in itertools.takewhile(lambda stage: stage.kind != stop_before, plan(recipe)):
                _run_stage(session, stage)
        if stop_before is None:
            run.log_event(EventKind.FINISHED)
        return report_run(run, recipe.evaluation)


def report_run(run: RunDir, settings: Evaluation) -> dict[str, Any]:
    """Write report.html, report.json and the plots from what the run has recorded so far."""
    metrics = read_metrics(run.metrics)
    options = Bootstrap(resamples=settings.bootstrap_resamples, confidence=settings.confidence)
    write_report(run, load_evaluations(run.stage("evaluate").path), metrics, summarise_costs(metrics), options)
    return read_json(run.report_json)


def _run_stage(session: Session, stage: Stage) -> None:
    """Run one stage unless it is finished."""
    directory = session.run.stage(stage.name)
    if directory.done is None:
        begun = time.monotonic()
        try:
            _train_or_measure(session, stage, directory)
        except Exception as error:
            _name_full_disk(error, directory)
            raise
        directory.mark_done({"seconds": time.monotonic() - begun})
    elif any(e["kind"] == EventKind.STAGE_FINISHED and e["stage"] == stage.name for e in session.run.read_events()):
        return
    # Only an unfinished stage resumes; its optimizer and teacher states, judges and rollouts are the bulk of what a run
    # writes.
    outcomes = session.run.rollouts / "outcomes" / stage.name
    for folder in (directory.checkpoints, directory.judges, directory.states, directory.start, outcomes):
        shutil.rmtree(folder, ignore_errors=True)
    session.run.log_event(EventKind.STAGE_FINISHED, stage=stage.name)


def _name_full_disk(error: Exception, directory: StageDir) -> None:
    """Raise ``OSError`` with a remedy if a full disk is behind ``error``; libraries have words of their own for one."""
    if "No space left on device" in str(error) or getattr(error, "errno", None) == errno.ENOSPC:
        raise OSError(
            f"stage {directory.name}: the disk of {directory.path} is full ({error}); what was saved before is kept: "
            "free some space and go on with --resume"
        ) from error


def _train_or_measure(session: Session, stage: Stage, directory: StageDir) -> None:
    if stage.kind == "sft" and stage.subject:
        from posttrain.stages.sft import run_sft_stage

        run_sft_stage(session, directory, stage.subject)
    elif stage.kind == "grpo" and stage.subject:
        from posttrain.stages.grpo import Training, run_grpo_stage

        domain = session.recipe.specialties()[stage.subject].domain_name
        start = finals(session, "sft").get(domain, session.base_path)
        run_grpo_stage(session, directory, Training.specialist(session.recipe, stage.subject), start)
    elif stage.kind == "distill":
        _make_student(session, directory)
    else:
        from posttrain.stages.evaluate import contestants, run_evaluate_stage

        distilled = session.run.stage("distill")
        student = str(distilled.final) if distilled.done is not None else None
        for specialty in session.recipe.specialties().values():
            teacher = specialty.domain.teacher
            if teacher is not None and not isinstance(teacher, Playable):
                session.warn(
                    f"{specialty.place}: its teacher is no checkpoint that could be measured beside the student."
                )
        entrants = contestants(session, finals(session, "sft"), specialists(session), student)
        run_evaluate_stage(session, directory, list(entrants))


def _make_student(session: Session, directory: StageDir) -> None:
    """One student of all domains, in the recipe's way."""
    recipe, config = session.recipe, session.recipe.distill
    if isinstance(config, Distill):
        from posttrain.stages.distill import run_distill_stage

        run_distill_stage(session, directory, config, specialists(session))
    elif isinstance(config, MixedRL):
        from posttrain.stages.grpo import Training, run_grpo_stage

        # The tasks and the start are those of a distillation, so that the two can be compared.
        training = Training(config=config.grpo, domains=recipe.domains, seed=recipe.seed + 1)
        run_grpo_stage(session, directory, training, session.base_path)
    elif config is not None:
        from posttrain.stages.merge_weights import run_merge_weights_stage

        run_merge_weights_stage(session, directory, config, specialists(session))


def ready_made(recipe: Recipe) -> dict[str, str]:
    """Specialist -> checkpoint of every teacher that the recipe names and that is a checkpoint by itself."""
    found: dict[str, str] = {}
    for name, specialty in recipe.specialties().items():
        if isinstance(specialty.domain.teacher, Playable):
            found[name] = specialty.domain.teacher.checkpoint
    return found


def specialists(session: Session) -> dict[str, str]:
    """Checkpoint of each specialist, by its name: the most trained model of that domain, or mode, or the ready-made
    one."""
    found = {**ready_made(session.recipe), **finals(session, "sft"), **finals(session, "grpo")}
    return {name: found[name] for name in session.recipe.specialties() if name in found}


def evaluate_checkpoint(recipe: Recipe, model: str, path: Path | None) -> list[dict[str, Any]]:
    """Scores of any checkpoint on the held-out tasks of every domain of a recipe.

    ``path`` keeps the rollouts and scores; None uses a temporary folder.
    """
    from posttrain.models import resolve_path
    from posttrain.stages.evaluate import Contestant, run_evaluate_stage

    if path is not None and RunDir(path).stages():
        # Scores there are of some other model, and the stage would take them for this one's.
        raise RecipeError(f"run directory {path} already holds stages of a run; choose another --run-dir")
    check_recipe(recipe)
    checkpoint = resolve_path(model)
    with tempfile.TemporaryDirectory() as scratch:
        run = RunDir(path or scratch)
        options = Bootstrap(resamples=recipe.evaluation.bootstrap_resamples, confidence=recipe.evaluation.confidence)
        with (
            run.lock(),
            MetricsLog(run) as metrics,
            Progress() as progress,
            Session(recipe=recipe, run=run, metrics=metrics, progress=progress) as session,
        ):
            stage = run.stage("evaluate")
            entrants = [Contestant(model="student", path=checkpoint, domain=name) for name in recipe.domains]
            run_evaluate_stage(session, stage, entrants)
        return [_standing(evaluation, options) for evaluation in load_evaluations(stage.path)]


def _standing(evaluation: DomainEvaluation, options: Bootstrap) -> dict[str, Any]:
    scores = evaluation.models["student"]
    sampled = bootstrap_mean(scores.sampled, options)
    return {
        "domain": evaluation.domain,
        "n": len(evaluation.task_ids),
        "sampled": sampled.value,
        "sampled_ci": [sampled.low, sampled.high],
        "greedy": bootstrap_mean(scores.greedy, options).value if scores.greedy.size else None,
        "unscored": sum(scores.unscored.values()),
        "efforts": {effort: models["student"] for effort, models in summarise_efforts(evaluation, options).items()},
    }
