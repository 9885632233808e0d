"""Programs in a box with this process's standard streams: piped through, or as a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator, Sequence
from pathlib import Path

from posttrain.errors import RecipeError, SandboxLost, Unsupported
from posttrain.protocols import Sandbox, Substrate
from posttrain.types import ExecResult, SandboxSpec
from sandbox.client import AgentSandbox
from sandbox.edge_client import EdgeClient
from sandbox.edge_server import SOCKET
from sandbox.operations import RemoteJob
from sandbox.streams import Job

CHUNK = 1 << 16
SHELL = ("bash", "--norc", "-i")
PROMPT = r"sandbox:\w\$ "


async def run(
    substrate: Substrate,
    spec: SandboxSpec,
    argv: Sequence[str],
    *,
    timeout_s: float | None = None,
    user: str | None = None,
) -> ExecResult:
    """Run a program in a fresh box, with standard input passed in and output passed on as it comes.

    Ctrl-C interrupts the program; a second one kills it.
    """
    async with substrate.open(spec) as box:
        job = await _agent(box, substrate).spawn(argv, timeout_s=timeout_s, user=user)
        async with job:
            _forward_input(job)
            presses: list[asyncio.Task[None]] = []

            def pressed() -> None:
                presses.append(asyncio.create_task(job.kill() if presses else job.interrupt()))

            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, pressed)
            try:
                async for chunk in job:
                    _write(2 if chunk.stream == "stderr" else 1, chunk.data)
                return await job.wait()
            finally:
                asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)


async def shell(substrate: Substrate, spec: SandboxSpec, *, user: str | None = None) -> ExecResult:
    """An interactive shell in a fresh box, on this process's terminal. ``RecipeError`` when it has none."""
    _check_terminal()
    async with substrate.open(spec) as box:
        job = await _agent(box, substrate).spawn(SHELL, env=_shell_env(), user=user, tty=_terminal_size())
        async with job:
            return await _on_terminal(job)


async def attached_shell(folder: Path, rollout_id: str, *, user: str | None = None) -> ExecResult:
    """The same in the box that an edge keeps for a rollout, as the rollout's next recorded calls.

    Raises ``KeyError`` when the rollout has none, ``SandboxLost`` when the box is gone, ``Fenced`` when somebody else
    takes it over.
    """
    _check_terminal()
    async with EdgeClient(folder / SOCKET, retry_s=3.0) as client:
        box = await client.attach(rollout_id)
        box.skip_recorded()
        print(
            f"box {box.hold.box_id} after {box.hold.num_recorded} recorded calls; what you do is recorded, too, and "
            "whoever held the box is fenced off. It stays with the edge.",
            file=sys.stderr,
        )
        job = await box.spawn(SHELL, env=_shell_env(), user=user, tty=_terminal_size())
        async with job:
            return await _on_terminal(job)


async def _on_terminal(job: Job | RemoteJob) -> ExecResult:
    """Connect this process's terminal with that of a job until it ends."""
    resizes: list[asyncio.Task[None]] = []

    def resized() -> None:
        resizes.append(asyncio.create_task(job.resize(*_terminal_size())))

    asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, resized)
    with _raw_terminal():
        _forward_input(job)
        async for chunk in job:
            _write(1, chunk.data)
    return await job.wait()


def _check_terminal() -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise RecipeError("standard input and output are no terminal; use `posttrain sandbox run -- COMMAND`")


def _shell_env() -> dict[str, str]:
    return {"TERM": os.environ.get("TERM", "xterm"), "PS1": PROMPT}


def describe(result: ExecResult) -> str:
    """How a program ended and what it took."""
    number = {"exited": result.exit_code, "signaled": result.signal}.get(result.status.value)
    ended = result.status.value if number is None else f"{result.status.value} {number}"
    used = [f"wall {result.wall_s:.2f} s"]
    used += [f"CPU {result.cpu_s:.2f} s"] if result.cpu_s is not None else []
    used += [f"memory {result.max_rss_bytes / (1 << 20):.0f} MiB"] if result.max_rss_bytes is not None else []
    return f"{ended} ({', '.join(used)})"


def _agent(box: Sandbox, substrate: Substrate) -> AgentSandbox:
    if not isinstance(box, AgentSandbox):
        raise Unsupported(f"substrate {substrate.name!r}: its boxes do not stream; expected one driven by the agent")
    return box


def _forward_input(job: Job | RemoteJob) -> None:
    """Feed the job what this process reads, in a thread that nobody waits for: a read cannot be interrupted."""
    loop = asyncio.get_running_loop()

    def forward() -> None:
        with contextlib.suppress(BrokenPipeError, SandboxLost, RuntimeError):
            while True:
                try:
                    data = os.read(0, CHUNK)
                except OSError:
                    # There is no standard input.
                    data = b""
                asyncio.run_coroutine_threadsafe(job.write_stdin(data, eof=not data), loop).result()
                if not data:
                    return

    threading.Thread(target=forward, daemon=True).start()


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the box, Ctrl-C included."""
    before = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _terminal_size() -> tuple[int, int]:
    size = os.get_terminal_size(1)
    return size.lines, size.columns


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
