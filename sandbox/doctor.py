"""Can this machine open boxes? Each finding says what to do when the answer is no."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from posttrain.doctor import Finding
from posttrain.errors import RecipeError, SandboxError, SandboxUnavailable
from sandbox import cgroups, dockerd, gvisor, seccomp
from sandbox.conformance import find_substrate
from sandbox.images import build

SUBSTRATES = ("process", "container", "function", "gvisor", "microvm", "fullvm")


def substrates() -> list[Finding]:
    """Whether each kind of box can be opened here."""
    return [_finding(name, lambda name=name: _substrate(name)) for name in SUBSTRATES]  # type: ignore[misc]


def needs() -> list[Finding]:
    """Whether what they need is here, and which of them need it."""
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("kernel", _kernel),
        ("namespaces", _namespaces),
        ("seccomp", _seccomp),
        ("cgroups", _cgroups),
        ("bubblewrap", _bubblewrap),
        ("docker", _docker),
        ("image", _image),
        ("runsc", _runsc),
        ("qemu", _qemu),
        ("kvm", _kvm),
    )
    return [_finding(name, check) for name, check in checks]


def _finding(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name=name, ok=True, detail=check())
    except (RecipeError, SandboxError, OSError) as problem:
        return Finding(name=name, ok=False, detail=str(problem).removeprefix(f"substrate {name!r}: "))


def _substrate(name: str) -> str:
    substrate = find_substrate(name)
    substrate.check()
    can = substrate.capabilities()
    return f"isolation {can['isolation']}, network {can['network']}, limits {can['limits']}"


def _kernel() -> str:
    if platform.system() != "Linux":
        raise SandboxUnavailable(f"{platform.system()}; boxes need Linux: run in a Linux virtual machine")
    return f"Linux {platform.release()} on {platform.machine()}, {'root' if os.geteuid() == 0 else 'not root'}"


def _namespaces() -> str:
    limit = Path("/proc/sys/user/max_user_namespaces")
    if not limit.exists() or int(limit.read_text()) == 0:
        raise SandboxUnavailable("user namespaces are off (process): sysctl -w user.max_user_namespaces=15000")
    restricted = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    if os.geteuid() != 0 and restricted.exists() and restricted.read_text().strip() == "1":
        raise SandboxUnavailable(
            "AppArmor keeps user namespaces from users (process): sysctl -w "
            "kernel.apparmor_restrict_unprivileged_userns=0"
        )
    return f"user namespaces, up to {limit.read_text().strip()}"


def _seccomp() -> str:
    if not seccomp.is_supported():
        raise SandboxUnavailable(f"no filter for {platform.machine()} (process): boxes open without one")
    return f"system call filter for {platform.machine()}"


def _cgroups() -> str:
    if not cgroups.is_available():
        raise SandboxUnavailable(
            f"no writable control groups for memory, pids and cpu below {cgroups.MOUNT} (gvisor; process limits each "
            "command instead): run as root, in a container with --privileged --cgroupns=host"
        )
    return f"version {cgroups.version()}: {', '.join(cgroups.CONTROLLERS)}"


def _bubblewrap() -> str:
    return _program("bwrap", "process, function", "apt-get install bubblewrap")


def _docker() -> str:
    try:
        import docker
    except ImportError as error:
        raise SandboxUnavailable("the Docker SDK is missing (container): pip install 'posttrain[container]'") from error
    if not dockerd.is_running():
        start = "python -m sandbox.dockerd" if shutil.which("dockerd") else "apt-get install docker.io"
        raise SandboxUnavailable(f"no daemon at {dockerd.SOCKET} (container): {start}, as root")
    with docker.APIClient(base_url=f"unix://{dockerd.SOCKET}", timeout=5) as client:
        return f"daemon {client.version()['Version']}, SDK {docker.__version__}"


def _image() -> str:
    image = build.find("default")
    if image is None:
        need = "" if shutil.which("debootstrap") else "apt-get install debootstrap, then "
        raise SandboxUnavailable(
            f"none in {build.cache()} (container, gvisor, microvm, fullvm; process shows the host's /usr instead): "
            f"{need}python -m sandbox.images.build, as root"
        )
    return f"{image.name} {image.digest}, {image.tarball.stat().st_size >> 20} MiB in {build.cache()}"


def _runsc() -> str:
    found = _program("runsc", "gvisor", "apt-get install runsc")
    return f"{found}, release {gvisor.Gvisor().capabilities()['release']}"


def _qemu() -> str:
    return _program(
        f"qemu-system-{platform.machine()}", "microvm, fullvm", "apt-get install qemu-system-x86 qemu-utils"
    )


def _kvm() -> str:
    """Never a failure, since microvm and fullvm do without."""
    device = Path("/dev/kvm")
    if find_substrate("microvm").capabilities()["accelerator"] == "kvm":
        return "a guest starts with /dev/kvm"
    if not device.exists():
        reason = "there is no /dev/kvm (modprobe kvm)"
    elif not os.access(device, os.R_OK | os.W_OK):
        reason = "/dev/kvm may not be opened (usermod -aG kvm $USER)"
    else:
        reason = "no guest starts with /dev/kvm (it needs a host without, or with nested, virtualisation)"
    return f"not used, microvm and fullvm emulate the processor: {reason}"


def _program(name: str, users: str, install: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SandboxUnavailable(f"{name} is missing ({users}): {install}")
    return path
