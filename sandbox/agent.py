"""The program inside every sandbox: it runs commands and touches files on behalf of the host.

The host starts it once per box and talks to it in frames over file descriptors 0 and 1. It needs nothing but the
standard library, and imports little of it, since its start is most of what opening a box costs.

The agent is uid 0 of its box with only SETUID, SETGID and KILL. The payload runs on uids of its own, one per
command that runs at the same time, so that it can neither signal nor trace the agent, nor reach the agent's pipes
through /proc, and so that ending one command (SIGKILL to everything its uid owns) leaves its neighbours alone.
The agent is process 1 of the box: orphans come to it to be reaped, and its death ends the box.

Frame: operation id (u32), kind (u8), body length (u32), body. A body is a sequence of fields, each a u32 length and
that many bytes; numbers are decimal text. Integers are big-endian.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import stat
import struct
import time

HEADER = struct.Struct("!IBI")
LENGTH = struct.Struct("!I")
CONFIG, READY, EXEC, CANCEL, READ, WRITE, LIST, OK, FAILED = range(9)

KILL_DEADLINE_S = 5.0
"""A payload that survives SIGKILL this long is stuck in the kernel; the agent gives the box up."""
FLOOD_BYTES = 8 << 20
"""Output beyond the cap is counted and dropped; this much of it ends the command."""
REAP_EVERY_S = 0.1
MAX_LISTED = 100_000
MAX_DEPTH = 64
CHUNK = 1 << 16
SIGKILL, SIGPIPE, SIGCHLD, SIGXFSZ, SIG_DFL = 9, 13, 17, 25, 0
READABLE = select.POLLIN | select.POLLHUP


def pack(*fields: bytes | str | int) -> bytes:
    """The body of a frame."""
    parts = []
    for field in fields:
        data = field if isinstance(field, bytes) else os.fsencode(str(field))
        parts += [LENGTH.pack(len(data)), data]
    return b"".join(parts)


def unpack(body: bytes) -> list[bytes]:
    """The fields of a frame's body. ``ValueError`` when it is malformed."""
    fields, at = [], 0
    while at < len(body):
        if at + LENGTH.size > len(body):
            raise ValueError("a frame ends inside a field length")
        (size,) = LENGTH.unpack_from(body, at)
        at += LENGTH.size
        if at + size > len(body):
            raise ValueError("a frame ends inside a field")
        fields.append(body[at : at + size])
        at += size
    return fields


class Capture:
    """Keeps the head and the tail of a stream of unknown length within ``cap`` bytes."""

    def __init__(self, cap: int) -> None:
        self.head_cap = cap - cap // 2
        self.tail_cap = cap // 2
        self.head = bytearray()
        self.tail = bytearray()
        self.dropped = 0

    def feed(self, data: bytes) -> None:
        room = self.head_cap - len(self.head)
        self.head += data[:room]
        self.tail += data[room:] if room > 0 else data
        if len(self.tail) > 2 * self.tail_cap + CHUNK:
            self._trim()

    def _trim(self) -> None:
        extra = len(self.tail) - self.tail_cap
        if extra > 0:
            del self.tail[:extra]
            self.dropped += extra

    def value(self) -> bytes:
        """What was kept, with one line between head and tail where something is missing."""
        self._trim()
        gap = b"\n[... %d bytes left out ...]\n" % self.dropped if self.dropped else b""
        return bytes(self.head) + gap + bytes(self.tail)


class Command:
    """One running command."""

    def __init__(self, op: int, uid: int, pid: int, *, timeout_s: float, cap: int, stdin: bytes) -> None:
        self.op = op
        self.uid = uid
        self.pid = pid
        self.pidfd = open_pidfd(pid)
        self.started = time.monotonic()
        self.deadline = self.started + timeout_s
        self.stdin = memoryview(stdin)
        self.captures = [Capture(cap), Capture(cap)]
        self.pipes: list[int] = []
        self.wait_status: int | None = None
        self.verdict = ""
        """Why the agent ended it; empty when it ended by itself."""

    def due(self, now: float) -> bool:
        if self.wait_status is None and not self.verdict and now >= self.deadline:
            self.verdict = "timeout"
        return bool(self.verdict) or self.wait_status is not None

    def result(self, disk_full: bool) -> bytes:
        wait_status = self.wait_status or 0
        signaled = os.WIFSIGNALED(wait_status)
        return pack(
            self.verdict or ("signaled" if signaled else "exited"),
            0 if signaled else os.WEXITSTATUS(wait_status),
            os.WTERMSIG(wait_status) if signaled else 0,
            self.captures[0].value(),
            self.captures[1].value(),
            sum(capture.dropped for capture in self.captures),
            int((time.monotonic() - self.started) * 1e6),
            int(disk_full),
        )


class Agent:
    """The poll loop. One thread, no locks."""

    def __init__(self, config: list[bytes]) -> None:
        self.workdir = os.fsdecode(config[0])
        self.first_uid, self.gid, slots = (int(field) for field in config[1:4])
        self.limits = [(int(limit), int(value)) for limit, value in (f.split(b"=") for f in config[4:])]
        self.max_processes = dict(self.limits).get(resource.RLIMIT_NPROC, 0)
        """Of one command; 0 where control groups bound the box instead, and the host sees a refused fork."""
        self.free_uids = list(range(self.first_uid + slots - 1, self.first_uid - 1, -1))
        self.commands: dict[int, Command] = {}
        self.by_pid: dict[int, Command] = {}
        self.streams: dict[int, tuple[Command, int]] = {}
        """Pipe descriptor -> its command and which of its pipes (0 stdin, 1 stdout, 2 stderr, 3 pidfd)."""
        self.poller = select.poll()
        self.poller.register(0, READABLE)
        self.wakeup = -1
        """Becomes readable when a child ends, where the kernel has no descriptors of processes; else -1."""
        own = open_pidfd(os.getpid())
        if own >= 0:
            os.close(own)
        else:
            self.wakeup = wake_on_sigchld()
            self.poller.register(self.wakeup, READABLE)

    def serve(self) -> None:
        """Answer frames until the host hangs up."""
        send(0, READY)
        while True:
            for fd, _ in self.poller.poll(self._patience_ms()):
                if fd == 0:
                    self._take(*receive())
                elif fd in self.streams:
                    self._pump(fd)
                elif fd == self.wakeup:
                    read_available(fd)
            self._reap()
            now = time.monotonic()
            for command in [c for c in self.commands.values() if c.due(now)]:
                self._finish(command)

    def _patience_ms(self) -> float | None:
        if not self.commands:
            return None
        soonest = min(command.deadline for command in self.commands.values()) - time.monotonic()
        return 1e3 * max(0.0, min(soonest, REAP_EVERY_S))

    def _take(self, op: int, kind: int, body: bytes) -> None:
        fields = unpack(body)
        if kind == EXEC:
            self._start(op, fields)
        elif kind == CANCEL:
            if op in self.commands:
                self.commands[op].verdict = "cancelled"
        else:
            self._answer_file_request(op, kind, fields)

    def _start(self, op: int, fields: list[bytes]) -> None:
        timeout_us, cap, num_args = (int(field) for field in fields[:3])
        stdin, argv = fields[3], fields[4 : 4 + num_args]
        env = dict(pair.split(b"=", 1) for pair in fields[4 + num_args :])
        uid = self.free_uids.pop()
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        try:
            pid = os.fork()
        except BlockingIOError:
            # Commands running beside this one hold every process slot of the box.
            for end in ends[0] + ends[1] + ends[2]:
                os.close(end)
            self.free_uids.append(uid)
            send(op, OK, pack("pids_limit", 0, 0, b"", b"", 0, 0, 0))
            return
        if pid == 0:
            become_payload(argv, env, (ends[0][0], ends[1][1], ends[2][1]), uid, self.gid, self)
        for end in (ends[0][0], ends[1][1], ends[2][1]):
            os.close(end)
        command = Command(op, uid, pid, timeout_s=timeout_us / 1e6, cap=cap, stdin=stdin)
        self.commands[op] = self.by_pid[pid] = command
        watched = [ends[0][1], ends[1][0], ends[2][0]]
        if command.pidfd >= 0:
            watched.append(command.pidfd)
        for which, fd in enumerate(watched):
            os.set_blocking(fd, False)
            self.streams[fd] = (command, which)
            command.pipes.append(fd)
            self.poller.register(fd, select.POLLOUT if which == 0 else READABLE)
        if not stdin:
            self._drop(watched[0])

    def _pump(self, fd: int) -> None:
        command, which = self.streams[fd]
        if which == 0:
            self._feed(fd, command)
        elif which == 3:
            self._drop(fd)
        else:
            data = read_available(fd)
            if data == b"":
                self._drop(fd)
            elif data:
                command.captures[which - 1].feed(data)
        if sum(capture.dropped for capture in command.captures) > FLOOD_BYTES and not command.verdict:
            command.verdict = "output_limit"

    def _feed(self, fd: int, command: Command) -> None:
        try:
            command.stdin = command.stdin[os.write(fd, command.stdin[:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            command.stdin = command.stdin[:0]
        if not command.stdin:
            self._drop(fd)

    def _drop(self, fd: int) -> None:
        command, _ = self.streams.pop(fd)
        command.pipes.remove(fd)
        self.poller.unregister(fd)
        os.close(fd)

    def _finish(self, command: Command) -> None:
        # A command that failed and left behind all the processes it may have is taken to have wanted more.
        failed = not command.verdict and command.wait_status != 0
        if failed and self.max_processes and num_processes(command.uid) >= max(1, self.max_processes - 1):
            command.verdict = "pids_limit"
        self._kill_all(command.uid)
        for fd in list(command.pipes):
            which = self.streams[fd][1]
            # Every writer is dead, so this ends with what the pipe holds.
            while which in (1, 2) and (data := read_available(fd)):
                command.captures[which - 1].feed(data)
            self._drop(fd)
        del self.commands[command.op], self.by_pid[command.pid]
        self.free_uids.append(command.uid)
        self.free_uids.sort(reverse=True)
        send(command.op, OK, command.result(is_full(self.workdir) or is_full("/tmp")))

    def _kill_all(self, uid: int) -> None:
        deadline = time.monotonic() + KILL_DEADLINE_S
        # Alone, a command is over when the kernel finds nobody to signal; beside others, it also counts those.
        while signal_all(uid) and (len(self.commands) == 1 or num_processes(uid)):
            self._reap()
            if time.monotonic() > deadline:
                os._exit(70)
            time.sleep(0.0002)
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self.by_pid:
                self.by_pid[pid].wait_status = status

    def _answer_file_request(self, op: int, kind: int, fields: list[bytes]) -> None:
        os.setegid(self.gid)
        os.seteuid(self.first_uid)
        try:
            body = answer_file_request(self.workdir, kind, fields)
        except OSError as error:
            reply = (FAILED, pack(error.errno or errno.EIO, error.strerror or str(error)))
        except ValueError as error:
            reply = (FAILED, pack(0, str(error)))
        else:
            reply = (OK, body)
        finally:
            os.seteuid(0)
            os.setegid(0)
        send(op, *reply)


def open_pidfd(pid: int) -> int:
    """A descriptor of a process; -1 where the kernel has none, as gVisor's."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def wake_on_sigchld() -> int:
    """The end to read of a pipe that every SIGCHLD writes a byte into."""
    import _signal

    read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    _signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    # Without a handler the signal is ignored, and so is the pipe.
    _signal.signal(SIGCHLD, lambda number, frame: None)
    return read_end


def send(op: int, kind: int, body: bytes = b"") -> None:
    view = memoryview(HEADER.pack(op, kind, len(body)) + body)
    while view:
        view = view[os.write(1, view) :]


def receive() -> tuple[int, int, bytes]:
    op, kind, size = HEADER.unpack(receive_exactly(HEADER.size))
    return op, kind, receive_exactly(size)


def receive_exactly(size: int) -> bytes:
    parts = []
    while size:
        data = os.read(0, min(size, 1 << 20))
        if not data:
            # The host hung up. As process 1 the agent takes every other process of the box with it.
            os._exit(0)
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def signal_all(uid: int) -> bool:
    """SIGKILL every process of ``uid`` at once. False when there is none.

    Only the effective uid changes, so the payload gains no hold over the agent, whose real and saved uids stay 0;
    and without effective capabilities the kernel lets the signal reach that uid alone. The kernel delivers it to all
    of them under one lock, which a fork bomb cannot outrun.
    """
    os.seteuid(uid)
    try:
        os.kill(-1, SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.seteuid(0)
    return True


def num_processes(uid: int) -> int:
    found = 0
    line = b"\nUid:\t%d\t" % uid
    for pid in os.listdir("/proc"):  # noqa: PTH208 (pathlib costs 5 ms to import)
        if not pid.isdigit():
            continue
        try:
            fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            found += line in os.read(fd, 4096)
        except ProcessLookupError:
            continue
        finally:
            os.close(fd)
    return found


def read_available(fd: int) -> bytes | None:
    """What a non-blocking pipe holds; empty at its end, None when there is nothing yet."""
    try:
        return os.read(fd, CHUNK)
    except BlockingIOError:
        return None


def become_payload(
    argv: list[bytes], env: dict[bytes, bytes], stdio: tuple[int, int, int], uid: int, gid: int, agent: Agent
) -> None:
    """Turn the forked child into the command. Never returns."""
    try:
        os.setsid()
        for target, fd in enumerate(stdio):
            os.dup2(fd, target)
        # The first victim when memory runs out is the payload, never the agent.
        with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:  # noqa: PTH123 (pathlib costs 5 ms to import)
            file.write(b"1000")
        os.chdir(agent.workdir)
        for limit, value in agent.limits:
            resource.setrlimit(limit, (value, value))
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        restore_signals()
        os._exit(run_program(argv, env))
    except BaseException as error:  # noqa: BLE001 (a fork must never return into the agent's loop)
        os.write(2, b"sandbox: " + os.fsencode(repr(error)) + b"\n")
    finally:
        os._exit(126)


def restore_signals() -> None:
    """Python ignores SIGPIPE and SIGXFSZ, and the payload would inherit that."""
    import _signal

    _signal.signal(SIGPIPE, SIG_DFL)
    _signal.signal(SIGXFSZ, SIG_DFL)


def run_program(argv: list[bytes], env: dict[bytes, bytes]) -> int:
    """Replace this process, looking the name up in PATH. Returns the shell's exit code for why it could not."""
    name = argv[0]
    folders = [b""] if b"/" in name else [folder + b"/" for folder in env[b"PATH"].split(b":")]
    reason: OSError = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    for folder in folders:
        try:
            os.execve(folder + name, argv, env)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            reason = error
    os.write(2, b"sandbox: " + name + b": " + os.fsencode(str(reason.strerror)) + b"\n")
    return 127 if isinstance(reason, FileNotFoundError) else 126


def is_full(path: str) -> bool:
    usage = os.statvfs(path)
    return usage.f_bavail == 0 or (usage.f_files > 0 and usage.f_ffree == 0)


def make_folder(name: bytes, parent: int) -> None:
    try:
        os.mkdir(name, 0o777, dir_fd=parent)
    except FileExistsError:
        return


def enter(name: bytes, parent: int) -> int:
    """A descriptor of a directory, not through a link. gVisor follows one when O_NOFOLLOW comes with O_DIRECTORY."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return fd


def open_folder(workdir: str, parts: list[bytes], create: bool = False) -> int:
    """A descriptor of a directory beneath the workdir, reached without following any link."""
    fd = os.open(workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    for part in parts:
        try:
            if create:
                make_folder(part, fd)
            inner = enter(part, fd)
        finally:
            os.close(fd)
        fd = inner
    return fd


def answer_file_request(workdir: str, kind: int, fields: list[bytes]) -> bytes:
    if kind == READ:
        return read_file(workdir, fields[0], int(fields[1]))
    if kind == WRITE:
        return write_file(workdir, fields[0], fields[1])
    if kind == LIST:
        return list_files(workdir, fields[0])
    raise ValueError(f"unknown operation {kind}")


def split(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def read_file(workdir: str, path: bytes, cap: int) -> bytes:
    *folders, name = split(path)
    folder = open_folder(workdir, folders)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise ValueError("not a regular file")
        # The size is checked before reading, and again by reading one byte more than is allowed.
        size = os.fstat(fd).st_size
        parts, total = [], 0
        while size <= cap and (data := os.read(fd, min(1 << 20, cap + 1 - total))):
            parts.append(data)
            total += len(data)
            if total > cap:
                break
        if size > cap or total > cap:
            raise ValueError(f"the file has {max(size, total)} bytes, more than max_bytes={cap}")
        return pack(b"".join(parts))
    finally:
        os.close(fd)


def write_file(workdir: str, path: bytes, data: bytes) -> bytes:
    *folders, name = split(path)
    folder = open_folder(workdir, folders, create=True)
    temporary = b".%s.%d" % (name[:200], time.monotonic_ns())
    try:
        fd = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=folder
        )
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(temporary, dir_fd=folder)
            raise
        finally:
            os.close(fd)
    finally:
        os.close(folder)
    return b""


def list_files(workdir: str, path: bytes) -> bytes:
    found: list[bytes] = []
    base = split(path)
    walk(open_folder(workdir, base), b"/".join(base), found, depth=0)
    return pack(*sorted(found))


def walk(folder: int, prefix: bytes, found: list[bytes], depth: int) -> None:
    """Collect the regular files below an open directory, and close it. Links are neither followed nor listed."""
    try:
        if depth > MAX_DEPTH:
            raise ValueError(f"directories nest deeper than {MAX_DEPTH}")
        with os.scandir(folder) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                path = prefix + b"/" + name if prefix else name
                if entry.is_dir(follow_symlinks=False):
                    walk(enter(name, folder), path, found, depth + 1)
                elif entry.is_file(follow_symlinks=False):
                    found.append(path)
                if len(found) > MAX_LISTED:
                    raise ValueError(f"more than {MAX_LISTED} files")
    finally:
        os.close(folder)


def main() -> None:
    os.umask(0o002)
    os.set_inheritable(0, False)
    os.set_inheritable(1, False)
    _, _, config = receive()
    Agent(unpack(config)).serve()


if __name__ == "__main__":
    main()
