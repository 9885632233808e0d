"""How an edge and its clients talk: frames of JSON over a stream, in which bytes and our errors survive the journey."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError, SandboxError, SandboxLost, SandboxUnavailable, Unsupported
from sandbox.edge import EdgeBusy
from sandbox.log import Fenced, LogDamaged, decode, encode
from sandbox.operations import HandleLost
from sandbox.recorded import Diverged, Unknown
from sandbox.registry import QuotaExceeded

LENGTH = struct.Struct("!I")
MAX_FRAME = 256 << 20
KINDS: Mapping[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        SandboxError,
        SandboxLost,
        SandboxUnavailable,
        Unsupported,
        Fenced,
        Diverged,
        Unknown,
        HandleLost,
        LogDamaged,
        EdgeBusy,
        QuotaExceeded,
        RecipeError,
        ValueError,
        KeyError,
        EOFError,
        OSError,
    )
}


@contextlib.contextmanager
def shortened(path: Path) -> Iterator[str]:
    """Another name of a socket, for the kernel takes no more than 107 bytes."""
    fd = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{path.name}"
    finally:
        os.close(fd)


def pack(message: Mapping[str, Any]) -> bytes:
    """A frame. ``ValueError`` when it is larger than the other end takes."""
    body = json.dumps(encode(message), separators=(",", ":")).encode()
    if len(body) > MAX_FRAME:
        raise ValueError(f"a message of {len(body)} bytes: expected at most {MAX_FRAME}; send less at a time")
    return LENGTH.pack(len(body)) + body


async def receive(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message; None when the other end is gone."""
    try:
        (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if size > MAX_FRAME:
            raise ValueError(f"a frame of {size} bytes: expected at most {MAX_FRAME}; is this the edge's socket?")
        message: dict[str, Any] = decode(json.loads(await reader.readexactly(size)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message


def pack_error(error: BaseException) -> dict[str, Any]:
    """An exception as a value. A kind the other end may not know becomes a ``SandboxError``."""
    if isinstance(error, OSError) and error.errno is not None:
        return {"kind": "OSError", "arguments": [error.errno, error.strerror]}
    if KINDS.get(type(error).__name__) is type(error):
        arguments = error.__reduce__()[1]
        return {"kind": type(error).__name__, "arguments": list(arguments)}
    return {"kind": "SandboxError", "arguments": [f"the edge failed: {error!r}"]}


def unpack_error(packed: Mapping[str, Any]) -> Exception:
    """The exception that ``pack_error`` was given."""
    return KINDS[packed["kind"]](*packed["arguments"])
