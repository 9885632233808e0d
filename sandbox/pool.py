"""Boxes started ahead of their use."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable

from posttrain.errors import SandboxError, SandboxLost
from sandbox.client import AgentSandbox

MAX_STARTS = 4
"""Starts under way at once; a daemon on few cores is not faster with more."""


class Pool:
    """Keeps ``size`` started boxes ready. Each is handed out once and its taker stops it.

    With ``reuse`` the taker hands the box back by ``give_back`` or ``discard``, and a box that is out counts as ready,
    since it is expected back.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[AgentSandbox]],
        stop: Callable[[AgentSandbox], Awaitable[None]],
        size: int,
        *,
        reuse: bool = False,
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

    async def close(self) -> None:
        """Stop what is ready and what is being started."""
        self._size = 0
        await asyncio.gather(*self._starting, return_exceptions=True)
        while self._ready:
            await self._stop(self._ready.popleft())

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
