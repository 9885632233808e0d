"""Where hidden states wait between the teacher's forward pass and the learner: in memory, or in files.

States are bfloat16 [L, E], one tensor per sample with one row per loss position: 2 E bytes a token, against 2 V
for logits. Not covered: several processes writing the same key at once (the last one wins), and encryption.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

MAGIC = b"PTSTATE1"
ALIGNMENT = 64
"""The payload's offset is a multiple of this, so that vector loads of mapped states are aligned."""
_PREFIX = struct.Struct("<8sI")
"""Magic and length of the JSON header that follows; the payload follows the header."""


class MemoryStore:
    """States in this process's memory. For runs whose states fit beside the model."""

    def __init__(self) -> None:
        self._states: dict[str, torch.Tensor] = {}

    def put(self, key: str, states: torch.Tensor) -> None:
        """Keep a copy of the tensor. ``ValueError`` unless it is bfloat16 [L, E]."""
        self._states[key] = _checked(key, states).clone()

    def get(self, key: str) -> torch.Tensor:
        """The tensor kept under ``key``; ``KeyError`` when there is none."""
        try:
            return self._states[key]
        except KeyError:
            raise KeyError(f"no hidden states for sample {key!r}: never cached, or already freed") from None

    def free(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._states.pop(key, None)


class FileStore:
    """States in one memory-mapped file per sample below ``directory``.

    A file carries its key, shape, checksum and the store's ``fingerprint``: a text that changes when cached states
    stop being valid, such as the joined fingerprints of the teachers. After a restart, files with the same
    fingerprint are used again; files with another one are as good as absent, and are overwritten.
    """

    def __init__(self, directory: str | Path, *, fingerprint: str) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._fingerprint = fingerprint

    def put(self, key: str, states: torch.Tensor) -> None:
        """Write the tensor; a reader sees the old file or the new one, never a part.

        ``ValueError`` unless it is bfloat16 [L, E].
        """
        payload = _checked(key, states).view(torch.uint8).numpy().tobytes()
        header = {
            "key": key,
            "shape": list(states.shape),
            "fingerprint": self._fingerprint,
            "crc32": zlib.crc32(payload),
        }
        encoded = json.dumps(header).encode()
        encoded += b" " * (-(_PREFIX.size + len(encoded)) % ALIGNMENT)
        path = self._path(key)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        # Not synced: a file that a power cut left incomplete fails its checksum, and states can be computed again.
        scratch.write_bytes(_PREFIX.pack(MAGIC, len(encoded)) + encoded + payload)
        scratch.replace(path)

    def get(self, key: str) -> torch.Tensor:
        """The tensor, mapped from its file. ``KeyError`` when there is none of this fingerprint.

        ``ValueError`` when the file is damaged; free the key, and cache the sample again.
        """
        path = self._path(key)
        try:
            # Copy on write: torch wants writable memory, and the file must not change.
            data = np.memmap(path, dtype=np.uint8, mode="c")
        except (FileNotFoundError, ValueError):  # NumPy cannot map an empty file, which is damaged at any rate.
            if path.exists():
                raise ValueError(_damaged(path, key)) from None
            raise KeyError(f"no hidden states for sample {key!r} in {self._directory}") from None
        header, payload = _parse(data, path, key)
        if header["fingerprint"] != self._fingerprint:
            raise KeyError(f"the hidden states of sample {key!r} in {self._directory} come from other teachers")
        if zlib.crc32(payload.data) != header["crc32"]:
            raise ValueError(_damaged(path, key))
        return torch.from_numpy(payload.view(np.int16)).view(torch.bfloat16).reshape(header["shape"])

    def free(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._directory / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.states"


def _checked(key: str, states: torch.Tensor) -> torch.Tensor:
    if states.dtype is not torch.bfloat16 or states.ndim != 2:
        raise ValueError(
            f"hidden states of sample {key!r}: {states.dtype} {list(states.shape)}; expected bfloat16 [loss tokens, "
            "width]; convert with .to(torch.bfloat16)"
        )
    return states.detach().cpu().contiguous()


def _parse(data: np.ndarray, path: Path, key: str) -> tuple[dict[str, Any], np.ndarray]:
    """Header and payload of a file."""
    try:
        magic, size = _PREFIX.unpack(data[: _PREFIX.size].tobytes())
        if magic != MAGIC:
            raise ValueError(_damaged(path, key))
        start = _PREFIX.size + size
        header = json.loads(data[_PREFIX.size : start].tobytes())
    except (struct.error, ValueError) as error:
        raise ValueError(_damaged(path, key)) from error
    return header, data[start:]


def _damaged(path: Path, key: str) -> str:
    return f"the hidden states of sample {key!r} in {path} are damaged; free the key and cache the sample again"
