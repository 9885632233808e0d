"""The driver's view of all engines and workers: who has which jobs, who is alive, what is given to whom again."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayError

from posttrain.config import Workers
from posttrain.errors import Preempted
from posttrain.protocols import Reloadable
from posttrain.rollout.actors import EngineActor, RolloutWorker, Weights, WorkerSpec
from posttrain.rollout.arrays import attach
from posttrain.rollout.outcomes import Outcomes
from posttrain.rollout.player import GroupJob
from posttrain.rollout.ray_store import RayRef
from posttrain.types import Group, Rollout, Score, ScoreStatus, StopReason

logger = logging.getLogger(__name__)

_PING_S = 1.0
"""Between two looks at whether the actors live."""
_SLOW_START_S = 120.0
"""When it is time to say that an actor does not start."""
_NAME_S = 30.0
"""How long a dead actor's name may take to become free."""


@dataclass(slots=True, eq=False)
class _Member:
    """An engine or a worker, whoever plays that part at the moment."""

    kind: str
    index: int
    start: Callable[[], Any]
    actor: Any = None
    ping: Any = None
    moved_at: float = math.inf
    """When it was last seen to get on with its work, or to have none; never, while it is starting."""
    counters: dict[str, float] = field(default_factory=dict)
    """The last it said of itself."""
    asked_at: float = math.inf
    """When it was started, until it answers or somebody was told that it does not."""
    replaced: int = 0
    """In a row, without any rollout that worked in between."""


@dataclass(slots=True, eq=False)
class _Call:
    """Jobs given to a worker in one go."""

    member: _Member
    stream: Any
    jobs: dict[int, GroupJob]
    """Those that are not back yet, by their place in the call."""


@dataclass(slots=True)
class _Sent:
    """The snapshot every engine, and every replacement, must hold."""

    judge: bool
    weights: Any = None
    version: int = 0
    number: int = 0
    """Of the snapshots sent so far, this one."""

    def to(self, member: _Member) -> Any:
        """Send it to an engine."""
        return member.actor.load_weights.remote(self.weights, self.version, self.judge, self.number)


class RolloutService:
    """Starts engines and workers, gives out jobs and hands back groups as they become complete. A context manager.

    An actor that dies or hangs is replaced. Its jobs are given to the next one, which finds what was finished and what
    was drawn; the last of their ``1 + max_retries`` further attempts is made one job at a time, so that the one that
    kills its worker is told from the others and ends as a failed group.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._workers = spec.workers
        self._sent = (_Sent(judge=False), _Sent(judge=True))
        self._totals: Counter[str] = Counter()
        self._taken: Counter[str] = Counter()
        self._calls: list[_Call] = []
        self._suspects: dict[int, deque[GroupJob]] = {i: deque() for i in range(spec.workers.num_actors)}
        self._attempts: Counter[str] = Counter()
        self._lost_groups: list[tuple[GroupJob, Group]] = []
        self._looked_at = time.monotonic()
        self._next_worker = 0
        run = uuid.uuid4().hex[:8]
        names = [f"engine-{i}-{run}" for i in range(spec.workers.num_actors)]
        self._engines = [self._member("engine", i, name) for i, name in enumerate(names)]
        self._players = [self._member("worker", i, name) for i, name in enumerate(names)]
        for member in (*self._engines, *self._players):
            self._start(member)

    def __enter__(self) -> RolloutService:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None and issubclass(kind, Preempted):
            self.preempt()
        for member in (*self._players, *self._engines):
            ray.kill(member.actor)

    def load_weights(self, weights: Weights, version: int) -> None:
        """Give every engine new policy weights; returns when all hold them."""
        self._send(self._sent[0], weights, version)

    def load_judge_weights(self, weights: Weights, version: int) -> None:
        """Give every engine a new judge snapshot."""
        self._send(self._sent[1], weights, version)

    def play(self, jobs: Sequence[GroupJob]) -> list[Group]:
        """Play all jobs; groups come back in the order of the jobs."""
        self.submit(jobs)
        groups: dict[str, Group] = {}
        while len(groups) < len(jobs):
            groups.update((job.id, group) for job, group in self.collect())
        return [groups[job.id] for job in jobs]

    def submit(self, jobs: Sequence[GroupJob]) -> None:
        """Have jobs played, spread over the workers. Their ids must differ from those of all others under way."""
        for offset, member in enumerate(self._players):
            share = list(jobs[(offset - self._next_worker) % len(self._players) :: len(self._players)])
            if share:
                self._call(member, share)
        self._next_worker = (self._next_worker + len(jobs)) % len(self._players)

    def collect(self, *, patience_s: float = _PING_S) -> list[tuple[GroupJob, Group]]:
        """The groups that became complete since the last call; waits for one for a while, and may return none.

        Raises ``RuntimeError`` when an actor cannot be brought back.
        """
        self._look_after_everyone()
        streams = [call.stream for call in self._calls]
        ready = ray.wait(streams, num_returns=1, timeout=patience_s)[0] if streams else []
        complete = [pair for call in list(self._calls) if call.stream in ready for pair in self._receive(call)]
        complete += self._lost_groups
        self._lost_groups = []
        if any(not rollout.failed for _, group in complete for rollout in group.rollouts):
            for member in (*self._engines, *self._players):
                member.replaced = 0
        return complete

    def score_anchors(self, reward: Reloadable) -> Mapping[str, tuple[float | None, ...]]:
        """What a reward gives to its fixed responses (``Reloadable``), found by a worker.

        Raises ``RuntimeError``, with the reason, when it cannot be had.
        """
        member = self._players[0]
        for _ in range(1 + self._workers.max_retries):
            try:
                return ray.get(
                    member.actor.score_anchors.remote(reward), timeout=self._workers.reward_deadline_s + _NAME_S
                )
            except RayActorError as error:
                reason = _last_line(error)
                self._lose_worker(member, reason)
            except RayError as error:
                raise RuntimeError(_last_line(error)) from error
        raise RuntimeError(reason)

    def forget(self, stage: str, before_step: int) -> None:
        """Rollouts of a stage's earlier steps have been learned from and checkpointed: their records may go."""
        if self._spec.outcomes is not None:
            Outcomes(self._spec.outcomes).forget_before(stage, before_step)

    def preempt(self) -> None:
        """Stop the engines and keep what unfinished requests have computed, for a run that is resumed soon."""
        pending = [member.actor.preempt.remote() for member in self._engines]
        with contextlib.suppress(RayError):
            ray.wait(pending, num_returns=len(pending), timeout=60.0)

    def take_counters(self) -> dict[str, float]:
        """What engines and workers did and what went wrong, since the last call."""
        pings = {member: member.actor.counters.remote() for member in (*self._engines, *self._players)}
        ray.wait(list(pings.values()), num_returns=len(pings), timeout=5.0)
        for member, ping in pings.items():
            with contextlib.suppress(RayError):
                self._note(member, ray.get(ping, timeout=0))
        taken = self._totals - self._taken
        self._taken = Counter(self._totals)
        names = ("engines_replaced", "workers_replaced", "jobs_resubmitted", "jobs_given_up", *_WORTH_TELLING)
        tallied = sorted(name for name in self._totals if "/" in name)
        return {name: float(taken.get(name, 0)) for name in (*names, *tallied)}

    def _member(self, kind: str, index: int, engine: str) -> _Member:
        workers = self._workers
        options: dict[str, Any] = {"num_cpus": workers.cpus_per_actor, "num_gpus": workers.gpus_per_actor}
        if kind == "engine":
            actor_class: Any = ray.remote(EngineActor)
            named = actor_class.options(name=engine, **options)
            sent = self._sent[0]
            return _Member(
                kind, index, lambda: named.remote(self._spec, index, awaits_weights=sent.weights is not None)
            )
        worker_class: Any = ray.remote(RolloutWorker)
        return _Member(kind, index, lambda: worker_class.options(num_cpus=0).remote(self._spec, engine))

    def _start(self, member: _Member) -> None:
        give_up = time.monotonic() + _NAME_S
        while True:
            try:
                member.actor = member.start()
                break
            except ValueError:
                # The name of an actor that was killed stays taken for a moment.
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.05)
        member.ping, member.moved_at, member.counters = None, math.inf, {}
        member.asked_at = time.monotonic()
        if member.kind == "engine":
            for sent in self._sent:
                if sent.weights is not None:
                    sent.to(member)

    def _replace(self, member: _Member, reason: str, *, counts: bool = True) -> None:
        logger.warning("%s %d is replaced: %s", member.kind, member.index, reason)
        member.replaced += counts
        self._totals[f"{member.kind}s_replaced"] += 1
        if member.replaced > 1 + self._workers.max_retries:
            raise RuntimeError(
                f"{member.kind} {member.index} was replaced {member.replaced} times and no rollout worked in "
                f"between; the last reason: {reason}; see its log under the Ray session folder, mend that and go on "
                "with --resume"
            )
        with contextlib.suppress(RayError):
            ray.kill(member.actor)
        self._start(member)

    def _look_after_everyone(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < _PING_S:
            return
        # While the driver was learning nobody looked, which is not the time in which an actor was silent.
        away_s = now - self._looked_at - _PING_S
        self._looked_at = now
        for member in (*self._engines, *self._players):
            member.moved_at += away_s
            self._look_after(member, now)
        self._play_suspects()

    def _look_after(self, member: _Member, now: float) -> None:
        if member.ping is None:
            member.ping = member.actor.counters.remote()
        elif ray.wait([member.ping], timeout=0)[0]:
            ping, member.ping = member.ping, None
            try:
                if self._note(member, ray.get(ping)):
                    member.moved_at, member.asked_at = now, math.inf
            except RayError as error:
                self._lose(member, _last_line(error))
        if now - member.asked_at > _SLOW_START_S:
            member.asked_at = math.inf
            workers = self._workers
            logger.warning(
                "%s %d has not started after %d s; an engine wants %g CPUs and %g GPUs, and free are %s",
                *(member.kind, member.index, _SLOW_START_S, workers.cpus_per_actor, workers.gpus_per_actor),
                {name: count for name, count in ray.available_resources().items() if name in ("CPU", "GPU")},
            )
        if now - member.moved_at > self._workers.hang_timeout_s:
            self._lose(member, f"no progress for {self._workers.hang_timeout_s:g} s")

    def _note(self, member: _Member, counters: dict[str, float]) -> bool:
        """Add up what a member has done; whether that is anything, or there is nothing for it to do."""
        waiting = counters.pop("waiting", 0)
        moved = counters != member.counters
        for name, value in counters.items():
            self._totals[name] += value - member.counters.get(name, 0)  # type: ignore[assignment]
        member.counters = counters
        return moved or not waiting

    def _lose(self, member: _Member, reason: str) -> None:
        if member.kind == "worker":
            self._lose_worker(member, reason)
        else:
            self._replace(member, reason)

    def _lose_worker(self, member: _Member, reason: str) -> None:
        """Replace a worker; what it was playing is played again, in the end one job at a time."""
        lost = [job for call in self._calls if call.member is member for job in call.jobs.values()]
        self._calls = [call for call in self._calls if call.member is not member]
        # Jobs that kill their worker are counted one by one, below.
        self._replace(member, reason, counts=not lost)
        again = []
        for job in lost:
            self._attempts[job.id] += 1
            if self._attempts[job.id] <= self._workers.max_retries:
                again.append(job)
            elif self._attempts[job.id] == 1 + self._workers.max_retries:
                self._suspects[member.index].append(job)
            else:
                self._totals["jobs_given_up"] += 1
                self._lost_groups.append((job, _failed_group(job, reason, self._attempts[job.id])))
                continue
            self._totals["jobs_resubmitted"] += 1
        if again:
            self._call(member, again)

    def _play_suspects(self) -> None:
        for member in self._players:
            suspects = self._suspects[member.index]
            if suspects and not any(call.member is member for call in self._calls):
                self._call(member, [suspects.popleft()])

    def _call(self, member: _Member, jobs: Sequence[GroupJob]) -> None:
        stream = member.actor.play.options(num_returns="streaming").remote(list(jobs))
        self._calls.append(_Call(member, stream, dict(enumerate(jobs))))

    def _receive(self, call: _Call) -> list[tuple[GroupJob, Group]]:
        """The next group of a call that has one ready, or that has ended."""
        try:
            index, light, num_arrays = ray.get(next(call.stream))
            group = attach(light, [RayRef(next(call.stream)) for _ in range(num_arrays)])
        except StopIteration:
            self._calls.remove(call)
            assert not call.jobs, "a worker that has ended has given back all its groups"
            return []
        except (RayActorError, ObjectLostError) as error:
            if call in self._calls:
                self._lose_worker(call.member, _last_line(error))
                self._play_suspects()
            return []
        job = call.jobs.pop(index)
        self._attempts.pop(job.id, None)
        return [(job, group)]

    def _send(self, sent: _Sent, weights: Weights, version: int) -> None:
        sent.weights, sent.version, sent.number = ray.put(dict(weights)), version, sent.number + 1
        pending = [(member, sent.to(member)) for member in self._engines]
        for member, load in pending:
            try:
                self._wait_for(member, load)
            except RayError as error:
                # Dead, hung, or alive with an engine that has stopped. Weights that do not fit fail in the new one.
                self._replace(member, _last_line(error))
                ray.get(sent.to(member))

    def _wait_for(self, member: _Member, load: Any) -> None:
        """An engine that was ever seen at work has ``hang_timeout_s``; one that is starting may take long."""
        started = math.isfinite(member.moved_at)
        ray.get(load, timeout=self._workers.hang_timeout_s if started else None)


_WORTH_TELLING = (
    "retried_attempts",
    "invalid_rollouts",
    "abandoned_episodes",
    "resumed_rollouts",
    "resumed_tokens",
    "restored_sequences",
    "prefill_tokens",
    "reused_tokens",
    "recomputed_tokens",
    "decode_tokens",
    "decode_steps",
    "evictions",
)
"""Counters of engines and workers that go into the metrics of a step."""


def _last_line(error: Exception) -> str:
    if isinstance(error, RayActorError):
        return f"it died ({type(error).__name__})" if "creation task" not in str(error) else str(error)[-500:]
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _failed_group(job: GroupJob, reason: str, attempts: int) -> Group:
    error = f"its worker was lost {attempts} times while it was played, the last time because: {reason}"
    rollouts = tuple(
        Rollout(id=f"{job.id}/{i}", task=job.form(i), turns=(), stop=StopReason.ERROR, error=error)
        for i in range(job.num_rollouts)
    )
    score = Score(value=None, status=ScoreStatus.ROLLOUT_ERROR, error=error)
    return Group(task=job.task, rollouts=rollouts, scores=(score,) * job.num_rollouts, route=job.route)


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
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    if threading.current_thread() is threading.main_thread():
        # Ray has put one of its own in its place, which ends the process with a stack trace.
        signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        ray.shutdown()
