"""The process that keeps the boxes of ``sandbox.kept``. Reads a pickled ``Kept``; returns when the edge serves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable

from posttrain.errors import SandboxError
from sandbox.edge import Edge, serve_boxes
from sandbox.edge_server import serving
from sandbox.kept import Kept, socket_in, starting
from sandbox.pool import close_pools

LOOK_EVERY_S = 1.0
SERVES = "serves"
LOG = "edge.log"


async def serve(kept: Kept, ready: Callable[[], None], held: contextlib.ExitStack) -> None:
    """Serve until SIGTERM, or until no client has held a box for ``keep_s``.

    ``held`` outlasts everything here: what keeps another edge from being started while this one ends goes into it.
    """
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        with socket_in(kept.edge_folder) as path:
            async with serve_boxes(kept.edge_folder, kept.base, kept.limits) as edge, serving(edge, path):
                ready()
                await _until_unused(edge, kept, stopped, held)
    finally:
        await close_pools()


async def _until_unused(edge: Edge, kept: Kept, stopped: asyncio.Event, held: contextlib.ExitStack) -> None:
    used_at = time.monotonic()
    while not stopped.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), LOOK_EVERY_S)
        if edge.num_attended:
            used_at = time.monotonic()
        elif time.monotonic() - used_at >= kept.keep_s:
            with contextlib.suppress(BlockingIOError):
                held.enter_context(starting(kept.edge_folder, wait=False))
                return


def main() -> int:
    """Go on in a child that belongs to nobody; the parent waits for it to serve, or says why it does not."""
    kept: Kept = pickle.load(sys.stdin.buffer)
    outcome, report = os.pipe()
    if os.fork():
        os.close(report)
        with os.fdopen(outcome) as stream:
            said = stream.read()
        if said != SERVES:
            sys.stderr.write(said or f"it ended; see {kept.edge_folder / LOG}")
        return int(said != SERVES)
    os.close(outcome)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(kept.edge_folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    with os.fdopen(report, "w") as stream, contextlib.ExitStack() as held:

        def ready() -> None:
            stream.write(SERVES)
            stream.close()

        try:
            asyncio.run(serve(kept, ready, held))
        except (SandboxError, OSError) as problem:
            if not stream.closed:
                stream.write(str(problem))
            raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
