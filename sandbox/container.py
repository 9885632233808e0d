"""Boxes made of Docker containers, hardened, with an optional pool of boxes started ahead.

A container takes about 200 ms to start and a daemon starts few per second, so ``Container(warm=8)`` keeps eight ready
for each kind of box that has been asked for. A box is used once and then discarded, never handed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import random
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.errors import SandboxError, SandboxLost, SandboxUnavailable
from posttrain.types import SandboxSpec
from sandbox import cgroups, dockerd, owners, pool, seccomp
from sandbox.client import AGENT_ARGV, AGENT_MEMORY_MB, IDS, MAX_USERS, TMP_MB, AgentSandbox, Channel, command_limits
from sandbox.images import build

if TYPE_CHECKING:
    import docker

T = TypeVar("T")

MIB = 1 << 20
OWNER = "posttrain.owner"
REPOSITORY = "posttrain-sandbox"
CALL_DEADLINE_S = 60.0
"""Of each request to the daemon."""
MAX_CALLS = 16
"""Boxes being started or removed at once; more wait. They have threads of their own, so that a daemon that hangs holds
up nothing else."""
NUM_INODES = 65536
HOST_UIDS = (1 << 30, 1 << 31)
"""Where a box's payload uids are drawn from: without a user namespace they are uids of the host."""


@dataclass(frozen=True, slots=True)
class Container:
    """One Docker container per box. ``warm`` boxes per kind are started ahead of their use."""

    warm: int = 0
    socket: str = str(dockerd.SOCKET)
    """Where the daemon listens. It must run on this machine."""
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
            "users": MAX_USERS,
            "snapshot": "fs",
            "pause": cgroups.can_freeze(),
        }

    def check(self) -> None:
        """Raise ``SandboxUnavailable`` unless a box can be opened here."""
        try:
            import docker  # noqa: F401
        except ImportError as error:
            raise SandboxUnavailable(f"substrate 'container': the Docker SDK is missing; {dockerd.INSTALL}") from error
        if not dockerd.is_running(Path(self.socket)):
            raise SandboxUnavailable(
                f"substrate 'container': no Docker daemon answers at {self.socket}; start it "
                f"(systemctl start docker, or as root python -m sandbox.dockerd), or {dockerd.INSTALL}"
            )
        build.require("default")

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[AgentSandbox]:
        """A fresh box; leaving the context kills everything in it and removes it."""
        return pool.opened(self, spec, start=functools.partial(start, self.socket), stop=stop)


@dataclass(frozen=True, slots=True)
class Started:
    """A running container and the way to its agent."""

    client: docker.APIClient
    container: str
    attached: socket.socket
    pid: int
    """Of its first process, the agent."""

    def kill(self) -> None:
        """Kill everything in it without the daemon, which may be what failed; through it only where need be."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError:
            return
        try:
            # Where the daemon's process ids are not ours, this one is a stranger's.
            if self.container not in Path(f"/proc/{self.pid}/cgroup").read_text():
                raise PermissionError
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        except ProcessLookupError:
            return
        except OSError:
            remove(self.client, self.container)
        finally:
            os.close(fd)

    def remove(self) -> None:
        self.kill()
        remove(self.client, self.container)


class ContainerSandbox(AgentSandbox):
    """A box and the container it is."""

    started: Started


async def start(socket_path: str, spec: SandboxSpec) -> AgentSandbox:
    """A running container with its agent answering; ``stop`` removes it."""
    starting = _calls.submit(_start_container, socket_path, spec)
    try:
        started = await _answer(starting)
    except asyncio.CancelledError:
        # It will be started yet, and then nobody wants it any more.
        starting.add_done_callback(_discard)
        raise
    group = cgroups.of(started.pid)
    try:
        channel = await AttachedChannel.over(started.attached)
    except BaseException:
        await _answer(_calls.submit(started.remove))
        raise
    box = ContainerSandbox(
        channel,
        spec,
        hits=group.hits if group else None,
        kill=started.kill,
        freeze=group.freeze if group and group.freezer else None,
    )
    box.started = started
    uid = random.SystemRandom().randrange(*HOST_UIDS, IDS)
    try:
        await box.start(uid=uid, limits=command_limits(spec))
    except BaseException:
        await stop(box)
        raise
    return box


async def stop(box: AgentSandbox) -> None:
    """Kill and remove a box. ``SandboxLost`` when the daemon is not there to remove what is dead."""
    assert isinstance(box, ContainerSandbox)
    box.close()
    await _answer(_calls.submit(box.started.remove))


_calls = ThreadPoolExecutor(MAX_CALLS, "docker")


async def _answer(call: Future[T]) -> T:
    """What comes of a call, which goes on when nobody waits for it any more."""
    return await asyncio.shield(asyncio.wrap_future(call))


def _discard(starting: Future[Started]) -> None:
    if starting.exception() is None:
        started = starting.result()
        started.attached.close()
        started.remove()


class AttachedChannel(Channel):
    """Docker's attach stream: what the agent writes comes in records that name its stream."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        super().__init__(reader, writer)
        self._buffer = bytearray()

    async def receive(self) -> bytes:
        while not (record := self._take_record()):
            data = await super().receive()
            if not data:
                return b""
            self._buffer += data
        return record

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


@functools.cache
def connect(socket_path: str) -> docker.APIClient:
    """A client of the daemon at this socket, each of whose calls has a deadline."""
    import docker

    with _daemon_errors("be reached"):
        return docker.APIClient(base_url=f"unix://{socket_path}", timeout=CALL_DEADLINE_S)


def owned(client: docker.APIClient) -> dict[str, str]:
    """The boxes among the daemon's containers and whose they are."""
    with _daemon_errors("list the boxes"):
        found = client.containers(all=True, filters={"label": OWNER})
    return {container["Id"]: container["Labels"][OWNER] for container in found}


@functools.cache
def _client(socket_path: str) -> docker.APIClient:
    client = connect(socket_path)
    for container, owner in owned(client).items():
        if owners.is_dead(owner):
            remove(client, container)
    return client


_doubtful: set[tuple[docker.APIClient, str]] = set()
"""Containers that a daemon was to make or remove and did not answer: it may have them, and nobody wants them."""


def _start_container(socket_path: str, spec: SandboxSpec) -> Started:
    client, name = _client(socket_path), f"{owners.PREFIX}-{uuid.uuid4().hex}"
    for asked, doubtful in list(_doubtful):
        if asked is client:
            remove(client, doubtful)
            _doubtful.discard((client, doubtful))
    try:
        return _make(client, name, _image(socket_path, spec.image), spec)
    except SandboxLost:
        _doubtful.add((client, name))
        raise


def _make(client: docker.APIClient, name: str, image: str, spec: SandboxSpec) -> Started:
    with _daemon_errors("start a box"):
        container = client.create_container(
            image,
            list(AGENT_ARGV),
            name=name,
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
            client.start(container)
            return Started(client, container, stream._sock, client.inspect_container(container)["State"]["Pid"])
        except BaseException:
            remove(client, container)
            raise


@contextlib.contextmanager
def _daemon_errors(what: str) -> Iterator[None]:
    """No answer of the daemon is ``SandboxLost``, a refusal is ``SandboxError``."""
    from docker.errors import DockerException

    try:
        yield
    except DockerException as error:
        raise SandboxError(f"Docker could not {what}: {error}") from error
    except OSError as error:
        raise SandboxLost(f"the Docker daemon is gone or hangs, so it could not {what}: {error}") from error


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
def _image(socket_path: str, name: str) -> str:
    """The tag of an image, imported from the cached tarball when the daemon does not have it."""
    image, client = build.require(name), _client(socket_path)
    tag = f"{image.name}-{image.digest}"
    if not client.images(f"{REPOSITORY}:{tag}"):
        client.import_image(str(image.tarball), repository=REPOSITORY, tag=tag, changes=["WORKDIR /work"])
    return f"{REPOSITORY}:{tag}"


def remove(client: docker.APIClient, container: str) -> None:
    """Kill and remove a container; one that is gone is no error."""
    from docker.errors import APIError, NotFound

    try:
        with _daemon_errors("remove a box"):
            for _ in range(50):
                try:
                    client.remove_container(container, force=True)
                except NotFound:
                    return
                except APIError as error:
                    # 409: the daemon is removing it already, since the agent has ended.
                    if error.status_code != 409:
                        raise
                    time.sleep(0.02)
                else:
                    return
    except SandboxLost:
        _doubtful.add((client, container))
        raise
