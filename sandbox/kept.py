"""Boxes that outlive the process that works in them, for rollouts that go on where their actor was killed.

``Recipe.substrate = Kept(base=Container())`` has one more process per host keep the boxes of a run: an edge
(``sandbox.edge``), found by its socket in the run directory and started when nobody answers there. It ends with the
run; after a run that was killed it stays for ``keep_s``, so that ``--resume`` finds the boxes.

What is not covered: boxes on a host that the rollout does not come back to. It starts over on the new host, and the old
host's edge ends after ``keep_s``.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.errors import Preempted, RecipeError, SandboxError, SandboxLost, SandboxUnavailable
from posttrain.protocols import Sandbox, Substrate
from posttrain.types import SandboxSpec
from sandbox.edge import Limits
from sandbox.edge_client import EdgeClient, EdgeSandbox
from sandbox.edge_server import SOCKET
from sandbox.process import Process

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 60.0
CREDENTIALS = struct.Struct("3i")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """The boxes of another substrate, kept by a process of their own while a run lasts.

    Boxes for grading are not kept: a grading that was interrupted is done again.
    """

    base: Substrate = field(default_factory=Process)
    limits: Limits = field(default_factory=lambda: Limits(max_boxes=256, ttl_idle_s=4 * 3600.0))
    """Of each host, as a last resort: ``Workers`` bounds the number of boxes and the time of an episode, in which a box
    may idle while the model speaks."""
    keep_s: float = 1800.0
    """How long the edge and its boxes stay when no client holds any."""
    folder: Path | None = None
    """Where the edges of a run are; set by ``for_run``."""
    name: str = "kept"

    def __post_init__(self) -> None:
        if not self.keep_s > 0:
            raise RecipeError(f"Kept.keep_s = {self.keep_s!r}: expected a time > 0")

    def capabilities(self) -> Mapping[str, Any]:
        """Those of the base, whose boxes survive their client."""
        return {**self.base.capabilities(), "survives_client": True}

    def check(self) -> None:
        """Raise ``SandboxUnavailable`` unless the base can open boxes here."""
        self.base.check()

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """A box of the base, which ends with this process."""
        return self.base.open(spec)

    @contextlib.contextmanager
    def for_run(self, folder: Path) -> Iterator[Kept]:
        """The substrate with its edges in ``folder``, a local disk. Leaving ends this host's edge and all its boxes.

        After ``Preempted`` they stay for ``keep_s``.
        """
        kept = replace(self, folder=folder.absolute())
        kept.start_edge()
        try:
            yield kept
        except Preempted:
            raise
        except BaseException:
            stop_edge(kept.edge_folder)
            raise
        else:
            stop_edge(kept.edge_folder)

    @contextlib.asynccontextmanager
    async def open_for(self, attempt: str, spec: SandboxSpec) -> AsyncIterator[EdgeSandbox]:
        """The attempt's box: the one it has at this host's edge, from its first call on, or else a fresh one.

        Its calls raise ``Diverged``, ``Unknown`` and ``SandboxLost`` where the first player's cannot be repeated.
        """
        with socket_in(self.edge_folder) as path:
            async with EdgeClient(path, away=lambda: asyncio.to_thread(self.start_edge)) as edge:
                try:
                    box = await edge.attach(attempt)
                except KeyError:
                    box = await edge.create(attempt, spec)
                try:
                    yield box
                finally:
                    # An edge that is gone took the box with it.
                    with contextlib.suppress(SandboxLost):
                        await box.close()

    @property
    def edge_folder(self) -> Path:
        """State, logs and socket of this host's edge."""
        if self.folder is None:
            raise SandboxError("Kept.folder = None: boxes are kept for a run; open them within Kept.for_run(folder)")
        return self.folder / socket.gethostname()

    def start_edge(self) -> None:
        """Have an edge serve on this host: one that runs already or a new one, which does not end with this process."""
        folder = self.edge_folder
        folder.mkdir(parents=True, exist_ok=True)
        with starting(folder):
            if edge_pid(folder) is not None:
                return
            # It imports what recipe files and their neighbours define, so it searches where this process does.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            try:
                started = subprocess.run(
                    [sys.executable, "-m", "sandbox.kept_edge"],
                    input=pickle.dumps(self),
                    env=environment,
                    stderr=subprocess.PIPE,
                    timeout=START_DEADLINE_S,
                )
            except subprocess.TimeoutExpired as error:
                raise SandboxUnavailable(
                    f"the edge in {folder} did not start within {START_DEADLINE_S:.0f} s"
                ) from error
        if started.returncode:
            reason = started.stderr.decode(errors="replace").strip()
            raise SandboxUnavailable(f"the edge in {folder} could not be started: {reason}")


def stop_edge(folder: Path) -> None:
    """End the edge of a folder, should there be one, and with it all its boxes."""
    with starting(folder):
        pid = edge_pid(folder)
        if pid is None:
            return
        process = os.pidfd_open(pid)
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                signal.pidfd_send_signal(process, number)
                if select.select([process], [], [], STOP_DEADLINE_S)[0]:
                    return
        finally:
            os.close(process)
    raise SandboxError(f"the edge in {folder}, process {pid}, does not end; its boxes may be left")


def edge_pid(folder: Path) -> int | None:
    """The process that serves a folder; None when nobody does."""
    with socket_in(folder) as path, socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        pid, _, _ = CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
        return int(pid)


@contextlib.contextmanager
def socket_in(folder: Path) -> Iterator[Path]:
    """A folder's edge socket, by a path that is short enough for the kernel (107 bytes) wherever the folder is."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{descriptor}", SOCKET)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def starting(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Held by whoever starts or ends a folder's edge. ``BlockingIOError`` when it is held and one will not wait."""
    descriptor = os.open(folder / "starting", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
