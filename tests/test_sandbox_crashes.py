"""SIGKILL of a client, an edge, a box's agent and the Docker daemon, at each point of every kind of operation.

In every cell the operation either has a result, the same for whoever asks again, or it is reported as ``Unknown``, in
a box that is gone as ``SandboxLost``; what counts has then counted once, and the log is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import SandboxError, SandboxLost, SandboxUnavailable
from posttrain.protocols import Substrate
from sandbox import container, dockerd, edge, gvisor, layers, owners
from sandbox.client import AgentSandbox
from sandbox.container import Container
from sandbox.edge import Edge, EdgeBusy, Limits, serve_boxes
from sandbox.edge_client import EdgeClient
from sandbox.edge_server import SOCKET, serving
from sandbox.function import Function
from sandbox.gvisor import Gvisor
from sandbox.log import TrajectoryLog
from sandbox.operations import KINDS, Operations
from sandbox.pool import close_pools, settled
from sandbox.process import Process
from sandbox.recorded import CrashAt, RecordedSandbox, Recorder, Unknown
from tests.boxes import require
from tests.test_sandbox_operations import COUNT, COUNTS, SCENARIOS, SPEC

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
    return require(Process())


def wait_until_dead(pid: int, deadline_s: float = DEATH_DEADLINE_S) -> None:
    deadline = time.monotonic() + deadline_s
    while owners.is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.002)


@dataclass
class Killer:
    """A ``CrashAt`` that kills its victim when the first operation of a kind reaches a point."""

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
async def edge_here(folder: Path, substrate: Substrate, killer: CrashAt) -> AsyncIterator[EdgeClient]:
    # What was waiting beside the call that was cut short fails, and nobody asks.
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    async with (
        serve_boxes(folder, substrate, Limits(max_warm=0), crash_at=killer) as edge,
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
from sandbox.edge import Limits, serve_boxes
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
    async with serve_boxes(folder, Process(), Limits(max_warm=0), crash_at=die) as edge, serving(edge, folder / SOCKET):
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


async def lose_in(client: EdgeClient, folder: Path, kind: str, point: str, aim: Callable[[], None]) -> None:
    """Use a kind of operation in a box of its own, which is lost while the first one is at a point."""
    box = await client.create(kind, SPEC)
    aim()
    first = await outcome(box, kind)
    again = await client.attach(kind)
    second = await outcome(again, kind)
    if point == "intent" and kind not in WITHOUT_AGENT | FORGIVING:
        assert (first, second) == (SandboxLost, told(kind)), kind
    else:
        assert first == second or {first, second} == {Unknown, SandboxLost}, kind
    with pytest.raises(SandboxLost):
        await again.exec("true")
    has_result = None if kind in WITHOUT_AGENT else point != "intent"
    check_log(folder / "boxes" / box.hold.box_id, kind, has_result=has_result)


@pytest.mark.parametrize("point", POINTS)
def test_an_agent_dies_and_its_box_is_lost(socket_folder: Path, isolated: Process, point: str) -> None:
    # A frozen agent ends when it is let go.
    killer = Killer(deadline_s=0.2)

    async def play() -> None:
        async with edge_here(socket_folder, isolated, killer) as client:
            for kind in KINDS:

                def aim(kind: str = kind) -> None:
                    killer.aim(point, kind, agent_of_this_process())

                await lose_in(client, socket_folder, kind, point, aim)
                assert not killer.victim
                with contextlib.suppress(ValueError):
                    while agent_of_this_process():
                        await asyncio.sleep(0.002)

    asyncio.run(play())


def test_an_agent_that_is_silent_is_found_by_its_heartbeat(
    socket_folder: Path, isolated: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SWEEP_S", 0.05), ("HEARTBEAT_S", 0.1), ("BEAT_DEADLINE_S", 0.5)):
        monkeypatch.setattr(edge, name, value)

    async def play() -> None:
        async with edge_here(socket_folder, isolated, Killer()) as client:
            box = await client.create("r", SPEC)
            await box.exec("echo on")
            agent = agent_of_this_process()
            os.kill(agent, signal.SIGSTOP)
            async with asyncio.timeout(10):
                while (await client.list())[0]["state"] == "open":
                    await asyncio.sleep(0.05)
            with pytest.raises(SandboxLost, match="the agent gave no sign of life within"):
                await box.exec("true")
            await asyncio.to_thread(wait_until_dead, agent)
            assert not owners.is_alive(agent), "a stopped agent is killed with its box"

    asyncio.run(play())


def test_a_box_that_died_in_the_pool_is_handed_to_nobody(isolated: Process) -> None:
    substrate = Function(base=isolated, warm=1)

    async def play() -> None:
        async with substrate.open(SPEC) as box:
            await box.exec("touch spoils-it")
        await settled()
        waiting = agent_of_this_process()
        os.kill(waiting, signal.SIGKILL)
        async with substrate.open(SPEC) as box:
            assert (await box.exec("echo fresh; ls")).stdout == b"fresh\nseed\n"
        await close_pools()

    asyncio.run(play())


def test_a_full_disk_stops_a_box_and_room_lets_it_go_on(tmp_path: Path, socket_folder: Path, isolated: Process) -> None:
    """The edge's folder on a file system of its own, as small as it can be."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path], check=True)
    ballast = tmp_path / "ballast"

    async def play() -> None:
        async with edge_here(socket_folder, isolated, Killer()) as client:
            box = await client.create("r", SPEC)
            with contextlib.suppress(OSError):
                ballast.write_bytes(bytes(2 << 20))
            seen: list[bytes] = []
            with pytest.raises(SandboxError, match="No space left on device"):
                await count_for_ever(box, seen)
            ballast.unlink()
            again = await client.attach("r")
            assert [(await again.exec(COUNT)).stdout for _ in seen] == seen
            # The one that was hit is begun, or its result was kept until there was room for it.
            assert (await again.exec(COUNT)).stdout == b"x\n" * (len(seen) + 1)

    async def count_for_ever(box: Operations, seen: list[bytes]) -> None:
        while True:
            seen.append((await box.exec(COUNT)).stdout)

    try:
        asyncio.run(play())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("point", POINTS[:-1])
@pytest.mark.parametrize("kind", ["exec", "write"])
@pytest.mark.docker
def test_the_agent_of_a_container_dies(tmp_path: Path, daemon: Daemon, kind: str, point: str) -> None:
    killer = Killer()

    async def play() -> None:
        async with Container(socket=daemon.socket).open(SPEC) as box:
            assert isinstance(box, container.ContainerSandbox)
            killer.aim(point, kind, box.started.pid)
            await lose_recorded(tmp_path, box, killer, kind)

    asyncio.run(play())
    assert daemon.boxes() == {}


@pytest.mark.parametrize("point", POINTS[:-1])
def test_a_kernel_of_its_own_dies(tmp_path: Path, point: str) -> None:
    substrate, killer = require(Gvisor()), Killer()

    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, gvisor.GvisorSandbox)
            of_box = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in gvisor.mentioning(box.folder)}
            (sentry,) = (pid for pid, command in of_box.items() if command.startswith("runsc-sandbox"))
            killer.aim(point, "exec", sentry)
            await lose_recorded(tmp_path, box, killer, "exec")

    asyncio.run(play())


async def lose_recorded(folder: Path, box: AgentSandbox, killer: Killer, kind: str) -> None:
    """As ``lose_in``, without an edge."""
    point = killer.point
    with contextlib.closing(TrajectoryLog.create(folder / "log", {})) as log:
        recorder = Recorder(box, log, crash_at=killer)
        first = await outcome(RecordedSandbox(recorder), kind)
        assert (first is SandboxLost) == (point == "intent")
        assert await outcome(RecordedSandbox(recorder), kind) == (Unknown if point == "intent" else first)
        with pytest.raises(SandboxLost):
            await box.exec("true")
    check_log(folder / "log", kind, has_result=point != "intent")


@dataclass
class Daemon:
    """A Docker daemon of these tests' own."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> str:
        return str(self.folder / "docker.sock")

    def start(self, *options: str) -> None:
        self.process = dockerd.start(self.folder, *options) or self.process

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait(20)

    def boxes(self) -> dict[str, str]:
        """Those it has after a while in which it can remove what it is removing."""
        deadline = time.monotonic() + 15
        while (found := container.owned(container.connect(self.socket))) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found


@pytest.fixture(scope="module")
def own_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    found = Daemon(tmp_path_factory.mktemp("daemon"))
    try:
        found.start()
        Container(socket=found.socket).check()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    try:
        yield found
    finally:
        # It clears away what it had when it was last killed.
        found.start()
        found.signal(signal.SIGTERM)
        assert found.process is not None
        found.process.wait(30)
        subprocess.run(["umount", found.folder / "data"], capture_output=True, check=False)
        shutil.rmtree(found.folder)


@pytest.fixture
def daemon(own_daemon: Daemon) -> Daemon:
    own_daemon.start()
    return own_daemon


class Rendezvous:
    """Each first operation of a kind waits at the point for those of the other kinds; then the daemon is killed."""

    def __init__(self, point: str, kinds: Collection[str], daemon: Daemon) -> None:
        self._point = point
        self._left = set(kinds)
        self._barrier = threading.Barrier(len(kinds), action=daemon.kill, timeout=60)

    def crash_at(self, kind: str) -> CrashAt:
        def arrive(point: str, what: str) -> None:
            if (point, what) == (self._point, kind) and kind in self._left:
                self._left.remove(kind)
                self._barrier.wait()

        return arrive


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.docker
def test_a_daemon_dies_and_so_do_its_boxes(socket_folder: Path, daemon: Daemon, point: str) -> None:
    """A box for each kind, with an edge in a thread of its own, since all are stopped where the daemon dies."""
    rendezvous = Rendezvous(point, KINDS, daemon)

    async def play(kind: str) -> None:
        folder = socket_folder / kind
        folder.mkdir()
        async with edge_here(folder, Container(socket=daemon.socket), rendezvous.crash_at(kind)) as client:
            await lose_in(client, folder, kind, point, lambda: None)

    with ThreadPoolExecutor(len(KINDS)) as threads:
        list(threads.map(lambda kind: asyncio.run(play(kind)), KINDS))
    daemon.start()
    assert daemon.boxes() == {}


@pytest.mark.parametrize("options", [[], ["--live-restore"]], ids=["plain", "live-restore"])
@pytest.mark.docker
def test_a_daemon_that_comes_back_has_no_box_of_the_dead(daemon: Daemon, options: list[str]) -> None:
    daemon.kill()
    daemon.start(*options)
    substrate = Container(socket=daemon.socket)

    async def die_while_a_command_runs(box: AgentSandbox) -> int:
        assert isinstance(box, container.ContainerSandbox)
        running = asyncio.create_task(box.exec("sleep 60", timeout_s=90))
        await asyncio.sleep(0.2)
        daemon.kill()
        with pytest.raises(SandboxLost):
            await asyncio.wait_for(running, 10)
        assert owners.is_alive(box.started.pid), "the daemon's death alone ends no box"
        return box.started.pid

    async def play() -> None:
        stack = contextlib.AsyncExitStack()
        agent = await die_while_a_command_runs(await stack.enter_async_context(substrate.open(SPEC)))
        with pytest.raises(SandboxLost, match="so it could not remove a box"):
            await stack.aclose()
        # Nobody needed a daemon to end it.
        wait_until_dead(agent)
        assert not owners.is_alive(agent)
        with pytest.raises(SandboxLost, match="so it could not"):
            await stack.enter_async_context(substrate.open(SPEC))
        daemon.start(*options)
        async with substrate.open(SPEC) as box:
            assert (await box.exec("echo new")).stdout == b"new\n"

    asyncio.run(play())
    assert daemon.boxes() == {}


@pytest.mark.docker
def test_a_daemon_that_hangs_holds_nobody_up(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(container, "CALL_DEADLINE_S", 1.0)
    monkeypatch.setattr(dockerd, "PING_DEADLINE_S", 0.5)
    monkeypatch.setattr("sandbox.client.REPLY_GRACE_S", 0.5)
    substrate = Container(socket=daemon.socket)

    async def within(seconds: float, attempt: Awaitable[object], message: str) -> None:
        started = time.monotonic()
        with pytest.raises(SandboxLost, match=message):
            await attempt
        assert time.monotonic() - started < seconds

    async def play() -> None:
        stack = contextlib.AsyncExitStack()
        box = await stack.enter_async_context(substrate.open(SPEC))
        assert isinstance(box, container.ContainerSandbox)
        daemon.signal(signal.SIGSTOP)
        try:
            await within(4, box.exec("true", timeout_s=0.5), "did not answer operation")
            wait_until_dead(box.started.pid)
            wait_until_dead(box.started.pid)
            assert not owners.is_alive(box.started.pid)
            await within(4, stack.aclose(), "could not remove a box")
            await within(4, contextlib.AsyncExitStack().enter_async_context(substrate.open(SPEC)), "so it could not")
            with pytest.raises(SandboxUnavailable, match="no Docker daemon answers"):
                substrate.check()
        finally:
            daemon.signal(signal.SIGCONT)
        async with substrate.open(SPEC) as box:
            assert (await box.exec("echo new")).stdout == b"new\n"

    for cached in (container.connect, container._client):
        # So that this test's deadline holds in it, and only in it.
        request.addfinalizer(cached.cache_clear)
        cached.cache_clear()
    asyncio.run(play())
    assert daemon.boxes() == {}


@pytest.mark.parametrize("how", ["kill", "remove_container"])
@pytest.mark.docker
def test_a_container_that_somebody_ends_is_lost(daemon: Daemon, how: str) -> None:
    async def play() -> None:
        async with Container(socket=daemon.socket).open(SPEC) as box:
            assert isinstance(box, container.ContainerSandbox)
            running = asyncio.create_task(box.exec("sleep 60", timeout_s=90))
            await asyncio.sleep(0.2)
            options = {"force": True} if how == "remove_container" else {}
            await asyncio.to_thread(getattr(box.started.client, how), box.started.container, **options)
            for call in (running, box.exec("true"), box.read("seed")):
                with pytest.raises(SandboxLost):
                    await asyncio.wait_for(call, 10)

    asyncio.run(play())
    assert daemon.boxes() == {}


@pytest.mark.docker
def test_a_start_that_nobody_waits_for_leaves_no_box(daemon: Daemon) -> None:
    async def play() -> None:
        for delay_s in (0.0, 0.02, 0.1):
            opening = asyncio.create_task(Container(socket=daemon.socket).open(SPEC).__aenter__())
            await asyncio.sleep(delay_s)
            opening.cancel()
            await asyncio.wait({opening})

    asyncio.run(play())
    assert daemon.boxes() == {}


@pytest.mark.docker
def test_a_storm_of_creations_is_queued_and_the_rest_refused(socket_folder: Path, daemon: Daemon) -> None:
    limits = Limits(max_boxes=12, max_waiting=8, wait_s=60, max_warm=0)

    async def use_one(edge: Edge, number: int) -> str:
        try:
            hold = await edge.create(f"r{number}", SPEC, token="t")
        except EdgeBusy:
            return "refused"
        await edge.close(hold.box_id, hold.epoch)
        return "made"

    async def play() -> None:
        async with serve_boxes(socket_folder, Container(socket=daemon.socket), limits) as edge:
            came_to = await asyncio.gather(*(use_one(edge, number) for number in range(32)))
        assert Counter(came_to) == {"made": 20, "refused": 12}

    asyncio.run(play())
    assert daemon.boxes() == {}
