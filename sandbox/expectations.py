"""What the conformance checks are written with."""

from __future__ import annotations

from collections.abc import Awaitable

from posttrain.protocols import Sandbox
from posttrain.types import ExecResult


def expect(claim: bool, *seen: object) -> None:
    """Raise ``AssertionError`` showing what was seen instead."""
    if not claim:
        raise AssertionError(*seen)


async def raises(kind: type[Exception], attempt: Awaitable[object], what: str) -> None:
    """Raise ``AssertionError`` unless the attempt raises this kind of exception."""
    try:
        await attempt
    except kind:
        return
    raise AssertionError(f"{what!r}: expected {kind.__name__}")


async def python(box: Sandbox, program: str, timeout_s: float = 10.0) -> ExecResult:
    return await box.exec(["python3", "-I", "-S", "-c", program], timeout_s=timeout_s)


async def still_works(box: Sandbox) -> None:
    result = await box.exec(["echo", "alive"])
    expect(result.ok and result.stdout == b"alive\n", result)


async def nothing_runs(box: Sandbox) -> None:
    """No process of an earlier command is left, whatever the box runs for itself as root."""
    count = r"cat /proc/[0-9]*/status | grep -c '^Uid:\s[0-9][0-9]*\s[1-9]'"
    alone = int((await box.exec(count)).stdout)
    # The shell and the two ends of the pipe.
    expect(alone <= 3, f"{alone} processes of the payload in the box")
