"""Checks that try to leave a box or to gain rights in it: namespaces, tracing, network, kernel files, odd calls."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import socket
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from posttrain.protocols import Sandbox, Substrate
from posttrain.types import ExecStatus, SandboxSpec
from sandbox.attempts import PRELUDE, nothing_is_reached, reached
from sandbox.conformance_agent import agent_box
from sandbox.expectations import RIGHTS, expect, has_no_rights, python, still_works

SPEC = SandboxSpec(memory_mb=64, disk_mb=8, max_processes=16)

NAMESPACES = """
def mount(source, target, kind, flags=0):
    if libc.mount(source, target, kind, flags, None):
        raise OSError(ctypes.get_errno(), "mount")

def clone(flags):
    pid = syscall(56, 220, flags | signal.SIGCHLD, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

def clone3(flags):
    pid = syscall(435, 435, struct.pack("=8Q", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)

kinds = {"user": 0x10000000, "mount": 0x20000, "pid": 0x20000000, "net": 0x40000000, "ipc": 0x8000000,
         "uts": 0x4000000, "cgroup": 0x2000000, "time": 0x80}
for name, flag in kinds.items():
    attempt("unshare-" + name, lambda: syscall(272, 97, flag))
    if name != "time":
        attempt("clone-" + name, lambda: clone(flag))
    attempt("clone3-" + name, lambda: clone3(flag))
attempt("setns-self", lambda: syscall(308, 268, os.open("/proc/self/ns/user", os.O_RDONLY), 0))
attempt("setns-agent", lambda: syscall(308, 268, os.open("/proc/1/ns/mnt", os.O_RDONLY), 0))
attempt("mount-tmpfs", lambda: mount(b"none", b"/tmp", b"tmpfs"))
attempt("mount-proc", lambda: mount(b"none", b"/tmp", b"proc"))
attempt("bind", lambda: mount(b"/usr", b"/tmp", None, 4096))
attempt("remount", lambda: mount(None, b"/", None, 32 | 4096))
attempt("umount", lambda: syscall(166, 39, b"/proc", 2))
attempt("pivot_root", lambda: syscall(155, 41, b"/work", b"/work"))
attempt("chroot", lambda: os.chroot("/usr"))
attempt("open_tree", lambda: syscall(428, 428, -100, b"/", 1))
attempt("fsopen", lambda: syscall(430, 430, b"tmpfs", 0))
attempt("open_by_handle", lambda: syscall(304, 265, -100, struct.pack("=Ii8s", 8, 1, bytes(8)), 0))
attempt("setuid", lambda: os.setuid(0))
attempt("setgroups", lambda: os.setgroups([0]))
attempt("sethostname", lambda: socket.sethostname("mine"))
attempt("keep-caps", lambda: syscall(126, 91, struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[1 << 21] * 6)))
attempt("settimeofday", lambda: syscall(164, 170, struct.pack("=2q", 1, 0), 0))
attempt("clock_settime", lambda: time.clock_settime(time.CLOCK_REALTIME, 1))
attempt("reboot", lambda: syscall(169, 142, 0xFEE1DEAD, 672274793, 0x89ABCDEF, 0))
attempt("swapon", lambda: syscall(167, 224, b"/work", 0))
attempt("init_module", lambda: syscall(175, 105, b"x", 1, b""))
attempt("bpf", lambda: syscall(321, 280, 0, struct.pack("=4I", 1, 4, 4, 1), 16))
attempt("perf", lambda: syscall(298, 241, struct.pack("=2I", 1, 128) + bytes(120), 0, -1, -1, 0))
attempt("userfaultfd", lambda: syscall(323, 282, 1))
attempt("keyctl", lambda: syscall(250, 219, 0, -3, 1))
attempt("add_key", lambda: syscall(248, 217, b"user", b"name", b"data", 4, -3))
attempt("io_uring", lambda: syscall(425, 425, 4, bytes(120)))
attempt("acct", lambda: syscall(163, 89, b"/work/acct"))
attempt("fanotify", lambda: syscall(300, 262, 0, 0))
"""

TRACING = """
def traced(pid):
    syscall(101, 117, 16, pid, 0, 0)

def copied(pid):
    buffer = ctypes.create_string_buffer(8)
    local = struct.pack("=2Q", ctypes.addressof(buffer), 8)
    maps = open(f"/proc/{pid}/maps").readlines() or attempt_failed()
    remote = struct.pack("=2Q", int(maps[0].split("-")[0], 16), 8)
    return syscall(310, 270, pid, local, 1, remote, 1, 0)

others = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
for pid in others:
    attempt("ptrace", lambda: traced(pid))
    attempt("seize", lambda: syscall(101, 117, 0x4206, pid, 0, 0))
    attempt("process_vm", lambda: copied(pid))
    attempt("getfd", lambda: syscall(438, 438, os.pidfd_open(pid), 0, 0))
    attempt("kcmp", lambda: syscall(312, 272, os.getpid(), pid, 0, 0, 0))
    attempt("kill", lambda: os.kill(pid, 9))
    attempt("stop", lambda: os.kill(pid, signal.SIGSTOP))
    attempt("limits", lambda: resource.prlimit(pid, resource.RLIMIT_NOFILE, (0, 0)))
    attempt("nice", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
    attempt("affinity", lambda: os.sched_setaffinity(pid, {0}))
    attempt("oom", lambda: write(f"/proc/{pid}/oom_score_adj", b"1000"))
    attempt("comm", lambda: write(f"/proc/{pid}/comm", b"mine"))
    attempt("mem", lambda: os.open(f"/proc/{pid}/mem", os.O_RDWR))
    for name in ("root", "cwd", "exe", "ns/mnt", "ns/user", "map_files", "stack", "io"):
        attempt(name, lambda: os.stat(f"/proc/{pid}/{name}") and os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
"""

NETWORK = """
def connects(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as s:
        s.settimeout(1)
        s.connect(address)
        if kind == socket.SOCK_DGRAM:
            s.send(b"x")

def pings():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP) as s:
        s.sendto(bytes([8, 0, 0xF7, 0xFF, 0, 0, 0, 0]), ("192.0.2.1", 0))

for where in ("169.254.169.254", "172.17.0.1", "10.0.0.1", "192.0.2.1"):
    attempt("tcp-" + where, lambda: connects(socket.AF_INET, (where, 80)))
    attempt("udp-" + where, lambda: connects(socket.AF_INET, (where, 53), socket.SOCK_DGRAM))
attempt("tcp6", lambda: connects(socket.AF_INET6, ("2001:db8::1", 80)))
attempt("udp6", lambda: connects(socket.AF_INET6, ("2001:db8::1", 53), socket.SOCK_DGRAM))
attempt("name", lambda: socket.getaddrinfo("example.org", 80))
attempt("ping", pings)
attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
for cid in (1, 2, 3):
    attempt(f"vsock-{cid}", lambda: connects(40, (cid, 1024)))
attempt("vsock", lambda: socket.socket(40, socket.SOCK_STREAM))
attempt("alg", lambda: socket.socket(38, socket.SOCK_SEQPACKET))
attempt("packet", lambda: socket.socket(17, socket.SOCK_RAW))
attempt("packet-dgram", lambda: socket.socket(17, socket.SOCK_DGRAM))
attempt("netlink-route", lambda: socket.socket(16, socket.SOCK_RAW, 0))
attempt("netlink-audit", lambda: socket.socket(16, socket.SOCK_RAW, 9))
attempt("netlink-netfilter", lambda: socket.socket(16, socket.SOCK_RAW, 12))
for family in (4, 5, 9, 15, 21, 23, 26, 29, 30, 31, 36, 37, 39, 41, 42, 43, 44, 45):
    attempt(f"family-{family}", lambda: socket.socket(family, socket.SOCK_DGRAM))
    attempt(f"pair-{family}", lambda: socket.socketpair(family, socket.SOCK_DGRAM))
tcp, abstract, path = sys.argv[1:]
attempt("host-tcp", lambda: connects(socket.AF_INET, ("127.0.0.1", int(tcp))))
attempt("host-abstract", lambda: connects(socket.AF_UNIX, "\\0" + abstract))
attempt("host-path", lambda: connects(socket.AF_UNIX, path))
for name in ("/run/docker.sock", "/var/run/docker.sock", "/run/containerd/containerd.sock", "/run/systemd/private",
             "/run/dbus/system_bus_socket", "/tmp/.X11-unix/X0", "\\0/tmp/.X11-unix/X0", "\\0/containerd-shim/x.sock"):
    attempt("unix-" + name.strip("\\0"), lambda: connects(socket.AF_UNIX, name))
"""

KERNEL = """
def lists(path):
    return os.listdir(path) or attempt_failed()

def addresses():
    with open("/proc/kallsyms") as file:
        line = next((line for line in file if int(line.split()[0], 16)), None)
    return line or attempt_failed()

def physical():
    with open("/proc/iomem") as file:
        line = next((line for line in file if int(line.split("-")[1].split()[0], 16)), None)
    return line or attempt_failed()

for name in ("kcore", "kmem", "kmsg", "kpagecount", "kpageflags", "kpagecgroup", "keys", "timer_list", "sched_debug",
             "slabinfo", "vmallocinfo", "pagetypeinfo", "latency_stats", "scsi/scsi"):
    attempt(name, lambda: read("/proc/" + name) or attempt_failed())
attempt("kallsyms", addresses)
attempt("iomem", physical)
attempt("dmesg", lambda: syscall(103, 116, 3, ctypes.create_string_buffer(4096), 4096))
attempt("pagemap", lambda: any(os.pread(os.open("/proc/self/pagemap", os.O_RDONLY), 7, 8 * (id(0) >> 12))[:6])
                           or attempt_failed())
for name in ("sysrq-trigger", "sys/kernel/core_pattern", "sys/kernel/modprobe", "sys/kernel/hotplug",
             "sys/kernel/ns_last_pid", "sys/kernel/shmmax", "sys/kernel/shm_rmid_forced", "sys/kernel/msgmax",
             "sys/kernel/domainname", "sys/kernel/hostname", "sys/vm/overcommit_memory", "sys/vm/drop_caches",
             "sys/net/ipv4/ip_forward", "sys/net/core/somaxconn", "sys/fs/mqueue/msg_max", "sys/fs/suid_dumpable",
             "sys/user/max_user_namespaces", "sys/fs/binfmt_misc/register", "irq/default_smp_affinity", "mtrr",
             "self/uid_map", "self/gid_map", "self/setgroups", "self/attr/current", "pressure/memory"):
    attempt("write-" + name, lambda: write("/proc/" + name))
for name in ("firmware", "kernel/security", "kernel/debug", "kernel/tracing", "fs/bpf", "fs/pstore"):
    attempt("sys-" + name, lambda: lists("/sys/" + name))
for path in ("/sys/kernel/uevent_helper", "/sys/power/state", "/sys/fs/cgroup/release_agent",
             "/sys/fs/cgroup/cgroup.procs", "/sys/fs/cgroup/memory/release_agent",
             "/sys/fs/cgroup/memory/cgroup.procs", "/sys/fs/cgroup/memory/memory.limit_in_bytes",
             "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/pids/pids.max"):
    attempt("write-" + path, lambda: write(path))
for name in ("mem", "kmem", "port", "kmsg", "console", "vda", "sda", "nvme0n1", "loop0", "loop-control",
             "mapper/control", "kvm", "vsock", "vhost-net", "snapshot", "uinput", "rtc0", "hpet",
             "btrfs-control", "userfaultfd",
             "ptmx0", "tty0", "ttyS0", "nvidia0", "dri/card0", "autofs", "cpu_dma_latency"):
    attempt("dev-" + name, lambda: os.open("/dev/" + name, os.O_RDWR | os.O_NONBLOCK))
tun = struct.pack("=16sH22x", b"t0", 1)
attempt("tun", lambda: fcntl.ioctl(os.open("/dev/net/tun", os.O_RDWR), 0x400454CA, tun))
# Memory, KVM, a disk and a loop device. gVisor lets anybody make a node; what counts is whether it opens.
nodes = ((0o20000, (1, 1)), (0o20000, (1, 2)), (0o20000, (10, 232)), (0o60000, (254, 0)), (0o60000, (7, 0)))
for folder in ("/work", "/tmp", "/dev/shm", "/dev"):
    for kind, device in nodes:
        path = "%s/node-%o-%d-%d" % (folder, kind, *device)
        attempt(path, lambda: os.mknod(path, kind | 0o666, os.makedev(*device)) or os.open(path, os.O_RDWR))
for path in ("/var/lib/docker", "/var/lib/posttrain", "/root", "/home", "/mnt", "/srv", "/opt", "/boot", "/lost+found"):
    attempt("host-" + path, lambda: lists(path))
attempt("shadow", lambda: read("/etc/shadow"))
secrets = set(os.environ) - {"PATH", "HOME", "LANG", "TZ", "PYTHONDONTWRITEBYTECODE", "LC_CTYPE"}
attempt("environment", lambda: secrets or attempt_failed())
for path in ("/x", "/usr/x", "/etc/x", "/usr/lib/x", "/dev/x", "/proc/x"):
    attempt("create-" + path, lambda: os.open(path, os.O_CREAT | os.O_WRONLY))
for path in ("/bin/sh", "/bin/bash", "/usr/bin/python3", "/etc/ld.so.cache", os.__file__):
    attempt("overwrite-" + path, lambda: os.open(path, os.O_WRONLY))
    attempt("rename-" + path, lambda: os.rename(path, "/work/taken"))
    attempt("chmod-" + path, lambda: os.chmod(path, 0o777))
"""

OLD_INTERFACES = """
import mmap
def ioctl(path, request, argument=bytes(256), mode=os.O_RDONLY):
    fd = os.open(path, mode | os.O_NONBLOCK)
    try:
        return fcntl.ioctl(fd, request, argument)
    finally:
        os.close(fd)

open("/work/mine", "w").write("x" * 8192)
requests = {"setflags": 0x40086602, "fssetxattr": 0x401C5820, "setversion": 0x40087602, "freeze": 0xC0045877,
            "thaw": 0xC0045878, "trim": 0xC0185879, "bmap": 1, "shutdown": 0x8004587D, "xfs-swap": 0xC0C0586D,
            "xfs-freeze": 0xC0045877, "ext4-move": 0xC028660F, "ext4-swap-boot": 0x6611, "ext4-migrate": 0x6609,
            "ext4-resize": 0x40086610, "ext4-checkpoint": 0x4004662B, "btrfs-snapshot": 0x50009401,
            "encryption": 0x800C6613, "add-key": 0xC0506617, "verity": 0x40806685, "setlabel": 0x41009432}
for name, request in requests.items():
    # Immutable and append-only, for those that take flags.
    for path in ("/usr/bin/python3", "/usr", "/work/mine", "/work"):
        attempt(f"{name}-{path}", lambda: ioctl(path, request, struct.pack("=q", 0x30) + bytes(248)))
attempt("clone-file", lambda: ioctl("/work/mine", 0x40049409, os.open("/usr/bin/python3", os.O_RDONLY), os.O_RDWR))
attempt("lease", lambda: fcntl.fcntl(os.open("/usr/bin/python3", os.O_RDONLY), 1024, fcntl.F_WRLCK))
attempt("swap", lambda: syscall(167, 224, b"/work/mine", 0))
attempt("quotactl", lambda: syscall(179, 60, 0x800002 << 8, b"/dev/vda", 0, ctypes.create_string_buffer(128)))
attempt("terminal", lambda: os.open("/dev/tty", os.O_RDWR))
def survived(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    if status:
        raise OSError(errno.EPERM, f"wait status {status}")

# mov eax, 20 (getpid); int 0x80; ret
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
def call_32_bit():
    os._exit(call() != os.getpid())

if X86:
    attempt("x32", lambda: survived(lambda: syscall(0x40000000 | 39, 0)))
    attempt("int-80", lambda: survived(call_32_bit))
    attempt("iopl", lambda: syscall(172, 0, 3))
    attempt("ioperm", lambda: syscall(173, 0, 0x70, 1, 1))
    attempt("modify_ldt", lambda: syscall(154, 0, 17, bytes(16), 16))
"""

TERMINAL = """
fd = 0
attempt("TIOCSTI", lambda: fcntl.ioctl(fd, 0x5412, b"x"))
attempt("TIOCSTI-high-bits", lambda: syscall(16, 29, fd, 0x5412 | 1 << 32, b"x"))
attempt("TIOCLINUX", lambda: fcntl.ioctl(fd, 0x541C, b"\\x03"))
attempt("TIOCCONS", lambda: fcntl.ioctl(fd, 0x541D))
attempt("TIOCSETD", lambda: fcntl.ioctl(fd, 0x5423, struct.pack("=i", 13)))
attempt("TIOCGPTPEER", lambda: fcntl.ioctl(fd, 0x5441, os.O_RDWR))
for name in os.listdir("/dev/pts"):
    path = "/dev/pts/" + name
    if name != "ptmx" and os.stat(path).st_rdev != os.fstat(fd).st_rdev:
        attempt("other-terminal", lambda: os.open(path, os.O_RDWR | os.O_NOCTTY))
"""


async def namespaces_and_rights_cannot_be_had(box: Sandbox) -> None:
    await nothing_is_reached(box, NAMESPACES)
    await still_works(box)


async def nobody_can_be_traced(substrate: Substrate) -> None:
    """Not the agent, nor a command beside this one."""
    # gVisor keeps priority and affinity for show, and its file of a namespace opens nothing.
    of_no_effect = ("nice", "affinity", "ns/user") if isolates_by_kernel(substrate) else ()
    async with substrate.open(SPEC) as box:
        beside = asyncio.create_task(box.exec("sleep 0.6; echo unharmed"))
        await asyncio.sleep(0.1)
        await nothing_is_reached(box, TRACING, but=of_no_effect)
        result = await beside
        expect(result.stdout == b"unharmed\n", result)
        await still_works(box)


def isolates_by_kernel(substrate: Substrate) -> bool:
    """Whether the kernel the box runs on is gVisor's."""
    return substrate.capabilities()["isolation"] == "kernel"


async def the_network_is_out_of_reach(substrate: Substrate) -> None:
    """Nor what listens on the host. A kernel of the box's own may offer netlink, which tells of that kernel only."""
    own = ("netlink-route",) if substrate.capabilities().get("own_kernel") else ()
    with listening() as addresses:
        async with substrate.open(SPEC) as box:
            await nothing_is_reached(box, NETWORK, *addresses, but=own)


@contextlib.contextmanager
def listening() -> Iterator[tuple[str, str, str]]:
    """Sockets of the host's: a TCP port, an abstract name and a path."""
    name = f"posttrain-{uuid.uuid4().hex}"
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for address in (f"\0{name}", f"/tmp/{name}"):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(address)
            listener.listen()
        stack.callback(Path(f"/tmp/{name}").unlink)
        yield str(tcp.getsockname()[1]), name, f"/tmp/{name}"


async def kernel_and_host_files_are_out_of_reach(substrate: Substrate) -> None:
    """A machine's firmware is its own, and no secret of the host's."""
    own = ("sys-firmware",) if substrate.capabilities().get("own_kernel") else ()
    async with substrate.open(SPEC) as box:
        await nothing_is_reached(box, KERNEL, but=own)
        await still_works(box)


async def old_and_odd_interfaces_are_closed(box: Sandbox) -> None:
    """Ioctls of file systems, and the x86 calls of other ABIs."""
    await nothing_is_reached(box, OLD_INTERFACES)
    await still_works(box)


async def a_terminal_gives_nothing_away(sandbox: Sandbox) -> None:
    """No input can be forged; escape sequences come out as the bytes they are."""
    box = agent_box(sandbox)
    escapes = bytes([27]) + b"]0;title" + bytes([7, 27]) + b"[6n" + bytes([27]) + b"P$q" + bytes([27, 92])
    program = PRELUDE + TERMINAL + f"os.write(1, {escapes!r} + b'end')"
    size = (24, 80)
    async with (
        await box.spawn("sleep 20", tty=size),
        await box.spawn(["python3", "-I", "-S", "-c", program], tty=size) as job,
    ):
        seen = b""
        async with asyncio.timeout(10):
            async for chunk in job:
                seen += chunk.data
    expect(all(name in seen for name in (b"TIOCSTI refused", b"other-terminal refused")), seen)
    expect(b"REACHED" not in seen, seen)
    expect(seen.endswith(escapes + b"end"), seen)
    await still_works(box)


async def every_way_in_drops_rights(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    argv = ["python3", "-I", "-S", "-c", RIGHTS]
    has_no_rights(await box.exec(argv))
    has_no_rights(await box.call(RIGHTS))
    async with await box.session() as shell:
        has_no_rights(await shell.run(shlex.join(argv)))
    async with await box.spawn(f"{shlex.join(argv)} > rights") as job:
        await job.wait()
    has_no_rights(await box.exec("cat rights"))
    # A program that was started by a program that was started by one.
    has_no_rights(await box.exec(f"sh -c {shlex.quote(f'sh -c {shlex.quote(shlex.join(argv))}')}"))


async def set_uid_files_gain_nothing(sandbox: Sandbox) -> None:
    """Neither those of the image nor one that a command beside this one makes."""
    maker = asyncio.create_task(sandbox.exec("cp /usr/bin/id id; chmod 6777 id; sleep 0.6"))
    await asyncio.sleep(0.3)
    made = await sandbox.exec("./id")
    expect(b"euid" not in made.stdout and b"egid" not in made.stdout, made)
    await maker
    listed = await sandbox.exec("find / -xdev -perm /6000 -type f 2>/dev/null")
    program = """
import os, sys
for path in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        os.execv(path, [path])
"""
    if listed.stdout:
        ran = await sandbox.exec(["python3", "-I", "-S", "-c", program, *listed.stdout.decode().split()], timeout_s=1.0)
        expect(ran.status in (ExecStatus.EXITED, ExecStatus.TIMEOUT), ran)
    has_no_rights(await python(sandbox, RIGHTS))
    await still_works(sandbox)


LEAVES = """
def made(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "not made")
    return result

name, key = sys.argv[1], int(sys.argv[2])
open("/dev/shm/" + name, "w").close()
open("/tmp/" + name, "w").close()
made(libc.shmget(key, 4096, 0o1666))
made(libc.semget(key, 1, 0o1666))
made(libc.msgget(key, 0o1666))
listener = socket.socket(socket.AF_UNIX)
listener.bind("\\0" + name)
listener.listen()
server = socket.create_server(("127.0.0.1", 20000 + key % 10000))
layer = os.open("/usr/bin/env", os.O_RDONLY)
fcntl.flock(layer, fcntl.LOCK_EX)
attempt("leave", lambda: "ready")
time.sleep(30)
"""
FINDS = """
def finds(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "not there")
    return result

def connects(family, address):
    with socket.socket(family) as s:
        s.settimeout(1)
        s.connect(address)

def locked():
    try:
        fcntl.flock(os.open("/usr/bin/env", os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    raise OSError(errno.ENOENT, "it is free")

name, key = sys.argv[1], int(sys.argv[2])
attempt("dev-shm", lambda: os.stat("/dev/shm/" + name))
attempt("tmp", lambda: os.stat("/tmp/" + name))
attempt("shm", lambda: finds(libc.shmget(key, 0, 0)))
attempt("sem", lambda: finds(libc.semget(key, 0, 0)))
attempt("msg", lambda: finds(libc.msgget(key, 0)))
attempt("abstract", lambda: connects(socket.AF_UNIX, "\\0" + name))
attempt("tcp", lambda: connects(socket.AF_INET, ("127.0.0.1", 20000 + key % 10000)))
attempt("flock", locked)
"""


async def two_boxes_are_apart(substrate: Substrate) -> None:
    """What one leaves for others is found within it and not from a second, but for what is declared (``shared``)."""
    argv = ["python3", "-I", "-S", "-c", PRELUDE + LEAVES]
    names = (f"left-{uuid.uuid4().hex}", str(uuid.uuid4().int % 1_000_000_000))
    async with substrate.open(SPEC) as first, substrate.open(SPEC) as second:
        leaving = asyncio.create_task(first.exec([*argv, *names], timeout_s=40))
        async with asyncio.timeout(10):
            # The lock is what is left last.
            while "flock" not in await reached(first, FINDS, *names):
                expect(not leaving.done(), leaving)
        within = await reached(first, FINDS, *names)
        expect(len(within) >= 6, "what was left cannot be found, so this proves nothing", within)
        shared = await reached(second, FINDS, *names)
        leaving.cancel()
        await asyncio.wait({leaving})
    expect(set(shared) <= set(substrate.capabilities().get("shared", ())), shared)


ESCAPE_CHECKS: tuple[Callable[[Sandbox], Awaitable[None]], ...] = (
    namespaces_and_rights_cannot_be_had,
    old_and_odd_interfaces_are_closed,
    a_terminal_gives_nothing_away,
    every_way_in_drops_rights,
    set_uid_files_gain_nothing,
)
ESCAPE_WHOLE: tuple[Callable[[Substrate], Coroutine[Any, Any, None]], ...] = (
    nobody_can_be_traced,
    the_network_is_out_of_reach,
    kernel_and_host_files_are_out_of_reach,
    two_boxes_are_apart,
)
