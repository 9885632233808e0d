"""Checks of many boxes, of boxes one after the other, and of what one command leaves for the next."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest import SkipTest

from posttrain.errors import SandboxLost
from posttrain.protocols import Sandbox, Substrate
from posttrain.types import ExecStatus, SandboxSpec
from sandbox import agent, gvisor, layers
from sandbox.attempts import PRELUDE, reached
from sandbox.client import AgentSandbox
from sandbox.conformance_agent import agent_box
from sandbox.conformance_escape import FINDS, LEAVES
from sandbox.expectations import RIGHTS, expect, has_no_rights, nothing_runs, raises, still_works
from sandbox.pool import Pool

SPEC = SandboxSpec(memory_mb=64, disk_mb=8, max_processes=16)
STORM = 32
STORM_DEADLINE_S = 50.0


async def a_poisoned_home_reaches_no_later_command(sandbox: Sandbox) -> None:
    """Start-up files, modules that shadow others and overwritten builtins stay where they were put."""
    box = agent_box(sandbox)
    poison = "echo POISON"
    starts = (".bashrc", ".bash_profile", ".profile", ".bash_logout", ".inputrc", ".shinit", "bin/true", "true", "sh")
    site = ".local/lib/python3.11/site-packages"
    modules = ("sitecustomize.py", "usercustomize.py", "os.py", "json.py", f"{site}/usercustomize.py", f"{site}/p.pth")
    await box.upload(
        {**dict.fromkeys(starts, poison.encode()), **dict.fromkeys(modules, b"import sys; print('POISON')")}
    )
    await box.exec("chmod -R 755 .")
    async with await box.session() as shell:
        await shell.run(
            "export LD_PRELOAD=/work/x.so PYTHONPATH=/work PATH=/work:$PATH BASH_ENV=/work/.bashrc ENV=/work/sh"
        )
        await shell.run("echo() { printf POISON; }; cd() { :; }; alias true=false; HISTFILE=/work/history")
        expect((await shell.run("echo x")).stdout == b"POISON", "this shell is its user's own")
        stuck = asyncio.create_task(shell.run("builtin() { :; }; eval() { :; }; read() { :; }; kill() { :; }"))
        await asyncio.wait({stuck}, timeout=0.5)
    expect((await stuck).status in (ExecStatus.EXITED, ExecStatus.CANCELLED), stuck)
    for clean in (
        box.exec("true; echo clean"),
        box.exec(["bash", "-c", "true; echo clean"]),
        box.exec(["python3", "-I", "-c", "import json; print('clean')"]),
        box.call("import json; print('clean')"),
    ):
        result = await clean
        expect((result.status, result.stdout, result.stderr) == (ExecStatus.EXITED, b"clean\n", b""), result)
    async with await box.session() as shell:
        expect((await shell.run("true; echo clean; history")).stdout == b"clean\n", "a second session")
    await still_works(box)


async def nothing_is_left_for_the_next_box(substrate: Substrate) -> None:
    """Files, processes, System V objects and names of one box are not found in the next, pooled or not."""
    pooled = _with_pool(substrate)
    names = (f"left-{uuid.uuid4().hex}", str(uuid.uuid4().int % 1_000_000_000))
    argv = ["python3", "-I", "-S", "-c", PRELUDE + LEAVES, *names]
    leaves = f"mkdir __pycache__; echo x > .bash_history; echo x > __pycache__/x; {shlex.join(argv)}"
    async with pooled.open(SPEC) as first:
        leaving = asyncio.create_task(first.exec(leaves, timeout_s=40))
        async with asyncio.timeout(15):
            while "flock" not in await reached(first, FINDS, *names):
                expect(not leaving.done(), leaving)
    await raises(SandboxLost, leaving, "the command that was running")
    async with pooled.open(SPEC) as second:
        expect(await reached(second, FINDS, *names) == {}, "something of the first box is in the second")
        found = await second.exec("find /work /tmp /dev/shm -mindepth 1")
        expect(found.stdout == b"", found)
        await nothing_runs(second)


def _with_pool(substrate: Substrate) -> Substrate:
    if is_dataclass(substrate) and not isinstance(substrate, type) and "warm" in {f.name for f in fields(substrate)}:
        pooled: Substrate = replace(substrate, warm=1)
        return pooled
    return substrate


async def a_dead_box_is_not_handed_out(substrate: Substrate) -> None:
    stacks: dict[AgentSandbox, contextlib.AsyncExitStack] = {}

    async def start() -> AgentSandbox:
        async with contextlib.AsyncExitStack() as stack:
            box = agent_box(await stack.enter_async_context(substrate.open(SPEC)))
            stacks[box] = stack.pop_all()
        return box

    async def stop(box: AgentSandbox) -> None:
        await stacks.pop(box).aclose()

    pool = Pool(start, stop, 1)
    try:
        first = await pool.take()
        async with asyncio.timeout(20):
            while len(stacks) < 2:
                await asyncio.sleep(0.01)
        (waiting,) = set(stacks) - {first}
        await asyncio.to_thread(waiting.kill)
        second = await pool.take()
        expect(second not in (first, waiting) and waiting not in stacks, "a dead box was handed out")
        await still_works(second)
        await asyncio.gather(stop(first), stop(second))
    finally:
        await pool.close()


async def a_storm_of_boxes_is_weathered(substrate: Substrate) -> None:
    async def use(number: int) -> None:
        async with substrate.open(SPEC) as box:
            result = await box.exec(f"echo {number}")
            expect(result.stdout == b"%d\n" % number, result)

    async with asyncio.timeout(STORM_DEADLINE_S):
        await asyncio.gather(*(use(number) for number in range(STORM)))


async def an_agent_that_hangs_is_lost(substrate: Substrate) -> None:
    """One that is stopped keeps its channel open and says nothing: an operation's deadline ends the box."""
    async with substrate.open(SPEC) as sandbox:
        box = agent_box(sandbox)
        marker = uuid.uuid4().hex
        running = asyncio.create_task(box.exec(f"sleep 30; : {marker}", timeout_s=40))
        await asyncio.sleep(0.3)
        processes = _agent_of(marker) if not substrate.capabilities().get("own_kernel") else _sentry_of(box)
        try:
            for pid in processes:
                os.kill(pid, signal.SIGSTOP)
        except PermissionError as error:
            raise SkipTest("the host's user may not stop the agent") from error
        started = time.monotonic()
        await raises(SandboxLost, box.ask(agent.LIST, agent.pack("."), 0.5), "an agent that is stopped")
        expect(time.monotonic() - started < 10, "it took", time.monotonic() - started)
        await raises(SandboxLost, running, "the command that was running")
        await raises(SandboxLost, box.exec("true"), "a new command")
    async with substrate.open(SPEC) as another:
        await still_works(another)


def _agent_of(marker: str) -> list[int]:
    """The host's pid of process 1 of the box in which a command line has the marker."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and marker.encode() in (entry / "cmdline").read_bytes():
                return [_first_process(int(entry.name))]
    raise AssertionError("the command cannot be seen from the host")


def _first_process(pid: int) -> int:
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    return pid if status["NSpid"].split()[-1] == "1" else _first_process(int(status["PPid"]))


def _sentry_of(box: AgentSandbox) -> list[int]:
    if not isinstance(box, gvisor.GvisorSandbox):
        raise SkipTest(f"what runs a {type(box).__name__} is not known")
    return gvisor.mentioning(box.folder)


async def a_restored_box_is_like_any_other(substrate: Substrate) -> None:
    """A snapshot taken during writes holds whole files and no rights; two boxes of it, or one resumed, have none."""
    can = substrate.capabilities()
    if can.get("snapshot") != "fs":
        raise SkipTest("it keeps no file systems (snapshot)")
    argv = ["python3", "-I", "-S", "-c", RIGHTS]
    async with substrate.open(SPEC) as sandbox:
        box = agent_box(sandbox)
        await box.exec("cp /usr/bin/id id; chmod 6755 id; ln -s /etc/passwd link; ln -s ../../.. up; mkdir -m 1777 d")
        writing = asyncio.create_task(box.exec("while :; do echo x >> d/grows; done", timeout_s=20))
        await asyncio.sleep(0.1)
        snapshot = await box.snapshot()
        writing.cancel()
        await asyncio.wait({writing})
        if can.get("pause"):
            await box.pause()
            await box.resume()
        has_no_rights(await box.exec(argv))
    try:
        spec = replace(SPEC, image=snapshot.image)
        async with substrate.open(spec) as first, substrate.open(spec) as second:
            drawn = [await agent_box(each).call("import random; print(random.random())") for each in (first, second)]
            expect(drawn[0].ok and drawn[0].stdout != drawn[1].stdout, "two restored boxes draw the same", drawn)
            for restored in (first, second):
                has_no_rights(await restored.exec(argv))
                special = await restored.exec("find . -perm /7000; find . -type l -printf '%f %l\\n' | sort")
                expect(special.stdout == b"link /etc/passwd\nup ../../..\n", special)
                expect(set((await restored.read("d/grows")).split()) == {b"x"}, "a torn file")
            await first.exec("echo mine > d/grows")
            expect(b"mine" not in await second.read("d/grows"), "two restored boxes share a file")
    finally:
        layer = layers.find(snapshot.digest)
        if layer:
            layer.unlink()


LIFE_CHECKS: tuple[Callable[[Sandbox], Awaitable[None]], ...] = (a_poisoned_home_reaches_no_later_command,)
LIFE_WHOLE: tuple[Callable[[Substrate], Coroutine[Any, Any, None]], ...] = (
    nothing_is_left_for_the_next_box,
    a_dead_box_is_not_handed_out,
    a_storm_of_boxes_is_weathered,
    an_agent_that_hangs_is_lost,
    a_restored_box_is_like_any_other,
)
