"""The service's Ray actors: a gateway for names and admission, an edge per node for the boxes, a watcher over both.

All three are named and detached: they outlive whoever started them, until ``stop_service``. Ray restarts the gateway
and the watcher, which go on from the registry; the watcher restarts the edges, whose boxes die with them. What looks
after one box (its heartbeat, its lease, its limits in time, its log) is done by its edge, so that it needs none of the
others.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from posttrain.errors import SandboxError, SandboxLost, SandboxUnavailable
from posttrain.protocols import Substrate
from sandbox import wire
from sandbox.edge import Edge, EdgeBusy, Limits, serve_boxes
from sandbox.edge_client import CANCEL_DEADLINE_S, PATIENCE_S, RETRY_S, Away, value_of, wait_for_it
from sandbox.edge_server import SOCKET, answer, serving
from sandbox.pool import close_pools
from sandbox.registry import OWNER, Registry, ServiceLimits

logger = logging.getLogger(__name__)

GATEWAY, WATCHER = "gateway", "watcher"
AWAY_S = 30.0
"""How long an actor may be away before that is a failure."""
START_DEADLINE_S = 60.0
POLL_S = 0.05
NEVER_MADE_S = 10.0
CREATE_ATTEMPTS = 3


def edge_folder(folder: Path, edge: str) -> Path:
    """Where an edge keeps its state, on its own node."""
    return folder / "edges" / edge


def edge_name(edge: str) -> str:
    """The name of an edge's actor."""
    return f"edge-{edge}"


class ActorLink:
    """The way to an actor that answers ``exchange``, over its restarts: a ``Link``."""

    def __init__(self, name: str, namespace: str, *, retry_s: float = AWAY_S, away: Away = wait_for_it) -> None:
        self.name = name
        self.namespace = namespace
        self.retry_s = retry_s
        self._away = away
        self._actor: Any = None

    async def exchange(self, method: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The actor's reply, asked again when the actor was restarted; ``SandboxLost`` when it stays away."""
        away_since, pause_s = math.inf, RETRY_S[0]
        while True:
            try:
                if self._actor is None:
                    self._actor = await _find(self.name, self.namespace)
                return await self._reply(self._actor.exchange.remote(method, dict(arguments)))
            except (ValueError, RayError) as error:
                # There is no such actor, it died, or it could not start.
                self._actor = None
                away_since = min(away_since, time.monotonic())
                if reason := await self._away():
                    raise SandboxLost(reason) from error
                if time.monotonic() - away_since >= self.retry_s:
                    raise SandboxLost(f"actor {self.name!r} is away: {error}") from error
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_S[1])

    async def ask(self, method: str, **arguments: Any) -> Any:
        """The value of a request, or the error it raised there."""
        return value_of(await self.exchange(method, arguments))

    async def close(self) -> None:
        """There is nothing to close."""

    async def _reply(self, ref: Any) -> dict[str, Any]:
        reply = asyncio.ensure_future(_await(ref))
        try:
            while not (await asyncio.wait({reply}, timeout=PATIENCE_S))[0]:
                if reason := await self._away():
                    raise SandboxLost(reason)
            return reply.result()
        except asyncio.CancelledError:
            # The actor answers when the command is dead.
            ray.cancel(ref)
            await asyncio.wait({reply}, timeout=CANCEL_DEADLINE_S)
            raise
        finally:
            reply.cancel()


async def _await(ref: Any) -> Any:
    return await ref


async def _find(name: str, namespace: str) -> Any:
    return await asyncio.to_thread(ray.get_actor, name, namespace)


async def _answered(work: Awaitable[Any]) -> dict[str, Any]:
    """A reply with what the work gives or raises."""
    try:
        return {"value": await work}
    except Exception as error:  # noqa: BLE001 (every failure is the client's to see)
        return {"error": wire.pack_error(error)}


class EdgeActor:
    """One node's edge, on a unix socket for clients of its host and as an actor for the others."""

    def __init__(self, folder: Path, substrates: Sequence[Substrate], limits: Limits) -> None:
        self._folder = folder
        self._substrates = substrates
        self._limits = limits
        self._problems: dict[str, str] = {}
        self._stack = contextlib.AsyncExitStack()
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def exchange(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The reply to a client's request, as over the socket."""
        return await answer(await self._edge(), method, arguments)

    async def report(self, known: list[str]) -> dict[str, Any]:
        """How the edge is: its boxes, those ``known`` to the asker included, and why it lacks which substrates."""
        edge = await self._edge()
        return {"pid": os.getpid(), "substrates": self._problems, "boxes": edge.census(known)}

    async def remove(self, box_ids: list[str], cause: str) -> None:
        """Close boxes that should not be there."""
        edge = await self._edge()
        await asyncio.gather(*(edge.remove(box_id, cause) for box_id in box_ids))

    async def stop(self) -> None:
        """Remove every box and let go of the folder."""
        await self._edge()
        await self._stack.aclose()
        await close_pools()

    async def _edge(self) -> Edge:
        return await asyncio.shield(self._starting)

    async def _start(self) -> Edge:
        for substrate in self._substrates:
            try:
                await asyncio.to_thread(substrate.check)
                self._problems[substrate.name] = ""
            except SandboxUnavailable as error:
                self._problems[substrate.name] = str(error)
        working = [substrate for substrate in self._substrates if not self._problems[substrate.name]]
        edge = await self._stack.enter_async_context(serve_boxes(self._folder, working, self._limits))
        await self._stack.enter_async_context(serving(edge, self._folder / SOCKET))
        return edge


async def take_census(registry: Registry, edge: str, actor: Any) -> dict[str, Any]:
    """Ask an edge how it is and note it; remove there what should not be there. Raises ``RayError``, ``TimeoutError``.

    A box the registry has and the edge has never heard of was lost on the way, unless it still is on the way.
    """
    known = registry.live(edge)
    report: dict[str, Any] = await asyncio.wait_for(_await(actor.report.remote(known)), PATIENCE_S)
    unwanted = registry.note(edge, report["boxes"])
    never_made = set(known) - {box["box_id"] for box in report["boxes"]}
    if never_made:
        registry.lose(list(never_made), f"edge {edge} never made it", created_before_s=time.time() - NEVER_MADE_S)
    if unwanted:
        actor.remove.remote(unwanted, "the service does not know it, or has declared it lost")
    return report


class Gateway:
    """Knows where each rollout's box is, and decides who gets one, and where."""

    def __init__(self, folder: Path, limits: ServiceLimits, namespace: str) -> None:
        self._folder = folder
        self._limits = limits
        self._namespace = namespace
        self._registry = Registry(folder)
        self._links: dict[str, ActorLink] = {}
        self._turn = asyncio.Lock()
        """Held by the creation that is next to get room."""
        self._num_waiting = 0
        self._methods: Mapping[str, Callable[..., Awaitable[Any]]] = {
            "create": self._create,
            "attach": self._attach,
            "ps": self._ps,
            "edges": self._edges,
            "gone": self._gone,
            "stopped": self._stopped,
        }

    async def exchange(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The reply to a client's request."""
        return await _answered(self._methods[method](**arguments))

    async def _create(
        self,
        *,
        rollout_id: str,
        token: str,
        substrate: str,
        labels: dict[str, str] | None = None,
        beside: str | None = None,
        ttl_max_s: float | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """A box, on the edge of the one it is to be ``beside`` if any, whose labels it then has."""
        edge = None
        if beside:
            model = self._registry.box(beside)
            edge, labels = model["edge"], model["labels"]
            if reason := await self._gone(edge=edge):
                raise SandboxLost(f"box {beside} is gone: {reason}")
        box = await self._asked_for(rollout_id, token)
        wanted: dict[str, Any] = {"substrate": substrate, "labels": _checked(labels)}
        for attempts_left in reversed(range(CREATE_ATTEMPTS)):
            if box is None:
                deadline_s = time.time() + (ttl_max_s or self._limits.edge.ttl_max_s)
                box = await self._place(rollout_id, token, deadline_s=deadline_s, edge=edge, **wanted)
            named = {"rollout_id": rollout_id, "box_id": box["box_id"], "token": box["box_id"], "ttl_max_s": ttl_max_s}
            try:
                hold = await self._link(box["edge"]).ask("create", **named, **wanted, **more)
                return self._handed_out(box, hold)
            except Exception as error:
                self._registry.lose([box["box_id"]], f"could not be opened: {error}")
                if not (isinstance(error, SandboxLost) and attempts_left):
                    raise
                box = None
        raise AssertionError("the last attempt returns or raises")

    async def _asked_for(self, rollout_id: str, token: str) -> dict[str, Any] | None:
        """The box that an earlier request with this token is about. ``ValueError`` when the rollout has another."""
        box = self._registry.newest(rollout_id)
        if box and box["token"] != token and box["ended_s"] is None:
            await self._census()
            box = self._registry.newest(rollout_id)
        if box and box["token"] != token and box["ended_s"] is None:
            raise ValueError(
                f"rollout {rollout_id!r} has box {box['box_id']} already ({box['state']}); attach to it or close it"
            )
        return box if box and box["token"] == token else None

    async def _attach(self, *, rollout_id: str) -> dict[str, Any]:
        box = self._registry.newest(rollout_id)
        if box is None:
            raise KeyError(f"rollout {rollout_id!r} has no box in this service; create one")
        if reason := await self._gone(edge=box["edge"]):
            raise SandboxLost(f"box {box['box_id']} is gone: {reason}")
        return self._handed_out(box, await self._link(box["edge"]).ask("attach", rollout_id=rollout_id))

    async def _ps(self) -> list[dict[str, Any]]:
        await self._census()
        return self._registry.boxes()

    async def _edges(self) -> list[dict[str, Any]]:
        return self._registry.edges()

    async def _gone(self, *, edge: str) -> str:
        found = self._registry.edge(edge)
        return f"edge {edge} is lost: {found['cause']}" if found["state"] == "lost" else ""

    async def _stopped(self) -> None:
        for edge in self._registry.edges():
            if edge["state"] != "lost":
                self._registry.lose_edge(edge["name"], "the service was stopped")

    def _handed_out(self, box: Mapping[str, Any], hold: dict[str, Any]) -> dict[str, Any]:
        edge = self._registry.edge(box["edge"])
        path = edge_folder(self._folder, box["edge"]) / SOCKET
        return {"hold": hold, "edge": box["edge"], "host": edge["host"], "socket": str(path)}

    async def _place(self, rollout_id: str, token: str, *, labels: dict[str, str], **box: Any) -> dict[str, Any]:
        """A box on an edge with room, when it is this creation's turn."""
        await self._check_quotas(labels)
        if self._num_waiting and self._num_waiting >= self._limits.max_waiting:
            raise EdgeBusy(f"no edge has room and {self._num_waiting} wait; close some boxes, or add nodes")
        self._num_waiting += 1
        try:
            async with asyncio.timeout(self._limits.wait_s), self._turn:
                while True:
                    self._registry.check_quotas(labels, self._limits.quotas)
                    placed = self._registry.place(
                        rollout_id, token, labels=labels, max_boxes=self._limits.edge.max_boxes, **box
                    )
                    if placed:
                        return placed
                    if not self._limits.max_waiting:
                        raise EdgeBusy("no edge has room; close some boxes, or add nodes")
                    await asyncio.sleep(POLL_S)
                    await self._census()
        except TimeoutError as error:
            raise EdgeBusy(
                f"no edge has had room within {self._limits.wait_s:.0f} s; close some boxes, or add nodes"
            ) from error
        finally:
            self._num_waiting -= 1

    async def _check_quotas(self, labels: Mapping[str, str]) -> None:
        try:
            self._registry.check_quotas(labels, self._limits.quotas)
        except SandboxError:
            # Boxes are closed at their edges; the registry may not know yet.
            await self._census()
            self._registry.check_quotas(labels, self._limits.quotas)

    async def _census(self) -> None:
        """Ask every edge that is not lost. One that does not answer is the watcher's to deal with."""
        edges = [edge["name"] for edge in self._registry.edges() if edge["state"] != "lost"]
        await asyncio.gather(*(self._ask_edge(edge) for edge in edges))

    async def _ask_edge(self, edge: str) -> None:
        with contextlib.suppress(RayError, TimeoutError, ValueError):
            await take_census(self._registry, edge, await _find(edge_name(edge), self._namespace))

    def _link(self, edge: str) -> ActorLink:
        if edge not in self._links:
            gone = functools.partial(self._gone, edge=edge)
            self._links[edge] = ActorLink(edge_name(edge), self._namespace, away=gone)
        return self._links[edge]


def _checked(labels: Mapping[str, str] | None) -> Mapping[str, str]:
    if not labels or OWNER not in labels or not all(isinstance(part, str) for pair in labels.items() for part in pair):
        raise ValueError(f"labels = {labels!r}: expected text by name, and one named {OWNER!r}")
    return labels


class Watcher:
    """Sees to it that each live node has an edge, and that what is lost is known to be."""

    def __init__(self, folder: Path, substrates: Sequence[Substrate], limits: ServiceLimits, namespace: str) -> None:
        self._folder = folder
        self._substrates = substrates
        self._limits = limits
        self._namespace = namespace
        self._registry = Registry(folder)
        self._heard_at: dict[str, float] = {}
        """When each edge last answered or was started; a watcher that was restarted begins to count anew."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def exchange(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Answer ``ping``."""
        return {"value": method}

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except Exception:
                # A watcher that stops watching is worse than any failure of one look.
                logger.exception("sandbox watcher: a look failed")
            await asyncio.sleep(self._limits.heartbeat_s)

    async def _look(self) -> None:
        nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in await _nodes() if node["Alive"]}
        edges = self._registry.edges()
        await asyncio.gather(*(self._look_at(edge, edge["node_id"] in nodes) for edge in edges))
        for node_id in nodes.keys() - {edge["node_id"] for edge in edges}:
            self._start(self._registry.add_edge(node_id, nodes[node_id], alive=nodes), node_id)
        self._registry.forget(time.time() - self._limits.edge.keep_logs_s)

    async def _look_at(self, edge: Mapping[str, Any], node_is_alive: bool) -> None:
        name = edge["name"]
        if not node_is_alive:
            if edge["state"] != "lost":
                self._registry.lose_edge(name, f"its node {edge['node_id'][:8]} ({edge['host']}) died")
            return
        actor: Any = None
        try:
            actor = await _find(edge_name(name), self._namespace)
            report = await take_census(self._registry, name, actor)
        except (ValueError, ActorDiedError) as error:
            # No such actor, or a dead one.
            if edge["state"] == "up":
                self._registry.edge_starts(name, str(error).partition("\n")[0])
            self._start(name, edge["node_id"])
        except RayTaskError as error:
            self._registry.edge_starts(name, f"it could not start and is tried again: {error.cause}")
            ray.kill(actor)
        except (RayError, TimeoutError) as error:
            self._give_up_if_silent(edge, actor, error)
        else:
            self._hear(edge, actor, report)

    def _hear(self, edge: Mapping[str, Any], actor: Any, report: Mapping[str, Any]) -> None:
        if edge["state"] == "lost" and report["pid"] == edge["pid"]:
            # It is back, but clients have been told that its boxes are lost: that must be so.
            ray.kill(actor)
            return
        self._heard_at[edge["name"]] = time.monotonic()
        self._registry.edge_is_up(edge["name"], pid=report["pid"], substrates=report["substrates"])

    def _give_up_if_silent(self, edge: Mapping[str, Any], actor: Any, error: Exception) -> None:
        deadline_s = self._limits.edge_deadline_s if edge["state"] == "up" else START_DEADLINE_S
        silent_s = time.monotonic() - self._heard_at.setdefault(edge["name"], time.monotonic())
        if silent_s < deadline_s:
            return
        if edge["state"] != "lost":
            kind = type(error).__name__
            self._registry.lose_edge(edge["name"], f"it has not answered for {silent_s:.0f} s ({kind})")
        ray.kill(actor)

    def _start(self, edge: str, node_id: str) -> None:
        self._heard_at[edge] = time.monotonic()
        options = {
            "name": edge_name(edge),
            "namespace": self._namespace,
            "lifetime": "detached",
            "num_cpus": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        }
        actor_class: Any = ray.remote(EdgeActor)
        with contextlib.suppress(ValueError):
            # An actor of that name is dying still; the next look finds it dead.
            actor_class.options(**options).remote(edge_folder(self._folder, edge), self._substrates, self._limits.edge)


async def _nodes() -> list[dict[str, Any]]:
    return await asyncio.to_thread(ray.nodes)
