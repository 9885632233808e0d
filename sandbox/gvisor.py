"""Boxes with a kernel of their own in user space: gVisor's ``runsc``, which needs no virtualisation.

The payload's system calls reach gVisor's sentry, not the host's kernel; that costs about 170 ms to open a box and 20 ms
a command, so ``Gvisor(warm=8)`` keeps eight boxes ready for each kind that has been asked for.

The sentry has no OOM killer. A control group of the host around the whole box bounds memory and CPU; short of that
bound this process ends the box's commands, which keeps the box itself alive. What the sentry needs for them counts as
theirs: about 3 MiB for a forked Python, 2 KiB for a file. Processes are bounded per command, by a resource limit.

What it does not give: the whole of Linux. Debian 12's release (20221219) rejects a flag that coreutils' ``ls`` and
``stat`` pass, so that both fail on any path they are given ("Invalid argument"); ``find``, globs and Python work. Its
terminals take Ctrl-C as a character like any other, and nothing tells from outside which group runs in the foreground.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.errors import SandboxError, SandboxLost, SandboxUnavailable
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox import cgroups, owners, pool, seccomp
from sandbox.client import AGENT_ARGV, AGENT_MEMORY_MB, MAX_USERS, SLOTS, TMP_MB, AgentSandbox, Channel, command_limits
from sandbox.images import build

MIB = 1 << 20
PAYLOAD_UID = 1000
"""The same in every box: uids here are the sentry's, not the host's."""
SENTRY_MEMORY_MB = 32
"""What ``runsc`` and its two children take for themselves: 15 at rest, more with many processes."""
HEADROOM_MB = 128
"""Between the size at which commands are ended and the size at which the kernel kills the box."""
WATCH_EVERY_S = 0.02
RETURN_DEADLINE_S = 5.0
HOST_TASKS = 256
HOST_TASKS_PER_PROCESS = 16
"""How many threads and processes of the host a box takes: what bounds the payload is a limit within the box."""
KIND, STDERR = "gvisor", "stderr"
INSTALL = "install runsc (Debian: apt-get install runsc; else https://gvisor.dev/docs/user_guide/install)"


@dataclass(frozen=True, slots=True)
class Gvisor:
    """One sentry per box. Needs Linux, root, control groups, ``runsc`` and an image."""

    binary: str = "runsc"
    platform: str = "ptrace"
    """How the sentry catches system calls; ``ptrace`` works everywhere, newer releases also know ``systrap``."""
    warm: int = 0
    name: str = "gvisor"

    def capabilities(self) -> Mapping[str, Any]:
        """``seccomp`` filters calls to the box's ``own_kernel``; the host's sees none. Ctrl-C is no signal there."""
        image = build.find("default")
        return {
            "isolation": "kernel",
            "network": "none; allow-list by proxy",
            "limits": "cgroup, max_processes per command",
            "memory": "memory_mb plus disk_mb, since files live in memory",
            "seccomp": seccomp.is_supported(),
            "own_kernel": True,
            "terminal_signals": False,
            "release": _release(self.binary),
            "image": image.digest if image else None,
            "survives_host_restart": False,
            "survives_edge_restart": False,
            "users": MAX_USERS,
            "snapshot": "fs",
            "pause": cgroups.can_freeze(),
        }

    def check(self) -> None:
        """Raise ``SandboxUnavailable`` unless a box can be opened here."""
        if shutil.which(self.binary) is None:
            raise SandboxUnavailable(f"substrate 'gvisor': {self.binary} is missing; {INSTALL}")
        cgroups.require(self.name)
        build.require("default")
        problem = _trial(self.binary, self.platform)
        if problem:
            raise SandboxUnavailable(
                f"substrate 'gvisor': {self.binary} cannot run here ({problem}); it needs ptrace and namespaces, which "
                "a container has with --cap-add SYS_ADMIN --cap-add SYS_PTRACE and --security-opt seccomp=unconfined"
            )

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[AgentSandbox]:
        """A fresh box; leaving the context kills everything in it and removes it."""
        return pool.opened(self, spec, start=functools.partial(start, self), stop=stop)


@functools.cache
def _release(binary: str) -> str | None:
    """What ``runsc`` calls its version; None when there is none to ask."""
    try:
        done = subprocess.run([binary, "--version"], capture_output=True, timeout=20, check=False, text=True)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].removeprefix("runsc version ") or None


@functools.cache
def _trial(binary: str, platform: str) -> str:
    """Why ``runsc`` fails here; empty when it works."""
    with tempfile.TemporaryDirectory(prefix=owners.name(KIND)) as folder:
        argv = [*_runsc(binary, platform, Path(folder)), "do", "/bin/true"]
        try:
            # Without a terminal, since it would put this process into its background.
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    output = (done.stderr or done.stdout).decode("utf-8", "replace").strip()
    return "" if done.returncode == 0 else output[-500:] or f"exit {done.returncode}"


class GvisorSandbox(AgentSandbox):
    """A box whose memory is watched while commands run."""

    folder: Path
    group: cgroups.Group
    ended_full: set[str]
    """Names of the commands that were ended since memory had run out."""

    async def exec(self, command: str | Sequence[str], **options: Any) -> ExecResult:
        """As in every box. A command that was running when memory ran out is OOM, whichever took it."""
        await self._memory_is_back()
        kills_before = self.group.hits().oom_kills
        watch = asyncio.create_task(self._end_commands_when_full())
        try:
            result = await super().exec(command, **options)
        except SandboxLost:
            # It outran the watch, and the kernel killed the box: lost, but by the command's own doing.
            if self.group.hits().oom_kills == kills_before:
                raise
            return ExecResult(status=ExecStatus.OOM, exit_code=None)
        finally:
            watch.cancel()
        # Nobody else cancels a command whose result is still waited for.
        if result.status is not ExecStatus.CANCELLED:
            return result
        self.ended_full.add(options.get("op_id", ""))
        return replace(result, status=ExecStatus.OOM)

    async def result_of(self, op_id: str) -> Any:
        result = await super().result_of(op_id)
        return replace(result, status=ExecStatus.OOM) if op_id in self.ended_full else result

    async def acknowledge(self, op_id: str) -> None:
        self.ended_full.discard(op_id)
        await super().acknowledge(op_id)

    async def _end_commands_when_full(self) -> None:
        with contextlib.suppress(SandboxLost):
            while True:
                await asyncio.sleep(WATCH_EVERY_S)
                if self._is_full():
                    await self.end_commands()

    async def _memory_is_back(self) -> None:
        """Wait until the sentry has returned what dead processes held, so that no command ends for an earlier one."""
        deadline = time.monotonic() + RETURN_DEADLINE_S
        while self._is_full() and time.monotonic() < deadline:
            await asyncio.sleep(WATCH_EVERY_S)

    def _is_full(self) -> bool:
        return self.group.used_bytes() > _memory_bytes(self.spec)


async def start(substrate: Gvisor, spec: SandboxSpec) -> AgentSandbox:
    """A running box with its agent answering; ``stop`` removes it."""
    _remove_orphans_once()
    config = json.dumps(_config(spec))
    ours, theirs = socket.socketpair()
    with theirs, contextlib.ExitStack() as undo:
        channel = await Channel.over(ours)
        undo.callback(channel.close)
        removal = undo.enter_context(contextlib.ExitStack())
        folder = Path(tempfile.mkdtemp(prefix=owners.name(KIND)))
        removal.callback(shutil.rmtree, folder, ignore_errors=True)
        (folder / "config.json").write_text(config)
        group = cgroups.create(_host_limits(spec))
        removal.callback(group.remove)
        jail = _launch(substrate, folder, group, theirs)
        removal.callback(_end, jail, group)
        theirs.close()
        freeze = group.freeze if group.freezer else None
        box = GvisorSandbox(channel, spec, hits=None, kill=removal.close, freeze=freeze)
        box.folder, box.group, box.ended_full = folder, group, set()
        undo.callback(box.close)
        try:
            limits = {**command_limits(spec), resource.RLIMIT_NPROC: spec.max_processes}
            await box.start(uid=PAYLOAD_UID, limits=limits)
        except SandboxLost as error:
            message = (folder / STDERR).read_text("utf-8", "replace").strip()
            raise SandboxError(f"{substrate.binary} could not make a box: {message[-2000:] or error}") from error
        undo.pop_all()
    return box


async def stop(box: AgentSandbox) -> None:
    """Kill and remove a box."""
    box.close()
    await asyncio.to_thread(box.kill)


def _launch(substrate: Gvisor, folder: Path, group: cgroups.Group, channel: socket.socket) -> subprocess.Popen[bytes]:
    # A shell enters the groups and becomes runsc, so that nothing of the box is ever outside them.
    enter = "".join(f"echo $$ > {shlex.quote(str(path))}/cgroup.procs; " for path in group.paths)
    runsc = [*_runsc(substrate.binary, substrate.platform, folder), "run", "--bundle", str(folder), _id(folder)]
    # The agent has this file open, and gVisor's /proc shows it to the payload.
    (folder / STDERR).touch(mode=0o600)
    with (folder / STDERR).open("wb") as stderr:
        return subprocess.Popen(
            ["/bin/sh", "-ec", enter + 'exec "$@"', "sh", *runsc],
            stdin=channel.fileno(),
            stdout=channel.fileno(),
            stderr=stderr,
            env={"PATH": os.environ.get("PATH", os.defpath)},
            start_new_session=True,
        )


def _runsc(binary: str, platform: str, folder: Path) -> list[str]:
    options = ("--network=none", "--ignore-cgroups", "--oci-seccomp")
    return [binary, f"--root={folder}/state", f"--platform={platform}", *options]


def _id(folder: Path) -> str:
    """The container's name: unique on this host, since runsc makes an abstract socket of it."""
    return f"{owners.PREFIX}-{folder.name.rpartition('-')[2]}"


def _config(spec: SandboxSpec) -> dict[str, Any]:
    """The box as an OCI runtime configuration."""
    capabilities = ["CAP_SETUID", "CAP_SETGID", "CAP_KILL"]
    areas = ((spec.workdir, spec.disk_mb, "0777"), ("/tmp", TMP_MB, "1777"), ("/dev/shm", 1, "1777"))
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(AGENT_ARGV),
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        },
        "root": {"path": str(build.unpacked(build.require(spec.image))), "readonly": True},
        "hostname": "sandbox",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            *(
                {
                    "destination": path,
                    "type": "tmpfs",
                    "source": "tmpfs",
                    "options": ["rw", "nosuid", "nodev", f"mode={mode}", f"size={size_mb * MIB}"],
                }
                for path, size_mb, mode in areas
            ),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
            "seccomp": seccomp.gvisor_profile(),
        },
    }


def _memory_bytes(spec: SandboxSpec) -> int:
    """The size of the whole box at which its commands are ended."""
    return (spec.memory_mb + spec.disk_mb + TMP_MB + AGENT_MEMORY_MB + SENTRY_MEMORY_MB) * MIB


def _host_limits(spec: SandboxSpec) -> cgroups.Limits:
    tasks = HOST_TASKS + HOST_TASKS_PER_PROCESS * SLOTS * spec.max_processes
    return cgroups.Limits(_memory_bytes(spec) + HEADROOM_MB * MIB, tasks, spec.cpus)


def _end(jail: subprocess.Popen[bytes], group: cgroups.Group) -> None:
    group.kill()
    jail.kill()
    jail.wait()


def remove_orphans() -> None:
    """Remove what owners who died left behind: a sentry that did not notice, folders and groups."""
    for folder in Path(tempfile.gettempdir()).glob(f"{owners.PREFIX}-{KIND}-*"):
        owner = owners.owner_in(folder.name)
        if owner and owners.is_dead(owner):
            for pid in mentioning(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)
    cgroups.remove_orphans()


def mentioning(folder: Path) -> list[int]:
    """The processes of the box in this folder: runsc and its two children have it in their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.fsencode(folder) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


_remove_orphans_once = functools.cache(remove_orphans)
