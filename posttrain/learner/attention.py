"""Attention over packed rows: many sequences in one [1, T] row, without padding and without a [T, T] mask.

The learner switches a model to this implementation and passes the segment lengths as the keyword ``segment_lengths``,
which transformers hands down to every attention layer. Each segment attends causally to itself alone. On a GPU in half
precision all segments are one call of PyTorch's variable-length flash attention. Elsewhere neighbours of equal length
share one call of ``scaled_dot_product_attention``, so packing sorts by length. A CPU computes these in float32: in
bfloat16 PyTorch's backward takes 1.2 (segments of 400 tokens) to 2.8 times (60 tokens) as long with AVX-512.

Not covered: attention sinks, soft-capped scores, position biases, and windows shorter than a segment. Those raise.

Shape letters: ``B`` batch (always 1), ``H`` query heads, ``K`` key heads, ``T`` tokens of the row, ``D`` head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from posttrain.errors import RecipeError

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    _VARLEN_ARGUMENTS: Mapping[str, Any] = {}
else:
    # PyTorch 2.11 takes fewer key heads than query heads without being asked, 2.13 only with this argument.
    _VARLEN_ARGUMENTS = inspect.signature(varlen_attn).parameters

PACKED_ATTENTION = "posttrain_packed"

# Keyword arguments by which models ask for attention that is not plain softmax(QK / sqrt(D)).
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


def packed_attention(  # noqa: PLR0913 - transformers prescribes the signature
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segment_lengths: Sequence[int] | None = None,
    cu_seqlens: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of a packed row; returns ([1, T, H, D], None).

    The signature is that of transformers' ``AttentionInterface``. Without ``segment_lengths`` the row is one segment.
    ``cu_seqlens`` holds the same lengths summed up, [segments + 1] int32 on the row's device, for the GPU's kernel.
    Raises ``ValueError`` for a batch of several rows or lengths that do not add up to T, and ``RecipeError`` for
    attention variants this implementation does not compute.
    """
    num_rows, _, num_tokens, _ = query_BHTD.shape
    lengths = (num_tokens,) if segment_lengths is None else segment_lengths
    if num_rows != 1 or sum(lengths) != num_tokens or key_BKTD.shape[2] != num_tokens or attention_mask is not None:
        raise ValueError(
            f"packed attention got {num_rows} rows of {num_tokens} tokens, {key_BKTD.shape[2]} keys, segment lengths "
            f"{list(lengths)} and mask {attention_mask is not None}; expected one row, as many keys, lengths that "
            "add up to it, and no mask"
        )
    _refuse_variants(kwargs, max(lengths), sliding_window)
    if cu_seqlens is not None and dropout == 0.0 and _takes_varlen(query_BHTD, value_BKTD):
        return _attend_varlen(query_BHTD, key_BKTD, value_BKTD, cu_seqlens, max(lengths), scaling), None
    dtype = _compute_dtype(query_BHTD)
    inside = torch.promote_types(dtype, torch.float32) if query_BHTD.is_cpu else dtype
    rows = (row[0].to(inside) for row in (query_BHTD, key_BKTD, value_BKTD))
    with torch.autocast(query_BHTD.device.type, enabled=False):
        output = torch.cat([_attend(run, dropout=dropout, scaling=scaling) for run in _runs(lengths, *rows)])
    return output[None].to(dtype), None


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch a model, in place, to packed attention. Forward passes must then go through one [1, T] row.

    Raises ``RecipeError`` for architectures whose attention is not replaceable.
    """
    # No mask function is registered under this name: transformers then builds no mask at all.
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    if not model._supports_attention_backend:
        raise RecipeError(
            f"model: {type(model).__name__} does not go through transformers' attention interface; packed training "
            "needs an architecture that does, such as Llama, Qwen or Mistral"
        )
    model.set_attn_implementation(PACKED_ATTENTION)


def _takes_varlen(query_BHTD: torch.Tensor, value_BKTD: torch.Tensor) -> bool:
    return (
        query_BHTD.is_cuda
        and "window_size" in _VARLEN_ARGUMENTS
        and _compute_dtype(query_BHTD) in (torch.bfloat16, torch.float16)
        and query_BHTD.shape[-1] % 8 == 0
        and query_BHTD.shape[-1] <= 256
        and query_BHTD.shape[-1] == value_BKTD.shape[-1]
        and torch.cuda.get_device_capability(query_BHTD.device) >= (8, 0)
    )


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What autocast would compute in; it does not know the variable-length kernel."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _attend_varlen(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scaling: float | None,
) -> torch.Tensor:
    """One kernel call for all segments; returns [1, T, H, D]."""
    dtype = _compute_dtype(query_BHTD)
    query, key, value = (row[0].transpose(0, 1).to(dtype) for row in (query_BHTD, key_BKTD, value_BKTD))
    arguments: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}
    if "enable_gqa" in _VARLEN_ARGUMENTS:
        arguments["enable_gqa"] = key.shape[1] != query.shape[1]
    output = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **arguments)
    assert isinstance(output, torch.Tensor), "only asked for with return_aux is there more"
    return output[None]


Run = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _runs(
    lengths: Sequence[int], query_HTD: torch.Tensor, key_KTD: torch.Tensor, value_KTD: torch.Tensor
) -> Iterator[Run]:
    """Views of shape [segments, heads, length, D] over neighbouring segments of equal length."""
    shapes = [(len(list(group)), length) for length, group in groupby(lengths)]
    sizes = [count * length for count, length in shapes]
    # Split, since the gradient of each slice by itself would be as large as the row.
    parts = zip(*(row.split(sizes, dim=1) for row in (query_HTD, key_KTD, value_KTD)), strict=True)
    for shape, run in zip(shapes, parts, strict=True):
        query, key, value = (part.unflatten(1, shape).transpose(0, 1) for part in run)
        yield query, key, value


def _attend(run: Run, *, dropout: float, scaling: float | None) -> torch.Tensor:
    """One kernel call for a run of equal segments; returns [segments * length, H, D]."""
    query, key, value = run
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1)


def _refuse_variants(kwargs: dict[str, Any], longest: int, sliding_window: int | None) -> None:
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise RecipeError(f"model: its attention uses {name!r}, which packed attention does not compute")
    if sliding_window is not None and longest > sliding_window:
        raise RecipeError(
            f"model: its attention window is {sliding_window} tokens and a sample has {longest}; packed attention "
            "does not window, so lower max_sequence_tokens to the window"
        )
