"""Filesystem commits: the content of a box's workdir, kept as a tar archive that is named by its hash.

``SandboxSpec.image`` names a commit as ``default+3f2a...``: the image a box is started from and, after each ``+``, the
first digits of a layer's SHA-256. Layers are laid into the workdir in that order. A layer holds directories, regular
files (with permissions and times) and symbolic links, and the same content always has the same name. It also
says which named users the box had, in the order in which it gave them uids, and what belongs to them.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import tempfile
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from posttrain.errors import SandboxError
from sandbox.images import build

MAX_ENTRIES = 100_000
MAX_BYTES = 4 << 30
PREFIX_DIGITS = 16
PIECE_BYTES = 1 << 20
DIGEST = re.compile(rf"[0-9a-f]{{{PREFIX_DIGITS},64}}")
PARTIAL = ".partial-"
USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
USER_TYPE = b"U"
"""Of the archive's members, one of the letters that POSIX leaves to whoever wants one: a user, named like a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The workdir of a box at one moment."""

    digest: str
    """SHA-256 of its layer."""
    num_files: int
    """Regular files."""
    num_bytes: int
    """Their content."""
    image: str = ""
    """What a ``SandboxSpec`` names to begin with it; empty when the box is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One entry of a layer."""

    path: str
    kind: str
    """``file``, ``directory`` or ``link``; ``user`` for a user of the box, whose name is the path."""
    owner: str = ""
    """A user that came before; empty for what a command without one has made."""
    mode: int = 0
    """Permission bits of a file or a directory."""
    modified_ns: int = 0
    """Of a file."""
    size: int = 0
    target: str = ""
    """Of a link."""


def split(image: str) -> tuple[str, tuple[str, ...]]:
    """The image to start from, and the layers to lay over it. ``ValueError`` for what names no layer."""
    base, *layers = image.split("+")
    if not base or not all(DIGEST.fullmatch(layer) for layer in layers):
        raise ValueError(
            f"SandboxSpec.image = {image!r}: expected the name of an image, then '+' and at least {PREFIX_DIGITS} "
            "hexadecimal digits for each layer, as Snapshot.image has it"
        )
    return base, tuple(layers)


def commit(image: str, digest: str) -> str:
    """The name of a snapshot of a box of this image. It holds all of the workdir, the image's own layers included."""
    return f"{split(image)[0]}+{digest[:PREFIX_DIGITS]}"


def find(digest: str) -> Path | None:
    """The layer whose SHA-256 begins so."""
    found = list(_folder().glob(f"{digest}*.tar"))
    return found[0] if len(found) == 1 else None


def put(tar: bytes) -> Snapshot:
    """Keep an uncompressed tar archive as a layer. ``ValueError`` names what may not be in one, or exceeds a cap."""
    with Draft() as draft:
        for node, pieces in members(io.BytesIO(tar)):
            draft.add(node)
            for piece in pieces:
                draft.feed(piece)
        return draft.keep()


def opened(digest: str) -> IO[bytes]:
    """The file of a layer. ``SandboxError`` when there is none, or it is not what it is named for."""
    path = find(digest)
    if path is None:
        raise SandboxError(
            f"no layer {digest!r} in {_folder()}; take the snapshot again, or copy the layer's file from where it was"
        )
    file = path.open("rb")
    if hashlib.file_digest(file, "sha256").hexdigest() != path.stem:
        file.close()
        raise SandboxError(f"{path}: not the bytes it is named for; delete it and take the snapshot again")
    file.seek(0)
    return file


class Draft:
    """A layer that is being written. Leaving the context without ``keep`` deletes it."""

    def __init__(self, *, max_entries: int = MAX_ENTRIES, max_bytes: int = MAX_BYTES) -> None:
        _folder().mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=PARTIAL, dir=_folder())
        self._path = Path(name)
        self._file = os.fdopen(fd, "wb")
        self._hash = hashlib.sha256()
        self._entries_left = max_entries
        self._bytes_left = max_bytes
        self._missing = 0
        """Content of the last file that is still to come."""
        self._num_files = self._num_bytes = 0

    def __enter__(self) -> Draft:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def add(self, node: Node) -> None:
        """Begin an entry. The content of a file follows through ``feed``, all of it."""
        self._entries_left -= 1
        self._bytes_left -= node.size
        if self._entries_left < 0 or self._bytes_left < 0:
            raise ValueError(f"{node.path[:80]!r}: with it the layer has more than max_entries or max_bytes allow")
        self._check_complete()
        self._write(_header(node))
        self._missing = node.size
        self._num_files += node.kind == "file"
        self._num_bytes += node.size

    def feed(self, data: bytes) -> None:
        if not data:
            return
        self._missing -= len(data)
        if self._missing < 0:
            raise ValueError("a file of the layer has more content than its size")
        self._write(data)
        if not self._missing:
            self._write(bytes(-self._file.tell() % tarfile.BLOCKSIZE))

    def keep(self) -> Snapshot:
        """Put the layer into the cache; on return it is on disk. One that is there already is not written twice."""
        self._check_complete()
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        digest = self._hash.hexdigest()
        target = _folder() / f"{digest}.tar"
        if not target.exists():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._path.rename(target)
            _sync(_folder())
        return Snapshot(digest=digest, num_files=self._num_files, num_bytes=self._num_bytes)

    def _check_complete(self) -> None:
        if self._missing:
            raise ValueError(f"a file of the layer lacks {self._missing} bytes of its size")

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)


def _folder() -> Path:
    return build.cache() / "layers"


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


KINDS = {"file": tarfile.REGTYPE, "directory": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "user": USER_TYPE}


def _header(node: Node) -> bytes:
    member = tarfile.TarInfo(_checked(node.path))
    member.type, member.mode, member.size, member.linkname = KINDS[node.kind], node.mode, node.size, node.target
    member.uname = node.owner
    seconds, nanoseconds = divmod(node.modified_ns, 10**9)
    member.mtime = seconds
    if nanoseconds:
        member.pax_headers = {"mtime": f"{seconds}.{nanoseconds:09d}"}
    return member.tobuf(tarfile.PAX_FORMAT, errors="surrogateescape")


def members(file: IO[bytes]) -> Iterator[tuple[Node, Iterator[bytes]]]:
    """The entries of a layer, each with its content in pieces, to be taken in order. Closes the file at the end."""
    users: set[str] = set()
    try:
        with file, tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive:
            for member in archive:
                node = _node(member, users)
                if node.kind == "user":
                    users.add(node.path)
                yield node, _content(archive, member)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"not an uncompressed tar archive: {error}") from error


def _node(member: tarfile.TarInfo, users: Set[str]) -> Node:
    if member.type == USER_TYPE and USER.fullmatch(member.name) and not member.size:
        return Node(path=member.name, kind="user")
    kind = "directory" if member.isdir() else "link" if member.issym() else "file"
    if kind == "file" and (not member.isreg() or member.issparse()):
        raise ValueError(f"{member.name[:80]!r}: expected a file, a directory or a symbolic link, nothing else")
    seconds, _, fraction = member.pax_headers.get("mtime", str(int(member.mtime))).partition(".")
    return Node(
        path=_checked(member.name),
        kind=kind,
        # Whoever packed an archive elsewhere is nobody in a box.
        owner=member.uname if member.uname in users else "",
        mode=member.mode & 0o777 if kind != "link" else 0,
        modified_ns=int(seconds) * 10**9 + int(f"{fraction:0<9.9}") if kind == "file" else 0,
        size=member.size if kind == "file" else 0,
        target=member.linkname if kind == "link" else "",
    )


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    stream = archive.extractfile(member) if member.isreg() else None
    while stream and (data := stream.read(PIECE_BYTES)):
        yield data


def _checked(name: str) -> str:
    path = "/".join(part for part in name.split("/") if part not in ("", "."))
    if name.startswith("/") or ".." in path.split("/") or "\0" in name or not path:
        raise ValueError(f"{name[:80]!r}: expected a path relative to the workdir, without '..'")
    return path
