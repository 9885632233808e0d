"""Control groups of one box: memory, processes and CPU, on version 1 (a tree per controller) or version 2."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
PREFIX = "posttrain"
CONTROLLERS = ("memory", "pids", "cpu")
CPU_PERIOD_US = 100_000
KILL_DEADLINE_S = 5.0
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a box may use. ``memory_bytes`` counts the files in its tmpfs too."""

    memory_bytes: int
    max_processes: int
    cpus: float


@dataclass(frozen=True, slots=True)
class Hits:
    """How often a box has run into its limits so far."""

    oom_kills: int
    refused_forks: int


@dataclass(frozen=True, slots=True)
class Group:
    """The directories of one box, one per controller (all the same on version 2)."""

    memory: Path
    pids: Path
    cpu: Path

    @property
    def paths(self) -> list[Path]:
        return list(dict.fromkeys((self.memory, self.pids, self.cpu)))

    def add(self, pid: int) -> None:
        """Put a process in. What it forks later follows by itself."""
        for path in self.paths:
            (path / "cgroup.procs").write_text(str(pid))

    def hits(self) -> Hits:
        """Counters of the kernel; zero for what cannot be read any more."""
        oom_file = "memory.events" if _is_version_2() else "memory.oom_control"
        return Hits(
            oom_kills=_value(_read(f"{self.memory}/{oom_file}").split(), b"oom_kill"),
            refused_forks=_value(_read(f"{self.pids}/pids.events").split(), b"max"),
        )

    def used_bytes(self) -> int:
        """Memory in use, without the cache of files, which the kernel takes back by itself."""
        usage_file = "memory.current" if _is_version_2() else "memory.usage_in_bytes"
        words = _read(f"{self.memory}/memory.stat").split()
        cached = sum(_value(words, name) for name in (b"active_file", b"inactive_file"))
        return int(_read(f"{self.memory}/{usage_file}") or 0) - cached

    def kill(self) -> None:
        """SIGKILL every process in it, until none is left (or the kernel has held one for seconds)."""
        deadline = time.monotonic() + KILL_DEADLINE_S
        while (pids := self._pids()) and time.monotonic() < deadline:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)

    def _pids(self) -> list[int]:
        try:
            text = (self.pids / "cgroup.procs").read_text()
        except OSError:
            return []
        # A process of another namespace reads as 0, and signalling that would hit ourselves.
        return [pid for pid in map(int, text.split()) if pid > 0]

    def remove(self) -> None:
        """Delete the directories. The kernel refuses while a killed process is not quite gone yet."""
        for path in self.paths:
            for _ in range(100):
                with contextlib.suppress(FileNotFoundError):
                    try:
                        path.rmdir()
                    except OSError:
                        time.sleep(0.002)
                        continue
                break


def _read(path: str) -> bytes:
    # Read often, so by descriptor: pathlib's text reading costs ten times as much.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(fd, 4096)
    except OSError:
        return b""
    finally:
        os.close(fd)


def _value(words: list[bytes], name: bytes) -> int:
    return int(words[words.index(name) + 1]) if name in words else 0


def create(limits: Limits) -> Group:
    """A new group with these limits, beneath the one this process is in."""
    bases = _bases()
    assert bases is not None, "callers ask is_available() first"
    name = f"{PREFIX}-{os.getpid()}-{next(_serial)}"
    group = Group(*(base / name for base in bases))
    for path in group.paths:
        path.mkdir()
    memory, processes, quota = str(limits.memory_bytes), str(limits.max_processes), int(limits.cpus * CPU_PERIOD_US)
    if _is_version_2():
        values = {group.memory / "memory.max": memory, group.cpu / "cpu.max": f"{quota} {CPU_PERIOD_US}"}
        swap, no_swap = group.memory / "memory.swap.max", "0"
    else:
        values = {
            group.memory / "memory.limit_in_bytes": memory,
            group.cpu / "cpu.cfs_period_us": str(CPU_PERIOD_US),
            group.cpu / "cpu.cfs_quota_us": str(quota),
        }
        swap, no_swap = group.memory / "memory.memsw.limit_in_bytes", memory
    values[group.pids / "pids.max"] = processes
    for path, value in values.items():
        path.write_text(value)
    if swap.exists():
        swap.write_text(no_swap)
    return group


def of(pid: int) -> Group | None:
    """The groups a process is in, for their counters; None when they cannot be read from here."""
    try:
        lines = [line.split(":", 2) for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines()]
    except OSError:
        return None
    paths = {name: path.lstrip("/") for _, names, path in lines for name in names.split(",")}
    folders = [
        MOUNT / paths[""] if _is_version_2() else MOUNT / controller / paths.get(controller, "")
        for controller in CONTROLLERS
    ]
    return Group(*folders) if all((folder / "cgroup.procs").exists() for folder in folders) else None


def version() -> int:
    """Of the control groups here: 1 or 2."""
    return 2 if _is_version_2() else 1


def is_available() -> bool:
    """Whether this process may create groups with all three controllers."""
    return _bases() is not None


def remove_orphans() -> None:
    """Delete the empty groups that owners who died left behind."""
    for base in set(_bases() or ()):
        for path in base.glob(f"{PREFIX}-*-*"):
            owner = path.name.split("-")[1]
            if owner.isdigit() and not Path("/proc", owner).exists():
                with contextlib.suppress(OSError):
                    path.rmdir()


@functools.cache
def _is_version_2() -> bool:
    return (MOUNT / "cgroup.controllers").exists()


@functools.cache
def _bases() -> tuple[Path, Path, Path] | None:
    """Where groups are made: the parent directory for memory, pids and cpu; None when that is not allowed."""
    if os.geteuid() != 0:
        return None
    try:
        if _is_version_2():
            base = MOUNT / PREFIX
            base.mkdir(exist_ok=True)
            for folder in (MOUNT, base):
                (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in CONTROLLERS))
            return base, base, base
        memory, pids, cpu = (_own_directory(controller) for controller in CONTROLLERS)
    except OSError:
        return None
    if not all((base / "cgroup.procs").exists() and os.access(base, os.W_OK) for base in (memory, pids, cpu)):
        return None
    return memory, pids, cpu


def _own_directory(controller: str) -> Path:
    """This process's own group, so that limits set on it from outside hold for its boxes too."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = MOUNT / controller / path.lstrip("/")
            return own if own.exists() else MOUNT / controller
    return MOUNT / controller
