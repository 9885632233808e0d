"""Trees of files on their way into a box and out of it, as mappings or tar archives.

The host never opens a path that a box could write to: it only reads archives that are in memory, and the agent writes
and reads the files. An archive is refused, not repaired: one that holds anything but regular files and directories
with plain relative names is not what it seems to be.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sandbox.agent import MAX_DEPTH

MAX_ENTRIES = 10_000
MAX_BYTES = 64 << 20
SET_ID_AND_STICKY = 0o7000


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One regular file of a tree."""

    path: str
    data: bytes
    executable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What is known of something below a directory of a box. Links are described, not followed."""

    path: str
    kind: str
    """``file``, ``directory``, ``link`` or ``other``."""
    size: int
    mode: int
    """Permission bits."""
    modified_s: float


def read_files(source: Mapping[str, bytes] | bytes, *, max_entries: int, max_bytes: int) -> list[File]:
    """The files of a mapping or of an uncompressed tar archive. ``ValueError`` names what may not be in it."""
    if isinstance(source, bytes | bytearray | memoryview):
        files = list(_read_tar(bytes(source), max_entries, max_bytes))
    else:
        files = [File(path=path, data=bytes(data)) for path, data in source.items()]
    if len(files) > max_entries:
        raise ValueError(f"{len(files)} files are more than max_entries={max_entries}")
    if sum(len(file.data) for file in files) > max_bytes:
        raise ValueError(f"the files hold more than max_bytes={max_bytes}")
    seen: set[str] = set()
    for file in files:
        if len(file.path.split("/")) > MAX_DEPTH:
            raise ValueError(f"{file.path[:80]!r}: directories nest deeper than {MAX_DEPTH}")
        if file.path in seen:
            raise ValueError(f"{file.path!r} is there twice")
        seen.add(file.path)
    return files


def _read_tar(data: bytes, max_entries: int, max_bytes: int) -> Iterator[File]:
    count = left = 0
    left = max_bytes
    try:
        # "r:" takes no compression, so that what comes out is no more than what went in.
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                count += 1
                if count > max_entries:
                    raise ValueError(f"the archive has more than max_entries={max_entries} members")
                _check_member(member, left)
                if not member.isdir():
                    content = _read_member(archive, member)
                    left -= len(content)
                    yield File(path=_plain(member.name), data=content, executable=bool(member.mode & 0o100))
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise ValueError(f"not an uncompressed tar archive: {error}") from error


def _check_member(member: tarfile.TarInfo, left: int) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise ValueError(f"{name[:80]!r}: expected a name relative to the directory, without '..'")
    if not (member.isdir() or member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)) or member.issparse():
        raise ValueError(f"{name[:80]!r}: expected a regular file or a directory, not a link, device or sparse file")
    if member.mode & SET_ID_AND_STICKY and not member.isdir():
        raise ValueError(f"{name[:80]!r}: mode {member.mode:o} has setuid, setgid or sticky bits")
    if not 0 <= member.size <= left:
        raise ValueError(f"{name[:80]!r}: with it, the files hold more than max_bytes")


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    content = stream.read(member.size + 1) if stream else b""
    if len(content) != member.size:
        raise ValueError(f"{member.name[:80]!r}: its header says {member.size} bytes and it has {len(content)}")
    return content


def _plain(name: str) -> str:
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def write_tar(files: Mapping[str, bytes]) -> bytes:
    """The files as an archive that depends on nothing but names and contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path, data in sorted(files.items()):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
