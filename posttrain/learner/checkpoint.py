"""Atomic checkpoints of a training stage: ``step-000010/`` below the stage's folder.

A checkpoint is written beside its final name, flushed to the disk and renamed, so a folder under its final name
is always complete. Space is reserved before the first byte is written: a full disk gives one clear error and leaves
the last checkpoint as it was.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

STATE_FILE = "state.pt"
MANIFEST_FILE = "checkpoint.json"
_NAME = re.compile(r"step-(\d{6,})")
_PARTIAL = "partial-"

# Room for the archive's own records, per tensor and once; torch.save needs about 300 bytes for each tensor.
_BYTES_PER_TENSOR = 1024
_BYTES_OF_ARCHIVE = 1 << 16
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds."""

    step: int
    state: Mapping[str, Any]
    """Tensors and plain values, nested, on the CPU."""
    caller: Any
    """The caller's JSON value, such as the position in the data."""


def save_checkpoint(root: Path, *, step: int, state: Mapping[str, Any], caller: Any = None, keep: int = 2) -> Path:
    """Write ``root/step-NNNNNN`` and prune all but the newest ``keep`` checkpoints.

    ``state`` nests dicts, lists, tensors, numbers and strings; ``caller`` is a JSON value. Raises ``OSError`` with
    errno ENOSPC (or EDQUOT, EFBIG), naming the path and the bytes needed, when the disk is full; older
    checkpoints are then untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:06d}"
    partial = root / f"{_PARTIAL}{final.name}"
    _remove(partial)
    needed = _num_bytes(state)
    try:
        partial.mkdir()
        size = _write_state(partial / STATE_FILE, state, needed)
        manifest = {"step": step, "state_bytes": size, "caller": caller}
        _write_durably(partial / MANIFEST_FILE, json.dumps(manifest).encode())
        _sync_directory(partial)
    except OSError as error:
        _remove(partial)
        if error.errno in _NO_SPACE:
            raise _full_disk(error, final, needed) from error
        raise
    except BaseException:
        _remove(partial)
        raise
    _remove(final)
    partial.rename(final)
    _sync_directory(root)
    for old in _complete(root)[:-keep]:
        _remove(old)
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint below ``root``, or None."""
    return next(reversed(_complete(root)), None)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Raises ``ValueError`` when the folder is not a complete checkpoint."""
    manifest = _manifest(path)
    if manifest is None:
        raise ValueError(
            f"{path}: expected a complete checkpoint with {MANIFEST_FILE} and {STATE_FILE} of the recorded size; "
            "delete the folder and resume from an older one"
        )
    state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    return Checkpoint(step=manifest["step"], state=state, caller=manifest["caller"])


def rng_state() -> dict[str, Any]:
    """State of the generators of Python, NumPy and torch (every device), as plain values and tensors."""
    version, words, gauss = random.getstate()
    numpy_state = cast(dict[str, Any], np.random.get_state(legacy=False))
    words_and_position = numpy_state["state"]
    return {
        "python": [version, list(words), gauss],
        "numpy": {**numpy_state, "state": {**words_and_position, "key": words_and_position["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to a state from ``rng_state``."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    # A run may resume on a machine with fewer devices, or none.
    for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda_state, device)


def _write_state(path: Path, state: Mapping[str, Any], reserve: int) -> int:
    """Write the archive into space reserved first, and return its size.

    torch.save reports a full disk as an internal error of its archive writer; reserving turns it into an OSError.
    """
    with path.open("wb") as file:
        if reserve:
            os.posix_fallocate(file.fileno(), 0, reserve)
        torch.save(state, file)
        file.truncate()
        _sync_file(file)
        return file.tell()


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _sync_file(file)


def _sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _complete(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if _manifest(path) is not None]


def _manifest(path: Path) -> dict[str, Any] | None:
    """The manifest, or None when it is missing, unreadable, or does not match the state file beside it."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())
        return manifest if (path / STATE_FILE).stat().st_size == manifest["state_bytes"] else None
    except (OSError, json.JSONDecodeError, KeyError):
        return None


def _num_bytes(state: Any) -> int:
    """Upper bound of the archive's size."""
    total = _BYTES_OF_ARCHIVE
    for leaf in _leaves(state):
        total += _BYTES_PER_TENSOR + leaf.nbytes if isinstance(leaf, torch.Tensor) else 64
    return total


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _full_disk(error: OSError, path: Path, needed: int) -> OSError:
    free = shutil.disk_usage(path.parent).free
    return OSError(
        error.errno,
        f"no room for the checkpoint: {needed} bytes needed, {free} free ({error.strerror}); free some space "
        "or move the run to a bigger disk and resume; the last complete checkpoint is intact",
        str(path),
    )
