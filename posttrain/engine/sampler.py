"""Drawing tokens: one keyed uniform number per token, turned into a token by inverting the cumulative distribution.

A random number depends only on the request's seed and id and on the token's position in the sequence. It does
not depend on which requests share the batch, so a resumed or rescheduled request draws what it would have drawn.

Shape letters: ``B`` rows, ``V`` vocabulary, ``C`` candidates left after truncation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import torch

from posttrain.types import Sampling

UniformArray = npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 256
"""Vocabulary entries summed together before the cumulative sum: the sum vectorises, the cumulative sum does not."""
_CHUNK_ELEMENTS = 1 << 18
"""Logits worked on at a time (1 MB in float32), so that the passes over one chunk stay in a core's cache."""
_FIRST_CANDIDATES = 512
"""Top-p looks among this many tokens first; they nearly always hold the mass, and a full sort is 100x dearer."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Sampled tokens and their log-probabilities under the distribution they were drawn from."""

    tokens_B: torch.Tensor
    """int64."""
    logprobs_B: torch.Tensor
    """float32; 0.0 for greedy rows, whose distribution is a point."""


def stream_key(seed: int, request_id: str) -> np.uint64:
    """The 64-bit key of a request's random numbers."""
    digest = blake2b(f"{seed}:{request_id}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def uniforms(keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> UniformArray:
    """One number in [0, 1) per key and position: splitmix64 used as a counter-based generator
    (Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = keys + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits_BV: torch.Tensor, samplings: Sequence[Sampling], uniforms_B: UniformArray) -> Draws:
    """Draw one token per row.

    Rows are scaled by temperature, then truncated by top-k, then by top-p (the smallest set of tokens whose mass
    reaches ``top_p``), then renormalised. Raises ``FloatingPointError`` when a row's logits are not finite numbers.
    """
    plain = [i for i, s in enumerate(samplings) if s.temperature > 0 and not _truncates(s)]
    if len(plain) == len(samplings):
        return _checked(_draw_plain(logits_BV, samplings, uniforms_B))
    greedy = [i for i, s in enumerate(samplings) if s.temperature == 0]
    truncated = [i for i, s in enumerate(samplings) if s.temperature > 0 and _truncates(s)]
    tokens_B = torch.empty(len(samplings), dtype=torch.int64, device=logits_BV.device)
    logprobs_B = torch.empty(len(samplings), dtype=torch.float32, device=logits_BV.device)
    for rows, method in ((plain, _draw_plain), (greedy, _draw_greedy), (truncated, _draw_truncated)):
        if rows:
            part = method(logits_BV[rows], [samplings[i] for i in rows], uniforms_B[rows])
            tokens_B[rows], logprobs_B[rows] = part.tokens_B, part.logprobs_B
    return _checked(Draws(tokens_B, logprobs_B))


def _truncates(sampling: Sampling) -> bool:
    return sampling.top_k > 0 or sampling.top_p < 1


def _checked(draws: Draws) -> Draws:
    bad = ~torch.isfinite(draws.logprobs_B)
    if bad.any():
        raise FloatingPointError(
            f"rows {bad.nonzero().flatten().tolist()}: the model's logits are not finite numbers; look for a diverged "
            "learner, or generate in float32"
        )
    return draws


def _draw_greedy(logits_BV: torch.Tensor, samplings: Sequence[Sampling], uniforms_B: UniformArray) -> Draws:
    top_B, tokens_B = logits_BV.max(dim=-1)
    # Zero for finite logits, NaN for the others, which the caller then reports.
    return Draws(tokens_B, (top_B - top_B).float())


def _draw_plain(logits_BV: torch.Tensor, samplings: Sequence[Sampling], uniforms_B: UniformArray) -> Draws:
    device = logits_BV.device
    uniform_B = torch.from_numpy(uniforms_B).to(device)
    scale_B = _inverse_temperatures(samplings, device)
    rows = max(1, _CHUNK_ELEMENTS // logits_BV.shape[1]) if device.type == "cpu" else len(samplings)
    scales = [None] * len(samplings) if scale_B is None else scale_B.split(rows)
    parts = [
        _draw_chunk(logits, scale, uniform)
        for logits, scale, uniform in zip(logits_BV.split(rows), scales, uniform_B.split(rows), strict=False)
    ]
    return Draws(torch.cat([p.tokens_B for p in parts]), torch.cat([p.logprobs_B for p in parts]))


def _inverse_temperatures(samplings: Sequence[Sampling], device: torch.device) -> torch.Tensor | None:
    """1 / temperature as [B, 1], or None when all are 1, which saves a pass over the logits."""
    if all(s.temperature == 1 for s in samplings):
        return None
    return torch.tensor([[1 / s.temperature] for s in samplings], device=device)


def _draw_chunk(logits_BV: torch.Tensor, scale_B1: torch.Tensor | None, uniform_B: torch.Tensor) -> Draws:
    x_BV = logits_BV.float() if scale_B1 is None else logits_BV * scale_B1
    top_B1 = x_BV.amax(dim=-1, keepdim=True)
    # Padding has weight 0, which is never drawn.
    padding = -x_BV.shape[1] % _BLOCK
    weight_BV = torch.nn.functional.pad(x_BV - top_B1, (0, padding), value=-torch.inf).exp_()
    weight_BNK = weight_BV.view(len(x_BV), -1, _BLOCK)
    mass_BN = weight_BNK.sum(dim=-1).double()
    total_B = mass_BN.sum(dim=-1)
    block_B, rest_B = _invert(mass_BN, uniform_B * total_B)
    rows = torch.arange(len(x_BV), device=x_BV.device)
    inside_B, _ = _invert(weight_BNK[rows, block_B].double(), rest_B)
    # Only rows that are not finite get past the end; they are reported by their log-probability.
    tokens_B = (block_B * _BLOCK + inside_B).clamp_(max=x_BV.shape[1] - 1)
    logprobs_B = (x_BV[rows, tokens_B] - top_B1[:, 0]).double() - total_B.log()
    return Draws(tokens_B, logprobs_B.float())


def _invert(mass_BN: torch.Tensor, target_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First index whose cumulative mass exceeds the target, and what the target has left inside it.

    An entry of mass 0 does not raise the cumulative mass and so is never first to exceed. A target that rounding
    has pushed past the end is put just below it.
    """
    upto_BN = mass_BN.cumsum(dim=-1)
    end_B1 = upto_BN[:, -1:]
    below_end_B1 = torch.nextafter(end_B1, torch.zeros_like(end_B1))
    target_B1 = torch.minimum(target_B[:, None], below_end_B1)
    index_B1 = torch.searchsorted(upto_BN, target_B1, right=True).clamp_(max=mass_BN.shape[1] - 1)
    before_B1 = upto_BN.gather(1, index_B1) - mass_BN.gather(1, index_B1)
    return index_B1[:, 0], (target_B1 - before_B1)[:, 0].clamp_(min=0)


def _draw_truncated(logits_BV: torch.Tensor, samplings: Sequence[Sampling], uniforms_B: UniformArray) -> Draws:
    device = logits_BV.device
    scale_B1 = _inverse_temperatures(samplings, device)
    x_BV = logits_BV.float() if scale_B1 is None else logits_BV * scale_B1
    vocabulary = x_BV.shape[1]
    count = max((s.top_k for s in samplings if s.top_k), default=0)
    if any(not s.top_k for s in samplings):
        count = max(count, _FIRST_CANDIDATES)
    total_B1 = x_BV.logsumexp(dim=-1, keepdim=True)
    top_p_B1 = torch.tensor([[s.top_p] for s in samplings], device=device)
    count = min(count, vocabulary)
    values_BC, ids_BC = x_BV.topk(count, dim=-1)
    needs_more = torch.tensor([[not s.top_k] for s in samplings], device=device)
    short_B1 = (values_BC - total_B1).exp().sum(dim=-1, keepdim=True) <= top_p_B1
    if count < vocabulary and (short_B1 & needs_more).any():
        values_BC, ids_BC = x_BV.sort(dim=-1, descending=True, stable=True)
    limit_B1 = torch.tensor([[s.top_k or vocabulary] for s in samplings], device=device)
    within_BC = torch.arange(values_BC.shape[1], device=device) < limit_B1
    # Top-p is a share of what top-k has left; without top-k that is everything, listed here or not.
    kept_total_B1 = values_BC.masked_fill(~within_BC, -torch.inf).logsumexp(dim=-1, keepdim=True)
    share_BC = (values_BC - torch.where(needs_more, total_B1, kept_total_B1)).exp().masked_fill_(~within_BC, 0).double()
    better_BC = share_BC.cumsum(dim=-1) - share_BC
    kept_BC = share_BC.masked_fill((better_BC >= top_p_B1) & (top_p_B1 < 1), 0)
    mass_B = kept_BC.sum(dim=-1)
    index_B, _ = _invert(kept_BC, torch.from_numpy(uniforms_B).to(device) * mass_B)
    probability_B = kept_BC.gather(1, index_B[:, None])[:, 0] / mass_B
    return Draws(ids_BC.gather(1, index_B[:, None])[:, 0], probability_B.log().float())
