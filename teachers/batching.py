"""Which sequences go through a forward pass together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


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
