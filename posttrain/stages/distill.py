"""Merge: multi-teacher on-policy distillation into one student.

Each step samples rollouts of the student over all domains, lets each domain's teacher read its own samples,
and moves the student along the exact gradient of KL(student || teacher). No reward takes part. Off-policy, for
comparison, the teachers play the rollouts themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from posttrain.config import Distill, Domain
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
from posttrain.rollout.samples import distill_samples, rollout_metrics
from posttrain.rollout.stream import Groups
from posttrain.runs.rollout_log import RolloutLog
from posttrain.runs.rundir import StageDir
from posttrain.stages.mixture import interleave, shares
from posttrain.stages.session import Session
from posttrain.stages.teacher_rollouts import TeacherRollouts
from posttrain.types import IntArray, Sample, TokenArrays, Tokens

ITSELF = "the student itself"
"""The name of a teacher that is the student's starting point, which is asked nothing but whether they agree."""
MAX_SELF_KL = 5e-3
"""Nats per token between a model and itself, computed on two paths, one of them perhaps in bfloat16."""


def run_distill_stage(session: Session, stage: StageDir, config: Distill, checkpoints: Mapping[str, str]) -> None:
    """From the base to ``stage.final``. ``checkpoints``: domain -> specialist, where the teacher is a checkpoint."""
    weights = {name: domain.weight for name, domain in session.recipe.domains.items()}
    learner, position = session.open_learner(stage, session.base_path, config)
    first = position.step
    on_policy = config.rollouts_from == "student"
    if on_policy:
        session.send_policy(learner, version=first)
    stream = open_groups(session, stage, config, first, checkpoints)
    teachers = teachers_of(session.recipe.domains, config, checkpoints)
    progress = session.progress.stage(stage.name, config.max_steps, first_step=first)
    log = RolloutLog(stage)
    probes = {name: probe_sequences(domain, session) for name, domain in session.recipe.domains.items()}
    everyone = {**teachers, ITSELF: config.teachers.from_checkpoint(session.base_path)}
    probes[ITSELF] = [probe for group in probes.values() for probe in group]
    spec = DistillSpec(
        config=config,
        teachers=everyone,
        student_path=session.base_path,
        probes=probes,
        folder=stage.path / "states",
    )
    objective = learner.open_objective(spec)
    if first == 0:
        check_self_distillation(learner, objective, probes[ITSELF])
    for step in range(first, config.max_steps):
        with session.waiting(learner, stage, step, stream):
            groups = stream.take()
        with PREEMPTION.postponed():
            session.check_scored(stage, groups)
            samples = distill_samples((r for g in groups for r in g.rollouts), weights)
            metrics = rollout_metrics(groups) | session.rollouts.take_counters()
            metrics["paused_s"] = stream.take_paused_s()
            metrics |= learner.update(samples, objective)
            free_groups(groups)
            if on_policy:
                session.send_policy(learner, version=step + 1)
            log.write_groups(groups, step)
            session.metrics.log(stage.name, step + 1, metrics)
            progress.update(step + 1, metrics)
            if (step + 1) % config.save_steps == 0:
                session.save_checkpoint(learner, stage, step + 1, stream)
    session.save_final(learner, stage.final)
    learner.close()


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
    """A few encoded prompts of a domain, for the start-up checks of its teacher."""
    chat = open_format(load_tokenizer(session.base_path))
    tasks = itertools.islice(domain.tasks.train(seed=session.recipe.seed), count)
    return [chat.at(task.effort).encode_prompt(task.prompt) for task in tasks]


def jobs_of_steps(
    session: Session, stage: StageDir, config: Distill, first: int
) -> Iterator[list[tuple[int, GroupJob]]]:
    """Per step, from step ``first`` on, its numbered jobs."""
    per_step = shares(session.recipe.domains, config.rollouts_per_step)
    # Another seed than the specialists' stages: the student need not see the very tasks they were trained on.
    steps = interleave(session.recipe.domains, per_step, session.recipe.seed + 1, skip_steps=first)
    for step, tasks in enumerate(steps, first):
        start = step * len(tasks)
        yield [
            (start + i, session.job(f"{stage.name}/{step}/{i}", task, num_rollouts=1, scored=False))
            for i, task in enumerate(tasks)
        ]


def open_groups(
    session: Session, stage: StageDir, config: Distill, first: int, checkpoints: Mapping[str, str]
) -> Groups:
    """One rollout of each task of each step, from step ``first`` on, by whoever plays them."""
    steps = jobs_of_steps(session, stage, config, first)
    per_step = sum(shares(session.recipe.domains, config.rollouts_per_step).values())
    if config.rollouts_from == "student":
        return session.open_stream(itertools.chain.from_iterable(steps), per_step, max_staleness=0)
    return TeacherRollouts(
        session=session,
        checkpoints=checkpoints,
        steps=itertools.islice(steps, config.max_steps - first),
        groups_per_step=per_step,
        next_step=first,
        steps_per_block=config.save_steps,
    )
