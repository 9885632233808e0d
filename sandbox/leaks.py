"""What boxes have left on this machine: ``python -m sandbox.leaks`` lists it, ``--remove`` removes it.

Only what belongs to dead owners is left over; what a living process owns is in use. The next owner of the same kind of
box removes most of it unasked. Everything of a box that lies outside it is known by its owner's name (see
``sandbox.owners``): containers, control groups and the processes in them, temporary folders, and mounts, loop devices,
network namespaces and sockets below those folders or named so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import SandboxError
from sandbox import cgroups, container, dockerd, owners

LOOK_EVERY_S = 0.1
NETWORK_NAMESPACES = Path("/run/netns")
COMMANDS = {
    "mount": ("umount", "--lazy"),
    "loop device": ("losetup", "--detach"),
    "network namespace": ("ip", "netns", "delete"),
}
"""What removes a thing of this kind, given its name."""
ORDER = ("container", "process", "mount", "loop device", "network namespace", "control group", "folder", "socket")
"""In which one can be removed without the next being in its way."""


@dataclass(frozen=True, slots=True)
class Thing:
    """Something on this machine that a box may have left."""

    kind: str
    name: str
    owner: str | None
    """None when it is nobody's box."""
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name} {self.detail}".rstrip()


def find(is_left: Callable[[str], bool] = owners.is_dead, *, patience_s: float = 0.0) -> list[Thing]:
    """What the owners that ``is_left`` picks have on this machine.

    Looks again for ``patience_s`` while there is something, since kernel and daemon take a moment to remove a box.
    """
    deadline = time.monotonic() + patience_s
    while True:
        found = [thing for thing in things() if thing.owner and is_left(thing.owner)]
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(LOOK_EVERY_S)


def remove(found: Iterable[Thing]) -> None:
    """Remove things, killing what runs. What cannot be removed is found again by ``find``."""
    found = sorted(found, key=lambda thing: ORDER.index(thing.kind))
    for thing in found:
        if thing.kind == "control group":
            # What is frozen cannot be killed.
            cgroups.thaw(Path(thing.name))
    for thing in found:
        if thing.kind == "container":
            with contextlib.suppress(SandboxError):
                container.remove(container.connect(str(dockerd.SOCKET)), thing.name)
        elif thing.kind == "process":
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(thing.name), signal.SIGKILL)
        elif thing.kind == "control group":
            cgroups.remove(Path(thing.name))
        elif thing.kind == "folder":
            shutil.rmtree(thing.name, ignore_errors=True)
        elif thing.kind in COMMANDS:
            subprocess.run([*COMMANDS[thing.kind], thing.name], capture_output=True, timeout=20, check=False)


def things() -> Iterator[Thing]:
    """All on this machine that could be a box's, whoever owns it."""
    yield from _containers()
    for path in cgroups.groups():
        yield Thing("control group", str(path), owners.owner_in(path.name))
    for path in Path(tempfile.gettempdir()).glob(f"{owners.PREFIX}-*"):
        yield Thing("folder", str(path), owners.owner_in(path.name))
    yield from _processes()
    yield from (_named("mount", line.split()[4]) for line in _lines("/proc/self/mountinfo"))
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        yield _named("loop device", f"/dev/{backing.parent.parent.name}", *_lines(backing))
    for path in NETWORK_NAMESPACES.glob("*"):
        yield _named("network namespace", path.name)
    yield from (_named("socket", line.split()[7]) for line in _lines("/proc/net/unix")[1:] if len(line.split()) > 7)


def _named(kind: str, name: str, detail: str = "") -> Thing:
    return Thing(kind, name, owners.owner_in(f"{name} {detail}"), detail)


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text("utf-8", "replace").splitlines()
    except OSError:
        return []


def _containers() -> Iterator[Thing]:
    with contextlib.suppress(ImportError):
        if dockerd.is_running():
            for name, owner in container.owned(container.connect(str(dockerd.SOCKET))).items():
                yield Thing("container", name, owner)


def _processes() -> Iterator[Thing]:
    """By the control group, since a process can call itself what it likes."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            command = " ".join(_lines(entry / "cmdline")).replace("\0", " ")
            yield Thing("process", entry.name, owners.owner_in(" ".join(_lines(entry / "cgroup"))), command)


def main() -> int:
    """Print what dead owners have left; the exit code says whether anything is left."""
    parser = argparse.ArgumentParser(prog="python -m sandbox.leaks", description="What boxes have left here.")
    parser.add_argument("--remove", action="store_true", help="remove it")
    wanted = parser.parse_args()
    try:
        found = find()
        for thing in found:
            sys.stdout.write(f"{thing}  (of {thing.owner})\n")
        if wanted.remove:
            remove(found)
            found = find(patience_s=2.0)
    except SandboxError as problem:
        sys.stderr.write(f"{problem}\n")
        return 2
    sys.stdout.write(f"{len(found)} things of dead owners are left\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
