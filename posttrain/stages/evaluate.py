"""Prove: play held-out tasks with every model of the run and keep the scores.

The judge of judged domains is the base model for every contestant, so that no model grades itself.
One file a (model, domain) pair, or a mode of it that has its own specialist, makes the stage resumable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from posttrain.config import Domain
from posttrain.rollout.arrays import free_groups
from posttrain.rollout.player import GroupJob
from posttrain.runs.evaluation import EffortScores, Mode, ModelName, ModelScores, scores_path
from posttrain.runs.rollout_log import RolloutLog
from posttrain.runs.rundir import StageDir
from posttrain.stages.reward_files import RewardFiles
from posttrain.stages.session import Session
from posttrain.types import Group, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A checkpoint and the domain it is measured on."""

    model: ModelName
    path: str
    domain: str
    effort: str | None = None
    """The only mode it is measured in; None: all modes of the domain."""


def contestants(
    session: Session, sft: Mapping[str, str], specialists: Mapping[str, str], student: str | None
) -> Iterator[Contestant]:
    """Everything to be compared, ordered so that each checkpoint is loaded as rarely as possible."""
    domains, specialties = session.recipe.domains, session.recipe.specialties()
    yield from (Contestant(model="base", path=session.base_path, domain=name) for name in domains)
    for name in domains:
        own = {key: each.effort for key, each in specialties.items() if each.domain_name == name}
        # Without reinforcement the specialist is the SFT model, and one measurement of it is enough.
        if name in sft and sft[name] not in [specialists.get(key) for key in own]:
            yield Contestant(model="sft", path=sft[name], domain=name)
        for key, effort in own.items():
            if key in specialists:
                yield Contestant(model="specialist", path=specialists[key], domain=name, effort=effort)
    if student is not None:
        yield from (Contestant(model="student", path=student, domain=name) for name in domains)


def run_evaluate_stage(session: Session, stage: StageDir, entrants: Sequence[Contestant]) -> None:
    """Scores of all contestants into ``stage``, skipping those already there."""
    missing = [e for e in entrants if not scores_path(stage.path, e.model, e.domain, e.effort).exists()]
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
    """One contestant on the held-out tasks of one domain, in each effort mode: several sampled rollouts a task, and a
    greedy one. Their length costs nothing here."""
    settings, domain = session.recipe.evaluation, session.recipe.domains[entrant.domain]
    tasks = domain.tasks.heldout(count=settings.num_tasks)
    if len(tasks) < settings.num_tasks:
        session.warn(
            f"domains.{entrant.domain}.tasks has only {len(tasks)} held-out tasks, not evaluation.num_tasks = "
            f"{settings.num_tasks}; its intervals are the wider for it."
        )
    forms = forms_of(domain, tasks, entrant.effort)

    def job(form: Form, suffix: str = "", **options: Any) -> GroupJob:
        # The ids leave out the contestant, so that all draw with the same random numbers: a paired comparison.
        place = f"evaluate/{entrant.domain}/{form.index}" + (f"/{form.mode}" if form.mode is not None else "")
        made = session.job(place + suffix, form.task, player=entrant.model, **options)
        return replace(made, play=replace(made.play, length_penalty=None))

    greedy = [job(form, "/greedy", num_rollouts=1, greedy=True) for form in forms if settings.greedy]
    sampled = [job(form, num_rollouts=settings.num_samples) for form in forms]
    groups = session.rollouts.play(greedy + sampled)
    played: dict[Mode, list[Group]] = {"greedy": groups[: len(greedy)], "sampled": groups[len(greedy) :]}
    lengths = [session.thinking_tokens(group) for group in played["sampled"]] if domain.efforts else []
    free_groups(groups)
    by_mode = {name: _by_mode(forms, map(_values, found), len(tasks)) for name, found in played.items()}
    thinking = _by_mode(forms, lengths, len(tasks))
    scores = ModelScores(
        domain=entrant.domain,
        model=entrant.model,
        effort=entrant.effort,
        task_ids=tuple(task.id for task in tasks),
        greedy=np.hstack(list(by_mode["greedy"].values())) if greedy else np.empty((len(tasks), 0)),
        sampled=np.hstack(list(by_mode["sampled"].values())),
        efforts={
            str(mode): EffortScores(sampled=by_mode["sampled"][mode], thinking_tokens=found)
            for mode, found in thinking.items()
        },
        unscored={
            name: sum(s.value is None for group in found for s in group.scores) for name, found in played.items()
        },
    )
    return scores, groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A held-out task in one of the effort modes of its domain."""

    index: int
    """Of the task."""
    task: Task
    mode: str | None
    """None where the domain has no modes, whatever the task says."""


def forms_of(domain: Domain, tasks: Sequence[Task], only: str | None = None) -> list[Form]:
    """All that is played of a domain's held-out tasks, or what is played of them in one mode."""
    if not domain.efforts:
        return [Form(index=index, task=task, mode=None) for index, task in enumerate(tasks)]
    return [
        Form(index=index, task=replace(task, effort=mode), mode=mode)
        for index, task in enumerate(tasks)
        for mode in domain.modes_of(task)
        if only in (None, mode)
    ]


def _by_mode(
    forms: Sequence[Form], rows: Iterable[Sequence[float]], num_tasks: int
) -> dict[str | None, npt.NDArray[np.float64]]:
    """Mode -> [num_tasks, num_samples], NaN for a task that is not played in it; nothing when there are no rows."""
    found: dict[str | None, npt.NDArray[np.float64]] = {}
    for form, row in zip(forms, rows, strict=False):
        matrix = found.setdefault(form.mode, np.full((num_tasks, len(row)), np.nan))
        matrix[form.index] = row
    return found


def _values(group: Group) -> list[float]:
    """Score values, NaN where a rollout could not be scored."""
    return [np.nan if score.value is None else score.value for score in group.scores]
