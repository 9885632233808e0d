"""A sandbox that remembers: every operation is in the log before it acts and its result before anyone sees it.

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
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from posttrain.errors import SandboxError, SandboxLost
from posttrain.protocols import Sandbox, Substrate
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox.log import Blob, Operation, RecordKind, TrajectoryLog, encode

IDEMPOTENT = frozenset({"read", "list"})
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


@runtime_checkable
class Remembers(Protocol):
    """A box whose agent keeps the results of ``exec`` and ``write`` by operation id until they are acknowledged.

    Its ``exec`` and ``write`` take the id as ``op_id``.
    """

    async def result_of(self, op_id: str) -> ExecResult | None:
        """What the operation gave, waiting while it runs; it raises what the operation raised.

        ``KeyError`` when the agent has never heard of it. A write gives None.
        """
        ...

    async def acknowledge(self, op_id: str) -> None:
        """The result is on disk; the agent may forget it."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """One call on a box."""

    kind: str
    arguments: Mapping[str, Any]

    def digest(self) -> str:
        """The same for equal calls only."""
        text = json.dumps([self.kind, encode(self.arguments, _blob)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        first = next(iter(self.arguments.values()), "")
        return f"{self.kind}({first!r:.60}) [{self.digest()[:12]}]"


def _blob(data: bytes) -> Blob:
    return Blob(hashlib.sha256(data).hexdigest(), len(data))


async def perform(box: Sandbox, request: Request, **named: Any) -> Any:
    """Make the call."""
    arguments = dict(request.arguments)
    if request.kind == "exec":
        return await box.exec(arguments.pop("command"), **arguments, **named)
    if request.kind == "read":
        return await box.read(arguments["path"], max_bytes=arguments["max_bytes"])
    if request.kind == "write":
        return await box.write(arguments["path"], arguments["data"], **named)
    if request.kind == "list":
        return await box.list(arguments["path"])
    raise ValueError(f"Request.kind = {request.kind!r}: expected exec, read, write or list")


def outcome_of(value: Any) -> dict[str, Any]:
    """What a call gave or raised, in the form the log keeps."""
    if isinstance(value, OSError):
        return {"error": {"errno": value.errno, "message": value.strerror or str(value)}}
    if isinstance(value, ValueError):
        return {"error": {"errno": None, "message": str(value)}}
    if isinstance(value, ExecResult):
        return {"exec": {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}}
    return {"value": value}


def unwrap(outcome: Mapping[str, Any]) -> Any:
    """Give or raise again what ``outcome_of`` was made from."""
    if "error" in outcome:
        code, message = outcome["error"]["errno"], outcome["error"]["message"]
        raise ValueError(message) if code is None else OSError(code, message)
    if "exec" in outcome:
        return ExecResult(**{**outcome["exec"], "status": ExecStatus(outcome["exec"]["status"])})
    return outcome["value"]


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

        Raises ``Diverged`` and ``SandboxLost``, in which case nothing has happened.
        """
        operations, req_hash = self.log.operations, request.digest()
        if position >= len(operations):
            box = self._living_box()
            if position > len(operations):
                expected = f"expected {len(operations)} or less; the calls before it were refused, make them again"
                raise SandboxError(f"call {position} of box {self.log.folder.name}: {expected}")
            operation = self._intend(request, req_hash, op_id, idempotent or request.kind in IDEMPOTENT)
            self._start(operation, self._execute(box, operation, request))
            return operation
        operation = operations[position]
        if operation.req_hash != req_hash:
            raise Diverged(operation.seq, str(self.request(operation)), str(request))
        if operation.result is None and operation.seq not in self._running:
            self._start(operation, self._settle(operation, request))
        return operation

    async def outcome(self, operation: Operation) -> Any:
        """What the operation gave, waiting while it runs; raises what it raised, ``Unknown`` and ``SandboxLost``.

        Cancelling kills a command and is recorded.
        """
        if operation.result is not None:
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

    def _intend(self, request: Request, req_hash: str, op_id: str, idempotent: bool) -> Operation:
        self.log.append(
            RecordKind.INTENT,
            {
                "op_id": op_id,
                "kind": request.kind,
                "req_hash": req_hash,
                "idempotent": idempotent,
                "request": request.arguments,
            },
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
        if isinstance(box, Remembers):
            with contextlib.suppress(KeyError, SandboxLost):
                outcome = await _caught(box.result_of(operation.op_id))
                return await self._acknowledged(box, operation, outcome)
        if operation.idempotent and box is not None:
            return await self._execute(box, operation, request)
        raise Unknown(operation.seq, operation.op_id, operation.kind)

    async def _execute(self, box: Sandbox, operation: Operation, request: Request) -> dict[str, Any]:
        asked = isinstance(box, Remembers) and request.kind not in IDEMPOTENT
        named = {"op_id": operation.op_id} if asked else {}
        try:
            outcome = await _caught(perform(box, request, **named))
        except SandboxLost as error:
            self.lose(str(error))
            raise
        except asyncio.CancelledError:
            # The box has killed the command before it let the cancellation through.
            if request.kind == "exec":
                self._finish(operation, outcome_of(ExecResult(status=ExecStatus.CANCELLED, exit_code=None)))
            raise
        self._crash_at("effect", request.kind)
        if isinstance(box, Remembers) and asked:
            return await self._acknowledged(box, operation, outcome)
        return self._finish(operation, outcome)

    async def _acknowledged(self, box: Remembers, operation: Operation, outcome: dict[str, Any]) -> dict[str, Any]:
        self._finish(operation, outcome)
        with contextlib.suppress(SandboxLost):
            await box.acknowledge(operation.op_id)
        return outcome

    def _finish(self, operation: Operation, outcome: dict[str, Any]) -> dict[str, Any]:
        self._unrecorded[operation.seq] = outcome
        self.log.append(RecordKind.RESULT, {"intent": operation.seq, "outcome": outcome})
        del self._unrecorded[operation.seq]
        self._crash_at("result", operation.kind)
        return outcome


async def _caught(call: Coroutine[Any, Any, Any]) -> dict[str, Any]:
    try:
        return outcome_of(await call)
    except ValueError as error:
        return outcome_of(error)
    except OSError as error:
        if error.errno is None:
            # No answer of a file system: a deadline or a connection of ours.
            raise
        return outcome_of(error)


class RecordedSandbox:
    """A box as one client sees it, from its first call on. Satisfies the ``Sandbox`` protocol."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.epoch = recorder.log.epoch
        """A later claim of the log shuts this client out (``Fenced``)."""
        self._position = 0

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = None,
        max_output: int = 1 << 20,
        env: Mapping[str, str] | None = None,
        idempotent: bool = False,
    ) -> ExecResult:
        """Run a command, once. ``idempotent`` says that running it again is harmless when its end is not known."""
        request = exec_request(command, stdin=stdin, timeout_s=timeout_s, max_output=max_output, env=env)
        result: ExecResult = await self.call(request, idempotent)
        return result

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        """Content of a regular file."""
        data: bytes = await self.call(Request("read", {"path": path, "max_bytes": max_bytes}))
        return data

    async def write(self, path: str, data: bytes, *, idempotent: bool = False) -> None:
        """Create or replace a file, atomically, once."""
        await self.call(Request("write", {"path": path, "data": data}), idempotent)

    async def list(self, path: str = ".") -> list[str]:
        """Regular files below a directory, sorted."""
        names: list[str] = await self.call(Request("list", {"path": path}))
        return names

    async def call(self, request: Request, idempotent: bool = False) -> Any:
        """The next call of this client, given as a value."""
        self.recorder.log.check_epoch(self.epoch)
        op_id = f"{self.epoch}.{self._position}"
        operation = self.recorder.begin(self._position, request, op_id=op_id, idempotent=idempotent)
        self._position += 1
        return await self.recorder.outcome(operation)


def exec_request(
    command: str | Sequence[str],
    *,
    stdin: bytes,
    timeout_s: float | None,
    max_output: int,
    env: Mapping[str, str] | None,
) -> Request:
    """The request of an ``exec``, the same for equal arguments."""
    return Request(
        "exec",
        {
            "command": command if isinstance(command, str) else list(command),
            "stdin": stdin,
            "timeout_s": timeout_s,
            "max_output": max_output,
            "env": None if env is None else dict(env),
        },
    )


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
    normalisers: Sequence[Normaliser] = NORMALISERS,
) -> Report:
    """Run every operation, or those up to ``upto``, again in a fresh box, and report what came out otherwise.

    Operations that ran at the same time are repeated one after another, in the order in which they began.
    """
    report = Report(image_differs=_image_differs(log, substrate))
    async with substrate.open(spec_of(log)) as box:
        await _repeat(log, lambda request: perform(box, request), report, upto, normalisers)
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

    The next call on it comes after operation ``seq``. The box is removed at the end; its log stays.
    """
    if not 0 <= seq < len(log):
        raise ValueError(f"seq = {seq}: expected the number of a record of {log.folder}, 0 to {len(log) - 1}")
    spec, report = spec_of(log), Report(image_differs=_image_differs(log, substrate))
    async with substrate.open(spec) as box:
        forked = TrajectoryLog.create(folder, creation(substrate, spec, forked_from=[log.folder.name, seq]))
        with contextlib.closing(forked):
            recorded = RecordedSandbox(Recorder(box, forked))
            await _repeat(log, recorded.call, report, seq, normalisers)
            yield recorded, report
            if forked.ended is None:
                forked.append(RecordKind.CLOSE, {"cause": "closed"})


def _image_differs(log: TrajectoryLog, substrate: Substrate) -> bool:
    recorded: object = log.record(0).data["image"]
    return recorded != substrate.capabilities().get("image")


async def _repeat(
    log: TrajectoryLog,
    call: Callable[[Request], Coroutine[Any, Any, Any]],
    report: Report,
    upto: int | None,
    normalisers: Sequence[Normaliser],
) -> None:
    past = Recorder(None, log)
    for operation in log.operations:
        if upto is not None and operation.seq > upto:
            return
        expected = past.stored(operation) if operation.result is not None else {}
        if not expected or expected.get("exec", {}).get("status") == ExecStatus.CANCELLED:
            report.left_out.append(operation.seq)
            continue
        request = past.request(operation)
        got = await _caught(call(request))
        report.num_replayed += 1
        report.differences += _differences(operation.seq, str(request), expected, got, normalisers)


def _differences(
    seq: int, request: str, expected: Mapping[str, Any], got: Mapping[str, Any], normalisers: Sequence[Normaliser]
) -> list[Difference]:
    def parts(outcome: Mapping[str, Any]) -> dict[str, Any]:
        found = dict(outcome.get("exec") or outcome.get("error") or outcome)
        return {
            name: normalise(value, normalisers) if isinstance(value, bytes) else value
            for name, value in found.items()
            if name != "wall_s"
        }

    old, new = parts(expected), parts(got)
    return [
        Difference(seq=seq, request=request, part=name, expected=old.get(name), got=new.get(name))
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]
