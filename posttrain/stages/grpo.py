"""Reinforce: GRPO of one specialist, or of one student on all domains. Sample groups, score them, take a step, send
the new weights.

With ``num_iterations`` and ``minibatches_per_step`` of 1 every step is on-policy; the loss uses the engine's own
log-probabilities, so what differs between engine and learner is corrected rather than assumed away.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import GRPO, Domain, Recipe
from posttrain.learner.group import AnyLearner
from posttrain.learner.objectives import GrpoSpec, Objective, compares_with_start, with_start
from posttrain.preemption import PREEMPTION
from posttrain.rollout.arrays import free_groups
from posttrain.rollout.player import GroupJob
from posttrain.rollout.samples import (
    group_advantage_rows,
    group_metrics,
    grpo_samples,
    mixture_metrics,
    rollout_metrics,
    staleness_metrics,
    without_stale_tokens,
)
from posttrain.rollout.stream import GroupStream
from posttrain.runs.rollout_log import RolloutLog
from posttrain.runs.rundir import StageDir
from posttrain.stages.judging import NO_JUDGING, Judging
from posttrain.stages.mixture import interleave, shares
from posttrain.stages.refill import Refills, refill_metrics, without_useless
from posttrain.stages.reward_files import RewardFiles
from posttrain.stages.session import Position, Session
from posttrain.types import Sample, Task

COUNTS = ("tokens", "loss_tokens", "micro_batches")
"""Metrics of an optimizer step that are counted, not averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What one run of GRPO learns from."""

    config: GRPO
    domains: Mapping[str, Domain]
    """One, or several in a mixture: all sampled at one temperature."""
    seed: int
    """Of the order of tasks."""
    judge_training: str | None = None
    """The domain whose judge prompts are among the generate prompts."""

    @classmethod
    def specialist(cls, recipe: Recipe, name: str) -> Training:
        """That of a specialist, by its name."""
        specialty = recipe.specialties()[name]
        domain = specialty.domain
        assert domain.grpo is not None
        return cls(
            config=domain.grpo,
            domains={specialty.domain_name: domain},
            seed=recipe.seed,
            judge_training=specialty.domain_name if domain.judge_training is not None else None,
        )

    @property
    def per_step(self) -> dict[str, int]:
        """Generate prompts of a step, by domain."""
        return shares(self.domains, self.config.groups_per_step)


def run_grpo_stage(session: Session, stage: StageDir, training: Training, start: str) -> None:
    """From ``start`` to ``stage.final``; continues from the newest checkpoint after a kill."""
    config = training.config
    learner, position = session.open_learner(stage, start, config)
    first = position.step
    judge_domain = training.judge_training
    judging = Judging(session, stage, judge_domain, position.kept) if judge_domain is not None else None
    spec = GrpoSpec(
        config=config,
        max_completion_tokens=max(map(_max_completion_tokens, training.domains.values())),
        temperature=next(iter(training.domains.values())).sampling.temperature,
    )
    objective = learner.open_objective(spec)
    session.send_policy(learner, version=first)
    stream = open_stream(session, stage, training, position, judging)
    refills = _refills(session, training, position)
    asks_policy = any(map(session.judged_by_policy, training.domains)) or (judging is not None and judging.asks_policy)
    judge = JudgeSnapshots(session, learner, folder=stage.judges) if asks_policy else None
    if judge is not None:
        judge.restore(first, start)
    files = [RewardFiles(session, stage, name) for name in training.domains]
    for reward_files in files:
        reward_files.restore(first)
    progress = session.progress.stage(stage.name, config.max_steps, first_step=first)
    log = RolloutLog(stage)
    state = judging.state if judging is not None else None
    if judging is not None and first == 0:
        with session.waiting(learner, stage, first, stream, state):
            judging.log_start(stream)
    for step in range(first, config.max_steps):
        if judge is not None:
            judge.refresh(step)
        reloaded = {name: value for reward_files in files for name, value in reward_files.refresh(step).items()}
        with session.waiting(learner, stage, step, stream, state):
            before = stream.refilled.total()
            groups = stream.take(refills.of_step(f"{stage.name}/{step}"))
            refilled = stream.refilled.total() - before
        with PREEMPTION.postponed():
            session.check_scored(stage, groups)
            generated, judged = (groups, NO_JUDGING) if judging is None else judging.settle(groups, step, stream)
            advantages = group_advantage_rows(generated, config, min_group_size=session.recipe.workers.min_group_size)
            if config.max_refills:
                advantages = without_useless(generated, advantages)
            groups, advantages = [*generated, *judged.groups], [*advantages, *judged.advantages]
            oldest = step - config.max_staleness
            asked = generated[: len(generated) - refilled]
            metrics = group_metrics(asked) if len(training.domains) == 1 else mixture_metrics(asked)
            if config.max_refills:
                metrics |= rollout_metrics(generated) | refill_metrics(generated, refilled=refilled)
            metrics |= staleness_metrics(groups, step, oldest=oldest)
            metrics |= reloaded | judged.metrics
            metrics |= session.rollouts.take_counters() | {"paused_s": stream.take_paused_s()}
            samples = without_stale_tokens(grpo_samples(groups, advantages, config), oldest=oldest)
            order = f"{session.recipe.seed}/{stage.name}/{step}"
            metrics |= learn(learner, objective, samples, config, seed=order)
            free_groups(groups)
            session.send_policy(learner, version=step + 1)
            log.write_groups(groups, step, advantages=advantages)
            if judging is not None:
                metrics |= judging.measure(step + 1, stream)
            session.metrics.log(stage.name, step + 1, metrics)
            progress.update(step + 1, metrics)
            if (step + 1) % config.save_steps == 0:
                session.save_checkpoint(learner, stage, step + 1, stream, state)
    session.save_final(learner, stage.final)
    learner.close()


def open_stream(
    session: Session, stage: StageDir, training: Training, position: Position, judging: Judging | None = None
) -> GroupStream:
    """The stage's groups from where its checkpoint left off, those that were under way then before all others.

    A step's generate prompts come first, the same ones and under the same ids with judge prompts and without.
    """
    config = training.config
    generated = sum(training.per_step.values())
    per_step = generated + (judging.groups_per_step if judging is not None else 0)
    begun = position.step * per_step + len(position.pending)

    def jobs() -> Iterator[tuple[int, GroupJob]]:
        steps = interleave(training.domains, training.per_step, training.seed, skip_steps=0)
        tasks = itertools.chain.from_iterable(steps)
        # Exactly as many as the stage will learn from, so that none is under way when it ends.
        for number in range(config.max_steps * per_step):
            step, index = divmod(number, per_step)
            task = next(tasks) if index < generated else None
            if number < begun and number not in position.pending:
                continue
            if task is not None:
                job_id = f"{stage.name}/{step}/{index}"
                yield number, session.job(job_id, task, num_rollouts=config.num_generations)
            elif judging is not None:
                yield number, judging.job(number, f"{stage.name}/{step}/judge-{index - generated}")

    stream = session.open_stream(jobs(), per_step, config.max_staleness)
    stream.refilled.update(position.refilled)
    return stream


def _refills(session: Session, training: Training, position: Position) -> Refills:
    """What the stage plays in place of groups that teach nothing, from where its checkpoint left off."""
    config = training.config
    behind = {
        name: config.max_steps * count + position.refilled.get(name, 0) for name, count in training.per_step.items()
    }

    def job(job_id: str, task: Task) -> GroupJob:
        return session.job(job_id, task, num_rollouts=config.num_generations)

    return Refills(training.domains, seed=training.seed, behind=behind, job=job, max_refills=config.max_refills)


def _max_completion_tokens(domain: Domain) -> int:
    modes = (None, *domain.efforts)
    generated = max(domain.sampling_at(mode).max_tokens for mode in modes) * domain.environment.max_turns
    return max(generated, domain.judge_training.max_tokens) if domain.judge_training is not None else generated


def learn(
    learner: AnyLearner, objective: Objective, samples: Sequence[Sample], config: GRPO, *, seed: str
) -> dict[str, float]:
    """All optimizer steps of one rollout batch, and its metrics."""
    if compares_with_start(config):
        samples = with_start(samples, learner.token_stats(samples, objective), config)
    updates = []
    for minibatch in minibatches(samples, config, seed=seed):
        updates.append(learner.update(minibatch, objective))
        if config.sync_ref_model and learner.step % config.ref_model_sync_steps == 0:
            learner.sync_reference(config.ref_model_mixup_alpha)
    return merge_updates(updates)


def minibatches(samples: Sequence[Sample], config: GRPO, *, seed: str) -> Iterator[list[Sample]]:
    """The optimizer steps of one rollout batch: ``num_iterations`` shuffled passes over the samples.

    A mini-batch in which nothing carries loss (all groups agree) is no step. Its per-token arrays are freed when the
    next one is asked for in the last pass.
    """
    rng = random.Random(seed)
    for passes_left in reversed(range(config.num_iterations)):
        order = list(samples)
        rng.shuffle(order)
        for i in range(config.minibatches_per_step):
            minibatch = order[i :: config.minibatches_per_step]
            if any(sample.num_loss_tokens for sample in minibatch):
                yield minibatch
            if not passes_left:
                for sample in minibatch:
                    sample.tokens.free()


def merge_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of one rollout batch: counts added up over its optimizer steps, everything else their mean."""
    values: dict[str, list[float]] = {}
    for update in updates:
        for name, value in update.items():
            values.setdefault(name, []).append(value)
    return {name: sum(found) / (1 if name in COUNTS else len(found)) for name, found in values.items()}


class JudgeSnapshots:
    """The lagged policy snapshot that judges, kept on disk so that a resumed run has the same judge."""

    def __init__(self, session: Session, learner: AnyLearner, *, folder: Path) -> None:
        self._session, self._learner, self._folder = session, learner, folder

    def restore(self, step: int, start: str) -> None:
        """Give the workers the snapshot that was judging before ``step``."""
        snapshot = self._snapshot(step - step % self._session.recipe.judge_lag_steps)
        self._session.send_checkpoint(snapshot if snapshot.is_dir() else start, version=step, judge=True)

    def refresh(self, step: int) -> None:
        """Every ``judge_lag_steps`` the policy of this moment becomes the judge of the next steps."""
        if step and step % self._session.recipe.judge_lag_steps == 0:
            snapshot = self._snapshot(step)
            if not snapshot.is_dir():
                self._session.save_final(self._learner, snapshot)
            self._session.send_checkpoint(snapshot, version=step, judge=True)

    def _snapshot(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"
