"""An edge on a unix socket. Only the user who started it can reach it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError, SandboxError
from posttrain.types import SandboxSpec
from sandbox import wire
from sandbox.conformance import find_substrate
from sandbox.edge import Edge, Limits, serve_boxes
from sandbox.operations import Request, outcome_of
from sandbox.pool import close_pools

SOCKET = "edge.sock"


@contextlib.asynccontextmanager
async def serving(edge: Edge, path: Path) -> AsyncIterator[None]:
    """Answer clients on a socket while the context lasts."""
    # Left by an edge that was killed: this one holds the folder's lock.
    path.unlink(missing_ok=True)
    answering: set[asyncio.Task[None]] = set()
    with wire.shortened(path) as short:
        server = await asyncio.start_unix_server(functools.partial(_converse, edge, answering), short)
        path.chmod(0o600)
        try:
            yield
        finally:
            # What is being answered goes on: its boxes are ended with the edge, and the clients told so.
            server.close()
            path.unlink(missing_ok=True)


async def _converse(
    edge: Edge,
    answering: set[asyncio.Task[None]],
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """One client. What it has asked for goes on when it is gone."""
    requests: dict[int, asyncio.Task[None]] = {}
    try:
        while message := await wire.receive(reader):
            number, method = message["id"], message["method"]
            if method == "cancel":
                if number in requests:
                    requests[number].cancel()
                continue
            task = requests[number] = asyncio.create_task(_answer(edge, writer, message))
            answering.add(task)
            task.add_done_callback(answering.discard)
            task.add_done_callback(functools.partial(_drop, requests, number))
    except ValueError as error:
        sys.stderr.write(f"sandbox.edge: a client is cut off: {error}\n")
    except asyncio.CancelledError:
        # The server is closing, and asyncio would report the end of a client's task as an error.
        return
    finally:
        writer.close()


def _drop(requests: dict[int, asyncio.Task[None]], number: int, done: asyncio.Task[None]) -> None:
    if requests.get(number) is done:
        del requests[number]


async def _answer(edge: Edge, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    try:
        reply = await answer(edge, message["method"], message["arguments"])
    except asyncio.CancelledError:
        reply = {"cancelled": True}
    with contextlib.suppress(ConnectionError, RuntimeError):
        writer.write(wire.pack({"id": message["id"], **reply}))
        await writer.drain()


async def answer(edge: Edge, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request: its ``value``, or the ``error`` it raised and whether the call was ``refused``."""
    reply: dict[str, Any] = {}
    try:
        if method == "call":
            await _answer_call(edge, reply, arguments)
        else:
            reply["value"] = await _answer_other(edge, method, arguments)
    except Exception as error:  # noqa: BLE001 (every failure is the client's to see, and none may end the edge)
        reply["error"] = wire.pack_error(error)
    return reply


async def _answer_call(edge: Edge, reply: dict[str, Any], arguments: dict[str, Any]) -> None:
    reply["refused"] = True
    request = Request(arguments["kind"], arguments["request"])
    recorder, operation = await edge.begin(
        arguments["box_id"],
        arguments["epoch"],
        arguments["position"],
        request,
        idempotent=arguments["idempotent"],
    )
    reply["refused"] = False
    reply["value"] = outcome_of(await edge.outcome(recorder, operation))


async def _answer_other(edge: Edge, method: str, arguments: dict[str, Any]) -> Any:
    if method == "create":
        spec = SandboxSpec(**arguments["spec"])
        more = {name: value for name, value in arguments.items() if name not in ("spec", "rollout_id")}
        return asdict(await edge.create(arguments["rollout_id"], spec, **more))
    if method == "attach":
        return asdict(await edge.attach(arguments["rollout_id"]))
    if method == "renew":
        return await edge.renew(arguments["box_id"], arguments["epoch"])
    if method == "close":
        return await edge.close(arguments["box_id"], arguments["epoch"])
    if method == "list":
        return edge.list()
    if method == "ping":
        return None
    raise ValueError(f"method = {method!r}: expected call, create, attach, renew, close, list or ping")


async def run(folder: Path, substrates: Sequence[str], limits: Limits) -> None:
    """Serve until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    kinds = [find_substrate(name) for name in substrates]
    for kind in kinds:
        kind.check()
    async with serve_boxes(folder, kinds, limits) as edge, serving(edge, folder / SOCKET):
        sys.stdout.write(f"serving {', '.join(substrates)} boxes on {folder / SOCKET}\n")
        sys.stdout.flush()
        await stopped.wait()
    await close_pools()


def main() -> int:
    """The command line of ``python -m sandbox.edge``."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.edge", description="Keep sandboxes for other processes.")
    parser.add_argument("--dir", type=Path, required=True, help="where state, logs and the socket lie")
    parser.add_argument(
        "--substrate",
        nargs="+",
        default=["process"],
        help="process, container or module:attribute; the first one is for clients that name none",
    )
    for item in fields(Limits):
        kind = int if item.name.startswith("max_") else float
        parser.add_argument(f"--{item.name.replace('_', '-')}", type=kind, default=item.default)
    options = vars(parser.parse_args())
    try:
        limits = Limits(**{item.name: options[item.name] for item in fields(Limits)})
        asyncio.run(run(options["dir"].absolute(), options["substrate"], limits))
    except (SandboxError, RecipeError, ValueError) as problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    return 0
