"""Merge: multi-teacher on-policy distillation into one student.

Each step samples rollouts of the student over all domains, lets each domain's teacher read its own samples,
and moves the student along the exact gradient of KL(student || teacher). Everything else ``Distill`` offers is off
unless asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from posttrain.config import Distill, Domain, Recipe
from posttrain.conversation.chat import ChatFormat
from posttrain.errors import RecipeError
from posttrain.learner.distillation import DistillObjective
from posttrain.learner.learner import Learner
from posttrain.models import load_tokenizer
from posttrain.preemption import PREEMPTION
from posttrain.protocols import OpenTeachers, Teacher
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
from posttrain.rollout.stream import GroupStream
from posttrain.runs.rollout_log import RolloutLog
from posttrain.runs.rundir import StageDir
from posttrain.stages.grpo import take_tasks
from posttrain.stages.mixtures import DomainScales, phases, scheduled_teachers
from posttrain.stages.session import Position, Session
from posttrain.types import Group, IntArray, Route, Sample, Task, TokenArrays, Tokens

ITSELF = "the student itself"
"""The name of a teacher that is the student's starting point, which is asked nothing but whether they agree."""
MAX_SELF_KL = 5e-3
"""Nats per token between a model and itself, computed on two paths, one of them perhaps in bfloat16."""


def run_distill_stage(session: Session, stage: StageDir, specialists: Mapping[str, str]) -> None:
    """From the base to ``stage.final``. ``specialists`` maps a domain to its checkpoint."""
    config = session.recipe.distill
    assert config is not None
    learner, position = session.open_learner(stage, session.base_path, config)
    first = position.step
    session.send_policy(learner, version=first)
    stream = open_stream(session, stage, config, position)
    teachers = teachers_of(session.recipe.domains, config, specialists)
    progress = session.progress.stage(stage.name, config.max_steps, first_step=first)
    log = RolloutLog(stage)
    probes = {name: probe_sequences(domain, session) for name, domain in session.recipe.domains.items()}
    probes[ITSELF] = [probe for group in probes.values() for probe in group]
    everyone = {**teachers, ITSELF: config.teachers.from_checkpoint(session.base_path)}
    for name, (domain, teacher) in scheduled_teachers(config).items():
        everyone[name], probes[name] = teacher, probes[domain]
    scales = DomainScales.restore(position.kept) if config.rescale_domains else None
    state = None if scales is None else lambda _: scales.state()
    with config.teachers.open(everyone, student_path=session.base_path, probes=probes) as opened:
        objective = DistillObjective(
            config=config,
            states=opened.store,
            head_of=opened.head,
            temperatures={name: domain.sampling.temperature for name, domain in session.recipe.domains.items()},
            reference=learner.reference if config.beta > 0 else None,
        )
        if first == 0:
            check_self_distillation(learner, objective, opened, probes[ITSELF])
        for step in range(first, config.max_steps):
            with session.waiting(learner, stage, step, stream, state):
                groups = stream.take()
            with PREEMPTION.postponed():
                session.check_scored(stage, groups)
                oldest = step - config.max_staleness
                factors = {} if scales is None else scales.factors()
                samples = samples_of_step(
                    groups,
                    config,
                    oldest=oldest,
                    min_group_size=session.recipe.workers.min_group_size,
                    scale_of=factors,
                )
                opened.cache_states(samples)
                metrics = rollout_metrics(groups) | session.rollouts.take_counters()
                metrics["paused_s"] = stream.take_paused_s()
                if config.reward_coef > 0:
                    metrics |= reward_metrics(groups)
                if config.max_staleness:
                    metrics |= staleness_metrics(groups, step, oldest=oldest)
                metrics |= learner.update(samples, objective) | dict(opened.costs())
                if scales is not None:
                    metrics |= scales.take(metrics, tokens_by_domain(samples))
                    metrics |= {f"domain_scale/{name}": factor for name, factor in factors.items()}
                opened.store.free(sample.id for sample in samples)
                free_groups(groups)
                session.send_policy(learner, version=step + 1)
                log.write_groups(groups, step)
                session.metrics.log(stage.name, step + 1, metrics)
                progress.update(step + 1, metrics)
                if (step + 1) % config.save_steps == 0:
                    session.save_checkpoint(learner, stage, step + 1, stream, state)
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


def check_self_distillation(
    learner: Learner, objective: DistillObjective, opened: OpenTeachers, probes: Sequence[IntArray]
) -> None:
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
    opened.cache_states(samples)
    kl = learner.evaluate(samples, objective)["kl"]
    opened.store.free(sample.id for sample in samples)
    opened.costs()
    if not kl <= MAX_SELF_KL:
        raise RecipeError(
            f"the student as its own teacher: KL(student || teacher) = {kl:.4g} nats per token in the learner, "
            f"expected at most {MAX_SELF_KL}. They run the same weights differently, and the student would learn the "
            "difference: compare model.dtype with the teachers', and look for dropout in the model's config"
        )


def probe_sequences(domain: Domain, session: Session, count: int = 4) -> list[IntArray]:
    """A few encoded prompts of a domain, for the start-up checks of its teacher."""
    chat = ChatFormat(load_tokenizer(session.base_path))
    tasks = itertools.islice(domain.tasks.train(seed=session.recipe.seed), count)
    return [chat.encode_prompt(task.prompt) for task in tasks]


def planned_tasks(recipe: Recipe, config: Distill) -> Iterator[tuple[int, Task, Route]]:
    """Step, task and route of every group of the stage, those of a step from all domains in turn, so that no stretch of
    a batch belongs to one teacher."""
    # Another seed than the specialists' stages: the student need not see the very tasks they were trained on.
    sources = {name: take_tasks(domain, recipe.seed + 1, skip=0) for name, domain in recipe.domains.items()}
    plan = phases(recipe.domains, config)
    for phase, end in zip(plan, [*(later.first_step for later in plan[1:]), config.max_steps], strict=True):
        for step in range(phase.first_step, end):
            drawn = [list(itertools.islice(sources[name], count)) for name, count in phase.num_tasks.items()]
            for task in itertools.chain.from_iterable(itertools.zip_longest(*drawn)):
                if task is not None:
                    yield step, task, phase.routes[task.domain]


def open_stream(session: Session, stage: StageDir, config: Distill, position: Position) -> GroupStream:
    """The stage's groups from where its checkpoint left off, those that were under way then before all others."""
    per_step = sum(phases(session.recipe.domains, config)[0].num_tasks.values())
    begun = position.step * per_step + len(position.pending)

    def jobs() -> Iterator[tuple[int, GroupJob]]:
        for number, (step, task, route) in enumerate(planned_tasks(session.recipe, config)):
            if number >= begun or number in position.pending:
                yield (
                    number,
                    session.job(
                        f"{stage.name}/{step}/{number % per_step}",
                        task,
                        num_rollouts=config.num_generations,
                        scored=config.reward_coef > 0,
                        route=route,
                    ),
                )

    return session.open_stream(jobs(), per_step, config.max_staleness)


def samples_of_step(
    groups: Sequence[Group], config: Distill, *, oldest: int, min_group_size: int, scale_of: Mapping[str, float]
) -> list[Sample]:
    """What a step learns from: its samples, without tokens of weight versions below ``oldest``."""
    rows = group_advantage_rows(groups, config, min_group_size=min_group_size) if config.reward_coef > 0 else None
    samples = without_stale_tokens(distill_samples(groups, rows, scale_of=scale_of), oldest=oldest)
    return [sample for sample in samples if sample.num_loss_tokens]


def tokens_by_domain(samples: Sequence[Sample]) -> dict[str, int]:
    """Loss tokens."""
    tokens: dict[str, int] = {}
    for sample in samples:
        tokens[sample.domain] = tokens.get(sample.domain, 0) + sample.num_loss_tokens
    return tokens
