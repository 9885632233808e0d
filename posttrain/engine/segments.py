"""The file format of the token journal: segments of checked records, little-endian, append-only.

A segment is a header (magic, format version, CRC) and records. A record is a marker, its kind, the length of its
payload, a CRC and the payload; the CRC also covers kind, length and the record's place in the file. Kinds:

- BEGIN names a request and the slot (a number within the segment) that later records call it by.
- STEP holds what many requests gained in one write: 32-bit columns, first per request, then per token.
- COPY is a STEP that repeats what another segment held, so its tokens count as recorded once.
- FORGET makes void every request begun until then whose id starts with a prefix.

A segment can be read without any other. A record cut short by a crash is where reading stops; a record that does not
check although a valid one follows is damage.

Shape letters: ``R`` requests of a record, ``N`` tokens.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from posttrain.types import FinishReason, FloatArray, IntArray

FORMAT_VERSION = 1
_MAGIC = b"PTTOKENS"
_HEADER = struct.Struct("<8sII")
_MARKER = b"\xa7TR\xe5"
_RECORD = struct.Struct("<4sIII")
_BEGIN = struct.Struct("<IQ16s")
_FORGET = struct.Struct("<Q")
DIGEST_BYTES = 16

FINISH_CODES: dict[FinishReason | None, int] = {None: 0, FinishReason.STOP: 1, FinishReason.LENGTH: 2}
_FINISHES = {code: reason for reason, code in FINISH_CODES.items() if reason is not None}


class Kind(IntEnum):
    BEGIN = 1
    STEP = 2
    COPY = 3
    FORGET = 4


Record = tuple[Kind, bytes]


@dataclass(frozen=True, slots=True)
class Begin:
    """Which request a slot stands for. ``stamp`` orders it among the forgets of all writers."""

    id: str
    digest: bytes
    stamp: int


@dataclass(frozen=True, slots=True)
class Columns:
    """Tokens of one request, or of many before they are told apart. All arrays have shape [N]."""

    positions: IntArray
    tokens: IntArray
    versions: IntArray
    logprobs: FloatArray
    kept: npt.NDArray[np.object_]
    """What truncated sampling chose from, an ``IntArray`` or None per token."""
    copied: npt.NDArray[np.bool_]
    """Whether the token was repeated from another segment."""

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: npt.NDArray[np.intp] | npt.NDArray[np.bool_] | slice) -> Columns:
        return Columns(*(getattr(self, name)[index] for name in Columns.__slots__))

    @classmethod
    def join(cls, parts: Sequence[Columns]) -> Columns:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))


@dataclass(slots=True)
class Part:
    """What one segment holds of one request. A finish counts at the length it was recorded with."""

    begin: Begin
    columns: Columns
    finishes: dict[int, FinishReason] = field(default_factory=dict)


@dataclass(slots=True)
class Content:
    """What a segment holds."""

    size: int
    """Bytes of the file when it was read."""
    torn_bytes: int
    """Bytes after the last whole record."""
    parts: list[Part]
    forgets: dict[str, int]
    """By prefix, the stamp of the last forget."""


def header() -> bytes:
    """The first bytes of a segment."""
    return _HEADER.pack(_MAGIC, FORMAT_VERSION, zlib.crc32(_MAGIC + struct.pack("<I", FORMAT_VERSION)))


def frame(record: Record, offset: int) -> bytes:
    """A record as it is written at this offset of its file."""
    kind, payload = record
    return _RECORD.pack(_MARKER, kind, len(payload), _checksum(kind, payload, offset)) + payload


def begin_record(slot: int, begin: Begin) -> Record:
    return Kind.BEGIN, _BEGIN.pack(slot, begin.stamp, begin.digest) + begin.id.encode()


def forget_record(prefix: str, stamp: int) -> Record:
    return Kind.FORGET, _FORGET.pack(stamp) + prefix.encode()


def tokens_record(
    kind: Kind,
    requests: Sequence[Sequence[int]],
    *,
    tokens: Sequence[int],
    versions: Sequence[int],
    logprobs: Sequence[float],
    kept: Sequence[IntArray | None],
) -> Record:
    """A STEP or a COPY. The columns in ``requests`` have one entry per request [R], the others one per token [N].

    They are slots, the positions of the first token here, the numbers of tokens, and ``FINISH_CODES``.
    """
    lengths: list[int] = []
    ids = b""
    if any(row is not None for row in kept):
        lengths = [-1 if row is None else len(row) for row in kept]
        ids = b"".join([np.asarray(row, "<i4").tobytes() for row in kept if row is not None])
    slots, positions, counts, finishes = requests
    num_requests, num_tokens = len(slots), len(tokens)
    num_ints = 3 + 4 * num_requests + 2 * num_tokens + len(lengths)
    payload = struct.pack(
        f"<{num_ints}i{num_tokens}f",
        *(num_requests, num_tokens, len(lengths)),
        *slots,
        *positions,
        *counts,
        *finishes,
        *tokens,
        *versions,
        *lengths,
        *logprobs,
    )
    return kind, payload + ids


def token_bytes(kept: Sequence[IntArray | None]) -> int:
    """About how many bytes a COPY takes for tokens with these kept sets."""
    return 12 * len(kept) + sum(4 * len(row) for row in kept if row is not None)


def read_segment(path: Path) -> Content:
    """Everything in a segment up to a torn tail; on return the disk has it.

    ``FileNotFoundError``; ``ValueError`` naming file and offset for damage and for a format of another version.
    """
    with path.open("rb") as file:
        data = file.read()
        # Its writer may have had no time to, and what others record next follows from it.
        os.fdatasync(file.fileno())
    records, end = _records(path, data)
    begins: dict[int, Begin] = {}
    forgets: dict[str, int] = {}
    steps: list[tuple[Kind, bytes]] = []
    for kind, payload in records:
        if kind is Kind.BEGIN:
            slot, stamp, digest = _BEGIN.unpack_from(payload)
            begins[slot] = Begin(payload[_BEGIN.size :].decode(), digest, stamp)
        elif kind is Kind.FORGET:
            (stamp,) = _FORGET.unpack_from(payload)
            prefix = payload[_FORGET.size :].decode()
            forgets[prefix] = max(stamp, forgets.get(prefix, 0))
        else:
            steps.append((kind, payload))
    return Content(len(data), len(data) - end, _parts(begins, steps), forgets)


def _checksum(kind: int, payload: bytes, offset: int) -> int:
    place = struct.pack("<IIQ", kind, len(payload), offset)
    return zlib.crc32(payload, zlib.crc32(place))


def _records(path: Path, data: bytes) -> tuple[list[Record], int]:
    """All records, and the offset where they end."""
    offset = _header_end(path, data)
    records: list[Record] = []
    while offset < len(data):
        record = _record_at(data, offset)
        if record is None:
            _raise_if_damaged(path, data, offset)
            break
        records.append(record)
        offset += _RECORD.size + len(record[1])
    return records, offset


def _header_end(path: Path, data: bytes) -> int:
    if data.startswith(header()):
        return _HEADER.size
    _raise_if_damaged(path, data, 0)
    if len(data) >= _HEADER.size:
        magic, version, crc = _HEADER.unpack_from(data)
        if magic == _MAGIC and crc == zlib.crc32(_MAGIC + struct.pack("<I", version)):
            raise ValueError(
                f"{path}: token journal format {version}; expected {FORMAT_VERSION}; read it with the program that "
                "wrote it, or delete the file to generate its tokens again"
            )
    # The header was cut short, and with it all that was to follow.
    return len(data)


def _record_at(data: bytes, offset: int) -> Record | None:
    if len(data) - offset < _RECORD.size:
        return None
    marker, kind, length, crc = _RECORD.unpack_from(data, offset)
    start = offset + _RECORD.size
    if marker != _MARKER or kind not in Kind.__members__.values() or start + length > len(data):
        return None
    payload = data[start : start + length]
    return (Kind(kind), payload) if _checksum(kind, payload, offset) == crc else None


def _raise_if_damaged(path: Path, data: bytes, offset: int) -> None:
    """A tear has nothing behind it; where a whole record follows, what does not check was changed later."""
    following = data.find(_MARKER, offset + 1)
    while following >= 0:
        if _record_at(data, following) is not None:
            raise ValueError(
                f"{path}, offset {offset}: damaged record, although a whole one follows at offset {following}; "
                "expected records that match their checksums; check the disk, and delete the file to generate "
                "its tokens again"
            )
        following = data.find(_MARKER, following + 1)


def _parts(begins: dict[int, Begin], steps: Sequence[Record]) -> list[Part]:
    if not steps:
        return []
    slots: list[IntArray] = []
    columns: list[Columns] = []
    finishes: dict[int, dict[int, FinishReason]] = {}
    for kind, payload in steps:
        slots_N, part = _decode(kind, payload, finishes)
        slots.append(slots_N)
        columns.append(part)
    slots_N, joined = np.concatenate(slots), Columns.join(columns)
    order = np.argsort(slots_N, kind="stable")
    known, starts = np.unique(slots_N[order], return_index=True)
    runs = np.split(order, starts[1:]) if len(order) else []
    spans = {int(slot): run for slot, run in zip(known, runs, strict=True)}
    none = order[:0]
    return [
        Part(begins[slot], joined.take(spans.get(slot, none)), finishes.get(slot, {}))
        for slot in sorted({*spans, *finishes})
    ]


def _decode(kind: Kind, payload: bytes, finishes: dict[int, dict[int, FinishReason]]) -> tuple[IntArray, Columns]:
    """The slot of each token [N] and the tokens; what finished is added to ``finishes``: slot -> length -> reason."""
    words = np.frombuffer(payload, "<i4")
    num_requests, num_tokens, num_lengths = words[:3].tolist()
    sizes = [3, *[num_requests] * 4, num_tokens, num_tokens, num_lengths, num_tokens]
    edges = np.cumsum(sizes)
    _, slots_R, firsts_R, counts_R, codes_R, tokens_N, versions_N, lengths, logprobs_N, ids = np.split(words, edges)
    for row in np.flatnonzero(codes_R).tolist():
        length = int(firsts_R[row] + counts_R[row])
        finishes.setdefault(int(slots_R[row]), {})[length] = _FINISHES[int(codes_R[row])]
    starts_R = np.cumsum(counts_R, dtype=np.int32) - counts_R
    columns = Columns(
        positions=np.repeat(firsts_R - starts_R, counts_R) + np.arange(num_tokens, dtype=np.int32),
        tokens=tokens_N,
        versions=versions_N,
        logprobs=logprobs_N.view("<f4"),
        kept=_kept_rows(num_tokens, lengths, ids),
        copied=np.full(num_tokens, kind is Kind.COPY),
    )
    return np.repeat(slots_R, counts_R), columns


def _kept_rows(num_tokens: int, lengths: IntArray, ids: IntArray) -> npt.NDArray[np.object_]:
    rows = np.full(num_tokens, None, object)
    end = 0
    for token, length in enumerate(lengths.tolist()):
        if length >= 0:
            rows[token] = ids[end : end + length]
            end += length
    return rows
