"""Names for the process a box belongs to, so that what a dead one left behind can be told from what is in use."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def own() -> str:
    """This process: host, pid and start time, which tells it apart from a later one with the same pid."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def is_dead(owner: str) -> bool:
    """Whether the owner was a process of this host and is gone."""
    host, pid, started = owner.rsplit(":", 2)
    return host == socket.gethostname() and _started(int(pid)) != started


def _started(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "dead"
