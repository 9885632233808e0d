"""Checks that use up what a box has, do not end, or are fed too much: it answers in time and works afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from unittest import SkipTest

from posttrain.protocols import Sandbox, Substrate
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox.attempts import PRELUDE
from sandbox.expectations import expect, nothing_runs, python, raises, still_works

SPEC = SandboxSpec(cpus=1.0, memory_mb=64, disk_mb=8, max_processes=16)


async def threads_are_bounded(box: Sandbox) -> None:
    program = """
import _thread, time
n = 0
try:
    while n < 200:
        _thread.start_new_thread(time.sleep, (60,))
        n += 1
finally:
    print(n, flush=True)
"""
    result = await python(box, program)
    expect(0 < int(result.stdout) <= SPEC.max_processes and not result.ok, result)
    expect(result.status in (ExecStatus.PIDS_LIMIT, ExecStatus.EXITED) and result.wall_s < 5, result)
    await nothing_runs(box)


async def many_small_processes_are_one_big_one(substrate: Substrate) -> None:
    """Memory is bounded for the box, whatever the number of its processes, and the agent outlives them."""
    if substrate.capabilities().get("limits") == "rlimit":
        raise SkipTest("without control groups memory is bounded per process (limits)")
    program = """
import os, time
for child in range(12):
    if os.fork() == 0:
        held = b"x" * (20 << 20)
        time.sleep(60)
os._exit(os.wait()[1] != 0)
"""
    async with substrate.open(SPEC) as box:
        result = await python(box, program)
        expect(result.status is ExecStatus.OOM, result)
        await still_works(box)


async def files_are_bounded(box: Sandbox) -> None:
    program = """
import os
os.mkdir("long")
for i in range(20):
    open("long/" + chr(97 + i) * 255, "w").close()
try:
    open("x" * 256, "w")
except OSError as error:
    print(error.errno)
for size in (100 << 30, 1 << 62):
    try:
        os.truncate(os.open("sparse", os.O_CREAT | os.O_WRONLY), size)
        print("sparse")
    except OSError as error:
        print(error.errno)
os.mkdir("deep")
os.chdir("deep")
for i in range(1000):
    os.mkdir("d")
    os.chdir("d")
os.chdir("/work")
os.mkdir("many")
fd = os.open("many", os.O_RDONLY)
n = 0
try:
    while n < 20_000:
        os.close(os.open(str(n), os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        n += 1
except OSError:
    pass
print(n)
"""
    result = await python(box, program, timeout_s=30)
    seen = result.stdout.split()
    expect(result.ok and seen[:3] == [b"36", b"27", b"27"], "names (ENAMETOOLONG), sparse files (EFBIG)", result)
    started = time.monotonic()
    expect(len(await box.list("long")) == 20, "long names")
    await raises(ValueError, box.list(), "deeper than anything")
    expect(len(await box.list("many")) == int(seen[3]) > 0, "many files")
    expect(time.monotonic() - started < 10, "listing took", time.monotonic() - started)
    await still_works(box)


async def descriptors_and_kernel_objects_are_bounded(box: Sandbox) -> None:
    """Descriptors, pipes, sockets, epoll, inotify, timers, System V objects, queues: each ends in an error."""
    program = """
def exhausts(name, make, most=1000):
    made = []
    try:
        while len(made) < most:
            made.append(make())
        print(name, "UNBOUNDED", flush=True)
    except OSError as error:
        print(name, len(made), errno.errorcode.get(error.errno), flush=True)
    for thing in made:
        for fd in thing if isinstance(thing, tuple) else (thing,):
            os.close(fd)

def made(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "not made")
    return result

exhausts("fds", lambda: os.open("/dev/null", os.O_RDONLY))
exhausts("pipes", os.pipe)
exhausts("sockets", lambda: socket.socket().detach())
exhausts("pairs", lambda: tuple(s.detach() for s in socket.socketpair()))
exhausts("epoll", lambda: made(libc.epoll_create1(0)))
exhausts("inotify", lambda: made(libc.inotify_init()))
exhausts("eventfd", lambda: made(libc.eventfd(0, 0)))
exhausts("timerfd", lambda: made(libc.timerfd_create(1, 0)))
exhausts("memfd", lambda: os.memfd_create("m"))
exhausts("queues", lambda: made(libc.mq_open(b"/q", 0o102, 0o600, None)))
# The kernel has no small bound for these; they are memory, which is.
timer = ctypes.c_void_p()
for count in range(2000):
    if libc.timer_create(1, None, ctypes.byref(timer)):
        break
for key in range(1, 2000):
    found = libc.shmget(key, 4096, 0o1600), libc.semget(key, 1, 0o1600), libc.msgget(key, 0o1600)
    if max(found) < 0:
        break
for key in range(1, 2000):
    libc.shmctl(libc.shmget(key, 0, 0), 0, None)
    libc.semctl(libc.semget(key, 0, 0), 0, 0)
    libc.msgctl(libc.msgget(key, 0), 0, None)
"""
    result = await python(box, PRELUDE + program)
    expect(result.ok and b"UNBOUNDED" not in result.stdout and len(result.stdout.splitlines()) == 10, result)
    await still_works(box)


async def pipes_full_of_data_are_memory(box: Sandbox) -> None:
    """What the kernel holds for a payload is bounded too, and gone when the payload is."""
    program = """
import os, signal, time
for child in range(12):
    if os.fork() == 0:
        try:
            while True:
                _, end = os.pipe()
                os.set_blocking(end, False)
                os.write(end, bytes(1 << 16))
        except OSError:
            time.sleep(60)
time.sleep(0.5)
"""
    for _ in range(2):
        result = await python(box, program)
        expect(result.wall_s < 8, result)
        await still_works(box)


async def floods_and_odd_output_are_kept_in_bounds(box: Sandbox) -> None:
    flood = await box.exec("cat /dev/zero & cat /dev/zero >&2", max_output=1000)
    expect(flood.status is ExecStatus.OUTPUT_LIMIT and flood.wall_s < 8, flood.status, flood.wall_s)
    expect(max(len(flood.stdout), len(flood.stderr)) < 1100, len(flood.stdout), len(flood.stderr))
    silent = await box.exec("echo before; exec >&- 2>&-; sleep 60", timeout_s=0.5)
    expect((silent.status, silent.stdout) == (ExecStatus.TIMEOUT, b"before\n") and silent.wall_s < 5, silent)
    odd = bytes([0, 27, 91, 50, 74, 255, 254, 13, 10, 0xC3, 0x28])
    result = await python(box, f"import os; os.write(1, {odd!r}); os.write(2, {odd!r}); os.close(1); os.write(1, b'x')")
    expect(result.stdout == odd and result.stderr.startswith(odd) and result.exit_code == 1, result)
    # Nothing but the two streams leads to the host, whose log would fill.
    away = await box.exec("for f in /proc/1/fd/1 /proc/1/fd/2 /dev/console /dev/kmsg; do echo x > $f && echo $f; done")
    expect(away.stdout == b"", away)
    await still_works(box)


async def dumps_and_big_files_are_refused(box: Sandbox) -> None:
    crashed = await box.exec("ulimit -c unlimited 2>/dev/null && echo raised; ulimit -c; kill -SEGV $$")
    expect((crashed.signal, crashed.stdout) == (11, b"0\n"), crashed)
    expect(await box.list() == [], "a core dump")
    big = await box.exec(["truncate", "-s", "9M", "big"])
    expect(big.signal == 25 or b"File too large" in big.stderr, big)
    await still_works(box)


async def input_is_bounded(box: Sandbox) -> None:
    """Standard input that nobody reads, and what no program can be started with."""
    data = bytes(4 << 20)
    unread = await box.exec("true", stdin=data)
    expect(unread.ok and unread.wall_s < 5, unread)
    never = await box.exec(["sleep", "60"], stdin=data, timeout_s=0.5)
    expect(never.status is ExecStatus.TIMEOUT and never.wall_s < 5, never)
    expect((await box.exec(["wc", "-c"], stdin=data)).stdout == b"%d\n" % len(data), "much input")
    huge = "x" * (3 << 20)
    for argv, env in ((["true", huge], {}), (["true", *["x" * 1000] * 4000], {}), (["true"], {"BIG": huge})):
        result = await box.exec(argv, env=env)
        expect(result.exit_code == 126 and b"too long" in result.stderr, result)
    much = await box.exec("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2")
    expect((len(much.stdout), len(much.stderr)) == (1_000_000, 1_000_000), "a large reply")
    await still_works(box)


async def stubborn_processes_die(box: Sandbox) -> None:
    """Deaf to signals, stopped, traced, forked twice, waiting for who has borrowed its memory, never waited for."""
    program = """
import ctypes, os, signal, time
libc = ctypes.CDLL(None)
def child(action):
    if os.fork() == 0:
        action()
        time.sleep(60)
        os._exit(0)
def deaf():
    for number in signal.valid_signals():
        try: signal.signal(number, signal.SIG_IGN)
        except OSError: pass
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
def daemon():
    os.setsid()
    if os.fork() == 0:
        os.setsid()
        for fd in range(3): os.close(fd)
def lends():
    if libc.vfork() == 0:
        time.sleep(60)
# First, since gVisor hangs up on the others of a group in which one has stopped.
deaf()
child(lambda: os.kill(os.getpid(), signal.SIGSTOP))
child(lambda: libc.ptrace(0, 0, 0, 0) or os.kill(os.getpid(), signal.SIGSTOP))
child(daemon)
child(lends)
for zombie in range(4):
    if os.fork() == 0: os._exit(0)
print("ready", flush=True)
time.sleep(60)
"""
    result = await python(box, program, timeout_s=1.0)
    expect((result.status, result.stdout) == (ExecStatus.TIMEOUT, b"ready\n") and result.wall_s < 6, result)
    await nothing_runs(box)
    orphans = await box.exec("for i in 1 2 3 4 5 6; do (setsid true &); done")
    expect(orphans.ok, orphans)
    await nothing_runs(box)


async def neighbours_stay_quick(substrate: Substrate) -> None:
    """A box that spins on all it has leaves another one able to answer."""
    async with substrate.open(SPEC) as noisy, substrate.open(SPEC) as quiet:
        spinning = asyncio.create_task(
            noisy.exec("for i in 1 2 3 4 5 6; do (while :; do :; done) & done; wait", timeout_s=1.5)
        )
        times = []
        while not spinning.done():
            times.append(await _time_of(quiet.exec("true")))
            await asyncio.sleep(0.05)
        expect((await spinning).status is ExecStatus.TIMEOUT and max(times) < 3.0, times)
        await nothing_runs(noisy)


async def _time_of(attempt: Awaitable[ExecResult]) -> float:
    started = time.monotonic()
    expect((await attempt).ok, "a command")
    return time.monotonic() - started


LIMIT_CHECKS: tuple[Callable[[Sandbox], Awaitable[None]], ...] = (
    threads_are_bounded,
    files_are_bounded,
    descriptors_and_kernel_objects_are_bounded,
    pipes_full_of_data_are_memory,
    floods_and_odd_output_are_kept_in_bounds,
    dumps_and_big_files_are_refused,
    input_is_bounded,
    stubborn_processes_die,
)
LIMIT_WHOLE: tuple[Callable[[Substrate], Coroutine[Any, Any, None]], ...] = (
    many_small_processes_are_one_big_one,
    neighbours_stay_quick,
)
