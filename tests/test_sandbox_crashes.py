"""SIGKILL of a client, an edge, a box's agent and the Docker daemon, at each point of every kind of operation.

In every cell the operation either has a result, the same for whoever asks again, or it is reported as ``Unknown``, in
a box that is gone as ``SandboxLost``; what counts has then counted once, and the log is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import SandboxError, SandboxLost, SandboxUnavailable
from posttrain.protocols import Substrate
from sandbox import layers, owners
from sandbox.edge import serve_boxes
from sandbox.edge_client import EdgeClient
from sandbox.edge_server import SOCKET, serving
from sandbox.log import TrajectoryLog
from sandbox.operations import KINDS, Operations
from sandbox.process import Process
from sandbox.recorded import Recorder, Unknown
from tests.test_sandbox_operations import COUNTS, SCENARIOS, SPEC

POINTS = ("intent", "effect", "result", "reply")
RETRY_S = 20.0
DEATH_DEADLINE_S = 10.0
WITHOUT_AGENT = {"pause", "resume", "job.read", "job.wait"}
"""Kinds that may succeed though the agent is dead: the host does them, or has heard the answer already."""
FORGIVING = {"session.close"}
"""A session whose box is gone has ended with it, so that leaving its context is no failure."""


@pytest.fixture(autouse=True)
def own_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layers, "_folder", lambda: tmp_path / "layers")


@pytest.fixture
def isolated() -> Process:
    try:
        Process().check()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    return Process()


def wait_until_dead(pid: int, deadline_s: float = DEATH_DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while owners.is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.002)


@dataclass
class Killer:
    """Kills its victim when the first operation of a kind reaches a point."""

    point: str = ""
    kind: str = ""
    victim: int = 0
    deadline_s: float = DEATH_DEADLINE_S

    def aim(self, point: str, kind: str, victim: int) -> None:
        self.point, self.kind, self.victim = point, kind, victim

    def __call__(self, point: str, kind: str) -> None:
        if self.victim and (point, kind) == (self.point, self.kind):
            victim, self.victim = self.victim, 0
            os.kill(victim, signal.SIGKILL)
            wait_until_dead(victim, self.deadline_s)


@contextlib.asynccontextmanager
async def edge_here(folder: Path, substrate: Substrate, killer: Killer) -> AsyncIterator[EdgeClient]:
    # What was waiting beside the call that was cut short fails, and nobody asks.
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    async with (
        serve_boxes(folder, substrate, crash_at=killer) as edge,
        serving(edge, folder / SOCKET),
        EdgeClient(folder / SOCKET, retry_s=RETRY_S) as client,
    ):
        yield client


async def outcome(box: Operations, kind: str) -> Any:
    """What using this kind comes to: what the scenario gives, or the class of failure it ends with."""
    try:
        return await asyncio.wait_for(SCENARIOS[kind](box), 30)
    except (Unknown, SandboxLost) as error:
        return type(error)


def told(kind: str) -> type[SandboxError]:
    """What someone hears who asks for an operation that was begun in a box that is gone."""
    return SandboxLost if KINDS[kind].idempotent else Unknown


def check_log(folder: Path, kind: str, *, has_result: bool | None) -> None:
    """The log is whole, and says whether the operation that was hit has a result; None when both are right."""
    log = TrajectoryLog.read(folder)
    hit, *others = [operation for operation in log.operations if operation.kind == kind]
    assert has_result is None or (hit.result is not None) == has_result, f"{kind}: {log.operations}"
    past = Recorder(None, log)
    for operation in log.operations:
        result = past.stored(operation).get("exec", {}) if operation.result is not None else {}
        assert result.get("signal") != signal.SIGKILL, f"{kind}: {result}"
        assert result.get("exit_code") != 128 + signal.SIGKILL, f"{kind}: {result}"
    assert has_result is not False or not others, f"{kind} was begun again: {log.operations}"


FORKS = """
import asyncio, os, signal, sys
from pathlib import Path
from sandbox import layers
from sandbox.edge import serve_boxes
from sandbox.edge_client import EdgeClient
from sandbox.edge_server import SOCKET, serving
from sandbox.process import Process
from tests.test_sandbox_operations import SCENARIOS

folder = Path(sys.argv[1])
layers._folder = lambda: folder / "layers"

async def client(rollout, kind):
    async with EdgeClient(folder / SOCKET) as client:
        await SCENARIOS[kind](await client.attach(rollout))
        await asyncio.sleep(60)

async def edge(*cell):
    def die(point, kind):
        if (point, kind) == cell:
            os.kill(os.getpid(), signal.SIGKILL)
    async with serve_boxes(folder, Process(), crash_at=die) as edge, serving(edge, folder / SOCKET):
        await asyncio.sleep(120)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    role, *words = line.split()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        asyncio.run({"client": client, "edge": edge}[role](*words))
        os._exit(0)
    print(pid, flush=True)
"""


@dataclass
class Forks:
    """Starts clients and edges as processes, in little time since they are forked."""

    process: subprocess.Popen[str]
    pids: list[int] = field(default_factory=list)

    def start(self, *words: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        self.pids.append(int(self.process.stdout.readline()))
        return self.pids[-1]


@pytest.fixture
def forks(socket_folder: Path) -> Iterator[Forks]:
    command = [sys.executable, "-c", FORKS, str(socket_folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        found = Forks(process)
        yield found
        for pid in found.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.kill()


@pytest.mark.parametrize("point", POINTS)
def test_a_client_dies_and_the_next_one_finds_all_of_it(
    socket_folder: Path, isolated: Process, forks: Forks, point: str
) -> None:
    killer = Killer()

    async def die_in(client: EdgeClient, kind: str) -> None:
        box_id = (await client.create(kind, SPEC)).hold.box_id
        killer.aim(point, kind, forks.start("client", kind, kind))
        while killer.victim:
            await asyncio.sleep(0.002)
        first = await outcome(await client.attach(kind), kind)
        box = await client.attach(kind)
        assert await outcome(box, kind) == first
        assert first not in (Unknown, SandboxLost), f"{kind}: the edge had lived on"
        if kind in COUNTS:
            assert await box.read("counter") == b"x\n", kind
        await box.close()
        check_log(socket_folder / "boxes" / box_id, kind, has_result=True)

    async def play() -> None:
        async with edge_here(socket_folder, isolated, killer) as client:
            for kind in KINDS:
                await die_in(client, kind)

    asyncio.run(play())


@pytest.mark.parametrize("point", POINTS)
def test_an_edge_dies_and_nothing_is_run_again(
    socket_folder: Path, isolated: Process, forks: Forks, point: str
) -> None:
    """One folder, and an edge for each kind, which finds what its predecessor left."""

    async def die_in(client: EdgeClient, kind: str, edge: int, following: str) -> int:
        box = await client.create(kind, SPEC)
        hit = asyncio.create_task(outcome(box, kind))
        while owners.is_alive(edge):
            await asyncio.sleep(0.002)
        edge = forks.start("edge", point, following)
        first = await hit
        assert await outcome(await client.attach(kind), kind) == first
        has_result = point in ("result", "reply")
        assert has_result or first is told(kind) or kind in FORGIVING, f"{kind}: {first}"
        check_log(socket_folder / "boxes" / box.hold.box_id, kind, has_result=has_result)
        return edge

    async def play() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        async with EdgeClient(socket_folder / SOCKET, retry_s=RETRY_S) as client:
            edge = forks.start("edge", point, next(iter(KINDS)))
            for kind, following in zip(KINDS, [*list(KINDS)[1:], "none"], strict=True):
                edge = await die_in(client, kind, edge, following)
            os.kill(edge, signal.SIGKILL)
            wait_until_dead(edge)

    asyncio.run(play())


def children(pid: int) -> set[int]:
    return {int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()}


def agent_of_this_process() -> int:
    """The first process of the only box that this process has open."""
    boxes = [pid for pid in children(os.getpid()) if "bwrap" in Path(f"/proc/{pid}/comm").read_text()]
    (agent,) = (child for box in boxes for child in children(box))
    return agent


@pytest.mark.parametrize("point", POINTS)
def test_an_agent_dies_and_its_box_is_lost(socket_folder: Path, isolated: Process, point: str) -> None:
    # A frozen agent ends when it is let go.
    killer = Killer(deadline_s=0.2)

    async def die_in(client: EdgeClient, kind: str) -> None:
        box = await client.create(kind, SPEC)
        killer.aim(point, kind, agent_of_this_process())
        first = await outcome(box, kind)
        assert not killer.victim
        again = await client.attach(kind)
        second = await outcome(again, kind)
        if point == "intent" and kind not in WITHOUT_AGENT | FORGIVING:
            assert (first, second) == (SandboxLost, told(kind)), kind
        else:
            assert first == second or {first, second} == {Unknown, SandboxLost}, kind
        with pytest.raises(SandboxLost):
            await again.exec("true")
        check_log(
            socket_folder / "boxes" / box.hold.box_id,
            kind,
            has_result=None if kind in WITHOUT_AGENT else point != "intent",
        )

    async def play() -> None:
        async with edge_here(socket_folder, isolated, killer) as client:
            for kind in KINDS:
                await die_in(client, kind)
                with contextlib.suppress(ValueError):
                    while agent_of_this_process():
                        await asyncio.sleep(0.002)

    asyncio.run(play())
