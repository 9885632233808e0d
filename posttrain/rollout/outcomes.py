"""Finished rollouts and their scores on disk, so that a step that was interrupted repeats none of them."""

from __future__ import annotations

import logging
import pickle
import shutil
import struct
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from posttrain.runs.durable import sync_directory, write_atomic

log = logging.getLogger(__name__)

_MAGIC = b"PTOUTCM2"
_HEADER = struct.Struct("<8sI")
"""Of a file: what it is, and the CRC of the rest."""
_ITEM = struct.Struct("<IQ")
"""Before each value: the length of its id and its own."""
_SUFFIX = ".outcomes"
_LONGEST = 200
"""Most characters of a path component: file systems allow 255, and a temporary file's name is longer."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value lies."""

    path: Path
    offset: int
    size: int


class Outcomes:
    """Values by ids such as ``grpo-code/12/3/5``: stage, step, group, rollout.

    A value is anything that pickles: ``(Rollout, Score)``, or the scores of a group under the id of the group. What is
    put together goes into one file, in the folder of its step, in one piece, and is on the disk when ``put`` returns.
    Several processes may use the folder at once. Reading unpickles, so the folder must be as trusted as the program.
    """

    def __init__(self, folder: Path) -> None:
        self.damaged = 0
        """Files found so far that were not what had been written; each was treated as absent."""
        self._folder = folder
        self._known: dict[Path, dict[str, _Place]] = {}
        """What the files of a step's folder hold, file by file: they never change."""

    def put(self, values: Mapping[str, Any]) -> None:
        """Keep values; those with the same ids are replaced. ``ValueError`` for an id with an empty part."""
        by_folder: dict[Path, list[bytes]] = {}
        for rollout_id, value in values.items():
            name, payload = rollout_id.encode(), pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
            by_folder.setdefault(self._step_folder(rollout_id), []).extend(
                (_ITEM.pack(len(name), len(payload)), name, payload)
            )
        for folder, parts in by_folder.items():
            body = b"".join(parts)
            # Names in the order of writing: the last value of an id counts.
            path = folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
            _write(path, _HEADER.pack(_MAGIC, zlib.crc32(body)) + body)

    def get(self, rollout_id: str) -> Any | None:
        """The value, or None where there is none or its file is damaged."""
        folder = self._step_folder(rollout_id)
        try:
            paths = sorted(path for path in folder.iterdir() if path.name.endswith(_SUFFIX))
        except (FileNotFoundError, NotADirectoryError):
            return None
        for path in reversed(paths):
            place = self._contents(path).get(rollout_id)
            if place is not None:
                try:
                    with place.path.open("rb") as file:
                        file.seek(place.offset)
                        return pickle.loads(file.read(place.size))
                except FileNotFoundError:
                    return None
        return None

    def forget_before(self, stage: str, step: int) -> None:
        """Remove what was kept of a stage's steps below this one."""
        folder = self._folder / _component(stage, stage)
        if not folder.is_dir():
            return
        for path in folder.iterdir():
            if path.name.isdecimal() and int(path.name) < step:
                # Another process may be removing the same files.
                shutil.rmtree(path, ignore_errors=True)
        self._known = {path: places for path, places in self._known.items() if path.exists()}

    def _contents(self, path: Path) -> Mapping[str, _Place]:
        if path not in self._known:
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return {}
            if data[: _HEADER.size] != _HEADER.pack(_MAGIC, zlib.crc32(data[_HEADER.size :])):
                self.damaged += 1
                log.warning("%s is damaged (%d bytes); its rollouts are played again", path, len(data))
                self._known[path] = {}
            else:
                self._known[path] = dict(_items(path, data))
        return self._known[path]

    def _step_folder(self, rollout_id: str) -> Path:
        """Of the id's first two parts, or of the only one."""
        parts = [_component(part, rollout_id) for part in rollout_id.split("/")]
        return self._folder.joinpath(*parts[:2])


def _items(path: Path, data: bytes) -> Iterator[tuple[str, _Place]]:
    offset = _HEADER.size
    while offset < len(data):
        name_size, size = _ITEM.unpack_from(data, offset)
        offset += _ITEM.size
        name = data[offset : offset + name_size].decode()
        offset += name_size
        yield name, _Place(path, offset, size)
        offset += size


def _write(path: Path, data: bytes) -> None:
    while True:
        try:
            _make_folder(path.parent)
            return write_atomic(path, data)
        except (FileNotFoundError, FileExistsError):
            # Another process forgot the step while its folder was made, or between that and the writing in it.
            continue


def _make_folder(folder: Path) -> None:
    """With its parents, and on the disk: a durable file is lost in a folder that is not."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_directory(folder.parent)


def _component(part: str, rollout_id: str) -> str:
    """A path component that no other part gives. Whatever is not a letter, a digit or one of ``_-~`` is escaped."""
    # A dot first would be hidden, or a way up; one further on might meet the files' suffix.
    safe = quote(part, safe="").replace(".", "%2E")
    if not part or len(safe) > _LONGEST:
        raise ValueError(
            f"rollout id {rollout_id!r}: a part of {len(safe)} characters once escaped; expected parts of 1 to "
            f"{_LONGEST} joined by '/', as in grpo-code/12/3/5; give stage, step, group and rollout shorter names"
        )
    return safe
