"""Files that survive ``kill -9``: JSON replaced in one piece, JSON lines whose torn tail is repaired.

NaN and infinities are not JSON; they are written as ``null``.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def plain(value: Any) -> Any:
    """The same value in what JSON knows: NaN and infinities become None, NumPy scalars Python numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_atomic(path: Path, data: bytes) -> None:
    """Create or replace a file so that a reader finds the old content or the new, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # mkstemp makes the file private; a report is read by others, so it gets the usual mode.
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document atomically."""
    write_atomic(path, (json.dumps(plain(value), indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read one JSON document. ``FileNotFoundError``; ``ValueError`` naming the file when it is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON document ({error}); delete the file to have it written again") from error


def iter_jsonl(path: Path) -> Iterator[Record]:
    """The records of a file that may still be written to; a missing file has none.

    A torn last line is left out. A broken line anywhere else raises ``ValueError`` naming file and line.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            record = _parse(line)
            if record is not None:
                yield record
            elif line.endswith(b"\n"):
                raise ValueError(
                    f"{path}, line {number}: {line[:80]!r} is not a JSON object; expected one per line; "
                    "remove the line if the file was edited by hand"
                )


class JsonLines:
    """An append-only file of JSON objects, one per line. One process writes at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _repair_tail(path)

    def append(self, records: Iterable[Mapping[str, Any]], *, sync: bool = False) -> None:
        """Add records with one write. ``sync`` makes them survive a power cut, not only a dead process."""
        data = "".join(json.dumps(plain(record), allow_nan=False) + "\n" for record in records).encode()
        with self.path.open("ab") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def keep(self, wanted: Callable[[Record], bool]) -> int:
        """Rewrite the file, atomically, with the wanted records only; returns how many were dropped."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if wanted(json.loads(line))]
        if len(kept) < len(lines):
            write_atomic(self.path, b"".join(kept))
        return len(lines) - len(kept)


def _parse(line: bytes) -> Record | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _repair_tail(path: Path) -> None:
    """End the file after its last whole record.

    No proper prefix of a JSON object is itself JSON, so a last line without newline that parses is whole
    and gets its newline; any other is cut off.
    """
    with path.open("ab+") as file:
        start = _start_of_last_line(file.fileno(), file.seek(0, os.SEEK_END))
        file.seek(start)
        tail = file.read()
        if not tail:
            return
        if _parse(tail) is not None:
            file.write(b"\n")
        else:
            file.truncate(start)


def _start_of_last_line(descriptor: int, size: int, block: int = 1 << 16) -> int:
    """Offset just after the last newline, or 0; reads backwards, so that a long file opens at once."""
    end = size
    while end > 0:
        begin = max(0, end - block)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def sync_directory(path: Path) -> None:
    """Make the creation, renaming and removal of files in it durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
