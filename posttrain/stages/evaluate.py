"""Prove: play held-out tasks with every model of the run and keep the scores.

The judge of judged domains is the base model for every contestant, so that no model grades itself.
One file a (model, domain) pair makes the stage resumable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from posttrain.rollout.player import GroupJob
from posttrain.runs.evaluation import ModelScores
from posttrain.runs.rollout_log import write_groups
from posttrain.stages.session import Session, judged_by_policy
from posttrain.types import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A checkpoint and the domains it is measured on."""

    name: str
    """``base``, ``sft``, ``specialist`` or ``student``."""
    path: str
    domain: str


def contestants(
    session: Session, sft: Mapping[str, str], specialists: Mapping[str, str], student: str | None
) -> Iterator[Contestant]:
    """Everything to be compared, ordered so that each checkpoint is loaded as rarely as possible."""
    domains = session.recipe.domains
    yield from (Contestant(name="base", path=session.base_path, domain=name) for name in domains)
    for name in domains:
        if name in sft:
            yield Contestant(name="sft", path=sft[name], domain=name)
        if name in specialists:
            yield Contestant(name="specialist", path=specialists[name], domain=name)
    if student is not None:
        yield from (Contestant(name="student", path=student, domain=name) for name in domains)


def run_evaluate_stage(session: Session, stage: str, entrants: list[Contestant]) -> None:
    """Scores of all contestants into ``stages/<stage>``, skipping those already there."""
    folder = session.run.stage_dir(stage)
    missing = [e for e in entrants if not ModelScores.path_in(folder, e.domain, e.name).exists()]
    loaded: str | None = None
    judging = False
    with session.progress.stage(stage, len(entrants), first=len(entrants) - len(missing)) as progress:
        for done, entrant in enumerate(missing, start=len(entrants) - len(missing) + 1):
            if judged_by_policy({entrant.domain: session.recipe.domains[entrant.domain]}) and not judging:
                session.send_checkpoint(session.base_path, judge=True)
                judging = True
            if loaded != entrant.path:
                session.send_checkpoint(entrant.path)
                loaded = entrant.path
            scores = evaluate(session, stage, entrant)
            scores.save(folder)
            progress.update(done, {f"{entrant.domain}/{entrant.name}": float(np.nanmean(scores.sampled))})


def evaluate(session: Session, stage: str, entrant: Contestant) -> ModelScores:
    """One contestant on the held-out tasks of one domain: one greedy rollout and several sampled ones a task."""
    settings = session.recipe.evaluation
    domain = session.recipe.domains[entrant.domain]
    tasks = domain.tasks.heldout(count=settings.num_tasks)
    greedy = replace(domain.sampling, temperature=0.0)
    jobs: list[GroupJob] = []
    for i, task in enumerate(tasks):
        # The ids leave out the contestant, so that all draw with the same random numbers: a paired comparison.
        jobs.append(session.job(f"{stage}/{entrant.domain}/{i}/greedy", task, num_rollouts=1, sampling=greedy))
        jobs.append(session.job(f"{stage}/{entrant.domain}/{i}", task, num_rollouts=settings.num_samples))
    groups = session.rollouts.play(jobs)
    log = session.run.stage_dir(stage) / "rollouts" / f"{entrant.domain}-{entrant.name}.jsonl"
    log.unlink(missing_ok=True)
    write_groups(log, 0, groups)
    return ModelScores(
        domain=entrant.domain,
        model=entrant.name,
        task_ids=tuple(task.id for task in tasks),
        greedy=_matrix(groups[0::2]),
        sampled=_matrix(groups[1::2]),
    )


def _matrix(groups: list[Group]) -> np.ndarray:
    """[num_tasks, num_samples] of score values, NaN where a rollout could not be scored."""
    rows = [[np.nan if s.value is None else s.value for s in group.scores] for group in groups]
    return np.asarray(rows, dtype=np.float64)
