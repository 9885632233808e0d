"""The host's side of the agent protocol: one ``AgentSandbox`` per open box, whatever the box is made of."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import marshal
import math
import os
import resource
import socket
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import MAGIC_NUMBER
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Self

from posttrain.errors import SandboxError, SandboxLost, Unsupported
from posttrain.network import parse
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox import agent, agent_egress, agent_files, agent_python, agent_streams, layers
from sandbox.cgroups import Hits
from sandbox.egress import Connection, Egress, NetLimits
from sandbox.layers import Snapshot
from sandbox.streams import Job, Session
from sandbox.transfer import MAX_BYTES, MAX_ENTRIES, Entry, File, read_files, write_tar

AT_ONCE = 8
"""Commands that run at the same time in one box; more wait their turn."""
SLOTS = AT_ONCE + 1
"""Payload uids of a box: one for each of them, and one on which nothing runs, for the fork server to hide behind."""
MAX_USERS = 16
"""Named users of a box."""
IDS = SLOTS + MAX_USERS
"""Uids and gids of a box, in one row: those of its slots, then those of its users."""
ROOT = ("root", "toor")
"""Names that promise what no payload gets."""
MAX_HELD = AT_ONCE - 2
"""Sessions and jobs open at the same time, which leaves room for commands."""
WRITES_AT_ONCE = 32
"""Files of an upload on their way at the same time."""
START_DEADLINE_S = 60.0
REPLY_GRACE_S = 20.0
"""How long past a command's own limit the host waits for the agent before it calls the box lost."""
FILE_DEADLINE_S = 30.0
SNAPSHOT_DEADLINE_S = 300.0
BATCH_BYTES, BATCH_ENTRIES = 1 << 20, 1000
"""Of a layer, what is sent at a time."""
LAYER_KINDS = {
    "file": agent_files.FILE,
    "directory": agent_files.FOLDER,
    "link": agent_files.LINK,
    "user": agent_files.USER,
}
EXECUTABLE = 0o775
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
os.set_blocking(0, True), os.set_blocking(1, True)
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
"""What the box's Python runs first: it takes the agent's program from the channel, so no image contains it.

gVisor hands out a socket that does not block, and the agent relies on one that does.
"""
AGENT_ARGV = ("/usr/bin/python3", "-I", "-S", "-c", BOOTSTRAP)


Fields = list[bytes]
"""What a reply holds; an alias, since ``AgentSandbox.list`` hides the builtin inside its class."""


class Channel:
    """A socket whose other end is the agent's standard input and output."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, connected: socket.socket) -> Self:
        """A channel that owns this socket."""
        return cls(*await asyncio.open_unix_connection(sock=connected, limit=1 << 20))

    async def receive(self) -> bytes:
        """The next piece; empty at the end."""
        return await self._reader.read(1 << 18)

    async def send(self, data: bytes) -> None:
        """Take all of it at once, however large, so that nobody who is cancelled leaves half a frame; wait for room."""
        self._writer.write(data)
        if self._writer.transport.get_write_buffer_size():
            async with asyncio.timeout(FILE_DEADLINE_S):
                await self._writer.drain()
        elif self._writer.is_closing():
            raise BrokenPipeError(errno.EPIPE, "the channel is closed")

    def close(self) -> None:
        self._writer.close()


class AgentSandbox:
    """An open box. Made by a substrate, which also removes it."""

    def __init__(
        self,
        channel: Channel,
        spec: SandboxSpec,
        *,
        hits: Callable[[], Hits] | None,
        kill: Callable[[], None],
        freeze: Callable[[bool], None] | None = None,
    ) -> None:
        self.spec = spec
        self._channel = channel
        self._hits = hits
        self._counted: dict[str, tuple[Hits | None, Hits | None]] = {}
        """Kernel counters from before and after each named operation, until it is acknowledged."""
        self._kill = kill
        self._freeze = freeze
        self._changing = asyncio.Lock()
        """Held while the box is paused or resumed."""
        self.paused = False
        self._awake = asyncio.Event()
        """Set while it is not paused, and once it is lost."""
        self._awake.set()
        self._paused_at = self._slept_s = 0.0
        self._acknowledged: list[str] = []
        """Names that the agent is told to forget with the next one: a frame to itself would wake it for nothing."""
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._held = 0
        self._ops = itertools.count(1)
        self._pending: dict[int, asyncio.Future[Fields]] = {}
        self._events: dict[int, Callable[[Fields], None]] = {}
        self._sessions: dict[str, Session] = {}
        self._jobs: dict[str, Job] = {}
        """By the name of the operation that opened them, for as long as the box lives."""
        self._parts: set[str] = set()
        self._calling = asyncio.Lock()
        self._egress: Egress | None = None
        self._setting_net = asyncio.Lock()
        self._lost = ""
        self._pump: asyncio.Task[None] | None = None
        self.spoiled = ""
        """Why no stranger may get this box after its user; empty while it has only had calls that left nothing."""
        self.num_calls = 0

    async def start(self, *, uid: int, limits: Mapping[int, int], group: str = "") -> None:
        """Send the agent's program and wait until it answers.

        ``uid`` is the first of ``IDS`` payload uids (and the gid); ``limits`` are resource limits of each command.
        ``group`` is the control group in the box that counts what the host cannot.
        """
        ready: asyncio.Future[Fields] = asyncio.get_running_loop().create_future()
        self._pending[0] = ready
        self._pump = asyncio.create_task(self._receive_replies())
        rlimits = [f"{limit}={value}" for limit, value in limits.items()]
        config = agent.pack(self.spec.workdir, uid, uid, SLOTS, MAX_USERS, group, *rlimits)
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
        user: str | None = None,
        op_id: str = "",
    ) -> ExecResult:
        """Run argv, or a string through ``sh -c``. On return every process the command started is dead.

        ``max_output`` bounds each stream: its head and its tail are kept, with one line saying how much is missing
        between them. A command that goes on to print 8 MiB more is killed (``OUTPUT_LIMIT``).

        ``cwd`` is relative to the workdir and reached without following links (``OSError`` as for a file).

        A ``user`` is a name (``[a-z_][a-z0-9_-]*``, at most 32 letters) that has the same uid in every command, session
        and job of the box, and in boxes made from its snapshots; HOME is ``.home-USER`` in the workdir. Nobody else
        reads what it keeps to itself (mode 0600 or 0700) or signals its processes; by default others may read its
        files. Commands of one user may run at the same time, and the end of one leaves the others alone; they can
        signal each other, and where processes are bounded per command they share that bound. Without a user each
        command has a uid of its own. ``ValueError`` for a bad name, for ``root``, and for more than ``MAX_USERS`` names
        in one box.

        Whatever takes an ``op_id``, here and below, happens once: a second request of that name gets what the first
        came to, which the box keeps until ``acknowledge``.
        """
        limit_s = self.spec.timeout_s if timeout_s is None else timeout_s
        argv = check_argv(command)
        _check_limits(limit_s, max_output)
        name = check_user(user)
        pairs = self._pairs(env, name)
        folder = check_path(cwd, allow_workdir=True)
        body = agent.pack(int(limit_s * 1e6), max_output, len(argv), stdin, folder, name, *argv, *pairs)
        self.spoiled = self.spoiled or "a command ran in it"
        async with self._slots:
            return (await self.command(agent.EXEC, body, limit_s + REPLY_GRACE_S, op_id=op_id))[0]

    async def result_of(self, op_id: str) -> Any:
        """What the operation of this name gave, waiting while it runs; raises what it raised.

        None for one that gives nothing, its own name for one that opened a session or a job, which ``handle`` finds.
        ``KeyError`` for a name that the box does not know, or has forgotten.
        """
        if op_id in self._sessions or op_id in self._jobs:
            return op_id
        if op_id in self._acknowledged:
            raise KeyError(op_id)
        try:
            fields = await self.ask(agent.RESULT_OF, agent.pack(op_id), None)
        except OSError as error:
            if error.errno == agent.UNKNOWN_NAME:
                raise KeyError(op_id) from error
            raise
        before, after = self._counted.get(op_id, (None, None))
        return _result(fields, before, after or self._count()) if fields else None

    async def acknowledge(self, op_id: str) -> None:
        """Let the box forget a result, of which it is told with the next named request. Unknown names are ignored."""
        self._counted.pop(op_id, None)
        self._acknowledged.append(op_id)

    def handle(self, op_id: str) -> Session | Job:
        """The session or the job that the operation of this name opened. ``KeyError`` when the box has none."""
        return self._sessions[op_id] if op_id in self._sessions else self._jobs[op_id]

    async def pause(self) -> None:
        """Stop everything in the box where it is. Whatever is asked of it next resumes it.

        Time that passes meanwhile counts for no limit. ``Unsupported`` where there is no freezer.
        """
        if self._freeze is None:
            raise Unsupported("this box cannot be paused: there is no freezer control group that may be written")
        async with self._changing:
            if self._lost:
                raise SandboxLost(self._lost)
            if self.paused:
                return
            self.paused, self._paused_at = True, time.monotonic()
            self._awake.clear()
            try:
                await _to_the_end(self._freeze, True)
            except BaseException:
                self._thaw()
                self._awake.set()
                raise

    async def resume(self) -> None:
        """Let the box go on. Nothing happens when it is not paused."""
        if not self.paused or self._freeze is None:
            return
        async with self._changing:
            if not self.paused:
                return
            # Told first, so that the agent knows it before it looks at any deadline.
            slept_s = time.monotonic() - self._paused_at
            body = agent.pack(int(slept_s * 1e6))
            await self._send(agent.HEADER.pack(0, agent.SLEPT, len(body)) + body)
            try:
                await _to_the_end(self._freeze, False)
            finally:
                self._slept_s += slept_s
                self.paused = False
                self._awake.set()

    def kill(self) -> None:
        """Kill the box now, from outside. What is pending raises ``SandboxLost``."""
        self._thaw()
        self._kill()

    def _thaw(self) -> None:
        """Before it is killed: a frozen process may be out of reach of every signal."""
        if self._freeze and self.paused:
            with contextlib.suppress(SandboxError):
                self._freeze(False)
            self.paused = False

    async def snapshot(self) -> Snapshot:
        """Keep the content of the workdir as a layer. ``SandboxSpec(image=snapshot.image)`` begins with it.

        Files that are written meanwhile are kept as long as they were when they were read. What is no directory,
        regular file or link, and a file with holes, is a ``ValueError``; what may not be read is an ``OSError``.
        """
        await self._load(agent_files)
        op = next(self._ops)
        with layers.Draft() as draft:
            try:
                self._events[op] = functools.partial(_draw, draft)
                # Where holes cannot be seen, as in gVisor, the size of the disk bounds what they are filled with.
                body = agent.pack(layers.MAX_ENTRIES, self.spec.disk_mb << 20)
                await self.ask(agent_files.SCAN, body, SNAPSHOT_DEADLINE_S, op=op)
            finally:
                del self._events[op]
            kept = await asyncio.to_thread(draft.keep)
        return replace(kept, image=layers.commit(self.spec.image, kept.digest))

    async def lay(self, digest: str) -> None:
        """Put the content of a layer in place; what is there stays, unless the layer has an entry of that name.

        ``SandboxError`` when there is no such layer, ``OSError`` when it does not fit, as on a full disk.
        """
        self.spoiled = self.spoiled or "a layer was laid into it"
        await self._load(agent_files)
        batch: list[bytes] = []
        closed: list[bytes] = []
        # What a directory needs to be filled: by its owner, and by others where there are several.
        filling = 0o700
        file = await asyncio.to_thread(layers.opened, digest)
        for node, pieces in layers.members(file):
            kind = LAYER_KINDS[node.kind]
            filling = 0o777 if node.kind == "user" else filling
            # A directory stays open to be filled, and gets its own permissions at the end.
            mode = node.mode | filling if node.kind == "directory" else node.mode
            if mode != node.mode:
                closed.insert(0, agent.pack(kind, node.path, node.owner, node.mode, 0, 0, 0, b""))
            offset = 0
            for piece in pieces if node.size else [os.fsencode(node.target)]:
                batch.append(agent.pack(kind, node.path, node.owner, mode, node.modified_ns, node.size, offset, piece))
                offset += len(piece)
                if sum(map(len, batch)) > BATCH_BYTES or len(batch) >= BATCH_ENTRIES:
                    await self.ask(agent_files.LAY, b"".join(batch))
                    batch = []
        await self.ask(agent_files.LAY, b"".join((*batch, *closed)))

    async def call(
        self,
        source: str,
        *,
        args: Sequence[str] = (),
        stdin: bytes = b"",
        timeout_s: float | None = None,
        max_output: int = 1 << 20,
        env: Mapping[str, str] | None = None,
        op_id: str = "",
    ) -> ExecResult:
        """Run a Python program as ``python3 -I -c`` would, forked from a started interpreter. One at a time.

        It runs in an empty directory of its own. On return its processes are dead and what it wrote is deleted.
        """
        limit_s = self.spec.timeout_s if timeout_s is None else timeout_s
        _check_limits(limit_s, max_output)
        program = agent.pack(source, len(args), *args, *self._pairs(env))
        body = agent.pack(int(limit_s * 1e6), max_output, stdin, program)
        async with self._calling, self._slots:
            spoiled, self.spoiled = self.spoiled, self.spoiled or "a call did not return"
            self.num_calls += 1
            await self._load(agent_python)
            result, fields = await self.command(agent_python.CALL, body, limit_s + REPLY_GRACE_S, op_id=op_id)
        ended = result.status in (ExecStatus.EXITED, ExecStatus.SIGNALED)
        self.spoiled = spoiled or fields[10].decode("utf-8", "replace") or ("" if ended else result.status.value)
        return result

    async def session(
        self, *, cwd: str = ".", env: Mapping[str, str] | None = None, user: str | None = None, op_id: str = ""
    ) -> Session:
        """A shell that keeps its state between commands. It and ``spawn`` share ``MAX_HELD`` places."""
        if op_id in self._sessions:
            return self._sessions[op_id]
        name = check_user(user)
        body = agent.pack(check_path(cwd, allow_workdir=True), name, *self._pairs(env, name))
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
        if op_id:
            self._sessions[op_id] = session
        return session

    async def spawn(
        self,
        command: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        user: str | None = None,
        tty: tuple[int, int] | None = None,
        op_id: str = "",
    ) -> Job:
        """Start a program whose output is read as it comes; ``tty`` is the rows and columns of a terminal for it.

        Without ``timeout_s`` it runs until it ends, is killed, or the box is closed. What it started ends with it.
        """
        if op_id in self._jobs:
            return self._jobs[op_id]
        argv = check_argv(command)
        size = f"{tty[0]}x{tty[1]}" if tty else ""
        folder, name = check_path(cwd, allow_workdir=True), check_user(user)
        body = agent.pack(int((timeout_s or 0) * 1e6), len(argv), folder, name, size, *argv, *self._pairs(env, name))
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
        if op_id:
            self._jobs[op_id] = job
        return job

    async def _end_of_job(self, op: int, body: bytes) -> ExecResult:
        before = self._count()
        fields = await self.ask(agent_streams.SPAWN, body, None, op=op)
        return _result(fields, before, self._count())

    async def read(self, path: str, *, max_bytes: int = 1 << 20, offset: int | None = None) -> bytes:
        """Content of a regular file. A symbolic link anywhere in the path is an ``OSError`` (ELOOP or ENOTDIR).

        With an ``offset``, up to ``max_bytes`` from there, however long the file is.
        """
        more = () if offset is None else (offset,)
        (data,) = await self._file_call(agent.READ, path, max_bytes, *more)
        return data

    async def write(self, path: str, data: bytes, *, mode: int | None = None, op_id: str = "") -> None:
        """Create or replace a file, atomically, with its parent directories. A full disk is an ``OSError``.

        ``mode`` are its permission bits; by default, those of a file that a command creates.
        """
        if mode is not None and not 0 <= mode <= 0o777:
            raise ValueError(f"mode = {mode:o}: expected permission bits, 0 to 777")
        self.spoiled = self.spoiled or "a file was written"
        relative = check_path(path)
        await self.ask(agent.WRITE, agent.pack(relative, data, *(() if mode is None else (mode,))), op_id=op_id)

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
        op_id: str = "",
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
        pairs = list(zip(targets, found, strict=True))
        for start in range(0, len(pairs) - 1, WRITES_AT_ONCE):
            await asyncio.gather(*(self._put(*pair) for pair in pairs[:-1][start : start + WRITES_AT_ONCE]))
        # The last one has the name: when the box knows that one, all are written.
        for pair in pairs[-1:]:
            await self._put(*pair, op_id=op_id)

    async def _put(self, target: str, file: File, *, op_id: str = "") -> None:
        await self.write(target, file.data, mode=EXECUTABLE if file.executable else None, op_id=op_id)

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

    async def set_net(self, allow: Sequence[str], *, limits: NetLimits | None = None) -> None:
        """Let commands reach these destinations and no other; ``()`` turns the network off.

        Entries are those of ``SandboxSpec.network``. Commands, sessions and jobs that start from now on find the proxy
        in their environment (HTTPS_PROXY and its like). Connections the new list does not allow are closed.
        """
        allowed = parse(allow, field="allow")
        async with self._setting_net:
            await self.resume()
            if self._egress is None:
                if not allowed.entries:
                    return
                self._egress = await self._open_egress()
            await self._egress.set(allowed, limits or NetLimits())

    async def _open_egress(self) -> Egress:
        self.spoiled = self.spoiled or "it had a network"
        egress = Egress(self._carry)
        await self._load(agent_egress)
        op = next(self._ops)
        self._events[op] = egress.on_event
        egress.port = int((await self.ask(agent_egress.LISTEN, b"", op=op))[0])
        return egress

    async def _carry(self, body: bytes) -> None:
        """Send what the host has for a connection of the box. Traffic does not wake a box that is paused."""
        await self._awake.wait()
        if not self._lost:
            await self._send(agent.HEADER.pack(0, agent_egress.CARRY, len(body)) + body)

    def connections(self) -> Sequence[Connection]:
        """What the box has reached or tried to reach, oldest first: the last ``egress.MAX_LOGGED``."""
        return self._egress.connections() if self._egress else ()

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
        self._thaw()
        self._fail("the box was closed")
        if self._pump:
            self._pump.cancel()
        self._channel.close()

    def _pairs(self, env: Mapping[str, str] | None, user: str = "") -> Sequence[str]:
        proxy = self._egress.environment() if self._egress else {}
        home = f"{self.spec.workdir}/{os.fsdecode(agent.HOME)}{user}"
        own = {"HOME": home, "USER": user, "LOGNAME": user} if user else {}
        return [f"{name}={value}" for name, value in check_env({**BASE_ENV, **own, **proxy, **(env or {})}).items()]

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

    async def signal(self, op: int, number: int, *, op_id: str = "") -> None:
        """For sessions and jobs: a signal to its process group, or SIGKILL to all it has. Ended is not an error."""
        try:
            await self.ask(agent_streams.SIGNAL, agent.pack(op, number), op_id=op_id)
        except ProcessLookupError:
            return

    async def tell(self, kind: int, body: bytes) -> None:
        """Send what has no answer."""
        if not self._lost:
            await self.resume()
            await self._send(agent.HEADER.pack(0, kind, len(body)) + body)

    async def command(self, kind: int, body: bytes, deadline_s: float, *, op_id: str = "") -> tuple[ExecResult, Fields]:
        """Ask for something that ends as a command does, and can be cancelled."""
        before = self._counted.get(op_id, (None, None))[0] or self._count()
        if op_id:
            self._counted[op_id] = before, None
        fields = await self.ask(kind, body, deadline_s, cancels=True, op_id=op_id)
        after = self._counted.get(op_id, (None, None))[1] or self._count()
        if op_id:
            self._counted[op_id] = before, after
        return _result(fields, before, after), fields

    def _count(self) -> Hits | None:
        return self._hits() if self._hits else None

    async def ask(
        self,
        kind: int,
        body: bytes,
        deadline_s: float | None = FILE_DEADLINE_S,
        *,
        op: int | None = None,
        op_id: str = "",
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
            await self.resume()
            if op_id:
                acknowledged, self._acknowledged = self._acknowledged, []
                kind, body = agent.NAMED, agent.pack(op_id, kind, body, *acknowledged)
            await self._send(agent.HEADER.pack(op, kind, len(body)) + body)
            return await self._await(op, reply, deadline_s)
        except asyncio.CancelledError:
            # Only when the agent has answered is everything dead and the uid free again.
            if cancels and not self._lost:
                await self.resume()
                await self._send(agent.HEADER.pack(op, agent.CANCEL, 0))
                await asyncio.wait({reply}, timeout=REPLY_GRACE_S)
            raise
        finally:
            self._pending.pop(op, None)

    async def _await(self, op: int, reply: asyncio.Future[Fields], deadline_s: float | None) -> Fields:
        until = math.inf if deadline_s is None else self._awake_s() + deadline_s
        while not reply.done() and (left := until - self._awake_s()) > 0:
            # asyncio.wait, since a cancelled wait_for would cancel the reply that cancelling still needs.
            await asyncio.wait({reply}, timeout=None if deadline_s is None else left)
            if not reply.done():
                await self._awake.wait()
        if not reply.done():
            self._fail(f"the agent did not answer operation {op} within {deadline_s:.0f} s")
            # It may wait for processes to end, or for a daemon.
            await asyncio.to_thread(self.kill)
        return reply.result()

    def _awake_s(self) -> float:
        """A clock that stands still while the box is paused."""
        return (self._paused_at if self.paused else time.monotonic()) - self._slept_s

    async def _send(self, data: bytes) -> None:
        try:
            await self._channel.send(data)
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
        self._awake.set()
        self._awake.set()
        if self._egress:
            self._egress.close()
        for reply in self._pending.values():
            if not reply.done():
                reply.set_exception(SandboxLost(self._lost))
                # Retrieved here, since nobody may be waiting any more.
                reply.exception()


async def _to_the_end(function: Callable[[bool], None], argument: bool) -> None:
    """Run something in a thread. Cancelling waits for its end, too."""
    task = asyncio.ensure_future(asyncio.to_thread(function, argument))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _check_limits(timeout_s: float, max_output: int) -> None:
    if timeout_s <= 0 or max_output < 0:
        raise ValueError(f"timeout_s={timeout_s}, max_output={max_output}: expected a time > 0 and a size >= 0")


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


def check_user(user: str | None) -> str:
    """The name of a user; empty for None. ``ValueError`` for what is no name, and for what promises root."""
    if user is None:
        return ""
    if user in ROOT:
        raise ValueError(
            f"user = {user!r}: nothing that runs in a box is root; expected another name, or None for a fresh uid"
        )
    if not layers.USER.fullmatch(user):
        raise ValueError(
            f"user = {user!r}: expected a name of at most 32 small letters, digits, '_' and '-' that begins with a "
            "letter or '_', or None for a fresh uid"
        )
    return user


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


def bare(spec: SandboxSpec) -> SandboxSpec:
    """The box to start for a spec: what ``prepare`` adds is left out."""
    return replace(spec, image=layers.split(spec.image)[0], files={}, network=())


async def prepare(box: AgentSandbox) -> None:
    """Put the layers of ``spec.image``, then ``spec.files`` in place, and let the box reach ``spec.network``.

    ``SandboxError`` when that cannot be done.
    """
    for digest in layers.split(box.spec.image)[1]:
        try:
            await box.lay(digest)
        except OSError as error:
            raise SandboxError(f"SandboxSpec.image = {box.spec.image!r}: a layer does not fit: {error}") from error
    for path, data in box.spec.files.items():
        try:
            await box.write(path, data)
        except OSError as error:
            raise SandboxError(f"SandboxSpec.files[{path!r}] could not be written: {error}") from error
    await box.set_net(box.spec.network)


def _draw(draft: layers.Draft, fields: Fields) -> None:
    """Add what the agent has sent of the workdir to a layer."""
    if fields[0] == agent_files.DATA:
        draft.feed(fields[1])
        return
    kind, path, owner, mode, modified_ns, last = fields
    draft.add(
        layers.Node(
            path=_text(path),
            kind=next(name for name, code in LAYER_KINDS.items() if code == kind),
            owner=_text(owner),
            mode=int(mode),
            modified_ns=int(modified_ns),
            size=int(last) if kind == agent_files.FILE else 0,
            target=_text(last) if kind == agent_files.LINK else "",
        )
    )
