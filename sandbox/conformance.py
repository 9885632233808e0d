"""What every kind of box must do. ``python -m sandbox.conformance process`` runs it on this machine.

Besides ``process``, ``container`` and ``gvisor`` it takes ``module:attribute``, a substrate of your own: its class or
a value.
Each check opens a box of its own, attacks or exercises it, and asserts; afterwards the next command must still work
wherever the box is meant to survive. ``sandbox.checklist`` says which attack is covered by which check. Limits are
small, so that a bomb is bounded by the box, not by the machine: a box that does not isolate lets the checks bomb the
machine and kill this user's processes.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import pickle
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any
from unittest import SkipTest

from posttrain.errors import RecipeError, SandboxError, SandboxLost
from posttrain.protocols import Sandbox, Substrate
from posttrain.types import ExecStatus, SandboxSpec
from sandbox import leaks, owners
from sandbox.conformance_agent import AGENT_CHECKS, AGENT_WHOLE
from sandbox.conformance_escape import ESCAPE_CHECKS, ESCAPE_WHOLE
from sandbox.conformance_files import FILE_CHECKS
from sandbox.conformance_life import LIFE_CHECKS, LIFE_WHOLE
from sandbox.conformance_limits import LIMIT_CHECKS, LIMIT_WHOLE
from sandbox.conformance_users import USER_CHECKS, USER_WHOLE
from sandbox.container import Container
from sandbox.expectations import RIGHTS, expect, has_no_rights, nothing_runs, python, raises, still_works
from sandbox.function import Function
from sandbox.gvisor import Gvisor
from sandbox.pool import close_pools
from sandbox.process import Process
from sandbox.qemu import FullVM, MicroVM

SPEC = SandboxSpec(cpus=1.0, memory_mb=64, disk_mb=8, max_processes=16, timeout_s=10.0)
CHECK_DEADLINE_S = 60.0
LEFT_DEADLINE_S = 5.0
KINDS: Mapping[str, Substrate] = {
    "process": Process(),
    "container": Container(),
    "function": Function(warm=1),
    "gvisor": Gvisor(),
    "microvm": MicroVM(),
    "fullvm": FullVM(),
}
Check = Callable[[Sandbox], Awaitable[None]]


async def bytes_survive(box: Sandbox) -> None:
    data = bytes(range(256)) * 300
    await box.write("deep/er/file.bin", data)
    expect(await box.read("deep/er/file.bin") == data, "read differs from what was written")
    expect((await box.exec(["cat"], stdin=data)).stdout == data, "stdout differs from stdin")
    expect(await box.list() == ["deep/er/file.bin"], await box.list())


async def results_are_typed(box: Sandbox) -> None:
    failed = await box.exec("echo out; echo err >&2; exit 3")
    expect((failed.status, failed.exit_code) == (ExecStatus.EXITED, 3), failed)
    expect((failed.stdout, failed.stderr) == (b"out\n", b"err\n"), failed)
    signaled = await box.exec("kill -SEGV $$")
    expect((signaled.status, signaled.signal, signaled.exit_code) == (ExecStatus.SIGNALED, 11, None), signaled)
    expect((await box.exec(["no-such-program"])).exit_code == 127, "a missing program is exit code 127")
    expect((await box.exec('echo "$KEY"', env={"KEY": "a=b"})).stdout == b"a=b\n", "env")


async def timeout_kills_the_tree(box: Sandbox) -> None:
    script = "echo before; setsid sh -c 'trap \"\" TERM; while :; do date +%N > beat; done' & trap '' TERM; sleep 60"
    result = await box.exec(script, timeout_s=1.0)
    expect(result.status is ExecStatus.TIMEOUT and result.stdout == b"before\n", result)
    expect(result.wall_s < 6, result.wall_s)
    await nothing_runs(box)


async def background_child_does_not_block(box: Sandbox) -> None:
    result = await box.exec("setsid sleep 60 & echo done")
    expect(result.ok and result.stdout == b"done\n" and result.wall_s < 5, result)
    await nothing_runs(box)


async def concurrent_commands_are_apart(box: Sandbox) -> None:
    slow = asyncio.create_task(box.exec("sleep 1; echo slow"))
    await asyncio.sleep(0.2)
    quick = await box.exec("kill -9 -1; echo quick")
    result = await slow
    expect(result.ok and result.stdout == b"slow\n", result, quick)


async def cancelling_kills(box: Sandbox) -> None:
    running = asyncio.create_task(box.exec("setsid sleep 60 & sleep 60"))
    await asyncio.sleep(0.3)
    running.cancel()
    await asyncio.wait({running})
    expect(running.cancelled(), running)
    await nothing_runs(box)


async def output_is_capped(box: Sandbox) -> None:
    result = await box.exec("echo first; seq 1 20000; echo last", max_output=1000)
    expect(result.ok and result.truncated_bytes > 100_000, result.status, result.truncated_bytes)
    expect(result.stdout.startswith(b"first\n") and result.stdout.endswith(b"last\n"), result.stdout)
    expect(len(result.stdout) < 1100, len(result.stdout))
    flood = await box.exec(["yes"], max_output=1000)
    expect(flood.status is ExecStatus.OUTPUT_LIMIT and len(flood.stdout) < 1100, flood.status)
    await still_works(box)


async def a_command_runs_where_it_should(box: Sandbox) -> None:
    await box.write("deep/er/here", b"")
    result = await box.exec("pwd; ls", cwd="deep/er")
    expect(result.stdout.endswith(b"/deep/er\nhere\n"), result)
    await box.exec("ln -s /tmp away; ln -s deep near")
    for refused in ("away", "near/er", "deep/er/here"):
        await raises(OSError, box.exec("true", cwd=refused), refused)
    await raises(FileNotFoundError, box.exec("true", cwd="absent"), "absent")
    for refused in ("/tmp", "..", "deep/../.."):
        await raises(ValueError, box.exec("true", cwd=refused), refused)
    await still_works(box)


async def usage_is_measured(box: Sandbox) -> None:
    spin = "import time\nx = b'x' * 30_000_000\nt = time.process_time()\nwhile time.process_time() < t + 0.3: pass"
    result = await box.exec(["sh", "-c", f'python3 -I -S -c "{spin}"'])
    if result.cpu_s is None or result.max_rss_bytes is None:
        raise SkipTest("this kind of box measures neither CPU nor memory")
    expect(0.3 <= result.cpu_s < result.wall_s + 0.1 and result.max_rss_bytes > 30_000_000, result)
    orphan = await box.exec(["sh", "-c", f'(setsid python3 -I -S -c "{spin}" &); sleep 2'])
    expect((orphan.cpu_s or 0) >= 0.3, orphan)
    quiet = await box.exec("true")
    expect((quiet.cpu_s or 0) < 0.7 * result.cpu_s and (quiet.max_rss_bytes or 0) < 25_000_000, quiet)


async def no_network(box: Sandbox) -> None:
    program = """
import socket, errno
def refused(family, kind, address):
    try:
        s = socket.socket(family, kind); s.settimeout(2); s.connect(address); return False
    except OSError as e:
        return e.errno
print(refused(socket.AF_INET, socket.SOCK_STREAM, ("169.254.169.254", 80)),
      refused(socket.AF_INET6, socket.SOCK_STREAM, ("2001:db8::1", 80)),
      refused(40, socket.SOCK_STREAM, (2, 1)), refused(38, 5, ("hash", "md5")))
"""
    result = await python(box, program)
    expect(result.ok, result)
    seen = result.stdout.split()
    expect(all(value.isdigit() for value in seen), "a connection succeeded or raised oddly", result)
    expect(seen[2:] == [b"97", b"97"], "AF_VSOCK and AF_ALG must be refused (EAFNOSUPPORT)", result)


async def memory_is_bounded(box: Sandbox) -> None:
    result = await python(box, "b = []\nwhile True: b.append(bytearray(b'x' * (1 << 20)))")
    expect(result.status is ExecStatus.OOM or (result.exit_code == 1 and b"MemoryError" in result.stderr), result)
    await still_works(box)


async def processes_are_bounded(box: Sandbox) -> None:
    program = """
import os, time
n = 0
try:
    while n < 200:
        if os.fork() == 0:
            time.sleep(60)
        n += 1
except OSError:
    print(n, flush=True)
    raise
"""
    result = await python(box, program)
    expect(0 < int(result.stdout or 0) <= SPEC.max_processes, result)
    expect(result.status in (ExecStatus.PIDS_LIMIT, ExecStatus.EXITED) and not result.ok, result)
    bomb = await box.exec("b() { b | b & }; b; while :; do :; done", timeout_s=2.0)
    expect(bomb.wall_s < 8, bomb)
    await nothing_runs(box)


async def disk_is_bounded(box: Sandbox) -> None:
    for target in ("big", "/tmp/big"):
        result = await box.exec(f"for i in 1 2 3 4 5 6 7 8; do head -c 4000000 /dev/zero >> {target}$i || exit 1; done")
        expect(result.status is ExecStatus.DISK_FULL, target, result)
    try:
        await box.write("one-more", bytes(1 << 20))
    except OSError as error:
        expect(error.errno == 28, error)
    else:
        raise AssertionError("a write to a full disk succeeded")
    expect("one-more" not in await box.list(), "a failed write left its file behind")
    await box.exec("rm -f big* /tmp/big*")
    await still_works(box)


async def root_is_read_only(box: Sandbox) -> None:
    result = await box.exec("for f in /x /usr/x /etc/x /bin/sh; do (echo bad >> $f) 2>/dev/null && echo $f; done; true")
    expect(result.stdout == b"", result)
    has_no_rights(await python(box, RIGHTS))


async def agent_is_out_of_reach(box: Sandbox) -> None:
    program = """
import os
def tries(what, function):
    try:
        function()
        print("REACHED", what)
    except (OSError, ValueError):
        pass
def environ():
    # gVisor shows everybody's environment; there must be nothing in it but what gVisor put there.
    if open("/proc/1/environ").read().replace("HOME=/root\\0", "") == "":
        raise ValueError("nothing to see")
try:
    # Only gVisor shows the numbers, and nothing behind them may be opened.
    fds = os.listdir("/proc/1/fd")
except OSError:
    fds = ["0", "1"]
for fd in fds:
    for mode in (os.O_RDONLY, os.O_WRONLY):
        tries("fd" + fd, lambda: os.open("/proc/1/fd/" + fd, mode | os.O_NONBLOCK))
tries("mem", lambda: os.open("/proc/1/mem", os.O_RDWR))
tries("environ", environ)
tries("kill", lambda: os.kill(1, 9))
tries("setuid", lambda: os.setuid(0))
print("tried")
"""
    result = await python(box, program)
    expect(result.stdout == b"tried\n", result)
    # What looks like a reply frame is output like any other.
    forged = await python(box, "import os; os.write(1, bytes.fromhex('0000000107') + bytes(4))")
    expect(forged.ok and forged.stdout == bytes.fromhex("0000000107") + bytes(4), forged)


async def links_are_not_followed(box: Sandbox) -> None:
    await box.exec("ln -s /etc/passwd link; ln -s /tmp away; mkfifo pipe; echo x > /tmp/f; mkdir dir")
    for attempt in (box.read("link"), box.read("away/f"), box.read("pipe"), box.write("away/new", b"x")):
        try:
            await attempt
        except (OSError, ValueError):
            continue
        raise AssertionError("a link or a FIFO was followed")
    await box.write("link", b"mine")
    expect(await box.read("link") == b"mine", "a write replaces a link")
    expect(await box.list() == ["link"], await box.list())
    for path in ("/etc/passwd", "../x", "a/../../x", "", "a\0b"):
        for refused in (box.read(path), box.write(path, b"")):
            await raises(ValueError, refused, path)
    await raises(FileNotFoundError, box.read("absent"), "absent")
    await raises(IsADirectoryError, box.read("dir"), "dir")
    await box.exec("truncate -s 5M sparse")
    await raises(ValueError, box.read("sparse"), "sparse")


async def a_lost_box_is_not_a_result(box: Sandbox) -> None:
    kill = getattr(box, "kill", None)
    if kill is None:
        raise SkipTest(f"{type(box).__name__} has no kill(), so it cannot be lost on purpose")
    running = asyncio.create_task(box.exec("sleep 30", timeout_s=40))
    await asyncio.sleep(0.2)
    await asyncio.to_thread(kill)
    await raises(SandboxLost, running, "a running command")
    await raises(SandboxLost, box.exec("true"), "a new command")
    await raises(SandboxLost, box.read("x"), "a read")


CHECKS: tuple[Check, ...] = (
    bytes_survive,
    results_are_typed,
    timeout_kills_the_tree,
    background_child_does_not_block,
    concurrent_commands_are_apart,
    cancelling_kills,
    output_is_capped,
    a_command_runs_where_it_should,
    usage_is_measured,
    no_network,
    memory_is_bounded,
    processes_are_bounded,
    disk_is_bounded,
    root_is_read_only,
    agent_is_out_of_reach,
    links_are_not_followed,
    a_lost_box_is_not_a_result,
    *AGENT_CHECKS,
    *USER_CHECKS,
)


async def check_box(substrate: Substrate, check: Check) -> None:
    """Run one check in a box of its own."""
    async with asyncio.timeout(CHECK_DEADLINE_S), substrate.open(SPEC) as box:
        await check(box)


async def host_kernel_is_out_of_reach(substrate: Substrate) -> None:
    """The payload's system calls are filtered, or reach a kernel that is not the host's."""
    async with substrate.open(SPEC) as box:
        if substrate.capabilities().get("own_kernel"):
            files = ("/proc/version", "/proc/sys/kernel/random/boot_id")
            of_host = b"".join(Path(file).read_bytes() for file in files)
            seen = await box.exec(f"cat {' '.join(files)} 2>/dev/null || true")
            expect(seen.stdout not in (b"", of_host), "the box runs on the host's kernel", seen)
            return
        state = await box.exec("grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status")
        expect(state.stdout.split()[1::2] == [b"1", b"2"], state)
        program = """
import ctypes, socket
try:
    socket.socket(16, socket.SOCK_RAW, 0)
except OSError as error:
    print(error.errno)
call = ctypes.CDLL(None, use_errno=True).syscall
print([call(number, 0, 0, 0, 0) for number in %s])
"""
        numbers = "(101, 272, 250, 425, 323)" if os.uname().machine == "x86_64" else "(117, 97, 219, 425, 282)"
        denied = await box.exec(["python3", "-I", "-c", program % numbers])
        expect(denied.stdout == b"97\n[-1, -1, -1, -1, -1]\n", "AF_NETLINK and these calls must be refused", denied)


async def cpu_is_bounded(substrate: Substrate) -> None:
    """Four processes get no more done than ``cpus`` allows."""
    async with substrate.open(SPEC) as box:
        if substrate.capabilities().get("own_kernel"):
            # Such a kernel does not know when the host held it back, so its own clocks claim too much.
            before, four, after = [await _work_done(box, workers) for workers in (1, 4, 1)]
            expect(four < 1.6 * SPEC.cpus * max(before, after), before, four, after)
            return
        script = "for i in 1 2 3 4; do timeout 2 sh -c 'while :; do :; done' & done; wait; times"
        result = await box.exec(script, timeout_s=20)
        used = [part for line in result.stdout.decode().splitlines()[-1:] for part in line.split()]
        seconds = sum(float(part.split("m")[0]) * 60 + float(part.split("m")[1].rstrip("s")) for part in used)
        expect(seconds < 1.5 * 2 * SPEC.cpus, result)


async def _work_done(box: Sandbox, workers: int) -> int:
    program = f"""
import os, time
end = time.monotonic() + 1
ours = [os.pipe() for worker in range({workers})]
for _, write_end in ours:
    if os.fork() == 0:
        count = 0
        while time.monotonic() < end:
            for _ in range(10000):
                count += 1
        os.write(write_end, b"%d" % count)
        os._exit(0)
print(sum(int(os.read(read_end, 20)) for read_end, _ in ours))
"""
    result = await python(box, program)
    expect(result.ok, result)
    return int(result.stdout)


async def nothing_survives_close(substrate: Substrate) -> None:
    """After the context is left, the host sees none of the box's processes; of a kernel's own it never does."""
    marker = uuid.uuid4().hex
    async with substrate.open(SPEC) as box:
        running = asyncio.create_task(box.exec(f"setsid sh -c 'sleep 99; : {marker}' & sleep 99; : {marker}"))
        await asyncio.sleep(0.5)
        visible = not substrate.capabilities().get("own_kernel")
        expect(_seen_from_host(marker) == visible, f"the marker can be seen from the host: {not visible}")
    deadline = time.monotonic() + 5
    while _seen_from_host(marker):
        expect(time.monotonic() < deadline, "a process outlived its box")
        await asyncio.sleep(0.05)
    await raises(SandboxLost, running, "the command that was running")


async def files_are_in_place(substrate: Substrate) -> None:
    """``spec.files`` are there first; two boxes share nothing; the substrate pickles."""
    copy = pickle.loads(pickle.dumps(substrate))
    expect(copy == substrate, copy)
    spec = SandboxSpec(files={"src/a.py": b"print(1)"})
    async with copy.open(spec) as first, copy.open(SandboxSpec()) as second:
        expect((await first.exec(["python3", "src/a.py"])).stdout == b"1\n", "files")
        expect(await second.list() == [], "a second box sees the first one's files")


WHOLE: tuple[Callable[[Substrate], Coroutine[Any, Any, None]], ...] = (
    host_kernel_is_out_of_reach,
    cpu_is_bounded,
    nothing_survives_close,
    files_are_in_place,
    *AGENT_WHOLE,
    *USER_WHOLE,
)
ATTACKS: tuple[Check, ...] = (*LIMIT_CHECKS, *ESCAPE_CHECKS, *FILE_CHECKS, *LIFE_CHECKS)
ATTACKS_WHOLE: tuple[Callable[[Substrate], Coroutine[Any, Any, None]], ...] = (
    *LIMIT_WHOLE,
    *ESCAPE_WHOLE,
    *LIFE_WHOLE,
)


def _seen_from_host(marker: str) -> bool:
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes():
                return True
        except OSError:
            continue
    return False


async def run(substrate: Substrate) -> dict[str, tuple[str, str]]:
    """Every check by name: ``pass``, ``FAIL`` with what went wrong, or ``skip`` with the reason."""
    attempts = {check.__name__: check_box(substrate, check) for check in (*CHECKS, *ATTACKS)}
    attempts |= {check.__name__: check(substrate) for check in (*WHOLE, *ATTACKS_WHOLE)}
    outcome = {}
    for name, attempt in attempts.items():
        try:
            await attempt
            outcome[name] = ("pass", "")
        except SkipTest as reason:
            outcome[name] = ("skip", str(reason))
        except (AssertionError, OSError, ValueError, SandboxError) as error:
            outcome[name] = ("FAIL", repr(error)[:600])
    await close_pools()
    left = leaks.find(lambda owner: owner == owners.own(), patience_s=LEFT_DEADLINE_S)
    outcome["nothing_is_left"] = ("FAIL", "; ".join(map(str, left))) if left else ("pass", "")
    return outcome


def find_substrate(name: str) -> Substrate:
    """A substrate by its short name, or what ``module:attribute`` names: a class or a value. Raises ``RecipeError``."""
    if name in KINDS:
        return KINDS[name]
    expected = f"expected {', '.join(KINDS)} or module:attribute, such as my_box:MyBox"
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise RecipeError(f"substrate {name!r}: {expected}")
    try:
        found = getattr(importlib.import_module(module), attribute)
        substrate = found() if isinstance(found, type) else found
    except (ImportError, AttributeError, TypeError) as problem:
        raise RecipeError(
            f"substrate {name!r}: {problem}; {expected}, a class without arguments or a value"
        ) from problem
    if not isinstance(substrate, Substrate):
        raise RecipeError(f"substrate {name!r} is {substrate!r:.80}, without name, capabilities(), check() or open()")
    return substrate


def main() -> int:
    """Print a table; the exit code says whether none failed and not all were skipped."""
    if len(sys.argv) != 2:
        sys.stderr.write(f"usage: python -m sandbox.conformance {'|'.join(KINDS)}|MODULE:ATTRIBUTE\n")
        return 2
    try:
        substrate = find_substrate(sys.argv[1])
        if substrate.capabilities().get("isolation") == "none":
            raise RecipeError(
                f"substrate {sys.argv[1]!r} has no isolation; expected some, or the checks hit this machine"
            )
        substrate.check()
    except (RecipeError, SandboxError) as problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    outcome = asyncio.run(run(substrate))
    for name, (verdict, detail) in outcome.items():
        sys.stdout.write(f"{verdict}  {name:34} {detail}\n")
    verdicts = [verdict for name, (verdict, _) in outcome.items() if name != "nothing_is_left"]
    if set(verdicts) == {"skip"}:
        sys.stderr.write("every check was skipped: nothing is shown\n")
        return 1
    return int(any(verdict == "FAIL" for verdict, _ in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
