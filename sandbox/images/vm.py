"""What a virtual machine is made of: Debian's cloud kernel, a first file system in memory, and an image as a disk.

``python -m sandbox.images.vm`` fetches the kernel once (27 MB from a Debian package archive; needs apt-get, dpkg-deb
and busybox-static); disks are made of the same images as every other box. All lie in the cache and work offline.
"""

from __future__ import annotations

import fcntl
import functools
import gzip
import hashlib
import inspect
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import SandboxError, SandboxUnavailable
from sandbox import guest
from sandbox.images import build

PACKAGE = "linux-image-cloud-amd64"
BUSYBOX = Path("/bin/busybox")
INSTALL = "apt-get install busybox-static e2fsprogs"
COMMAND = "python -m sandbox.images.vm"
MODULES = (
    "virtio/virtio_ring",
    "virtio/virtio",
    "virtio/virtio_pci_legacy_dev",
    "virtio/virtio_pci_modern_dev",
    "virtio/virtio_pci",
    "block/virtio_blk",
    "char/virtio_console",
)
"""Of Debian's kernel, in the order in which they need one another."""
MOUNT_POINTS = ("dev", "proc", "sys", "tmp", "work")
DISK_BYTES = 1 << 30
"""Of a root disk; it is sparse, and a writable one may grow to this."""
PORT = "/dev/vport0p1"
INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs dev /dev; $b mount -t proc proc /proc; $b mount -t sysfs sys /sys
for module in {modules}; do $b insmod /modules/$module.ko; done
until [ -e /dev/vda ] && [ -e {port} ]; do $b usleep 10000; done
case $($b cat /proc/cmdline) in *writable*) mode=rw;; *) mode=ro;; esac
$b mount -t ext4 -o $mode,noatime /dev/vda /root
program=$($b cat /guest.py)
for made in dev proc sys; do $b mount --move /$made /root/$made; done
exec $b switch_root /root /usr/bin/python3 -I -S -c "$program" 0<>/root{port} >&0 2>/root/dev/console
"""
"""The port can be opened only once, so both directions share a descriptor."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel and what it starts with."""

    digest: str
    image: Path
    initrd: Path


def folder() -> Path:
    """Where kernels, disks and saved machines lie."""
    return build.cache() / "vm"


def require_kernel() -> Kernel:
    """The newest kernel in the cache, with today's first file system. ``SandboxUnavailable`` says how to get one."""
    found = sorted(folder().glob("kernel-*"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SandboxUnavailable(f"no kernel for virtual machines in {folder()}; fetch it once with {COMMAND}")
    if not BUSYBOX.exists():
        raise SandboxUnavailable(f"{BUSYBOX} is missing; as root: {INSTALL}")
    return _with_initrd(found[-1])


@functools.cache
def _with_initrd(kernel: Path) -> Kernel:
    content = gzip.compress(_initrd(kernel), mtime=0)
    digest = hashlib.sha256(content + kernel.name.encode()).hexdigest()[:16]

    def make(partial: Path) -> None:
        partial.write_bytes(content)

    return Kernel(digest, kernel / "vmlinuz", once(kernel / f"initrd-{digest}", make))


def _initrd(kernel: Path) -> bytes:
    """The first file system, as an archive in the kernel's own format (cpio, newc)."""
    modules = [Path(name).name for name in MODULES]
    init = INIT.format(modules=" ".join(modules), port=PORT)
    files: dict[str, tuple[int, bytes]] = dict.fromkeys(("bin", "modules", "root", *MOUNT_POINTS), (16877, b""))
    files["bin/busybox"] = (0o100755, BUSYBOX.read_bytes())
    files["init"] = (0o100755, init.encode())
    files["guest.py"] = (0o100644, inspect.getsource(guest).encode())
    for name in modules:
        files[f"modules/{name}.ko"] = (0o100644, (kernel / f"{name}.ko").read_bytes())
    return b"".join(_entry(number, *item) for number, item in enumerate([*files.items(), ("TRAILER!!!", (0, b""))]))


def _entry(number: int, name: str, content: tuple[int, bytes]) -> bytes:
    mode, data = content
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def disk(image: build.Image, *, writable_by: int | None = None) -> Path:
    """The image as an ext4 disk, made on first use (about a second), on which this group may change every file."""

    def make(partial: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="posttrain-disk-") as folder:
            root = build.unpacked(image)
            if writable_by is not None:
                root = Path(folder) / "root"
                _run(["cp", "-a", str(build.unpacked(image)), str(root)])
                _run(["chgrp", "-hR", str(writable_by), str(root)])
                _run(["chmod", "-R", "g+w", str(root)])
            with partial.open("wb") as file:
                file.truncate(DISK_BYTES)
            _run(["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", str(root), str(partial)])

    suffix = "" if writable_by is None else f"-{writable_by}"
    return once(folder() / f"{image.name}-{image.digest}{suffix}.ext4", make)


def fetch_kernel() -> Kernel:
    """Get Debian's newest cloud kernel and unpack what is needed of it; it is not installed."""
    for program, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg"), ("mke2fs", "e2fsprogs")):
        if shutil.which(program) is None:
            raise SandboxUnavailable(f"fetching a kernel needs {program} (Debian package {package}); install it")
    with tempfile.TemporaryDirectory(prefix="posttrain-kernel-") as name:
        place = Path(name)
        package = _run(["apt-cache", "depends", "--important", PACKAGE]).split("Depends: ")[-1].split()[0]
        _run(["apt-get", "download", package], cwd=place)
        (archive,) = place.glob("*.deb")
        _run(["dpkg-deb", "-x", str(archive), str(place / "unpacked")])
        (image,) = (place / "unpacked" / "boot").glob("vmlinuz-*")
        (drivers,) = (place / "unpacked" / "lib" / "modules").glob("*/kernel/drivers")

        def make(partial: Path) -> None:
            partial.mkdir()
            shutil.copy(image, partial / "vmlinuz")
            for module in MODULES:
                shutil.copy(drivers / f"{module}.ko", partial)

        once(folder() / f"kernel-{archive.stem}", make)
    return require_kernel()


def once(target: Path, make: Callable[[Path], None]) -> Path:
    """``target``, which ``make`` makes at the path it is given: by one process at a time, seen when it is whole."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        partial = target.with_name(f".{target.name}.partial")
        _remove(partial)
        if not target.exists():
            try:
                make(partial)
                if partial.is_file():
                    # QEMU opens it as nobody, whatever this process's umask is.
                    partial.chmod(0o644)
                partial.rename(target)
            finally:
                _remove(partial)
    return target


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _run(argv: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(argv, capture_output=True, timeout=600, check=False, cwd=cwd)
    if done.returncode != 0:
        tail = (done.stdout + done.stderr).decode("utf-8", "replace")[-2000:]
        raise SandboxError(f"{argv[0]} failed with exit code {done.returncode}: {tail}")
    return done.stdout.decode()


def main() -> int:
    """The command line: the kernel in the cache, fetched when there is none."""
    try:
        kernel = require_kernel() if any(folder().glob("kernel-*")) else fetch_kernel()
    except SandboxError as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    sys.stdout.write(f"{kernel.image}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
