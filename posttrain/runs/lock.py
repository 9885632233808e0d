"""One process per run directory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from posttrain.errors import RecipeError


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the run directory for this process; ``RecipeError`` names the process that has it.

    The kernel drops the lock with its last holder. A child forked by a killed run can outlive it and keep
    the lock, so a lock whose recorded owner is dead on this host is replaced. An owner on another host
    (a shared file system) is never judged dead from here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(directory)
    try:
        yield
    finally:
        os.close(descriptor)


def _acquire(directory: Path) -> int:
    path = directory / "run.lock"
    # The directory's own lock makes "look, judge stale, replace" one action among rivals.
    guard = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        descriptor = _try_lock(path)
        if descriptor is None and _owner_is_dead(path):
            path.unlink()
            descriptor = _try_lock(path)
        if descriptor is None:
            raise RecipeError(
                f"{directory} is in use by {_describe(_owner(path))}; wait for it, end it, or choose another directory"
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return descriptor
    finally:
        os.close(guard)


def _try_lock(path: Path) -> int | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _owner(path: Path) -> tuple[int, str] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return int(record["pid"]), str(record["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _owner_is_dead(path: Path) -> bool:
    owner = _owner(path)
    if owner is None or owner[1] != socket.gethostname():
        return False
    try:
        os.kill(owner[0], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _describe(owner: tuple[int, str] | None) -> str:
    return "another process" if owner is None else f"process {owner[0]} on {owner[1]}"
