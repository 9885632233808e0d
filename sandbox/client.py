"""The host's side of the agent protocol: one ``AgentSandbox`` per open box, whatever the box is made of."""

from __future__ import annotations

import asyncio
import functools
import itertools
import marshal
import resource
from collections.abc import Callable, Mapping, Sequence
from importlib.util import MAGIC_NUMBER
from pathlib import Path, PurePosixPath
from typing import Protocol

from posttrain.errors import SandboxError, SandboxLost
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox import agent
from sandbox.cgroups import Hits

SLOTS = 8
"""Commands that run at the same time in one box; more wait their turn."""
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
        self._slots = asyncio.Semaphore(SLOTS)
        self._ops = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Fields]] = {}
        self._lost = ""
        self._pump: asyncio.Task[None] | None = None

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
    ) -> ExecResult:
        """Run argv, or a string through ``sh -c``. On return every process the command started is dead.

        ``max_output`` bounds each stream: its head and its tail are kept, with one line saying how much is missing
        between them. A command that goes on to print 8 MiB more is killed (``OUTPUT_LIMIT``).
        """
        limit_s = self.spec.timeout_s if timeout_s is None else timeout_s
        argv = check_argv(command)
        if limit_s <= 0 or max_output < 0:
            raise ValueError(f"timeout_s={limit_s}, max_output={max_output}: expected a time > 0 and a size >= 0")
        pairs = [f"{name}={value}" for name, value in check_env({**BASE_ENV, **(env or {})}).items()]
        body = agent.pack(int(limit_s * 1e6), max_output, len(argv), stdin, *argv, *pairs)
        async with self._slots:
            before = self._hits() if self._hits else None
            fields = await self._call(agent.EXEC, body, limit_s + REPLY_GRACE_S)
            after = self._hits() if self._hits else None
        return _result(fields, before, after)

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        """Content of a regular file. A symbolic link anywhere in the path is an ``OSError`` (ELOOP or ENOTDIR)."""
        (data,) = await self._file_call(agent.READ, path, max_bytes)
        return data

    async def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, atomically, with its parent directories. A full disk is an ``OSError``."""
        await self._file_call(agent.WRITE, path, data)

    async def list(self, path: str = ".") -> list[str]:
        """Regular files below a directory, relative to the workdir, sorted. ``ValueError`` above 100,000 files."""
        return sorted(name.decode("utf-8", "surrogateescape") for name in await self._file_call(agent.LIST, path))

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
        return await self._call(kind, agent.pack(relative, *more), FILE_DEADLINE_S)

    async def _call(self, kind: int, body: bytes, deadline_s: float) -> Fields:
        op = next(self._ops)
        reply: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        if self._lost:
            raise SandboxLost(self._lost)
        self._pending[op] = reply
        try:
            await self._send(agent.HEADER.pack(op, kind, len(body)) + body)
            return await self._await(op, reply, deadline_s)
        except asyncio.CancelledError:
            # Only when the agent has answered is everything dead and the uid free again.
            if kind == agent.EXEC and not self._lost:
                await self._send(agent.HEADER.pack(op, agent.CANCEL, 0))
                await asyncio.wait({reply}, timeout=REPLY_GRACE_S)
            raise
        finally:
            self._pending.pop(op, None)

    async def _await(self, op: int, reply: asyncio.Future[Fields], deadline_s: float) -> Fields:
        # asyncio.wait, since a cancelled wait_for would cancel the reply that cancelling still needs.
        done, _ = await asyncio.wait({reply}, timeout=deadline_s)
        if not done:
            self._fail(f"the agent did not answer operation {op} within {deadline_s:.0f} s")
            self.kill()
        return reply.result()

    async def _send(self, data: bytes) -> None:
        try:
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
    code, signal, dropped, wall_us, disk_full = (int(fields[i]) for i in (1, 2, 5, 6, 7))
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
    )


@functools.cache
def _program() -> bytes:
    """The agent for ``BOOTSTRAP``: compiled, for a box with the host's version of Python, and as source."""
    source = Path(agent.__file__).read_bytes()
    code = marshal.dumps(compile(source, "agent", "exec"))
    return b"".join(len(part).to_bytes(4, "big") + part for part in (MAGIC_NUMBER, code, source))


async def write_files(box: AgentSandbox) -> None:
    """Put ``spec.files`` in place. A file that cannot be written makes the box useless: ``SandboxError``."""
    for path, data in box.spec.files.items():
        try:
            await box.write(path, data)
        except OSError as error:
            raise SandboxError(f"SandboxSpec.files[{path!r}] could not be written: {error}") from error
