"""Merge: multi-teacher on-policy distillation into one student.

Each step samples rollouts of the student over all domains and their effort modes, lets each teacher read the samples of
its domain, or of its mode of one, and moves the student along the exact gradient of KL(student || teacher). What else
``Distill`` offers is off unless asked for. Off-policy, for comparison, the teachers play the rollouts themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from posttrain.config import Distill, Domain, Recipe, Specialty
from posttrain.conversation.formats import open_format
from posttrain.errors import RecipeError
from posttrain.learner.distillation import DistillSpec
from posttrain.learner.group import AnyLearner
from posttrain.learner.objectives import Objective
from posttrain.models import load_tokenizer
from posttrain.preemption import PREEMPTION
from posttrain.protocols import Teacher
from posttrain.rollout.arrays import free_groups
from posttrain.rollout.player import GroupJob
from posttrain.rollout.samples import (
    distill_samples,
    group_advantage_rows,
    reward_metrics,
    rollout_metrics,
    staleness_metrics,
    without_stale_tokens,
)
from posttrain.rollout.stream import Groups
from posttrain.runs.rollout_log import RolloutLog
from posttrain.runs.rundir import StageDir
from posttrain.stages.domain_scales import DomainScales
from posttrain.stages.merge_weights import sft_mean
from posttrain.stages.schedule import phases, planned_tasks, scheduled_teachers
from posttrain.stages.session import Position, Session
from posttrain.stages.teacher_rollouts import TeacherRollouts
from posttrain.types import Group, IntArray, Sample, TokenArrays, Tokens

ITSELF = "the student itself"
"""The name of a teacher that is the student's starting point, which is asked nothing but whether they agree."""
MAX_SELF_KL = 5e-3
"""Nats per token between a model and itself, computed on two paths, one of them perhaps in bfloat16."""


def run_distill_stage(session: Session, stage: StageDir, config: Distill, checkpoints: Mapping[str, str]) -> None:
    """From ``config.start`` to ``stage.final``. ``checkpoints``: of the specialists, by name, where there are any."""
    start = session.base_path if config.start == "base" else sft_mean(session, stage)
    learner, position = session.open_learner(stage, start, config)
    first = position.step
    on_policy = config.rollouts_from == "student"
    if on_policy:
        session.send_policy(learner, version=first)
    stream = open_groups(session, stage, config, position, checkpoints)
    specialties = session.recipe.specialties()
    teachers = teachers_of(specialties, config, checkpoints)
    progress = session.progress.stage(stage.name, config.max_steps, first_step=first)
    log = RolloutLog(stage)
    probes = {name: probe_sequences(specialty.domain, session) for name, specialty in specialties.items()}
    everyone = {**teachers, ITSELF: config.teachers.from_checkpoint(start)}
    probes[ITSELF] = [probe for group in probes.values() for probe in group]
    for name, (specialist, teacher) in scheduled_teachers(config).items():
        everyone[name], probes[name] = teacher, probes[specialist]
    scales = DomainScales.restore(position.kept) if config.rescale_domains else None
    kept = None if scales is None else scales.state
    spec = DistillSpec(
        config=config,
        teachers=everyone,
        student_path=start,
        probes=probes,
        folder=stage.states,
        temperatures={name: domain.sampling.temperature for name, domain in session.recipe.domains.items()},
    )
    objective = learner.open_objective(spec)
    if first == 0:
        check_self_distillation(learner, objective, probes[ITSELF])
    for step in range(first, config.max_steps):
        with session.waiting(learner, stage, step, stream, kept):
            groups = stream.take()
        with PREEMPTION.postponed():
            session.check_scored(stage, groups)
            factors = {} if scales is None else scales.factors()
            samples = samples_of_step(session.recipe, config, groups, step, scale_of=factors)
            metrics = metrics_of_groups(config, groups, step) | session.rollouts.take_counters()
            metrics["paused_s"] = stream.take_paused_s()
            metrics |= learner.update(samples, objective)
            if scales is not None:
                metrics |= scales.take(metrics, samples)
            free_groups(groups)
            if on_policy:
                session.send_policy(learner, version=step + 1)
            log.write_groups(groups, step)
            session.metrics.log(stage.name, step + 1, metrics)
            progress.update(step + 1, metrics)
            if (step + 1) % config.save_steps == 0:
                session.save_checkpoint(learner, stage, step + 1, stream, kept)
    session.save_final(learner, stage.final)
    learner.close()


def teachers_of(
    specialties: Mapping[str, Specialty], config: Distill, specialists: Mapping[str, str]
) -> dict[str, Teacher]:
    """The teacher of each domain, or each mode of it: the recipe's own, or the specialist this run has trained."""
    teachers = {}
    for name, specialty in specialties.items():
        if specialty.domain.teacher is not None:
            teachers[name] = specialty.domain.teacher
        elif name in specialists:
            teachers[name] = config.teachers.from_checkpoint(specialists[name])
        else:
            raise RecipeError(
                f"{specialty.place} has no teacher: expected sft, grpo or a ready-made teacher; set one of them or "
                "remove distill"
            )
    return teachers


def check_self_distillation(learner: AnyLearner, objective: Objective, probes: Sequence[IntArray]) -> None:
    """A student that is its own teacher has nothing to learn; checked on the very path that will train it.

    Raises ``RecipeError`` when the KL through cache, head and learner is more than rounding.
    """
    samples = [
        Sample(
            id=f"{ITSELF}-{index}",
            task_id="probe",
            domain=ITSELF,
            tokens=Tokens.of(TokenArrays.unsampled(probe)),
            teacher=ITSELF,
        )
        for index, probe in enumerate(probes)
    ]
    kl = learner.evaluate(samples, objective)["kl"]
    if not kl <= MAX_SELF_KL:
        raise RecipeError(
            f"the student as its own teacher: KL(student || teacher) = {kl:.4g} nats per token in the learner, "
            f"expected at most {MAX_SELF_KL}. They run the same weights differently, and the student would learn the "
            "difference: compare model.dtype with the teachers', and look for dropout in the model's config"
        )


def probe_sequences(domain: Domain, session: Session, count: int = 4) -> list[IntArray]:
    """A few encoded prompts of a domain, in all its effort modes, for the start-up checks of its teacher."""
    chat = open_format(load_tokenizer(session.base_path))
    tasks = itertools.islice(domain.tasks.train(seed=session.recipe.seed), count)
    return [chat.at(mode).encode_prompt(task.prompt) for task in tasks for mode in domain.modes_of(task)]


def jobs_of_steps(
    session: Session, stage: StageDir, config: Distill, position: Position
) -> Iterator[list[tuple[int, GroupJob]]]:
    """Per step, from the position's on, its numbered jobs, before which come those that were under way there."""
    per_step = rollout_groups_per_step(session.recipe, config)
    begun = position.step * per_step + len(position.pending)
    for step, tasks in enumerate(planned_tasks(session.recipe, config)):
        numbered = enumerate(tasks, step * per_step)
        jobs = [
            (
                number,
                session.job(
                    f"{stage.name}/{step}/{number - step * per_step}",
                    task,
                    num_rollouts=config.num_generations,
                    scored=config.reward_coef > 0,
                    route=route,
                ),
            )
            for number, (task, route) in numbered
            if number >= begun or number in position.pending
        ]
        if step >= position.step or jobs:
            yield jobs


def rollout_groups_per_step(recipe: Recipe, config: Distill) -> int:
    return sum(phases(recipe, config)[0].num_tasks.values())


def open_groups(
    session: Session, stage: StageDir, config: Distill, position: Position, checkpoints: Mapping[str, str]
) -> Groups:
    """The rollouts of each step from the position's on, by whoever plays them."""
    steps = jobs_of_steps(session, stage, config, position)
    per_step = rollout_groups_per_step(session.recipe, config)
    if config.rollouts_from == "student":
        return session.open_stream(itertools.chain.from_iterable(steps), per_step, config.max_staleness)
    return TeacherRollouts(
        session=session,
        checkpoints=checkpoints,
        steps=steps,
        groups_per_step=per_step,
        next_step=position.step,
        steps_per_block=config.save_steps,
    )


def samples_of_step(
    recipe: Recipe, config: Distill, groups: Sequence[Group], step: int, *, scale_of: Mapping[str, float]
) -> list[Sample]:
    """What a step learns from: no tokens more than ``max_staleness`` steps old, no samples without any."""
    advantages = None
    if config.reward_coef > 0:
        advantages = group_advantage_rows(groups, config, min_group_size=recipe.workers.min_group_size)
    samples = distill_samples(groups, advantages, scale_of=scale_of)
    if config.rollouts_from == "student":
        samples = without_stale_tokens(samples, oldest=step - config.max_staleness)
    return [sample for sample in samples if sample.num_loss_tokens]


def metrics_of_groups(config: Distill, groups: Sequence[Group], step: int) -> dict[str, float]:
    """What a step's rollouts looked like; what they earned and how old they are where that plays a part."""
    metrics = rollout_metrics(groups)
    if config.reward_coef > 0:
        metrics |= reward_metrics(groups)
    if config.max_staleness > 0:
        metrics |= staleness_metrics(groups, step, oldest=step - config.max_staleness)
    return metrics
