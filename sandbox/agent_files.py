"""The whole workdir as it is, and back: a part of the agent that is sent when it is first needed.

``scan`` sends every directory, regular file and symbolic link, with permissions, the named user it belongs to, if any,
and, of files, times; before them it sends those users. ``lay`` puts such entries in place. Neither follows a link. A
file is sent with the size it had when it was opened, whatever writes to it meanwhile: what grew is cut off, what shrank
is filled up with zeros.
"""

from __future__ import annotations

import os
import stat

from sandbox.agent import (
    EVENT,
    MAX_DEPTH,
    OK,
    Agent,
    enter,
    make_folder,
    open_folder,
    pack,
    read_pieces,
    send,
    split,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from sandbox.agent import T

SCAN, LAY = 34, 35
FILE, FOLDER, LINK, USER, DATA = b"f", b"d", b"l", b"u", b""
BLOCK = 512
"""The unit of ``st_blocks``, on every file system."""


def install(agent: Agent) -> None:
    agent.handlers.update(
        {
            SCAN: lambda op, fields: scan(agent, op, int(fields[0]), int(fields[1])),
            LAY: lambda op, fields: lay(agent, op, fields),
        }
    )


def scan(agent: Agent, op: int, max_entries: int, max_bytes: int) -> None:
    """Send kind, path, owner, permissions, time in nanoseconds and size or target of each entry, and files' content."""
    for user in agent.users:
        send(op, EVENT, pack(USER, user, b"", 0, 0, b""))
    Scan(agent, op, max_entries, max_bytes).visit(agent.as_payload(lambda: open_folder(agent.workdir, [])), b"", 0)
    send(op, OK)


class Scan:
    """One walk through the workdir. What vanishes on the way is left out."""

    def __init__(self, agent: Agent, op: int, max_entries: int, max_bytes: int) -> None:
        self.agent = agent
        self.op = op
        self.entries_left = max_entries
        self.bytes_left = max_bytes
        self.names = {uid: user for user, uid in agent.users.items()}

    def visit(self, folder: int, prefix: bytes, depth: int) -> None:
        """Send what is in an open directory, sorted by name, and close it."""
        try:
            if depth > MAX_DEPTH:
                raise ValueError(f"directories nest deeper than {MAX_DEPTH}")
            owner = os.fstat(folder).st_uid
            for name in sorted(os.fsencode(name) for name in self._as(owner, lambda: os.listdir(folder))):
                path = prefix + b"/" + name if prefix else name
                try:
                    self._send_entry(folder, name, path, depth)
                except FileNotFoundError:
                    continue
                except PermissionError as error:
                    raise OSError(error.errno, f"{os.fsdecode(path)}: {error.strerror}") from error
        finally:
            os.close(folder)

    def _send_entry(self, folder: int, name: bytes, path: bytes, depth: int) -> None:
        found = self._as(os.fstat(folder).st_uid, lambda: os.stat(name, dir_fd=folder, follow_symlinks=False))
        self.entries_left -= 1
        if self.entries_left < 0:
            raise ValueError("the workdir has more than max_entries files and directories")
        mode, owner = stat.S_IMODE(found.st_mode) & 0o777, self.names.get(found.st_uid, b"")
        if stat.S_ISDIR(found.st_mode):
            inner = self._as(found.st_uid, lambda: enter(name, folder))
            send(self.op, EVENT, pack(FOLDER, path, owner, mode, 0, 0))
            self.visit(inner, path, depth + 1)
        elif stat.S_ISLNK(found.st_mode):
            target = self._as(os.fstat(folder).st_uid, lambda: os.readlink(name, dir_fd=folder))
            send(self.op, EVENT, pack(LINK, path, owner, 0, 0, target))
        elif stat.S_ISREG(found.st_mode):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = self._as(found.st_uid, lambda: os.open(name, flags, dir_fd=folder))
            try:
                self._send_file(fd, path)
            finally:
                os.close(fd)
        else:
            raise ValueError(f"{os.fsdecode(path)}: a device, socket or FIFO, which no snapshot keeps; delete it first")

    def _send_file(self, fd: int, path: bytes) -> None:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{os.fsdecode(path)}: it became something else than a regular file meanwhile")
        if found.st_blocks * BLOCK < found.st_size:
            raise ValueError(f"{os.fsdecode(path)}: a sparse file, which no snapshot keeps; copy it without holes")
        left = found.st_size
        self.bytes_left -= left
        if self.bytes_left < 0:
            raise ValueError(f"{os.fsdecode(path)}: with it, files are larger than the disk: holes or hard links")
        mode, owner = stat.S_IMODE(found.st_mode) & 0o777, self.names.get(found.st_uid, b"")
        send(self.op, EVENT, pack(FILE, path, owner, mode, found.st_mtime_ns, left))
        for data in read_pieces(fd, left):
            left -= len(data)
            send(self.op, EVENT, pack(DATA, data))
        while left:
            size = min(left, 1 << 20)
            left -= size
            send(self.op, EVENT, pack(DATA, bytes(size)))

    def _as(self, uid: int, action: Callable[[], T]) -> T:
        """Do something as the payload that owns a file or a directory, which a neighbour may not be allowed to."""
        ours = self.agent.first_uid <= uid <= self.agent.spare_uid or uid in self.names
        return self.agent.as_payload(action, uid if ours else self.agent.first_uid)


def lay(agent: Agent, op: int, fields: list[bytes]) -> None:
    """Put entries in place: kind, path, owner, permissions, time, size, offset, and content (a piece) or target."""
    rows = iter(fields)
    for kind, path, owner, *row in zip(*[rows] * 8, strict=True):
        if kind == USER:
            agent.uid_of(path)
        else:
            lay_as(agent, owner, kind, path, row)
    send(op, OK)


def lay_as(agent: Agent, owner: bytes, kind: bytes, path: bytes, row: list[bytes]) -> None:
    agent.as_payload(lambda: put(agent.workdir, kind, path, row), agent.uid_of(owner) if owner else 0)


def put(workdir: str, kind: bytes, path: bytes, row: list[bytes]) -> None:
    mode, modified_ns, size, offset = map(int, row[:4])
    *parts, name = split(path)
    folder = open_folder(workdir, parts)
    try:
        if kind == FOLDER:
            put_folder(folder, name, mode)
        elif kind == LINK:
            remove(folder, name)
            os.symlink(row[4], name, dir_fd=folder)
        else:
            put_file(folder, name, row[4], mode, modified_ns, size, offset)
    finally:
        os.close(folder)


def put_folder(folder: int, name: bytes, mode: int) -> None:
    make_folder(name, folder)
    inner = enter(name, folder)
    try:
        os.fchmod(inner, mode)
    finally:
        os.close(inner)


def put_file(folder: int, name: bytes, data: bytes, mode: int, modified_ns: int, size: int, offset: int) -> None:
    """Write a piece of a file; with the last one it gets its permissions and its time."""
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    if offset == 0:
        remove(folder, name)
        flags |= os.O_CREAT | os.O_EXCL
    fd = os.open(name, flags, 0o600, dir_fd=folder)
    try:
        os.lseek(fd, offset, os.SEEK_SET)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        if offset + len(data) == size:
            os.fchmod(fd, mode)
            os.utime(fd, ns=(modified_ns, modified_ns))
    finally:
        os.close(fd)


def remove(folder: int, name: bytes) -> None:
    """Make room for what replaces a file or a link."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return
