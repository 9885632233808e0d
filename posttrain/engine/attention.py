"""Attention for decode steps on a CPU.

The fused kernel behind ``scaled_dot_product_attention`` is made for many queries. With one query per row it is up to
3x slower in bfloat16 than two batched matrix products, which read the cached states once and copy nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "posttrain_decode"


def use_decode_attention(model: PreTrainedModel) -> None:
    """Make a model on a CPU decode with ``decode_attention``; elsewhere, leave its attention as it is."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, decode_attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)


def decode_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One query per row over cached states; more queries (prompts) go to the fused kernel.

    ``query`` is [B, G * H, 1, D], ``key`` and ``value`` are [B, H, L, D], and the additive mask [B, 1, 1, L]; the G
    query heads that share a key head become the rows of one matrix product. Returns [B, 1, G * H, D].
    """
    rows, heads, queries, dim = query.shape
    if queries > 1 or attention_mask is None or attention_mask.dtype == torch.bool:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = (query * scaling).view(rows, key.shape[1], -1, dim)
    scores = torch.matmul(grouped, key.transpose(2, 3)).add_(attention_mask)
    mixed = torch.matmul(scores.softmax(dim=-1), value)
    return mixed.reshape(rows, 1, heads, dim), None
