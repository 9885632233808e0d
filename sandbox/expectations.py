"""What the conformance checks are written with."""

from __future__ import annotations

import json
from collections.abc import Awaitable

from posttrain.protocols import Sandbox
from posttrain.types import ExecResult

RIGHTS = """
import ctypes, json, os
libc = ctypes.CDLL(None)
sets = (ctypes.c_uint32 * 6)()
libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), sets)
print(json.dumps({
    "uids": os.getresuid(), "gids": os.getresgid(), "groups": os.getgroups(),
    "effective": sets[0] | sets[3], "permitted": sets[1] | sets[4],
    "no_new_privs": libc.prctl(39, 0, 0, 0, 0), "seccomp": libc.prctl(21, 0, 0, 0, 0),
}))
"""
"""A program that prints what the process may do, asked of the kernel itself: gVisor's /proc says less than Linux's."""


def expect(claim: bool, *seen: object) -> None:
    """Raise ``AssertionError`` showing what was seen instead."""
    if not claim:
        raise AssertionError(*seen)


async def raises(kind: type[Exception] | tuple[type[Exception], ...], attempt: Awaitable[object], what: str) -> None:
    """Raise ``AssertionError`` unless the attempt raises this kind of exception."""
    try:
        await attempt
    except kind:
        return
    raise AssertionError(f"{what!r}: expected {kind}")


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


def has_no_rights(rights: ExecResult) -> None:
    """What ``RIGHTS`` printed is a payload's: one uid and gid, neither 0, no capabilities, and no way to new ones."""
    seen = json.loads(rights.stdout)
    expect(len(set(seen["uids"])) == len(set(seen["gids"])) == 1, rights)
    expect(0 not in (*seen["uids"], *seen["gids"], *seen["groups"]), rights)
    expect(seen["effective"] == seen["permitted"] == 0, rights)
    expect((seen["no_new_privs"], seen["seccomp"]) == (1, 2), rights)
