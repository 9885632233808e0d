"""Boxes started ahead of their use, and the life of a box from a pool or without one."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from typing import Protocol

from posttrain.errors import SandboxError, SandboxLost
from posttrain.types import SandboxSpec
from sandbox.client import AgentSandbox, bare, prepare

Start = Callable[[SandboxSpec], Awaitable[AgentSandbox]]
Stop = Callable[[AgentSandbox], Awaitable[None]]

MAX_STARTS = 4
"""Starts under way at once; a daemon on few cores is not faster with more."""


class Pool:
    """Keeps ``size`` started boxes ready. Each is handed out once and its taker stops it.

    With ``reuse`` the taker hands the box back by ``give_back`` or ``discard``, and a box that is out counts as ready,
    since it is expected back.
    """

    def __init__(
        self, start: Callable[[], Awaitable[AgentSandbox]], stop: Stop, size: int, *, reuse: bool = False
    ) -> None:
        self._start = start
        self._stop = stop
        self._size = size
        self._reuse = reuse
        self._out = 0
        self._ready: deque[AgentSandbox] = deque()
        self._starting: set[asyncio.Task[None]] = set()
        self._start_slots = asyncio.Semaphore(MAX_STARTS)

    async def take(self) -> AgentSandbox:
        """A box that answers: a ready one, else one started for this call. One that died waiting is discarded."""
        while self._ready:
            box = self._ready.popleft()
            try:
                await box.list()
            except SandboxLost:
                await self._stop(box)
                continue
            break
        else:
            async with self._start_slots:
                box = await self._start()
        self._out += self._reuse
        self._refill()
        return box

    async def give_back(self, box: AgentSandbox) -> None:
        """Have a box handed out again. There must be nothing in it of whoever had it."""
        self._out -= 1
        if len(self._ready) < self._size:
            self._ready.append(box)
        else:
            await self._stop(box)

    async def discard(self, box: AgentSandbox) -> None:
        """Stop a box that was out, and start another in its place."""
        self._out -= 1
        self._refill()
        await self._stop(box)

    async def resize(self, size: int) -> None:
        """Keep ``size`` boxes ready from now on."""
        self._size = size
        self._refill()
        while len(self._ready) > self._size:
            await self._stop(self._ready.popleft())

    async def close(self) -> None:
        """Stop what is ready and what is being started."""
        self._size = 0
        await asyncio.gather(*self._starting, return_exceptions=True)
        while self._ready:
            await self._stop(self._ready.popleft())

    async def settle(self) -> None:
        """Wait for the starts that are under way."""
        while self._starting:
            await asyncio.wait(set(self._starting))

    def _refill(self) -> None:
        for _ in range(self._size - len(self._ready) - len(self._starting) - self._out):
            task = asyncio.get_running_loop().create_task(self._add())
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    async def _add(self) -> None:
        async with self._start_slots:
            if len(self._ready) >= self._size:
                return
            # A box that cannot be started ahead will be tried again by whoever needs one, who gets the error.
            with contextlib.suppress(SandboxError):
                self._ready.append(await self._start())


class Pooled(Hashable, Protocol):
    """A substrate that can start boxes ahead of their use."""

    @property
    def warm(self) -> int:
        """How many of each kind to keep ready."""
        ...


_pools: dict[tuple[Hashable, str], tuple[asyncio.AbstractEventLoop, Pool]] = {}


@contextlib.asynccontextmanager
async def opened(substrate: Pooled, spec: SandboxSpec, *, start: Start, stop: Stop) -> AsyncIterator[AgentSandbox]:
    """A fresh box, from a pool when the substrate keeps one; stopped at the end, whatever happens."""
    kind = bare(spec)
    if substrate.warm:
        box = await shared(substrate, kind, substrate.warm, start=start, stop=stop).take()
    else:
        box = await start(kind)
    try:
        box.spec = spec
        await prepare(box)
        yield box
    finally:
        await stop(box)


def shared(owner: Hashable, kind: SandboxSpec, size: int, *, start: Start, stop: Stop, reuse: bool = False) -> Pool:
    """The pool of this process for boxes of this kind. A pool belongs to one event loop and is dropped with it."""
    key, loop = (owner, repr(kind)), asyncio.get_running_loop()
    found = _pools.get(key)
    if found is None or found[0] is not loop:
        found = _pools[key] = (loop, Pool(lambda: start(kind), stop, size, reuse=reuse))
    return found[1]


async def settled() -> None:
    """Wait until the pools of the running event loop start nothing any more: what can be ready is ready."""
    loop = asyncio.get_running_loop()
    for owner, pool in list(_pools.values()):
        if owner is loop:
            await pool.settle()


async def close_pools() -> None:
    """Remove the boxes this process has started ahead in the running event loop.

    Boxes that are not removed this way end with this process, since the agent stops when its channel closes.
    """
    loop = asyncio.get_running_loop()
    for key in [key for key, (owner, _) in _pools.items() if owner is loop]:
        await _pools.pop(key)[1].close()
