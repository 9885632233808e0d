"""A fork server for Python: a part of the agent that is sent when it is first needed.

Starting an interpreter costs more than most snippets do. The agent therefore keeps one more process, a started
interpreter which knows nothing of any call, and which forks for each one. The fork takes a payload uid and a directory
of its own before it looks at anything that belongs to the call, program and arguments included: those come in a memory
file which the fork server passes on unread, so that nothing of one call is left in the memory the next is forked from.

One call runs at a time. After it everything on its uid is killed, what it wrote is deleted, and the agent looks for
what a call could leave behind; if there is something, the reply says so and the box is not to be used again.
"""

from __future__ import annotations

import os
import resource
import select
import stat
import sys
import time

from sandbox.agent import (
    KILL_DEADLINE_S,
    MAX_DEPTH,
    OK,
    READABLE,
    Agent,
    Command,
    drop_rights,
    pack,
    read_env,
    restore_signals,
    send,
    signal_all,
    unpack,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CALL = 22

WRITABLE = tuple(path for path in ("/tmp", "/dev/shm") if os.path.isdir(path))  # noqa: PTH112 (it is slow to import)
"""What a payload can write to, beside the workdir."""
MAX_REMOVED = 2000
MESSAGE_BYTES = 4096
NO_SLOT = -1
"""Sent as the status of a call for which there was no process slot."""
PRELOADED = (
    "array bisect collections contextlib copy dataclasses datetime decimal enum fractions functools heapq io itertools "
    "json math operator random re statistics string textwrap time traceback typing"
)


def install(agent: Agent) -> None:
    if CALL not in agent.handlers:
        server = ForkServer(agent)
        agent.handlers[CALL] = server.start


class ForkServer:
    """The agent's side."""

    def __init__(self, agent: Agent) -> None:
        import _socket

        self.agent = agent
        self.call: Call | None = None
        self.count = 0
        ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        if agent.fork() == 0:
            try:
                serve_forks(agent, theirs.fileno())
            except BaseException as error:  # noqa: BLE001 (a fork must never return into the loop of the agent)
                os.write(2, b"sandbox: " + os.fsencode(repr(error)) + b"\n")
            finally:
                os._exit(1)
        theirs.close()
        self.socket = ours
        agent.streams[ours.fileno()] = (self, 0)  # type: ignore[assignment]
        agent.poller.register(ours.fileno(), READABLE)

    def pump(self, fd: int, which: int) -> None:
        """Take the end of a call."""
        message = self.socket.recv(MESSAGE_BYTES)
        if not message:
            # Without its fork server the box is of no use.
            os._exit(71)
        status, cpu_us, rss_kib = (int(field) for field in unpack(message))
        if self.call is None:
            return
        if status == NO_SLOT:
            self.call.verdict = self.call.verdict or "pids_limit"
        self.call.cpu_s += cpu_us / 1e6
        self.call.max_rss_kib = max(self.call.max_rss_kib, rss_kib)
        self.call.wait_status = max(status, 0)

    def start(self, op: int, fields: list[bytes]) -> None:
        """Run a program: time limit, output cap, standard input, and what the fork reads for itself."""
        if self.call:
            raise ValueError("one call at a time")
        timeout_us, cap, stdin, program = int(fields[0]), int(fields[1]), fields[2], fields[3]
        before = leftovers(self.agent.workdir)
        ends = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        memory = os.memfd_create("call", os.MFD_CLOEXEC)
        view = memoryview(program)
        while view:
            view = view[os.write(memory, view) :]
        # The uids take turns, so that whatever a call should leave behind in spite of all is not the next one's own.
        slot = self.agent.free_slots.pop(self.count % len(self.agent.free_slots))
        uid = self.agent.first_uid + slot
        self.count += 1
        passed = (ends[0][0], ends[1][1], ends[2][1], memory)
        rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in passed)
        self.socket.sendmsg([pack(uid, self.count)], [(1, 1, rights)])
        for fd in passed:
            os.close(fd)
        self.call = Call(self, op, slot, uid, cap=cap, stdin=stdin, before=before)
        self.call.deadline = self.call.started + timeout_us / 1e6
        for which, fd in enumerate((ends[0][1], ends[1][0], ends[2][0])):
            self.call.watch(fd, which, select.POLLOUT if which == 0 else READABLE)
        if not stdin:
            self.call.drop(ends[0][1])


class Call(Command):
    """One call of the fork server. The forked process is the fork server's child, which reports how it ended."""

    def __init__(
        self, server: ForkServer, op: int, slot: int, uid: int, *, cap: int, stdin: bytes, before: set[str]
    ) -> None:
        super().__init__(server.agent, op, slot, uid, 0, cap=cap, stdin=stdin)
        self.server = server
        self.before = before

    def stop(self) -> None:
        # The fork server reports a call that is killed, too. A fork that has not taken its uid yet is missed at first.
        deadline = time.monotonic() + KILL_DEADLINE_S
        poller = select.poll()
        poller.register(self.server.socket.fileno(), READABLE)
        while self.wait_status is None:
            signal_all(self.uid)
            if poller.poll(1):
                self.server.pump(0, 0)
            elif time.monotonic() > deadline:
                os._exit(70)
        super().stop()

    def finish(self) -> None:
        self.stop()
        self.server.call = None
        body = self.result()
        send(self.op, OK, body + pack(self.clean()))

    def clean(self) -> str:
        """Delete what the call wrote. Says what is wrong with the box; empty when it may be used again."""
        agent = self.agent
        os.setegid(agent.gid)
        os.seteuid(self.uid)
        try:
            budget = [MAX_REMOVED]
            for path in (agent.workdir, *WRITABLE):
                folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    empty(folder, self.uid, budget)
                finally:
                    os.close(folder)
        except (OSError, ValueError) as problem:
            return f"it could not be cleaned: {problem}"
        finally:
            os.seteuid(0)
            os.setegid(0)
        left = leftovers(agent.workdir) - self.before
        return f"the call left {sorted(left)[:3]} behind" if left else ""


def empty(folder: int, uid: int, budget: list[int], depth: int = 0) -> None:
    """Delete what a uid owns in an open directory. Nobody else writes there meanwhile."""
    if depth > MAX_DEPTH:
        raise ValueError(f"directories nest deeper than {MAX_DEPTH}")
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    for name, status in found:
        if status.st_uid != uid:
            continue
        budget[0] -= 1
        if budget[0] < 0:
            raise ValueError(f"more than {MAX_REMOVED} files")
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=folder)
            continue
        if status.st_mode & 0o700 != 0o700:
            os.chmod(name, 0o700, dir_fd=folder)
        inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            empty(inner, uid, budget, depth + 1)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=folder)


def leftovers(workdir: str) -> set[str]:
    """What there is in the places a call can write to, System V objects included."""
    found = {f"{path}/{name}" for path in (workdir, *WRITABLE) for name in os.listdir(path)}  # noqa: PTH208
    for kind in ("shm", "sem", "msg"):
        try:
            fd = os.open(f"/proc/sysvipc/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return found | count_system_v()
        try:
            rows = os.read(fd, MESSAGE_BYTES).splitlines()[1:]
        finally:
            os.close(fd)
        found.update(f"{kind} {os.fsdecode(row)}" for row in rows)
    return found


def count_system_v() -> set[str]:
    """How many System V objects of each kind there are, for gVisor, which counts them and lists none."""
    import ctypes

    libc = ctypes.CDLL(None)
    info = (ctypes.c_int * 32)()
    found = set()
    # SHM_INFO, SEM_INFO and MSG_INFO, and where each of them puts the number.
    for kind, arguments, at in (("shm", (0, 14), 0), ("sem", (0, 0, 19), 7), ("msg", (0, 12), 0)):
        if getattr(libc, kind + "ctl")(*arguments, info) >= 0 and info[at]:
            found.add(f"{kind} {info[at]}")
    return found


def serve_forks(agent: Agent, control: int) -> None:
    """The fork server: one call after the other, until the agent is gone."""
    null = os.open(os.devnull, os.O_RDWR)
    for target in (0, 1, 2):
        os.dup2(null, target)
    os.dup2(control, 3, inheritable=False)
    # Neither the channel to the host nor a pipe of a command started earlier.
    os.closerange(4, 1 << 20)
    import _signal
    import _socket
    import gc
    import site

    restore_signals()
    # What Python sets for itself, unless it was started with them ignored.
    _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    _signal.signal(_signal.SIGPIPE, _signal.SIG_IGN)
    _signal.signal(_signal.SIGXFSZ, _signal.SIG_IGN)
    site.main()
    for name in PRELOADED.split():
        __import__(name)
    control_socket = _socket.socket(fileno=3)
    gc.collect()
    gc.freeze()
    while True:
        message, rights, _, _ = control_socket.recvmsg(MESSAGE_BYTES, 256)
        if not message:
            os._exit(0)
        data = rights[0][2]
        fds = [int.from_bytes(data[at : at + 4], sys.byteorder) for at in range(0, len(data), 4)]
        uid, number = (int(field) for field in unpack(message))
        reply = serve_one(agent, uid, number, fds)
        control_socket.send(reply)


def serve_one(agent: Agent, uid: int, number: int, fds: list[int]) -> bytes:
    """Fork for a call and wait for its end: the message to the agent."""
    try:
        pid = os.fork()
    except BlockingIOError:
        pid = NO_SLOT
    if pid == 0:
        try:
            become_call(agent, uid, number, fds)
        except BaseException as error:  # noqa: BLE001 (a fork must never return into the fork server)
            os.write(2, b"sandbox: " + os.fsencode(repr(error)) + b"\n")
        finally:
            os._exit(126)
    for fd in fds:
        os.close(fd)
    if pid == NO_SLOT:
        return pack(NO_SLOT, 0, 0)
    _, status, usage = os.wait4(pid, 0)
    return pack(status, int((usage.ru_utime + usage.ru_stime) * 1e6), usage.ru_maxrss)


def become_call(agent: Agent, uid: int, number: int, fds: list[int]) -> None:
    """Turn the forked child into the payload, and only then read what it is to do. Never returns."""
    import contextlib

    # No queue can be left behind where nobody looks. gVisor has no such limit; the box's filter refuses queues there.
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_MSGQUEUE, (0, 0))
    drop_rights(agent, (uid, 0), (fds[0], fds[1], fds[2]))
    os.dup2(fds[3], 3)
    os.closerange(4, 256)
    folder = f"{agent.workdir}/call-{number}-{os.urandom(4).hex()}"
    os.mkdir(folder, 0o700)  # noqa: PTH102 (pathlib costs 5 ms to import)
    os.chdir(folder)
    size = os.fstat(3).st_size
    program = os.pread(3, size, 0)
    os.close(3)
    source, num_args, *rest = unpack(program)
    args = [os.fsdecode(arg) for arg in rest[: int(num_args)]]
    env = {os.fsdecode(name): os.fsdecode(value) for name, value in read_env(rest[int(num_args) :]).items()}
    os.environ.clear()
    os.environ.update({**env, "HOME": folder})
    os._exit(run_main(source, args))


def run_main(source: bytes, args: list[str]) -> int:
    """What ``python3 -I -c SOURCE ARGS`` does, up to its exit code."""
    sys.argv = ["-c", *args]
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape")  # noqa: SIM115 (a descriptor, and for good)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    for name in ("sandbox.agent", "sandbox"):
        sys.modules.pop(name, None)
    code = 0
    try:
        exec(compile(source, "<string>", "exec"), main.__dict__)
    except BaseException as error:  # noqa: BLE001 (the interpreter's own last line of defence)
        code = exit_code(error)
    try:
        finalize()
    except BaseException as error:  # noqa: BLE001
        code = exit_code(error)
    return code & 255


def exit_code(error: BaseException) -> int:
    """Report an exception as the interpreter does: the exit code it leads to."""
    if isinstance(error, SystemExit):
        value: Any = error.code
        if value is None or isinstance(value, int):
            return value or 0
        sys.stderr.write(f"{value}\n")
        return 1
    trace = error.__traceback__.tb_next if error.__traceback__ else None
    # Without the frame of this module.
    sys.excepthook(type(error), error.with_traceback(trace), trace)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def finalize() -> None:
    """Wait for threads, run what was registered for the end, write what is buffered."""
    threading = sys.modules.get("threading")
    if threading:
        threading._shutdown()
    import atexit

    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
