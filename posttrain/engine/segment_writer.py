"""Writes the segments of one life of a journal, and makes them durable in the background.

A life is one opening of the journal: it starts new files and never touches those of an earlier one.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.engine.segments import Record, frame, header
from posttrain.runs.durable import sync_directory

log = logging.getLogger(__name__)

Durable = Callable[[], None]
Failed = Callable[[OSError], None]

_SYNC_EVERY_S = 1.0
"""How long records stay in the page cache at most when nobody waits for them."""
_NAME = re.compile(r"(?P<writer>[A-Za-z0-9_.-]+)-(?P<life>\d+)-(?P<number>\d+)\.tokens")
_LOCK_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class SegmentName:
    """Which segment a file is."""

    writer: str
    life: int
    number: int

    def __str__(self) -> str:
        return f"{self.writer}-{self.life}-{self.number}.tokens"

    @classmethod
    def of(cls, path: Path) -> SegmentName:
        found = _NAME.fullmatch(path.name)
        if found is None:
            raise ValueError(f"{path}: expected a name such as engine0-1-1.tokens; move the file elsewhere")
        return cls(found["writer"], int(found["life"]), int(found["number"]))


class SegmentWriter:
    """Appends records to the current segment. ``write`` and ``rotate`` are called by one thread at a time."""

    def __init__(self, folder: Path, *, writer: str, life: int, segment_bytes: int) -> None:
        self.name = SegmentName(writer, life, 1)
        self.size = 0
        """Bytes of the current segment; 0 until its first record, which creates the file."""
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._fd: int | None = None
        self._closed = False
        self._wake = threading.Condition()
        # Everything below is guarded by ``_wake``.
        self._failure: OSError | None = None
        self._waiting: list[tuple[Durable, Failed | None]] = []
        self._retired: list[int] = []
        self._unsynced: int | None = None
        self._folder_changed = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        return self.size >= self._segment_bytes

    def write(self, records: Sequence[Record]) -> None:
        """Add records with one system call. ``OSError`` from the first failure on, of this or of the disk behind it."""
        if self._closed:
            raise RuntimeError(f"the token journal in {self._folder} was closed; open it again to record more tokens")
        if self._failure is not None:
            raise self._failed(self._failure)
        offset = self.size
        parts = [] if offset else [header()]
        offset += sum(map(len, parts))
        for record in records:
            parts.append(frame(record, offset))
            offset += len(parts[-1])
        try:
            self._write(b"".join(parts))
        except OSError as error:
            # What was written of the record is a torn tail; nothing may follow it.
            with self._wake:
                self._failure = self._failure or error
                self._wake.notify()
            raise self._failed(error) from error
        self.size = offset
        with self._wake:
            self._unsynced = self._fd

    def rotate(self) -> None:
        """Start a new segment with the next record."""
        with self._wake:
            if self._fd is not None:
                self._retired.append(self._fd)
            self._fd = self._unsynced = None
        self.name = SegmentName(self.name.writer, self.name.life, self.name.number + 1)
        self.size = 0

    def when_durable(self, callback: Durable, failed: Failed | None = None) -> None:
        """See ``Journal.when_durable``. A callback may wait again even while the writer is being closed."""
        with self._wake:
            if self._stopping and threading.current_thread() is not self._thread:
                raise RuntimeError(f"the token journal in {self._folder} was closed; nothing can be waited for")
            self._waiting.append((callback, failed))
            self._wake.notify()

    def close(self) -> None:
        """Make everything durable, call back all who wait, and stop. Closing twice is allowed."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._closed = True
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self, data: bytes) -> None:
        if self._fd is None:
            path = self._folder / str(self.name)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            with self._wake:
                self._folder_changed = True
        written = os.write(self._fd, data)
        while written < len(data):
            # A full disk takes a part; the next call says why.
            written += os.write(self._fd, data[written:])

    def _failed(self, error: OSError) -> OSError:
        free = shutil.disk_usage(self._folder).free
        failure = OSError(
            error.errno,
            f"the token journal in {self._folder} failed: {error.strerror or error}, with {free} bytes free there; all "
            "that append returned for before is kept; free space or repair the disk, then open the journal again",
        )
        failure.__cause__ = error
        return failure

    def _run(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """One flush and those it makes happy. False when closed and nobody waits any more."""
        with self._wake:
            self._wake.wait_for(lambda: self._waiting or self._stopping, timeout=_SYNC_EVERY_S)
            waiting, self._waiting = self._waiting, []
            retired, self._retired = self._retired, []
            # Taken before the flush: what is written during it counts as not flushed.
            current, self._unsynced = self._unsynced, None
            changed, self._folder_changed = self._folder_changed, False
            failure, stopping = self._failure, self._stopping
        if failure is None:
            failure = self._flush(retired, current, changed)
        for fd in retired:
            os.close(fd)
        for callback, failed in waiting:
            self._call(callback, failed, failure)
        return bool(waiting) or not stopping

    def _flush(self, retired: Sequence[int], current: int | None, changed: bool) -> OSError | None:
        try:
            for fd in retired:
                os.fdatasync(fd)
            if current is not None:
                os.fdatasync(current)
            if changed:
                sync_directory(self._folder)
        except OSError as error:
            # The kernel reports a lost page once, so a second attempt would succeed falsely.
            with self._wake:
                self._failure = self._failure or error
            return error
        return None

    def _call(self, callback: Durable, failed: Failed | None, failure: OSError | None) -> None:
        try:
            if failure is None:
                callback()
            elif failed is not None:
                failed(self._failed(failure))
        except Exception:
            log.exception("a callback of the token journal in %s failed", self._folder)


class WriterLock:
    """Says that a writer is alive, for as long as its process is."""

    def __init__(self, folder: Path, writer: str) -> None:
        self._fd = os.open(_lock_path(folder, writer), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        # The process before this one may not have ended yet, or others be asking ``writer_alive``.
        while not _try_lock(self._fd):
            if time.monotonic() > deadline:
                os.close(self._fd)
                raise RuntimeError(
                    f"the token journal in {folder} is open for writer {writer!r} already; expected one process for "
                    "each writer; give this one another name, or end the other process"
                )
            time.sleep(0.01)

    def close(self) -> None:
        os.close(self._fd)


def writer_alive(folder: Path, writer: str) -> bool:
    """Whether a process has the journal open under this name."""
    try:
        fd = os.open(_lock_path(folder, writer), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(fd)
    finally:
        os.close(fd)


def _lock_path(folder: Path, writer: str) -> Path:
    return folder / f"{writer}.lock"


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
