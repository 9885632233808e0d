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

from posttrain.types import IntArray, Sampling

UniformArray = npt.NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BLOCK = 256
"""Vocabulary entries summed together before the cumulative sum: the sum vectorises, the cumulative sum does not."""
_CHUNK_ELEMENTS = 1 << 18
"""Logits worked on at a time (1 MB in float32), so that the passes over one chunk stay in a core's cache."""
_FIRST_CANDIDATES = 512
"""Without top-k truncation looks among this many tokens first; they nearly always hold the mass, and a full sort
is 100x dearer."""
_GROWTH = 8
"""Rows that this many candidates do not settle are looked at again with that many times more."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Sampled tokens and their log-probabilities under the distribution they were drawn from."""

    tokens_B: torch.Tensor
    """int64."""
    logprobs_B: torch.Tensor
    """float32; 0.0 for greedy rows, whose distribution is a point."""
    kept_B: list[IntArray | None]
    """Ids that truncation left to draw from, likeliest first; None where nothing was cut, so for plain and greedy rows.
    """


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

    Rows are scaled by temperature, then cut by top-k (k tokens), then by top-p (the fewest of the likeliest tokens
    whose share of what top-k left reaches ``top_p``), then by min-p (tokens at least ``min_p`` times as likely as the
    likeliest), then renormalised. Equally likely tokens are taken in the order of their ids. This is transformers'
    order; vLLM cuts by min-p first, so its ``top_p`` is a share of what min-p and top-k left. A logit of minus infinity
    is never kept. Raises ``FloatingPointError`` when a row's logits are not finite numbers.
    """
    plain = [i for i, s in enumerate(samplings) if s.temperature > 0 and not s.truncates]
    if len(plain) == len(samplings):
        return _checked(_draw_plain(logits_BV, samplings, uniforms_B))
    greedy = [i for i, s in enumerate(samplings) if s.temperature == 0]
    truncated = [i for i, s in enumerate(samplings) if s.truncates]
    tokens_B = torch.empty(len(samplings), dtype=torch.int64, device=logits_BV.device)
    logprobs_B = torch.empty(len(samplings), dtype=torch.float32, device=logits_BV.device)
    draws = Draws(tokens_B, logprobs_B, [None] * len(samplings))
    for rows, method in ((plain, _draw_plain), (greedy, _draw_greedy), (truncated, _draw_truncated)):
        if rows:
            _put(draws, rows, method(logits_BV[rows], [samplings[i] for i in rows], uniforms_B[rows]))
    return _checked(draws)


def _put(draws: Draws, rows: Sequence[int], part: Draws) -> None:
    """Replace some rows of ``draws``, in place."""
    draws.tokens_B[rows], draws.logprobs_B[rows] = part.tokens_B, part.logprobs_B
    for row, kept in zip(rows, part.kept_B, strict=True):
        draws.kept_B[row] = kept


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
    return Draws(tokens_B, (top_B - top_B).float(), [None] * len(samplings))


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
    tokens_B, logprobs_B = (torch.cat(column) for column in zip(*parts, strict=True))
    return Draws(tokens_B, logprobs_B, [None] * len(samplings))


def _inverse_temperatures(samplings: Sequence[Sampling], device: torch.device) -> torch.Tensor | None:
    """1 / temperature as [B, 1], or None when all are 1, which saves a pass over the logits."""
    if all(s.temperature == 1 for s in samplings):
        return None
    return torch.tensor([[1 / s.temperature] for s in samplings], device=device)


def _draw_chunk(
    logits_BV: torch.Tensor, scale_B1: torch.Tensor | None, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and log-probabilities, [B] each."""
    x_BV = logits_BV.float() if scale_B1 is None else logits_BV * scale_B1
    top_B1 = x_BV.amax(dim=-1, keepdim=True)
    weight_BNK = _weights(x_BV, top_B1)
    mass_BN = weight_BNK.sum(dim=-1).double()
    total_B = mass_BN.sum(dim=-1)
    block_B, rest_B = _invert(mass_BN, uniform_B * total_B)
    rows = torch.arange(len(x_BV), device=x_BV.device)
    inside_B, _ = _invert(weight_BNK[rows, block_B].double(), rest_B)
    # Only rows that are not finite get past the end; they are reported by their log-probability.
    tokens_B = (block_B * _BLOCK + inside_B).clamp_(max=x_BV.shape[1] - 1)
    logprobs_B = (x_BV[rows, tokens_B] - top_B1[:, 0]).double() - total_B.log()
    return tokens_B, logprobs_B.float()


def _weights(x_BV: torch.Tensor, top_B1: torch.Tensor) -> torch.Tensor:
    """Probabilities relative to the likeliest token's in blocks of ``_BLOCK``, the last one padded with 0.

    A sum over blocks of fixed size adds in the same order for one row as for many, unlike one over the vocabulary.
    """
    padding = -x_BV.shape[1] % _BLOCK
    weight_BV = torch.nn.functional.pad(x_BV - top_B1, (0, padding), value=-torch.inf).exp_()
    return weight_BV.view(len(x_BV), -1, _BLOCK)


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
    scale_B1 = _inverse_temperatures(samplings, logits_BV.device)
    x_BV = logits_BV.float() if scale_B1 is None else logits_BV * scale_B1
    count = max([s.top_k for s in samplings if s.top_k], default=0)
    if any(not s.top_k for s in samplings):
        count = max(count, _FIRST_CANDIDATES)
    return _draw_among(x_BV, samplings, uniforms_B, count)


def _draw_among(
    x_BV: torch.Tensor, samplings: Sequence[Sampling], uniforms_B: UniformArray, num_candidates: int
) -> Draws:
    """Draw from scaled logits, each row among its likeliest tokens, or more where those do not settle what is kept."""
    device, vocabulary = x_BV.device, x_BV.shape[1]
    values_BC, ids_BC = _likeliest(x_BV, min(num_candidates, vocabulary))
    weights_BC = (values_BC.double() - values_BC[:, :1].double()).exp()
    limit_B1 = _column([s.top_k or vocabulary for s in samplings], device)
    kept_BC = _kept(weights_BC, _whole(x_BV, values_BC[:, :1], samplings), samplings)
    unsettled_B = kept_BC[:, -1] & (limit_B1[:, 0] > kept_BC.shape[1])

    weights_BC = weights_BC.masked_fill_(~kept_BC, 0)
    # The sum one by one does not depend on how many candidates come after, unlike that of sum().
    mass_B = weights_BC.cumsum(dim=-1)[:, -1]
    index_B, _ = _invert(weights_BC, torch.from_numpy(uniforms_B).to(device) * mass_B)
    drawn_B1 = index_B[:, None]
    logprobs_B = (values_BC.gather(1, drawn_B1).double() - values_BC[:, :1].double())[:, 0] - mass_B.log()
    draws = Draws(ids_BC.gather(1, drawn_B1)[:, 0], logprobs_B.float(), _rows_of(ids_BC, kept_BC, vocabulary))
    rows = unsettled_B.nonzero().flatten().tolist() if num_candidates < vocabulary else []
    if rows:
        chosen = [samplings[i] for i in rows]
        more = num_candidates * _GROWTH
        # Finding a large share of the vocabulary is as dear as sorting it.
        more = more if more * _GROWTH <= vocabulary else vocabulary
        _put(draws, rows, _draw_among(x_BV[rows], chosen, uniforms_B[rows], more))
    return draws


def _column(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """[B, 1]; integers, or float64, in which a top-p of 0.9 is the recipe's 0.9."""
    return torch.tensor(values, device=device, dtype=torch.int64 if isinstance(values[0], int) else torch.float64)[
        :, None
    ]


def _likeliest(x_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count`` entries, and their ids, of each row sorted downwards, equal ones by id."""
    if count == x_BV.shape[1]:
        return x_BV.sort(dim=-1, descending=True, stable=True)
    values_BC, ids_BC = x_BV.topk(count + 1, dim=-1)
    first_out_B = values_BC[:, count]
    values_BC, ids_BC = values_BC[:, :count], ids_BC[:, :count]
    # Which of the entries equal to the last one topk takes is up to its implementation.
    for row in (values_BC[:, -1] == first_out_B).nonzero().flatten().tolist():
        taken = values_BC[row] == first_out_B[row]
        ids_BC[row, taken] = (x_BV[row] == first_out_B[row]).nonzero().flatten()[: int(taken.sum())]
    ids_BC = ids_BC.sort(dim=-1).values
    values_BC, order_BC = x_BV.gather(1, ids_BC).sort(dim=-1, descending=True, stable=True)
    return values_BC, ids_BC.gather(1, order_BC)


def _whole(x_BV: torch.Tensor, top_B1: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor | None:
    """The sum of probabilities relative to the likeliest token's, [B, 1]; None when no row's top-p is a share of it."""
    if all(s.top_k or s.top_p == 1 for s in samplings):
        return None
    return _weights(x_BV, top_B1).sum(dim=-1).double().sum(dim=-1, keepdim=True)


def _kept(weights_BC: torch.Tensor, whole_B1: torch.Tensor | None, samplings: Sequence[Sampling]) -> torch.Tensor:
    """Which candidates truncation keeps, a prefix of each row: [B, C] bool.

    ``weights_BC`` are probabilities relative to the likeliest token's, falling; ``whole_B1`` is from ``_whole``.
    """
    device, count = weights_BC.device, weights_BC.shape[1]
    limit_B1 = _column([s.top_k or count for s in samplings], device).clamp_(max=count)
    top_p_B1 = _column([float(s.top_p) for s in samplings], device)
    min_p_B1 = _column([float(s.min_p) for s in samplings], device)
    upto_BC = weights_BC.cumsum(dim=-1)
    base_B1 = upto_BC.gather(1, limit_B1 - 1)
    if whole_B1 is not None:
        has_top_k_B1 = _column([int(s.top_k > 0) for s in samplings], device).bool()
        base_B1 = torch.where(has_top_k_B1, base_B1, whole_B1)
    within_BC = torch.arange(count, device=device) < limit_B1
    reached_BC = (upto_BC - weights_BC >= top_p_B1 * base_B1) & (top_p_B1 < 1)
    return within_BC & ~reached_BC & (weights_BC >= min_p_B1) & (weights_BC > 0)


def _rows_of(ids_BC: torch.Tensor, kept_BC: torch.Tensor, vocabulary: int) -> list[IntArray | None]:
    """The kept ids of each row; None where that is the whole vocabulary."""
    counts = kept_BC.sum(dim=-1).tolist()
    ids = ids_BC[:, : max(counts)].to(torch.int32).cpu().numpy()
    return [None if count == vocabulary else row[:count].copy() for row, count in zip(ids, counts, strict=True)]
