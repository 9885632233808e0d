"""Root file systems for boxes: made once with debootstrap, then kept as a tarball and used offline.

``python -m sandbox.images.build`` makes the default image (about two minutes; needs root, debootstrap and a Debian
package archive). The tarball's hash names it everywhere, so that a run can say what its boxes contained.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import SandboxError, SandboxUnavailable

SUITE = "bookworm"
STRIPPED = ("var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/doc", "usr/share/man", "usr/share/locale")
INSTALL = "apt-get install debootstrap"


@dataclass(frozen=True, slots=True)
class Image:
    """A root file system in the cache."""

    name: str
    digest: str
    """First 16 hexadecimal digits of the tarball's SHA-256."""
    tarball: Path


def cache() -> Path:
    """Where images are kept: ``POSTTRAIN_CACHE``, else ``~/.cache/posttrain``."""
    return Path(os.environ.get("POSTTRAIN_CACHE") or Path.home() / ".cache" / "posttrain")


def find(name: str) -> Image | None:
    """The newest image of this name in the cache."""
    found = sorted((cache() / "images").glob(f"{name}-*.tar"), key=lambda path: path.stat().st_mtime)
    return Image(name, found[-1].stem.rpartition("-")[2], found[-1]) if found else None


def require(name: str) -> Image:
    """The newest image of this name. ``SandboxUnavailable`` says how to build it."""
    image = find(name)
    if image is None:
        command = "python -m sandbox.images.build" + ("" if name == "default" else f" {name}")
        raise SandboxUnavailable(f"no image {name!r} in {cache()}; build it once as root with {command} ({INSTALL})")
    return image


@functools.cache
def unpacked(image: Image) -> Path:
    """The image as a directory, unpacked on first use. Device nodes are left out; boxes have their own /dev."""
    target = cache() / "rootfs" / image.digest
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix="partial-"))
    try:
        _run(["tar", "-C", str(partial), "--exclude=./dev/*", "-xf", str(image.tarball)])
        partial.chmod(0o755)
        partial.rename(target)
    except OSError:
        # Another process was first.
        if not target.exists():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def build(name: str = "default") -> Image:
    """Make an image with Python from Debian packages. ``SandboxUnavailable`` without root or debootstrap."""
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        raise SandboxUnavailable(f"building an image needs root and debootstrap; as root: {INSTALL}")
    with tempfile.TemporaryDirectory(prefix="posttrain-image-") as folder:
        rootfs = Path(folder) / "rootfs"
        _run(["debootstrap", "--variant=minbase", "--include=python3", SUITE, str(rootfs)])
        return pack(rootfs, name)


def pack(rootfs: Path, name: str = "default") -> Image:
    """Strip a root file system in place and put it into the cache as a tarball."""
    for folder in STRIPPED:
        shutil.rmtree(rootfs / folder, ignore_errors=True)
    (rootfs / "work").mkdir(exist_ok=True)
    # Docker gives a tmpfs the mode of the image's directory beneath it, whatever mode is asked for.
    (rootfs / "work").chmod(0o777)
    images = cache() / "images"
    images.mkdir(parents=True, exist_ok=True)
    partial = images / f".{name}.{os.getpid()}"
    try:
        _run(
            ["tar", "-C", str(rootfs), "--sort=name", "--numeric-owner", "--exclude=./dev/*", "-cf", str(partial), "."]
        )
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        tarball = images / f"{name}-{digest}.tar"
        partial.rename(tarball)
    finally:
        partial.unlink(missing_ok=True)
    return Image(name, digest, tarball)


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, timeout=1800, check=False)
    if done.returncode != 0:
        tail = (done.stdout + done.stderr).decode("utf-8", "replace")[-2000:]
        raise SandboxError(f"{argv[0]} failed with exit code {done.returncode}: {tail}")


if __name__ == "__main__":
    made = build(*sys.argv[1:2])
    sys.stdout.write(f"{made.tarball}\n")
