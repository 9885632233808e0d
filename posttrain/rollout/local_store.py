"""A store of per-token arrays for the processes of one machine, which leaves nothing behind.

Arrays lie in files without a name: shared memory, or disk for more than fits into memory. The kernel removes such a
file with the last process that has it open, however its owner ends. Other processes of the same user reach it through
``/proc/OWNER/fd``. Linux only.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]

ALIGNMENT = 64
"""Offsets of blocks and of the arrays in them are multiples of this."""
SEAL_BYTES = 16
"""Each block begins with random bytes, also known to its reference, which freeing overwrites."""

Layout = tuple[tuple[str, str, tuple[int, ...]], ...]
"""Name, dtype and shape of each array of a block, in order."""


class SegmentName(NamedTuple):
    """Where any process of this machine finds a segment; the inode tells it from a later file of the same number."""

    pid: int
    fd: int
    inode: int

    @property
    def path(self) -> Path:
        return Path(f"/proc/{self.pid}/fd/{self.fd}")


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRef:
    """The way to one block of a ``LocalStore``."""

    segment: SegmentName
    offset: int
    size: int
    seal: bytes
    layout: Layout

    def load(self) -> Arrays:
        """Views of the shared memory, valid until freed; they then read zeros. ``KeyError`` when freed before."""
        mapping = _mapping(self.segment)
        if mapping is None or not self._is_sealed(mapping):
            raise KeyError(
                f"the arrays {[name for name, _, _ in self.layout]} put by process {self.segment.pid} are gone: they "
                "were freed, or that process has ended"
            )
        return _views(mapping, self.offset, self.layout, writeable=False)

    def _is_sealed(self, mapping: mmap.mmap) -> bool:
        # The owner knows without looking, and to look at a page given back would take it again.
        if os.getpid() == self.segment.pid and (segment := _OWNED.get(self.segment)) is not None:
            return self.offset in segment.blocks
        return mapping[self.offset : self.offset + SEAL_BYTES] == self.seal

    def free(self) -> None:
        """``ValueError`` in a process other than the one that put the arrays."""
        if os.getpid() != self.segment.pid:
            raise ValueError(f"arrays put by process {self.segment.pid} can be freed only there, not in {os.getpid()}")
        if (segment := _OWNED.get(self.segment)) is not None:
            segment.release(self)


class LocalStore:
    """Holds arrays in memory that the processes of this machine share, or in files.

    ``folder`` says where to put the files; None is shared memory, which a limit on ``/dev/shm`` does not touch. Arrays
    lie one after another in segments of ``segment_bytes`` or, if larger, in one of their own. The pages of freed
    arrays are given back at once. Threads may share a store; only the process that made it can ``put`` and free.
    """

    def __init__(self, folder: Path | None = None, *, segment_bytes: int = 16 << 20) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._segments: set[_Segment] = set()
        self._current: _Segment | None = None
        self._pid = os.getpid()
        self._lock = threading.RLock()

    def put(self, arrays: Arrays) -> LocalRef:
        """Keep a copy of the arrays. ``OSError`` (ENOSPC) when memory or disk has no room."""
        if os.getpid() != self._pid:
            raise ValueError(f"this store belongs to process {self._pid}; make one of its own in process {os.getpid()}")
        if broken := [name for name, array in arrays.items() if array.dtype.hasobject]:
            raise ValueError(f"arrays {broken} hold Python objects; expected numbers or truth values")
        layout = tuple((name, array.dtype.str, array.shape) for name, array in arrays.items())
        size = _places(layout)[-1]
        with self._lock:
            segment = self._with_room(size)
            offset, seal = segment.reserve(size)
        for array, view in zip(
            arrays.values(), _views(segment.mapping, offset, layout, writeable=True).values(), strict=True
        ):
            view[...] = array
        return LocalRef(segment=segment.name, offset=offset, size=size, seal=seal, layout=layout)

    @property
    def num_bytes(self) -> int:
        """Memory or disk in use, in whole pages."""
        with self._lock:
            return sum(os.fstat(segment.name.fd).st_blocks * 512 for segment in self._segments)

    def close(self) -> None:
        """Let go of everything. Arrays that are still being read stay until nobody reads them."""
        with self._lock:
            self._segments.clear()
            self._current = None

    def _with_room(self, size: int) -> _Segment:
        current = self._current
        if current is not None and current.room >= size:
            return current
        segment = _Segment(self._folder, max(size, self._segment_bytes), self._lock, self._drop)
        self._segments.add(segment)
        if size < self._segment_bytes:
            self._current = segment
            if current is not None and not current.blocks:
                self._drop(current)
        return segment

    def _drop(self, segment: _Segment) -> None:
        """Forget a segment in which nothing is left, unless more is to come."""
        if segment is not self._current:
            self._segments.discard(segment)


class _Segment:
    """One file without a name, filled from the front, with the number of blocks that use each of its pages."""

    def __init__(
        self, folder: Path | None, size: int, lock: threading.RLock, on_empty: Callable[[_Segment], None]
    ) -> None:
        file: Any
        if folder is None:
            file = os.fdopen(os.memfd_create("posttrain-arrays"), "r+b", buffering=0)
        else:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - open as long as the segment lives
        weakref.finalize(self, file.close)
        os.ftruncate(file.fileno(), size)
        self.name = SegmentName(os.getpid(), file.fileno(), os.fstat(file.fileno()).st_ino)
        self.mapping = mmap.mmap(file.fileno(), size)
        self.blocks: set[int] = set()
        """Offsets of what was put and not freed; no offset is used twice."""
        self._size, self._used = size, 0
        self._page_users = np.zeros(-(-size // mmap.PAGESIZE), np.int32)
        self._lock, self._on_empty = lock, on_empty
        _OWNED[self.name] = self
        _MAPPED[self.name] = self.mapping

    @property
    def room(self) -> int:
        return self._size - self._used

    def reserve(self, size: int) -> tuple[int, bytes]:
        """Offset and seal of a new block."""
        offset, seal = self._used, secrets.token_bytes(SEAL_BYTES)
        # Without it a full disk or memory would be a deadly signal at the first write, not an error here.
        os.posix_fallocate(self.name.fd, offset, size)
        self._used += size
        self.blocks.add(offset)
        self._page_users[_pages(offset, size)] += 1
        self.mapping[offset : offset + SEAL_BYTES] = seal
        return offset, seal

    def release(self, ref: LocalRef) -> None:
        """Give back the pages that only this block was using."""
        with self._lock:
            if ref.offset not in self.blocks:
                return
            self.blocks.remove(ref.offset)
            self.mapping[ref.offset : ref.offset + SEAL_BYTES] = bytes(SEAL_BYTES)
            pages = _pages(ref.offset, ref.size)
            self._page_users[pages] -= 1
            unused = pages.start + np.flatnonzero(self._page_users[pages] == 0)
            if len(unused):
                # All but the first and the last page of a block are its own, so these are neighbours.
                self.mapping.madvise(mmap.MADV_REMOVE, int(unused[0]) * mmap.PAGESIZE, len(unused) * mmap.PAGESIZE)
            if not self.blocks:
                self._on_empty(self)


_OWNED: weakref.WeakValueDictionary[SegmentName, _Segment] = weakref.WeakValueDictionary()
_MAPPED: weakref.WeakValueDictionary[SegmentName, mmap.mmap] = weakref.WeakValueDictionary()
"""Segments this process has mapped; an array keeps its mapping, and that its entry here."""


def _mapping(name: SegmentName) -> mmap.mmap | None:
    """A segment in this process's memory; None when it is gone."""
    if (found := _MAPPED.get(name)) is not None:
        return found
    try:
        if name.path.stat().st_ino != name.inode:
            return None
        with name.path.open("rb") as file:
            _MAPPED[name] = mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except FileNotFoundError:
        return None
    return mapping


def _pages(offset: int, size: int) -> slice:
    return slice(offset // mmap.PAGESIZE, -(-(offset + size) // mmap.PAGESIZE))


def _places(layout: Layout) -> list[int]:
    """Where in its block each array begins, then where the block ends."""
    places = [ALIGNMENT]
    for _, dtype, shape in layout:
        num_bytes = np.dtype(dtype).itemsize * math.prod(shape)
        places.append(places[-1] + -(-num_bytes // ALIGNMENT) * ALIGNMENT)
    return places


def _views(mapping: mmap.mmap, offset: int, layout: Layout, *, writeable: bool) -> dict[str, npt.NDArray[Any]]:
    views = {}
    for (name, dtype, shape), place in zip(layout, _places(layout), strict=False):
        views[name] = view = np.ndarray(shape, dtype, buffer=mapping, offset=offset + place)
        view.flags.writeable = writeable
    return views
