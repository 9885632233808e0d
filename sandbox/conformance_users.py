"""Checks of named users: what is theirs stays theirs, and the end of a command is the end of all it has started."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any
from unittest import SkipTest

from posttrain.protocols import Sandbox, Substrate
from posttrain.types import ExecStatus, SandboxSpec
from sandbox import layers
from sandbox.attempts import PRELUDE
from sandbox.client import MAX_USERS
from sandbox.conformance_agent import agent_box
from sandbox.expectations import RIGHTS, expect, has_no_rights, nothing_runs, raises, still_works
from sandbox.streams import Job

SPEC = SandboxSpec(memory_mb=64, disk_mb=8, max_processes=24)
BAD_NAMES = (
    "root",
    "toor",
    "",
    "0",
    "1000",
    "Root",
    "root ",
    "a/b",
    "..",
    "a:b",
    "-a",
    "a\0b",
    "a\n",
    "x" * 33,
    "\xe4",
)

REACHES = """
pid, path, home = int(sys.argv[1]), sys.argv[2], sys.argv[3]
attempt("signal", lambda: os.kill(pid, 0))
attempt("kill", lambda: os.kill(pid, signal.SIGKILL))
attempt("ptrace", lambda: syscall(101, 117, 16, pid, 0, 0))
attempt("memory", lambda: os.open(f"/proc/{pid}/mem", os.O_RDWR))
attempt("descriptors", lambda: os.open(f"/proc/{pid}/fd/1", os.O_WRONLY))
attempt("directory", lambda: os.listdir(f"/proc/{pid}/cwd"))
attempt("setuid", lambda: os.setuid(int(sys.argv[4])))
attempt("setgroups", lambda: os.setgroups([]))
attempt("read", lambda: os.open(path, os.O_RDONLY))
attempt("write", lambda: os.open(path, os.O_WRONLY))
attempt("chmod", lambda: os.chmod(path, 0o666))
attempt("chown", lambda: os.chown(path, os.getuid(), -1))
attempt("home", lambda: os.open(home + "/planted", os.O_WRONLY | os.O_CREAT))
"""
"""What nobody but its user may do to a process and a private file."""

SHEDS = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
for shed in (lambda: os.setgroups([]), lambda: os.setgid(os.getgroups()[-1]), lambda: os.setuid(os.getuid()),
             lambda: os.setgroups([os.getgid()])):
    try:
        shed()
    except OSError:
        pass
os.environ.clear()
if os.fork() == 0:
    os.setsid()
    os.chdir("/")
    if os.fork() == 0:
        for fd in (0, 1, 2):
            os.close(fd)
        os.execv("/bin/sleep", ["sleep", "57"])
os.setsid() if os.getpid() != os.getsid(0) else None
"""
"""A daemon that lays down whatever it can of what tells whose it is."""

RUNS_ON = """
import os, time
end = time.monotonic() + 30
for _ in range(12):
    if os.fork() == 0:
        break
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
    os.setsid()
"""
"""Processes that are never there for long: a child goes on, and its child's child."""


async def a_user_keeps_what_is_its_own(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    seen = await box.exec("id -u; umask; echo $USER; echo secret > private; chmod 600 private; cd; pwd", user="alice")
    uid, mask, name, home = seen.stdout.split()
    expect((mask, name, home) == (b"0022", b"alice", os.fsencode(box.spec.workdir) + b"/.home-alice"), seen)
    again = await box.exec("id -u; cat private; touch ~/x", user="alice")
    expect(again.ok and again.stdout == uid + b"\nsecret\n", again)
    others = [await box.exec("id -u; cat private || touch .home-alice/x", user=user) for user in ("bob", None)]
    seen_by_others = {other.stdout.strip() for other in others}
    expect(len(seen_by_others) == 2 and not seen_by_others & {b"", b"0", uid}, others)
    expect(not any(other.ok for other in others), others)
    await raises(PermissionError, box.read("private"), "the host reads as a command without a user")
    await box.write("shared", b"1")
    expect((await box.exec("echo 2 >> shared; cat shared", user="alice")).stdout == b"12\n", "what is everybody's")
    expect(not (await box.exec("echo 3 >> mine", user="alice")).stderr, "a file of alice's")
    expect(not (await box.exec("cat mine; echo 4 >> mine", user="bob")).ok, "alice's file is written by bob")
    await box.exec("mkdir -m 700 closed; pwd > closed/x", user="alice")
    expect((await box.exec("cat x", cwd="closed", user="alice")).ok, "a closed directory of its own")
    await raises(PermissionError, box.exec("cat x", cwd="closed", user="bob"), "a closed directory")
    async with await box.session(user="alice") as shell:
        expect((await shell.run("id -u; cd; cat ../private")).stdout == uid + b"\nsecret\n", "a session")
    job = await box.spawn("id -u; cat private; tty", user="alice", tty=(24, 80))
    expect((await job.wait()).stdout.split()[:2] == [uid, b"secret"], "a job")


async def a_home_is_its_users(sandbox: Sandbox) -> None:
    """A directory or a link that somebody else has put in its place is not taken for it."""
    box = agent_box(sandbox)
    await box.exec("mkdir .home-alice; ln -s /tmp .home-bob")
    for user in ("alice", "bob"):
        await raises(PermissionError, box.exec("true", user=user), user)
    await box.exec("rmdir .home-alice; rm .home-bob")
    for user in ("alice", "bob"):
        expect((await box.exec("touch ~/x", user=user)).ok, user)


async def users_are_out_of_reach(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    start = "umask 077; echo x > private; id -u; echo $$; exec sleep 60"
    async with await box.spawn(start, user="alice") as job:
        uid, pid = (await _first_lines(job, 2)).split()
        arguments = [pid.decode(), "private", ".home-alice", uid.decode()]
        for user in ("bob", None):
            argv = ["python3", "-I", "-S", "-c", PRELUDE + REACHES, *arguments]
            found = await box.exec(argv, user=user)
            expect(found.ok and found.stdout.count(b"refused") == REACHES.count("attempt("), user, found)
        for user in ("bob", None):
            await box.exec("kill -9 -1", user=user)
        # That it can do some of it itself shows that the attempts are real.
        own = await box.exec(argv, user="alice")
        done = {line.split()[0] for line in own.stdout.splitlines() if b"REACHED" in line}
        expect(done >= {b"signal", b"kill", b"read", b"write", b"chmod", b"home"}, own)
    has_no_rights(await box.exec(["python3", "-I", "-S", "-c", RIGHTS], user="alice"))
    await nothing_runs(box)


async def commands_of_a_user_end_apart(sandbox: Sandbox) -> None:
    """Time limits, ends, cancelling and killing take what a command has started, and nothing of its neighbours."""
    box = agent_box(sandbox)
    async with await box.session(user="alice") as shell, await box.spawn("cat", user="alice") as job:
        await shell.run("X=kept; sleep 61 &")
        await asyncio.sleep(0.2)
        before = await _sleeping(box)
        late = await box.exec("setsid setsid sleep 58 & trap '' TERM; sleep 59", user="alice", timeout_s=0.5)
        expect(late.status is ExecStatus.TIMEOUT and late.wall_s < 6, late)
        shed = await box.exec(["python3", "-I", "-S", "-c", SHEDS], user="alice")
        expect(shed.ok and shed.wall_s < 6, shed)
        cancelled = asyncio.create_task(box.exec("setsid sleep 60 & sleep 60", user="alice"))
        await asyncio.sleep(0.3)
        cancelled.cancel()
        await asyncio.wait({cancelled})
        async with await box.spawn("setsid sleep 60 & sleep 60", user="alice"):
            await asyncio.sleep(0.2)
        stubborn = await shell.run("sh -c 'trap \"\" INT TERM; while :; do sleep 1; done'", timeout_s=0.3)
        expect(stubborn.status is ExecStatus.TIMEOUT, stubborn)
        expect((await shell.run("echo $X")).stdout == b"kept\n", "the neighbouring shell")
        await job.write_stdin(b"here\n", eof=True)
        expect((await job.wait()).stdout == b"here\n", "the neighbouring job")
        await asyncio.sleep(0.1)
        left = await _sleeping(box)
        expect(left <= before, "commands have left something", left - before)
    await nothing_runs(box)


async def a_users_bomb_spares_its_neighbours(sandbox: Sandbox) -> None:
    """What forks faster than it is looked for ends in time, while a neighbour of the same user goes on."""
    box = agent_box(sandbox)
    async with await box.spawn("sleep 60 & exec cat", user="alice") as neighbour:
        # Before the bomb takes every process slot.
        while not await _sleeping(box):
            await asyncio.sleep(0.05)
        for bomb in (["sh", "-c", "b() { b | b & }; b; while :; do :; done"], ["python3", "-I", "-S", "-c", RUNS_ON]):
            started = time.monotonic()
            await box.exec(bomb, user="alice", timeout_s=0.7)
            expect(time.monotonic() - started < 8, bomb, time.monotonic() - started)
            other = await box.exec("echo alive", user="bob")
            expect(other.stdout == b"alive\n", other)
            expect(len(await _sleeping(box)) == 1, "what a neighbour has in its background")
        await neighbour.write_stdin(b"here\n", eof=True)
        expect((await neighbour.wait()).stdout == b"here\n", "a neighbour")
    await nothing_runs(box)
    await still_works(box)


async def names_of_users_are_bounded(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    for name in BAD_NAMES:
        for refused in (box.exec("true", user=name), box.session(user=name), box.spawn("true", user=name)):
            await raises(ValueError, refused, name)
    uids = {(await box.exec(["id", "-u"], user=f"u{number}")).stdout for number in range(MAX_USERS)}
    expect(len(uids) == MAX_USERS, uids)
    for number in range(MAX_USERS, MAX_USERS + 3):
        await raises(ValueError, box.exec("true", user=f"u{number}"), "one user too many")
    expect((await box.exec(["id", "-u"], user="u3")).stdout in uids, "one of those there are")


async def users_survive_a_snapshot(substrate: Substrate) -> None:
    """A restored box has the same users with the same uids, and what was theirs is theirs."""
    if substrate.capabilities().get("snapshot") != "fs":
        raise SkipTest("it keeps no file systems (snapshot)")
    show = "id -u; cat private; cat ~/.note; find . -user $(id -u) | sort"
    async with substrate.open(SPEC) as sandbox:
        box = agent_box(sandbox)
        await box.exec("true", user="zoe")
        made = "umask 077; mkdir -p d/e; echo 1 > private; echo 2 > ~/.note; echo 3 > d/e/f; ln -s private l"
        await box.exec(made, user="alice")
        await box.exec("mkdir plain; chmod 777 plain")
        await box.exec("umask 077; echo 4 > plain/of-alice", user="alice")
        await box.exec("chmod 755 plain")
        before = await box.exec(show, user="alice")
        first = int((await box.exec(["id", "-u"])).stdout)
        snapshot = await box.snapshot()
    kept = [snapshot.digest]
    try:
        async with substrate.open(replace(SPEC, image=snapshot.image)) as sandbox:
            box = agent_box(sandbox)
            other = await box.exec("cat private plain/of-alice; ls d", user="bob")
            expect(other.stdout == b"" and not other.ok, other)
            await raises(PermissionError, box.read("private"), "a private file")
            after = await box.exec(show, user="alice")
            offset = int(after.stdout.split()[0]) - int((await box.exec(["id", "-u"])).stdout)
            expect(offset == int(before.stdout.split()[0]) - first, "another uid", before, after)
            lines = after.stdout.splitlines()[1:]
            expect(lines == before.stdout.splitlines()[1:] and b"./plain/of-alice" in lines, before, after)
            modes = await box.exec("find d plain -type d -printf '%p %m\\n' | sort", user="alice")
            expect(modes.stdout == b"d 700\nd/e 700\nplain 755\n", modes)
            again = await box.snapshot()
            expect(again.num_files == snapshot.num_files and again.num_bytes == snapshot.num_bytes, again)
            kept.append(again.digest)
    finally:
        for layer in filter(None, map(layers.find, kept)):
            layer.unlink()


async def _first_lines(job: Job, count: int) -> bytes:
    seen = b""
    async with asyncio.timeout(10):
        while seen.count(b"\n") < count:
            seen += (await anext(job)).data
    return seen


async def _sleeping(box: Sandbox) -> set[bytes]:
    """Where /proc shows the processes named sleep."""
    return set((await box.exec("grep -l '^sleep$' /proc/[0-9]*/comm")).stdout.split())


USER_CHECKS: tuple[Callable[[Sandbox], Awaitable[None]], ...] = (
    a_user_keeps_what_is_its_own,
    a_home_is_its_users,
    users_are_out_of_reach,
    commands_of_a_user_end_apart,
    a_users_bomb_spares_its_neighbours,
    names_of_users_are_bounded,
)
USER_WHOLE: tuple[Callable[[Substrate], Coroutine[Any, Any, None]], ...] = (users_survive_a_snapshot,)
