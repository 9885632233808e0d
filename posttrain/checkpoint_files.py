"""The files of a checkpoint: fetched from where they lie, once, and seen to be whole."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from posttrain.errors import RecipeError

_WEIGHTS = (".bin", ".pt", ".pth")
"""Left where they are when the same folder has safetensors."""
_FETCHED: dict[str, Path] = {}
"""What a URL led to at first: a run that asks again gets the same files, though others may lie there by then."""


def is_url(path: str) -> bool:
    return "://" in path


def fetch(url: str, cache: Path) -> Path:
    """The local folder or file with what lies at an fsspec URL, such as ``s3://bucket/model`` or ``file:///model``.

    Copied into ``cache`` unless a copy of the very same files is there: it appears whole, checked against the sizes
    that the other side and the files themselves declare, or not at all. Raises ``RecipeError``.
    """
    if url in _FETCHED and _FETCHED[url].exists():
        return _FETCHED[url]
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, root = fsspec.core.url_to_fs(url)
        if isinstance(fs, LocalFileSystem):
            return Path(root)
        files = _listing(fs, root)
        if not files:
            raise FileNotFoundError(f"{root} does not exist or is empty")
        target = cache / "remote" / f"{PurePosixPath(root).name}-{_digest(url, files)}"
        made_whole(target, lambda folder: _copy(fs, files, folder))
    except (ImportError, ValueError, OSError) as error:
        raise RecipeError(
            f"model path {url!r}: {error}; expected a checkpoint folder or a .gguf file that can be read through "
            "fsspec; correct the URL, install the package of its file system, or check the credentials and the network"
        ) from error
    only = next(iter(files))
    _FETCHED[url] = target / PurePosixPath(only).name if only == root else target
    return _FETCHED[url]


def made_whole(target: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled by ``make`` unless it is there; what ``make`` raises leaves nothing behind."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        make(draft)
        # Renaming makes it whole or absent; a process that was faster left the same content.
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, by tensor, and where its data begins. ``ValueError`` unless the file is whole."""
    with path.open("rb") as file:
        try:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        except (struct.error, ValueError, MemoryError, OverflowError) as error:
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    header.pop("__metadata__", None)
    end = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != path.stat().st_size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes and its header tells of {end}; copy it again")
    return header, 8 + size


def safetensors_files(folder: Path) -> Sequence[Path]:
    """The shards that make up a checkpoint, or its one file; none when it has no safetensors.

    ``ValueError`` when the index names a shard that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [path for path in [folder / "model.safetensors"] if path.exists()]
    shards = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if missing := [path.name for path in shards if not path.exists()]:
        raise ValueError(f"{index} names shards that are not there: {missing}; copy them beside it")
    return shards


def _listing(fs: Any, root: str) -> dict[str, Mapping[str, Any]]:
    """The files to copy, by path: ``root`` itself, or what lies directly in it."""
    fs.invalidate_cache(root)
    if not fs.exists(root):
        return {}
    if fs.isfile(root):
        return {root: fs.info(root)}
    entries = {entry["name"]: entry for entry in fs.ls(root, detail=True) if entry["type"] == "file"}
    if any(name.endswith(".safetensors") for name in entries):
        entries = {name: entry for name, entry in entries.items() if not name.endswith(_WEIGHTS)}
    return entries


def _digest(url: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """Changes when a file does, as far as size, time or tag tell."""
    told = sorted((name, sorted((key, str(value)) for key, value in entry.items())) for name, entry in files.items())
    return hashlib.sha256(repr((url, told)).encode()).hexdigest()[:16]


def _copy(fs: Any, files: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    for name, entry in files.items():
        copy = folder / PurePosixPath(name).name
        fs.get_file(name, str(copy))
        if copy.stat().st_size != entry["size"]:
            raise ValueError(f"{name} has {entry['size']} bytes, of which {copy.stat().st_size} arrived")
    for file in [*safetensors_files(folder), *folder.glob("*.safetensors")]:
        safetensors_header(file)
