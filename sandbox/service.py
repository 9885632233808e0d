"""Sandboxes on every node of a Ray cluster, for clients that may die and come back.

``start_service`` puts an edge on each node of the cluster this process is connected to; ``connect`` finds a service
that runs. A box is asked for by rollout id, made where there is room, and spoken to directly: through its edge's unix
socket on the same host, else through its edge's actor. Nothing of the service lives only in memory: its names and
states are in ``folder`` on the node where it was started, and each box's log in ``folder`` on its own node.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from posttrain.errors import SandboxError, SandboxUnavailable
from posttrain.protocols import Substrate
from posttrain.types import SandboxSpec
from sandbox.actors import AWAY_S, GATEWAY, WATCHER, ActorLink, Gateway, Watcher, edge_name
from sandbox.conformance import find_substrate
from sandbox.edge_client import EdgeClient, EdgeSandbox, Link, SocketLink, packed, value_of
from sandbox.registry import OWNER, ServiceLimits

NAMESPACE = "sandbox"
START_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0


class SandboxService:
    """One client of a service. An async context, in one event loop."""

    def __init__(self, namespace: str, *, owner: str | None = None) -> None:
        self.owner = owner or getpass.getuser()
        """The label ``owner`` of the boxes it makes, unless they are given another."""
        self._namespace = namespace
        self._gateway = ActorLink(GATEWAY, namespace)
        self._edges: dict[str, EdgeClient] = {}

    async def __aenter__(self) -> SandboxService:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def create(
        self,
        rollout_id: str,
        spec: SandboxSpec,
        *,
        substrate: str = "process",
        labels: Mapping[str, str] | None = None,
        ttl_idle_s: float | None = None,
        ttl_max_s: float | None = None,
    ) -> EdgeSandbox:
        """A fresh box for a rollout, on some node.

        Raises ``QuotaExceeded``, ``EdgeBusy`` when no node has room for too long, ``ValueError`` when the rollout has a
        box (attach to it) or a lifetime is above the service's, ``SandboxUnavailable`` when no edge serves the
        substrate, and what the substrate raises.
        """
        handed_out = await self._gateway.ask(
            "create",
            rollout_id=rollout_id,
            spec=packed(spec),
            token=uuid.uuid4().hex,
            substrate=substrate,
            labels={OWNER: self.owner, **(labels or {})},
            ttl_idle_s=ttl_idle_s,
            ttl_max_s=ttl_max_s,
        )
        return self._take(rollout_id, **handed_out)

    async def attach(self, rollout_id: str) -> EdgeSandbox:
        """A rollout's newest box, from its first call on: what it did is answered from its log.

        Whoever held it before is fenced off. ``KeyError`` when the rollout never had a box, ``SandboxLost`` when the
        box's edge is lost, and its log with it.
        """
        return self._take(rollout_id, **await self._gateway.ask("attach", rollout_id=rollout_id))

    async def ps(self) -> list[dict[str, Any]]:
        """Every box of every edge whose log is kept, oldest first.

        ``box_id``, ``rollout_id``, ``edge``, ``substrate``, ``labels`` (with ``owner``), ``state``, ``cause``, and in
        seconds since 1970 ``created_s``, ``deadline_s`` and ``ended_s``.
        """
        boxes: list[dict[str, Any]] = await self._gateway.ask("ps")
        return boxes

    async def edges(self) -> list[dict[str, Any]]:
        """Every edge: ``name``, ``host``, ``node_id``, ``pid``, ``state``, ``cause``, ``substrates``, ``num_boxes``."""
        edges: list[dict[str, Any]] = await self._gateway.ask("edges")
        return edges

    async def close(self) -> None:
        """Stop renewing leases and hang up. Boxes that were not closed stay with the service."""
        for client in self._edges.values():
            await client.disconnect()
        self._edges.clear()

    async def _fork(
        self, beside: str, rollout_id: str, spec: SandboxSpec, *, token: str, substrate: str
    ) -> EdgeSandbox:
        """A box on the edge of another, where that one's snapshots lie, with the same labels."""
        handed_out = await self._gateway.ask(
            "create", rollout_id=rollout_id, spec=packed(spec), token=token, substrate=substrate, beside=beside
        )
        return self._take(rollout_id, **handed_out)

    def _take(self, rollout_id: str, *, hold: dict[str, Any], edge: str, host: str, socket: str) -> EdgeSandbox:
        if edge not in self._edges:
            self._edges[edge] = EdgeClient(self._link(edge, host, Path(socket)))
        fork = functools.partial(self._fork, hold["box_id"])
        return self._edges[edge].hold(rollout_id, hold, create=fork)

    def _link(self, edge: str, host: str, path: Path) -> Link:
        gone = functools.partial(self._gateway.ask, "gone", edge=edge)
        if host == socket.gethostname() and path.is_socket():
            return SocketLink(path, retry_s=AWAY_S, away=gone)
        return ActorLink(edge_name(edge), self._namespace, away=gone)


def start_service(
    folder: Path,
    substrates: Sequence[str | Substrate] = ("process",),
    limits: ServiceLimits | None = None,
    *,
    namespace: str = NAMESPACE,
    owner: str | None = None,
) -> SandboxService:
    """Start a service on the Ray cluster this process is connected to, and wait until each node has its edge.

    ``folder`` must be absolute: it is where each node keeps what must survive. A service that was stopped, or died with
    its cluster, goes on from it. Raises ``SandboxError`` when a service of this namespace runs already, and when an
    edge does not come up.
    """
    if not folder.is_absolute():
        raise ValueError(f"folder = {str(folder)!r}: expected an absolute path, since it is used on every node")
    kinds = [find_substrate(kind) if isinstance(kind, str) else kind for kind in substrates]
    names = [kind.name for kind in kinds]
    if not kinds or len(set(names)) < len(names):
        raise ValueError(f"substrates = {names}: expected at least one, with distinct names")
    limits = limits or ServiceLimits()
    options = {
        "namespace": namespace,
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
        # Their state is on this node.
        "scheduling_strategy": NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
    }
    gateway_class: Any = ray.remote(Gateway)
    watcher_class: Any = ray.remote(Watcher)
    try:
        gateway = gateway_class.options(name=GATEWAY, **options).remote(folder, limits, namespace)
        watcher_class.options(name=WATCHER, **options).remote(folder, kinds, limits, namespace)
    except ValueError as error:
        raise SandboxError(f"namespace {namespace!r}: a service runs there already; connect to it") from error
    _wait_for_edges(gateway)
    return SandboxService(namespace, owner=owner)


def connect(namespace: str = NAMESPACE, *, owner: str | None = None) -> SandboxService:
    """A client of the service that runs in the cluster this process is connected to."""
    try:
        ray.get_actor(GATEWAY, namespace)
    except ValueError as error:
        raise SandboxUnavailable(f"namespace {namespace!r}: no sandbox service runs there; start one") from error
    return SandboxService(namespace, owner=owner)


def stop_service(namespace: str = NAMESPACE) -> None:
    """End the service of a namespace with all its boxes. What they did stays in its folder."""
    gateway = ray.get_actor(GATEWAY, namespace)
    edges = _edges(gateway)
    ray.kill(ray.get_actor(WATCHER, namespace))
    actors = {}
    for edge in edges:
        with contextlib.suppress(ValueError):
            actors[edge["name"]] = ray.get_actor(edge_name(edge["name"]), namespace)
    up = {edge["name"] for edge in edges if edge["state"] == "up"}
    with contextlib.suppress(RayError):
        # One that cannot stop is killed, and its boxes with it.
        ray.get([actor.stop.remote() for name, actor in actors.items() if name in up], timeout=STOP_DEADLINE_S)
    for actor in actors.values():
        ray.kill(actor)
    ray.get(gateway.exchange.remote("stopped", {}), timeout=STOP_DEADLINE_S)
    ray.kill(gateway)


def _edges(gateway: Any) -> list[dict[str, Any]]:
    reply: dict[str, Any] = ray.get(gateway.exchange.remote("edges", {}), timeout=START_DEADLINE_S)
    edges: list[dict[str, Any]] = value_of(reply)
    return edges


def _wait_for_edges(gateway: Any) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    edges: list[dict[str, Any]] = []
    while time.monotonic() < deadline:
        edges = _edges(gateway)
        up = {edge["node_id"] for edge in edges if edge["state"] == "up"}
        if up >= {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
            return
        time.sleep(0.05)
    states = "; ".join(f"{edge['name']} on {edge['host']}: {edge['state']} {edge['cause']}" for edge in edges)
    raise SandboxError(f"not every node has an edge after {START_DEADLINE_S:.0f} s ({states}); see the Ray logs")
