"""A client and an edge over a socket, whichever of them dies, and when."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import SandboxLost
from posttrain.types import ExecStatus, SandboxSpec
from sandbox import cgroups
from sandbox.conformance import CHECKS, Check, check_box
from sandbox.edge import EdgeBusy, Limits, serve_boxes
from sandbox.edge_client import EdgeClient, EdgeSandbox, SocketLink
from sandbox.edge_server import SOCKET, serving
from sandbox.local import LocalUnsafe
from sandbox.log import Fenced, TrajectoryLog
from sandbox.process import Process
from sandbox.recorded import Diverged, Unknown
from tests.boxes import require

LOCAL = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)
SPEC = SandboxSpec(timeout_s=20.0)
POINTS = ("intent", "effect", "result", "reply")
COUNT = "echo x >> counter; cat counter"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder whose socket has a short enough name."""
    short = Path("/tmp") / f"edge-{uuid.uuid4().hex[:8]}"
    short.symlink_to(tmp_path)
    yield short
    short.unlink()


@pytest.fixture
def isolated() -> Process:
    return require(Process())


@contextlib.asynccontextmanager
async def edge_here(folder: Path, **options: Any) -> AsyncIterator[EdgeClient]:
    async with (
        serve_boxes(folder, LOCAL, options.pop("limits", None), **options) as edge,
        serving(edge, folder / SOCKET),
        EdgeClient(folder / SOCKET, retry_s=5) as client,
    ):
        yield client


def test_a_box_at_the_edge_is_used_like_any_other(folder: Path) -> None:
    async def play() -> None:
        async with edge_here(folder, limits=Limits(max_boxes=1, max_waiting=0)) as client:
            box = await client.create("r", SandboxSpec(files={"a": b"1"}))
            data = bytes(range(256)) * 4000
            await box.write("deep/b", data)
            assert await box.read("deep/b", max_bytes=1 << 21) == data
            assert await box.list() == ["a", "deep/b"]
            result = await box.exec(["cat"], stdin=b"\0\xff", env={"$bytes": "x"})
            assert (result.ok, result.stdout) == (True, b"\0\xff")
            with pytest.raises(FileNotFoundError):
                await box.read("absent")
            with pytest.raises(ValueError, match="without '\\.\\.'"):
                await box.read("../x")
            with pytest.raises(EdgeBusy):
                await client.create("s", SPEC)
            assert [row["state"] for row in await client.list()] == ["open", "lost"]
            await box.close()
            await box.close()
            with pytest.raises(SandboxLost, match="closed by its client"):
                await box.list()
            with pytest.raises(KeyError, match="no box"):
                await client.attach("never")

    asyncio.run(play())


def test_a_second_client_fast_forwards_and_the_first_is_told(folder: Path) -> None:
    async def play() -> None:
        async with edge_here(folder) as client, EdgeClient(folder / SOCKET) as other:
            first = await client.create("r", SPEC)
            results = [await first.exec(COUNT), await first.exec(COUNT)]
            second = await other.attach("r")
            assert [await second.exec(COUNT), await second.exec(COUNT)] == results
            with pytest.raises(Fenced):
                await first.exec(COUNT)
            again = await other.attach("r")
            with pytest.raises(Diverged):
                await again.exec("something else")
            assert await again.exec(COUNT) == results[0]
            assert (await again.exec(COUNT)).stdout == b"x\nx\n"
            assert (await again.exec(COUNT)).stdout == b"x\nx\nx\n"

    asyncio.run(play())


def test_a_connection_that_breaks_repeats_nothing(folder: Path) -> None:
    async def play() -> None:
        async with serve_boxes(folder, LOCAL) as edge, EdgeClient(folder / SOCKET, retry_s=5) as client:
            async with serving(edge, folder / SOCKET):
                box = await client.create("r", SPEC)
                assert (await box.exec(COUNT)).stdout == b"x\n"
                calls = [asyncio.create_task(box.exec(f"sleep 0.3; {COUNT}")), asyncio.create_task(box.list())]
                await asyncio.sleep(0.1)
                assert isinstance(client.link, SocketLink)
                assert client.link._writer is not None
                client.link._writer.transport.abort()
                await asyncio.gather(*calls)
            # The socket is gone and comes back.
            waiting = asyncio.create_task(box.exec(COUNT))
            await asyncio.sleep(0.1)
            async with serving(edge, folder / SOCKET):
                assert (await waiting).stdout == b"x\nx\nx\n"

    asyncio.run(play())


def test_an_edge_that_never_answers_is_a_lost_box(folder: Path) -> None:
    async def play() -> None:
        async with EdgeClient(folder / SOCKET, retry_s=0.1) as client:
            with pytest.raises(SandboxLost, match=r"no edge at .* start it with python -m sandbox\.edge --dir"):
                await client.create("r", SPEC)

    asyncio.run(play())


def test_an_edge_that_hangs_is_a_lost_box(folder: Path) -> None:
    async def play() -> None:
        hung = await asyncio.start_unix_server(lambda reader, writer: None, folder / SOCKET)
        async with hung, EdgeClient(folder / SOCKET, retry_s=0.3) as client:
            started = time.monotonic()
            with pytest.raises(SandboxLost, match="is there and has not answered"):
                await client.create("r", SPEC)
            assert time.monotonic() - started < 3

    asyncio.run(play())


def test_a_silent_edge_is_not_given_up_while_it_answers(folder: Path) -> None:
    async def play() -> None:
        async with (
            serve_boxes(folder, LOCAL) as edge,
            serving(edge, folder / SOCKET),
            EdgeClient(folder / SOCKET, retry_s=0.3) as client,
        ):
            box = await client.create("r", SPEC)
            assert (await box.exec("sleep 1; echo slow")).stdout == b"slow\n"

    asyncio.run(play())


def test_a_cancelled_command_is_dead_at_the_edge_too(folder: Path) -> None:
    async def play() -> None:
        async with edge_here(folder) as client:
            box = await client.create("r", SPEC)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(box.exec("sleep 0.5; touch late"), 0.2)
            await asyncio.sleep(0.5)
            assert await box.list() == []
            again = await client.attach("r")
            assert (await again.exec("sleep 0.5; touch late")).status is ExecStatus.CANCELLED

    asyncio.run(play())


def test_a_lease_is_renewed_while_the_client_lives(folder: Path) -> None:
    async def play() -> None:
        async with edge_here(folder, limits=Limits(lease_s=0.6)) as client:
            await client.create("r", SPEC)
            await asyncio.sleep(1.5)
            assert [row["state"] for row in await client.list()] == ["open"]
            await client.disconnect()
            await asyncio.sleep(2)
            async with EdgeClient(folder / SOCKET) as other:
                assert [row["state"] for row in await other.list()] == ["unattended"]

    asyncio.run(play())


@dataclass(frozen=True)
class AtTheEdge:
    """The boxes of an edge as a substrate, to run the conformance checks through it."""

    client: EdgeClient
    name: str = "edge"

    def capabilities(self) -> Mapping[str, Any]:
        return {}

    def check(self) -> None: ...

    @contextlib.asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[EdgeSandbox]:
        box = await self.client.create(uuid.uuid4().hex, spec)
        try:
            yield box
        finally:
            await box.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_box_at_the_edge_conforms(folder: Path, isolated: Process, check: Check) -> None:
    if check.__name__ == "a_lost_box_is_not_a_result":
        pytest.skip("a box at the edge cannot be killed by its client; the tests below kill the edge instead")

    async def play() -> None:
        async with (
            serve_boxes(folder, isolated) as edge,
            serving(edge, folder / SOCKET),
            EdgeClient(folder / SOCKET) as client,
        ):
            await check_box(AtTheEdge(client), check)

    asyncio.run(play())


CLIENT = """
import asyncio, sys
from pathlib import Path
from sandbox.edge_client import EdgeClient
async def live():
    async with EdgeClient(Path(sys.argv[1])) as client:
        box = await client.attach("r")
        await (box.exec({count!r}) if sys.argv[2] == "exec" else box.write("counter", b"x\\n"))
        await asyncio.sleep(60)
asyncio.run(live())
"""


async def count(box: EdgeSandbox, kind: str) -> None:
    """The non-idempotent operation: a second time would show."""
    await (box.exec(COUNT) if kind == "exec" else box.write("counter", b"x\n"))


@pytest.mark.parametrize("kind", ["exec", "write"])
@pytest.mark.parametrize("point", POINTS)
def test_a_client_killed_at_any_point_finds_its_box_and_its_result(
    folder: Path, isolated: Process, point: str, kind: str
) -> None:
    clients: list[subprocess.Popen[bytes]] = []
    killed = asyncio.Event()
    boxes: set[Path] = set()

    def kill_client(reached: str, what: str) -> None:
        if clients and (reached, what) == (point, kind) and not killed.is_set():
            clients[0].send_signal(signal.SIGKILL)
            clients[0].wait(10)
            killed.set()

    async def play() -> None:
        async with serve_boxes(folder, isolated, crash_at=kill_client) as edge, serving(edge, folder / SOCKET):
            async with EdgeClient(folder / SOCKET) as maker:
                before = descendants(os.getpid())
                await maker.create("r", SPEC)
                boxes.update(descendants(os.getpid()) - before)
            program = CLIENT.format(count=COUNT)
            clients.append(subprocess.Popen([sys.executable, "-c", program, str(folder / SOCKET), kind]))
            await asyncio.wait_for(killed.wait(), 30)
            async with EdgeClient(folder / SOCKET) as client:
                box = await client.attach("r")
                await count(box, kind)
                assert await box.read("counter") == b"x\n"
                await box.close()

    try:
        with nothing_left() as noted:
            noted[os.getpid()] = boxes
            asyncio.run(play())
    finally:
        for client in clients:
            client.kill()
            client.wait(10)


EDGE = """
import asyncio, os, signal, sys
from pathlib import Path
from sandbox.edge import serve_boxes
from sandbox.edge_server import SOCKET, serving
from sandbox.process import Process
def die(point, kind):
    if [point, kind] == sys.argv[2:]:
        os.kill(os.getpid(), signal.SIGKILL)
async def live():
    folder = Path(sys.argv[1])
    async with serve_boxes(folder, Process(), crash_at=die) as edge, serving(edge, folder / SOCKET):
        await asyncio.sleep(120)
asyncio.run(live())
"""


@pytest.mark.parametrize("kind", ["exec", "write"])
@pytest.mark.parametrize("point", POINTS)
def test_an_edge_killed_at_any_point_repeats_nothing_and_leaves_nothing(
    folder: Path, isolated: Process, point: str, kind: str
) -> None:
    edges: list[subprocess.Popen[bytes]] = []

    def start_edge(*crash: str) -> subprocess.Popen[bytes]:
        edges.append(subprocess.Popen([sys.executable, "-c", EDGE, str(folder), *crash]))
        return edges[-1]

    async def play() -> None:
        async with EdgeClient(folder / SOCKET, retry_s=30) as client:
            first = start_edge(point, kind)
            box = await client.create("r", SPEC)
            await box.list()
            noted[first.pid] = descendants(first.pid)
            calling = asyncio.create_task(count(box, kind))
            assert await asyncio.to_thread(first.wait, 30) == -signal.SIGKILL
            start_edge()
            # The client is still there and asks the new edge.
            await told(calling)
            again = await client.attach("r")
            assert await again.list() == []
            await told(count(again, kind))
            with pytest.raises(SandboxLost, match="the edge that held it ended"):
                await again.read("counter")

    async def told(call: Any) -> None:
        if point in ("result", "reply"):
            await call
        else:
            with pytest.raises(Unknown):
                await call

    with nothing_left() as noted:
        try:
            asyncio.run(play())
            edges[-1].send_signal(signal.SIGTERM)
            edges[-1].wait(20)
        finally:
            for edge in edges:
                edge.kill()
                edge.wait(10)
    (log,) = (TrajectoryLog.read(path) for path in (folder / "boxes").iterdir())
    assert [op.kind for op in log.operations] == ["list", kind]
    assert not list((folder / "boxes").glob("*/blobs/*"))


def mounts() -> set[str]:
    """What is mounted, but for Docker's, which come and go with other tests."""
    return {line for line in Path("/proc/self/mounts").read_text().splitlines() if "docker" not in line}


def descendants(pid: int) -> set[Path]:
    """The processes below one, as their folders in /proc."""
    below: set[Path] = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            below |= {Path("/proc", child)} | descendants(int(child))
    return below


@contextlib.contextmanager
def nothing_left() -> Iterator[dict[int, set[Path]]]:
    """Afterwards no process below the noted ones, no control group of theirs and no mount is left."""
    noted: dict[int, set[Path]] = {}
    mounted = mounts()
    yield noted
    deadline = time.monotonic() + 10
    while left := {str(path) for below in noted.values() for path in below if path.exists()}:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert noted
    assert all(noted.values()), "nothing was seen, so this proves nothing"
    for pid in noted:
        assert [group for group in cgroups.groups() if f":{pid}:" in group.name] == []
    assert mounts() <= mounted


def test_the_command_line_serves_and_a_client_that_was_killed_finds_its_box(folder: Path, isolated: Process) -> None:
    command = [sys.executable, "-m", "sandbox.edge", "--dir", str(folder), "--max-boxes", "2"]
    client = """
import asyncio, os, signal, sys
from pathlib import Path
from posttrain.types import SandboxSpec
from sandbox.edge_client import EdgeClient
async def live():
    client = EdgeClient(Path(sys.argv[1]))
    box = await (client.create if sys.argv[2] == "create" else lambda name, _: client.attach(name))("r", SandboxSpec())
    print(await box.exec("echo x >> counter; cat counter"), flush=True)
    if sys.argv[2] == "create":
        os.kill(os.getpid(), signal.SIGKILL)
    print(await box.exec("cat counter"))
    await box.close()
    await client.disconnect()
asyncio.run(live())
"""
    with nothing_left() as noted:
        edge = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert edge.stdout is not None
            assert edge.stdout.readline() == f"serving process boxes on {folder / SOCKET}\n"
            lives = []
            for how in ("create", "attach"):
                run = [sys.executable, "-c", client, str(folder / SOCKET), how]
                lives.append(subprocess.run(run, capture_output=True, timeout=60, check=False))
                noted[edge.pid] = noted.get(edge.pid, set()) | descendants(edge.pid)
            edge.send_signal(signal.SIGTERM)
            assert edge.wait(20) == 0
        finally:
            edge.kill()
            edge.wait(10)
            assert edge.stdout is not None
            edge.stdout.close()
    assert [life.returncode for life in lives] == [-signal.SIGKILL, 0], lives[1].stderr
    first, second = lives[0].stdout.splitlines(), lives[1].stdout.splitlines()
    assert first == second[:1], "the same bytes"
    assert b"stdout=b'x\\n'" in second[1]
    assert not (folder / SOCKET).exists()


def test_bad_arguments_are_explained(tmp_path: Path) -> None:
    for arguments, message in (
        (["--max-boxes", "0"], "Limits.max_boxes = 0"),
        (["--substrate", "no"], "substrate 'no'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "sandbox.edge", "--dir", str(tmp_path / "e"), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
