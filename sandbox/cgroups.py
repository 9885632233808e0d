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

from posttrain.errors import SandboxError, SandboxUnavailable
from sandbox import owners

MOUNT = Path("/sys/fs/cgroup")
KIND = "box"
"""What its groups are called in ``sandbox.owners``."""
CONTROLLERS = ("memory", "pids", "cpu")
FREEZER = "freezer"
"""A controller of its own on version 1; every group of version 2 can be frozen."""
FREEZE_FILE = {1: ("freezer.state", "FROZEN", "THAWED"), 2: ("cgroup.freeze", "1", "0")}
"""By version: the file, and what to write to freeze and to thaw."""
CPU_PERIOD_US = 100_000
KILL_DEADLINE_S = 5.0
FREEZE_DEADLINE_S = 5.0
ATTEMPTS_AT_ONCE = 10
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
    freezer: Path | None = None
    """None where the box cannot be frozen."""

    @property
    def paths(self) -> list[Path]:
        found = (self.memory, self.pids, self.cpu, *([self.freezer] if self.freezer else []))
        return list(dict.fromkeys(found))

    def add(self, pid: int) -> None:
        """Put a process in. What it forks later follows by itself."""
        for path in self.paths:
            (path / "cgroup.procs").write_text(str(pid))

    def hits(self) -> Hits:
        """Counters of the kernel; zero for what cannot be read any more."""
        oom_file = "memory.events" if version() == 2 else "memory.oom_control"
        return Hits(
            oom_kills=_value(_read(f"{self.memory}/{oom_file}").split(), b"oom_kill"),
            refused_forks=_value(_read(f"{self.pids}/pids.events").split(), b"max"),
        )

    def used_bytes(self) -> int:
        """Memory in use, without the cache of files, which the kernel takes back by itself."""
        usage_file = "memory.current" if version() == 2 else "memory.usage_in_bytes"
        words = _read(f"{self.memory}/memory.stat").split()
        cached = sum(_value(words, name) for name in (b"active_file", b"inactive_file"))
        return int(_read(f"{self.memory}/{usage_file}") or 0) - cached

    def freeze(self, frozen: bool) -> None:
        """Stop every process in it where it is, or let them go on. ``SandboxError`` when the kernel does not.

        On version 1 a frozen process cannot even be killed: whoever removes a box lets it go first.
        """
        assert self.freezer is not None, "callers look at freezer first"
        order, yes, no = FREEZE_FILE[version()]
        wanted = yes if frozen else no
        answer, expected = (order, wanted) if version() == 1 else ("cgroup.events", f"frozen {frozen:d}")
        deadline = time.monotonic() + FREEZE_DEADLINE_S
        try:
            for attempt in itertools.count(1):
                (self.freezer / order).write_text(wanted)
                if expected.encode() in _read(f"{self.freezer}/{answer}"):
                    return
                if time.monotonic() > deadline:
                    break
                time.sleep(0.0005)
                if attempt % ATTEMPTS_AT_ONCE == 0 and version() == 1:
                    # A traced process that was about to stop can be missed for good; from a new start it is not.
                    (self.freezer / order).write_text(no)
                    time.sleep(0.002)
        except OSError as error:
            raise SandboxError(f"{self.freezer / order} could not be written: {error.strerror}") from error
        raise SandboxError(f"{self.freezer / answer}: expected {expected!r} within {FREEZE_DEADLINE_S:.0f} s")

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
        """Delete the directories."""
        for path in self.paths:
            remove(path)


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
    name = f"{owners.name(KIND)}{next(_serial)}"
    memory_base, pids_base, cpu_base, freezer_base = bases
    group = Group(memory_base / name, pids_base / name, cpu_base / name, freezer_base and freezer_base / name)
    for path in group.paths:
        path.mkdir()
    memory, processes, quota = str(limits.memory_bytes), str(limits.max_processes), int(limits.cpus * CPU_PERIOD_US)
    if version() == 2:
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
        MOUNT / paths[""] if version() == 2 else MOUNT / controller / paths.get(controller, "")
        for controller in (*CONTROLLERS, FREEZER)
    ]
    memory, pids, cpu, freezer = folders
    if not all((folder / "cgroup.procs").exists() for folder in (memory, pids, cpu)):
        return None
    # Never the group that this process is in, too: freezing that would be for good.
    apart = paths.get(FREEZER if version() == 1 else "") != _own_path(FREEZER)
    possible = apart and os.access(freezer / FREEZE_FILE[version()][0], os.W_OK)
    return Group(memory, pids, cpu, freezer if possible else None)


def is_available() -> bool:
    """Whether this process may create groups with all three controllers."""
    return _bases() is not None


def require(substrate: str) -> None:
    """Raise ``SandboxUnavailable`` where the substrate of this name could not limit its boxes."""
    if not is_available():
        raise SandboxUnavailable(
            f"substrate {substrate!r}: it needs root and writable control groups for memory, pids and cpu; run as root "
            f"(in a container with {MOUNT} mounted for writing), or use the substrate 'process'"
        )


def can_freeze() -> bool:
    """Whether the groups that this process creates can be frozen."""
    bases = _bases()
    return bases is not None and bases[-1] is not None


def remove_orphans() -> None:
    """Delete the empty groups that owners who died left behind."""
    for base in filter(None, set(_bases() or ())):
        for path in base.glob(f"{owners.PREFIX}-{KIND}-*"):
            owner = owners.owner_in(path.name)
            if owner and owners.is_dead(owner):
                with contextlib.suppress(OSError):
                    # A box that was frozen when its owner died could not notice, nor end.
                    thaw(path)
                    path.rmdir()


def groups() -> list[Path]:
    """The directories of every box on this machine, whoever made them."""
    prefix = f"{owners.PREFIX}-{KIND}-"
    # Not pathlib's glob, which fails when a directory is removed while it looks.
    return sorted(
        Path(parent, name) for parent, names, _ in os.walk(MOUNT) for name in names if name.startswith(prefix)
    )


def remove(path: Path) -> None:
    """Delete a directory. The kernel refuses while a killed process is not quite gone yet."""
    for _ in range(100):
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            with contextlib.suppress(OSError):
                thaw(path)
            time.sleep(0.002)
        else:
            return


def thaw(path: Path) -> None:
    """Let what is frozen in this directory go on, if anything is."""
    name, _, no = FREEZE_FILE[version()]
    if (path / name).exists():
        (path / name).write_text(no)


@functools.cache
def version() -> int:
    """Of the control groups here: 1 or 2."""
    return 2 if (MOUNT / "cgroup.controllers").exists() else 1


@functools.cache
def _bases() -> tuple[Path, Path, Path, Path | None] | None:
    """Where groups are made: the parent directory for memory, pids, cpu and freezing; None when that is not allowed."""
    if os.geteuid() != 0:
        return None
    try:
        if version() == 2:
            base = MOUNT / owners.PREFIX
            base.mkdir(exist_ok=True)
            for folder in (MOUNT, base):
                (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in CONTROLLERS))
            return base, base, base, base
        memory, pids, cpu = (_own_directory(controller) for controller in CONTROLLERS)
    except OSError:
        return None
    if not all((base / "cgroup.procs").exists() and os.access(base, os.W_OK) for base in (memory, pids, cpu)):
        return None
    freezer = _own_directory(FREEZER)
    return memory, pids, cpu, freezer if (freezer / "cgroup.procs").exists() and os.access(freezer, os.W_OK) else None


def _own_directory(controller: str) -> Path:
    """This process's own group, so that limits set on it from outside hold for its boxes too."""
    own = MOUNT / controller / (_own_path(controller) or "")
    return own if own.exists() else MOUNT / controller


def _own_path(controller: str) -> str | None:
    controller = controller if version() == 1 else ""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path.lstrip("/")
    return None
