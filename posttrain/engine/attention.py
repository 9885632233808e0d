"""Attention for the embedded engine: one packed pass of rows that decode and of stretches of prompts.

The tokens of all rows lie in one row, one after another, and each attends to its own states alone, so no position of a
pass is padding, but in float32 on a CPU for at most three copies of the last token.

**Batch invariance.** In float32 on a CPU for which ``cpu_attention`` can be compiled, a token's states and logits are
the same to the last bit whatever shares its pass, and whether it was decoded or computed in a stretch. So a rollout
that is interrupted and goes on from its journal draws the tokens it would have drawn. Matrix products keep the order in
which they add while the number of rows is a multiple of ``ROW_MULTIPLE``, which is why passes are padded to one.
Elsewhere what shares the pass may change the rounding of the last bits.

Shape letters: ``N`` tokens of a pass, ``B`` decoding rows, ``H`` key heads, ``G`` query heads per key head, ``Q``
tokens of a stretch, ``L`` states of the longest row, ``D`` head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from posttrain.engine import cpu_attention

ENGINE_ATTENTION = "posttrain_engine"
ROW_MULTIPLE = 4

# Keyword arguments by which models ask for attention that is not plain softmax(QK / sqrt(D)).
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Some consecutive tokens of one row."""

    row: int
    past: int
    """States the row already has; the stretch begins at this position."""
    count: int

    @property
    def stop(self) -> int:
        """States the row has afterwards."""
        return self.past + self.count


@dataclass(frozen=True)
class Layout:
    """Whose the tokens of a pass are: one of each of the first rows of the cache, then the stretches, then padding."""

    num_decoding: int
    stretches: Sequence[Stretch]
    rows_N: torch.Tensor
    positions_N: torch.Tensor

    @cached_property
    def seen_N(self) -> torch.Tensor:
        """How many states of its row each token attends to."""
        return self.positions_N + 1

    @cached_property
    def decode_mask(self) -> torch.Tensor:
        """[B, 1, 1, L], for all layers."""
        lengths_B = self.seen_N[: self.num_decoding]
        seen_BL = torch.arange(int(lengths_B.max()), device=lengths_B.device) < lengths_B[:, None]
        return seen_BL[:, None, None]


def use_engine_attention(model: PreTrainedModel) -> None:
    """Switch a model, in place, to this attention. ``ValueError`` for architectures whose attention is fixed."""
    if not model._supports_attention_backend:
        raise ValueError(
            f"model {type(model).__name__} does not go through transformers' attention interface; serve it with "
            "another engine, or choose an architecture that does, such as Llama, Qwen or Mistral"
        )
    # No mask function is registered under this name, so transformers builds no mask of its own.
    AttentionInterface.register(ENGINE_ATTENTION, engine_attention)
    model.set_attn_implementation(ENGINE_ATTENTION)
    # cuDNN's kernels are planned for each length anew, which takes 10 ms, and lengths change with every token.
    torch.backends.cuda.enable_cudnn_sdp(False)


def engine_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    layout: Layout,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The signature is that of transformers' ``AttentionInterface``.

    ``query`` [1, G * H, N, D]; ``key`` and ``value`` are whole layers of the cache, [rows, H, capacity, D]. Returns
    [1, N, G * H, D].
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"model: its attention uses {name!r}, which the embedded engine does not compute")
    if cpu_attention.serves(query):
        mixed = cpu_attention.attend(query[0], key, value, layout.rows_N, layout.seen_N, scaling=scaling)
    else:
        mixed = _fused(query, key, value, layout, scaling)
    return mixed[None], None


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float) -> torch.Tensor:
    """[N, G * H, D], by the kernels of PyTorch."""
    begin, outputs = layout.num_decoding, []
    if begin:
        mask = layout.decode_mask
        keys, values = (x[:begin, :, : mask.shape[-1]] for x in (key, value))
        # One token's query heads stand in for the queries of their key head, so that no kernel needs to know of groups.
        query_BHGD = query[0, :, :begin].transpose(0, 1).unflatten(1, (key.shape[1], -1))
        mixed_BHGD = scaled_dot_product_attention(query_BHGD, keys, values, attn_mask=mask, scale=scaling)
        outputs.append(mixed_BHGD.flatten(1, 2))
    for stretch in layout.stretches:
        stop = begin + stretch.count
        mixed = _fused_stretch(query[:, :, begin:stop], key, value, stretch, scaling)
        outputs.append(mixed[0].transpose(0, 1))
        begin = stop
    # Padding is a copy all the way, or it would overwrite the last token's states with others.
    outputs.append(outputs[-1][-1:].expand(query.shape[2] - begin, -1, -1))
    return torch.cat(outputs)


def _fused_stretch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, stretch: Stretch, scaling: float
) -> torch.Tensor:
    """[1, G * H, Q, D]."""
    keys, values = (x[stretch.row : stretch.row + 1, :, : stretch.stop] for x in (key, value))
    groups = query.shape[1] // key.shape[1]
    mask = _stretch_mask(stretch, query.device)
    if mask is not None and query.is_cuda and groups > 1:
        # No fused kernel but cuDNN's takes both a mask and groups.
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
    grouped = keys.shape[1] != query.shape[1]
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=stretch.past == 0, scale=scaling, enable_gqa=grouped
    )


def _stretch_mask(stretch: Stretch, device: torch.device) -> torch.Tensor | None:
    """[Q, past + Q]: a token sees the past, the tokens of its stretch before it, and itself. None if that is plain."""
    if stretch.past == 0 or stretch.count == 1:
        return None
    return torch.ones(stretch.count, stretch.stop, dtype=torch.bool, device=device).tril_(diagonal=stretch.past)
