"""Merge: multi-teacher on-policy distillation into one student.

Each step samples rollouts of the student over all domains, lets each domain's teacher read its own samples,
and moves the student along the exact gradient of KL(student || teacher). No reward takes part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from posttrain.config import Distill, Domain
from posttrain.errors import RecipeError
from posttrain.learner.objectives import DistillObjective
from posttrain.protocols import Teacher
from posttrain.rollout.player import GroupJob
from posttrain.rollout.samples import distill_samples, group_metrics
from posttrain.runs.rollout_log import write_groups
from posttrain.stages.grpo import open_learner, send_policy, take_tasks
from posttrain.stages.session import Session
from posttrain.types import Task


def run_distill_stage(session: Session, stage: str, specialists: Mapping[str, str], start: str) -> Path:
    """From ``start`` to ``stages/<stage>/final``. ``specialists`` maps a domain to its checkpoint."""
    config = session.recipe.distill
    assert config is not None
    stage_dir = session.run.stage_dir(stage)
    weights = {name: domain.weight for name, domain in session.recipe.domains.items()}
    learner = open_learner(session, start, config, num_updates=1, stage_dir=stage_dir)
    first = learner.state.get("next_step", 0)
    send_policy(session, learner, version=first)
    tasks = interleave(session, config, skip_steps=first)
    teachers = teachers_of(session.recipe.domains, config, specialists)
    with (
        config.teachers.open(teachers, student_path=start) as pool,
        session.progress.stage(stage, config.max_steps, first=first) as progress,
    ):
        objective = DistillObjective(config, states_of=pool.states, head_of=pool.head)
        for step in range(first, config.max_steps):
            groups = session.rollouts.play(_jobs(session, f"{stage}/{step}", next(tasks)))
            samples = distill_samples((r for g in groups for r in g.rollouts), weights)
            metrics = group_metrics(groups) | dict(pool.cache_states(samples))
            metrics |= learner.update(samples, objective)
            pool.free(samples)
            send_policy(session, learner, version=step + 1)
            write_groups(stage_dir / "rollouts.jsonl", step, groups)
            session.metrics.log(stage, step + 1, metrics)
            progress.update(step + 1, metrics)
            if (step + 1) % config.save_steps == 0:
                learner.save_checkpoint(stage_dir / "checkpoints", step + 1, {"next_step": step + 1})
    final = learner.save_final(stage_dir / "final")
    learner.close()
    return final


def teachers_of(domains: Mapping[str, Domain], config: Distill, specialists: Mapping[str, str]) -> dict[str, Teacher]:
    """The teacher of each domain: the recipe's own, or the specialist this run has trained."""
    teachers = {}
    for name, domain in domains.items():
        if domain.teacher is not None:
            teachers[name] = domain.teacher
        elif name in specialists:
            teachers[name] = config.teachers.from_checkpoint(specialists[name])
        else:
            raise RecipeError(
                f"domains.{name} has no teacher: expected sft, grpo or a ready-made teacher; set one of them or "
                "remove distill"
            )
    return teachers


def shares(domains: Mapping[str, Domain], total: int) -> dict[str, int]:
    """Rollouts per domain and step, by largest remainder; every domain gets at least one."""
    whole = sum(domain.share for domain in domains.values())
    exact = {name: total * domain.share / whole for name, domain in domains.items()}
    given = {name: max(1, int(value)) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: given[name] - exact[name])
    for name in itertools.islice(itertools.cycle(by_remainder), max(0, total - sum(given.values()))):
        given[name] += 1
    return given


def interleave(session: Session, config: Distill, *, skip_steps: int) -> Iterator[list[Task]]:
    """Per step, tasks of all domains in turn, so that no stretch of a batch belongs to one teacher."""
    per_step = shares(session.recipe.domains, config.rollouts_per_step)
    sources = {
        name: take_tasks(domain, session.recipe.seed + 1, skip=skip_steps * per_step[name])
        for name, domain in session.recipe.domains.items()
    }
    while True:
        drawn = [list(itertools.islice(sources[name], count)) for name, count in per_step.items()]
        yield [task for row in itertools.zip_longest(*drawn) for task in row if task is not None]


def _jobs(session: Session, prefix: str, tasks: list[Task]) -> list[GroupJob]:
    return [session.job(f"{prefix}/{i}", task, num_rollouts=1, scored=False) for i, task in enumerate(tasks)]
