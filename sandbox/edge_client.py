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
from typing import Any, Protocol

from posttrain.errors import SandboxError, SandboxLost
from posttrain.types import SandboxSpec
from sandbox import wire
from sandbox.edge import Hold
from sandbox.operations import Operations, Request, unwrap

RETRY_S = (0.05, 1.0)
"""The first pause before trying again, and the longest; each is twice the one before."""
PING = -1
CANCEL_DEADLINE_S = 30.0
PATIENCE_S = 2.0
"""An edge that has said nothing for this long is asked for a sign of life."""


Create = Callable[..., Awaitable["EdgeSandbox"]]
"""As ``EdgeClient.create``."""


def packed(spec: SandboxSpec) -> dict[str, Any]:
    """A spec as it travels."""
    return {item.name: getattr(spec, item.name) for item in dataclasses.fields(spec)}


def value_of(reply: Mapping[str, Any]) -> Any:
    """The value in a reply; raises the error in it."""
    if "error" in reply:
        raise wire.unpack_error(reply["error"])
    return reply["value"]


class Link(Protocol):
    """A way to an edge."""

    async def exchange(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The edge's reply to a request, asked again over whatever breaks; ``SandboxLost`` when that is given up.

        Cancelling cancels it at the edge too.
        """
        ...

    async def close(self) -> None: ...


Away = Callable[[], Awaitable[str | None]]
"""Called again and again while an edge does not answer. It may start one, or say why none will come back."""


async def wait_for_it() -> None:
    """The ``Away`` of those who know nothing."""


class SocketLink:
    """The unix socket of an edge on this host, connected when it is first needed."""

    def __init__(self, path: Path, *, retry_s: float, away: Away = wait_for_it) -> None:
        self.path = path
        self.retry_s = retry_s
        """How long an edge may be away before its boxes count as lost."""
        self._away = away
        self._numbers = itertools.count()
        self._pending: dict[int, tuple[bytes, asyncio.Future[dict[str, Any]]]] = {}
        self._cancelled: set[int] = set()
        self._writer: asyncio.StreamWriter | None = None
        self._connecting: asyncio.Task[None] | None = None

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

    async def close(self) -> None:
        """Hang up."""
        if self._connecting:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        self._fail("the client hung up")

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
        patience_s = min(self.retry_s / 3, PATIENCE_S)
        receiving = asyncio.create_task(wire.receive(reader))
        try:
            while True:
                await asyncio.wait({receiving}, timeout=patience_s)
                if receiving.done():
                    reply = receiving.result()
                    if reply is None:
                        return
                    heard_at = time.monotonic()
                    self._resolve(reply)
                    receiving = asyncio.create_task(wire.receive(reader))
                elif time.monotonic() - heard_at >= 2 * patience_s and (reason := await self._away()):
                    raise SandboxLost(reason)
                elif time.monotonic() - heard_at >= self.retry_s:
                    raise SandboxLost(f"the edge at {self.path} is there and has not answered for {self.retry_s:.0f} s")
                else:
                    writer.write(wire.pack({"id": PING, "method": "ping", "arguments": {}}))
        finally:
            receiving.cancel()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        deadline, pause_s = time.monotonic() + self.retry_s, RETRY_S[0]
        while True:
            try:
                with wire.shortened(self.path) as short:
                    return await asyncio.open_unix_connection(short)
            except (FileNotFoundError, ConnectionError) as error:
                if reason := await self._away():
                    raise SandboxLost(reason) from error
                if time.monotonic() >= deadline:
                    raise SandboxLost(
                        f"no edge at {self.path} for {self.retry_s:.0f} s ({error.strerror}); start it with "
                        f"python -m sandbox.edge --dir {self.path.parent}"
                    ) from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_S[1])

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


class EdgeClient:
    """A client of one edge: the one at a socket, or at the end of a link. An async context."""

    def __init__(self, edge: Path | Link, *, retry_s: float = 30.0, away: Away = wait_for_it) -> None:
        self.link: Link = SocketLink(edge, retry_s=retry_s, away=away) if isinstance(edge, Path) else edge
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
        substrate: str | None = None,
        labels: Mapping[str, str] | None = None,
        ttl_idle_s: float | None = None,
        ttl_max_s: float | None = None,
    ) -> EdgeSandbox:
        """A fresh box for a rollout. ``ValueError`` when it has one; ``EdgeBusy`` when there is no room.

        Whoever makes a box with the same ``token`` again gets the one there is.
        """
        hold = await self.ask(
            "create",
            rollout_id=rollout_id,
            spec=packed(spec),
            token=token or uuid.uuid4().hex,
            substrate=substrate,
            labels=dict(labels or {}),
            ttl_idle_s=ttl_idle_s,
            ttl_max_s=ttl_max_s,
        )
        return self.hold(rollout_id, hold)

    async def attach(self, rollout_id: str) -> EdgeSandbox:
        """A rollout's box, from its first call on: what it did is answered from its log.

        Whoever held it before is fenced off. ``KeyError`` when the rollout never had a box.
        """
        return self.hold(rollout_id, await self.ask("attach", rollout_id=rollout_id))

    async def list(self) -> list[dict[str, Any]]:
        """Every box the edge knows of, oldest first."""
        boxes: list[dict[str, Any]] = await self.ask("list")
        return boxes

    async def disconnect(self) -> None:
        """Stop renewing leases and hang up. Boxes that were not closed stay with the edge."""
        tasks = list(self._renewing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.link.close()

    async def ask(self, method: str, **arguments: Any) -> Any:
        """The value of a request, or the error it raised at the edge."""
        return value_of(await self.link.exchange(method, arguments))

    def forget(self, box_id: str) -> None:
        """Stop renewing the lease of a box."""
        task = self._renewing.pop(box_id, None)
        if task:
            task.cancel()

    def hold(self, rollout_id: str, fields: Mapping[str, Any], *, create: Create | None = None) -> EdgeSandbox:
        """The box that was handed out, whose lease is renewed from now on. ``create`` makes its forks."""
        hold = Hold(**{**fields, "spec": SandboxSpec(**fields["spec"])})
        self.forget(hold.box_id)
        self._renewing[hold.box_id] = asyncio.create_task(self._renew(hold))
        return EdgeSandbox(self, rollout_id, hold, create or self.create)

    async def _renew(self, hold: Hold) -> None:
        while True:
            await asyncio.sleep(hold.lease_s / 3)
            with contextlib.suppress(SandboxLost):
                try:
                    await self.ask("renew", box_id=hold.box_id, epoch=hold.epoch)
                except SandboxError:
                    # Fenced: the box has another client, which this one's next call will be told.
                    return


class EdgeSandbox(Operations):
    """One box at the edge, as this client sees it."""

    def __init__(self, client: EdgeClient, rollout_id: str, hold: Hold, create: Create) -> None:
        self.rollout_id = rollout_id
        self.hold = hold
        self._client = client
        self._create = create
        self._position = 0

    async def fork(self, count: int) -> list[EdgeSandbox]:
        """New boxes that begin with this one's workdir, for the rollouts ``ROLLOUT_ID.CALL.0`` and on.

        A client that comes back and makes the same calls gets the same boxes.
        """
        name = f"{self.rollout_id}.{self._position}"
        snapshot = await self.snapshot()
        spec = dataclasses.replace(self.hold.spec, image=snapshot.image)
        rollouts = [f"{name}.{index}" for index in range(count)]
        substrate = self.hold.substrate
        return await asyncio.gather(
            *(self._create(rollout, spec, token=rollout, substrate=substrate) for rollout in rollouts)
        )

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
        arguments = {
            "box_id": self.hold.box_id,
            "epoch": self.hold.epoch,
            "position": position,
            "kind": request.kind,
            "request": request.arguments,
            "idempotent": idempotent,
        }
        try:
            reply = await self._client.link.exchange("call", arguments)
        except SandboxLost as error:
            raise SandboxLost(f"box {self.hold.box_id} is out of reach: {error}") from error
        if "error" not in reply:
            return unwrap(reply["value"])
        if reply["refused"]:
            # Nothing happened, so the next call is still this one.
            self._position = min(self._position, position)
        raise wire.unpack_error(reply["error"])
