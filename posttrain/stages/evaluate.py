"""Prove: play held-out tasks with every model of the run and keep the scores.

The judge of judged domains is the base model for every contestant, so that no model grades itself.
One file a (model, domain) pair makes the stage resumable.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posttrain.rollout.arrays import free_groups
from posttrain.runs.evaluation import ModelName, ModelScores, scores_path
from posttrain.runs.rollout_log import RolloutLog
from posttrain.runs.rundir import StageDir
from posttrain.stages.reward_files import RewardFiles
from posttrain.stages.session import Session
from posttrain.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A checkpoint and the domains it is measured on."""

    model: ModelName
    path: str
    domain: str


def contestants(
    session: Session, sft: Mapping[str, str], specialists: Mapping[str, str], student: str | None
) -> Iterator[Contestant]:
    """Everything to be compared, ordered so that each checkpoint is loaded as rarely as possible."""
    domains = session.recipe.domains
    yield from (Contestant(model="base", path=session.base_path, domain=name) for name in domains)
    for name in domains:
        # Without reinforcement the specialist is the SFT model, and one measurement of it is enough.
        if name in sft and sft[name] != specialists.get(name):
            yield Contestant(model="sft", path=sft[name], domain=name)
        if name in specialists:
            yield Contestant(model="specialist", path=specialists[name], domain=name)
    if student is not None:
        yield from (Contestant(model="student", path=student, domain=name) for name in domains)


def run_evaluate_stage(session: Session, stage: StageDir, entrants: Sequence[Contestant]) -> None:
    """Scores of all contestants into ``stage``, skipping those already there."""
    missing = [e for e in entrants if not scores_path(stage.path, e.model, e.domain).exists()]
    already = len(entrants) - len(missing)
    log = RolloutLog(stage)
    # Those of a contestant whose scores were not saved are played, and written, again.
    log.rewind(already)
    session.begin(stage, already)
    progress = session.progress.stage(stage.name, len(entrants), first_step=already)
    if any(session.judged_by_policy(entrant.domain) for entrant in missing):
        session.send_checkpoint(session.base_path, judge=True)
    for domain in dict.fromkeys(entrant.domain for entrant in entrants):
        # All contestants, over a resumption too, are measured by one version of the files.
        files = RewardFiles(session, stage, domain)
        files.restore(0)
        files.refresh(0)
    loaded: str | None = None
    for done, entrant in enumerate(missing, start=already + 1):
        if loaded != entrant.path:
            session.send_checkpoint(entrant.path)
            loaded = entrant.path
        scores, groups = evaluate(session, entrant)
        session.check_scored(stage, groups)
        log.write_groups(groups, done, model=entrant.model)
        scores.save(stage.path)
        progress.update(done, {"reward": float(np.nanmean(scores.sampled))})


def evaluate(session: Session, entrant: Contestant) -> tuple[ModelScores, list[Group]]:
    """One contestant on the held-out tasks of one domain: several sampled rollouts a task, and a greedy one."""
    settings = session.recipe.evaluation
    tasks = session.recipe.domains[entrant.domain].tasks.heldout(count=settings.num_tasks)
    if len(tasks) < settings.num_tasks:
        session.warn(
            f"domains.{entrant.domain}.tasks has only {len(tasks)} held-out tasks, not evaluation.num_tasks = "
            f"{settings.num_tasks}; its intervals are the wider for it."
        )
    # The ids leave out the contestant, so that all draw with the same random numbers: a paired comparison.
    job = functools.partial(session.job, player=entrant.model)
    prefix = f"evaluate/{entrant.domain}"
    played_greedily = tasks if settings.greedy else ()
    greedy = [job(f"{prefix}/{i}/greedy", t, num_rollouts=1, greedy=True) for i, t in enumerate(played_greedily)]
    sampled = [job(f"{prefix}/{i}", t, num_rollouts=settings.num_samples) for i, t in enumerate(tasks)]
    groups = session.rollouts.play(greedy + sampled)
    free_groups(groups)
    scores = ModelScores(
        domain=entrant.domain,
        model=entrant.model,
        task_ids=tuple(task.id for task in tasks),
        greedy=_matrix(groups[: len(greedy)]) if greedy else np.empty((len(tasks), 0)),
        sampled=_matrix(groups[len(greedy) :]),
    )
    return scores, groups


def _matrix(groups: Sequence[Group]) -> npt.NDArray[np.float64]:
    """[num_tasks, num_samples] of score values, NaN where a rollout could not be scored."""
    rows = [[np.nan if s.value is None else s.value for s in group.scores] for group in groups]
    return np.asarray(rows, dtype=np.float64)
