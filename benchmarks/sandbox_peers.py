"""What ``benchmarks/sandbox.py`` compares with, each on the same local image and without network in the box."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Protocol

import docker

from sandbox.bench import Action

CLONE_NEWNET = 0x40000000
PAYLOAD = "1000:1000"
TOOLS = "/opt/peers"
"""Where the peers find in their boxes what the image lacks, mounted read-only."""
INSTALL = "pip install -c constraints.txt -e '.[bench]'"


class Peer(Protocol):
    """Each method gives the seconds that its part of interest took, and raises when something else came out."""

    name: str
    note: str
    """What was done so that it runs here."""

    def opened(self) -> contextlib.AbstractAsyncContextManager[float]:
        """Start a box, until it answers."""
        ...

    async def execute(self, *argv: str) -> float: ...

    async def python(self, source: str, expected: str) -> float: ...


class DockerExec:
    """``docker exec`` through the Docker SDK."""

    name = "docker exec"
    note = (
        "Docker SDK, containers.run and container.exec_run with user=1000:1000; no command is killed, timed or capped"
    )

    def __init__(self, image: str) -> None:
        self._client = docker.from_env()
        self._image = image
        self._container: Any = None

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[float]:
        started = time.perf_counter()
        container = self._client.containers.run(self._image, ["sleep", "infinity"], detach=True, network_mode="none")
        took = time.perf_counter() - started
        self._container = container
        try:
            yield took
        finally:
            container.remove(force=True)

    async def execute(self, *argv: str) -> float:
        return self._exec(list(argv), "")

    async def python(self, source: str, expected: str) -> float:
        return self._exec(["python3", "-I", "-c", source], expected)

    def _exec(self, argv: list[str], expected: str) -> float:
        started = time.perf_counter()
        done = self._container.exec_run(argv, user=PAYLOAD)
        took = time.perf_counter() - started
        _expect(done.exit_code, done.output.decode(), expected)
        return took


class LlmSandbox:
    """llm-sandbox's Docker session."""

    name = "llm-sandbox"
    note = (
        "SandboxSession with Docker, skip_environment_setup=True since pip needs a network, network_mode none, "
        "as root, which is its default; `python` is a link mounted beside the image; its pool hands the "
        "same container on"
    )

    def __init__(self, image: str, tools: Path) -> None:
        import llm_sandbox  # noqa: F401 (so that it is missed here, if it is)

        self._settings: dict[str, Any] = {
            "client": docker.from_env(),
            "image": image,
            "lang": "python",
            "skip_environment_setup": True,
            "workdir": "/work",
            "runtime_configs": {
                "command": ["sleep", "infinity"],
                "stop_signal": "SIGKILL",
                "network_mode": "none",
                "volumes": {str(tools): {"bind": f"{TOOLS}/bin", "mode": "ro"}},
                "environment": {"PATH": f"{TOOLS}/bin:/usr/local/bin:/usr/bin:/bin"},
            },
        }
        self._session: Any = None

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[float]:
        from llm_sandbox import SandboxSession

        started = time.perf_counter()
        session = SandboxSession(**self._settings, keep_template=True)
        session.open()
        took = time.perf_counter() - started
        self._session = session
        try:
            yield took
        finally:
            session.close()

    @contextlib.contextmanager
    def pool(self) -> Iterator[Action]:
        """What takes a container from its pool."""
        from llm_sandbox import SandboxBackend, SandboxSession
        from llm_sandbox.pool import PoolConfig, create_pool_manager

        pool = create_pool_manager(
            backend=SandboxBackend.DOCKER, config=PoolConfig(max_pool_size=2, min_pool_size=2), **self._settings
        )

        async def take() -> float:
            started = time.perf_counter()
            session = SandboxSession(pool=pool, lang="python", workdir="/work")
            session.open()
            took = time.perf_counter() - started
            done = session.execute_command("true")
            _expect(done.exit_code, done.stdout, "")
            session.close()
            return took

        try:
            yield take
        finally:
            pool.close()

    async def execute(self, *argv: str) -> float:
        started = time.perf_counter()
        done = self._session.execute_command(" ".join(argv))
        took = time.perf_counter() - started
        _expect(done.exit_code, done.stdout, "")
        return took

    async def python(self, source: str, expected: str) -> float:
        started = time.perf_counter()
        done = self._session.run(source)
        took = time.perf_counter() - started
        _expect(done.exit_code, done.stdout, expected)
        return took


class SweRex:
    """SWE-ReX's Docker deployment, whose server in the box is reached over HTTP."""

    name = "SWE-ReX"
    note = (
        "DockerDeployment(pull=never, python_standalone_dir=None); its server's packages are mounted beside the image, "
        "which has the same Python; --network none, so this process enters the box's network namespace to connect to "
        "the server's port, before the clock starts; commands run as root, in the server's own environment"
    )

    def __init__(self, image: str, tools: Path) -> None:
        import swerex
        from swerex.deployment.docker import DockerDeployment

        quiet = logging.getLogger("benchmarks.swerex")
        quiet.setLevel(logging.CRITICAL + 1)
        self._deployment = lambda: DockerDeployment(
            image=image,
            pull="never",
            port=8000,
            python_standalone_dir=None,
            startup_timeout=60.0,
            logger=quiet,
            docker_args=[
                *("--network", "none"),
                *(
                    "--volume",
                    f"{Path(swerex.__file__).parents[1]}:{TOOLS}/lib:ro",
                    "--volume",
                    f"{tools}:{TOOLS}/bin:ro",
                ),
                *("--env", f"PYTHONPATH={TOOLS}/lib", "--env", f"PATH={TOOLS}/bin:/usr/local/bin:/usr/bin:/bin"),
            ],
        )
        self._docker = docker.from_env().api
        self._running: Any = None
        self._pid = 0

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[float]:
        deployment = self._deployment()
        with _own_network_afterwards():
            # The deployment tries to connect until it can, which is when this task has found and entered the box.
            entering = asyncio.create_task(self._enter_when_there(deployment))
            started = time.perf_counter()
            try:
                await deployment.start()
            finally:
                entering.cancel()
            took = time.perf_counter() - started
        self._running = deployment.runtime
        pid = self._pid
        try:
            yield took
        finally:
            with _own_network_afterwards():
                _enter_network_of(pid)
                await deployment.stop()

    async def _enter_when_there(self, deployment: Any) -> None:
        while True:
            await asyncio.sleep(0.02)
            with contextlib.suppress(docker.errors.NotFound):
                self._pid = self._docker.inspect_container(deployment.container_name or "none")["State"]["Pid"]
                if self._pid:
                    _enter_network_of(self._pid)
                    return

    async def execute(self, *argv: str) -> float:
        return await self._execute(list(argv), "")

    async def python(self, source: str, expected: str) -> float:
        return await self._execute(["python3", "-I", "-c", source], expected)

    async def _execute(self, argv: list[str], expected: str) -> float:
        from swerex.runtime.abstract import Command

        with _own_network_afterwards():
            _enter_network_of(self._pid)
            started = time.perf_counter()
            done = await self._running.execute(Command(command=argv))
            took = time.perf_counter() - started
        _expect(done.exit_code, done.stdout, expected)
        return took


def _expect(code: int, output: str, expected: str) -> None:
    if code != 0 or output != expected:
        raise RuntimeError(f"expected exit code 0 and the output {expected!r}, got {code} and {output!r}")


@contextlib.contextmanager
def _own_network_afterwards() -> Iterator[None]:
    """Where the calling thread may enter other network namespaces, which then hold the sockets it makes."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        _enter(own)


def _enter_network_of(pid: int) -> None:
    _enter(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))


def _enter(namespace: int) -> None:
    """Also closes the descriptor. Needs root."""
    try:
        if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns into the network namespace of a box")
    finally:
        os.close(namespace)


@contextlib.contextmanager
def all_peers(image: str) -> Iterator[tuple[list[Peer], dict[str, str]]]:
    """The peers that can run here, and why the others cannot."""
    peers: list[Peer] = [DockerExec(image)]
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="posttrain-bench-") as folder:
        tools = Path(folder)
        tools.chmod(0o755)
        (tools / "python").symlink_to("/usr/bin/python3")
        (tools / "swerex-remote").write_text('#!/bin/sh\nexec /usr/bin/python3 -m swerex "$@"\n')
        (tools / "swerex-remote").chmod(0o755)
        for kind in (SweRex, LlmSandbox):
            try:
                peers.append(kind(image, tools))
            except ImportError as problem:
                missing[kind.name] = f"{problem}; {INSTALL}"
        yield peers, missing
