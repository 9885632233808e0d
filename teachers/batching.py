"""Which sequences go through a forward pass together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from posttrain.types import IntArray

MAX_BATCH_TOKENS = 8192
"""Tokens of a teacher's forward pass, padding included."""


def length_batches(lengths: Sequence[int], *, max_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first.

    A batch padded to its longest sequence has at most ``max_tokens`` tokens, unless one sequence alone has more.
    The longest come first, so that memory peaks, or runs out, at once and not after an hour.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(sequences: Sequence[IntArray]) -> torch.Tensor:
    """Ids [B, T], padded on the right to the longest, without a mask: earlier positions of a causal model cannot see
    the padding."""
    ids_BT = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence)
    return ids_BT
