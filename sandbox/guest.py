"""Process 1 of a virtual machine: it waits for a host, prepares the machine for its box and becomes the agent.

The machine is saved while this program waits for its first byte, with every module loaded that the agent needs. Each
restored clone is then given what must not be the same in two of them (randomness, time, boot id) and its limits.

The channel carries the length of a JSON object (u32, big-endian), that object, and then what the agent's bootstrap
reads in any other kind of box.
"""

from __future__ import annotations

import _frozen_importlib_external
import _socket
import ctypes
import errno  # noqa: F401 (for the agent, as those marked below: imported before the machine is saved)
import fcntl
import json
import marshal
import os
import resource  # noqa: F401
import select  # noqa: F401
import stat  # noqa: F401
import struct
import sys  # noqa: F401
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

WAITING = b"R"
"""Written once, when the machine may be saved."""
GROUP = "/sys/fs/cgroup/box"
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
RNDADDENTROPY, RNDRESEEDCRNG = 0x40085203, 0x5207
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 22, 24, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522
KEPT_CAPABILITIES = (5, 6, 7)
"""KILL, SETGID, SETUID."""
MS_NOSUID, MS_NODEV, MS_BIND = 2, 4, 4096


def main() -> None:
    # The one interface there is, which every kind of box has up.
    any_socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    any_socket.close()
    os.write(1, WAITING)
    (size,) = struct.unpack("!I", receive(4))
    prepare(json.loads(receive(size)))
    magic, code, source = (receive(int.from_bytes(receive(4), "big")) for _ in range(3))
    known = magic == _frozen_importlib_external.MAGIC_NUMBER
    exec(marshal.loads(code) if known else compile(source, "agent", "exec"), {"__name__": "__main__"})


def receive(size: int) -> bytes:
    parts = []
    while size:
        data = os.read(0, size)
        if not data:
            # The host hung up. The end of process 1 is the end of the machine.
            os._exit(0)
        parts.append(data)
        size -= len(data)
    return b"".join(parts)


def prepare(setup: dict[str, Any]) -> None:
    """Make this clone one of its own, with the file systems and limits of its box."""
    seed = bytes.fromhex(setup["seed"])
    with open("/dev/urandom", "wb", buffering=0) as random:  # noqa: PTH123 (pathlib is slow to import)
        fcntl.ioctl(random, RNDADDENTROPY, struct.pack("ii", 8 * len(seed), len(seed)) + seed)
        fcntl.ioctl(random, RNDRESEEDCRNG)
    time.clock_settime(time.CLOCK_REALTIME, setup["time_s"])
    _socket.sethostname("sandbox")
    for path in ("/dev/shm", "/dev/pts"):
        os.mkdir(path)  # noqa: PTH102
    mount("devpts", "/dev/pts", "devpts", MS_NOSUID, "mode=0620,ptmxmode=0666")
    for path, size, mode in setup["areas"]:
        mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode={mode}")
    write("/dev/shm/boot_id", setup["boot_id"] + "\n")
    mount("/dev/shm/boot_id", "/proc/sys/kernel/random/boot_id", "", MS_BIND, "")
    os.unlink("/dev/shm/boot_id")  # noqa: PTH108
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV, "")
    write("/sys/fs/cgroup/cgroup.subtree_control", "+memory +pids")
    os.mkdir(GROUP)  # noqa: PTH102
    write(f"{GROUP}/memory.max", str(setup["memory_bytes"]))
    write(f"{GROUP}/pids.max", str(setup["max_processes"]))
    write(f"{GROUP}/cgroup.procs", "0")
    give_up_rights(bytes.fromhex(setup["filter"]))


def give_up_rights(system_calls: bytes) -> None:
    """Keep what the agent needs: three capabilities and the system calls that pass the filter, a program for BPF."""
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(64):
        if capability not in KEPT_CAPABILITIES:
            # Fails beyond the last one there is.
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    kept = sum(1 << capability for capability in KEPT_CAPABILITIES)
    header, sets = struct.pack("Ii", CAPABILITY_VERSION_3, 0), struct.pack("6I", kept, kept, 0, 0, 0, 0)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
    program = ctypes.create_string_buffer(system_calls)
    described = struct.pack("HP", len(system_calls) // 8, ctypes.addressof(program))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, described, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:  # noqa: PTH123
        file.write(text)


def mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), flags, options.encode())
    if libc.mount(*arguments):
        raise OSError(ctypes.get_errno(), f"mounting {target}")


libc = ctypes.CDLL(None, use_errno=True)
if __name__ == "__main__":
    main()
