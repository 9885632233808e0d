"""Key and value states of many unequal sequences, one row per sequence, rows packed at the front.

Shape letters: ``B`` live rows, ``L`` length of the longest live row, ``H`` key/value heads, ``D`` head dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import Cache

_FIRST_LENGTH = 128


class RowCache(Cache):
    """A transformers cache in which every row has its own length and is written in place.

    Each layer holds [rows, H, length, D], so that the states of one head lie together and a batched matrix product
    reads them without a copy; the rows and the length double when they are outgrown. ``update`` is only for steps
    of one token per row: prompts go through a ``DynamicCache`` and enter by ``store``.
    """

    def __init__(self, *, max_length: int) -> None:
        super().__init__(layers=[])
        self.max_length = max_length
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._rows = 0
        self._length = 0
        self._lengths_B = torch.zeros(0, dtype=torch.int64)
        self._targets: dict[int, torch.Tensor] = {}
        self._view = (0, 0)

    def reserve(self, rows: int, length: int) -> None:
        """Make room for this many rows of this length (at most ``max_length``)."""
        if length > self.max_length:
            raise ValueError(f"cache length {length}: expected at most {self.max_length}")
        if rows <= self._rows and length <= self._length:
            return
        rows = self._rows if rows <= self._rows else max(rows, 2 * self._rows)
        if length <= self._length:
            length = self._length
        else:
            length = min(max(length, 2 * self._length, _FIRST_LENGTH), self.max_length)
        self._keys = [_grown(x, rows, length) for x in self._keys]
        self._values = [_grown(x, rows, length) for x in self._values]
        self._rows, self._length = rows, length

    def begin_step(self, lengths_B: torch.Tensor, longest: int) -> None:
        """Announce a decode step: row ``i`` writes at ``lengths_B[i]`` and all rows attend to ``longest`` states."""
        self.reserve(len(lengths_B), longest)
        self._lengths_B = lengths_B
        self._targets = {}
        self._view = (len(lengths_B), longest)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one state per row, [B, H, 1, D], and return all of them, [B, H, L, D] (views)."""
        self._ensure_layer(layer_idx, key_states)
        return self._write(self._keys[layer_idx], key_states), self._write(self._values[layer_idx], value_states)

    def store(self, row: int, states: Iterable[tuple[torch.Tensor, torch.Tensor]], source: int, length: int) -> None:
        """Copy the first ``length`` states of one row of other keys and values, by layer, into a row of this cache."""
        for index, (keys, values) in enumerate(states):
            self._ensure_layer(index, keys)
            self._keys[index][row, :, :length] = keys[source, :, :length]
            self._values[index][row, :, :length] = values[source, :, :length]

    def copy_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` states of some rows over others; no row may be both source and target."""
        for tensor in (*self._keys, *self._values):
            tensor[targets, :, :length] = tensor[sources, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._view[1] - 1

    def _ensure_layer(self, index: int, like: torch.Tensor) -> None:
        while len(self._keys) <= index:
            shape = (self._rows, like.shape[1], self._length, like.shape[3])
            self._keys.append(like.new_zeros(shape))
            self._values.append(like.new_zeros(shape))

    def _write(self, tensor: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        rows, longest = self._view
        _, heads, _, dim = states.shape
        tensor.view(-1, dim).index_copy_(0, self._target(heads), states.reshape(rows * heads, dim))
        return tensor[:rows, :, :longest]

    def _target(self, heads: int) -> torch.Tensor:
        """Where this step's states go, [B * H], in a layer seen as [rows * H * length, D]."""
        if heads not in self._targets:
            stretches = torch.arange(len(self._lengths_B) * heads, device=self._lengths_B.device)
            self._targets[heads] = stretches * self._length + self._lengths_B.repeat_interleave(heads)
        return self._targets[heads]


def _grown(tensor: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    # Zeros, because attention multiplies masked states by 0, and 0 times uninitialised memory may be NaN.
    grown = tensor.new_zeros(rows, tensor.shape[1], length, tensor.shape[3])
    grown[: tensor.shape[0], :, : tensor.shape[2]] = tensor
    return grown
