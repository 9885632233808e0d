"""MXFP4: 4-bit numbers in blocks of 32 that share a scale, as values of a wider type (fake quantisation).

OCP Microscaling Formats v1.0: an element is E2M1, one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; the scale of
a block is E8M0, a power of two, ``2^(floor(log2(max |w|)) - 2)``, so that the largest element lies in [4, 8) before it
is rounded, and what is above 6 becomes 6. Training computes with the rounded weights and gives their gradient to the
float32 masters unchanged, a straight-through estimator (arXiv 1308.3432), as DeepSeek-V4 trains its experts.
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK = 32
"""Elements of a row that share a scale."""
_LARGEST_EXPONENT = 2
"""Of an element: 6 is 1.5 * 2^2."""
_SCALE_EXPONENTS = (-127, 127)


def quantise(weights: torch.Tensor) -> torch.Tensor:
    """The nearest MXFP4 values, ties to even, blocks along the last dimension; the last block of a row may be short.

    Same shape and type. Quantising twice is quantising once. Values that are not finite stay what they are.
    """
    width = weights.shape[-1]
    padded = torch.nn.functional.pad(weights.float(), (0, -width % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    # frexp gives a mantissa in [0.5, 1): exact where log2 rounds.
    exponent = torch.frexp(largest).exponent - 1 - _LARGEST_EXPONENT
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(*_SCALE_EXPONENTS))
    rounded = _round_elements(blocks / scale) * scale
    return rounded.flatten(-2)[..., :width].to(weights.dtype)


def fake_quantise(weights: torch.Tensor) -> torch.Tensor:
    """``quantise``, whose gradient reaches ``weights`` as if nothing had been rounded."""
    return _StraightThrough.apply(weights)


def _round_elements(values: torch.Tensor) -> torch.Tensor:
    """To the nearest element of E2M1: the step is 0.5 below 2, 1 below 4, 2 above."""
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    # A division by a power of two is exact, and round() goes to even, which is E2M1's even mantissa at every step.
    return (values / step).round().mul(step).clamp(-6.0, 6.0)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor) -> torch.Tensor:
        return quantise(weights)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient
