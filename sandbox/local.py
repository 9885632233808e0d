"""Plain subprocesses in a temporary directory. NO isolation: for code that is trusted, as in one's own tests."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError, Unsupported
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox import layers, owners
from sandbox.agent import CHUNK, FLOOD_BYTES, Capture, list_files, open_folder, read_file, split, unpack, write_file
from sandbox.client import BASE_ENV, check_argv, check_env, check_path

KILL_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True)
class LocalUnsafe:
    """Runs model-written code with the rights of whoever trains. Only the time and output limits are enforced."""

    i_accept_that_model_written_code_runs_unisolated: bool = False
    name: str = "local-unsafe"

    def __post_init__(self) -> None:
        if not self.i_accept_that_model_written_code_runs_unisolated:
            raise RecipeError(
                "LocalUnsafe.i_accept_that_model_written_code_runs_unisolated = False: model-written code could read "
                "and delete this user's files; set it to True to accept that, or use sandbox.process.Process"
            )

    def capabilities(self) -> Mapping[str, Any]:
        """Nothing is guaranteed but the wall-clock and output limits."""
        return {"isolation": "none", "network": "host", "limits": "time and output", "image": "host", "users": 0}

    def check(self) -> None:
        """Always possible."""

    @contextlib.asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[LocalSandbox]:
        """A temporary directory, removed at the end. ``Unsupported`` with ``spec.network``, which nothing enforces."""
        if layers.split(spec.image)[1]:
            raise Unsupported(f"SandboxSpec.image = {spec.image!r}: substrate {self.name!r} has no layers")
        if spec.network:
            raise Unsupported(
                f"SandboxSpec.network = {spec.network!r}: {self.name} has the host's network and no allow-list"
            )
        with tempfile.TemporaryDirectory(prefix=owners.name("local"), ignore_cleanup_errors=True) as folder:
            box = LocalSandbox(Path(folder), spec)
            for path, data in spec.files.items():
                await box.write(path, data)
            yield box


class LocalSandbox:
    """A directory to run commands in."""

    def __init__(self, folder: Path, spec: SandboxSpec) -> None:
        self._folder = folder
        self._spec = spec

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = None,
        max_output: int = 1 << 20,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        user: str | None = None,
    ) -> ExecResult:
        """Run argv, or a string through ``sh -c``. Its process group is killed at the end; a daemon escapes that.

        ``Unsupported`` with a ``user``: everything runs as whoever trains.
        """
        if user is not None:
            raise Unsupported(f"user = {user!r}: 'local-unsafe' has no users; use another substrate, or leave it out")
        limit_s = self._spec.timeout_s if timeout_s is None else timeout_s
        captures = (Capture(max_output), Capture(max_output))
        variables = check_env({**BASE_ENV, "PATH": os.environ.get("PATH", os.defpath), **(env or {})})
        relative = check_path(cwd, allow_workdir=True)
        os.close(open_folder(str(self._folder), split(os.fsencode(relative))))
        started = time.monotonic()
        try:
            process = await asyncio.create_subprocess_exec(
                *check_argv(command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                cwd=self._folder / relative,
                env={**variables, "HOME": str(self._folder)},
                start_new_session=True,
            )
        except OSError as error:
            code = 127 if isinstance(error, FileNotFoundError) else 126
            return ExecResult(status=ExecStatus.EXITED, exit_code=code, stderr=f"sandbox: {error}\n".encode())
        status = await _run(process, stdin, captures, limit_s)
        code = process.returncode or 0
        if status is ExecStatus.EXITED and code < 0:
            status = ExecStatus.SIGNALED
        return ExecResult(
            status=status,
            exit_code=code if status is ExecStatus.EXITED else None,
            signal=-code if code < 0 else None,
            stdout=captures[0].value(),
            stderr=captures[1].value(),
            truncated_bytes=sum(capture.dropped for capture in captures),
            wall_s=time.monotonic() - started,
        )

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        """Content of a regular file, reached without following links."""
        relative = os.fsencode(check_path(path))
        return unpack(read_file(str(self._folder), relative, max_bytes))[0]

    async def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, atomically, with its parent directories."""
        write_file(str(self._folder), os.fsencode(check_path(path)), data)

    async def list(self, path: str = ".") -> list[str]:
        """Names of the regular files below a directory, relative to the workdir, sorted."""
        relative = os.fsencode(check_path(path, allow_workdir=True))
        return sorted(os.fsdecode(name) for name in unpack(list_files(str(self._folder), relative)))


async def _run(
    process: asyncio.subprocess.Process, stdin: bytes, captures: tuple[Capture, Capture], limit_s: float
) -> ExecStatus:
    """Feed, drain and wait, then kill the process group, so that a background child cannot hold the pipes."""
    flooded = asyncio.Event()
    assert process.stdout is not None
    assert process.stderr is not None
    drains = [
        asyncio.create_task(_drain(stream, capture, flooded))
        for stream, capture in zip((process.stdout, process.stderr), captures, strict=True)
    ]
    feed = asyncio.create_task(_feed(process, stdin))
    ends = {asyncio.create_task(process.wait()), asyncio.create_task(flooded.wait())}
    try:
        done, _ = await asyncio.wait(ends, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.wait(drains, timeout=KILL_DEADLINE_S)
        for task in (*drains, *ends, feed):
            task.cancel()
        await asyncio.wait_for(process.wait(), KILL_DEADLINE_S)
    if flooded.is_set():
        return ExecStatus.OUTPUT_LIMIT
    return ExecStatus.EXITED if done else ExecStatus.TIMEOUT


async def _drain(stream: asyncio.StreamReader, capture: Capture, flooded: asyncio.Event) -> None:
    while data := await stream.read(CHUNK):
        capture.feed(data)
        if capture.dropped > FLOOD_BYTES:
            flooded.set()


async def _feed(process: asyncio.subprocess.Process, data: bytes) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(data)
        await process.stdin.drain()
        process.stdin.close()
