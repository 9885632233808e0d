"""A sandbox that remembers: every operation is in the log before it acts, its result on disk before anyone sees it.

A client that died and runs again makes the same calls in the same order. As long as each agrees with the log it gets
the stored result and the box is not touched; the first call the log does not know is the first that runs. An operation
that was begun and whose end is not known is never run a second time, unless that is harmless by nature (``read``,
``list``) or was declared so (``idempotent``): it is ``Unknown``.

What it does not do: calls that run at the same time are told apart by the order in which they start, so a client that
does not repeat that order meets ``Diverged``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import SandboxError, SandboxLost, Unsupported
from posttrain.protocols import Sandbox, Substrate
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox import layers
from sandbox.log import Operation, RecordKind, TrajectoryLog
from sandbox.operations import (
    KINDS,
    Operations,
    Remembers,
    Request,
    outcome_of,
    perform,
    recall,
    remembers,
    target_of,
    unwrap,
)

VARYING = frozenset({"wall_s", "cpu_s", "max_rss_bytes", "modified_s", "digest", "image"})
"""Parts of an outcome that differ from one time to the next: usage, times, and hashes of what contains times."""
CrashAt = Callable[[str, str], None]
"""Called with a point (``intent``, ``effect``, ``result``, ``reply``) and the operation's kind, for tests that die."""


class Diverged(SandboxError):
    """A repeated call is not the one in the log. Fork before it, or give the rollout up."""

    def __init__(self, seq: int, expected: str, got: str) -> None:
        super().__init__(
            f"operation {seq}: the log holds {expected}, the client asked for {got}; make the same calls in the same "
            f"order, or go on from a fork at {seq - 1}"
        )
        self.seq = seq
        self.expected = expected
        self.got = got

    def __reduce__(self) -> tuple[type[Diverged], tuple[int, str, str]]:
        return Diverged, (self.seq, self.expected, self.got)


class Unknown(SandboxError):
    """An operation was begun and nobody knows whether it happened. Never a result, and never run again."""

    def __init__(self, seq: int, op_id: str, kind: str) -> None:
        super().__init__(
            f"operation {seq} ({kind}, id {op_id}): begun, but its result was lost with whoever ran it; it is not "
            f"repeated, since it may have happened; go on from a fork at {seq - 1}, or give the rollout up"
        )
        self.seq = seq
        self.op_id = op_id
        self.kind = kind

    def __reduce__(self) -> tuple[type[Unknown], tuple[int, str, str]]:
        return Unknown, (self.seq, self.op_id, self.kind)


def never(point: str, kind: str) -> None:
    """The ``CrashAt`` of everyone but a test."""


class Recorder:
    """One box and its log. Several ``RecordedSandbox``, one after another, may speak through it."""

    def __init__(self, box: Sandbox | None, log: TrajectoryLog, *, crash_at: CrashAt = never) -> None:
        self.box = box
        """None when the box is gone: what the log holds can still be asked."""
        self.log = log
        self._crash_at = crash_at
        self._running: dict[int, asyncio.Task[dict[str, Any]]] = {}
        self._unrecorded: dict[int, dict[str, Any]] = {}
        """Outcomes that the log could not take, by operation."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    def begin(self, position: int, request: Request, *, op_id: str, idempotent: bool = False) -> Operation:
        """Take the client's ``position``-th call: find it in the log, or log it and start it.

        Raises ``Diverged``, ``SandboxLost`` and what ``target_of`` raises, in which case nothing has happened.
        """
        operations = self.log.operations
        if position >= len(operations):
            box = self._living_box()
            if position > len(operations):
                expected = f"expected {len(operations)} or less; the calls before it were refused, make them again"
                raise SandboxError(f"call {position} of box {self.log.folder.name}: {expected}")
            target_of(box, request)
            operation = self._intend(request, op_id, idempotent or KINDS[request.kind].idempotent)
            self._start(operation, self._execute(box, operation, request))
            return operation
        operation = operations[position]
        logged = Request(operation.kind, self.log.record(operation.seq).data["request"])
        if logged.digest() != request.digest():
            raise Diverged(operation.seq, str(self.request(operation)), str(request))
        if operation.result is None and operation.seq not in self._running:
            self._start(operation, self._settle(operation, request))
        return operation

    async def outcome(self, operation: Operation) -> Any:
        """What the operation gave, waiting while it runs; raises what it raised, ``Unknown`` and ``SandboxLost``.

        Cancelling kills a command and is recorded.
        """
        if operation.result is not None:
            # What else the client has begun gets its turn, as it did when this one ran.
            await asyncio.sleep(0)
            return unwrap(self.stored(operation))
        task = self._running[operation.seq]
        try:
            return unwrap(await asyncio.shield(task))
        except asyncio.CancelledError:
            task.cancel()
            await asyncio.wait({task})
            raise

    def request(self, operation: Operation) -> Request:
        """The call an operation was."""
        return Request(operation.kind, self.log.resolve(self.log.record(operation.seq).data["request"]))

    def stored(self, operation: Operation) -> dict[str, Any]:
        """What a finished operation gave, from the log."""
        assert operation.result is not None
        found: dict[str, Any] = self.log.resolve(self.log.record(operation.result).data["outcome"])
        return found

    def lose(self, cause: str) -> None:
        """Record that the box is gone, once."""
        if self.log.ended is None:
            self.log.append(RecordKind.LOST, {"cause": cause})

    def _living_box(self) -> Sandbox:
        ended = self.log.ended
        if ended or self.box is None:
            cause = ended.data["cause"] if ended else "nobody has opened it"
            raise SandboxLost(f"box {self.log.folder.name} is gone: {cause}")
        return self.box

    def _intend(self, request: Request, op_id: str, idempotent: bool) -> Operation:
        self.log.append(
            RecordKind.INTENT,
            {"op_id": op_id, "kind": request.kind, "idempotent": idempotent, "request": request.arguments},
            # A host that goes down takes the box along: nobody will ask whether this was begun there.
            sync=False,
        )
        self._crash_at("intent", request.kind)
        return self.log.operations[-1]

    def _start(self, operation: Operation, work: Coroutine[Any, Any, dict[str, Any]]) -> None:
        task = self._running[operation.seq] = asyncio.get_running_loop().create_task(work)

        def finished(done: asyncio.Task[dict[str, Any]]) -> None:
            self._running.pop(operation.seq)
            if not done.cancelled():
                # Retrieved here, since the client that waited for it may be dead.
                done.exception()

        task.add_done_callback(finished)

    async def _settle(self, operation: Operation, request: Request) -> dict[str, Any]:
        """End an operation that was begun by someone who died."""
        if operation.seq in self._unrecorded:
            return self._finish(operation, self._unrecorded[operation.seq])
        box = None if self.log.ended else self.box
        if remembers(box):
            with contextlib.suppress(KeyError, SandboxLost):
                outcome = await _caught(recall(box, request, operation.op_id))
                return await self._acknowledged(box, operation, outcome)
        if operation.idempotent:
            return await self._execute(self._living_box(), operation, request)
        raise Unknown(operation.seq, operation.op_id, operation.kind)

    async def _execute(self, box: Sandbox, operation: Operation, request: Request) -> dict[str, Any]:
        kind = KINDS[request.kind]
        try:
            outcome = await _caught(perform(box, request, op_id=operation.op_id))
        except SandboxLost as error:
            self.lose(str(error))
            raise
        except asyncio.CancelledError:
            # The box has killed the command before it let the cancellation through.
            if kind.is_command:
                killed = ExecResult(status=ExecStatus.CANCELLED, exit_code=None)
                self._finish(operation, outcome_of(kind.answer(target_of(box, request), killed, operation.op_id)))
            raise
        self._crash_at("effect", request.kind)
        if not kind.idempotent and remembers(box):
            return await self._acknowledged(box, operation, outcome)
        return self._finish(operation, outcome)

    async def _acknowledged(self, box: Remembers, operation: Operation, outcome: dict[str, Any]) -> dict[str, Any]:
        self._finish(operation, outcome)
        with contextlib.suppress(SandboxLost):
            await box.acknowledge(operation.op_id)
        return outcome

    def _finish(self, operation: Operation, outcome: dict[str, Any]) -> dict[str, Any]:
        self._unrecorded[operation.seq] = outcome
        if "snapshot" in outcome:
            self.log.append(RecordKind.SNAPSHOT, {"intent": operation.seq, **outcome["snapshot"]})
        self.log.append(RecordKind.RESULT, {"intent": operation.seq, "outcome": outcome})
        del self._unrecorded[operation.seq]
        self._crash_at("result", operation.kind)
        return outcome


async def _caught(call: Coroutine[Any, Any, Any]) -> dict[str, Any]:
    try:
        return outcome_of(await call)
    except (ValueError, EOFError, Unsupported) as error:
        return outcome_of(error)
    except OSError as error:
        if error.errno is None:
            # No answer of a file system: a deadline or a connection of ours.
            raise
        return outcome_of(error)


class RecordedSandbox(Operations):
    """A box as one client sees it, from its first call on."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.epoch = recorder.log.epoch
        """A later claim of the log shuts this client out (``Fenced``)."""
        self._position = 0

    async def ask(self, request: Request, idempotent: bool = False) -> Any:
        """The next call of this client, given as a value."""
        self.recorder.log.check_epoch(self.epoch)
        op_id = f"{self.epoch}.{self._position}"
        operation = self.recorder.begin(self._position, request, op_id=op_id, idempotent=idempotent)
        self._position += 1
        return await self.recorder.outcome(operation)

    def skip_recorded(self) -> None:
        """Go on after the calls in the log, instead of making them again to be told what they gave."""
        self._position = len(self.recorder.log.operations)


def creation(substrate: Substrate, spec: SandboxSpec, **more: Any) -> dict[str, Any]:
    """The data of a CREATE record: all it takes to make the same box again."""
    fields = {item.name: getattr(spec, item.name) for item in dataclasses.fields(spec)}
    return {"substrate": substrate.name, "image": substrate.capabilities().get("image"), "spec": fields, **more}


def spec_of(log: TrajectoryLog) -> SandboxSpec:
    """The box a log is about."""
    return SandboxSpec(**log.resolve(log.record(0).data["spec"]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One part of an outcome that came out otherwise, after normalising."""

    seq: int
    request: str
    part: str
    expected: Any
    got: Any


@dataclass(slots=True, kw_only=True)
class Report:
    """What a replay found."""

    num_replayed: int = 0
    differences: list[Difference] = field(default_factory=list)
    left_out: list[int] = field(default_factory=list)
    """Operations whose effect is not known (no result, or cancelled half-way), so that they could not be repeated."""
    image_differs: bool = False
    begun_at: int = 0
    """The operation it began after: a snapshot, or 0 for the beginning."""

    @property
    def ok(self) -> bool:
        return not (self.differences or self.left_out or self.image_differs)


Normaliser = tuple[re.Pattern[bytes], bytes]
NORMALISERS: tuple[Normaliser, ...] = (
    (re.compile(rb"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?([.,]\d+)?(Z|[+-]\d\d:?\d\d)?"), b"<time>"),
    (re.compile(rb"\b\d\d:\d\d:\d\d([.,]\d+)?\b"), b"<time>"),
    (re.compile(rb"\b(\d+m)?\d+\.\d+ ?(ns|us|ms|s|sec|seconds)\b"), b"<duration>"),
    (re.compile(rb"\b(pid|PID|process)([ =:]+)\d+\b"), rb"\1\2<pid>"),
    (re.compile(rb"/proc/\d+\b"), b"/proc/<pid>"),
    (re.compile(rb"\btmp(\.[A-Za-z0-9]{6,}|[a-z0-9_]{8})\b"), b"<temporary>"),
    (re.compile(rb"\b0x[0-9a-f]{6,16}\b"), b"<address>"),
)
"""What two runs of one program may differ in: times, durations, process ids, temporary names, addresses."""


def normalise(data: bytes, normalisers: Sequence[Normaliser] = NORMALISERS) -> bytes:
    """The same output with what is known to vary replaced by its name."""
    for pattern, name in normalisers:
        data = pattern.sub(name, data)
    return data


async def replay(
    log: TrajectoryLog,
    substrate: Substrate,
    *,
    upto: int | None = None,
    whole: bool = False,
    normalisers: Sequence[Normaliser] = NORMALISERS,
) -> Report:
    """Run every operation, or those up to ``upto``, again in a fresh box, and report what came out otherwise.

    It begins at the last snapshot that a box can go on from, or with ``whole`` at the beginning. Operations that ran at
    the same time are repeated one after another, in the order in which they began. How much of a job's output one
    ``read`` finds is a matter of time, and not compared.
    """
    last = len(log) if upto is None else upto
    spec, begun_at = (spec_of(log), 0) if whole else _beginning(log, last)
    report = Report(image_differs=_image_differs(log, substrate), begun_at=begun_at)
    async with substrate.open(spec) as box:

        def again(request: Request, operation: Operation) -> Coroutine[Any, Any, Any]:
            return perform(box, request, op_id=operation.op_id)

        await _repeat(log, again, report, last, normalisers)
    return report


@contextlib.asynccontextmanager
async def fork_at(
    log: TrajectoryLog,
    seq: int,
    *,
    substrate: Substrate,
    folder: Path,
    normalisers: Sequence[Normaliser] = NORMALISERS,
) -> AsyncIterator[tuple[RecordedSandbox, Report]]:
    """A fresh box in the state after operation ``seq``, with a log of its own in ``folder``, and how well that went.

    It is made from the last snapshot up to there that a box can go on from, and by repeating what follows. The next
    call on it comes after operation ``seq``. The box is removed at the end; its log stays.
    """
    if not 0 <= seq < len(log):
        raise ValueError(f"seq = {seq}: expected the number of a record of {log.folder}, 0 to {len(log) - 1}")
    spec, begun_at = _beginning(log, seq)
    report = Report(image_differs=_image_differs(log, substrate), begun_at=begun_at)
    async with substrate.open(spec) as box:
        created = creation(substrate, spec_of(log), forked_from=[log.folder.name, seq])
        forked = TrajectoryLog.create(folder, created)
        with contextlib.closing(forked):
            recorder = Recorder(box, forked)
            _copy(log, forked, begun_at)

            async def again(request: Request, operation: Operation) -> Any:
                # By the name it had, since sessions and jobs are called by it.
                repeated = recorder.begin(len(forked.operations), request, op_id=operation.op_id)
                return await recorder.outcome(repeated)

            await _repeat(log, again, report, seq, normalisers)
            recorded = RecordedSandbox(recorder)
            recorded.skip_recorded()
            yield recorded, report
            if forked.ended is None:
                forked.append(RecordKind.CLOSE, {"cause": "closed"})


def _beginning(log: TrajectoryLog, last: int) -> tuple[SandboxSpec, int]:
    """The box to start from to get to a record's state, and the operation whose state it has; 0 for a fresh one."""
    spec = spec_of(log)
    for record in reversed(log.snapshots):
        seq = record.data["intent"]
        if seq <= last and layers.find(record.data["digest"]) and _stands_alone(log, seq):
            past = Recorder(None, log)
            allowed = [past.request(operation) for operation in log.operations if _set_net_before(operation, seq)]
            network = tuple(allowed[-1].arguments["allow"]) if allowed else spec.network
            return dataclasses.replace(spec, image=record.data["image"], files={}, network=network), seq
    return spec, 0


def _set_net_before(operation: Operation, seq: int) -> bool:
    return operation.kind == "set_net" and operation.seq < seq and operation.result is not None


def _stands_alone(log: TrajectoryLog, seq: int) -> bool:
    """Whether a snapshot is all of the box: nothing else was under way, and no session or job was open."""
    past, still_open = Recorder(None, log), set()
    (snapshot,) = (operation for operation in log.operations if operation.seq == seq)
    for operation in log.operations:
        if operation is snapshot or operation.seq > (snapshot.result or 0):
            continue
        if operation.result is None or operation.result > seq:
            if not KINDS[operation.kind].idempotent:
                return False
            continue
        outcome = past.stored(operation)
        if operation.kind in ("session", "job") and "error" not in outcome:
            still_open.add(operation.op_id)
        ended = outcome.get("ended") or outcome.get("output", {}).get("ended")
        if ended or operation.kind in ("session.close", "job.wait"):
            still_open.discard(past.request(operation).arguments["handle"])
    return not still_open


def _copy(source: TrajectoryLog, target: TrajectoryLog, last: int) -> None:
    """Take over the operations up to one, for a client that makes its calls from the first on."""
    snapshots = {record.data["intent"]: record for record in source.snapshots}
    for operation in source.operations:
        if operation.seq > last:
            return
        intent = target.append(RecordKind.INTENT, source.resolve(source.record(operation.seq).data)).seq
        if operation.seq in snapshots:
            target.append(RecordKind.SNAPSHOT, {**snapshots[operation.seq].data, "intent": intent})
        if operation.result is not None:
            outcome = source.resolve(source.record(operation.result).data["outcome"])
            target.append(RecordKind.RESULT, {"intent": intent, "outcome": outcome})


def _image_differs(log: TrajectoryLog, substrate: Substrate) -> bool:
    recorded: object = log.record(0).data["image"]
    return recorded != substrate.capabilities().get("image")


async def _repeat(
    log: TrajectoryLog,
    call: Callable[[Request, Operation], Coroutine[Any, Any, Any]],
    report: Report,
    last: int,
    normalisers: Sequence[Normaliser],
) -> None:
    past = Recorder(None, log)
    for operation in log.operations:
        if operation.seq <= report.begun_at:
            continue
        if operation.seq > last:
            return
        expected = past.stored(operation) if operation.result is not None else {}
        if not expected or expected.get("exec", {}).get("status") == ExecStatus.CANCELLED:
            report.left_out.append(operation.seq)
            continue
        request = past.request(operation)
        got = await _caught(call(request, operation))
        report.num_replayed += 1
        report.differences += _differences(operation.seq, str(request), expected, got, normalisers)


def _differences(
    seq: int, request: str, expected: Mapping[str, Any], got: Mapping[str, Any], normalisers: Sequence[Normaliser]
) -> list[Difference]:
    old, new = _steady(expected, normalisers), _steady(got, normalisers)
    return [
        Difference(seq=seq, request=request, part=name, expected=old.get(name), got=new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _steady(outcome: Mapping[str, Any], normalisers: Sequence[Normaliser]) -> dict[str, Any]:
    """The parts of an outcome that should be the same each time."""

    def steady(value: Any) -> Any:
        if isinstance(value, bytes):
            return normalise(value, normalisers)
        if isinstance(value, Mapping):
            return {name: steady(item) for name, item in value.items() if name not in VARYING}
        return [steady(item) for item in value] if isinstance(value, list) else value

    if "output" in outcome:
        return {}
    name, content = next(iter(outcome.items()))
    found: dict[str, Any] = steady(content if name in ("exec", "error", "snapshot") else outcome)
    return found
