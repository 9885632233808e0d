"""How quick boxes are on this machine: ``posttrain sandbox bench``, and what ``benchmarks/sandbox.py`` builds on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import SandboxError
from posttrain.protocols import Substrate
from posttrain.types import ExecResult, SandboxSpec
from sandbox.client import AgentSandbox
from sandbox.function import Function
from sandbox.log import TrajectoryLog
from sandbox.pool import close_pools, settled
from sandbox.recorded import RecordedSandbox, Recorder, creation

SPEC = SandboxSpec(memory_mb=64, disk_mb=8)
SNIPPET = "print(sum(range(100)))"
SNIPPET_OUTPUT = b"4950\n"

FIGURES = {"open": "new box", "take": "warm box", "exec": "exec true", "call": "Python snippet"}

Action = Callable[[], Awaitable[float]]
"""Does something once and gives the seconds that the part of interest took."""


@dataclass(frozen=True, slots=True)
class Latency:
    """What an action took, each time."""

    seconds: tuple[float, ...]

    @property
    def p50_ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    @property
    def p95_ms(self) -> float:
        """What 95 % of the times do not exceed; with less than 20 of them, the longest."""
        return 1e3 * sorted(self.seconds)[math.ceil(0.95 * len(self.seconds)) - 1]


async def alternate(
    actions: Mapping[str, Action], rounds: int, *, in_a_row: int = 1, warm_up: int = 1, pause_s: float = 0.0
) -> dict[str, Latency]:
    """Every action in turn, so that whatever else the machine does hits all of them alike.

    Each is done ``warm_up`` times before that. The pause lets the action before come to rest, since a daemon clears up
    after it has answered, and doing it ``in_a_row`` keeps the caches that one left cold from being most of what is
    measured.
    """
    for action in actions.values():
        for _ in range(warm_up):
            await action()
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            await asyncio.sleep(pause_s)
            seconds[name] += [await action() for _ in range(in_a_row)]
    return {name: Latency(tuple(values)) for name, values in seconds.items()}


def executing(box: Any, *argv: str) -> Action:
    """A command in an open box."""

    async def action() -> float:
        started = time.perf_counter()
        result = await box.exec(argv)
        return _took(started, result, b"")

    return action


def calling(box: AgentSandbox) -> Action:
    """A Python snippet in an open box, in a process of its own."""

    async def action() -> float:
        started = time.perf_counter()
        result = await box.call(SNIPPET)
        return _took(started, result, SNIPPET_OUTPUT)

    return action


def _took(started: float, result: ExecResult, expected: bytes) -> float:
    took = time.perf_counter() - started
    if not result.ok or result.stdout != expected:
        raise SandboxError(f"expected exit code 0 and the output {expected!r}, got {result}")
    return took


def opening(substrate: Substrate, spec: SandboxSpec = SPEC) -> Action:
    """A box that is made when it is asked for, until it answers. Its removal is not part of the time."""

    async def action() -> float:
        started = time.perf_counter()
        async with substrate.open(spec):
            took = time.perf_counter() - started
        await settled()
        return took

    return action


def warmed(substrate: Substrate) -> Substrate:
    """The same kind, with boxes started ahead."""
    fields = dataclasses.fields(substrate)  # type: ignore[arg-type]  # what can be in a recipe is a dataclass
    if any(item.name == "warm" for item in fields):
        return dataclasses.replace(substrate, warm=2)  # type: ignore[type-var]
    return Function(base=substrate)


async def measure(substrate: Substrate, *, rounds: int = 12) -> dict[str, Latency | str]:
    """What there is of ``FIGURES``, and why the others are not there. A few seconds where a box takes 0.2 s to open."""
    found: dict[str, Latency | str] = {}

    async def run(name: str, action: Action, rounds: int, warm_up: int = 3) -> None:
        try:
            found.update(await alternate({name: action}, rounds, warm_up=warm_up))
        except SandboxError as problem:
            found[name] = str(problem)

    await run("open", opening(substrate), rounds // 4, 1)
    await run("take", opening(warmed(substrate)), rounds // 4, 1)
    async with substrate.open(SPEC) as box:
        # First, since the interpreter to be forked is started in a box in which nothing has run.
        if isinstance(box, AgentSandbox):
            await run("call", calling(box), rounds)
        await run("exec", executing(box, "true"), rounds)
    await close_pools()
    return found


async def log_cost(substrate: Substrate, count: int) -> dict[str, Latency]:
    """``exec true`` in one box, ``plain`` and ``recorded`` in turn."""
    async with substrate.open(SPEC) as box:
        with tempfile.TemporaryDirectory(prefix="posttrain-bench-") as folder:
            log = TrajectoryLog.create(Path(folder) / "log", creation(substrate, SPEC))
            with contextlib.closing(log):
                recorded = RecordedSandbox(Recorder(box, log))
                actions = {"plain": executing(box, "true"), "recorded": executing(recorded, "true")}
                return await alternate(actions, count // 10, in_a_row=10)
