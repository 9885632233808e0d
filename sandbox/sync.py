"""Boxes for code without ``await``: the same methods, which wait for their end.

>>> with SandboxClient() as client, client.create(substrate="process") as box:
...     box.exec(["echo", "hello"]).stdout
b'hello\\n'

With the socket of an edge (``SandboxClient(address)``) the boxes outlive this process, and ``attach`` finds them again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from posttrain.errors import SandboxError, Unsupported
from posttrain.protocols import Substrate
from posttrain.types import SandboxSpec
from sandbox.client import AgentSandbox
from sandbox.conformance import find_substrate
from sandbox.edge_client import EdgeClient, EdgeSandbox
from sandbox.layers import Snapshot
from sandbox.operations import RemoteJob, RemoteSession
from sandbox.pool import close_pools
from sandbox.streams import Job, Session

Run = Callable[[Coroutine[Any, Any, Any]], Any]


class Blocking:
    """A session or a job whose methods wait for their end. A job is iterated for its output; ``with`` ends both."""

    def __init__(self, target: Any, run: Run) -> None:
        self._target = target
        self._run = run

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not inspect.iscoroutinefunction(found):
            if callable(found):
                raise AttributeError(f"{name} of a {type(self._target).__name__} is not for other threads")
            return found

        @functools.wraps(found)
        def waiting(*arguments: Any, **named: Any) -> Any:
            value = self._run(found(*arguments, **named))
            return Blocking(value, self._run) if isinstance(value, Session | Job | RemoteSession | RemoteJob) else value

        return waiting

    def __iter__(self) -> Iterator[Any]:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                yield self._run(self._target.__anext__())

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *problem: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._run(self._target.__aexit__(*problem))


class Box(Blocking):
    """A box whose methods wait: those of ``sandbox.operations.Operations``. ``with`` closes it."""

    def __init__(
        self,
        target: AgentSandbox | EdgeSandbox,
        run: Run,
        *,
        fork: Callable[[int], Coroutine[Any, Any, list[Box]]],
        close: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        super().__init__(target, run)
        self._fork = fork
        self._close = close

    def fork(self, count: int = 1) -> list[Box]:
        """New boxes that begin with this one's workdir. Its processes are not copied."""
        return self._run(self._fork(count))

    def close(self) -> None:
        """Kill and remove the box. Nothing happens when it is gone already."""
        self._run(self._close())

    def __enter__(self) -> Box:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class SandboxClient:
    """Boxes of this process, or of the edge at a socket. Leaving the context removes the former and keeps the latter.

    Its methods may be called from several threads; all boxes live in one event loop in the background.
    """

    def __init__(self, address: Path | None = None) -> None:
        self._edge = None if address is None else EdgeClient(address)
        self._boxes: set[contextlib.AsyncExitStack] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox-client", daemon=True)
        self._thread.start()

    def capabilities(self, substrate: str = "process") -> Mapping[str, Any]:
        """What a kind of box guarantees on this host."""
        return find_substrate(substrate).capabilities()

    def create(
        self, spec: SandboxSpec | None = None, *, substrate: str | None = None, rollout_id: str | None = None
    ) -> Box:
        """A fresh box of a substrate: a name or ``module:attribute``; by default ``process``, or what the edge serves.

        ``rollout_id`` is what ``attach`` finds a box of an edge by.
        """
        return self._run(self._create(spec or SandboxSpec(), substrate, rollout_id))

    def restore(self, snapshot: Snapshot, spec: SandboxSpec | None = None, **options: Any) -> Box:
        """A fresh box that begins with the workdir of a snapshot, with the options of ``create``."""
        return self.create(replace(spec or SandboxSpec(), image=snapshot.image), **options)

    def attach(self, rollout_id: str) -> Box:
        """A rollout's box at the edge, from its first call on: what it did is answered from its log."""
        if self._edge is None:
            raise Unsupported(
                "attach: the boxes of a process end with it; give SandboxClient the address of an edge "
                "(python -m sandbox.edge)"
            )
        return self._run(self._attach(self._edge, rollout_id))

    def close(self) -> None:
        """Remove the boxes of this process, hang up, and stop the event loop."""
        if not self._loop.is_closed():
            self._run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> SandboxClient:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        if self._loop.is_closed():
            work.close()
            raise SandboxError("this SandboxClient was closed; make another")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Interrupted, as by Ctrl-C: what was asked for is cancelled, and a command killed.
            future.cancel()
            raise

    async def _create(self, spec: SandboxSpec, substrate: str | None, rollout_id: str | None) -> Box:
        if self._edge is None:
            return await self._open(spec, find_substrate(substrate or "process"))
        named: dict[str, Any] = {"substrate": substrate} if substrate else {}
        return self._at_edge(await self._edge.create(rollout_id or uuid.uuid4().hex, spec, **named))

    async def _attach(self, edge: EdgeClient, rollout_id: str) -> Box:
        return self._at_edge(await edge.attach(rollout_id))

    async def _open(self, spec: SandboxSpec, substrate: Substrate) -> Box:
        substrate.check()
        async with contextlib.AsyncExitStack() as stack:
            box = await stack.enter_async_context(substrate.open(spec))
            if not isinstance(box, AgentSandbox):
                raise Unsupported(f"substrate {substrate.name!r}: its boxes are not driven by the agent")
            held = stack.pop_all()

        async def fork(count: int) -> list[Box]:
            kind = replace(spec, image=(await box.snapshot()).image, files={})
            return await asyncio.gather(*(self._open(kind, substrate) for _ in range(count)))

        async def close() -> None:
            self._boxes.discard(held)
            await held.aclose()

        self._boxes.add(held)
        return Box(box, self._run, fork=fork, close=close)

    def _at_edge(self, box: EdgeSandbox) -> Box:
        async def fork(count: int) -> list[Box]:
            return [self._at_edge(forked) for forked in await box.fork(count)]

        return Box(box, self._run, fork=fork, close=box.close)

    async def _end(self) -> None:
        await asyncio.gather(*(held.aclose() for held in self._boxes))
        if self._edge:
            await self._edge.disconnect()
        await close_pools()
