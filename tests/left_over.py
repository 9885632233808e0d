"""Looks for what a session of tests has left on the machine, whatever else runs there."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from sandbox import leaks, owners

PATIENCE_S = 10.0
"""Edges and daemons that were just told to end may still be at it."""
RAY = ("ray::", "/ray/", "ray.")
"""Ray's own processes end with this one, which is later than the check."""


class Witness:
    """From now on what this process and its descendants leave can be told from what others do."""

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder}/"
        """Where the tests write."""
        self._tag = uuid.uuid4().hex[:12]
        os.environ[owners.TAG] = self._tag

    def left_over(self) -> list[str]:
        """One line for each thing; waits a while for it to go away."""
        deadline = time.monotonic() + PATIENCE_S
        while (
            found := [str(thing) for thing in leaks.things() if self._is_ours(thing)]
        ) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _is_ours(self, thing: leaks.Thing) -> bool:
        if thing.owner and thing.owner.endswith(f":{self._tag}"):
            return True
        if thing.kind == "process":
            return self._is_stray(thing)
        return self._folder in f"{thing.name} {thing.detail}"

    def _is_stray(self, process: leaks.Thing) -> bool:
        """Whether it is one of ours that has lost its parent, or runs in namespaces of its own."""
        if any(word in process.detail for word in RAY) or not process.detail:
            return False
        if int(process.name) in _ancestors(os.getpid()):
            return False
        if os.getpid() in _ancestors(int(process.name)):
            return _namespaces(int(process.name)) != _namespaces(os.getpid())
        return self._folder in process.detail or self._tag in _environment(int(process.name))


def _ancestors(pid: int) -> list[int]:
    """The process itself, its parent, and so on."""
    found = []
    while pid:
        found.append(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return found


def _namespaces(pid: int) -> list[str]:
    try:
        return [str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in ("pid", "mnt", "net", "user")]
    except OSError:
        return []


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text("utf-8", "replace")
    except OSError:
        return ""
