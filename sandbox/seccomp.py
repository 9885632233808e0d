"""One deny list of system calls, as a BPF program for bubblewrap and as a JSON profile for Docker.

Both let everything else through: the payload has no capabilities, so the kernel already refuses what needs them. The
list closes what an unprivileged process could still reach: new namespaces, tracing, keyrings, io_uring, and
sockets that leave the box although it has no network, AF_VSOCK above all.
"""

from __future__ import annotations

import errno
import platform
import struct

DENIED: dict[str, tuple[int, int]] = {
    # name: (number on x86_64, number on aarch64)
    "acct": (163, 89),
    "add_key": (248, 217),
    "bpf": (321, 280),
    "clock_settime": (227, 112),
    "delete_module": (176, 106),
    "fanotify_init": (300, 262),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "lookup_dcookie": (212, 18),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "move_pages": (279, 239),
    "mq_open": (240, 180),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "setns": (308, 268),
    "settimeofday": (164, 170),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}
DENIED_X86 = {"ioperm": 173, "iopl": 172, "modify_ldt": 154}
"""Calls that only x86_64 has."""
CLONE, CLONE3, SOCKET, IOCTL = (56, 220), (435, 435), (41, 198), (16, 29)
NEW_NAMESPACES = 0x7E020000
"""Every CLONE_NEW* flag that clone(2) takes."""
TERMINAL_REQUESTS = {"TIOCSTI": 0x5412, "TIOCLINUX": 0x541C, "TIOCSETD": 0x5423}
"""Requests that forge input, or load a line discipline into the kernel."""
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
X32_BIT = 0x40000000

LOAD, JUMP_EQUAL, JUMP_SET, JUMP_ABOVE, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
NUMBER_AT, ARCH_AT, FIRST_ARGUMENT_AT, SECOND_ARGUMENT_AT = 0, 4, 16, 24
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000

Instruction = tuple[int, int, int, int]


def is_supported() -> bool:
    """Whether the system call numbers of this machine are known."""
    return platform.machine() in ARCHITECTURES


def bpf() -> bytes:
    """The filter as ``struct sock_filter`` records, the form bubblewrap's ``--seccomp`` takes."""
    column, arch = ARCHITECTURES[platform.machine()]
    program: list[Instruction] = [
        (LOAD, 0, 0, ARCH_AT),
        (JUMP_EQUAL, 1, 0, arch),
        # Another architecture means the 32-bit ABI, whose numbers mean other calls.
        (RETURN, 0, 0, KILL_PROCESS),
        (LOAD, 0, 0, NUMBER_AT),
    ]
    if column == 0:
        program += [(JUMP_ABOVE, 0, 1, X32_BIT), (RETURN, 0, 0, ERRNO | errno.ENOSYS)]
    denied = [numbers[column] for numbers in DENIED.values()] + [*DENIED_X86.values()] * (column == 0)
    for number in denied:
        program += _on_call(number, [(RETURN, 0, 0, ERRNO | errno.EPERM)])
    # A filter cannot read clone3's flags, which lie in memory; ENOSYS makes callers fall back to clone.
    program += _on_call(CLONE3[column], [(RETURN, 0, 0, ERRNO | errno.ENOSYS)])
    program += _on_call(CLONE[column], _deny_if(JUMP_SET, FIRST_ARGUMENT_AT, (NEW_NAMESPACES,)))
    program += _on_call(IOCTL[column], _deny_if(JUMP_EQUAL, SECOND_ARGUMENT_AT, tuple(TERMINAL_REQUESTS.values())))
    program += _on_call(SOCKET[column], _allow_only((AF_UNIX, AF_INET, AF_INET6)))
    program.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _on_call(number: int, body: list[Instruction]) -> list[Instruction]:
    return [(JUMP_EQUAL, 0, len(body), number), *body]


def _deny_if(test: int, offset: int, values: tuple[int, ...]) -> list[Instruction]:
    checks: list[Instruction] = []
    for value in values:
        checks += [(test, 0, 1, value), (RETURN, 0, 0, ERRNO | errno.EPERM)]
    return [(LOAD, 0, 0, offset), *checks, (RETURN, 0, 0, ALLOW)]


def _allow_only(families: tuple[int, ...]) -> list[Instruction]:
    checks: list[Instruction] = []
    for family in families:
        checks += [(JUMP_EQUAL, 0, 1, family), (RETURN, 0, 0, ALLOW)]
    return [(LOAD, 0, 0, FIRST_ARGUMENT_AT), *checks, (RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT)]


def docker_profile() -> dict[str, object]:
    """The same policy in the form of Docker's ``--security-opt seccomp=``."""
    refused = {"action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM}
    no_family = {"action": "SCMP_ACT_ERRNO", "errnoRet": errno.EAFNOSUPPORT}
    flags = [1 << bit for bit in range(32) if NEW_NAMESPACES >> bit & 1]
    rules: list[dict[str, object]] = [
        {"names": sorted({**DENIED, **DENIED_X86}), **refused},
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
    ]
    # A rule may not repeat the default action, and tests within one rule are joined by "and": one rule per value.
    rules += [{"names": ["clone"], **refused, "args": [_test(0, "MASKED_EQ", flag, flag)]} for flag in flags]
    # The kernel looks at the lower half of a request, so that a comparison of all of it would be evaded by the upper.
    requests = [_test(1, "MASKED_EQ", 0xFFFFFFFF, value) for value in TERMINAL_REQUESTS.values()]
    rules += [{"names": ["ioctl"], **refused, "args": [request]} for request in requests]
    families = [family for family in range(AF_INET6) if family not in (AF_UNIX, AF_INET)]
    rules += [{"names": ["socket"], **no_family, "args": [_test(0, "EQ", family)]} for family in families]
    rules += [{"names": ["socket"], **no_family, "args": [_test(0, "GT", AF_INET6)]}]
    return {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}


def gvisor_profile() -> dict[str, object]:
    """The same for gVisor's own kernel, which refuses with EPERM whatever a rule asks for.

    Rules that need another error are left out: they concern clone3 and kinds of sockets, none of which leads out of it.
    """
    profile = docker_profile()
    rules = [rule for rule in profile["syscalls"] if rule["errnoRet"] == errno.EPERM]  # type: ignore[attr-defined]
    return {**profile, "syscalls": rules}


def _test(index: int, op: str, value: int, second: int = 0) -> dict[str, object]:
    return {"index": index, "value": value, "valueTwo": second, "op": f"SCMP_CMP_{op}"}
