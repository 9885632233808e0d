"""Reinforce: GRPO of one specialist. Sample groups, score them, take a step, send the new weights.

With ``num_iterations`` and ``minibatches_per_step`` of 1 every step is on-policy; the loss uses the engine's own
log-probabilities, so what differs between engine and learner is corrected rather than assumed away.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from posttrain.config import GRPO, Domain
from posttrain.engine.weights import export_weights
from posttrain.learner.checkpoint import newest_checkpoint
from posttrain.learner.learner import Learner
from posttrain.learner.objectives import GrpoObjective
from posttrain.rollout.samples import group_metrics, grpo_samples
from posttrain.runs.rollout_log import write_groups
from posttrain.stages.session import Session, judged_by_policy
from posttrain.types import Group, Sample, Task


def run_grpo_stage(session: Session, stage: str, domain_name: str, start: str) -> Path:
    """From ``start`` to ``stages/<stage>/final``; continues from the newest checkpoint after a kill."""
    domain = session.recipe.domains[domain_name]
    assert domain.grpo is not None
    config = domain.grpo
    stage_dir = session.run.stage_dir(stage)
    learner = open_learner(session, start, config, num_updates=_updates_per_step(config), stage_dir=stage_dir)
    first = learner.state.get("next_step", 0)
    objective = GrpoObjective(config, max_completion_length=domain.sampling.max_tokens * domain.environment.max_turns)
    send_policy(session, learner, version=first)
    judge = JudgeSnapshots(session, learner, folder=stage_dir / "judge", needed=judged_by_policy({"": domain}))
    judge.restore(first, start)
    tasks = take_tasks(domain, session.recipe.seed, skip=first * config.groups_per_step)
    with session.progress.stage(stage, config.max_steps, first=first) as progress:
        for step in range(first, config.max_steps):
            judge.refresh(step)
            groups = play_groups(session, f"{stage}/{step}", itertools.islice(tasks, config.groups_per_step), config)
            samples = grpo_samples(groups, config, min_group_size=session.recipe.workers.min_group_size)
            metrics = group_metrics(groups)
            for minibatch in minibatches(samples, config, seed=f"{session.recipe.seed}/{stage}/{step}"):
                metrics |= learner.update(minibatch, objective)
            send_policy(session, learner, version=step + 1)
            write_groups(stage_dir / "rollouts.jsonl", step, groups)
            session.metrics.log(stage, step + 1, metrics)
            progress.update(step + 1, metrics)
            if (step + 1) % config.save_steps == 0:
                learner.save_checkpoint(stage_dir / "checkpoints", step + 1, {"next_step": step + 1})
    final = learner.save_final(stage_dir / "final")
    learner.close()
    return final


def open_learner(session: Session, start: str, config, *, num_updates: int, stage_dir: Path) -> Learner:  # type: ignore[no-untyped-def]
    """A learner at ``start``, or at the stage's newest checkpoint."""
    learner = Learner(
        start,
        optim=config.optim,
        num_updates=config.max_steps * num_updates,
        tokens_per_micro_batch=config.tokens_per_micro_batch,
        dtype=session.dtype,
        lora=session.recipe.model.lora,
        seed=session.recipe.seed,
        keep_reference=getattr(config, "beta", 0.0) > 0,
    )
    checkpoint = newest_checkpoint(stage_dir / "checkpoints")
    if checkpoint is not None:
        learner.load_checkpoint(checkpoint)
    return learner


def take_tasks(domain: Domain, seed: int, *, skip: int) -> Iterator[Task]:
    """Training tasks from where the last checkpoint left off; a finite source is gone through again."""

    def endless() -> Iterator[Task]:
        for epoch in itertools.count():
            empty = True
            for task in domain.tasks.train(seed=seed + epoch):
                empty = False
                yield task
            if empty:
                raise ValueError("the task source has no training tasks")

    return itertools.islice(endless(), skip, None)


def play_groups(session: Session, prefix: str, tasks: Iterator[Task], config: GRPO) -> list[Group]:
    jobs = [session.job(f"{prefix}/{i}", task, num_rollouts=config.num_generations) for i, task in enumerate(tasks)]
    return session.rollouts.play(jobs)


def minibatches(samples: Sequence[Sample], config: GRPO, *, seed: str) -> Iterator[list[Sample]]:
    """The optimizer steps of one rollout batch: ``num_iterations`` shuffled passes over the samples."""
    rng = random.Random(seed)
    for _ in range(config.num_iterations):
        order = list(samples)
        rng.shuffle(order)
        for i in range(config.minibatches_per_step):
            minibatch = order[i :: config.minibatches_per_step]
            if minibatch:
                yield minibatch


def send_policy(session: Session, learner: Learner, *, version: int) -> None:
    session.rollouts.load_weights(export_weights(learner.weights(), session.dtype), version)


def _updates_per_step(config: GRPO) -> int:
    return config.num_iterations * config.minibatches_per_step


class JudgeSnapshots:
    """The lagged policy snapshot that judges, kept on disk so that a resumed run has the same judge."""

    def __init__(self, session: Session, learner: Learner, *, folder: Path, needed: bool) -> None:
        self._session, self._learner, self._folder, self._needed = session, learner, folder, needed

    def restore(self, step: int, start: str) -> None:
        """Give the workers the snapshot that was judging before ``step``."""
        if not self._needed:
            return
        snapshot = self._folder / f"step-{step - step % self._session.recipe.judge_lag_steps:06d}"
        self._session.send_checkpoint(snapshot if snapshot.is_dir() else start, version=step, judge=True)

    def refresh(self, step: int) -> None:
        """Every ``judge_lag_steps`` the policy of this moment becomes the judge of the next steps."""
        if self._needed and step and step % self._session.recipe.judge_lag_steps == 0:
            snapshot = self._folder / f"step-{step:06d}"
            if not snapshot.is_dir():
                self._learner.save_final(snapshot)
            self._session.send_checkpoint(snapshot, version=step, judge=True)
