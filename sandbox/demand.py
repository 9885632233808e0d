"""Boxes started ahead of their use: as many of each kind as its demand lately was, none when that stops."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from posttrain.protocols import Sandbox, Substrate
from posttrain.types import SandboxSpec
from sandbox.client import AgentSandbox, bare, prepare
from sandbox.pool import Pool

MEMORY_S = 30.0
"""An arrival this long ago counts 1/e of one now."""
LEAD_S = 10.0
"""What arrives in this time, at the rate lately seen, waits started."""


@dataclass(slots=True)
class Demand:
    """The exponentially weighted arrival rate of one kind of box."""

    weight: float = 0.0
    counted_at: float = 0.0

    def arrived(self, now: float) -> None:
        self.weight, self.counted_at = self._decayed(now) + 1.0, now

    def wanted(self, now: float) -> int:
        """How many boxes should wait. A single arrival asks for none."""
        return round(self._decayed(now) / MEMORY_S * LEAD_S)

    def _decayed(self, now: float) -> float:
        return self.weight * math.exp((self.counted_at - now) / MEMORY_S)


@dataclass(slots=True)
class Kind:
    """Boxes that differ in their files only."""

    substrate: Substrate
    spec: SandboxSpec
    demand: Demand = field(default_factory=Demand)
    opened: dict[Sandbox, contextlib.AsyncExitStack] = field(default_factory=dict)
    """What ends each of them, waiting or in use."""

    async def start(self) -> Any:
        async with contextlib.AsyncExitStack() as stack:
            box = await stack.enter_async_context(self.substrate.open(self.spec))
            self.opened[box] = stack.pop_all()
        return box

    async def stop(self, box: Sandbox) -> None:
        await self.opened.pop(box).aclose()


class WarmBoxes:
    """Opens boxes, and keeps up to ``max_warm`` of each kind ready. Belongs to one event loop."""

    def __init__(self, max_warm: int, *, clock: Callable[[], float]) -> None:
        self.max_warm = max_warm
        self._clock = clock
        self._kinds: dict[tuple[str, str], tuple[Kind, Pool]] = {}

    @contextlib.asynccontextmanager
    async def open(self, substrate: Substrate, spec: SandboxSpec) -> AsyncIterator[Sandbox]:
        """A fresh box, one that waits if there is any. A substrate with a pool of its own is left to it."""
        if not self.max_warm or getattr(substrate, "warm", False):
            async with substrate.open(spec) as box:
                yield box
            return
        kind, pool = self._kind(substrate, bare(spec))
        kind.demand.arrived(self._clock())
        box = await pool.take()
        try:
            await _fill(box, spec)
            yield box
        finally:
            await kind.stop(box)

    async def resize(self, free: int) -> None:
        """Have as many boxes of each kind wait as are wanted, but no more than there is room for in all."""
        now = self._clock()
        wanted = {key: min(kind.demand.wanted(now), self.max_warm) for key, (kind, _) in self._kinds.items()}
        for key in sorted(wanted, key=wanted.__getitem__, reverse=True):
            size = max(0, min(wanted[key], free))
            free -= size
            kind, pool = self._kinds[key]
            await pool.resize(size)
            if not size and not kind.opened and kind.demand.counted_at < now - 10 * MEMORY_S:
                del self._kinds[key]

    async def close(self) -> None:
        """Stop every box that waits."""
        await asyncio.gather(*(pool.close() for _, pool in self._kinds.values()))

    def _kind(self, substrate: Substrate, spec: SandboxSpec) -> tuple[Kind, Pool]:
        key = (substrate.name, repr(spec))
        if key not in self._kinds:
            kind = Kind(substrate, spec)
            self._kinds[key] = kind, Pool(kind.start, kind.stop, 0)
        return self._kinds[key]


async def _fill(box: Sandbox, spec: SandboxSpec) -> None:
    """Add what ``bare`` left out."""
    if isinstance(box, AgentSandbox):
        box.spec = spec
        await prepare(box)
        return
    for path, data in spec.files.items():
        await box.write(path, data)
