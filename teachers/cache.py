"""Where hidden states wait between the teacher's forward pass and the learner: memory, files, a URL, an object store.

States are bfloat16 [L, E], one tensor per sample with one row per loss position: 2 E bytes a token, against 2 V
for logits. Each comes with its *origin*, a text that says what it was computed from (``TeacherPool`` takes a digest
of the teacher's content, the tokens and the loss mask). After a restart what is found under the right origin is used
again and all else counts as absent, so that a teacher that changed costs its own states and nobody else's.

Not covered: several processes writing the same key at once (the last one wins), and encryption.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import torch

from posttrain.errors import RecipeError
from posttrain.protocols import ArrayRef, ArrayStore, StateStore

MAGIC = b"PTSTATE2"
ALIGNMENT = 64
"""The payload's offset is a multiple of this, so that vector loads of mapped states are aligned."""
ABANDONED_S = 3600.0
"""Age of a half-written file that nobody writes any more."""
_PREFIX = struct.Struct("<8sI")
"""Magic and length of the JSON header that follows; the payload follows the header."""
_SUFFIX = ".states"

Bytes = npt.NDArray[np.uint8]


def open_store(where: str, folder: Path | None) -> StateStore:
    """The store that ``where`` names: ``memory``, ``files`` (in ``folder``), ``ray``, a folder, or an fsspec URL.

    Without a ``folder``, ``files`` is ``memory``. ``RecipeError`` for a URL whose file system cannot be used here.
    """
    if where == "memory" or (where == "files" and folder is None):
        return MemoryStore()
    if where == "files":
        assert folder is not None
        # No other run writes here, and the processes of this one all open the store before one of them writes.
        return FileStore(folder, abandoned_s=0)
    if where == "ray":
        from posttrain.rollout.ray_store import RayStore

        return ArrayStates(RayStore())
    if "://" in where and not where.startswith(("file://", "local://")):
        return RemoteStore(where)
    return FileStore(Path(where.partition("://")[2] or where).expanduser())


class MemoryStore:
    """States in this process's memory. For runs whose states fit beside the model and are never resumed."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[str, torch.Tensor]] = {}

    def put(self, key: str, states: torch.Tensor, *, origin: str = "") -> None:
        """Keep a copy of the tensor. ``ValueError`` unless it is bfloat16 [L, E]."""
        self._states[key] = origin, _checked(key, states).clone()

    def get(self, key: str) -> torch.Tensor:
        """The tensor kept under ``key``; ``KeyError`` when there is none."""
        try:
            return self._states[key][1]
        except KeyError:
            raise _absent(key) from None

    def holds(self, key: str, *, origin: str = "") -> bool:
        return key in self._states and self._states[key][0] == origin

    def free(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._states.pop(key, None)


class ArrayStates:
    """States in an object store, such as Ray's, which spills to disk. They go with the process that made them."""

    def __init__(self, arrays: ArrayStore) -> None:
        self._arrays = arrays
        self._refs: dict[str, tuple[str, ArrayRef]] = {}

    def put(self, key: str, states: torch.Tensor, *, origin: str = "") -> None:
        """Keep a copy of the tensor. ``ValueError`` unless it is bfloat16 [L, E]."""
        ref = self._arrays.put({"states": _checked(key, states).view(torch.int16).numpy()})
        self.free([key])
        self._refs[key] = origin, ref

    def get(self, key: str) -> torch.Tensor:
        """A copy of the tensor; ``KeyError`` when there is none."""
        if key not in self._refs:
            raise _absent(key, "the object store")
        return torch.from_numpy(self._refs[key][1].load()["states"].copy()).view(torch.bfloat16)

    def holds(self, key: str, *, origin: str = "") -> bool:
        return key in self._refs and self._refs[key][0] == origin

    def free(self, keys: Iterable[str]) -> None:
        for key in keys:
            if (kept := self._refs.pop(key, None)) is not None:
                kept[1].free()


class FileStore:
    """States in one memory-mapped file per sample below ``directory``; each carries its key, origin and checksum.

    Opening removes half-written files older than ``abandoned_s`` seconds: those of a killed process, while others may
    be writing.
    """

    def __init__(self, directory: str | Path, *, abandoned_s: float = ABANDONED_S) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        for scratch in self._directory.glob("*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # Another process opens the same folder.
                if time.time() - scratch.stat().st_mtime >= abandoned_s:
                    scratch.unlink()

    def put(self, key: str, states: torch.Tensor, *, origin: str = "") -> None:
        """Write the tensor; a reader sees the old file or the new one, never a part.

        ``ValueError`` unless it is bfloat16 [L, E].
        """
        path = self._path(key)
        scratch = path.with_suffix(f".{os.getpid()}.tmp")
        # Not synced: a file that a power cut left incomplete fails its checksum, and states can be computed again.
        with scratch.open("wb") as file:
            file.writelines(_encoded(key, states, origin))
        scratch.replace(path)

    def get(self, key: str) -> torch.Tensor:
        """The tensor, mapped from its file; ``KeyError`` when there is none.

        ``ValueError`` when the file is damaged; free the key, and cache the sample again.
        """
        return _decoded(self._read(key), key, str(self._path(key)))[1]

    def holds(self, key: str, *, origin: str = "") -> bool:
        """Whether undamaged states of this origin are there."""
        return _is_sound(self._read, key, origin)

    def free(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._path(key).unlink(missing_ok=True)

    def _read(self, key: str) -> Bytes:
        path = self._path(key)
        try:
            # Copy on write: torch wants writable memory, and the file must not change.
            return np.memmap(path, dtype=np.uint8, mode="c")
        except FileNotFoundError:
            raise _absent(key, str(self._directory)) from None
        except ValueError:  # NumPy cannot map an empty file, which is damaged at any rate.
            raise _damaged(key, str(path)) from None

    def _path(self, key: str) -> Path:
        return self._directory / _file_name(key)


class RemoteStore:
    """The same files below any fsspec URL, such as ``s3://bucket/states``."""

    def __init__(self, url: str) -> None:
        try:
            # An instance of its own, since a transaction holds up all writing through the instance.
            self._fs, self._root = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
            self._fs.makedirs(self._root, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise RecipeError(
                f"states = {url!r}: {error}; expected a folder that can be written through fsspec; install the "
                "package of its file system, or correct the URL"
            ) from error
        self._url = url

    def put(self, key: str, states: torch.Tensor, *, origin: str = "") -> None:
        """Write the tensor; a reader sees the old object or the new one. ``ValueError`` unless bfloat16 [L, E]."""
        content = b"".join(_encoded(key, states, origin))
        with self._fs.transaction, self._fs.open(self._path(key), "wb") as file:
            file.write(content)

    def get(self, key: str) -> torch.Tensor:
        """The tensor; ``KeyError`` when there is none, ``ValueError`` when the object is damaged."""
        return _decoded(self._read(key), key, self._path(key))[1]

    def holds(self, key: str, *, origin: str = "") -> bool:
        """Whether undamaged states of this origin are there."""
        return _is_sound(self._read, key, origin)

    def free(self, keys: Iterable[str]) -> None:
        paths = [path for path in map(self._path, keys) if self._fs.exists(path)]
        if paths:
            self._fs.rm(paths)

    def _read(self, key: str) -> Bytes:
        try:
            return np.frombuffer(bytearray(self._fs.cat_file(self._path(key))), np.uint8)
        except FileNotFoundError:
            raise _absent(key, self._url) from None

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{_file_name(key)}"


def _file_name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:40] + _SUFFIX


def _checked(key: str, states: torch.Tensor) -> torch.Tensor:
    if states.dtype is not torch.bfloat16 or states.ndim != 2:
        raise ValueError(
            f"hidden states of sample {key!r}: {states.dtype} {list(states.shape)}; expected bfloat16 [loss tokens, "
            "width]; convert with .to(torch.bfloat16)"
        )
    return states.detach().cpu().contiguous()


def _encoded(key: str, states: torch.Tensor, origin: str) -> tuple[bytes, memoryview]:
    """A file's header and payload."""
    payload = _checked(key, states).view(torch.uint8).numpy().reshape(-1).data
    header = {"key": key, "shape": list(states.shape), "origin": origin, "crc32": zlib.crc32(payload)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-(_PREFIX.size + len(encoded)) % ALIGNMENT)
    return _PREFIX.pack(MAGIC, len(encoded)) + encoded, payload


def _decoded(data: Bytes, key: str, where: str) -> tuple[str, torch.Tensor]:
    """Origin and states of a file."""
    try:
        magic, size = _PREFIX.unpack(data[: _PREFIX.size].tobytes())
        start = _PREFIX.size + size
        header: dict[str, Any] = json.loads(data[_PREFIX.size : start].tobytes()) if magic == MAGIC else {}
    except (struct.error, ValueError) as error:
        raise _damaged(key, where) from error
    payload = data[start:]
    if header.get("key") != key or zlib.crc32(payload.data) != header["crc32"]:
        raise _damaged(key, where)
    return header["origin"], torch.from_numpy(payload.view(np.int16)).view(torch.bfloat16).reshape(header["shape"])


def _is_sound(read: Any, key: str, origin: str) -> bool:
    try:
        return _decoded(read(key), key, "")[0] == origin
    except (KeyError, ValueError):
        return False


def _absent(key: str, where: str = "memory") -> KeyError:
    return KeyError(f"no hidden states for sample {key!r} in {where}: never cached, or already freed")


def _damaged(key: str, where: str) -> ValueError:
    return ValueError(f"the hidden states of sample {key!r} in {where} are damaged; free the key and cache it again")
