"""Weights straight from safetensors files: any tensor, or some of its rows, without the rest.

Files are read and not mapped, so that what a process holds of a checkpoint is what it asked for: a mapping counts
against a limit on address space, and its pages against a container's memory, whole.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.checkpoint_files import safetensors_files, safetensors_header
from posttrain.stability.layers import asks_for_stable_layers

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Unreadable(Exception):
    """These weights cannot be read tensor by tensor, for the reason given; transformers may still load them whole."""


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights:
    """The tensors of a checkpoint folder by name. ``Unreadable`` unless they are plain safetensors."""

    def __init__(self, folder: Path) -> None:
        self._entries: dict[str, _Entry] = {}
        try:
            for file in safetensors_files(folder):
                self._add(file)
        except ValueError as error:
            raise Unreadable(str(error)) from error
        if not self._entries:
            raise Unreadable(f"{folder} holds no safetensors")

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By name."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def num_bytes(self, name: str, itemsize: int) -> int:
        return prod(self._entries[name].shape) * itemsize

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in host memory, converted to ``dtype``."""
        entry = self._entries[name]
        raw = torch.empty(entry.shape, dtype=entry.dtype)
        with _opened(entry.file) as fd:
            _read_into(fd, _bytes_of(raw), entry.offset, entry.file)
        return raw.to(dtype)

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """A tensor into the memory of one of the same shape, converted to its type."""
        entry = self._entries[name]
        if target.is_cpu and target.dtype is entry.dtype and target.is_contiguous():
            with _opened(entry.file) as fd:
                _read_into(fd, _bytes_of(target), entry.offset, entry.file)
        else:
            target.copy_(self.read(name, entry.dtype))

    def read_rows(self, name: str, rows: Iterable[int], dtype: torch.dtype) -> torch.Tensor:
        """These rows of a matrix, in their order."""
        entry, rows = self._entries[name], list(rows)
        raw = torch.empty((len(rows), *entry.shape[1:]), dtype=entry.dtype)
        size = prod(entry.shape[1:]) * entry.dtype.itemsize
        target = _bytes_of(raw)
        with _opened(entry.file) as fd:
            for place, row in enumerate(rows):
                _read_into(fd, target[place * size : (place + 1) * size], entry.offset + row * size, entry.file)
        return raw.to(dtype)

    def _add(self, file: Path) -> None:
        header, start = safetensors_header(file)
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise Unreadable(f"{name} in {file} is {entry['dtype']}")
            offset = start + entry["data_offsets"][0]
            self._entries[name] = _Entry(file, offset, tuple(entry["shape"]), DTYPES[entry["dtype"]])


class Skeleton:
    """A causal language model without its weights, and where each of them lies.

    Buffers that no file holds, such as rotary frequencies, are as ``from_pretrained`` makes them. ``Unreadable`` when
    the model needs more than the files' own tensors, under the model's own names.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.weights = Weights(folder)
        self._config = _config_text(folder)
        self._filled: dict[str, str] = {}
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise Unreadable(f"{folder} is quantized")
        if asks_for_stable_layers(config):
            raise Unreadable(f"the config of {folder} asks for layers of posttrain.stability")
        # Not with dtype: that would change torch's default for the whole process meanwhile.
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        _fill_buffers(self.model)
        self.num_parameters = int(self.model.num_parameters())
        self._tied: Mapping[str, str] = self.model.all_tied_weights_keys

    def sources(self, prefix: str = "") -> dict[str, str]:
        """The model's weights below a module that are still missing, by their name there: the name in the files."""
        wanted = self.model.get_submodule(prefix.rstrip(".")) if prefix else self.model
        found = {}
        for name, tensor in wanted.state_dict(keep_vars=True).items():
            if tensor.device.type != "meta":
                continue
            # What an adapter wraps has moved down by one name.
            plain = (prefix + name).replace(".base_layer.", ".").replace(".original_module.", ".")
            stored = plain if plain in self.weights else self._tied.get(plain, plain)
            if stored not in self.weights or self.weights.shape(stored) != tuple(tensor.shape):
                raise Unreadable(f"its files hold no {plain} of shape {list(tensor.shape)}")
            found[name] = stored
        return found

    def fill(self, dtype: torch.dtype, device: str) -> Any:
        """The model with all its weights, parameters in ``dtype`` on ``device``; buffers are in host memory. Tied
        parameters are read once."""
        read: dict[str, nn.Parameter] = {}
        for name, stored in self.sources().items():
            module, last = self._place(name)
            if (buffer := module._buffers.get(last)) is not None:
                module._buffers[last] = self.weights.read(stored, buffer.dtype)
                self._filled[name] = stored
                continue
            if stored not in read:
                tensor = _mapped(self.weights.shape(stored), dtype)
                self.weights.read_into(stored, tensor)
                read[stored] = nn.Parameter(tensor.to(device), requires_grad=False)
                self._filled[name] = stored
            module._parameters[last] = read[stored]
        return self.model

    @torch.no_grad()
    def refill(self, folder: Path) -> bool:
        """Read another checkpoint into the memory of the weights that ``fill`` read.

        False, and nothing done, unless its config and the names and shapes of its tensors are the same to the letter.
        """
        weights = Weights(folder)
        if _config_text(folder) != self._config or weights.shapes != self.weights.shapes:
            return False
        self.weights = weights
        for name, stored in self._filled.items():
            module, last = self._place(name)
            weights.read_into(stored, getattr(module, last))
        return True

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a weight, and its name there."""
        owner, _, last = name.rpartition(".")
        return self.model.get_submodule(owner), last


def drop_weights(model: nn.Module) -> None:
    """Free the memory of a model's weights, which its modules, being in cycles, would hold until the next collection.

    A tensor that shares memory with one of them stays valid.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _fill_buffers(model: Any) -> None:
    """Compute the buffers that are not saved, as transformers does after loading."""
    for module in model.modules():
        missing = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        for name in missing:
            buffer = module._buffers[name]
            if not buffer.is_floating_point():
                raise Unreadable(f"{type(module).__name__}.{name} is not in its files")
            module._buffers[name] = torch.full(buffer.shape, torch.nan, dtype=buffer.dtype, device="cpu")
        if missing:
            with torch.no_grad():
                model._init_weights(module)
        if any(module._buffers[name].isnan().any() for name in missing):
            raise Unreadable(f"{type(module).__name__} does not say how its buffers {missing} are made")


def _config_text(folder: Path) -> str:
    return (folder / "config.json").read_text()


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor in memory of its own, which goes back to the system when it is freed.

    What malloc gives, in blocks of a few MiB, may stay with the process.
    """
    size = prod(shape) * dtype.itemsize
    if size < mmap.PAGESIZE:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    fd = os.open(file, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def _read_into(fd: int, target: memoryview, offset: int, file: Path) -> None:
    done = 0
    while done < len(target):
        read = os.preadv(fd, [target[done:]], offset + done)
        if read == 0:
            raise OSError(f"{file} ends at {offset + done}, in the middle of a tensor; did it change during the run?")
        done += read
