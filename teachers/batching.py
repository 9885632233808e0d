"""Which sequences go through a forward pass together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from posttrain.types import IntArray

MAX_BATCH_TOKENS = 8192
"""Tokens of a forward pass, padding included."""
ENOUGH_TOKENS = {"cpu": 256, "cuda": 2048}
"""From so many on a forward pass spends its time on arithmetic, not on reading weights and starting kernels."""
SHORTEST = 0.95
"""Of a batch's longest sequence: what is shorter starts another batch, once this one has enough tokens."""


def length_batches(
    lengths: Sequence[int], device: str = "cpu", *, max_tokens: int = MAX_BATCH_TOKENS
) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first.

    A batch padded to its longest sequence has at most ``max_tokens`` tokens, unless one sequence alone has more. It
    ends before, where it has enough tokens for ``device`` and padding the next sequence would take more than 5 %.
    The longest come first, so that memory peaks, or runs out, at once and not after an hour.
    """
    enough = ENOUGH_TOKENS.get(torch.device(device).type, max(ENOUGH_TOKENS.values()))
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batch: list[int] = []
    for index in order:
        if batch:
            longest = lengths[batch[0]]
            full = (len(batch) + 1) * longest > max_tokens
            if full or (len(batch) * longest >= enough and lengths[index] < SHORTEST * longest):
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
