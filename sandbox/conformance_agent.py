"""Checks of what a box driven by the agent can do beyond the protocol. Other boxes skip them."""

from __future__ import annotations

import asyncio
import io
import tarfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from unittest import SkipTest

from posttrain.protocols import Sandbox, Substrate
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox.client import MAX_HELD, AgentSandbox
from sandbox.expectations import RIGHTS, expect, has_no_rights, nothing_runs, raises, still_works
from sandbox.streams import Job


def agent_box(box: Sandbox) -> AgentSandbox:
    if not isinstance(box, AgentSandbox):
        raise SkipTest(f"{type(box).__name__} is not driven by the agent")
    return box


async def a_named_command_runs_once(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    count = "echo x >> log; wc -l < log"
    first = await box.exec(count, op_id="a")
    expect(await box.exec(count, op_id="a") == first == await box.result_of("a"), "a retry ran it again")
    slow = asyncio.create_task(box.exec(f"sleep 0.4; {count}", op_id="b"))
    await asyncio.sleep(0.1)
    late = await asyncio.gather(box.result_of("b"), box.exec(f"sleep 0.4; {count}", op_id="b"))
    expect([result.stdout for result in (await slow, *late)] == [b"2\n"] * 3, late)
    await box.acknowledge("a")
    await raises(KeyError, box.result_of("a"), "acknowledged")
    expect((await box.exec(count, op_id="a")).stdout == b"3\n", "an acknowledged name is free again")


async def the_end_of_one_command_is_not_that_of_another(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)

    async def some() -> list[ExecResult]:
        return [await box.exec(["true"]) for _ in range(10)]

    results = [result for each in await asyncio.gather(*(some() for _ in range(5))) for result in each]
    expect(all(result.ok for result in results), *{(result.status, result.signal) for result in results})


async def trees_go_in_and_out(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    files = {f"d{i % 5}/f{i}": bytes([i]) * i * 100 for i in range(60)}
    await box.upload(files, "in")
    expect(await box.download("in") == {f"in/{path}": data for path, data in files.items()}, "files differ")
    expect(await box.download("in/d1/f1") == {"in/d1/f1": files["d1/f1"]}, "one file")
    archive = await box.download_tar("in")
    await box.upload(archive, "again")
    expect((await box.exec("diff -r in again/in")).ok, "an archive came back otherwise")
    await box.upload(_archive(_member("run", b"#!/bin/sh\necho ran", mode=0o755)))
    expect((await box.exec("./run")).stdout == b"ran\n", "an executable lost its permission")
    await box.exec("rm -r in/d*; ln -s /etc/passwd in/link; mkfifo in/pipe; ln -s .. in/up; echo x > in/x")
    expect(await box.download("in") == {"in/x": b"x\n"}, await box.download("in"))
    kinds = {entry.path: (entry.kind, entry.size) for entry in await box.entries("in")}
    expect((kinds["in/x"], kinds["in/link"][0], kinds["in/pipe"][0]) == (("file", 2), "link", "other"), kinds)
    await box.exec("ln -s in away; truncate -s 5M sparse; seq 1 99 > many; mkdir -p $(seq -s / 1 80)")
    await raises(OSError, box.download("away"), "a link as the path")
    few = box.download("sparse", max_bytes=1 << 20), box.download("many", max_bytes=10)
    for refused in (*few, box.download("in", max_entries=1), box.download("1")):
        await raises(ValueError, refused, "beyond a cap")
    expect(await box.read("many", offset=2, max_bytes=4) == b"2\n3\n", "a part of a file")
    expect(await box.read("many", offset=9999) == b"", "beyond the end")


def _member(name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = "") -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.mode, member.linkname = len(data), kind, mode, link
    padding = bytes(-len(data) % tarfile.BLOCKSIZE)
    return member.tobuf(tarfile.GNU_FORMAT) + data + padding


def _archive(*members: bytes) -> bytes:
    return b"".join(members) + bytes(2 * tarfile.BLOCKSIZE)


async def bad_archives_are_refused(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    good = _member("good", b"x")
    compressed = io.BytesIO()
    with tarfile.open(fileobj=compressed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    bad = {
        "absolute": _archive(good, _member("/etc/passwd", b"x")),
        "climbs": _archive(good, _member("a/../../x", b"x")),
        "symbolic link": _archive(good, _member("l", kind=tarfile.SYMTYPE, link="/etc")),
        "hard link": _archive(good, _member("l", kind=tarfile.LNKTYPE, link="good")),
        "device": _archive(good, _member("d", kind=tarfile.CHRTYPE)),
        "fifo": _archive(good, _member("p", kind=tarfile.FIFOTYPE)),
        "setuid": _archive(good, _member("s", b"x", mode=0o4755)),
        "twice": _archive(good, good),
        "torn": (good + _member("t", b"x" * 600))[:-700],
        "compressed": compressed.getvalue(),
        "deep": _archive(_member("/".join(["d"] * 80), b"x")),
        "no archive": b"x" * 2000,
    }
    for what, data in bad.items():
        await raises(ValueError, box.upload(data), what)
    await raises(ValueError, box.upload(_archive(*(_member(f"f{i}") for i in range(9))), max_entries=8), "many")
    await raises(ValueError, box.upload({"a": bytes(100)}, max_bytes=99), "big")
    expect(await box.list() == [], "something of a refused archive was written")
    await box.exec("ln -s /tmp away; mkdir dir")
    await raises(OSError, box.upload({"away/x": b"x"}), "through a link")
    await raises(OSError, box.upload({"dir": b"x"}), "over a directory")


async def a_session_keeps_its_state(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    async with await box.session() as shell:
        await shell.run("mkdir -p d; cd d; X='a b'; export Y=2; f() { echo f $1; }; declare -A map=([k]=v); alias l=ls")
        result = await shell.run("pwd; echo \"$X\"; sh -c 'echo $Y'; f 1; echo ${map[k]}")
        expect(result.stdout.endswith(b"/d\na b\n2\nf 1\nv\n"), result)
        failed = await shell.run("echo out; echo err >&2; (exit 5)")
        seen = (failed.status, failed.exit_code, failed.stdout, failed.stderr)
        expect(seen == (ExecStatus.EXITED, 5, b"out\n", b"err\n"), failed)
        expect((await shell.run("echo $?")).stdout == b"5\n", "the status of the last command")
        expect((await shell.run("cat; read x; echo end")).stdout == b"end\n", "standard input is empty")
        big = await shell.run(f"x={'y' * 200_000}; echo ${{#x}}")
        expect(big.stdout == b"200000\n", big)


async def a_session_is_not_fooled(sandbox: Sandbox) -> None:
    """No prompt, marker or shell option changes where a command ends."""
    box = agent_box(sandbox)
    async with await box.session() as shell:
        spoof = await shell.run("for fd in $(seq 3 255); do echo n0 0 2>/dev/null >&$fd; done; sleep 0.3; (exit 9)")
        expect(spoof.exit_code == 9, spoof)
        listed = await shell.run("find /proc/self/fd -type l -lname '*pipe:*' -printf '%f\\n'")
        expect(listed.stdout.split() == [b"1", b"2"], "a program has the private descriptors", listed)
        for command, code in (
            ("echo 'unterminated", 2),
            ("cat <<EOF\nhello", 0),
            ("for", 2),
            ("return 3", 2),
            ("break", 130),
            ("PS1='$(echo x)'; PS2=y; PROMPT_COMMAND='echo prompt'; IFS=0", 0),
            ("printf() { echo mine; }; read() { echo mine; }", 0),
            ("trap 'echo trapped' DEBUG", 0),
            ("set -x", 0),
            ("echo a", 0),
            ("set +x; trap - DEBUG", 0),
        ):
            result = await shell.run(command, timeout_s=5)
            expect((result.status, result.exit_code) == (ExecStatus.EXITED, code), command, result)
        clean = await shell.run("echo clean")
        expect((clean.stdout, clean.stderr) == (b"clean\n", b""), clean)
        await shell.run("exec 5> five")
        await shell.run("echo x >&5; cat five > /dev/stdout")
        expect(await box.read("five") == b"x\n", "a redirection for good")


async def a_session_ends_as_it_says(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    for command, code in (
        ("exit 7", 7),
        ("exec sh -c 'exit 4'", 4),
        ("set -e; false; echo b", 1),
    ):
        shell = await box.session()
        result = await shell.run(f"echo a; {command}")
        expect((result.exit_code, result.stdout) == (code, b"a\n"), command, result)
        expect(shell.ended != "", command)
        await raises(EOFError, shell.run("true"), command)
        await shell.close()
    killed = await box.session()
    result = await killed.run("setsid sleep 60 & echo a; kill -9 $$")
    expect((result.status, result.signal, result.stdout) == (ExecStatus.SIGNALED, 9, b"a\n"), result)
    await nothing_runs(box)
    shells = [await box.session() for _ in range(MAX_HELD)]
    await raises(ValueError, box.session(), "one session too many")
    for shell in shells:
        await shell.close()
    await nothing_runs(box)


async def a_session_survives_its_commands(sandbox: Sandbox) -> None:
    """Time and output limits, interrupts, and what runs beside it or in its background."""
    box = agent_box(sandbox)
    async with await box.session() as shell:
        await shell.run("X=kept; sleep 77 &")
        for endless in ("sleep 60; echo after", "while :; do :; done", "trap '' TERM; for i in 1 2; do sleep 60; done"):
            late = await shell.run(f"echo before; {endless}", timeout_s=0.5)
            expect((late.status, late.stdout) == (ExecStatus.TIMEOUT, b"before\n") and late.wall_s < 5, endless, late)
        expect((await shell.run("echo $X; kill -0 $!")).stdout == b"kept\n", "the state or the background is gone")
        stubborn = await shell.run("sh -c 'trap \"\" INT TERM; while :; do sleep 1; done'", timeout_s=0.5)
        expect(stubborn.status is ExecStatus.TIMEOUT and stubborn.wall_s < 6, stubborn)
        expect((await shell.run("echo $X")).stdout == b"kept\n", "the state is gone after a stubborn program")
        flood = await shell.run("yes", max_output=1000)
        expect(flood.status is ExecStatus.OUTPUT_LIMIT and len(flood.stdout) < 1100, flood.status)
        running = asyncio.create_task(shell.run("sleep 60; echo after"))
        await asyncio.sleep(0.3)
        await shell.interrupt()
        stopped = await running
        expect((stopped.exit_code, stopped.stdout) == (130, b""), stopped)
        running = asyncio.create_task(shell.run("sleep 60"))
        await asyncio.sleep(0.3)
        running.cancel()
        await asyncio.wait({running})
        await shell.run("(sleep 0.2; echo idle) &")
        await asyncio.sleep(0.5)
        expect((await shell.run("echo $X")).stdout == b"idle\nkept\n", "output between commands comes with the next")
        expect((await box.exec("kill -9 -1; sleep 0.1")).status is ExecStatus.EXITED, "a command beside it")
        expect((await shell.run("echo $X")).stdout == b"kept\n", "a command beside it ended the session")
    await nothing_runs(box)


async def a_job_streams(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    job = await box.spawn("echo one; echo two >&2; read x; echo got $x; cat | tail -c 3; exit 3")
    expect(await _next(job) == ("stdout", b"one\n"), "the first output")
    expect(await _next(job) == ("stderr", b"two\n"), "the error output")
    await job.write_stdin(b"it\n")
    expect(await _next(job) == ("stdout", b"got it\n"), "an answer")
    await job.write_stdin(b"x" * 300_000 + b"end", eof=True)
    expect(await _next(job) == ("stdout", b"end"), "much input")
    result = await job.wait()
    expect((result.status, result.exit_code) == (ExecStatus.EXITED, 3), result)
    await raises(StopAsyncIteration, anext(job), "after the end")
    await raises(BrokenPipeError, job.write_stdin(b"x"), "after the end")
    late = await box.spawn("setsid sleep 60 & sleep 60", timeout_s=0.4)
    expect((await late.wait()).status is ExecStatus.TIMEOUT, "a time limit")
    killed = await box.spawn("setsid sleep 60 & sleep 60")
    await still_works(box)
    await killed.kill()
    expect((await killed.wait()).signal == 9, "a killed job")
    await raises(FileNotFoundError, box.spawn("true", cwd="absent"), "absent")
    await nothing_runs(box)


async def _next(job: Job) -> tuple[str, bytes]:
    async with asyncio.timeout(10):
        chunk = await anext(job)
    return chunk.stream, chunk.data


async def a_job_waits_for_its_reader(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    size = 3_000_000
    async with await box.spawn(f"head -c {size} /dev/zero; echo done >&2; sleep 60") as job:
        await asyncio.sleep(0.5)
        await still_works(box)
        waiting = sum(len(chunk.data) for chunk in job.waiting)
        expect(waiting < 1_000_000, f"{waiting} bytes came without being asked for")
        got = 0
        async with asyncio.timeout(20):
            async for chunk in job:
                got += len(chunk.data) if chunk.stream == "stdout" else 0
                if chunk.stream == "stderr" and got == size:
                    break
    await nothing_runs(box)


async def a_terminal_is_one(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    job = await box.spawn(["bash", "--norc", "-i"], tty=(24, 80), env={"PS1": "$ ", "TERM": "dumb"})
    await job.write_stdin(b"tty; stty size\n")
    expect(b"24 80" in await _until(job, b"24 80"), "the size")
    await job.resize(50, 132)
    await job.write_stdin(b"stty size\n")
    await _until(job, b"50 132")
    await job.write_stdin(b"exit 3\n")
    async with asyncio.timeout(10):
        async for _ in job:
            pass
    expect((await job.wait()).exit_code == 3, await job.wait())
    await nothing_runs(box)


async def a_terminal_interrupts(substrate: Substrate) -> None:
    """Ctrl-C ends what runs in the foreground, and not the shell."""
    if not substrate.capabilities().get("terminal_signals", True):
        raise SkipTest("its terminals send no signals (terminal_signals)")
    async with substrate.open(SandboxSpec()) as sandbox:
        job = await agent_box(sandbox).spawn(["bash", "--norc", "-i"], tty=(24, 80), env={"PS1": "$ ", "TERM": "dumb"})
        await job.write_stdin(b"echo rea''dy; sleep 60; echo no''t\n")
        await _until(job, b"ready")
        await asyncio.sleep(0.3)
        await job.write_stdin(b"\x03echo ba''ck\n")
        expect(b"not" not in await _until(job, b"back"), "Ctrl-C")
        await job.kill()


async def _until(job: Job, text: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(10):
        while text not in seen:
            seen += (await anext(job)).data
    return seen


async def a_call_is_like_a_program(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    program = """
import os, sys
print(sys.argv, sys.stdin.read(), __name__, os.listdir("."), os.environ["KEY"])
print("error", file=sys.stderr)
import atexit
atexit.register(print, "at exit")
sys.exit(3)
"""
    result = await box.call(program, args=["a", "b"], stdin=b"input", env={"KEY": "value"})
    expect((result.status, result.exit_code) == (ExecStatus.EXITED, 3), result)
    expect(result.stdout == b"['-c', 'a', 'b'] input __main__ [] value\nat exit\n", result)
    expect(result.stderr == b"error\n", result)
    raised = await box.call("def f():\n    raise KeyError(1)\nf()")
    expect(raised.exit_code == 1 and b"KeyError: 1" in raised.stderr and b"sandbox" not in raised.stderr, raised)
    expect((await box.call("syntax error")).exit_code == 1, "a syntax error")
    expect((await box.call("import os; os.abort()")).signal == 6, "a signal")
    expect((await box.call("import sys; sys.exit('why')")).stderr == b"why\n", "a message as exit code")
    expect((await box.call("print('x' * 100_000)", max_output=100)).truncated_bytes > 99_000, "much output")
    started = time.monotonic()
    late = await box.call("print(1, flush=True)\nwhile True: pass", timeout_s=0.4)
    expect((late.status, late.stdout) == (ExecStatus.TIMEOUT, b"1\n"), late)
    expect(time.monotonic() - started < 5, "a call that does not end")
    first, second = await asyncio.gather(*(box.call("import random; print(random.random())") for _ in range(2)))
    expect(first.ok and second.ok and first.stdout != second.stdout, "two calls draw the same numbers")


async def calls_are_apart(sandbox: Sandbox) -> None:
    """A call has no rights and finds nothing of another, nor of the agent."""
    box = agent_box(sandbox)
    has_no_rights(await box.call(RIGHTS))
    program = """
import os, sys
null = os.open("/dev/null", os.O_RDONLY)
try:
    os.setuid(0); print("ROOT")
except OSError: pass
for pid in os.listdir("/proc"):
    if pid.isdigit() and int(pid) != os.getpid():
        for name in ("mem", "fd/0", "fd/1", "fd/3", "environ"):
            # gVisor opens what anybody may open: /dev/null, and an environment with nothing in it.
            try:
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    if not os.path.sameopenfile(file.fileno(), null) and file.read() != b"HOME=/root\\0":
                        print("REACHED", pid, name)
            except OSError: pass
        try: os.kill(int(pid), 9); print("KILLED", pid)
        except OSError: pass
for fd in range(3, 256):
    try: os.fstat(fd); fd == null or print("OPEN", fd)
    except OSError: pass
"""
    attack = await box.call(program)
    expect(attack.ok and attack.stdout == b"", attack)
    secret = "correct-horse-battery"
    await box.call(f"x = {secret!r}; print(x)", stdin=secret.encode(), args=[secret], env={"SECRET": secret})
    hunt = """
import ctypes, sys
mine = ctypes.create_string_buffer(b"correct" + b"-horse-" + sys.argv[1].encode())
needle = b"orse-" + sys.argv[1].encode()
found = 0
for line in open("/proc/self/maps").readlines():
    span, mode = line.split()[:2]
    if mode.startswith("rw"):
        low, high = (int(part, 16) for part in span.split("-"))
        data = ctypes.string_at(low, high - low)
        at = data.find(needle)
        while at >= 0:
            found += data[at - 9 : at] == b"correct-h"
            at = data.find(needle, at + 1)
print(found)
"""
    searched = await box.call(hunt, args=["battery"])
    # It finds what it planted, in the buffer and in what that was made from, or else it proves nothing.
    expect(searched.ok and 1 <= int(searched.stdout) <= 2, "one call's words are in the memory of the next", searched)
    leaves = """
import os, time
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
open("here", "w").write("x")
os.mkdir("locked", 0)
open("/tmp/there", "w")
os.symlink("/etc", "/dev/shm/link")
"""
    left = await box.call(leaves)
    expect(left.ok, left)
    looked = await box.call("import os; print(os.listdir('/tmp'), os.listdir('..'), os.listdir('/dev/shm'))")
    expect(looked.stdout.startswith(b"[] ['call-") and looked.stdout.endswith(b"] []\n"), looked)
    await nothing_runs(box)


async def a_call_that_spoils_its_box_is_noticed(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    box.spoiled = ""
    expect((await box.call("print(1)")).ok and box.spoiled == "", box.spoiled)
    await box.call("import ctypes; ctypes.CDLL(None).shmget(77, 4096, 0o1666)")
    expect("shm" in box.spoiled, box.spoiled)
    box.spoiled = ""
    await box.call("import os\nfor i in range(3000): open(str(i), 'w').close()")
    expect("cleaned" in box.spoiled, box.spoiled)
    box.spoiled = ""
    await box.call("while True: pass", timeout_s=0.1)
    expect(box.spoiled == "timeout", box.spoiled)
    await still_works(box)


AGENT_CHECKS: tuple[Callable[[Sandbox], Awaitable[None]], ...] = (
    a_named_command_runs_once,
    the_end_of_one_command_is_not_that_of_another,
    trees_go_in_and_out,
    bad_archives_are_refused,
    a_session_keeps_its_state,
    a_session_is_not_fooled,
    a_session_ends_as_it_says,
    a_session_survives_its_commands,
    a_job_streams,
    a_job_waits_for_its_reader,
    a_terminal_is_one,
    a_call_is_like_a_program,
    calls_are_apart,
    a_call_that_spoils_its_box_is_noticed,
)

AGENT_WHOLE: tuple[Callable[[Substrate], Coroutine[Any, Any, None]], ...] = (a_terminal_interrupts,)
"""Those that open boxes themselves."""
