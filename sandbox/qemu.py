"""Boxes that are whole machines: QEMU, restored from a saved state in which the agent's Python has already started.

Starting a guest takes seconds where QEMU has to translate its instructions, taking up a saved one a quarter of a
second. So one machine is started and saved for each image and size, on first use, and every box is a clone of it; what
must not be the same in two clones is set before the agent runs (``sandbox.guest``). KVM is used only where a guest has
been seen to start with it: on some hosts the device is there and does not work.

A machine has no device but a disk it shares read-only, one serial port to the agent and its memory. QEMU itself is an
unprivileged process with a filter on its system calls and a control group around it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import math
import os
import secrets
import shlex
import shutil
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from posttrain.errors import SandboxError, SandboxLost, SandboxUnavailable
from posttrain.types import SandboxSpec
from sandbox import cgroups, guest, pool, seccomp
from sandbox.client import AGENT_MEMORY_MB, MAX_USERS, TMP_MB, AgentSandbox, Channel, command_limits
from sandbox.images import build, vm

MIB = 1 << 20
PAYLOAD_UID = 1000
"""The same in every box: uids here are the guest's, not the host's."""
NOBODY = "65534"
"""Whom QEMU runs as."""
KERNEL_MEMORY_MB = 80
"""What the guest's kernel and the cache of its root file system take, beside what a box is promised."""
SIZE_STEP_MB = 64
"""Machines come in sizes that are multiples of this, so that few of them have to be saved."""
HOST_MEMORY_MB = 320
"""What QEMU takes beside the guest's memory: translated code above all."""
HOST_TASKS = 64
SETTLE_S = 0.3
"""From the guest's sign that it waits to its being idle."""
BOOT_DEADLINE_S = 120.0
PROBE_DEADLINE_S = 5.0
QMP_DEADLINE_S = 30.0
KVM = Path("/dev/kvm")
PVM = Path("/sys/module/kvm_pvm")
INSTALL = "apt-get install --no-install-recommends qemu-system-x86"


@dataclass(frozen=True, slots=True)
class MicroVM:
    """A clone of a small machine with a read-only root. Needs x86-64 Linux, root, control groups, QEMU and an image."""

    binary: str = "qemu-system-x86_64"
    warm: int = 0
    name: str = "microvm"

    @property
    def writable_root(self) -> bool:
        """Whether the root file system is a disk of the box's own."""
        return False

    def capabilities(self) -> Mapping[str, Any]:
        """``accelerator`` is ``kvm`` only where a guest has been seen to start with it."""
        image = build.find("default")
        return {
            "isolation": "vm",
            "network": "none; allow-list by proxy",
            "limits": "guest cgroup, and one of the host around the machine",
            "memory": "memory_mb plus disk_mb, since files live in memory",
            "seccomp": True,
            "own_kernel": True,
            "accelerator": accelerator(self.binary) if shutil.which(self.binary) else None,
            "root_file_system": "writable" if self.writable_root else "read-only",
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
            raise SandboxUnavailable(f"substrate {self.name!r}: {self.binary} is missing; as root: {INSTALL}")
        cgroups.require(self.name)
        build.require("default")
        vm.require_kernel()

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[AgentSandbox]:
        """A fresh box; leaving the context kills everything in it and removes it."""
        return pool.opened(self, spec, start=functools.partial(start, self), stop=stop)


@dataclass(frozen=True, slots=True)
class FullVM(MicroVM):
    """A clone of a machine with a root disk of its own, which is thrown away with it.

    The payload is not root; it may change every file of the system as a member of the group that may write to it.
    """

    name: str = "fullvm"

    @property
    def writable_root(self) -> bool:
        return True


@functools.cache
def accelerator(binary: str) -> str:
    """``kvm`` when a guest starts with it, else ``tcg``. Tried once per start of the host, in at most 5 s."""
    if not os.access(KVM, os.R_OK | os.W_OK) or PVM.exists():
        # PVM runs only guests that were built for it, and interprets all others.
        return "tcg"
    host_boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def probe(partial: Path) -> None:
        partial.write_text("kvm" if starts_with_kvm(binary) else "tcg")

    return vm.once(vm.folder() / f"accelerator-{host_boot}", probe).read_text()


def starts_with_kvm(binary: str) -> bool:
    """Whether a guest that is started with KVM reaches its process 1 within 5 s."""
    machine = Machine(binary=binary, accelerator="kvm", image=build.require("default"), memory_mb=128, cpus=1)
    with contextlib.ExitStack() as stack:
        qemu = Qemu(machine, disk=vm.disk(machine.image))
        stack.callback(qemu.kill)
        try:
            qemu.wait_for_guest(PROBE_DEADLINE_S)
        except SandboxError:
            return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What has to be equal for a saved state to fit."""

    binary: str
    accelerator: str
    image: build.Image
    memory_mb: int
    cpus: int
    writable_root: bool = False

    @property
    def saved(self) -> Path:
        """The folder of its state."""
        parts = (vm.require_kernel().digest, self.image.digest, _release(self.binary), *self.arguments())
        return vm.folder() / f"state-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"

    def arguments(self) -> list[str]:
        """The machine for QEMU, without what files and sockets it is connected to."""
        options = "quiet panic=-1 cgroup_no_v1=all mitigations=off random.trust_cpu=on console=ttyS0"
        return [
            *("-M", f"pc,accel={self.accelerator},usb=off,vmport=off", "-smp", str(self.cpus)),
            *("-cpu", "host" if self.accelerator == "kvm" else "max", "-m", str(self.memory_mb)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-append", f"{options} writable" if self.writable_root else options),
            # The guest knows the port by the order of the devices.
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent"),
            *("-device", "virtio-blk-pci,drive=root", "-serial", "chardev:console"),
        ]


@functools.cache
def _release(binary: str) -> str:
    done = subprocess.run([binary, "--version"], capture_output=True, timeout=20, check=True, text=True)
    return done.stdout.partition("\n")[0]


class Qemu:
    """A running QEMU: the agent's channel, and its monitor (QMP), with which it is stopped, saved and continued."""

    def __init__(
        self, machine: Machine, *, disk: Path, state: Path | None = None, group: cgroups.Group | None = None
    ) -> None:
        self.agent, agent_end = socket.socketpair()
        self._monitor, monitor_end = socket.socketpair()
        self._console = os.memfd_create("console")
        kernel = vm.require_kernel()
        with contextlib.ExitStack() as stack:
            for end in (agent_end, monitor_end):
                stack.callback(end.close)
            files = [stack.enter_context(path.open("rb")) for path in (kernel.image, kernel.initrd, disk)]
            argv = [machine.binary, *machine.arguments(), "-kernel", _path(files[0]), "-initrd", _path(files[1])]
            # What a clone writes goes to a nameless file that is gone when QEMU is.
            access = "readonly=on" if not machine.writable_root else "snapshot=on" if state else "readonly=off"
            argv += ["-drive", f"file={_path(files[2])},format=raw,if=none,id=root,{access}"]
            argv += ["-chardev", f"socket,id=agent,fd={agent_end.fileno()}"]
            argv += ["-chardev", f"socket,id=monitor,fd={monitor_end.fileno()}", "-mon", "chardev=monitor,mode=control"]
            argv += ["-chardev", f"file,id=console,path=/dev/fd/{self._console}"]
            argv += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
            if state:
                files.append(stack.enter_context(state.open("rb")))
                argv += ["-incoming", f"fd:{files[-1].fileno()}"]
            passed = [agent_end.fileno(), monitor_end.fileno(), self._console, *(file.fileno() for file in files)]
            self.process = subprocess.Popen(
                confined(argv, machine.accelerator, group),
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
                start_new_session=True,
            )
        self._replies = self._monitor.makefile("rb")
        self._monitor.settimeout(QMP_DEADLINE_S)

    def wait_for_guest(self, deadline_s: float) -> None:
        """Return when process 1 of a starting guest waits. ``SandboxError`` when it does not in time, or QEMU ends."""
        self.agent.settimeout(deadline_s)
        try:
            sign = self.agent.recv(1)
        except TimeoutError:
            raise SandboxError(f"the guest did not start within {deadline_s:g} s: {self.console()}") from None
        if sign != guest.WAITING:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1)
            raise SandboxError(
                f"QEMU ended before the guest started (exit code {self.process.poll()}; the reason is on stderr): "
                f"{self.console()}"
            )

    def greet(self) -> None:
        """Take up the monitor's protocol."""
        self._reply()
        self.command("qmp_capabilities")

    def command(self, name: str, arguments: Mapping[str, Any] | None = None, *, fds: Sequence[int] = ()) -> Any:
        """Have the monitor do something. ``SandboxLost`` when QEMU is gone or refuses."""
        message = json.dumps({"execute": name, "arguments": arguments or {}}).encode()
        try:
            socket.send_fds(self._monitor, [message], list(fds))
            while "return" not in (reply := self._reply()):
                if "error" in reply:
                    raise SandboxLost(f"QEMU refused {name}: {reply['error']['desc']}")
        except OSError as error:
            raise SandboxLost(f"QEMU did not answer {name}: {error!r}; its console: {self.console()}") from error
        return reply["return"]

    def save(self, state: Path) -> None:
        """Stop the guest for good and write its memory and devices to a file."""
        self.command("stop")
        self.command("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        with state.open("wb") as file:
            self.command("getfd", {"fdname": "state"}, fds=[file.fileno()])
            self.command("migrate", {"uri": "fd:state"})
            while (status := self.command("query-migrate")["status"]) != "completed":
                if status in ("failed", "cancelled"):
                    raise SandboxError(f"QEMU could not save the machine ({status})")
                time.sleep(0.01)

    def resume(self) -> None:
        """Take up the monitor of a restored machine and have the guest go on."""
        self.greet()
        deadline = time.monotonic() + QMP_DEADLINE_S
        while (status := self.command("query-status")["status"]) == "inmigrate":
            if time.monotonic() > deadline:
                raise SandboxLost(f"QEMU did not restore the machine within {QMP_DEADLINE_S:.0f} s")
            time.sleep(0.002)
        if status != "running":
            self.command("cont")

    def _reply(self) -> dict[str, Any]:
        line = self._replies.readline()
        if not line:
            raise SandboxLost(f"QEMU has ended (exit code {self.process.poll()}); its console: {self.console()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def console(self) -> str:
        """The end of what the guest has printed, for error messages; of what its kernel has, when that is all."""
        lines = os.pread(self._console, 1 << 20, 0).decode("utf-8", "replace").splitlines()
        told = [line for line in lines if not line.startswith("[")]
        return "\n".join(told or lines)[-1000:]

    def kill(self) -> None:
        """End it and close everything."""
        self.process.kill()
        self.process.wait()
        for opened in (self._replies, self._monitor, self.agent):
            opened.close()
        if self._console >= 0:
            os.close(self._console)
            self._console = -1


def _path(file: BinaryIO) -> str:
    """For a process that could not open the file itself, and need not, having been handed it."""
    return f"/dev/fd/{file.fileno()}"


def confined(argv: Sequence[str], accelerator: str, group: cgroups.Group | None = None) -> list[str]:
    """The command that enters the groups, gives up root, is tied to this process's life, and becomes QEMU.

    With KVM it stays in the Unix group of the device, which most distributions let nobody else open.
    """
    enter = "".join(f"echo $$ > {shlex.quote(str(path))}/cgroup.procs; " for path in (group.paths if group else ()))
    kept = ["--groups", str(KVM.stat().st_gid)] if accelerator == "kvm" else ["--clear-groups"]
    setpriv = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, *kept, "--no-new-privs"]
    return ["/bin/sh", "-ec", enter + 'exec "$@"', "sh", *setpriv, "--pdeathsig", "KILL", *argv]


def save(machine: Machine) -> None:
    """Start the machine and save it in the moment when it waits for its host, unless that has been done."""

    def make(partial: Path) -> None:
        partial.mkdir()
        disk = vm.disk(machine.image)
        if machine.writable_root:
            # Its own, since a guest that has it mounted for writing does write to it.
            made = vm.disk(machine.image, writable_by=PAYLOAD_UID)
            disk = Path(shutil.copy(made, partial / "disk"))
            os.chown(disk, int(NOBODY), int(NOBODY))
        with contextlib.ExitStack() as stack:
            qemu = Qemu(machine, disk=disk)
            stack.callback(qemu.kill)
            qemu.wait_for_guest(BOOT_DEADLINE_S)
            qemu.greet()
            time.sleep(SETTLE_S)
            qemu.save(partial / "memory")
        if machine.writable_root:
            disk.chmod(0o444)

    vm.once(machine.saved, make)


def machine_for(substrate: MicroVM, spec: SandboxSpec) -> Machine:
    """The smallest machine in which a box of this spec has room."""
    needed_mb = _box_memory_mb(spec) + KERNEL_MEMORY_MB
    return Machine(
        binary=substrate.binary,
        accelerator=accelerator(substrate.binary),
        image=build.require(spec.image),
        memory_mb=-(-needed_mb // SIZE_STEP_MB) * SIZE_STEP_MB,
        cpus=max(1, math.ceil(spec.cpus)),
        writable_root=substrate.writable_root,
    )


def _box_memory_mb(spec: SandboxSpec) -> int:
    return spec.memory_mb + spec.disk_mb + TMP_MB + AGENT_MEMORY_MB


async def start(substrate: MicroVM, spec: SandboxSpec) -> AgentSandbox:
    """A running box with its agent answering; ``stop`` removes it."""
    _remove_orphans_once()
    machine = await asyncio.to_thread(machine_for, substrate, spec)
    await asyncio.to_thread(save, machine)
    with contextlib.ExitStack() as undo:
        removal = undo.enter_context(contextlib.ExitStack())
        group = cgroups.create(cgroups.Limits((machine.memory_mb + HOST_MEMORY_MB) * MIB, HOST_TASKS, spec.cpus))
        removal.callback(group.remove)
        disk = machine.saved / "disk" if machine.writable_root else vm.disk(machine.image)
        # Not in a thread: QEMU is killed when the thread ends that has started it.
        qemu = Qemu(machine, disk=disk, state=machine.saved / "memory", group=group)
        removal.callback(qemu.kill)
        await asyncio.to_thread(qemu.resume)
        channel = await Channel.over(qemu.agent)
        freeze = group.freeze if group.freezer else None
        box = AgentSandbox(channel, spec, hits=None, kill=removal.close, freeze=freeze)
        undo.callback(box.close)
        setup = json.dumps(_setup(spec)).encode()
        await channel.send(struct.pack("!I", len(setup)) + setup)
        try:
            await box.start(uid=PAYLOAD_UID, limits=command_limits(spec), group=guest.GROUP)
        except SandboxLost as error:
            raise SandboxError(f"the guest did not come up ({error}); its console: {qemu.console()}") from error
        undo.pop_all()
    return box


async def stop(box: AgentSandbox) -> None:
    """Kill and remove a box."""
    box.close()
    await asyncio.to_thread(box.kill)


def _setup(spec: SandboxSpec) -> dict[str, Any]:
    """What makes a clone this box."""
    areas = ((spec.workdir, spec.disk_mb, "0777"), ("/tmp", TMP_MB, "1777"), ("/dev/shm", 1, "1777"))
    return {
        "seed": secrets.token_hex(64),
        "boot_id": str(uuid.uuid4()),
        "time_s": time.time(),
        "areas": [(path, size_mb * MIB, mode) for path, size_mb, mode in areas],
        "memory_bytes": _box_memory_mb(spec) * MIB,
        "max_processes": spec.max_processes + 1,
        "filter": seccomp.bpf().hex(),
    }


_remove_orphans_once = functools.cache(cgroups.remove_orphans)
