"""How quick and how small boxes are: beside ``docker exec`` through its SDK, SWE-ReX and llm-sandbox, in one run.

    python -m benchmarks.sandbox [--quick] [--json FILE]

All run commands in Docker containers made of the same local image, without network. What is compared is done in turn,
in short runs, so that whatever else the machine does hits all alike. The peers are not dependencies:
``pip install -c constraints.txt -e '.[bench]'``. It needs root and a Docker daemon.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:
    # Started by its path, when this folder would come first and this file be taken for the package `sandbox`.
    sys.path[0] = str(Path(__file__).parents[1])

import docker
from rich.console import Console
from rich.table import Table

from benchmarks.measure import MIB, Metric, report
from benchmarks.sandbox_peers import LlmSandbox, Peer, all_peers
from posttrain.errors import RecipeError, SandboxError
from posttrain.protocols import Substrate
from sandbox import cgroups, owners
from sandbox.bench import (
    SNIPPET,
    SNIPPET_OUTPUT,
    SPEC,
    Action,
    Latency,
    alternate,
    calling,
    executing,
    log_cost,
    opening,
    warmed,
)
from sandbox.client import AgentSandbox
from sandbox.conformance import find_substrate
from sandbox.container import OWNER, REPOSITORY, Container
from sandbox.images import build
from sandbox.pool import close_pools
from sandbox.process import Process

OURS = "posttrain"
OPENS_AT_ONCE = 4
NUM_SPINNING = 16
IN_A_ROW = 10
"""How often each does a thing before it is another's turn."""
PAUSE_S = 0.05
SPIN = "while :; do :; done"


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done."""

    execs: int = 100
    snippets: int = 50
    opens: int = 10
    logged: int = 400
    idle: int = 100
    live: int = 300
    neighbour: int = 100


QUICK = Size(execs=20, snippets=10, opens=3, logged=100, idle=10, live=300, neighbour=30)


@dataclass(slots=True)
class Results:
    """What has been found so far."""

    metrics: list[Metric] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    """Metric or peer -> why there is no figure."""
    latencies: dict[str, dict[str, Latency]] = field(default_factory=dict)
    """What was done -> by whom."""

    def add(self, name: str, value: float, unit: str = "ms", goal: str = "") -> None:
        self.metrics.append(Metric(name, value, unit, goal))


async def compare_commands(peers: list[Peer], size: Size, results: Results) -> None:
    """A command and a Python snippet in open containers."""
    async with contextlib.AsyncExitStack() as stack:
        box = await stack.enter_async_context(Container().open(SPEC))
        assert isinstance(box, AgentSandbox)
        # The snippets come first: their interpreter starts in a box that nothing has run in.
        snippets: dict[str, Action] = {OURS: calling(box)}
        commands: dict[str, Action] = {OURS: executing(box, "true")}
        for peer in peers:
            with unless_it_fails(peer.name, results):
                await stack.enter_async_context(peer.opened())
                await peer.execute("true")
                snippets[peer.name] = functools.partial(peer.python, SNIPPET, SNIPPET_OUTPUT.decode())
                commands[peer.name] = functools.partial(peer.execute, "true")
        found = await alternate(snippets, size.snippets // IN_A_ROW, in_a_row=IN_A_ROW, pause_s=PAUSE_S)
        results.latencies["python snippet, container"] = found
        results.add("python_snippet_ms", found[OURS].p50_ms, goal="<= 5")
        found = await alternate(commands, size.execs // IN_A_ROW, in_a_row=IN_A_ROW, pause_s=PAUSE_S)
        results.latencies["exec true, container"] = found
        results.add("exec_true_ms", found[OURS].p50_ms, goal="<= 3")
        results.add("docker_exec_ratio", found["docker exec"].p50_ms / found[OURS].p50_ms, "times", ">= 15")


async def compare_opening(peers: list[Peer], size: Size, results: Results) -> None:
    """New boxes of every kind, and boxes that were started ahead."""
    actions: dict[str, Action] = {OURS: opening(Container())}
    for peer in peers:
        if peer.name not in results.missing:
            actions[peer.name] = functools.partial(only_opened, peer)
    results.latencies["cold start, container"] = found = await alternate(actions, size.opens)
    results.add("container_cold_ms", found[OURS].p50_ms, goal="<= 250")
    for name, metric, goal in (
        ("process", "process_cold_ms", "<= 40"),
        ("gvisor", "gvisor_cold_ms", "<= 300"),
        ("microvm", "vm_restore_ms", "<= 400"),
    ):
        try:
            substrate = find_substrate(name)
            substrate.check()
            own = await alternate({OURS: opening(substrate)}, size.opens)
        except (RecipeError, SandboxError) as problem:
            results.missing[metric] = str(problem)
            continue
        results.latencies[f"cold start, {name}"] = own
        results.add(metric, own[OURS].p50_ms, goal=goal)


async def compare_taking(peers: list[Peer], size: Size, results: Results) -> None:
    """Containers that were started ahead. Only llm-sandbox has a pool, too."""
    actions: dict[str, Action] = {OURS: opening(warmed(Container()))}
    with contextlib.ExitStack() as stack:
        for peer in peers:
            if isinstance(peer, LlmSandbox) and peer.name not in results.missing:
                actions[peer.name] = stack.enter_context(peer.pool())
        found = results.latencies["warm acquire, container"] = await alternate(
            actions, size.opens, warm_up=2, pause_s=PAUSE_S
        )
    results.add("warm_acquire_ms", found[OURS].p50_ms, goal="<= 5")
    await close_pools()


async def only_opened(peer: Peer) -> float:
    async with peer.opened() as took:
        return took


async def measure_log(size: Size, results: Results) -> None:
    """What it costs that a command is on disk before it runs and its result before anyone sees it."""
    found = await log_cost(Process(), size.logged)
    results.latencies["exec true, process"] = {OURS: found["plain"]}
    results.latencies["exec true, process, logged"] = {OURS: found["recorded"]}
    results.add("log_ms_per_op", found["recorded"].p50_ms - found["plain"].p50_ms, goal="<= 0.5")
    results.add("disk_sync_ms", sync_ms(size.logged))


def sync_ms(count: int) -> float:
    """How long the disk takes to make a few hundred bytes durable. A call with a log waits for that twice."""
    seconds = []
    with tempfile.TemporaryFile() as file:
        file.write(bytes(512 * count))
        os.fsync(file.fileno())
        for number in range(count):
            started = time.perf_counter()
            os.pwrite(file.fileno(), b"x" * 512, 512 * number)
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - started)
    return Latency(tuple(seconds)).p50_ms


async def measure_idle(size: Size, results: Results) -> None:
    """Memory of containers that wait: their processes, Docker's for each of them, Docker's own growth, the kernel's."""
    daemons_before = sum(map(pss_bytes, pids_of_daemons()))
    async with boxes(Container(), size.idle, "idle containers"):
        agents = pids_of_containers()
        assert len(agents) == size.idle, f"{len(agents)} containers of this process, expected {size.idle}"
        shims = [parent_of(pid) for pid in agents]
        daemons = sum(map(pss_bytes, pids_of_daemons())) - daemons_before
        total = sum(map(pss_bytes, [*agents, *shims])) + daemons + sum(map(kernel_bytes, agents))
    results.add("idle_100_containers_mib", total / MIB * 100 / size.idle, "MiB", "<= 1024")


async def measure_neighbours(size: Size, results: Results) -> None:
    """A command in one box while hundreds live, and while some of them take all the CPU they can get."""
    async with Process().open(SPEC) as box:
        action = {OURS: executing(box, "true")}
        alone = await alternate(action, size.neighbour, warm_up=3)
        async with boxes(Process(), size.live - 1, "live process boxes") as others:
            answers = await asyncio.gather(*(other.exec(["true"], timeout_s=60.0) for other in others[::10]))
            assert all(answer.ok for answer in answers)
            beside = await alternate(action, size.neighbour, warm_up=3)
            spinning = [asyncio.create_task(other.exec(SPIN, timeout_s=600.0)) for other in others[:NUM_SPINNING]]
            await asyncio.sleep(0.5)
            loaded = await alternate(action, size.neighbour, warm_up=3)
            for task in spinning:
                task.cancel()
            await asyncio.gather(*spinning, return_exceptions=True)
            results.add("live_process_boxes", len(others) + 1, "boxes", ">= 300")
    live = f"{size.live} live"
    for name, found in (("alone", alone), (live, beside), (f"{live}, {NUM_SPINNING} busy", loaded)):
        results.latencies[f"exec true, {name}"] = found
    results.add("neighbour_alone_ms", alone[OURS].p50_ms)
    results.add("neighbour_among_idle_ms", beside[OURS].p50_ms)
    results.add("neighbour_under_load_ms", loaded[OURS].p50_ms)
    results.add("neighbour_under_load_p95_ms", loaded[OURS].p95_ms)


@contextlib.asynccontextmanager
async def boxes(substrate: Substrate, count: int, what: str) -> AsyncIterator[list[AgentSandbox]]:
    """Many open boxes."""
    opened: list[AgentSandbox] = []
    room = asyncio.Semaphore(OPENS_AT_ONCE)
    closing = asyncio.Event()

    async def hold() -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with room:
                box = await stack.enter_async_context(substrate.open(SPEC))
            assert isinstance(box, AgentSandbox)
            opened.append(box)
            await closing.wait()

    holders = [asyncio.create_task(hold()) for _ in range(count)]
    try:
        while len(opened) < count:
            done, _ = await asyncio.wait(holders, timeout=0.5, return_when=asyncio.FIRST_EXCEPTION)
            for holder in done:
                holder.result()
            say(f"{what}: {len(opened)} of {count}")
        yield opened
    finally:
        closing.set()
        await asyncio.gather(*holders, return_exceptions=True)


@contextlib.contextmanager
def unless_it_fails(name: str, results: Results) -> Iterator[None]:
    """A peer may fail in whatever way it likes; it is then left out and the reason told."""
    try:
        yield
    except Exception as problem:  # noqa: BLE001 (the peers' errors are of any kind)
        results.missing[name] = f"{type(problem).__name__}: {problem}".strip()


def pids_of_containers() -> list[int]:
    """The agents of this process's containers: process 1 of each."""
    client = docker.from_env().api
    found = client.containers(filters={"label": f"{OWNER}={owners.own()}"})
    return [client.inspect_container(container["Id"])["State"]["Pid"] for container in found]


def pids_of_daemons() -> list[int]:
    names = {"dockerd", "containerd"}
    return [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/comm") if path.read_text().strip() in names]


def parent_of(pid: int) -> int:
    """For process 1 of a container, its containerd-shim."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pss_bytes(pid: int) -> int:
    """Memory of a process, with its share of what it has in common with others."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def kernel_bytes(pid: int) -> int:
    """What the kernel holds for the control group of a process: stacks, page tables, descriptors."""
    group = cgroups.of(pid)
    assert group is not None, f"the control group of {pid} cannot be read"
    version_1 = group.memory / "memory.kmem.usage_in_bytes"
    if version_1.exists():
        return int(version_1.read_text())
    return next(int(line.split()[1]) for line in (group.memory / "memory.stat").open() if line.startswith("kernel "))


def say(text: str) -> None:
    """One line of progress, which the next replaces on a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
    else:
        sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def allow_many_files() -> None:
    """Hundreds of boxes take five descriptors each."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def run(size: Size) -> tuple[Results, dict[str, str]]:
    """Everything, and by peer what was done so that it runs here."""
    results = Results()
    async with Container().open(SPEC):
        # Docker has the image now, if it had not.
        image = build.require(SPEC.image)
    with all_peers(f"{REPOSITORY}:{image.name}-{image.digest}") as (peers, missing):
        results.missing.update(missing)
        say("commands in containers, ours and the peers'")
        await compare_commands(peers, size, results)
        say("new boxes")
        await compare_opening(peers, size, results)
        await compare_taking(peers, size, results)
        notes = {peer.name: peer.note for peer in peers}
    say("the trajectory log")
    await measure_log(size, results)
    await measure_idle(size, results)
    await measure_neighbours(size, results)
    say("")
    return results, notes


def print_latencies(results: Results, notes: dict[str, str]) -> None:
    """Who took how long for what, in milliseconds."""
    table = Table(title="milliseconds, p50 / p95", title_justify="left")
    columns = [OURS, *notes]
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for what, found in results.latencies.items():
        row = [f"{found[name].p50_ms:.2f} / {found[name].p95_ms:.2f}" if name in found else "" for name in columns]
        table.add_row(what, *row)
    console = Console(width=110, highlight=False)
    console.print(table)
    for name, note in notes.items():
        console.print(f"{name}: {note}.")
    for name, reason in results.missing.items():
        console.print(f"n/a {name}: {reason}", style="bold")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller form that takes less than 50 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics here, too")
    options = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("it needs root, to count the memory of Docker's processes and to enter network namespaces")
    allow_many_files()
    try:
        results, notes = asyncio.run(run(QUICK if options.quick else Size()))
    except SandboxError as problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    latencies = {
        what: {
            name: {"p50_ms": found.p50_ms, "p95_ms": found.p95_ms, "n": len(found.seconds)}
            for name, found in by.items()
        }
        for what, by in results.latencies.items()
    }
    print_latencies(results, notes)
    facts = {"load_average": os.getloadavg(), "latencies": latencies, "peers": notes, "not_measured": results.missing}
    report("sandboxes", results.metrics, options.json, **facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
