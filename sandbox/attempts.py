"""How the conformance checks attack a box: programs that try many things and report each of them apart."""

from __future__ import annotations

from collections.abc import Iterable

from posttrain.protocols import Sandbox
from sandbox.expectations import expect

PRELUDE = """
import ctypes, errno, fcntl, os, resource, select, signal, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"

def attempt(name, action):
    try:
        outcome = action()
    except OSError as error:
        print(name, "refused", errno.errorcode.get(error.errno, error), flush=True)
    except (ValueError, OverflowError) as error:
        print(name, "refused", error, flush=True)
    else:
        print(name, "REACHED", repr(outcome)[:80], flush=True)

def attempt_failed():
    raise OSError(errno.ENODATA, "nothing there")

def syscall(x86, arm, *arguments):
    number = x86 if X86 else arm
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def read(path):
    with open(path, "rb") as file:
        return file.read(64)

def write(path, data=b"1"):
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, data)
"""
"""Each ``attempt`` is one line of output. An action that fails to attack must raise ``OSError``."""


async def reached(box: Sandbox, program: str, *arguments: str, timeout_s: float = 10.0) -> dict[str, str]:
    """The attempts of a program that succeeded, by name. Fails unless the program ran to its end."""
    source = PRELUDE + program + "\nprint('tried', 'everything')"
    result = await box.exec(["python3", "-I", "-S", "-c", source, *arguments], timeout_s=timeout_s)
    lines = result.stdout.decode("utf-8", "replace").splitlines()
    expect(result.ok and lines[-1] == "tried everything" and len(lines) > 1, result)
    outcomes = [line.split(" ", 2) for line in lines[:-1]]
    return {name: detail for name, outcome, detail in outcomes if outcome == "REACHED"}


async def nothing_is_reached(box: Sandbox, program: str, *arguments: str, but: Iterable[str] = ()) -> None:
    """Every attempt of a program is refused, except those named in ``but``."""
    successes = await reached(box, program, *arguments)
    expect(not set(successes) - set(but), successes)
