"""Boxes made of Docker containers, hardened, with an optional pool of boxes started ahead.

A container takes about 200 ms to start and a daemon starts few per second, so ``Container(warm=8)`` keeps eight ready
for each kind of box that has been asked for. A box is used once and then discarded, never handed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import socket
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.errors import SandboxError, SandboxLost, SandboxUnavailable
from posttrain.types import SandboxSpec
from sandbox import cgroups, dockerd, owners, pool, seccomp
from sandbox.client import AGENT_ARGV, AGENT_MEMORY_MB, SLOTS, TMP_MB, AgentSandbox, command_limits
from sandbox.images import build

if TYPE_CHECKING:
    import docker

MIB = 1 << 20
OWNER = "posttrain.owner"
REPOSITORY = "posttrain-sandbox"
CALL_DEADLINE_S = 60
NUM_INODES = 65536
HOST_UIDS = (1 << 30, 1 << 31)
"""Where a box's payload uids are drawn from: without a user namespace they are uids of the host."""


@dataclass(frozen=True, slots=True)
class Container:
    """One Docker container per box. ``warm`` boxes per kind are started ahead of their use."""

    warm: int = 0
    name: str = "container"

    def capabilities(self) -> Mapping[str, Any]:
        """What a box guarantees."""
        image = build.find("default")
        return {
            "isolation": "container",
            "network": "none; allow-list by proxy",
            "limits": "cgroup",
            "memory": "memory_mb plus disk_mb, since files live in memory",
            "seccomp": True,
            "image": image.digest if image else None,
            "survives_host_restart": False,
            "survives_edge_restart": False,
            "snapshot": "fs",
            "pause": cgroups.can_freeze(),
        }

    def check(self) -> None:
        """Raise ``SandboxUnavailable`` unless a box can be opened here."""
        try:
            import docker  # noqa: F401
        except ImportError as error:
            raise SandboxUnavailable(f"substrate 'container': the Docker SDK is missing; {dockerd.INSTALL}") from error
        if not dockerd.is_running():
            raise SandboxUnavailable(
                f"substrate 'container': no Docker daemon answers at {dockerd.SOCKET}; start it "
                f"(systemctl start docker, or as root python -m sandbox.dockerd), or {dockerd.INSTALL}"
            )
        build.require("default")

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[AgentSandbox]:
        """A fresh box; leaving the context kills everything in it and removes it."""
        return pool.opened(self, spec, start=start, stop=stop)


async def start(spec: SandboxSpec) -> AgentSandbox:
    """A running container with its agent answering; ``stop`` removes it."""
    container, channel, pid = await _in_thread(_start_container, spec)
    group = await asyncio.to_thread(cgroups.of, pid)
    box = AgentSandbox(
        channel,
        spec,
        hits=group.hits if group else None,
        kill=functools.partial(_remove, container),
        freeze=group.freeze if group and group.freezer else None,
    )
    uid = random.SystemRandom().randrange(*HOST_UIDS, SLOTS)
    try:
        await box.start(uid=uid, limits=command_limits(spec))
    except BaseException:
        await stop(box)
        raise
    return box


async def stop(box: AgentSandbox) -> None:
    """Kill and remove a box."""
    box.close()
    await _in_thread(box.kill)


async def _in_thread(function: Any, *arguments: Any) -> Any:
    try:
        return await asyncio.wait_for(asyncio.to_thread(function, *arguments), CALL_DEADLINE_S)
    except TimeoutError as error:
        raise SandboxLost(f"the Docker daemon did not answer within {CALL_DEADLINE_S} s") from error


class AttachedChannel:
    """Docker's attach stream: what the agent writes comes in records that name its stream."""

    def __init__(self, attached: socket.socket) -> None:
        attached.setblocking(False)
        self._socket = attached
        self._buffer = bytearray()

    async def receive(self) -> bytes:
        while True:
            record = self._take_record()
            if record:
                return record
            data = await asyncio.get_running_loop().sock_recv(self._socket, 1 << 18)
            if not data:
                return b""
            self._buffer += data

    def _take_record(self) -> bytes:
        while len(self._buffer) >= 8:
            stream, size = self._buffer[0], int.from_bytes(self._buffer[4:8], "big")
            if len(self._buffer) < 8 + size:
                return b""
            record = bytes(self._buffer[8 : 8 + size])
            del self._buffer[: 8 + size]
            if stream == 1:
                return record
        return b""

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def close(self) -> None:
        self._socket.close()


@functools.cache
def _client() -> docker.APIClient:
    import docker

    client = docker.APIClient(base_url=f"unix://{dockerd.SOCKET}", timeout=CALL_DEADLINE_S)
    _remove_orphans(client)
    return client


def _start_container(spec: SandboxSpec) -> tuple[str, AttachedChannel, int]:
    from docker.errors import DockerException

    try:
        client = _client()
        container = client.create_container(
            _image(spec.image),
            list(AGENT_ARGV),
            user="0:0",
            stdin_open=True,
            hostname="sandbox",
            working_dir=spec.workdir,
            network_disabled=True,
            labels={OWNER: owners.own()},
            host_config=_host_config(client, spec),
        )["Id"]
        try:
            stream = client.attach_socket(container, {"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})
            channel = AttachedChannel(stream._sock)
            client.start(container)
            return container, channel, client.inspect_container(container)["State"]["Pid"]
        except BaseException:
            _remove(container)
            raise
    except (DockerException, OSError) as error:
        raise SandboxError(f"Docker could not start a box: {error}") from error


def _host_config(client: docker.APIClient, spec: SandboxSpec) -> Any:
    memory = (spec.memory_mb + spec.disk_mb + TMP_MB + AGENT_MEMORY_MB) * MIB
    area = f"rw,nosuid,nodev,exec,mode=0777,nr_inodes={NUM_INODES}"
    return client.create_host_config(
        network_mode="none",
        mem_limit=memory,
        memswap_limit=memory,
        cpu_period=cgroups.CPU_PERIOD_US,
        cpu_quota=int(spec.cpus * cgroups.CPU_PERIOD_US),
        pids_limit=spec.max_processes + 1,
        cap_drop=["ALL"],
        cap_add=["SETUID", "SETGID", "KILL"],
        security_opt=["no-new-privileges", f"seccomp={json.dumps(seccomp.docker_profile())}"],
        read_only=True,
        tmpfs={spec.workdir: f"{area},size={spec.disk_mb}m", "/tmp": f"{area},size={TMP_MB}m"},
        shm_size=MIB,
        log_config={"type": "none", "config": {}},
        auto_remove=True,
        init=False,
    )


@functools.cache
def _image(name: str) -> str:
    """The tag of an image, imported from the cached tarball when the daemon does not have it."""
    image = build.require(name)
    tag = f"{image.name}-{image.digest}"
    if not _client().images(f"{REPOSITORY}:{tag}"):
        _client().import_image(str(image.tarball), repository=REPOSITORY, tag=tag, changes=["WORKDIR /work"])
    return f"{REPOSITORY}:{tag}"


def _remove(container: str) -> None:
    from docker.errors import APIError, NotFound

    for _ in range(50):
        try:
            _client().remove_container(container, force=True)
        except NotFound:
            return
        except APIError as error:
            # 409: the daemon is removing it already, since the agent has ended.
            if error.status_code != 409:
                raise SandboxError(f"Docker could not remove a box: {error}") from error
            time.sleep(0.02)
        else:
            return


def _remove_orphans(client: docker.APIClient) -> None:
    """Remove the containers whose owner on this host is dead."""
    from docker.errors import APIError

    for found in client.containers(all=True, filters={"label": OWNER}):
        if owners.is_dead(found["Labels"][OWNER]):
            with contextlib.suppress(APIError):
                client.remove_container(found["Id"], force=True)
