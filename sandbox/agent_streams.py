"""Shell sessions and jobs with streamed output: a part of the agent that is sent when it is first needed.

A session is a bash that reads commands from a private descriptor and evaluates each in itself, so that directory,
variables and functions stay. After a command it reads a nonce from the same descriptor, which the agent wrote there
behind the command, and writes it with the status to a second one. Nothing is guessed from output or prompts. The
programs a command starts have neither descriptor; the shell itself could be made to forge the end of its own command,
which fools nobody but itself: what the agent reports of a session is the payload's own word, as all output is.

A job is one program whose output goes to the host as it comes, in a window: what the host has not taken is not read,
so a program that writes faster than the host takes waits at its pipe.
"""

from __future__ import annotations

import errno
import os
import select
import time

from sandbox.agent import (
    CHUNK,
    EVENT,
    FAILED,
    FLOOD_BYTES,
    FOREVER,
    OK,
    READABLE,
    SIGKILL,
    Agent,
    Capture,
    Guest,
    is_full,
    pack,
    pack_result,
    read_available,
    read_env,
    send,
)

SPAWN, FEED, CREDIT, SIGNAL, RESIZE, SESSION, RUN, CLOSE = range(14, 22)

WINDOW = 1 << 18
"""Bytes of a job's output on their way to the host."""
FEED_CAP = 1 << 20
"""Bytes of a job's input that wait in the agent."""
IDLE_CAP = 1 << 16
"""Output between two commands that is kept for the next one's result, per stream."""
GRACE_S = 1.0
"""Between interrupting a session's command, killing what it runs, and killing the shell."""
SIGINT = 2
TIOCSWINSZ = 0x5414
COMMAND_FD, STATUS_FD = 201, 202
SHELL = b"""\
__sh_loop='
while { IFS= builtin read -rd "" -u 201 __sh_item || builtin exit 0; } >/dev/null 2>&1; do
  if { [[ $__sh_item == c* ]]; } >/dev/null 2>&1; then
    { LC_ALL=C builtin read -rN "${__sh_item#c}" -u 201 __sh_item; } >/dev/null 2>&1
    { [[ $- == *e* ]] || __sh_return; } >/dev/null 2>&1
    builtin eval "$__sh_item" 201<&- 202>&-
    { __sh_status=$?; } >/dev/null 2>&1
  else
    { builtin printf "%s %s\\n" "${__sh_item#n}" "$__sh_status" >&202; } >/dev/null 2>&1
  fi
done
{ __sh_status=130; } >/dev/null 2>&1
builtin eval "$__sh_loop"
'
__sh_status=0
__sh_return() { builtin return "$__sh_status"; }
builtin trap "builtin break 999" INT
builtin eval "$__sh_loop"
"""
"""Items end with NUL: "c" and the size of the command that follows, or "n" and a nonce. By size, since bash reads what
ends at a delimiter byte by byte. The groups keep traps and traces off the output. An interrupt breaks every loop, the
command's and this one, which then starts again at the next item."""


def install(agent: Agent) -> None:
    agent.handlers.update(
        {
            SPAWN: lambda op, fields: start_job(agent, op, fields),
            FEED: lambda op, fields: _job(agent, fields).feed(op, fields[1], fields[2] == b"1"),
            CREDIT: lambda op, fields: credit(agent, fields),
            SIGNAL: lambda op, fields: signal_guest(agent, op, fields),
            RESIZE: lambda op, fields: _job(agent, fields).resize(op, int(fields[1]), int(fields[2])),
            SESSION: lambda op, fields: start_session(agent, op, fields),
            RUN: lambda op, fields: _session(agent, fields).start(op, fields),
            CLOSE: lambda op, fields: close(agent, op, fields),
        }
    )


def _find(agent: Agent, fields: list[bytes]) -> Guest:
    guest = agent.ops.get(int(fields[0]))
    if guest is None:
        raise OSError(errno.ESRCH, "it has ended")
    return guest


def _job(agent: Agent, fields: list[bytes]) -> Job:
    guest = _find(agent, fields)
    assert isinstance(guest, Job)
    return guest


def _session(agent: Agent, fields: list[bytes]) -> Session:
    guest = _find(agent, fields)
    assert isinstance(guest, Session)
    return guest


def close(agent: Agent, op: int, fields: list[bytes]) -> None:
    guest = agent.ops.get(int(fields[0]))
    if isinstance(guest, Session):
        guest.finish("closed")
    send(op, OK)


def credit(agent: Agent, fields: list[bytes]) -> None:
    """The host has taken this many bytes of output. It expects no answer, and the job may have ended."""
    guest = agent.ops.get(int(fields[0]))
    if isinstance(guest, Job):
        guest.grant(int(fields[1]))


def signal_guest(agent: Agent, op: int, fields: list[bytes]) -> None:
    """Interrupt the process group of a guest, or kill everything it has."""
    guest = _find(agent, fields)
    if int(fields[1]) == SIGKILL:
        if guest.wait_status is None:
            # By its pid too, since it may not have taken its uid yet.
            os.kill(guest.pid, SIGKILL)
        agent.strike(guest)
    elif not isinstance(guest, Session) or guest.run_op:
        signal_group(guest, int(fields[1]))
    send(op, OK)


def signal_group(guest: Guest, number: int) -> None:
    """With the payload's rights, so that no reused number can hit anybody else."""
    os.seteuid(guest.uid)
    try:
        os.kill(-guest.pid, number)
    except (ProcessLookupError, PermissionError):
        return
    finally:
        os.seteuid(0)


def start_session(agent: Agent, op: int, fields: list[bytes]) -> None:
    cwd, user, env = fields[0], fields[1], read_env(fields[2:])
    command, status, out, err = (os.pipe2(os.O_CLOEXEC) for _ in range(4))
    ours = (command[1], status[0], out[0], err[0])
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    argv = [b"bash", b"--norc", b"--noprofile", b"-c", SHELL, b"bash"]
    started = None
    try:
        extra = {COMMAND_FD: command[0], STATUS_FD: status[1]}
        started = agent.launch(argv, env, cwd, (null, out[1], err[1]), user, extra)
    finally:
        if started is None:
            for fd in ours:
                os.close(fd)
    if started is None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    Session(agent, op, *started, ours)
    send(op, OK)


class Session(Guest):
    """A bash and whatever its commands leave running."""

    def __init__(self, agent: Agent, op: int, slot: int, uid: int, pid: int, fds: tuple[int, int, int, int]) -> None:
        super().__init__(agent, op, slot, uid, pid)
        self.captures = [Capture(IDLE_CAP), Capture(IDLE_CAP)]
        self.command_fd = fds[0]
        self.unsent = b""
        self.status = b""
        self.run_op = 0
        """The operation of the command that runs; 0 when none does."""
        self.nonce = b""
        self.force = 0
        """How far ending the command has come: 0, interrupted, all but the shell killed."""
        for which, fd in ((4, fds[1]), (1, fds[2]), (2, fds[3])):
            self.watch(fd, which)
        os.set_blocking(self.command_fd, False)

    def start(self, op: int, fields: list[bytes]) -> None:
        """Run one command."""
        if self.run_op:
            raise ValueError("the session is running another command")
        timeout_us, cap, command = int(fields[1]), int(fields[2]), fields[3]
        idle = [capture.value() for capture in self.captures]
        self.captures = [Capture(cap), Capture(cap)]
        for capture, data in zip(self.captures, idle, strict=True):
            capture.feed(data)
        self.run_op = op
        self.agent.ops[op] = self
        self.nonce = os.urandom(16).hex().encode()
        self.verdict, self.force, self.status = "", 0, b""
        self.started = time.monotonic()
        self.deadline = self.started + timeout_us / 1e6
        self.unsent += b"c%d\0%s\nn%s\0" % (len(command) + 1, command, self.nonce)
        self.watch(self.command_fd, 5, select.POLLOUT)

    def pump(self, fd: int, which: int) -> None:
        if which == 5:
            self._send_command(fd)
        elif which == 4:
            self._read_status(fd)
        else:
            super().pump(fd, which)
            if self.dropped() > FLOOD_BYTES:
                self.verdict = self.verdict or "output_limit"

    def _send_command(self, fd: int) -> None:
        try:
            self.unsent = self.unsent[os.write(fd, self.unsent[:CHUNK]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.unsent = b""
        if not self.unsent:
            self._release(fd)

    def _release(self, fd: int) -> None:
        """Stop watching a descriptor, and keep it."""
        self.fds.remove(fd)
        del self.agent.streams[fd]
        self.unwatch(fd)

    def _read_status(self, fd: int) -> None:
        data = read_available(fd)
        if data == b"":
            self.drop(fd)
        elif data and self.run_op:
            # Whatever else was written there is skipped: only a line with the nonce counts.
            self.status = (self.status + data)[-CHUNK:]
            _, found, rest = self.status.partition(self.nonce + b" ")
            code, ended, _ = rest.partition(b"\n")
            if found and ended and code.isdigit():
                self._answer(int(code) & 255)

    def _answer(self, code: int) -> None:
        for fd, (guest, which) in list(self.agent.streams.items()):
            # What the command wrote is in the pipes by now. A background child may go on writing; one pipe's worth is
            # what was there.
            if guest is self and which in (1, 2):
                super().pump(fd, which)
        self._reply(code << 8, alive=True)

    def _reply(self, wait_status: int, alive: bool) -> None:
        verdict = self.verdict
        body = pack_result(
            verdict,
            wait_status,
            outputs=[capture.value() for capture in self.captures],
            dropped=self.dropped(),
            wall_s=time.monotonic() - self.started,
            disk_full=is_full(self.agent.workdir) or is_full("/tmp"),
        )
        self.agent.ops.pop(self.run_op, None)
        op, self.run_op, self.verdict, self.deadline = self.run_op, 0, "", FOREVER
        self.captures = [Capture(IDLE_CAP), Capture(IDLE_CAP)]
        if self.command_fd in self.agent.streams:
            self.unsent = b""
            self._release(self.command_fd)
        send(op, OK, body + pack(int(alive)))

    def tick(self, now: float) -> None:
        if self.wait_status is not None:
            self.finish("ended")
        elif not self.run_op:
            if self.verdict:
                self.finish(self.verdict)
        else:
            if now >= self.deadline and not self.verdict:
                self.verdict = "timeout"
            if self.verdict:
                self._end_command(now)

    def _end_command(self, now: float) -> None:
        """Interrupt it; should that not do, kill all but the shell; should that not do either, end the session."""
        if self.force and now < self.deadline:
            return
        if self.force == 2:
            self.finish(self.verdict)
            return
        if self.force == 1:
            os.seteuid(self.uid)
            try:
                for pid in self.agent.processes(self):
                    if pid != self.pid:
                        kill_quietly(pid)
            finally:
                os.seteuid(0)
        else:
            signal_group(self, SIGINT)
        self.force += 1
        self.deadline = now + GRACE_S

    def finish(self, reason: str) -> None:
        if reason == "closed":
            self.verdict = "cancelled"
        if self.command_fd not in self.fds:
            # It is closed with the others.
            self.fds.append(self.command_fd)
            self.agent.streams[self.command_fd] = (self, 5)
        self.stop()
        if self.run_op:
            self._reply(self.wait_status or 0, alive=False)
        send(self.op, EVENT, pack("ended", reason))


def kill_quietly(pid: int) -> None:
    try:
        os.kill(pid, SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def start_job(agent: Agent, op: int, fields: list[bytes]) -> None:
    timeout_us, num_args, cwd, user, size = int(fields[0]), int(fields[1]), *fields[2:5]
    argv, env = fields[5 : 5 + num_args], read_env(fields[5 + num_args :])
    if size:
        ours, stdio = open_terminal(size)
    else:
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        ours, stdio = (ends[0][1], ends[1][0], ends[2][0]), (ends[0][0], ends[1][1], ends[2][1])
    started = None
    try:
        started = agent.launch(argv, env, cwd, stdio, user, terminal=bool(size))
    finally:
        if started is None:
            for fd in ours:
                os.close(fd)
    if started is None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    job = Job(agent, op, *started, ours, bool(size))
    job.deadline = job.started + timeout_us / 1e6 if timeout_us else FOREVER
    send(op, EVENT, pack("started"))


def open_terminal(size: bytes) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Both sides of a new pseudo-terminal: ours to write and to read, and the program's three streams."""
    master, slave = os.openpty()
    rows, columns = (int(part) for part in size.split(b"x"))
    set_size(master, rows, columns)
    return (os.dup(master), master), (slave, slave, slave)


def set_size(fd: int, rows: int, columns: int) -> None:
    import fcntl

    fcntl.ioctl(fd, TIOCSWINSZ, rows.to_bytes(2, "little") + columns.to_bytes(2, "little") + bytes(4))


class Job(Guest):
    """One program whose output is streamed."""

    def __init__(
        self, agent: Agent, op: int, slot: int, uid: int, pid: int, ours: tuple[int, ...], terminal: bool
    ) -> None:
        super().__init__(agent, op, slot, uid, pid)
        self.terminal = terminal
        self.stdin_fd: int = ours[0]
        os.set_blocking(self.stdin_fd, False)
        self.fds.append(self.stdin_fd)
        agent.streams[self.stdin_fd] = (self, 0)
        self.queue: list[tuple[int, memoryview, bool]] = []
        """Input to write: the operation to answer when it is written, the bytes, whether the input ends with it."""
        self.window = WINDOW
        self.paused = False
        for which, fd in enumerate(ours[1:], start=1):
            self.watch(fd, which)

    def pump(self, fd: int, which: int) -> None:
        if which == 0:
            self._write(fd)
        elif which == 3:
            super().pump(fd, which)
        else:
            self._read(fd, which)

    def _read(self, fd: int, which: int) -> None:
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:
            # A terminal reports the end of its last program as an error.
            data = b""
        if not data:
            self.drop(fd)
            return
        send(self.op, EVENT, pack("output", which, data))
        self.window -= len(data)
        if self.window <= 0 and not self.paused:
            self._pause(True)

    def _pause(self, paused: bool) -> None:
        """A descriptor that is not to be read is not watched at all, since its end would be reported all the time."""
        self.paused = paused
        for fd in self.fds:
            if self.agent.streams[fd][1] in (1, 2):
                if paused:
                    self.unwatch(fd)
                else:
                    self.agent.poller.register(fd, READABLE)

    def grant(self, size: int) -> None:
        self.window += size
        if self.window > 0 and self.paused:
            self._pause(False)

    def feed(self, op: int, data: bytes, ends: bool) -> None:
        if self.stdin_fd < 0:
            raise BrokenPipeError(errno.EPIPE, "standard input is closed")
        if sum(len(item[1]) for item in self.queue) > FEED_CAP:
            raise BlockingIOError(errno.EAGAIN, "too much input is waiting already")
        if ends and self.terminal:
            # Ctrl-D, which ends the input of whoever reads the terminal.
            data, ends = data + b"\x04", False
        if not self.queue:
            self.agent.poller.register(self.stdin_fd, select.POLLOUT)
        self.queue.append((op, memoryview(data), ends))

    def _write(self, fd: int) -> None:
        op, data, ends = self.queue[0]
        try:
            data = data[os.write(fd, data[:CHUNK]) :] if data else data
        except BlockingIOError:
            return
        except OSError:
            self._close_input()
            return
        self.queue[0] = (op, data, ends)
        if data:
            return
        del self.queue[0]
        send(op, OK)
        if ends:
            self._close_input()
        elif not self.queue:
            self.unwatch(fd)

    def _close_input(self) -> None:
        """Nothing can be written any more: answer whoever waits for it."""
        fd, self.stdin_fd = self.stdin_fd, -1
        if fd < 0:
            return
        for op, _, _ in self.queue:
            send(op, FAILED, pack(errno.EPIPE, os.strerror(errno.EPIPE)))
        self.queue = []
        self.fds.remove(fd)
        del self.agent.streams[fd]
        self.unwatch(fd)
        os.close(fd)

    def resize(self, op: int, rows: int, columns: int) -> None:
        if not self.terminal:
            raise ValueError("the job has no terminal")
        set_size(self.stdin_fd, rows, columns)
        send(op, OK)

    def tick(self, now: float) -> None:
        if self.wait_status is None and not self.verdict and now >= self.deadline:
            self.verdict = "timeout"
        if self.verdict or self.wait_status is not None:
            self._close_input()
            if self.paused:
                self._pause(False)
            self.stop()
            send(self.op, OK, self.result())
