"""The trajectory log: what was asked of one box and what came of it, kept so that no crash can make it lie.

A folder holds ``records`` (append-only, one record per line, then zeros in reserve while it is written to), ``epoch``
(who may write) and ``blobs/`` (payloads above 32 KiB, by content hash). A line is the CRC of a JSON object and that
object, which names its place (``seq``, without gaps) and the hash of the line before it, so that neither damage nor an
edit in the middle passes unnoticed. ``append`` returns when the record is written, and on disk unless told not to wait.

Writing is fenced: opening a log claims a higher epoch, and from then on whoever held it before gets ``Fenced``.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from posttrain.errors import SandboxError

INLINE_BYTES = 32 << 10
"""A payload above this goes into a file of its own."""
RESERVE_BYTES = 64 << 10
"""The file grows by this much, in zeros: a record that changes no length reaches the disk in two thirds of the time."""
GENESIS = "0" * 64
"""What the first record names as the hash before it."""
TEMPORARY = ".tmp-"


class Fenced(SandboxError):
    """Someone with a higher epoch has taken this log over; nothing more is accepted from the holder of the old one."""

    def __init__(self, what: str, held: int, current: int) -> None:
        super().__init__(f"{what}: epoch {held} is stale, epoch {current} holds it now; attach again to take it back")
        self.what = what
        self.held = held
        self.current = current

    def __reduce__(self) -> tuple[type[Fenced], tuple[str, int, int]]:
        return Fenced, (self.what, self.held, self.current)


class LogDamaged(SandboxError):
    """A log that was whole is not any more: changed, shortened in the middle, or missing a blob."""


class RecordKind(StrEnum):
    CREATE = "create"
    INTENT = "intent"
    RESULT = "result"
    SNAPSHOT = "snapshot"
    PAUSE = "pause"
    RESUME = "resume"
    LOST = "lost"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class Blob:
    """A payload kept in a file of its own; ``TrajectoryLog.content`` reads it."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One line of a log."""

    seq: int
    kind: RecordKind
    epoch: int
    time_s: float
    """Seconds since 1970, for the reader; nothing is decided by it."""
    data: Mapping[str, Any]
    """What JSON knows, and ``bytes`` or ``Blob``."""


@dataclass(slots=True, kw_only=True)
class Operation:
    """One INTENT and where its RESULT is. Its number is the INTENT's ``seq``."""

    seq: int
    op_id: str
    kind: str
    idempotent: bool
    result: int | None = None
    """``seq`` of the RESULT; None while it runs, and for ever when that was cut short."""


class TrajectoryLog:
    """The log of one box. Made by ``create``, ``open`` (to go on with it) or ``read`` (to look)."""

    def __init__(self, folder: Path, *, writable: bool) -> None:
        self.folder = folder
        self.epoch = 0
        self.operations: list[Operation] = []
        self.snapshots: list[Record] = []
        self.ended: Record | None = None
        """The LOST or CLOSE record; after it no operation starts."""
        self._by_seq: dict[int, Operation] = {}
        self._offsets: list[int] = []
        self._end = self._reserved = 0
        self._previous = GENESIS
        self._broken = ""
        self._epoch_fd = os.open(folder / "epoch", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) if writable else -1
        try:
            flags = os.O_RDWR if writable else os.O_RDONLY
            self._fd = os.open(folder / "records", flags | os.O_CLOEXEC)
        except BaseException:
            self._close_epoch()
            raise

    @classmethod
    def create(cls, folder: Path, data: Mapping[str, Any]) -> TrajectoryLog:
        """A new log whose CREATE record holds ``data``. ``FileExistsError`` when there is one already."""
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        os.close(os.open(folder / "records", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        log = cls(folder, writable=True)
        log.claim(1)
        for made in (folder, folder.parent):
            _sync_directory(made)
        log.append(RecordKind.CREATE, data)
        return log

    @classmethod
    def open(cls, folder: Path, *, epoch: int | None = None) -> TrajectoryLog:
        """Go on with a log, claiming ``epoch`` (default: the next). A torn tail is cut off.

        Raises ``Fenced`` when ``epoch`` is not above the current one, ``LogDamaged`` when a record is not what was
        written, ``FileNotFoundError`` when there is no log.
        """
        log = cls(folder, writable=True)
        try:
            # Claimed before reading: from here on nobody else can append.
            log.claim(epoch)
            log._scan(repair=True)
        except BaseException:
            log.close()
            raise
        return log

    @classmethod
    def read(cls, folder: Path) -> TrajectoryLog:
        """Look at a log, whoever writes to it; a torn tail is left out. ``append`` raises."""
        log = cls(folder, writable=False)
        try:
            log._scan(repair=False)
        except BaseException:
            log.close()
            raise
        return log

    def __len__(self) -> int:
        return len(self._offsets)

    def claim(self, epoch: int | None = None) -> int:
        """Become the only writer, with ``epoch`` or the next one. Raises ``Fenced`` when it is not the highest."""
        with self._locked():
            current = self._current_epoch()
            wanted = current + 1 if epoch is None else epoch
            if wanted <= current:
                raise Fenced(f"log {self.folder}", wanted, current)
            os.pwrite(self._epoch_fd, b"%020d\n" % wanted, 0)
            os.fsync(self._epoch_fd)
            self.epoch = wanted
        return wanted

    def check_epoch(self, epoch: int) -> None:
        """Raise ``Fenced`` when ``epoch`` is not the one this log was last claimed with, here."""
        if epoch != self.epoch:
            raise Fenced(f"log {self.folder}", epoch, self.epoch)

    def append(self, kind: RecordKind, data: Mapping[str, Any], *, sync: bool = True) -> Record:
        """Add a record; on return it is on disk, with all that were added before it.

        One added without ``sync`` outlives this process, but not a host that goes down before the next that is synced.
        Raises ``Fenced`` when the log has a new holder and ``SandboxError`` when it cannot be written. A full disk adds
        nothing and may be tried again; after a failure of the disk the log must be opened again.
        """
        if self._broken:
            raise SandboxError(self._broken)
        with self._locked():
            current = self._current_epoch()
            if current != self.epoch:
                raise Fenced(f"log {self.folder}", self.epoch, current)
            record = Record(seq=len(self._offsets), kind=kind, epoch=self.epoch, time_s=time.time(), data=data)
            try:
                line = _line(record, self._previous, encode(data, self._put_blob))
                self._write(line, sync)
            except OSError as error:
                raise SandboxError(f"log {self.folder}: record {record.seq} could not be written: {error}") from error
        self._note(record, line)
        return record

    def record(self, seq: int) -> Record:
        """One record, read from disk. ``IndexError`` when there is none."""
        begin = self._offsets[seq]
        end = self._offsets[seq + 1] if seq + 1 < len(self._offsets) else self._end
        return self._parse(os.pread(self._fd, end - begin, begin), seq, begin)

    def content(self, payload: bytes | Blob) -> bytes:
        """The bytes of a payload. ``LogDamaged`` when its file is gone or does not match its name."""
        if isinstance(payload, bytes):
            return payload
        path = self.folder / "blobs" / payload.digest
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise LogDamaged(f"{path}: the file is gone; expected {payload.size} bytes named by their hash") from error
        if hashlib.sha256(data).hexdigest() != payload.digest:
            raise LogDamaged(f"{path}: {len(data)} bytes that are not those it is named for; restore it from a copy")
        return data

    def resolve(self, value: Any) -> Any:
        """The same value with every ``Blob`` replaced by its bytes."""
        if isinstance(value, Blob):
            return self.content(value)
        if isinstance(value, Mapping):
            return {key: self.resolve(item) for key, item in value.items()}
        return [self.resolve(item) for item in value] if isinstance(value, list) else value

    def close(self) -> None:
        """Let go of the files."""
        if self._fd >= 0:
            with contextlib.suppress(SandboxError):
                self._give_back()
            os.close(self._fd)
            self._fd = -1
        self._close_epoch()
        self._broken = f"log {self.folder}: closed"

    def _give_back(self) -> None:
        with self._locked():
            if self._reserved > self._end and self._current_epoch() == self.epoch:
                os.ftruncate(self._fd, self._end)

    def _close_epoch(self) -> None:
        if self._epoch_fd >= 0:
            os.close(self._epoch_fd)
            self._epoch_fd = -1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if self._epoch_fd < 0:
            raise SandboxError(f"log {self.folder}: opened to be read; TrajectoryLog.open makes it writable")
        fcntl.flock(self._epoch_fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._epoch_fd, fcntl.LOCK_UN)

    def _current_epoch(self) -> int:
        # An empty file is a claim that a power cut undid: nothing was written under it.
        return int(os.pread(self._epoch_fd, 32, 0) or 0)

    def _write(self, line: bytes, sync: bool) -> None:
        try:
            end = self._end + len(line)
            if end > self._reserved:
                self._put(bytes(end + RESERVE_BYTES - self._reserved), self._reserved)
                self._reserved = end + RESERVE_BYTES
            self._put(line, self._end)
        except OSError:
            self._broken = f"log {self.folder}: a record was written in part and could not be taken back"
            os.ftruncate(self._fd, self._end)
            self._reserved = self._end
            self._broken = ""
            raise
        if not sync:
            return
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            # The kernel may have dropped the pages: what is on disk is known only by reading it again.
            self._broken = f"log {self.folder}: the disk failed ({error}); open the log again"
            raise

    def _put(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            size = os.pwrite(self._fd, view, offset)
            view, offset = view[size:], offset + size

    def _put_blob(self, data: bytes) -> Blob:
        blob = Blob(hashlib.sha256(data).hexdigest(), len(data))
        folder = self.folder / "blobs"
        path = folder / blob.digest
        if path.exists():
            return blob
        fd, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(fd)
            Path(name).rename(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_directory(folder)
        return blob

    def _scan(self, *, repair: bool) -> None:
        named: set[str] = set()
        with open(self._fd, "rb", closefd=False) as file:
            for line in file:
                if not line.endswith(b"\n") or (b"\0" in line and not file.read().strip(b"\0")):
                    # The reserve, or a write cut short: zeros stand for what never reached the disk.
                    break
                record = self._parse(line, len(self._offsets), self._end, self._previous)
                self._note(record, line)
                named.update(blob.digest for blob in _blobs(record.data))
        if not self._offsets:
            raise LogDamaged(f"{self.folder / 'records'}: no CREATE record; the box was never made, delete the folder")
        if repair:
            self._repair(named)

    def _repair(self, named: set[str]) -> None:
        """Cut off a torn tail, and delete the payloads of records that were never written."""
        if os.fstat(self._fd).st_size > self._end:
            os.ftruncate(self._fd, self._end)
            os.fsync(self._fd)
        self._reserved = self._end
        for path in (self.folder / "blobs").iterdir():
            if path.name not in named:
                path.unlink()

    def _parse(self, line: bytes, seq: int, offset: int, previous: str | None = None) -> Record:
        where = f"{self.folder / 'records'}, record {seq} at byte {offset}"
        crc, _, text = line.rstrip(b"\n").partition(b" ")
        if crc != b"%08x" % zlib.crc32(text):
            raise LogDamaged(f"{where}: its CRC does not match; restore the file from a copy, or begin the box anew")
        fields = json.loads(text)
        if fields["seq"] != seq:
            raise LogDamaged(f"{where}: seq = {fields['seq']}, expected {seq}; records are missing before it")
        if previous is not None and fields["prev"] != previous:
            raise LogDamaged(f"{where}: prev = {fields['prev']!r}, expected {previous!r}; a record before it changed")
        return Record(
            seq=seq,
            kind=RecordKind(fields["kind"]),
            epoch=fields["epoch"],
            time_s=fields["time_s"],
            data=decode(fields["data"]),
        )

    def _note(self, record: Record, line: bytes) -> None:
        self._offsets.append(self._end)
        self._end += len(line)
        self._previous = hashlib.sha256(line).hexdigest()
        data = record.data
        if record.kind is RecordKind.INTENT:
            operation = Operation(
                seq=record.seq,
                op_id=data["op_id"],
                kind=data["kind"],
                idempotent=data["idempotent"],
            )
            self.operations.append(operation)
            self._by_seq[record.seq] = operation
        elif record.kind is RecordKind.RESULT:
            assert data["intent"] in self._by_seq, f"a RESULT for record {data['intent']}, which is no INTENT"
            self._by_seq[data["intent"]].result = record.seq
        elif record.kind is RecordKind.SNAPSHOT:
            self.snapshots.append(record)
        elif record.kind in (RecordKind.LOST, RecordKind.CLOSE):
            self.ended = record


def encode(value: Any, put_blob: Callable[[bytes], Blob] | None = None) -> Any:
    """The same value in what JSON knows. Bytes become text, or go to ``put_blob`` when they are many."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, bytes) and put_blob and len(value) > INLINE_BYTES:
        value = put_blob(value)
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, Blob):
        return {"$blob": [value.digest, value.size]}
    if isinstance(value, list | tuple):
        return [encode(item, put_blob) for item in value]
    if isinstance(value, Mapping):
        return {"$" + key if key[:1] == "$" else key: encode(item, put_blob) for key, item in value.items()}
    return value


def decode(value: Any) -> Any:
    """The inverse of ``encode``, with lists for tuples."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$bytes" in value:
        return base64.b64decode(value["$bytes"])
    if "$blob" in value:
        return Blob(*value["$blob"])
    return {key[1:] if key[:1] == "$" else key: decode(item) for key, item in value.items()}


def _blobs(value: Any) -> Iterator[Blob]:
    if isinstance(value, Blob):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _blobs(item)


_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def _line(record: Record, previous: str, data: Any) -> bytes:
    fields = {"seq": record.seq, "kind": record.kind, "epoch": record.epoch, "time_s": record.time_s, "prev": previous}
    text = _json.encode({**fields, "data": data}).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
