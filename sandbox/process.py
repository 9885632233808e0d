"""Boxes made of Linux namespaces with bubblewrap: no daemon, no image needed, about 20 ms each.

What it does not give: a kernel of the box's own, or a limit on disk bandwidth. Boxes bind the same files of an image,
so that one notices locks (flock) and watches of another on them; an overlay for each would cost more than the rest of a
box. Without root there are no control groups either, and memory is bounded per process only; ``capabilities()`` says
which of the two holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import pwd
import random
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.errors import SandboxError, SandboxUnavailable
from posttrain.types import SandboxSpec
from sandbox import cgroups, seccomp
from sandbox.client import (
    AGENT_ARGV,
    AGENT_MEMORY_MB,
    IDS,
    MAX_USERS,
    START_DEADLINE_S,
    TMP_MB,
    AgentSandbox,
    Channel,
    bare,
    command_limits,
    prepare,
)
from sandbox.images import build

MIB = 1 << 20
PAYLOAD_UID = 1000
HOST_UIDS = (1 << 30, 1 << 31)
"""Where a box's payload uids are drawn from on the host, so that no two boxes share one (as root)."""
ROOT_ENTRIES = ("usr", "bin", "sbin", "lib", "lib64", "etc")
HOST_ETC = ("ld.so.cache", "alternatives", "localtime")
INSTALL = "install bubblewrap and python3 (Debian: apt-get install bubblewrap python3)"


@dataclass(frozen=True, slots=True)
class Process:
    """One set of namespaces per box. Needs Linux and bubblewrap; as root it also sets control-group limits."""

    binary: str = "bwrap"
    name: str = "process"

    def capabilities(self) -> Mapping[str, Any]:
        """``image`` is "host" when no image has been built and the host's /usr is bound read-only instead."""
        image = build.find("default")
        return {
            "isolation": "namespaces",
            "network": "none; allow-list by proxy",
            "limits": "cgroup" if cgroups.is_available() else "rlimit",
            "memory": "memory_mb plus disk_mb, since files live in memory" if cgroups.is_available() else "per process",
            "seccomp": seccomp.is_supported(),
            "image": image.digest if image else "host",
            "shared": ("flock",),
            "survives_host_restart": False,
            "survives_edge_restart": False,
            "users": MAX_USERS,
            "snapshot": "fs",
            "pause": cgroups.can_freeze(),
        }

    def check(self) -> None:
        """Raise ``SandboxUnavailable`` unless a box can be opened here."""
        if shutil.which(self.binary) is None or not Path("/usr/bin/python3").exists():
            raise SandboxUnavailable(f"substrate 'process': {self.binary} or /usr/bin/python3 is missing; {INSTALL}")
        if os.geteuid() != 0 and shutil.which("newuidmap") is None:
            raise SandboxUnavailable(
                "substrate 'process': without root it needs newuidmap and an entry in /etc/subuid and /etc/subgid "
                "(Debian: apt-get install uidmap), since the payload must run as another user than the box's agent"
            )
        problem = _trial(self.binary)
        if problem:
            raise SandboxUnavailable(
                f"substrate 'process': bubblewrap cannot make namespaces here ({problem}); allow user namespaces "
                "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns=0) or run as root"
            )

    @contextlib.asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[AgentSandbox]:
        """A fresh box; leaving the context kills everything in it and removes it."""
        group = _group(spec)
        try:
            async with _running(self.binary, spec, group) as box:
                await prepare(box)
                yield box
        finally:
            if group:
                # Not awaited: a second cancellation would leave the directories behind.
                group.remove()


@functools.cache
def _trial(binary: str) -> str:
    """Why bubblewrap fails here; empty when it works."""
    argv = [binary, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "/usr/bin/true"]
    try:
        done = subprocess.run(argv, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.decode("utf-8", "replace").strip() or ("" if done.returncode == 0 else f"exit {done.returncode}")


def _group(spec: SandboxSpec) -> cgroups.Group | None:
    if not cgroups.is_available():
        return None
    _remove_orphans()
    memory_mb = spec.memory_mb + spec.disk_mb + TMP_MB + AGENT_MEMORY_MB
    return cgroups.create(cgroups.Limits(memory_mb * MIB, spec.max_processes + 1, spec.cpus))


@functools.cache
def _remove_orphans() -> None:
    cgroups.remove_orphans()


@contextlib.asynccontextmanager
async def _running(binary: str, spec: SandboxSpec, group: cgroups.Group | None) -> AsyncIterator[AgentSandbox]:
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.callback(ours.close)
        stack.callback(theirs.close)
        info_read, info_write = _pipe(stack)
        block_read, block_write = _pipe(stack)
        argv = [binary, *_isolation(info_write.fileno(), block_read.fileno()), *_mounts(spec), "--remount-ro", "/"]
        passed = [info_write.fileno(), block_read.fileno()]
        if seccomp.is_supported():
            passed.append(_filter_descriptor(stack))
            argv += ["--seccomp", str(passed[-1])]
        jail = subprocess.Popen(
            [*argv, "--", *AGENT_ARGV],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
            pass_fds=passed,
            env={},
        )
        stack.callback(_reap, jail)
        info_write.close()
        theirs.close()
        init = await _child_pid(info_read, jail)
        init_fd = os.pidfd_open(init)
        stack.callback(os.close, init_fd)
        stack.callback(_kill, init_fd)
        if group:
            group.add(init)
        _map_ids(init)
        block_write.write(b"go")
        channel = await Channel.over(ours)
        box = AgentSandbox(
            channel,
            spec,
            hits=group.hits if group else None,
            kill=lambda: _kill(init_fd),
            freeze=group.freeze if group and group.freezer else None,
        )
        try:
            await box.start(uid=PAYLOAD_UID, limits=_rlimits(spec, group))
            yield box
        finally:
            box.close()


def _pipe(stack: contextlib.ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """Both ends as file objects, since closing those twice is harmless."""
    read_end, write_end = os.pipe()
    return (
        stack.enter_context(os.fdopen(read_end, "rb", buffering=0)),
        stack.enter_context(os.fdopen(write_end, "wb", buffering=0)),
    )


def _kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _reap(jail: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a killed box; bubblewrap sees process 1 gone only when everything beside it is gone too."""
    try:
        jail.wait(timeout=2)
    except subprocess.TimeoutExpired:
        jail.kill()
        jail.wait(timeout=2)
    finally:
        assert jail.stderr is not None
        jail.stderr.close()


def _filter_descriptor(stack: contextlib.ExitStack) -> int:
    file = stack.enter_context(os.fdopen(os.memfd_create("seccomp"), "w+b", buffering=0))
    file.write(_filter())
    file.seek(0)
    return file.fileno()


_filter = functools.cache(seccomp.bpf)


def _isolation(info_fd: int, block_fd: int) -> list[str]:
    argv = ["--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"]
    argv += ["--hostname", "sandbox", "--as-pid-1", "--die-with-parent", "--new-session", "--clearenv"]
    # The user namespace is mapped from outside: bubblewrap itself can map one uid, and the box needs several.
    argv += ["--info-fd", str(info_fd), "--userns-block-fd", str(block_fd), "--cap-drop", "ALL"]
    for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_KILL"):
        argv += ["--cap-add", capability]
    return argv


def _mounts(spec: SandboxSpec) -> list[str]:
    base = bare(spec).image
    image = build.find(base)
    if image is None and base != "default":
        raise SandboxError(f"SandboxSpec.image = {spec.image!r}: no image {base!r} in {build.cache()}; build it first")
    argv: list[str] = []
    root = build.unpacked(image) if image else Path("/")
    for entry in ROOT_ENTRIES:
        path = root / entry
        if path.is_symlink():
            argv += ["--symlink", str(path.readlink()), f"/{entry}"]
        elif entry == "etc" and image is None:
            for name in HOST_ETC:
                argv += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
        elif path.is_dir():
            argv += ["--ro-bind", str(path), f"/{entry}"]
    argv += ["--proc", "/proc", "--dev", "/dev"]
    for path_in_box, size_mb, mode in (
        (spec.workdir, spec.disk_mb, "0777"),
        ("/tmp", TMP_MB, "1777"),
        ("/dev/shm", 1, "1777"),
    ):
        argv += ["--perms", mode, "--size", str(size_mb * MIB), "--tmpfs", path_in_box]
    return argv


def _rlimits(spec: SandboxSpec, group: cgroups.Group | None) -> dict[int, int]:
    limits = command_limits(spec)
    if group is None:
        limits[resource.RLIMIT_NPROC] = spec.max_processes
        limits[resource.RLIMIT_AS] = spec.memory_mb * MIB
    return limits


async def _child_pid(info: BinaryIO, jail: subprocess.Popen[bytes]) -> int:
    """The host's pid of the box's process 1, from the JSON object bubblewrap writes."""
    text = b""
    while not text.rstrip().endswith(b"}"):
        data = await _read_soon(info)
        if not data:
            assert jail.stderr is not None
            message = (await asyncio.to_thread(jail.stderr.read)).decode("utf-8", "replace").strip()
            raise SandboxError(f"bubblewrap could not make a box: {message}")
        text += data
    return int(json.loads(text)["child-pid"])


async def _read_soon(file: BinaryIO) -> bytes:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(file, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), START_DEADLINE_S)
    except TimeoutError as error:
        raise SandboxError(f"bubblewrap said nothing for {START_DEADLINE_S:.0f} s") from error
    finally:
        loop.remove_reader(file)
    return file.read(4096)


def _map_ids(pid: int) -> None:
    """Give the box's user namespace two kinds of uid: 0 for the agent, and the payload's."""
    if os.geteuid() == 0:
        host = random.SystemRandom().randrange(HOST_UIDS[0], HOST_UIDS[1], IDS)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{PAYLOAD_UID} {host} {IDS}\n")
        return
    for tool, registry, own in (("newuidmap", "/etc/subuid", os.geteuid()), ("newgidmap", "/etc/subgid", os.getegid())):
        first = _subordinate_ids(Path(registry))
        argv = [tool, str(pid), "0", str(own), "1", str(PAYLOAD_UID), str(first), str(IDS)]
        done = subprocess.run(argv, capture_output=True, timeout=10, check=False)
        if done.returncode != 0:
            raise SandboxUnavailable(f"{tool} failed: {done.stderr.decode('utf-8', 'replace').strip()}")


def _subordinate_ids(registry: Path) -> int:
    """The first of ``IDS`` ids, drawn at random from what the registry grants this user."""
    names = {str(os.geteuid()), pwd.getpwuid(os.geteuid()).pw_name}
    for line in registry.read_text().splitlines() if registry.exists() else []:
        name, first, count = line.split(":")
        if name in names and int(count) >= IDS:
            return random.SystemRandom().randrange(int(first), int(first) + int(count) - IDS + 1)
    raise SandboxUnavailable(
        f"{registry} grants this user no {IDS} ids; add one with usermod --add-subuids/--add-subgids"
    )
