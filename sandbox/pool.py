"""Boxes started ahead of their use, and the life of a box from a pool or without one."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from dataclasses import replace
from typing import Protocol

from posttrain.errors import SandboxError, SandboxLost
from posttrain.types import SandboxSpec
from sandbox.client import AgentSandbox, write_files

Start = Callable[[SandboxSpec], Awaitable[AgentSandbox]]
Stop = Callable[[AgentSandbox], Awaitable[None]]

MAX_STARTS = 4
"""Starts under way at once; a daemon on few cores is not faster with more."""


class Pool:
    """Keeps ``size`` started boxes ready. Each is handed out once; its taker stops it."""

    def __init__(self, start: Callable[[], Awaitable[AgentSandbox]], stop: Stop, size: int) -> None:
        self._start = start
        self._stop = stop
        self._size = size
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
            self._refill()
            return box
        async with self._start_slots:
            box = await self._start()
        self._refill()
        return box

    async def close(self) -> None:
        """Stop what is ready and what is being started."""
        self._size = 0
        await asyncio.gather(*self._starting, return_exceptions=True)
        while self._ready:
            await self._stop(self._ready.popleft())

    def _refill(self) -> None:
        for _ in range(self._size - len(self._ready) - len(self._starting)):
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


_pools: dict[tuple[Pooled, str], tuple[asyncio.AbstractEventLoop, Pool]] = {}


@contextlib.asynccontextmanager
async def opened(substrate: Pooled, spec: SandboxSpec, *, start: Start, stop: Stop) -> AsyncIterator[AgentSandbox]:
    """A fresh box, from a pool when the substrate keeps one; stopped at the end, whatever happens."""
    kind = replace(spec, files={})
    box = await (_pool(substrate, kind, start, stop).take() if substrate.warm else start(kind))
    try:
        box.spec = spec
        await write_files(box)
        yield box
    finally:
        await stop(box)


def _pool(substrate: Pooled, kind: SandboxSpec, start: Start, stop: Stop) -> Pool:
    """The pool of this process for boxes of this kind. A pool belongs to one event loop and is dropped with it."""
    key, loop = (substrate, repr(kind)), asyncio.get_running_loop()
    found = _pools.get(key)
    if found is None or found[0] is not loop:
        found = _pools[key] = (loop, Pool(lambda: start(kind), stop, substrate.warm))
    return found[1]


async def close_pools() -> None:
    """Remove the boxes this process has started ahead in the running event loop.

    Boxes that are not removed this way end with this process, since the agent stops when its channel closes.
    """
    loop = asyncio.get_running_loop()
    for key in [key for key, (owner, _) in _pools.items() if owner is loop]:
        await _pools.pop(key)[1].close()
