"""The client's side of an edge: boxes that live in another process and outlast this one.

A connection that breaks is made again and what was not answered is asked again; the edge runs each call once, however
often it is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import SandboxError, SandboxLost
from posttrain.types import SandboxSpec
from sandbox import wire
from sandbox.edge import Hold
from sandbox.operations import Operations, Request, unwrap

RETRY_EVERY_S = 0.05
PING = -1
CANCEL_DEADLINE_S = 30.0


class EdgeClient:
    """A connection to the edge at a socket, made when it is first needed. An async context."""

    def __init__(
        self, path: Path, *, retry_s: float = 30.0, start: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self.path = path
        self._start = start
        """Starts an edge where none answers."""
        self.retry_s = retry_s
        """How long an edge may be away before its boxes count as lost."""
        self._numbers = itertools.count()
        self._pending: dict[int, tuple[bytes, asyncio.Future[dict[str, Any]]]] = {}
        self._cancelled: set[int] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._renewing: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> EdgeClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.disconnect()

    async def create(
        self,
        rollout_id: str,
        spec: SandboxSpec,
        *,
        token: str = "",
        ttl_idle_s: float | None = None,
        ttl_max_s: float | None = None,
    ) -> EdgeSandbox:
        """A fresh box for a rollout. ``ValueError`` when it has one; ``EdgeBusy`` when there is no room.

        Whoever makes a box with the same ``token`` again gets the one there is.
        """
        fields = {item.name: getattr(spec, item.name) for item in dataclasses.fields(spec)}
        hold = await self.ask(
            "create",
            rollout_id=rollout_id,
            spec=fields,
            token=token or uuid.uuid4().hex,
            ttl_idle_s=ttl_idle_s,
            ttl_max_s=ttl_max_s,
        )
        return self._hold(rollout_id, hold)

    async def attach(self, rollout_id: str) -> EdgeSandbox:
        """A rollout's box, from its first call on: what it did is answered from its log.

        Whoever held it before is fenced off. ``KeyError`` when the rollout never had a box.
        """
        return self._hold(rollout_id, await self.ask("attach", rollout_id=rollout_id))

    async def list(self) -> list[dict[str, Any]]:
        """Every box the edge knows of, oldest first."""
        boxes: list[dict[str, Any]] = await self.ask("list")
        return boxes

    async def disconnect(self) -> None:
        """Stop renewing leases and hang up. Boxes that were not closed stay with the edge."""
        tasks = [*self._renewing.values(), *([self._connecting] if self._connecting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail("the client hung up")

    async def ask(self, method: str, **arguments: Any) -> Any:
        """The value of a request, or the error it raised at the edge."""
        reply = await self.exchange(method, arguments)
        if "error" in reply:
            raise wire.unpack_error(reply["error"])
        return reply["value"]

    async def exchange(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its reply, over as many connections as it takes."""
        number = next(self._numbers)
        frame = wire.pack({"id": number, "method": method, "arguments": arguments})
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = (frame, reply)
        try:
            if self._connecting is None or self._connecting.done():
                self._connecting = asyncio.create_task(self._stay_connected())
            elif self._writer:
                self._writer.write(frame)
            await asyncio.wait({reply})
            return reply.result()
        except asyncio.CancelledError:
            # The edge answers when the command is dead.
            self._cancelled.add(number)
            if self._writer:
                self._writer.write(wire.pack({"id": number, "method": "cancel"}))
                await asyncio.wait({reply}, timeout=CANCEL_DEADLINE_S)
            raise
        finally:
            del self._pending[number]
            self._cancelled.discard(number)

    def forget(self, box_id: str) -> None:
        """Stop renewing the lease of a box."""
        task = self._renewing.pop(box_id, None)
        if task:
            task.cancel()

    def _hold(self, rollout_id: str, fields: Mapping[str, Any]) -> EdgeSandbox:
        hold = Hold(**{**fields, "spec": SandboxSpec(**fields["spec"])})
        self.forget(hold.box_id)
        self._renewing[hold.box_id] = asyncio.create_task(self._renew(hold))
        return EdgeSandbox(self, rollout_id, hold)

    async def _renew(self, hold: Hold) -> None:
        while True:
            await asyncio.sleep(hold.lease_s / 3)
            with contextlib.suppress(SandboxLost):
                try:
                    await self.ask("renew", box_id=hold.box_id, epoch=hold.epoch)
                except SandboxError:
                    # Fenced: the box has another client, which this one's next call will be told.
                    return

    async def _stay_connected(self) -> None:
        """Connect, ask what is not answered, take replies; again when the edge goes away, while anyone waits."""
        while True:
            try:
                reader, writer = await self._connect()
            except SandboxLost as error:
                self._fail(str(error))
                return
            try:
                for frame, _ in list(self._pending.values()):
                    writer.write(frame)
                self._writer = writer
                await self._take_replies(reader, writer)
            except (SandboxLost, ValueError) as error:
                self._fail(str(error))
                return
            except asyncio.CancelledError:
                # Nobody takes replies any more, so that whoever waits for one must not.
                self._fail("the client hung up")
                raise
            finally:
                self._writer = None
                writer.close()
            if not self._pending:
                return

    async def _take_replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the edge hangs up. One that is connected and silent is asked for a sign of life, then given up."""
        heard_at = time.monotonic()
        receiving = asyncio.create_task(wire.receive(reader))
        try:
            while True:
                await asyncio.wait({receiving}, timeout=self.retry_s / 3)
                if receiving.done():
                    reply = receiving.result()
                    if reply is None:
                        return
                    heard_at = time.monotonic()
                    self._resolve(reply)
                    receiving = asyncio.create_task(wire.receive(reader))
                elif time.monotonic() - heard_at >= self.retry_s:
                    raise SandboxLost(f"the edge at {self.path} is there and has not answered for {self.retry_s:.0f} s")
                else:
                    writer.write(wire.pack({"id": PING, "method": "ping", "arguments": {}}))
        finally:
            receiving.cancel()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        deadline = time.monotonic() + self.retry_s
        while True:
            try:
                return await asyncio.open_unix_connection(self.path)
            except (FileNotFoundError, ConnectionError) as error:
                if time.monotonic() >= deadline:
                    raise SandboxLost(
                        f"no edge at {self.path} for {self.retry_s:.0f} s ({error.strerror}); start it with "
                        f"python -m sandbox.edge --dir {self.path.parent}"
                    ) from error
            if self._start:
                await self._start()
            await asyncio.sleep(RETRY_EVERY_S)

    def _resolve(self, reply: dict[str, Any]) -> None:
        number = reply["id"]
        if reply.get("cancelled") and number not in self._cancelled:
            # The edge is stopping; whoever serves the folder next is asked again.
            return
        waiting = self._pending.get(number)
        if waiting and not waiting[1].done():
            waiting[1].set_result(reply)

    def _fail(self, reason: str) -> None:
        for _, reply in self._pending.values():
            if not reply.done():
                reply.set_exception(SandboxLost(reason))
                # Retrieved here, since whoever waited for it may have been cancelled.
                reply.exception()


class EdgeSandbox(Operations):
    """One box at the edge, as this client sees it."""

    def __init__(self, client: EdgeClient, rollout_id: str, hold: Hold) -> None:
        self.rollout_id = rollout_id
        self.hold = hold
        self._client = client
        self._position = 0

    async def fork(self, count: int) -> list[EdgeSandbox]:
        """New boxes that begin with this one's workdir, for the rollouts ``ROLLOUT_ID.CALL.0`` and on.

        A client that comes back and makes the same calls gets the same boxes.
        """
        name = f"{self.rollout_id}.{self._position}"
        snapshot = await self.snapshot()
        spec = dataclasses.replace(self.hold.spec, image=snapshot.image)
        rollouts = [f"{name}.{index}" for index in range(count)]
        return await asyncio.gather(*(self._client.create(rollout, spec, token=rollout) for rollout in rollouts))

    def skip_recorded(self) -> None:
        """Go on after the calls in the log, instead of making them again to be told what they gave."""
        self._position = max(self._position, self.hold.num_recorded)

    async def close(self) -> None:
        """Kill and remove the box. Its log stays at the edge."""
        self._client.forget(self.hold.box_id)
        await self._client.ask("close", box_id=self.hold.box_id, epoch=self.hold.epoch)

    async def ask(self, request: Request, idempotent: bool = False) -> Any:
        """The next call of this client, given as a value."""
        position, self._position = self._position, self._position + 1
        reply = await self._client.exchange(
            "call",
            {
                "box_id": self.hold.box_id,
                "epoch": self.hold.epoch,
                "position": position,
                "kind": request.kind,
                "request": request.arguments,
                "idempotent": idempotent,
            },
        )
        if "error" not in reply:
            return unwrap(reply["value"])
        if reply["refused"]:
            # Nothing happened, so the next call is still this one.
            self._position = min(self._position, position)
        raise wire.unpack_error(reply["error"])
