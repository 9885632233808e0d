"""Names for the process a box belongs to, so that what a dead one left behind can be told from what is in use.

Whatever of a box lies on the host outside it (a control group, a folder, a container) has its owner in its name.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

PREFIX = "posttrain"
TAG = "POSTTRAIN_OWNER_TAG"
"""The environment variable that tells one job's boxes from another's, should somebody want to."""
_NAME = re.compile(rf"{PREFIX}-[a-z]+-([\w.-]+:\d+:\d+:\w*)-")


def own() -> str:
    """This process: host, pid and start time, which tells it apart from a later one with the same pid, and its tag."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}:{tag()}"


def tag() -> str:
    """What the environment calls the job of this process; empty for nothing. ``ValueError`` for more than a word."""
    found = os.environ.get(TAG, "")
    if not re.fullmatch(r"\w*", found):
        raise ValueError(f"{TAG} = {found!r}: expected letters, digits and underscores only")
    return found


def name(kind: str) -> str:
    """How a name of a thing of this process begins; whatever makes it unique comes after it."""
    return f"{PREFIX}-{kind}-{own()}-"


def owner_in(text: str) -> str | None:
    """The owner that a name, a path or a command line mentions."""
    found = _NAME.search(text)
    return found and found[1]


def is_dead(owner: str) -> bool:
    """Whether the owner was a process of this host and is gone. No name of ours is nobody's to bury."""
    found = re.fullmatch(r"([\w.-]+):(\d+):(\d+):\w*", owner)
    return found is not None and found[1] == socket.gethostname() and _started(int(found[2])) != found[3]


def is_alive(pid: int) -> bool:
    """Whether there is such a process. One that has ended and waits to be reaped is none."""
    return _started(pid) != "dead"


def _started(pid: int) -> str:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "dead"
    # A first thread that has ended is a zombie while others of the process are still at it.
    return "dead" if fields[0] == "Z" and int(fields[17]) <= 1 else fields[19]
