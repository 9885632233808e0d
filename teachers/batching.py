"""Which sequences go through a forward pass together, packed into one row, or padded where a model cannot do that."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from posttrain.errors import RecipeError
from posttrain.learner.attention import PACKED_ATTENTION, use_packed_attention
from posttrain.types import IntArray
from teachers.logits import body_of

MAX_BATCH_TOKENS = 8192
"""Tokens of a forward pass, padding included."""
ENOUGH_TOKENS = {"cpu": 256, "cuda": 2048}
"""From so many on a forward pass spends its time on arithmetic, not on reading weights and starting kernels."""
SHORTEST = 0.95
"""Of a batch's longest sequence: what is shorter starts another batch, once this one has enough tokens."""
PROBES = (9, 5, 5)
"""Lengths of the sequences on which packed and plain states are compared; the last two are the same."""
BFLOAT16_DEVIATION = 0.05
"""Norm of the difference that rounding makes between two ways of computing, of the norm; 30 layers make 0.013."""


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


def packed_rows(lengths: Sequence[int], *, max_tokens: int = MAX_BATCH_TOKENS) -> Iterator[list[int]]:
    """Indices in rows of at most ``max_tokens`` tokens, longest first; a longer sequence is a row of its own."""
    row: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if row and tokens + lengths[index] > max_tokens:
            yield row
            row, tokens = [], 0
        row.append(index)
        tokens += lengths[index]
    if row:
        yield row


def packed(sequences: Sequence[IntArray], device: str) -> dict[str, Any]:
    """What a model with packed attention is called with, to read them one after the other in one row."""
    lengths = [len(sequence) for sequence in sequences]
    positions = np.concatenate([np.arange(length) for length in lengths])
    return {
        "input_ids": torch.from_numpy(np.concatenate(sequences).astype(np.int64))[None].to(device),
        "position_ids": torch.from_numpy(positions)[None].to(device),
        "segment_lengths": tuple(lengths),
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device),
    }


_packs: dict[tuple[type, str, torch.dtype], bool] = {}
"""What was found, by class, config and type of the weights."""


@torch.no_grad()
def pack(model: Any) -> bool:
    """Switch a model to packed attention, if its states are then those of its own; else leave it as it is.

    Compared on a few tokens, once for each architecture and size. Models are left alone where a few tokens do not tell:
    with layers that attend to less than all earlier tokens, or positions that depend on the longest of a row; and on
    GPUs, where this has not been measured.
    """
    text, weight = model.config.get_text_config(), model.get_input_embeddings().weight
    config = text.to_json_string()
    kinds = set(getattr(text, "layer_types", None) or ())
    if (
        not weight.is_cpu
        or getattr(text, "sliding_window", None) is not None
        or kinds - {"full_attention"}
        or re.search(r'"rope_type": "(dynamic|longrope)"', config)
    ):
        return False
    own, key = model.config._attn_implementation, (type(model), config, weight.dtype)
    if key not in _packs:
        _packs[key] = _states_agree(model)
    model.set_attn_implementation(PACKED_ATTENTION if _packs[key] else own)
    return _packs[key]


def _states_agree(model: Any) -> bool:
    """Whether states are the same with packed attention, to which this switches."""
    vocabulary = model.config.get_text_config().vocab_size
    probes = [np.arange(length, dtype=np.int32) % vocabulary for length in PROBES]
    expected = [body_of(model)(input_ids=padded([probe]), use_cache=False)[0][0] for probe in probes]
    try:
        use_packed_attention(model)
        found_TE = body_of(model)(**packed(probes, "cpu"), use_cache=False)[0][0]
    except (RecipeError, TypeError, ValueError, AttributeError):
        return False
    rounding = 1e-3 if found_TE.dtype is torch.float32 else BFLOAT16_DEVIATION
    first, second = found_TE[PROBES[0] :].chunk(2)
    return _differ(found_TE, torch.cat(expected)) <= rounding and _differ(first, second) <= 1e-3


def _differ(one: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference, of the norm."""
    return float((one.float() - other.float()).norm() / one.float().norm())
