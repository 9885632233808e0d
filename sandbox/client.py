"""The host's side of the agent protocol: one ``AgentSandbox`` per open box, whatever the box is made of."""

from __future__ import annotations

import asyncio
import functools
import itertools
import marshal
import resource
import stat
from collections.abc import Callable, Mapping, Sequence
from importlib.util import MAGIC_NUMBER
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Protocol

from posttrain.errors import SandboxError, SandboxLost
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox import agent, agent_python, agent_streams
from sandbox.cgroups import Hits
from sandbox.streams import Job, Session
from sandbox.transfer import MAX_BYTES, MAX_ENTRIES, Entry, File, read_files, write_tar

AT_ONCE = 8
"""Commands that run at the same time in one box; more wait their turn."""
SLOTS = AT_ONCE + 1
"""Payload uids of a box: one for each of them, and one on which nothing runs, for the fork server to hide behind."""
MAX_HELD = AT_ONCE - 2
"""Sessions and jobs open at the same time, which leaves room for commands."""
WRITES_AT_ONCE = 32
"""Files of an upload on their way at the same time."""
START_DEADLINE_S = 60.0
REPLY_GRACE_S = 20.0
"""How long past a command's own limit the host waits for the agent before it calls the box lost."""
FILE_DEADLINE_S = 30.0
AGENT_MEMORY_MB = 24
TMP_MB = 16
"""Size of /tmp, beside the ``disk_mb`` of the workdir."""
BASE_ENV = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/work",
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONDONTWRITEBYTECODE": "1",
}
BOOTSTRAP = """\
import os, marshal, _frozen_importlib_external as f
def read(n):
    b = b''
    while len(b) < n:
        c = os.read(0, n - len(b))
        if not c: os._exit(0)
        b += c
    return b
magic, code, source = (read(int.from_bytes(read(4), 'big')) for _ in range(3))
exec(marshal.loads(code) if magic == f.MAGIC_NUMBER else compile(source, 'agent', 'exec'), {'__name__': '__main__'})
"""
"""What the box's Python runs first: it takes the agent's program from the channel, so no image contains it."""
AGENT_ARGV = ("/usr/bin/python3", "-I", "-S", "-c", BOOTSTRAP)


Fields = list[bytes]
"""What a reply holds; an alias, since ``AgentSandbox.list`` hides the builtin inside its class."""


class Channel(Protocol):
    """Bytes to and from the agent."""

    async def receive(self) -> bytes:
        """The next piece; empty at the end."""
        ...

    async def send(self, data: bytes) -> None: ...

    def close(self) -> None: ...


class StreamChannel:
    """A socket whose other end is the agent's standard input and output."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def receive(self) -> bytes:
        return await self._reader.read(1 << 18)

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    def close(self) -> None:
        self._writer.close()


class AgentSandbox:
    """An open box. Made by a substrate, which also removes it."""

    def __init__(
        self, channel: Channel, spec: SandboxSpec, *, hits: Callable[[], Hits] | None, kill: Callable[[], None]
    ) -> None:
        self.spec = spec
        self.kill = kill
        """Kill the box now, from outside. What is pending raises ``SandboxLost``."""
        self._channel = channel
        self._hits = hits
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._held = 0
        self._ops = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Fields]] = {}
        self._events: dict[int, Callable[[Fields], None]] = {}
        self._parts: set[str] = set()
        self._calling = asyncio.Lock()
        self._sending = asyncio.Lock()
        self._lost = ""
        self._pump: asyncio.Task[None] | None = None
        self.spoiled = ""
        """Why no stranger may get this box after its user; empty while it has only had calls that left nothing."""
        self.num_calls = 0

    async def start(self, *, uid: int, limits: Mapping[int, int]) -> None:
        """Send the agent's program and wait until it answers.

        ``uid`` is the first of ``SLOTS`` payload uids (and the gid); ``limits`` are resource limits of each command.
        """
        ready: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        self._pending[0] = ready
        self._pump = asyncio.create_task(self._receive_replies())
        rlimits = [f"{limit}={value}" for limit, value in limits.items()]
        config = agent.pack(self.spec.workdir, uid, uid, SLOTS, *rlimits)
        await self._send(_program() + agent.HEADER.pack(0, agent.CONFIG, len(config)) + config)
        await self._await(0, ready, START_DEADLINE_S)

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = None,
        max_output: int = 1 << 20,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        op_id: str = "",
    ) -> ExecResult:
        """Run argv, or a string through ``sh -c``. On return every process the command started is dead.

        ``max_output`` bounds each stream: its head and its tail are kept, with one line saying how much is missing
        between them. A command that goes on to print 8 MiB more is killed (``OUTPUT_LIMIT``).

        ``cwd`` is relative to the workdir and reached without following links (``OSError`` as for a file). A command
        with an ``op_id`` runs once: a second one of that name gets the result of the first, which the box keeps until
        ``acknowledge``.
        """
        limit_s = self.spec.timeout_s if timeout_s is None else timeout_s
        argv = check_argv(command)
        _check_limits(limit_s, max_output)
        pairs = _pairs(env)
        folder = check_path(cwd, allow_workdir=True)
        body = agent.pack(int(limit_s * 1e6), max_output, len(argv), stdin, op_id, folder, *argv, *pairs)
        self.spoiled = self.spoiled or "a command ran in it"
        async with self._slots:
            return (await self.command(agent.EXEC, body, limit_s + REPLY_GRACE_S))[0]

    async def result_of(self, op_id: str, *, timeout_s: float = START_DEADLINE_S) -> ExecResult:
        """The result of an ``exec`` with this ``op_id``; waits for one that runs. ``KeyError`` for an unknown one.

        Whether a limit of the whole box was hit (``OOM``, ``PIDS_LIMIT``) is not known any more.
        """
        try:
            return _result(await self.ask(agent.RESULT_OF, agent.pack(op_id), timeout_s), None, None)
        except FileNotFoundError as error:
            raise KeyError(op_id) from error

    async def acknowledge(self, op_id: str) -> None:
        """Let the box forget a result. Unknown names are ignored."""
        await self.ask(agent.ACKNOWLEDGE, agent.pack(op_id))

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
        """Run a Python program as ``python3 -I -c`` would, forked from a started interpreter. One at a time.

        It runs in an empty directory of its own. On return its processes are dead and what it wrote is deleted.
        """
        limit_s = self.spec.timeout_s if timeout_s is None else timeout_s
        _check_limits(limit_s, max_output)
        program = agent.pack(source, len(args), *args, *_pairs(env))
        body = agent.pack(int(limit_s * 1e6), max_output, stdin, program)
        async with self._calling, self._slots:
            spoiled, self.spoiled = self.spoiled, self.spoiled or "a call did not return"
            self.num_calls += 1
            await self._load(agent_python)
            result, fields = await self.command(agent_python.CALL, body, limit_s + REPLY_GRACE_S)
        ended = result.status in (ExecStatus.EXITED, ExecStatus.SIGNALED)
        self.spoiled = spoiled or fields[10].decode("utf-8", "replace") or ("" if ended else result.status.value)
        return result

    async def session(self, *, cwd: str = ".", env: Mapping[str, str] | None = None) -> Session:
        """A shell that keeps its state between commands. It and ``spawn`` share ``MAX_HELD`` places."""
        body = agent.pack(check_path(cwd, allow_workdir=True), *_pairs(env))
        op = await self._hold()
        session = Session(self, op)
        released = self._release(op)

        def on_event(fields: Fields) -> None:
            session.on_event(fields)
            released()

        self._events[op] = on_event
        try:
            await self._load(agent_streams)
            await self.ask(agent_streams.SESSION, body, op=op)
        except BaseException:
            released()
            raise
        return session

    async def spawn(
        self,
        command: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        tty: tuple[int, int] | None = None,
    ) -> Job:
        """Start a program whose output is read as it comes; ``tty`` is the rows and columns of a terminal for it.

        Without ``timeout_s`` it runs until it ends, is killed, or the box is closed. What it started ends with it.
        """
        argv = check_argv(command)
        size = f"{tty[0]}x{tty[1]}" if tty else ""
        folder = check_path(cwd, allow_workdir=True)
        body = agent.pack(int((timeout_s or 0) * 1e6), len(argv), folder, size, *argv, *_pairs(env))
        op = await self._hold()
        released = self._release(op)
        job = Job(self, op)
        self._events[op] = job.on_event
        try:
            await self._load(agent_streams)
            end = asyncio.create_task(self._end_of_job(op, body))
        except BaseException:
            released()
            raise
        job.watch(end)
        end.add_done_callback(lambda _: released())
        either: set[asyncio.Future[Any]] = {end, job.started}
        await asyncio.wait(either, timeout=START_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
        if not job.started.done() and not end.done():
            self._fail("the agent did not start a job")
        if not job.started.done():
            # Raises why it could not be started.
            await end
        return job

    async def _end_of_job(self, op: int, body: bytes) -> ExecResult:
        before = self._hits() if self._hits else None
        fields = await self.ask(agent_streams.SPAWN, body, None, op=op)
        return _result(fields, before, self._hits() if self._hits else None)

    async def read(self, path: str, *, max_bytes: int = 1 << 20, offset: int | None = None) -> bytes:
        """Content of a regular file. A symbolic link anywhere in the path is an ``OSError`` (ELOOP or ENOTDIR).

        With an ``offset``, up to ``max_bytes`` from there, however long the file is.
        """
        more = () if offset is None else (offset,)
        (data,) = await self._file_call(agent.READ, path, max_bytes, *more)
        return data

    async def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, atomically, with its parent directories. A full disk is an ``OSError``."""
        self.spoiled = self.spoiled or "a file was written"
        await self._file_call(agent.WRITE, path, data)

    async def list(self, path: str = ".") -> list[str]:
        """Regular files below a directory, relative to the workdir, sorted. ``ValueError`` above 100,000 entries."""
        return sorted(_text(name) for name in await self._file_call(agent.LIST, path))

    async def entries(self, path: str = ".") -> Sequence[Entry]:
        """Everything below a directory with kind, size, permissions and time, sorted by path."""
        rows = iter(await self._file_call(agent.LIST, path, 1))
        return [_entry(*row) for row in zip(rows, rows, rows, rows, strict=True)]

    async def upload(
        self,
        files: Mapping[str, bytes] | bytes,
        path: str = ".",
        *,
        max_entries: int = MAX_ENTRIES,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        """Write the files of a mapping or an uncompressed tar archive below a directory.

        All is checked before anything is written: a link, a device, a sparse or setuid file, an absolute name or
        ``..`` is a ``ValueError``, as is exceeding a cap. Each file is replaced atomically; an ``OSError``, such as a
        full disk, may leave some of them written.
        """
        prefix = check_path(path, allow_workdir=True)
        found = read_files(files, max_entries=max_entries, max_bytes=max_bytes)
        targets = [check_path(f"{prefix}/{check_path(file.path)}") for file in found]
        self.spoiled = self.spoiled or "a file was written"
        for start in range(0, len(found), WRITES_AT_ONCE):
            batch = list(zip(targets, found, strict=True))[start : start + WRITES_AT_ONCE]
            await asyncio.gather(*(self._write(target, file) for target, file in batch))

    async def _write(self, target: str, file: File) -> None:
        await self._file_call(agent.WRITE, target, file.data, *((b"x",) if file.executable else ()))

    async def download(
        self, path: str = ".", *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES
    ) -> Mapping[str, bytes]:
        """The regular files below a directory, or one file, by path relative to the workdir.

        Links and everything else that is no regular file are left out, except that a ``path`` with a link in it is an
        ``OSError``. ``ValueError`` above a cap, which holds for what is read, whatever sizes the files claim.
        """
        relative = check_path(path, allow_workdir=True)
        pieces: dict[str, bytearray] = {}

        def on_event(fields: Fields) -> None:
            pieces.setdefault(_text(fields[0]), bytearray()).extend(fields[1])

        op = next(self._ops)
        self._events[op] = on_event
        try:
            await self.ask(agent.DOWNLOAD, agent.pack(relative, max_entries, max_bytes), op=op)
        finally:
            del self._events[op]
        return {name: bytes(data) for name, data in pieces.items()}

    async def download_tar(
        self, path: str = ".", *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES
    ) -> bytes:
        """The same as a tar archive, with names relative to the workdir."""
        return write_tar(await self.download(path, max_entries=max_entries, max_bytes=max_bytes))

    async def warm_up(self) -> None:
        """Start what ``call`` needs, so that the first call is as quick as the others. ``SandboxError`` if it fails."""
        result = await self.call("")
        if not result.ok or self.spoiled:
            raise SandboxError(f"the box cannot run Python: {result}, {self.spoiled}")

    async def end_commands(self) -> None:
        """Kill what is running. Each pending ``exec`` returns with the status CANCELLED."""
        for op in list(self._pending):
            await self._send(agent.HEADER.pack(op, agent.CANCEL, 0))

    def close(self) -> None:
        """Stop talking to the box; what is pending raises ``SandboxLost``."""
        self._fail("the box was closed")
        if self._pump:
            self._pump.cancel()
        self._channel.close()

    async def _file_call(self, kind: int, path: str, *more: bytes | int) -> Fields:
        relative = check_path(path, allow_workdir=kind == agent.LIST)
        return await self.ask(kind, agent.pack(relative, *more))

    async def _load(self, part: ModuleType) -> None:
        """Send a part of the agent that it does not start with."""
        if part.__name__ in self._parts:
            return
        # Marked first: whoever comes next may send at once, since the agent takes one frame after the other.
        self._parts.add(part.__name__)
        try:
            await self.ask(agent.EXTEND, agent.pack(part.__name__, *_compiled(part)))
        except BaseException:
            self._parts.discard(part.__name__)
            raise

    async def _hold(self) -> int:
        """Take a place for a session or a job, whose operation this is."""
        if self._held >= MAX_HELD:
            raise ValueError(f"the box has {self._held} open sessions and jobs; close one first")
        self._held += 1
        self.spoiled = self.spoiled or "a session or a job ran in it"
        try:
            await self._slots.acquire()
        except BaseException:
            self._held -= 1
            raise
        return next(self._ops)

    def _release(self, op: int) -> Callable[[], None]:
        """What gives the place back, once."""

        def release() -> None:
            if self._events.pop(op, None):
                self._held -= 1
                self._slots.release()

        return release

    async def signal(self, op: int, number: int) -> None:
        """For sessions and jobs: a signal to its process group, or SIGKILL to all it has. Ended is not an error."""
        try:
            await self.ask(agent_streams.SIGNAL, agent.pack(op, number))
        except ProcessLookupError:
            return

    async def tell(self, kind: int, body: bytes) -> None:
        """Send what has no answer."""
        if not self._lost:
            await self._send(agent.HEADER.pack(0, kind, len(body)) + body)

    async def command(self, kind: int, body: bytes, deadline_s: float) -> tuple[ExecResult, Fields]:
        """Ask for something that ends as a command does, and can be cancelled."""
        before = self._hits() if self._hits else None
        fields = await self.ask(kind, body, deadline_s, cancels=True)
        after = self._hits() if self._hits else None
        return _result(fields, before, after), fields

    async def ask(
        self,
        kind: int,
        body: bytes,
        deadline_s: float | None = FILE_DEADLINE_S,
        *,
        op: int | None = None,
        cancels: bool = False,
    ) -> Fields:
        """Send a request and wait for its reply, for ever without a deadline. The session's and job's way in, too.

        Raises what the agent replied (``OSError``, ``ValueError``) or ``SandboxLost``.
        """
        op = next(self._ops) if op is None else op
        reply: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        if self._lost:
            raise SandboxLost(self._lost)
        self._pending[op] = reply
        try:
            await self._send(agent.HEADER.pack(op, kind, len(body)) + body)
            return await self._await(op, reply, deadline_s)
        except asyncio.CancelledError:
            # Only when the agent has answered is everything dead and the uid free again.
            if cancels and not self._lost:
                await self._send(agent.HEADER.pack(op, agent.CANCEL, 0))
                await asyncio.wait({reply}, timeout=REPLY_GRACE_S)
            raise
        finally:
            self._pending.pop(op, None)

    async def _await(self, op: int, reply: asyncio.Future[Fields], deadline_s: float | None) -> Fields:
        # asyncio.wait, since a cancelled wait_for would cancel the reply that cancelling still needs.
        done, _ = await asyncio.wait({reply}, timeout=deadline_s)
        if not done:
            self._fail(f"the agent did not answer operation {op} within {deadline_s:.0f} s")
            self.kill()
        return reply.result()

    async def _send(self, data: bytes) -> None:
        try:
            # One after the other, since a channel may send a large frame in pieces.
            async with self._sending:
                await asyncio.wait_for(self._channel.send(data), FILE_DEADLINE_S)
        except (OSError, TimeoutError) as error:
            self._fail(f"the channel to the agent broke: {error!r}")
            raise SandboxLost(self._lost) from error

    async def _receive_replies(self) -> None:
        buffer = bytearray()
        try:
            while data := await self._channel.receive():
                buffer += data
                while frame := _take_frame(buffer):
                    self._resolve(*frame)
        except (OSError, ValueError) as error:
            self._fail(f"the channel to the agent broke: {error!r}")
        self._fail("the agent is gone")

    def _resolve(self, op: int, kind: int, body: bytes) -> None:
        if kind == agent.EVENT:
            if op in self._events:
                self._events[op](agent.unpack(body))
            return
        reply = self._pending.get(op)
        if reply is None or reply.done():
            return
        if kind == agent.FAILED:
            code, message = agent.unpack(body)
            reply.set_exception(_error(int(code), message.decode("utf-8", "replace")))
        else:
            reply.set_result(agent.unpack(body))

    def _fail(self, reason: str) -> None:
        self._lost = self._lost or reason
        for reply in self._pending.values():
            if not reply.done():
                reply.set_exception(SandboxLost(self._lost))
                # Retrieved here, since nobody may be waiting any more.
                reply.exception()


def _check_limits(timeout_s: float, max_output: int) -> None:
    if timeout_s <= 0 or max_output < 0:
        raise ValueError(f"timeout_s={timeout_s}, max_output={max_output}: expected a time > 0 and a size >= 0")


def _pairs(env: Mapping[str, str] | None) -> list[str]:
    return [f"{name}={value}" for name, value in check_env({**BASE_ENV, **(env or {})}).items()]


def command_limits(spec: SandboxSpec) -> dict[int, int]:
    """Resource limits of each command on every kind of box."""
    return {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 256, resource.RLIMIT_FSIZE: spec.disk_mb << 20}


def check_argv(command: str | Sequence[str]) -> list[str]:
    """The argument vector of a command. ``ValueError`` when it is empty or contains NUL."""
    argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    if not argv or not argv[0] or any("\0" in argument for argument in argv):
        raise ValueError(f"command = {command!r}: expected a string or a non-empty argument list, without NUL")
    return argv


def check_env(env: Mapping[str, str]) -> Mapping[str, str]:
    """The same environment. ``ValueError`` for a name or a value that no process can have."""
    for name, value in env.items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"env[{name!r}] = {value!r}: expected a name without '=', and no NUL in either")
    return env


def check_path(path: str, *, allow_workdir: bool = False) -> str:
    """A path relative to the workdir. ``ValueError`` when it is absolute, climbs, or names no file."""
    pure = PurePosixPath(path)
    bad = pure.is_absolute() or ".." in pure.parts or "\0" in path or any(len(part) > 255 for part in pure.parts)
    if bad or (not pure.parts and not allow_workdir):
        raise ValueError(f"path = {path!r}: expected a path relative to the workdir, without '..' and NUL")
    return str(pure)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _entry(path: bytes, mode: bytes, size: bytes, modified_ns: bytes) -> Entry:
    bits = int(mode)
    kinds = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "directory"), (stat.S_ISLNK, "link"))
    return Entry(
        path=_text(path),
        kind=next((kind for test, kind in kinds if test(bits)), "other"),
        size=int(size),
        mode=stat.S_IMODE(bits),
        modified_s=int(modified_ns) / 1e9,
    )


def _error(code: int, message: str) -> OSError | ValueError:
    return OSError(code, message) if code else ValueError(message)


def _take_frame(buffer: bytearray) -> tuple[int, int, bytes] | None:
    if len(buffer) < agent.HEADER.size:
        return None
    op, kind, size = agent.HEADER.unpack_from(buffer)
    end = agent.HEADER.size + size
    if len(buffer) < end:
        return None
    body = bytes(buffer[agent.HEADER.size : end])
    del buffer[:end]
    return op, kind, body


def _result(fields: list[bytes], before: Hits | None, after: Hits | None) -> ExecResult:
    status = ExecStatus(fields[0].decode())
    code, signal, dropped, wall_us, disk_full, cpu_us, rss_kib = (int(fields[i]) for i in (1, 2, 5, 6, 7, 8, 9))
    failed = signal != 0 or code != 0
    if status in (ExecStatus.EXITED, ExecStatus.SIGNALED) and failed:
        if before and after and after.oom_kills > before.oom_kills:
            status = ExecStatus.OOM
        elif before and after and after.refused_forks > before.refused_forks:
            status = ExecStatus.PIDS_LIMIT
        elif disk_full:
            status = ExecStatus.DISK_FULL
    return ExecResult(
        status=status,
        exit_code=code if status is ExecStatus.EXITED else None,
        signal=signal or None,
        stdout=fields[3],
        stderr=fields[4],
        truncated_bytes=dropped,
        wall_s=wall_us / 1e6,
        cpu_s=cpu_us / 1e6 if cpu_us >= 0 else None,
        max_rss_bytes=rss_kib << 10 if rss_kib >= 0 else None,
    )


@functools.cache
def _compiled(part: ModuleType) -> tuple[bytes, bytes, bytes]:
    """A program for the box: compiled, for one with the host's version of Python, and as source."""
    assert part.__file__ is not None
    source = Path(part.__file__).read_bytes()
    return MAGIC_NUMBER, marshal.dumps(compile(source, part.__name__, "exec")), source


@functools.cache
def _program() -> bytes:
    """The agent, for ``BOOTSTRAP``."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in _compiled(agent))


async def write_files(box: AgentSandbox) -> None:
    """Put ``spec.files`` in place. A file that cannot be written makes the box useless: ``SandboxError``."""
    for path, data in box.spec.files.items():
        try:
            await box.write(path, data)
        except OSError as error:
            raise SandboxError(f"SandboxSpec.files[{path!r}] could not be written: {error}") from error
