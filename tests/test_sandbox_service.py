"""The service on a Ray cluster of two nodes, whichever of its parts dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from posttrain.errors import SandboxError, SandboxLost, SandboxUnavailable
from posttrain.types import ExecStatus, SandboxSpec
from sandbox.actors import GATEWAY, WATCHER, ActorLink, edge_folder, edge_name
from sandbox.edge import EdgeBusy, Limits
from sandbox.edge_client import EdgeClient, EdgeSandbox, SocketLink
from sandbox.edge_server import SOCKET
from sandbox.local import LocalUnsafe
from sandbox.log import Fenced
from sandbox.process import Process
from sandbox.recorded import Unknown
from sandbox.registry import QuotaExceeded, ServiceLimits
from sandbox.service import NAMESPACE, SandboxService, connect, start_service, stop_service
from tests.boxes import require
from tests.test_sandbox_edge_client import descendants

pytestmark = pytest.mark.timeout(150)

LOCAL = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)
SPEC = SandboxSpec()
COUNT = "echo x >> counter; cat counter"
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}
LIMITS = ServiceLimits(
    edge=Limits(max_boxes=3, max_warm=0),
    quotas={"job": 4, "job=small": 1},
    max_waiting=1,
    wait_s=1.5,
    heartbeat_s=0.2,
    edge_deadline_s=3.0,
)


@pytest.fixture(scope="module")
def isolated() -> Process:
    return require(Process())


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray itself notices a dead node within seconds.
    checks = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {**NODE, "include_dashboard": False, "_system_config": checks}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**NODE)
    path = os.pathsep.join(filter(None, sys.path))
    ray.init(cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def service(cluster: Cluster, isolated: Process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a service that runs."""
    folder = tmp_path_factory.mktemp("service")
    start_service(folder, [isolated, LOCAL], LIMITS)
    yield folder
    stop_service()


def run(play: Callable[[SandboxService], Any]) -> None:
    """Play a client, and leave no box behind."""

    async def live() -> None:
        async with connect() as service:
            try:
                await play(service)
            finally:
                for row in await service.ps():
                    if row["ended_s"] is None:
                        await (await service.attach(row["rollout_id"])).close()

    asyncio.run(live())


def edge_of(box: EdgeSandbox) -> str:
    return box.hold.box_id.partition("-")[0]


async def pid_of(service: SandboxService, edge: str) -> int:
    (pid,) = [found["pid"] for found in await service.edges() if found["name"] == edge]
    return int(pid)


async def one_on_each(service: SandboxService, name: str) -> dict[str, EdgeSandbox]:
    """A box on each edge, with one count in it."""
    boxes = {}
    for number in range(6):
        box = await service.create(f"{name}{number}", SPEC)
        if edge_of(box) in boxes:
            await box.close()
        boxes.setdefault(edge_of(box), box)
        if len(boxes) == 2:
            break
    for box in boxes.values():
        assert (await box.exec(COUNT)).stdout == b"x\n"
    return boxes


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> float:
    """How long it takes to come true."""
    started = time.monotonic()
    while not await condition():
        assert time.monotonic() - started < seconds
        await asyncio.sleep(0.05)
    return time.monotonic() - started


async def ended(processes: set[Path]) -> None:
    async def none_is_left() -> bool:
        return not any(path.exists() for path in processes)

    await until(none_is_left, 10)


def test_boxes_are_placed_on_both_nodes_and_listed_with_their_labels(service: Path) -> None:
    async def play(service: SandboxService) -> None:
        boxes = [await service.create(f"r{number}", SPEC, labels={"run": "a"}) for number in range(6)]
        assert sorted(edge_of(box) for box in boxes) == ["e0"] * 3 + ["e1"] * 3
        rows = (await service.ps())[-6:]
        assert [row["box_id"] for row in rows] == [box.hold.box_id for box in boxes]
        for row in rows:
            assert (row["state"], row["substrate"], row["cause"]) == ("open", "process", "")
            assert row["labels"] == {"owner": service.owner, "run": "a"}
            assert row["deadline_s"] == pytest.approx(time.time() + LIMITS.edge.ttl_max_s, abs=30)
        assert {edge["name"]: edge["num_boxes"] for edge in await service.edges()} == {"e0": 3, "e1": 3}
        # Full: one waits, and gets the room of the one that is closed; a second one may not even wait.
        waiting = asyncio.create_task(service.create("waits", SPEC))
        await asyncio.sleep(0.3)
        with pytest.raises(EdgeBusy, match="no edge has room and 1 wait"):
            await service.create("refused", SPEC)
        await boxes[0].close()
        assert edge_of(await waiting) == edge_of(boxes[0])
        with pytest.raises(EdgeBusy, match="no edge has had room within"):
            await service.create("late", SPEC)
        assert await boxes[1].list() == []

    run(play)


def test_quotas_count_what_is_there_now(service: Path) -> None:
    async def play(service: SandboxService) -> None:
        small = await service.create("s0", SPEC, labels={"job": "small"})
        with pytest.raises(QuotaExceeded, match="job=small has 1 boxes and quota 'job=small' allows 1"):
            await service.create("s1", SPEC, labels={"job": "small"})
        await small.close()
        await service.create("s1", SPEC, labels={"job": "small"})
        for number in range(4):
            await service.create(f"l{number}", SPEC, labels={"job": "large"})
        with pytest.raises(QuotaExceeded, match="job=large has 4 boxes and quota 'job' allows 4"):
            await service.create("l4", SPEC, labels={"job": "large"})

    run(play)


def test_what_cannot_be_is_refused(service: Path) -> None:
    async def play(service: SandboxService) -> None:
        await service.create("r", SPEC, substrate="local-unsafe")
        assert (await service.ps())[-1]["substrate"] == "local-unsafe"
        with pytest.raises(ValueError, match=r"rollout 'r' has box e\d-\w+ already \(open\); attach to it"):
            await service.create("r", SPEC)
        with pytest.raises(SandboxUnavailable, match=r"substrate = 'container': no edge serves it .*expected one of"):
            await service.create("s", SPEC, substrate="container")
        with pytest.raises(ValueError, match=r"ttl_max_s = 1000000000\.0: expected a time"):
            await service.create("s", SPEC, ttl_max_s=1e9)
        with pytest.raises(KeyError, match="rollout 'never' has no box"):
            await service.attach("never")
        assert sum(edge["num_boxes"] for edge in await service.edges()) == 1

    run(play)
    with pytest.raises(SandboxError, match="a service runs there already"):
        start_service(service)
    with pytest.raises(SandboxUnavailable, match="no sandbox service runs there"):
        connect("elsewhere")
    with pytest.raises(ValueError, match="expected an absolute path"):
        start_service(Path("relative"))


def test_a_client_that_comes_back_fast_forwards_over_socket_and_actor_alike(service: Path) -> None:
    async def play(service: SandboxService) -> None:
        first = await service.create("r", SPEC)
        assert isinstance(first._client.link, SocketLink), "the edge is on this host"
        assert (await first.exec(COUNT)).stdout == b"x\n"
        async with connect() as other:
            far = await other.attach("r")
            far._client = EdgeClient(ActorLink(edge_name(edge_of(first)), NAMESPACE))
            assert [(await far.exec(COUNT)).stdout for _ in range(2)] == [b"x\n", b"x\nx\n"]
            with pytest.raises(Fenced):
                await first.exec(COUNT)
            with pytest.raises(FileNotFoundError):
                await far.read("absent")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(far.exec("sleep 1; touch late"), 0.3)
            await asyncio.sleep(1)
            assert await far.list() == ["counter"]
            again = await other.attach("r")
            for _ in range(2):
                await again.exec(COUNT)
            with pytest.raises(FileNotFoundError):
                await again.read("absent")
            assert (await again.exec("sleep 1; touch late")).status is ExecStatus.CANCELLED

    run(play)


def test_forks_are_made_where_the_snapshot_lies_and_count(service: Path) -> None:
    async def play(service: SandboxService) -> None:
        box = await service.create("f", SPEC, labels={"job": "forked"})
        assert (await box.exec(COUNT)).stdout == b"x\n"
        forks = await box.fork(2)
        assert {edge_of(fork) for fork in forks} == {edge_of(box)}
        for fork in forks:
            assert (await fork.exec(COUNT)).stdout == b"x\nx\n"
        assert [row["labels"]["job"] for row in (await service.ps())[-3:]] == ["forked"] * 3
        await forks[0].close()
        # A client that comes back and makes the same calls has the same boxes, closed ones included.
        box = await service.attach("f")
        assert (await box.exec(COUNT)).stdout == b"x\n"
        again = await box.fork(2)
        assert [fork.hold.box_id for fork in again] == [fork.hold.box_id for fork in forks]
        for fork in again:
            assert (await fork.exec(COUNT)).stdout == b"x\nx\n"

    run(play)


def test_a_box_that_nobody_asked_the_service_for_is_removed(service: Path) -> None:
    async def play(_: SandboxService) -> None:
        async with EdgeClient(edge_folder(service, "e0") / SOCKET) as client:
            box = await client.create("stowaway", SPEC)

            async def is_removed() -> bool:
                return (await client.list())[-1]["state"] == "closed"

            await until(is_removed, 10)
            with pytest.raises(SandboxLost, match="the service does not know it"):
                await box.list()

    run(play)


def test_a_killed_gateway_and_a_killed_watcher_come_back(service: Path) -> None:
    async def play(service: SandboxService) -> None:
        boxes = await one_on_each(service, "g")
        for name in (GATEWAY, WATCHER):
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=False)
        # Those that have a box do not notice.
        for box in boxes.values():
            assert (await box.exec(COUNT)).stdout == b"x\nx\n"
        again = await service.attach((await service.ps())[-1]["rollout_id"])
        assert (await again.exec(COUNT)).stdout == b"x\n"
        await service.create("new", SPEC)
        await ActorLink(WATCHER, NAMESPACE).ask("ping")

    run(play)


def test_a_killed_edge_is_restarted_and_says_that_its_boxes_are_lost(service: Path) -> None:
    async def play(service: SandboxService) -> None:
        boxes = await one_on_each(service, "k")
        dead, living = boxes["e0"], boxes["e1"]
        pid = await pid_of(service, "e0")
        processes = descendants(pid)
        assert processes
        running = asyncio.create_task(dead.exec("sleep 30"))
        await asyncio.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unknown):
            await running
        with pytest.raises(SandboxLost, match=rf"box {dead.hold.box_id} is gone: the edge that held it ended"):
            await dead.exec(COUNT)
        assert (await living.exec(COUNT)).stdout == b"x\nx\n"
        await ended(processes)
        # What it did can still be asked.
        rows = {row["box_id"]: row for row in await service.ps()}
        assert rows[dead.hold.box_id]["state"] == "lost"
        again = await service.attach(rows[dead.hold.box_id]["rollout_id"])
        assert (await again.exec(COUNT)).stdout == b"x\n"
        assert set(await one_on_each(service, "after")) == {"e0", "e1"}
        assert await pid_of(service, "e0") != pid

    run(play)


def test_an_edge_that_hangs_is_lost_in_bounded_time(service: Path) -> None:
    async def play(service: SandboxService) -> None:
        boxes = await one_on_each(service, "h")
        pid = await pid_of(service, "e0")
        os.kill(pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            # Told by the gateway, or by the edge that is there instead.
            cause = r"edge e0 is lost: it has not answered|the edge that held it ended"
            with pytest.raises(SandboxLost, match=rf"box {boxes['e0'].hold.box_id} .*({cause})"):
                await boxes["e0"].exec(COUNT)
            assert time.monotonic() - started < 15
            assert (await boxes["e1"].exec(COUNT)).stdout == b"x\nx\n"
        finally:
            with contextlib.suppress(ProcessLookupError):
                # The watcher has had it killed, or is about to.
                os.kill(pid, signal.SIGCONT)

        async def is_back() -> bool:
            return await pid_of(service, "e0") != pid

        await until(is_back)
        (row,) = [row for row in await service.ps() if row["box_id"] == boxes["e0"].hold.box_id]
        assert (row["state"], row["cause"][:12]) == ("lost", "edge e0 is l")
        assert set(await one_on_each(service, "after-h")) == {"e0", "e1"}

    run(play)


def test_a_dead_node_takes_its_boxes_and_nothing_else_and_may_come_back(cluster: Cluster, service: Path) -> None:
    async def play(service: SandboxService) -> None:
        boxes = await one_on_each(service, "n")
        (node,) = cluster.worker_nodes
        (dead,) = [edge for edge in await service.edges() if edge["node_id"] == node.node_id]
        lost = boxes.pop(dead["name"])
        (living,) = boxes.values()
        processes = descendants(dead["pid"])
        assert processes
        cluster.remove_node(node, allow_graceful=False)

        async def is_lost() -> bool:
            return any(edge["state"] == "lost" for edge in await service.edges())

        assert await until(is_lost) < 20
        for attempt in (lost.exec(COUNT), service.attach(lost.rollout_id)):
            with pytest.raises(SandboxLost, match=rf"box {lost.hold.box_id} .*edge {dead['name']} is lost"):
                await attempt
        assert (await living.exec(COUNT)).stdout == b"x\nx\n"
        await ended(processes | {Path("/proc", str(dead["pid"]))})
        more = [await service.create(f"new{number}", SPEC, labels={"job": "large"}) for number in range(2)]
        assert {edge_of(box) for box in more} == {edge_of(living)}
        with pytest.raises(EdgeBusy):
            await service.create("new2", SPEC, labels={"job": "large"})
        counts = {edge["name"]: edge["num_boxes"] for edge in await service.edges()}
        assert counts == {dead["name"]: 0, edge_of(living): 3}
        # A node of the same host takes the dead one's edge up, whose logs lie there.
        cluster.add_node(**NODE)

        async def is_back() -> bool:
            return {edge["name"]: edge["state"] for edge in await service.edges()} == dict.fromkeys(counts, "up")

        await until(is_back)
        again = await service.attach(lost.rollout_id)
        assert (await again.exec(COUNT)).stdout == b"x\n"
        with pytest.raises(SandboxLost, match="the edge that held it ended"):
            await again.exec(COUNT)
        assert edge_of(await service.create("new2", SPEC, labels={"job": "large"})) == dead["name"]

    run(play)


def test_a_stopped_service_leaves_nothing_running_and_goes_on_from_its_folder(
    cluster: Cluster, service: Path, isolated: Process
) -> None:
    processes: set[Path] = set()

    async def before() -> str:
        async with connect() as service:
            box = await service.create("last", SPEC)
            await box.exec(COUNT)
            for edge in await service.edges():
                processes.update(descendants(edge["pid"]), {Path("/proc", str(edge["pid"]))})
            return box.hold.box_id

    async def after(box_id: str) -> None:
        await ended(processes)
        async with start_service(service, [isolated], LIMITS) as restarted:
            row = (await restarted.ps())[-1]
            assert (row["box_id"], row["state"]) == (box_id, "lost")
            assert row["cause"].endswith("is lost: the service was stopped")
            again = await restarted.attach("last")
            assert (await again.exec(COUNT)).stdout == b"x\n"

    box_id = asyncio.run(before())
    stop_service()
    asyncio.run(after(box_id))
