"""A token journal in a folder of segment files, shared by the engines of a run."""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from posttrain.engine.gains import Gains
from posttrain.engine.held import Held, Span, digest, span_of
from posttrain.engine.journal import Progress
from posttrain.engine.segment_writer import SegmentName, SegmentWriter, WriterLock, writer_alive
from posttrain.engine.segments import (
    FINISH_CODES,
    Begin,
    Content,
    Kind,
    Part,
    Record,
    begin_record,
    forget_record,
    read_segment,
    tokens_record,
)
from posttrain.runs.durable import sync_directory
from posttrain.types import Request

_FORGOTTEN = -2
"""Slot of a request whose tokens may no longer be recorded."""
_COMPACT_BELOW = 0.25
"""Share of a segment's bytes below which what is still wanted moves to the current segment."""

Key = tuple[str, bytes]


@dataclass(slots=True, eq=False)
class _Segment:
    """A segment that gets no more records from this process."""

    path: Path
    size: int
    spans: dict[Held, Span] = field(default_factory=dict)
    stamps: list[tuple[str, int]] = field(default_factory=list)
    """Id and stamp of every request in it, forgotten or not."""
    forgets: dict[str, int] = field(default_factory=dict)


class FileJournal:
    """Implements ``posttrain.engine.journal.Journal``.

    Each process that writes has a name of its own: a second one under the same name gets a ``RuntimeError``. All of
    them share the folder: opening reads what every writer has recorded, and ``begin`` looks again for what writers that
    have died since left, so that a request is resumed by whichever engine gets it next. A request that a living engine
    is working on must not be given to another: the next opening raises ``ValueError`` if their tokens differ.
    ``forget`` is for the writer that is told; tell every journal in use.

    Opening raises ``ValueError`` for a damaged file. A torn last record is left out and counted.
    """

    def __init__(self, folder: Path, *, writer: str, segment_bytes: int = 64 << 20) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", writer):
            raise ValueError(f"writer = {writer!r}: expected letters, digits, '_', '.' and '-'; name it as in engine-0")
        if segment_bytes < 1:
            raise ValueError(f"segment_bytes = {segment_bytes}: expected at least 1; leave it out for 64 MiB")
        self.duplicates = 0
        """Tokens that were recorded twice with the same value, as far as this journal has read."""
        self.torn_bytes = 0
        """Bytes after the last whole record of the segments it has read, which were cut short by a crash."""
        self._folder = folder
        self._lock = threading.RLock()
        # Everything below is guarded by ``_lock``.
        self._held: dict[Key, Held] = {}
        self._slots = itertools.count()
        self._by_slot: dict[int, Held] = {}
        self._stamp = 0
        self._forgets: dict[str, int] = {}
        self._segments: dict[Path, _Segment] = {}
        self._declared: dict[int, Progress | None] = {}
        """By slot, the requests that the current segment names."""
        folder.mkdir(parents=True, exist_ok=True)
        self._alive = WriterLock(folder, writer)
        try:
            self._read_all()
            lives = [name.life for name in map(SegmentName.of, self._segments) if name.writer == writer]
            self._writer = SegmentWriter(
                folder, writer=writer, life=max(lives, default=0) + 1, segment_bytes=segment_bytes
            )
        except BaseException:
            self._alive.close()
            raise
        self._current = self._new_segment()
        self._drop_gaps()

    def begin(self, request: Request) -> Progress:
        """See ``Journal.begin``. A request that was begun and not forgotten gives the same object again."""
        key = (request.id, digest(request))
        with self._lock:
            held = self._held.get(key)
            if held is None or held.progress is None:
                self._read_the_dead()
                held = self._held.get(key)
            if held is None:
                held = self._held[key] = Held(Begin(*key, stamp=self._now()))
            if held.progress is None:
                slot = self._slot(held)
                held.start(request, slot)
                if slot in self._declared:
                    self._declared[slot] = held.progress
            assert held.progress is not None
            return held.progress

    def append(self, rows: Sequence[Progress]) -> None:
        """See ``Journal.append``. Raises ``ValueError`` for rows of another journal."""
        with self._lock:
            if self._writer.full:
                self._rotate()
            gained = Gains([row for row in dict.fromkeys(rows) if row.slot != _FORGOTTEN])
            if not all(gained.counts):
                gained = Gains(self._changed(gained))
            if not gained.rows:
                return
            declared, step = self._declared, gained.record()
            unnamed = [self._of(row) for row in gained.rows if declared.get(row.slot) is not row]
            begins = [self._declare(held, held.recorded) for held in unnamed]
            self._writer.write([*begins, step])
            for row, size in zip(gained.rows, gained.sizes, strict=True):
                row.recorded = size
                if row.finish is not None:
                    self._of(row).finish = row.finish

    def when_durable(self, callback: Callable[[], None], failed: Callable[[OSError], None] | None = None) -> None:
        """See ``Journal.when_durable``."""
        self._writer.when_durable(callback, failed)

    def forget(self, prefix: str) -> None:
        """See ``Journal.forget``. Files are removed or rewritten in the background once this is on the disk."""
        with self._lock:
            stamp = self._now()
            self._write([forget_record(prefix, stamp)])
            self._forgets[prefix] = self._current.forgets[prefix] = stamp
            for key in [key for key in self._held if key[0].startswith(prefix)]:
                self._drop(self._held.pop(key))
        self._writer.when_durable(self._clean)

    def close(self) -> None:
        """Bring everything to the disk, call back all who wait, and let another process have the writer's name."""
        self._writer.close()
        self._alive.close()

    def _now(self) -> int:
        # Wall-clock time, but later than all that was read: it orders the forgets and begins of different processes.
        self._stamp = max(time.time_ns(), self._stamp + 1)
        return self._stamp

    # Reading.

    def _read_all(self) -> None:
        while True:
            paths = sorted(self._folder.glob("*.tokens"))
            try:
                contents = {path: read_segment(path) for path in paths}
            except FileNotFoundError:
                # Another writer moved what was in it to a segment that may have been read before.
                continue
            return self._take_in(contents)

    def _read_the_dead(self) -> None:
        """Read what has been written since by writers that live no more."""
        while True:
            try:
                changed = [path for path in sorted(self._folder.glob("*.tokens")) if self._left_behind(path)]
                contents = {path: read_segment(path) for path in changed}
            except FileNotFoundError:
                continue
            return self._take_in(contents) if contents else None

    def _left_behind(self, path: Path) -> bool:
        name, known = SegmentName.of(path), self._segments.get(path)
        if name.writer == self._writer.name.writer or (known and known.size == path.stat().st_size):
            return False
        return not writer_alive(self._folder, name.writer)

    def _take_in(self, contents: dict[Path, Content]) -> None:
        for content in contents.values():
            for prefix, stamp in content.forgets.items():
                self._forgets[prefix] = max(stamp, self._forgets.get(prefix, 0))
            stamps = [*content.forgets.values(), *(part.begin.stamp for part in content.parts)]
            self._stamp = max(self._stamp, *stamps, 0)
            self.torn_bytes += content.torn_bytes
        touched: dict[Held, None] = {}
        for path, content in contents.items():
            spans = {held: span_of(part) for held, part in self._parts_by_request(path, content.parts).items()}
            touched |= dict.fromkeys(spans)
            stamps_by_id = [(part.begin.id, part.begin.stamp) for part in content.parts]
            self._segments[path] = _Segment(path, content.size, spans, stamps_by_id, content.forgets)
        for held in touched:
            if held.progress is None:
                self.duplicates -= held.duplicates
                held.merge()
                self.duplicates += held.duplicates

    def _parts_by_request(self, path: Path, parts: Iterable[Part]) -> dict[Held, Part]:
        found: dict[Held, Part] = {}
        for part in parts:
            begin = part.begin
            if any(begin.id.startswith(prefix) and begin.stamp <= stamp for prefix, stamp in self._forgets.items()):
                continue
            key = (begin.id, begin.digest)
            held = self._held.setdefault(key, Held(begin))
            if begin.stamp > held.begin.stamp:
                held.begin = begin
            if held.progress is None:
                held.parts[path] = part
            found[held] = part
        return found

    # Writing.

    def _changed(self, gained: Gains) -> list[Progress]:
        """The rows with something new to record, if only that they finished."""
        return [
            row
            for row, gain in zip(gained.rows, gained.counts, strict=True)
            if gain or (row.finish is not None and self._of(row).finish is None)
        ]

    def _of(self, row: Progress) -> Held:
        held = self._by_slot.get(row.slot)
        if held is None or held.progress is not row:
            raise ValueError(
                f"request {row.request.id!r}: slot {row.slot} is not of this journal; expected what its begin() gave; "
                "begin the request with the journal that is to record it"
            )
        return held

    def _slot(self, held: Held) -> int:
        if held.slot < 0:
            held.slot = next(self._slots)
            self._by_slot[held.slot] = held
        return held.slot

    def _declare(self, held: Held, start: int) -> Record:
        """Name the request in the current segment; the record must be written with the next ones."""
        self._declared[self._slot(held)] = held.progress
        self._current.spans[held] = (start, start)
        self._current.stamps.append((held.begin.id, held.begin.stamp))
        return begin_record(held.slot, held.begin)

    def _write(self, records: Sequence[Record]) -> None:
        if self._writer.full:
            self._rotate()
        self._writer.write(records)

    def _new_segment(self) -> _Segment:
        return _Segment(self._folder / str(self._writer.name), 0)

    def _rotate(self) -> None:
        done = self._current
        done.size = self._writer.size
        done.spans = {held: (start, held.recorded) for held, (start, _) in done.spans.items()}
        self._segments[done.path] = done
        self._writer.rotate()
        self._declared.clear()
        self._current = self._new_segment()

    # Forgetting.

    def _drop(self, held: Held) -> None:
        self._declared.pop(held.slot, None)
        self._by_slot.pop(held.slot, None)
        if held.progress is not None:
            held.progress.slot = _FORGOTTEN
        for segment in (self._current, *self._segments.values()):
            segment.spans.pop(held, None)

    def _clean(self) -> None:
        """Remove segments in which little is wanted any more. Runs in the writer's thread."""
        with self._lock:
            # Those who died since cannot be told what is forgotten.
            self._read_the_dead()
            living = self._living_writers()
            self._rewrite(
                [
                    segment
                    for path, segment in self._segments.items()
                    if SegmentName.of(path).writer not in living
                    and _live_bytes(segment) < _COMPACT_BELOW * segment.size
                ]
            )

    def _drop_gaps(self) -> None:
        """Remove tokens behind a gap, which a crash of the machine can leave: others will be drawn in their place."""
        with self._lock:
            living = self._living_writers()
            broken = {held for held in self._held.values() if held.gap}
            doomed = [
                segment
                for path, segment in self._segments.items()
                if SegmentName.of(path).writer not in living and any(held in broken for held in segment.spans)
            ]
            self._rewrite(doomed)
        if doomed:
            removed = threading.Event()
            self._writer.when_durable(removed.set, lambda _: removed.set())
            removed.wait()

    def _living_writers(self) -> set[str]:
        others = {SegmentName.of(path).writer for path in self._segments} - {self._writer.name.writer}
        return {writer for writer in others if writer_alive(self._folder, writer)}

    def _rewrite(self, doomed: Sequence[_Segment]) -> None:
        """Copy what is wanted, and remove the files when the copy is on the disk.

        Whatever is interrupted in between, the next opening finds some tokens twice, as copies, or all of them once.
        """
        for segment in doomed:
            del self._segments[segment.path]
        for segment in doomed:
            for held, (start, end) in segment.spans.items():
                self._copy(held, start, min(end, held.recorded))
            self._keep_forgets(segment)
        if doomed:
            self._writer.when_durable(lambda: self._remove(doomed))

    def _copy(self, held: Held, start: int, end: int) -> None:
        finish = held.finish if end == held.recorded else None
        if start >= end and finish is None:
            return
        rows = held.rows(start, end)
        if self._writer.full:
            self._rotate()
        declared = held in self._current.spans
        records = [] if declared else [self._declare(held, start)]
        if declared:
            self._current.spans[held] = (min(start, self._current.spans[held][0]), 0)
        copy = tokens_record(
            Kind.COPY,
            [[held.slot], [start], [end - start], [FINISH_CODES[finish]]],
            tokens=rows["token_ids"],
            versions=rows["versions"],
            logprobs=rows["logprobs"],
            kept=rows["kept"],
        )
        self._writer.write([*records, copy])

    def _keep_forgets(self, segment: _Segment) -> None:
        """Record those again that still make void what another segment holds."""
        others = [found for other in self._segments.values() for found in other.stamps]
        for prefix, stamp in segment.forgets.items():
            if any(id_.startswith(prefix) and begun <= stamp for id_, begun in others):
                self._write([forget_record(prefix, stamp)])
                self._current.forgets[prefix] = max(stamp, self._current.forgets.get(prefix, 0))

    def _remove(self, doomed: Sequence[_Segment]) -> None:
        for segment in doomed:
            segment.path.unlink(missing_ok=True)
        sync_directory(self._folder)


def _live_bytes(segment: _Segment) -> int:
    return sum(held.num_bytes(start, end) for held, (start, end) in segment.spans.items())
