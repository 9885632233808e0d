"""The program inside every sandbox: it runs commands and touches files on behalf of the host.

The host starts it once per box and talks to it in frames over file descriptors 0 and 1. It needs nothing but the
standard library, and imports little of it, since its start is most of what opening a box costs.

The agent is uid 0 of its box with only SETUID, SETGID and KILL. The payload runs on uids of its own, one per
command that runs at the same time, so that it can neither signal nor trace the agent, nor reach the agent's pipes
through /proc, and so that ending one command (SIGKILL to everything its uid owns) leaves its neighbours alone.
Commands of a named user share that user's uid. What tells them apart is a supplementary group, one per command that
runs at the same time: every descendant inherits it, and nobody without SETGID can lay it down or take another.
The agent is process 1 of the box: orphans come to it to be reaped, and its death ends the box.

What few boxes use (``sandbox.agent_streams``, ``sandbox.agent_python``) is not part of this program: the host sends it
when it first needs it.

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
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import TypeVar

    T = TypeVar("T")

HEADER = struct.Struct("!IBI")
LENGTH = struct.Struct("!I")
CONFIG, READY, EXEC, CANCEL, READ, WRITE, LIST, OK, FAILED = range(9)
EVENT, RESULT_OF, EXTEND, DOWNLOAD = range(9, 13)
NAMED, SLEPT = 30, 31

KILL_DEADLINE_S = 5.0
"""A payload that survives SIGKILL this long is stuck in the kernel; the agent gives the box up."""
FLOOD_BYTES = 8 << 20
"""Output beyond the cap is counted and dropped; this much of it ends the command."""
REAP_EVERY_S = 0.1
STALL_S, HEARING_MS = 0.2, 100
"""A turn of the loop that took this much longer than it should was frozen; how long to listen for who says so."""
RESULTS_BYTES = 8 << 20
"""Results kept for a host that asks again, all together; the oldest go first."""
UNKNOWN_NAME = errno.ENOMSG
FOREVER = float("inf")
MAX_LISTED = 100_000
MAX_DEPTH = 64
CHUNK = 1 << 16
MAX_DRAINS = 32
"""Reads that empty a pipe of any size the kernel allows (1 MiB), though somebody may go on writing to it."""
HOME = b".home-"
"""Before a user's name, the name of its directory in the workdir."""
MAX_BIRTHS = 3
"""Times that a command may be seen to have new processes while it is being killed, before its user is stopped."""
SIGKILL, SIGCONT, SIGSTOP = 9, 18, 19
INHERITED = (1, 2, 3, 13, 15, 17, 25)
"""SIGHUP, INT, QUIT, PIPE, TERM, CHLD, XFSZ: those that whoever started the box, or Python, may have ignored."""
SIGCHLD = 17
TIOCSCTTY = 0x540E
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


class Guest:
    """What one operation runs: its first process, its descriptors, what it has used so far."""

    def __init__(self, agent: Agent, op: int, slot: int, uid: int, pid: int) -> None:
        self.agent = agent
        self.op = op
        self.slot = slot
        """Its number among those that run at the same time."""
        self.uid = uid
        """The slot's own, or that of a named user, which others may share."""
        self.pid = pid
        self.started = time.monotonic()
        self.deadline = FOREVER
        self.fds: list[int] = []
        self.wait_status: int | None = None
        self.verdict = ""
        """Why the agent ended it; empty when it ended by itself."""
        self.cpu_s = 0.0
        self.max_rss_kib = 0
        self.captures: list[Capture] = []
        self.hits_before = agent.hits()
        agent.guests[slot] = agent.ops[op] = self
        if pid:
            agent.by_pid[pid] = self
            pidfd = open_pidfd(pid)
            if pidfd >= 0:
                self.watch(pidfd, 3)

    def watch(self, fd: int, which: int, events: int = READABLE) -> None:
        """Have ``pump`` called when the descriptor is ready, which is this guest's to close from now on."""
        os.set_blocking(fd, False)
        self.fds.append(fd)
        self.agent.streams[fd] = (self, which)
        self.agent.poller.register(fd, events)

    def drop(self, fd: int) -> None:
        self.fds.remove(fd)
        del self.agent.streams[fd]
        self.unwatch(fd)
        os.close(fd)

    def unwatch(self, fd: int) -> None:
        try:
            self.agent.poller.unregister(fd)
        except KeyError:
            # It was not watched just now.
            return

    def pump(self, fd: int, which: int) -> None:
        """Move what a descriptor has or takes: 0 stdin, 1 stdout, 2 stderr, 3 pidfd."""
        if which == 3:
            self.drop(fd)
            return
        data = read_available(fd)
        if data == b"":
            self.drop(fd)
        elif data:
            self.captures[which - 1].feed(data)

    def account(self, usage: resource.struct_rusage) -> None:
        """Add what a reaped process and the descendants it waited for have used."""
        self.cpu_s += usage.ru_utime + usage.ru_stime
        self.max_rss_kib = max(self.max_rss_kib, usage.ru_maxrss)

    def dropped(self) -> int:
        return sum(capture.dropped for capture in self.captures)

    def tick(self, now: float) -> None:
        """Called in each turn of the loop."""
        raise NotImplementedError

    def cancel(self) -> None:
        self.verdict = self.verdict or "cancelled"

    def stop(self) -> None:
        """Kill everything it has started, take what its pipes still hold, and give the slot back."""
        if self.pid and self.wait_status is None:
            # By its pid too, since it may not have taken its uid yet.
            os.kill(self.pid, SIGKILL)
        self.agent.kill_all(self)
        deadline = time.monotonic() + KILL_DEADLINE_S
        while self.pid and self.wait_status is None:
            if time.monotonic() > deadline:
                os._exit(70)
            time.sleep(0.0002)
            self.agent.reap()
        for fd in list(self.fds):
            which = self.agent.streams[fd][1]
            # Every writer is dead, but for another command of the same user that may have opened the pipe, too.
            for _ in range(MAX_DRAINS if which in (1, 2) else 0):
                if fd in self.fds and read_ready(fd):
                    self.pump(fd, which)
            if fd in self.fds:
                self.drop(fd)
        del self.agent.guests[self.slot]
        self.agent.ops.pop(self.op, None)
        self.agent.by_pid.pop(self.pid, None)
        self.agent.free_slots.append(self.slot)
        self.agent.free_slots.sort(reverse=True)

    def result(self) -> bytes:
        return pack_result(
            self.verdict,
            self.wait_status or 0,
            outputs=[capture.value() for capture in self.captures] or [b"", b""],
            dropped=self.dropped(),
            wall_s=time.monotonic() - self.started,
            disk_full=is_full(self.agent.workdir) or is_full("/tmp"),
            cpu_s=self.cpu_s,
            max_rss_kib=self.max_rss_kib,
        )


def pack_result(
    verdict: str,
    wait_status: int = 0,
    *,
    outputs: Sequence[bytes] = (b"", b""),
    dropped: int = 0,
    wall_s: float = 0.0,
    disk_full: bool = False,
    cpu_s: float = -1.0,
    max_rss_kib: int = -1,
) -> bytes:
    """The reply that says how a command ended. What was not measured is -1."""
    signaled = os.WIFSIGNALED(wait_status)
    return pack(
        verdict or ("signaled" if signaled else "exited"),
        0 if signaled else os.WEXITSTATUS(wait_status),
        os.WTERMSIG(wait_status) if signaled else 0,
        *outputs,
        dropped,
        int(wall_s * 1e6),
        int(disk_full),
        int(cpu_s * 1e6),
        max_rss_kib,
    )


class Command(Guest):
    """One running command, answered when it has ended."""

    def __init__(self, agent: Agent, op: int, slot: int, uid: int, pid: int, *, cap: int, stdin: bytes) -> None:
        super().__init__(agent, op, slot, uid, pid)
        self.stdin = memoryview(stdin)
        self.captures = [Capture(cap), Capture(cap)]

    def pump(self, fd: int, which: int) -> None:
        if which == 0:
            self._feed(fd)
            return
        super().pump(fd, which)
        if self.dropped() > FLOOD_BYTES:
            self.verdict = self.verdict or "output_limit"

    def _feed(self, fd: int) -> None:
        try:
            self.stdin = self.stdin[os.write(fd, self.stdin[:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.stdin = self.stdin[:0]
        if not self.stdin:
            self.drop(fd)

    def tick(self, now: float) -> None:
        if self.wait_status is None and not self.verdict and now >= self.deadline:
            self.verdict = "timeout"
        if self.verdict or self.wait_status is not None:
            self.finish()

    def finish(self) -> None:
        if self.wait_status:
            self.verdict = self.verdict or self.agent.limit_hit(self)
        self.stop()
        send(self.op, OK, self.result())


class Agent:
    """The poll loop. One thread, no locks."""

    def __init__(self, config: list[bytes]) -> None:
        self.workdir = os.fsdecode(config[0])
        self.first_uid, self.gid, slots, self.max_users = (int(field) for field in config[1:5])
        self.group = os.fsdecode(config[5])
        """The box's control group, where the kernel that keeps it is the box's own; empty where the host counts."""
        self.limits = [(int(limit), int(value)) for limit, value in (f.split(b"=") for f in config[6:])]
        self.max_processes = dict(self.limits).get(resource.RLIMIT_NPROC, 0)
        """Of one command; 0 where control groups bound the box instead, and the host sees a refused fork."""
        self.spare_uid = self.first_uid + slots - 1
        """For the fork server. No payload runs on it."""
        self.users: dict[bytes, int] = {}
        """The uids of named users, which follow the others in the order of their first use."""
        self.free_slots = list(range(slots - 2, -1, -1))
        self.guests: dict[int, Guest] = {}
        """By slot."""
        self.ops: dict[int, Guest] = {}
        """By the operation the host would cancel."""
        self.by_pid: dict[int, Guest] = {}
        self.streams: dict[int, tuple[Guest, int]] = {}
        """Descriptor -> whose it is and which of its descriptors."""
        self.results: dict[bytes, tuple[int, bytes]] = {}
        """Replies to operations that had a name, until the host acknowledges them."""
        self.askers: dict[bytes, list[int]] = {}
        """Of each named operation that is not over: the frames to answer, the one that began it and retries of it."""
        self.handlers: dict[int, Callable[[int, list[bytes]], None]] = {
            EXEC: self._start,
            NAMED: self._take_named,
            RESULT_OF: self._tell_result,
            SLEPT: self._sleep_in,
            EXTEND: self._extend,
            DOWNLOAD: self._download,
        }
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
        now = time.monotonic()
        while True:
            patience_ms = self._patience_ms()
            ready = self.poller.poll(patience_ms)
            # Before the frames are taken: should the box be frozen from here on, no time has passed for its deadlines.
            before, now = now, time.monotonic()
            stalled = patience_ms is not None and now - before > patience_ms / 1e3 + STALL_S
            if stalled and all(fd != 0 for fd, _ in ready) and read_ready(0, HEARING_MS):
                # It was frozen. What the host says of that counts before any deadline; gVisor is late to show it.
                self._take(*receive())
            for fd, _ in ready:
                if fd == 0:
                    self._take(*receive())
                elif fd in self.streams:
                    guest, which = self.streams[fd]
                    guest.pump(fd, which)
                elif fd == self.wakeup:
                    read_available(fd)
            self.reap()
            for guest in list(self.guests.values()):
                guest.tick(now)

    def _patience_ms(self) -> float | None:
        if not self.guests:
            return None
        soonest = min(guest.deadline for guest in self.guests.values()) - time.monotonic()
        return 1e3 * max(0.0, min(soonest, REAP_EVERY_S))

    def _take(self, op: int, kind: int, body: bytes) -> None:
        fields = unpack(body)
        if kind == CANCEL:
            first = next((askers[0] for askers in self.askers.values() if op in askers), op)
            if first in self.ops:
                self.ops[first].cancel()
            return
        try:
            if kind in self.handlers:
                self.handlers[kind](op, fields)
            else:
                send(op, OK, self.as_payload(lambda: answer_file_request(self.workdir, kind, fields)))
        except OSError as error:
            send(op, FAILED, pack(error.errno or errno.EIO, error.strerror or str(error)))
        except ValueError as error:
            send(op, FAILED, pack(0, str(error)))

    def _start(self, op: int, fields: list[bytes]) -> None:
        timeout_us, cap, num_args = (int(field) for field in fields[:3])
        stdin, cwd, user = fields[3:6]
        argv, env = fields[6 : 6 + num_args], read_env(fields[6 + num_args :])
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        started = None
        try:
            started = self.launch(argv, env, cwd, (ends[0][0], ends[1][1], ends[2][1]), user)
        finally:
            if started is None:
                for end in (ends[0][1], ends[1][0], ends[2][0]):
                    os.close(end)
        if started is None:
            send(op, OK, pack_result("pids_limit"))
            return
        command = Command(self, op, *started, cap=cap, stdin=stdin)
        command.deadline = command.started + timeout_us / 1e6
        for which, fd in enumerate((ends[0][1], ends[1][0], ends[2][0])):
            command.watch(fd, which, select.POLLOUT if which == 0 else READABLE)
        if not stdin:
            command.drop(ends[0][1])

    def launch(
        self,
        argv: list[bytes],
        env: dict[bytes, bytes],
        cwd: bytes,
        stdio: tuple[int, int, int],
        user: bytes = b"",
        extra: dict[int, int] | None = None,
        terminal: bool = False,
    ) -> tuple[int, int, int] | None:
        """Start a program on the uid of a user, or without one on that of its slot: the slot, the uid and the pid.

        Closes the child's ends of its descriptors. ``extra`` maps more descriptors the program gets to those they are
        copies of. None when every process slot of the box is taken; ``OSError`` when ``cwd`` cannot be entered or the
        user's home is not its own; ``ValueError`` for one user too many.
        """
        ends = {*stdio, *(extra or {}).values()}
        folder = -1
        try:
            owner = self.uid_of(user) if user else 0
            if user:
                self.as_payload(lambda: settle(self.workdir, HOME + user, owner), owner)
            if split(cwd):
                folder = self.as_payload(lambda: open_folder(self.workdir, split(cwd)), owner)
            slot = self.free_slots.pop()
            uid, mark = (owner, self.mark(slot)) if user else (self.first_uid + slot, 0)
            try:
                pid = self.fork()
            except BlockingIOError:
                # Commands running beside this one hold every process slot of the box.
                self.free_slots.append(slot)
                return None
            if pid == 0:
                become_payload(self, (uid, mark), argv, env, folder, stdio, extra or {}, terminal)
            return slot, uid, pid
        finally:
            for fd in ends | ({folder} if folder >= 0 else set()):
                os.close(fd)

    def uid_of(self, user: bytes) -> int:
        """The uid of a named user, for as long as the box lives. ``ValueError`` when there is none left for it."""
        if user not in self.users:
            if len(self.users) >= self.max_users:
                known = ", ".join(map(os.fsdecode, self.users))
                most = f"a box has at most {self.max_users} users"
                raise ValueError(f"user = {os.fsdecode(user)!r}: {most}; expected one of {known}")
            self.users[user] = self.spare_uid + 1 + len(self.users)
        return self.users[user]

    def mark(self, slot: int) -> int:
        """The group that everything of a named user's command in this slot is in, and nothing else."""
        return self.gid + 1 + slot

    def fork(self) -> int:
        """``os.fork``. The child starts where no ``signal_all`` for somebody else can reach it: not with real uid 0."""
        pid = -1
        os.setresuid(self.spare_uid, 0, self.spare_uid)
        try:
            pid = os.fork()
        finally:
            if pid:
                os.setresuid(0, 0, 0)
        return pid

    def hits(self) -> tuple[int, int]:
        """How often memory ran out and a fork was refused in the box's own control group."""
        if not self.group:
            return (0, 0)
        return (count(f"{self.group}/memory.events", b"oom_kill"), count(f"{self.group}/pids.events", b"max"))

    def limit_hit(self, guest: Guest) -> str:
        """The limit of the box that made a command fail; empty when it was none that is counted in here."""
        # One that leaves behind all the processes it may have is taken to have wanted more.
        most = self.max_processes
        if most and len(processes_of(guest.uid)) >= max(1, most - 1):
            return "pids_limit"
        oom_kills, refused_forks = self.hits()
        if oom_kills > guest.hits_before[0]:
            return "oom"
        return "pids_limit" if refused_forks > guest.hits_before[1] else ""

    def _take_named(self, op: int, fields: list[bytes]) -> None:
        """Do what a frame asks for unless an earlier one of this name has.

        The fields are its name, its kind, its body, and the names of results that the host acknowledges.
        """
        name, kind, body, *acknowledged = fields
        for known in acknowledged:
            self.results.pop(known, None)
        if self._answer(op, name):
            return
        self.askers[name] = [op]
        on_reply[op] = lambda kind, reply: self._keep(name, kind, reply)
        self._take(op, int(kind), body)

    def _answer(self, op: int, name: bytes) -> bool:
        """Give a frame what the operation of this name came to, now or when it is over. False for an unknown name."""
        if name in self.results:
            send(op, *self.results[name])
        elif name in self.askers:
            self.askers[name].append(op)
        else:
            return False
        return True

    def _keep(self, name: bytes, kind: int, body: bytes) -> None:
        self.results[name] = kind, body
        while len(self.results) > 1 and sum(len(reply) for _, reply in self.results.values()) > RESULTS_BYTES:
            del self.results[next(iter(self.results))]
        for op in self.askers.pop(name)[1:]:
            send(op, kind, body)

    def _tell_result(self, op: int, fields: list[bytes]) -> None:
        if not self._answer(op, fields[0]):
            raise OSError(UNKNOWN_NAME, "no operation of this name is known")

    def _sleep_in(self, op: int, fields: list[bytes]) -> None:
        """The box was frozen for so many microseconds, which count for nobody."""
        for guest in self.guests.values():
            guest.started += int(fields[0]) / 1e6
            guest.deadline += int(fields[0]) / 1e6

    def _extend(self, op: int, fields: list[bytes]) -> None:
        """Run a further module of the agent, which may import from this one by its name on the host."""
        import marshal

        name, magic, code, source = fields
        for part in ("sandbox", "sandbox.agent"):
            if part not in sys.modules:
                sys.modules[part] = type(sys)(part)
        sys.modules["sandbox.agent"].__dict__.update(globals())
        names = {"__name__": name.decode()}
        from _frozen_importlib_external import MAGIC_NUMBER

        exec(marshal.loads(code) if magic == MAGIC_NUMBER else compile(source, "agent", "exec"), names)
        names["install"](self)  # type: ignore[operator]
        send(op, OK)

    def kill_all(self, guest: Guest) -> None:
        """End everything a guest has started. It is reaped too when this returns."""
        deadline = time.monotonic() + KILL_DEADLINE_S
        seen: set[int] = set()
        births = 0
        while self.strike(guest) and (found := self.processes(guest)):
            births += not seen.issuperset(found)
            seen.update(found)
            if births > MAX_BIRTHS and self.is_shared(guest):
                # A bomb outruns whoever looks for its processes. What is stopped does not fork: the uid's other
                # commands stand still, too, until it is over.
                signal_all(guest.uid, SIGSTOP)
            self.reap()
            if time.monotonic() > deadline:
                os._exit(70)
            time.sleep(0.0002)
        if births > MAX_BIRTHS:
            signal_all(guest.uid, SIGCONT)
        self.reap()

    def strike(self, guest: Guest) -> bool:
        """SIGKILL everything a guest has started. False when that is nothing."""
        if not self.is_shared(guest):
            return signal_all(guest.uid)
        found = self.processes(guest)
        for pid in found:
            kill_marked(pid, guest.uid, self.mark(guest.slot))
        return bool(found)

    def is_shared(self, guest: Guest) -> bool:
        """Whether another command of the same user is running."""
        return any(other.uid == guest.uid and other is not guest for other in self.guests.values())

    def processes(self, guest: Guest) -> list[int]:
        """Everything a guest has started, zombies included."""
        return processes_of(guest.uid, self.mark(guest.slot) if self.is_shared(guest) else 0)

    def reap(self) -> None:
        while True:
            try:
                # Looked at before it is reaped, since only a zombie still says whose it was.
                zombie = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if zombie is None:
                return
            owner = self.by_pid.get(zombie.si_pid) or self._owner(zombie.si_pid, zombie.si_uid)
            pid, status, usage = os.wait4(zombie.si_pid, 0)
            if owner:
                owner.account(usage)
                if owner.pid == pid:
                    owner.wait_status = status

    def _owner(self, pid: int, uid: int) -> Guest | None:
        """Whose a zombie was that is nobody's first process."""
        sharing = [guest for guest in self.guests.values() if guest.uid == uid]
        if len(sharing) > 1:
            sharing = [guest for guest in sharing if is_of(read_status(pid), uid, self.mark(guest.slot))]
        return sharing[0] if sharing else None

    def as_payload(self, action: Callable[[], T], uid: int = 0) -> T:
        """Do something with the rights of a payload uid, the first one unless another is named."""
        os.setegid(self.gid)
        os.seteuid(uid or self.first_uid)
        try:
            return action()
        finally:
            os.seteuid(0)
            os.setegid(0)

    def _download(self, op: int, fields: list[bytes]) -> None:
        path, max_entries, max_bytes = fields[0], int(fields[1]), int(fields[2])

        def send_all() -> None:
            for piece in read_tree(self.workdir, path, max_entries, max_bytes):
                send(op, EVENT, pack(*piece))

        self.as_payload(send_all)
        send(op, OK)


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


on_reply: dict[int, Callable[[int, bytes], None]] = {}
"""Called with the kind and the body of the reply to an operation."""


def send(op: int, kind: int, body: bytes = b"") -> None:
    if kind in (OK, FAILED) and op in on_reply:
        on_reply.pop(op)(kind, body)
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


def signal_all(uid: int, number: int = SIGKILL) -> bool:
    """Signal every process of ``uid`` at once. False when there is none.

    Only the effective uid changes, so the payload gains no hold over the agent, whose real and saved uids stay 0;
    and without effective capabilities the kernel lets the signal reach that uid alone (and real uid 0, which only the
    agent has). The kernel delivers it to all of them under one lock, which a fork bomb cannot outrun.
    """
    os.seteuid(uid)
    try:
        os.kill(-1, number)
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        os.seteuid(0)
    return True


def kill_marked(pid: int, uid: int, mark: int) -> None:
    """SIGKILL a process if it is still the one that was found to be of ``uid`` and in the group ``mark``."""
    process = open_pidfd(pid)
    os.seteuid(uid)
    try:
        if process < 0:
            os.kill(pid, SIGKILL)
        elif is_of(read_status(pid), uid, mark):
            import _signal

            _signal.pidfd_send_signal(process, SIGKILL)
    except (ProcessLookupError, PermissionError):
        return
    finally:
        os.seteuid(0)
        if process >= 0:
            os.close(process)


def processes_of(uid: int, mark: int = 0) -> list[int]:
    """The processes of a payload uid, zombies included; with a mark, those in that group."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        # One system call says so in most cases.
        return []
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208 (pathlib costs 5 ms to import)
    return [pid for pid in pids if is_of(read_status(pid), uid, mark)]


def is_of(status: bytes, uid: int, mark: int) -> bool:
    """Whether a process with this status has the real uid, and is in the group, if one is given."""
    if b"\nUid:\t%d\t" % uid not in status:
        return False
    groups = status.partition(b"\nGroups:\t")[2].partition(b"\n")[0].split()
    return not mark or b"%d" % mark in groups


def read_status(pid: int) -> bytes:
    """What /proc says of a process; empty when it is gone."""
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        return os.read(fd, 4096)
    except ProcessLookupError:
        return b""
    finally:
        os.close(fd)


def read_env(pairs: list[bytes]) -> dict[bytes, bytes]:
    return dict(pair.split(b"=", 1) for pair in pairs)


def read_ready(fd: int, patience_ms: int = 0) -> bool:
    """Whether reading gives something, now or soon: data or the end."""
    poller = select.poll()
    poller.register(fd, READABLE)
    return bool(poller.poll(patience_ms))


def read_available(fd: int) -> bytes | None:
    """What a non-blocking pipe holds; empty at its end, None when there is nothing yet."""
    try:
        return os.read(fd, CHUNK)
    except BlockingIOError:
        return None


def become_payload(
    agent: Agent,
    identity: tuple[int, int],
    argv: list[bytes],
    env: dict[bytes, bytes],
    folder: int,
    stdio: tuple[int, int, int],
    extra: dict[int, int],
    terminal: bool,
) -> None:
    """Turn the forked child into the command. Never returns."""
    try:
        for target, fd in extra.items():
            os.dup2(fd, target)
        drop_rights(agent, identity, stdio, folder)
        if terminal:
            import fcntl

            fcntl.ioctl(0, TIOCSCTTY, 0)
        restore_signals()
        os._exit(run_program(argv, env))
    except BaseException as error:  # noqa: BLE001 (a fork must never return into the agent's loop)
        os.write(2, b"sandbox: " + os.fsencode(repr(error)) + b"\n")
    finally:
        os._exit(126)


def drop_rights(agent: Agent, identity: tuple[int, int], stdio: tuple[int, int, int], folder: int = -1) -> None:
    """Make the calling process a payload: standard streams, limits, directory, and then no way back to uid 0.

    ``identity`` is its uid and, for a named user's, the group that marks its command; else 0.
    """
    uid, mark = identity
    os.setsid()
    for target, fd in enumerate(stdio):
        os.dup2(fd, target)
    # The first victim when memory runs out is the payload, never the agent.
    with open("/proc/self/oom_score_adj", "wb", buffering=0) as file:  # noqa: PTH123 (pathlib costs 5 ms to import)
        file.write(b"1000")
    for limit, value in agent.limits:
        resource.setrlimit(limit, (value, value))
    os.setgroups([mark] if mark else [])
    if mark:
        # Others, who are in the same group, read what a user does not hide, and change none of it.
        os.umask(0o022)
    os.setresgid(agent.gid, agent.gid, agent.gid)
    os.setresuid(uid, uid, uid)
    if folder < 0:
        os.chdir(agent.workdir)
    else:
        os.fchdir(folder)


def restore_signals() -> None:
    """Python ignores SIGPIPE and SIGXFSZ, a host in the background SIGINT, and the payload would inherit that."""
    import _signal

    for number in INHERITED:
        _signal.signal(number, _signal.SIG_DFL)


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


def count(path: str, name: bytes) -> int:
    """A counter in a file of names and numbers; 0 when there is no such file."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        words = os.read(fd, 4096).split()
    finally:
        os.close(fd)
    return int(words[words.index(name) + 1]) if name in words else 0


def is_full(path: str) -> bool:
    usage = os.statvfs(path)
    return usage.f_bavail == 0 or (usage.f_files > 0 and usage.f_ffree == 0)


def make_folder(name: bytes, parent: int) -> None:
    try:
        os.mkdir(name, 0o777, dir_fd=parent)
    except FileExistsError:
        return


def settle(workdir: str, name: bytes, uid: int) -> None:
    """Make the home of a user, as that user. ``OSError`` when something that is not its own has taken the place."""
    root = open_folder(workdir, [])
    try:
        try:
            os.mkdir(name, 0o755, dir_fd=root)
        except FileExistsError:
            if os.stat(name, dir_fd=root, follow_symlinks=False).st_uid != uid:
                raise PermissionError(errno.EPERM, f"{os.fsdecode(name)} belongs to somebody else; delete it") from None
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    finally:
        os.close(root)


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
        return read_file(workdir, fields[0], int(fields[1]), int(fields[2]) if fields[2:] else None)
    if kind == WRITE:
        return write_file(workdir, fields[0], fields[1], int(fields[2]) if fields[2:] else None)
    if kind == LIST:
        return describe_files(workdir, fields[0]) if fields[1:] else list_files(workdir, fields[0])
    raise ValueError(f"unknown operation {kind}")


def split(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def open_file(workdir: str, path: bytes) -> int:
    """A descriptor of a regular file beneath the workdir, reached without following any link."""
    *folders, name = split(path)
    folder = open_folder(workdir, folders)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise ValueError("not a regular file")
    return fd


def read_file(workdir: str, path: bytes, cap: int, offset: int | None = None) -> bytes:
    """The whole file, or with an offset up to ``cap`` bytes from there."""
    fd = open_file(workdir, path)
    try:
        if offset is not None:
            os.lseek(fd, offset, os.SEEK_SET)
            return pack(b"".join(read_pieces(fd, cap)))
        # The size is checked before reading, and again by reading one byte more than is allowed.
        size = os.fstat(fd).st_size
        data = b"".join(read_pieces(fd, cap + 1)) if size <= cap else b""
        if size > cap or len(data) > cap:
            raise ValueError(f"the file has {max(size, len(data))} bytes, more than max_bytes={cap}")
        return pack(data)
    finally:
        os.close(fd)


def read_pieces(fd: int, most: int) -> Iterator[bytes]:
    """What a file holds from its position on, up to ``most`` bytes."""
    while most > 0 and (data := os.read(fd, min(1 << 20, most))):
        most -= len(data)
        yield data


def read_tree(workdir: str, path: bytes, max_entries: int, max_bytes: int) -> Iterator[tuple[bytes, bytes]]:
    """A file, or the regular files below a directory, in pieces: path and data. ``ValueError`` above a cap."""
    try:
        names = unpack(list_files(workdir, path, max_entries))
    except NotADirectoryError:
        names = [b"/".join(split(path))]
    for name in names:
        fd = open_file(workdir, name)
        try:
            if os.fstat(fd).st_size > max_bytes:
                raise ValueError("the files hold more than max_bytes")
            yield name, b""
            for data in read_pieces(fd, max_bytes + 1):
                max_bytes -= len(data)
                if max_bytes < 0:
                    raise ValueError("the files hold more than max_bytes")
                yield name, data
        finally:
            os.close(fd)


def write_file(workdir: str, path: bytes, data: bytes, mode: int | None = None) -> bytes:
    *folders, name = split(path)
    folder = open_folder(workdir, folders, create=True)
    temporary = b".%s.%d" % (name[:200], time.monotonic_ns())
    try:
        fd = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=folder
        )
        try:
            if mode is not None:
                os.fchmod(fd, mode)
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


def list_files(workdir: str, path: bytes, most: int = MAX_LISTED) -> bytes:
    """The regular files below a directory."""
    found = walk(workdir, path, most)
    return pack(*sorted(name for name, entry in found if entry.is_file(follow_symlinks=False)))


def describe_files(workdir: str, path: bytes) -> bytes:
    """Everything below a directory: path, mode, size and time of the last change in nanoseconds of each."""
    fields: list[bytes | int] = []
    for name, entry in sorted(walk(workdir, path, MAX_LISTED, details=True), key=lambda pair: pair[0]):
        status = entry.stat(follow_symlinks=False)
        fields += [name, status.st_mode, status.st_size, status.st_mtime_ns]
    return pack(*fields)


def walk(workdir: str, path: bytes, most: int, details: bool = False) -> list[tuple[bytes, os.DirEntry[str]]]:
    """What is below a directory, links included but not followed. With details, each entry knows its status."""
    found: list[tuple[bytes, os.DirEntry[str]]] = []

    def visit(folder: int, prefix: bytes, depth: int) -> None:
        try:
            if depth > MAX_DEPTH:
                raise ValueError(f"directories nest deeper than {MAX_DEPTH}")
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    inner = prefix + b"/" + name if prefix else name
                    if details:
                        entry.stat(follow_symlinks=False)
                    found.append((inner, entry))
                    if len(found) > most:
                        raise ValueError(f"more than {most} files and directories")
                    if entry.is_dir(follow_symlinks=False):
                        visit(enter(name, folder), inner, depth + 1)
        finally:
            os.close(folder)

    base = split(path)
    visit(open_folder(workdir, base), b"/".join(base), 0)
    return found


def main() -> None:
    os.umask(0o002)
    os.set_inheritable(0, False)
    os.set_inheritable(1, False)
    # What started the box may have left more open, which the payload would inherit.
    os.closerange(3, 1024)
    _, _, config = receive()
    Agent(unpack(config)).serve()


if __name__ == "__main__":
    main()
