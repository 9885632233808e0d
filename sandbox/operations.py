"""What can be asked of a box, as values that can be logged and sent: one table of kinds, and the API written once.

``perform`` makes a request on a box. ``Operations`` is the other side: whoever can have a request made, through a log
or over a socket, inherits every method from it. A session or a job is named by the ``op_id`` of the operation that
opened it, so that a client which comes back and opens it again, and is answered from the log, has the same one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, TypeGuard

from posttrain.errors import SandboxError, SandboxLost, Unsupported
from posttrain.types import ExecResult, ExecStatus
from sandbox.layers import Snapshot
from sandbox.log import Blob, encode
from sandbox.streams import SIGINT, SIGKILL, Chunk, Output
from sandbox.transfer import MAX_BYTES, MAX_ENTRIES, Entry, write_tar


class HandleLost(SandboxError):
    """A box does not have this session or job: it is another box, made again without it."""

    def __init__(self, kind: str, handle: str) -> None:
        super().__init__(
            f"{kind} on {handle!r}: the box has no such session or job (any more); open another, or go on from a fork "
            "before it was opened"
        )
        self.kind = kind
        self.handle = handle

    def __reduce__(self) -> tuple[type[HandleLost], tuple[str, str]]:
        return HandleLost, (self.kind, self.handle)


class Remembers(Protocol):
    """A box whose agent keeps results by operation id until they are acknowledged.

    Whatever is not idempotent takes the id as ``op_id``.
    """

    async def result_of(self, op_id: str) -> Any:
        """What the operation gave, waiting while it runs; it raises what the operation raised.

        ``KeyError`` when the agent has never heard of it. A write gives None.
        """
        ...

    async def acknowledge(self, op_id: str) -> None:
        """The result is on disk; the agent may forget it."""
        ...


def remembers(box: Any) -> TypeGuard[Remembers]:
    """Whether the box has these methods: ``isinstance`` with a protocol takes longer than the rest of a call."""
    return hasattr(box, "result_of") and hasattr(box, "acknowledge")


@dataclass(frozen=True, slots=True)
class Request:
    """One call on a box."""

    kind: str
    arguments: Mapping[str, Any]

    def digest(self) -> str:
        """The same for equal calls only, whether a large payload is here or a ``Blob`` stands for it."""
        text = json.dumps([self.kind, encode(self.arguments, _blob)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        first = next(iter(self.arguments.values()), "")
        return f"{self.kind}({first!r:.60}) [{self.digest()[:12]}]"


def _blob(data: bytes) -> Blob:
    return Blob(hashlib.sha256(data).hexdigest(), len(data))


@dataclass(frozen=True, slots=True)
class Ran:
    """What a session's command did, and why there is no shell any more; empty while there is one."""

    result: ExecResult
    ended: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How operations of one kind are made."""

    method: str
    on_handle: bool = False
    """It is a method of a session or a job, which the argument ``handle`` names, and not of the box."""
    idempotent: bool = False
    """Running it again is harmless when its end is not known."""
    is_command: bool = False
    """Cancelling kills what it started, which is a result."""
    answer: Callable[[Any, Any, str], Any] = lambda target, value, op_id: value
    """What it comes to, from whose method it is, what that gave, and its ``op_id``."""


def _ran(session: Any, result: ExecResult, op_id: str) -> Ran:
    return Ran(result, session.ended)


def _opened(box: Any, handle: Any, op_id: str) -> str:
    return op_id


KINDS: Mapping[str, Kind] = {
    "exec": Kind(method="exec", is_command=True),
    "call": Kind(method="call", is_command=True),
    "read": Kind(method="read", idempotent=True),
    "write": Kind(method="write"),
    "list": Kind(method="list", idempotent=True),
    "entries": Kind(method="entries", idempotent=True),
    "upload": Kind(method="upload"),
    "download": Kind(method="download", idempotent=True),
    "snapshot": Kind(method="snapshot", idempotent=True),
    "set_net": Kind(method="set_net", idempotent=True),
    "pause": Kind(method="pause", idempotent=True),
    "resume": Kind(method="resume", idempotent=True),
    "session": Kind(method="session", answer=_opened),
    "session.run": Kind(method="run", on_handle=True, is_command=True, answer=_ran),
    "session.interrupt": Kind(method="interrupt", on_handle=True),
    "session.close": Kind(method="close", on_handle=True, idempotent=True),
    "job": Kind(method="spawn", answer=_opened),
    "job.read": Kind(method="read", on_handle=True, idempotent=True),
    "job.write_stdin": Kind(method="write_stdin", on_handle=True),
    "job.signal": Kind(method="signal", on_handle=True),
    "job.resize": Kind(method="resize", on_handle=True, idempotent=True),
    "job.wait": Kind(method="wait", on_handle=True, idempotent=True),
}


def target_of(box: Any, request: Request) -> Any:
    """The box, or the session or the job in it, whose method a request calls.

    ``ValueError`` for a kind there is not, ``Unsupported`` for one the box has no method for, ``HandleLost``.
    """
    kind = KINDS.get(request.kind)
    if kind is None:
        raise ValueError(f"Request.kind = {request.kind!r}: expected one of {', '.join(KINDS)}")
    opener = KINDS[request.kind.partition(".")[0]]
    if not hasattr(box, opener.method):
        raise Unsupported(f"{request.kind}: a {type(box).__name__} has no {opener.method}(); use another substrate")
    if not kind.on_handle:
        return box
    try:
        return box.handle(request.arguments["handle"])
    except KeyError as error:
        raise HandleLost(request.kind, str(request.arguments["handle"])) from error


async def perform(box: Any, request: Request, *, op_id: str = "") -> Any:
    """Make the call. ``op_id`` names it to a box that remembers."""
    target, kind = target_of(box, request), KINDS[request.kind]
    arguments = {name: value for name, value in request.arguments.items() if name != "handle"}
    if not kind.idempotent and remembers(box):
        arguments["op_id"] = op_id
    value = await getattr(target, kind.method)(**arguments)
    return kind.answer(target, value, op_id)


async def recall(box: Remembers, request: Request, op_id: str) -> Any:
    """What a call gave that was made before. ``KeyError`` when the box does not know of it."""
    value = await box.result_of(op_id)
    return KINDS[request.kind].answer(target_of(box, request), value, op_id)


RESULTS: Mapping[str, type[Any]] = {"exec": ExecResult, "output": Output, "snapshot": Snapshot}
ERRORS: Mapping[str, type[Exception]] = {kind.__name__: kind for kind in (OSError, ValueError, EOFError, Unsupported)}
"""What a box answers with. Anything else that is raised is a failure of the machinery, and no outcome."""


def outcome_of(value: Any) -> dict[str, Any]:
    """What a call gave or raised, in the form the log keeps."""
    if isinstance(value, Ran):
        return {**outcome_of(value.result), "ended": value.ended}
    for name, kind in ERRORS.items():
        if isinstance(value, kind):
            code, message = (value.errno, value.strerror) if isinstance(value, OSError) else (None, None)
            return {"error": {"kind": name, "errno": code, "message": message or str(value)}}
    for name, result in RESULTS.items():
        if isinstance(value, result):
            return {name: _fields(value)}
    if isinstance(value, Sequence) and value and isinstance(value[0], Entry):
        return {"entries": [_fields(entry) for entry in value]}
    return {"value": value}


def unwrap(outcome: Mapping[str, Any]) -> Any:
    """Give or raise again what ``outcome_of`` was made from."""
    if "error" in outcome:
        error = outcome["error"]
        if error["errno"] is not None:
            raise OSError(error["errno"], error["message"])
        raise ERRORS[error["kind"]](error["message"])
    if "exec" in outcome:
        result = ExecResult(**{**outcome["exec"], "status": ExecStatus(outcome["exec"]["status"])})
        return Ran(result, outcome["ended"]) if "ended" in outcome else result
    if "entries" in outcome:
        return [Entry(**fields) for fields in outcome["entries"]]
    name, content = next(iter(outcome.items()))
    return RESULTS[name](**content) if name in RESULTS else content


def _fields(value: Any) -> dict[str, Any]:
    return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}


class Operations(ABC):
    """A box as a client sees it that has every request made by somebody else. Satisfies the ``Sandbox`` protocol."""

    @abstractmethod
    async def ask(self, request: Request, idempotent: bool = False) -> Any:
        """Have a request made, as the next of this client, and give or raise what came of it.

        ``idempotent`` says that making it again is harmless when its end is not known, as for some kinds it always is.
        """

    async def _ask(self, kind: str, *, idempotent: bool = False, **arguments: Any) -> Any:
        given = {name: _plain(value) for name, value in arguments.items() if value is not None}
        return await self.ask(Request(kind, given), idempotent)

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = None,
        max_output: int = 1 << 20,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        user: str | None = None,
        idempotent: bool = False,
    ) -> ExecResult:
        """Run a command, once. ``idempotent`` says that running it again is harmless when its end is not known."""
        return await self._ask(
            "exec",
            command=command,
            stdin=stdin,
            timeout_s=timeout_s,
            max_output=max_output,
            env=env,
            cwd=cwd,
            user=user,
            idempotent=idempotent,
        )

    async def call(
        self,
        source: str,
        *,
        args: Sequence[str] = (),
        stdin: bytes = b"",
        timeout_s: float | None = None,
        max_output: int = 1 << 20,
        env: Mapping[str, str] | None = None,
    ) -> ExecResult:
        """Run a Python program as ``python3 -I -c`` would, forked from a started interpreter."""
        return await self._ask(
            "call", source=source, args=args, stdin=stdin, timeout_s=timeout_s, max_output=max_output, env=env
        )

    async def read(self, path: str, *, max_bytes: int = 1 << 20, offset: int | None = None) -> bytes:
        """Content of a regular file; with an ``offset``, up to ``max_bytes`` from there."""
        return await self._ask("read", path=path, max_bytes=max_bytes, offset=offset)

    async def write(self, path: str, data: bytes, *, mode: int | None = None, idempotent: bool = False) -> None:
        """Create or replace a file, atomically, once. ``mode`` are its permission bits."""
        await self._ask("write", path=path, data=data, mode=mode, idempotent=idempotent)

    async def list(self, path: str = ".") -> list[str]:
        """Regular files below a directory, sorted."""
        return await self._ask("list", path=path)

    async def entries(self, path: str = ".") -> Sequence[Entry]:
        """Everything below a directory with kind, size, permissions and time, sorted by path."""
        return await self._ask("entries", path=path)

    async def upload(
        self,
        files: Mapping[str, bytes] | bytes,
        path: str = ".",
        *,
        max_entries: int = MAX_ENTRIES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Write the files of a mapping or an uncompressed tar archive below a directory."""
        await self._ask("upload", files=files, path=path, max_entries=max_entries, max_bytes=max_bytes)

    async def download(
        self, path: str = ".", *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES
    ) -> Mapping[str, bytes]:
        """The regular files below a directory, or one file, by path relative to the workdir."""
        return await self._ask("download", path=path, max_entries=max_entries, max_bytes=max_bytes)

    async def download_tar(
        self, path: str = ".", *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES
    ) -> bytes:
        """The same as a tar archive, with names relative to the workdir."""
        return write_tar(await self.download(path, max_entries=max_entries, max_bytes=max_bytes))

    async def set_net(self, allow: Sequence[str]) -> None:
        """Let commands reach these destinations, as in ``SandboxSpec.network``, and no other."""
        await self._ask("set_net", allow=allow)

    async def session(
        self, *, cwd: str = ".", env: Mapping[str, str] | None = None, user: str | None = None
    ) -> RemoteSession:
        """A shell that keeps its state between commands."""
        return RemoteSession(self, await self._ask("session", cwd=cwd, env=env, user=user))

    async def spawn(
        self,
        command: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        user: str | None = None,
        tty: tuple[int, int] | None = None,
    ) -> RemoteJob:
        """Start a program whose output is read as it comes; ``tty`` is the rows and columns of a terminal for it."""
        handle = await self._ask("job", command=command, timeout_s=timeout_s, env=env, cwd=cwd, user=user, tty=tty)
        return RemoteJob(self, handle)

    async def snapshot(self) -> Snapshot:
        """Keep the content of the workdir; ``SandboxSpec(image=snapshot.image)`` begins with it."""
        return await self._ask("snapshot")

    async def pause(self) -> None:
        """Stop everything in the box where it is. The next call resumes it."""
        await self._ask("pause")

    async def resume(self) -> None:
        """Let the box go on. Nothing happens when it is not paused."""
        await self._ask("resume")


class _Remote:
    """Something that is open in a box."""

    KIND: str

    def __init__(self, box: Operations, handle: str) -> None:
        self.handle = handle
        self._box = box

    async def _ask(self, method: str, **arguments: Any) -> Any:
        return await self._box._ask(f"{self.KIND}.{method}", handle=self.handle, **arguments)


class RemoteSession(_Remote):
    """A shell in a box, as ``sandbox.streams.Session``. ``async with`` closes it."""

    KIND = "session"
    ended = ""
    """Why there is no shell any more; empty while there is one."""

    async def run(self, command: str, *, timeout_s: float | None = None, max_output: int = 1 << 20) -> ExecResult:
        """Run one command in the shell, once, with standard input closed. ``EOFError`` when the shell has ended."""
        ran: Ran = await self._ask("run", command=command, timeout_s=timeout_s, max_output=max_output)
        self.ended = ran.ended
        return ran.result

    async def interrupt(self) -> None:
        """Ctrl-C: the command that runs ends with 130."""
        await self._ask("interrupt")

    async def close(self) -> None:
        """Kill the shell and everything its commands left running."""
        await self._ask("close")
        self.ended = self.ended or "closed"

    async def __aenter__(self) -> RemoteSession:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            await self.close()
        except SandboxLost:
            # It has ended with its box.
            return


class RemoteJob(_Remote):
    """A program in a box that runs on while its output is read, as ``sandbox.streams.Job``."""

    KIND = "job"

    def __init__(self, box: Operations, handle: str) -> None:
        super().__init__(box, handle)
        self.offset = 0
        """Bytes of output read so far."""
        self._chunks: deque[Chunk] = deque()

    async def read(self, *, max_output: int = 1 << 20, wait_s: float = 10.0) -> Output:
        """Output that was not read yet, waiting up to ``wait_s`` for the first of it."""
        output: Output = await self._ask("read", offset=self.offset, max_output=max_output, wait_s=wait_s)
        self.offset = output.offset
        return output

    def __aiter__(self) -> RemoteJob:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            output = await self.read()
            streams = (("stdout", output.stdout), ("stderr", output.stderr))
            self._chunks += [Chunk(stream, data) for stream, data in streams if data]
            if output.ended and not self._chunks:
                raise StopAsyncIteration
        return self._chunks.popleft()

    async def write_stdin(self, data: bytes, *, eof: bool = False) -> None:
        """Write to standard input, once, and wait until it is written; with ``eof`` it ends after the data."""
        await self._ask("write_stdin", data=data, eof=eof)

    async def signal(self, number: int) -> None:
        """A signal to the process group; SIGKILL to everything the job started."""
        await self._ask("signal", number=number)

    async def interrupt(self) -> None:
        """SIGINT to the process group, as Ctrl-C gives."""
        await self.signal(SIGINT)

    async def kill(self) -> None:
        """SIGKILL to everything the job started."""
        await self.signal(SIGKILL)

    async def resize(self, rows: int, columns: int) -> None:
        """Tell the programs on the job's terminal its new size. ``ValueError`` without a terminal."""
        await self._ask("resize", rows=rows, columns=columns)

    async def wait(self, *, max_output: int = 1 << 20) -> ExecResult:
        """How it ended, with the output that was not read, of which head and tail are kept."""
        return await self._ask("wait", offset=self.offset, max_output=max_output)

    async def __aenter__(self) -> RemoteJob:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        """Kill it, unless it has ended."""
        try:
            await self.kill()
            await self.wait()
        except (ProcessLookupError, SandboxLost):
            return


def _plain(value: Any) -> Any:
    """Lists for tuples and dictionaries for mappings, as a log gives them back."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value
