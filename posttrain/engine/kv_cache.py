"""Key and value states of many unequal sequences, one row per sequence, rows packed at the front.

Shape letters: ``N`` tokens of a forward pass, ``H`` key heads, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache

from posttrain.engine.cpu_attention import BLOCK

States = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of one sequence by layer, [H, length, D] each."""


class RowCache(Cache):
    """A transformers cache in which every row has its own length and is written in place.

    Each layer holds [rows, H, length, D], so that the states of one head lie together and a batched matrix product
    reads them without a copy; rows and length double when they are outgrown. The length is a multiple of ``BLOCK``.

    ``routes_at`` is the layer, behind those of the model, that expert choices are kept in; it has nothing for values.
    """

    def __init__(self, *, routes_at: int | None = None) -> None:
        super().__init__(layers=[])
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._rows = 0
        self._length = 0
        self._rows_N = self._positions_N = torch.zeros(0, dtype=torch.int64)
        self._targets: dict[int, torch.Tensor] = {}
        self._routes_at = routes_at

    def reserve(self, rows: int, length: int) -> None:
        """Make room for this many rows of this length."""
        if rows <= self._rows and length <= self._length:
            return
        rows = self._rows if rows <= self._rows else max(rows, 2 * self._rows)
        length = self._length if length <= self._length else max(length + -length % BLOCK, 2 * self._length)
        self._keys = [_grown(x, rows, length) for x in self._keys]
        self._values = [_grown(x, rows, length) for x in self._values]
        self._rows, self._length = rows, length

    def begin(self, rows_N: torch.Tensor, positions_N: torch.Tensor) -> None:
        """Announce a pass, whose token ``n`` writes into row ``rows_N[n]`` at ``positions_N[n]``.

        Tokens that write to the same place have to be the same.
        """
        self._rows_N, self._positions_N = rows_N, positions_N
        self._targets = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states of a pass, [1, H, N, D]; returns the whole layer, without a copy."""
        self._ensure_layer(layer_idx, key_states, value_states)
        return self._write(self._keys[layer_idx], key_states), self._write(self._values[layer_idx], value_states)

    def load(self, row: int, states: States, length: int) -> None:
        """Copy the first ``length`` states of a sequence into a row."""
        for index, (keys, values) in enumerate(states):
            self._ensure_layer(index, keys[None], values[None])
            self._keys[index][row, :, :length] = keys[:, :length]
            self._values[index][row, :, :length] = values[:, :length]

    def read(self, row: int, length: int) -> States:
        """A copy of the first ``length`` states of a row."""
        return [
            (keys[row, :, :length].clone(), values[row, :, :length].clone())
            for keys, values in zip(self._keys, self._values, strict=True)
        ]

    def copy_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` states of some rows over others, as if all at once: rows may change places."""
        for tensor in (*self._keys, *self._values):
            tensor[targets, :, :length] = tensor[sources, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def note_routes(self, routes_NLK: torch.Tensor) -> None:
        """Keep the experts of a pass, once all its layers were written: they go with the states wherever those go."""
        assert self._routes_at is not None
        # 0 stays for states of which it is not known.
        notes = (routes_NLK.flatten(1) + 1).to(torch.int16)[None, None]
        self.update(notes, notes[..., :0], self._routes_at)

    def routes(self, row: int, length: int) -> torch.Tensor:
        """What was noted of the first ``length`` states of a row, [length, L * K] int16; -1 where nothing was."""
        assert self._routes_at is not None
        return self._keys[self._routes_at][row, 0, :length] - 1

    def _ensure_layer(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        while len(self._keys) <= index:
            for layers, like in ((self._keys, keys), (self._values, values)):
                layers.append(like.new_zeros((self._rows, like.shape[1], self._length, like.shape[3])))

    def _write(self, tensor: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        heads, dim = states.shape[1], states.shape[3]
        if not dim:
            return tensor
        # Token by token, then head by head.
        flat = states.transpose(1, 2).reshape(-1, dim)
        tensor.view(-1, dim).index_copy_(0, self._target(heads), flat)
        return tensor

    def _target(self, heads: int) -> torch.Tensor:
        """Where this pass's states go, [N * H], in a layer seen as [rows * H * length, D]."""
        if heads not in self._targets:
            heads_H = torch.arange(heads, device=self._rows_N.device)
            stretches_NH = self._rows_N[:, None] * heads + heads_H
            self._targets[heads] = (stretches_NH * self._length + self._positions_N[:, None]).flatten()
        return self._targets[heads]


def _grown(tensor: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    # Zeros, because attention multiplies masked states by 0, and 0 times uninitialised memory may be NaN.
    grown = tensor.new_zeros(rows, tensor.shape[1], length, tensor.shape[3])
    grown[: tensor.shape[0], :, : tensor.shape[2]] = tensor
    return grown
