"""Rollout workers as Ray actors, and the driver's handle on them. The only module that starts Ray.

Weights travel as NumPy arrays through Ray's object store: one copy a node, mapped by every actor on it. An actor
that dies or hangs is replaced, given the current weights, and its jobs are played again; requests carry their own
random numbers, so the second attempt draws what the first one drew and no rollout is preferred for being short.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from posttrain.config import Workers
from posttrain.protocols import Substrate
from posttrain.rollout.player import GroupJob
from posttrain.types import Group

logger = logging.getLogger(__name__)

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What an actor needs to build its engine."""

    model_path: str
    """Gives architecture and tokenizer; the weights that count are sent by the driver."""
    dtype: str
    max_length: int
    """Window of the engine: prompt and completion together."""
    workers: Workers
    substrate: Substrate | None


class RolloutWorker:
    """Holds one engine, and a second one for judging once a judge snapshot was sent."""

    def __init__(self, spec: WorkerSpec) -> None:
        import torch

        from posttrain.conversation.chat import ChatFormat
        from posttrain.models import load_tokenizer

        torch.set_num_threads(spec.workers.threads_per_actor or os.cpu_count() or 1)
        self._spec = spec
        self._chat = ChatFormat(load_tokenizer(spec.model_path))
        self._engine = self._new_engine()
        self._judge_engine: Any = None

    def _new_engine(self) -> Any:
        import torch

        from posttrain.engine.transformers_engine import TransformersEngine
        from posttrain.models import load_model

        model = load_model(self._spec.model_path, getattr(torch, self._spec.dtype))
        if torch.cuda.is_available():
            model = torch.nn.Module.cuda(model)
        return TransformersEngine(
            model,
            stop_ids=self._chat.stop_ids,
            max_batch_size=self._spec.workers.max_batch_size,
            max_length=self._spec.max_length,
        )

    async def load_weights(self, weights: Weights, version: int) -> None:
        from posttrain.engine.weights import import_weights

        self._engine.load_weights(import_weights(weights), version)

    async def load_judge_weights(self, weights: Weights, version: int) -> None:
        from posttrain.engine.weights import import_weights

        if self._judge_engine is None:
            self._judge_engine = self._new_engine()
        self._judge_engine.load_weights(import_weights(weights), version)

    async def play(self, jobs: Sequence[GroupJob]) -> list[Group]:
        from posttrain.rollout.player import Player

        player = Player(
            engine=self._engine,
            judge_engine=self._judge_engine,
            chat=self._chat,
            substrate=self._spec.substrate,
            workers=self._spec.workers,
        )
        return await player.play(jobs)


@dataclass(slots=True)
class RolloutCounters:
    """What went wrong around the policy, for the report."""

    actors_replaced: int = 0
    jobs_replayed: int = 0


@dataclass(slots=True)
class _Sent:
    """The snapshot every actor, and every replacement, must hold."""

    weights: Any = None
    version: int = 0


class RolloutService:
    """The driver's view of all workers. Use as a context manager."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._policy, self._judge = _Sent(), _Sent()
        self.counters = RolloutCounters()
        self._actors = [self._start_actor() for _ in range(spec.workers.num_actors)]

    def __enter__(self) -> RolloutService:
        return self

    def __exit__(self, *exc: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def take_counters(self) -> dict[str, float]:
        """Actors replaced and jobs played again since the last call."""
        taken, self.counters = self.counters, RolloutCounters()
        return {name: float(value) for name, value in dataclasses.asdict(taken).items()}

    def load_weights(self, weights: Weights, version: int) -> None:
        """Give every actor new policy weights; returns when all hold them."""
        self._policy = _Sent(weights=ray.put(dict(weights)), version=version)
        self._send_to_all("load_weights", self._policy)

    def load_judge_weights(self, weights: Weights, version: int) -> None:
        """Give every actor a new judge snapshot."""
        self._judge = _Sent(weights=ray.put(dict(weights)), version=version)
        self._send_to_all("load_judge_weights", self._judge)

    def play(self, jobs: Sequence[GroupJob]) -> list[Group]:
        """Play all jobs, spread over the actors; groups come back in the order of the jobs.

        Raises ``RuntimeError`` when the same jobs outlive ``max_retries`` replacements of their actor.
        """
        shares = [list(range(i, len(jobs), len(self._actors))) for i in range(len(self._actors))]
        pending = {i: self._submit(i, [jobs[j] for j in share]) for i, share in enumerate(shares) if share}
        groups: list[Group | None] = [None] * len(jobs)
        for i, future in pending.items():
            for j, group in zip(shares[i], self._collect(i, future, [jobs[j] for j in shares[i]]), strict=True):
                groups[j] = group
        return [group for group in groups if group is not None]

    def _submit(self, index: int, jobs: Sequence[GroupJob]) -> Any:
        return self._actors[index].play.remote(list(jobs))

    def _collect(self, index: int, future: Any, jobs: Sequence[GroupJob]) -> list[Group]:
        for retries_left in reversed(range(1 + self._spec.workers.max_retries)):
            try:
                return ray.get(future, timeout=self._patience_s(jobs))
            except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as failure:
                logger.warning("rollout worker %d is replaced: %s", index, type(failure).__name__)
                self._replace(index)
                if retries_left:
                    self.counters.jobs_replayed += len(jobs)
                    future = self._submit(index, jobs)
        raise RuntimeError(
            f"rollout worker {index} died or hung {1 + self._spec.workers.max_retries} times on the same "
            f"{len(jobs)} groups; see its log under the Ray session folder, and raise workers.max_retries or "
            "workers.episode_deadline_s if the work is merely slow"
        )

    def _patience_s(self, jobs: Sequence[GroupJob]) -> float:
        """Longest time the jobs can take when every deadline inside the actor holds."""
        workers = self._spec.workers
        waves = -(-sum(job.num_rollouts for job in jobs) // workers.max_concurrent_episodes)
        per_attempt = workers.episode_deadline_s * (1 + workers.max_retries) + workers.reward_deadline_s
        return waves * per_attempt + 60.0

    def _start_actor(self) -> Any:
        workers = self._spec.workers
        actor_class: Any = ray.remote(RolloutWorker)
        options = {"num_cpus": workers.cpus_per_actor, "num_gpus": workers.gpus_per_actor, "max_concurrency": 64}
        return actor_class.options(**options).remote(self._spec)

    def _replace(self, index: int) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self._actors[index])
        self._actors[index] = self._start_actor()
        self.counters.actors_replaced += 1
        for method, sent in (("load_weights", self._policy), ("load_judge_weights", self._judge)):
            if sent.weights is not None:
                ray.get(getattr(self._actors[index], method).remote(sent.weights, sent.version))

    def _send_to_all(self, method: str, sent: _Sent) -> None:
        for index, actor in enumerate(self._actors):
            try:
                ray.get(getattr(actor, method).remote(sent.weights, sent.version))
            except ray.exceptions.RayError:
                # Dead, or alive with an engine that has stopped. Weights that do not fit fail again, in the new one.
                self._replace(index)


@contextlib.contextmanager
def ray_session(workers: Workers) -> Iterator[None]:
    """A Ray to work on: the cluster named by ``RAY_ADDRESS`` if there is one, else a local one of our own."""
    if ray.is_initialized():
        yield
        return
    # Named, since without an address Ray joins whatever cluster was started on this machine last.
    settings: dict[str, Any] = {"address": os.environ.get("RAY_ADDRESS") or "local"}
    if settings["address"] == "local":
        settings["num_cpus"] = max(os.cpu_count() or 1, int(np.ceil(workers.num_actors * workers.cpus_per_actor)))
        settings["include_dashboard"] = False
        settings["object_store_memory"] = 1 << 30
    # Workers import what recipe files and their neighbours define, so they search where this process does.
    settings["runtime_env"] = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}}
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    try:
        yield
    finally:
        ray.shutdown()
