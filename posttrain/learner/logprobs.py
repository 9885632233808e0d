"""Log-probabilities of given tokens from hidden states, without ever holding a [tokens x vocabulary] tensor.

The projection to the vocabulary is by far the largest activation of a small model: 4096 tokens x 150k entries are
2.4 GB in float32. Here it exists for ``chunk_tokens`` tokens at a time, in the forward pass and, recomputed, in the
backward pass.

Where sampling was truncated, a token's distribution is normalised over the tokens that were left to draw from, the
sampler's action space (DeepSeek-V3.2, arXiv 2512.02556, "Keep Sampling Mask").

Shape letters: ``N`` tokens, ``D`` hidden width, ``V`` vocabulary, ``C`` tokens of one chunk, ``K`` kept ids of all
tokens, or of those of a chunk; for buckets, ``K`` ids of each token and ``B = K + 1``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

_FORBIDDEN = -1e20
"""The logit of a token that could not be drawn. Its probability is exactly 0, and unlike with minus infinity so is
its share of the entropy and of the gradient, p log p."""


def token_logprobs(  # noqa: PLR0913 - a model, its tokens, and how the distribution is made of them
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    kept_ids_K: torch.Tensor | None = None,
    kept_offsets_N1: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_cap: float | None = None,
    chunk_tokens: int = 512,
    want_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``log p(target)`` and the entropy of ``p = softmax(hidden @ head.T / temperature)``, both [N], in nats.

    The product runs in the autocast type where autocast is on and in ``hidden``'s type otherwise; the softmax, the
    sums and the results are float32 (float64 for float64 input). Both outputs are differentiable in ``hidden`` and
    ``head``; the gradient of the head is accumulated in float32 over the chunks. Apply a model's own logit scaling
    to ``hidden`` beforehand; ``logit_cap`` c makes c tanh(logit / c) of each logit, before the temperature.

    Token i whose ``kept_ids_K[kept_offsets_N1[i] : kept_offsets_N1[i + 1]]`` is not empty has ``p``, and so its
    entropy, over those ids alone, which must hold its target; ids and offsets come together.

    Raises ``ValueError`` on shapes that do not fit, a temperature that is not positive, or an empty chunk.
    """
    if hidden_ND.shape[1] != head_VD.shape[1] or targets_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"token_logprobs: hidden {tuple(hidden_ND.shape)}, head {tuple(head_VD.shape)}, targets "
            f"{tuple(targets_N.shape)}; expected [N, D], [V, D] and [N]"
        )
    if temperature <= 0 or chunk_tokens < 1:
        raise ValueError(
            f"token_logprobs: temperature = {temperature!r}, chunk_tokens = {chunk_tokens!r}; expected a temperature "
            "> 0 (greedy rollouts have no log-probabilities to learn from) and at least one token per chunk"
        )
    kept = None
    if kept_ids_K is not None and kept_offsets_N1 is not None:
        if len(kept_offsets_N1) != len(hidden_ND) + 1:
            raise ValueError(
                f"token_logprobs: {len(kept_offsets_N1)} kept offsets for {len(hidden_ND)} tokens; expected one more "
                "than tokens"
            )
        kept = _Kept.of(kept_ids_K, kept_offsets_N1, chunk_tokens)
    device = hidden_ND.device.type
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    logprobs, entropy = _ChunkedLogprobs.apply(
        hidden_ND, head_VD, targets_N.long(), kept, temperature, logit_cap, chunk_tokens, want_entropy, compute_dtype
    )
    return logprobs, entropy


def bucket_logprobs(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    ids_NK: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 512,
) -> torch.Tensor:
    """Log-probabilities of the tokens ``ids_NK`` under ``softmax(hidden @ head.T / temperature)`` and, last, of all
    other tokens together, [N, K + 1] in nats.

    A row's ids are distinct and fewer than V. Logits and results are float32 (float64 for float64 input) whatever the
    inputs are; differentiable in ``hidden`` and ``head``.
    """
    logprobs_NB: torch.Tensor = _BucketLogprobs.apply(hidden_ND, head_VD, ids_NK, 1.0 / temperature, chunk_tokens)
    return logprobs_NB


@torch.no_grad()
def top_k_logprobs(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    logit_cap: float | None = None,
    chunk_tokens: int = 512,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``k`` likeliest tokens of each position, [N, k], and what ``bucket_logprobs`` gives for them, [N, k + 1].

    ``k`` is cut to V - 1. No gradient. ``logit_cap`` c makes c tanh(logit / c) of each logit before the temperature.
    """
    head, k = _exact(head_VD), min(k, len(head_VD) - 1)
    ids, logprobs = [], []
    for chunk in _chunks(len(hidden_ND), chunk_tokens):
        logits_CV = _capped(_exact_logits(hidden_ND[chunk], head), logit_cap).mul_(1.0 / temperature)
        ids.append(logits_CV.topk(k).indices)
        logprobs.append(_buckets(logits_CV, ids[-1]))
    return torch.cat(ids), torch.cat(logprobs)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Kept ids, cut into chunks."""

    ids: tuple[torch.Tensor, ...]
    """[K] int64 of each chunk."""
    rows: tuple[torch.Tensor, ...]
    """[K] int64 of each chunk: the token each id belongs to, counted from the chunk's first."""
    truncated: tuple[torch.Tensor, ...]
    """[C] bool of each chunk: whether the token has kept ids."""

    @classmethod
    def of(cls, ids_K: torch.Tensor, offsets_N1: torch.Tensor, chunk_tokens: int) -> _Kept:
        counts_N = offsets_N1.diff()
        rows_N = torch.arange(len(counts_N), device=ids_K.device) % chunk_tokens
        rows_K = rows_N.repeat_interleave(counts_N, output_size=len(ids_K))
        bounds = [*offsets_N1[:-1:chunk_tokens].tolist(), len(ids_K)]
        sizes = [stop - start for start, stop in pairwise(bounds)]
        return cls(ids_K.long().split(sizes), rows_K.split(sizes), (counts_N > 0).split(chunk_tokens))

    def restrict(self, logits_CV: torch.Tensor, chunk: int) -> torch.Tensor:
        """The logits with those of tokens that could not be drawn overwritten, in place."""
        if not len(self.ids[chunk]):
            return logits_CV
        place = self.rows[chunk], self.ids[chunk]
        kept_K = logits_CV[place]
        logits_CV.masked_fill_(self.truncated[chunk][:, None], _FORBIDDEN)
        logits_CV[place] = kept_K
        return logits_CV


class _ChunkedLogprobs(torch.autograd.Function):
    """Saves inputs and two [N] vectors (log-partition and entropy); everything of width V is recomputed."""

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd takes no keywords
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        targets_N: torch.Tensor,
        kept: _Kept | None,
        temperature: float,
        logit_cap: float | None,
        chunk_tokens: int,
        want_entropy: bool,
        compute_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # An entropy that is only logged then gets no gradient of zeros, which would cost a pass over the vocabulary.
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.logit_cap, ctx.chunk_tokens = temperature, logit_cap, chunk_tokens
        ctx.compute_dtype = compute_dtype
        ctx.kept = kept
        accumulate = torch.promote_types(compute_dtype, torch.float32)
        logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=accumulate)
        log_z_N, entropy_N = torch.empty_like(logprobs_N), torch.empty_like(logprobs_N)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = head_VD.to(compute_dtype)
            for index, chunk in enumerate(_chunks(len(hidden_ND), chunk_tokens)):
                logits_CV = _logits(hidden_ND[chunk], head, temperature, logit_cap)
                if kept is not None:
                    logits_CV = kept.restrict(logits_CV, index)
                log_z_N[chunk] = logits_CV.logsumexp(-1)
                logprobs_N[chunk] = logits_CV.gather(-1, targets_N[chunk, None]).squeeze(-1) - log_z_N[chunk]
                if want_entropy:
                    logits_CV -= log_z_N[chunk, None]
                    entropy_N[chunk] = -(logits_CV.exp() * logits_CV).sum(-1)
        ctx.save_for_backward(hidden_ND, head_VD, targets_N, log_z_N, entropy_N)
        return logprobs_N, entropy_N if want_entropy else None

    @staticmethod
    def backward(ctx: Any, *grads_N: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, head_VD, targets_N, log_z_N, entropy_N = ctx.saved_tensors
        want_hidden, want_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_ND) if want_hidden else None
        grad_head = torch.zeros_like(head_VD, dtype=log_z_N.dtype) if want_head else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = head_VD.to(ctx.compute_dtype)
            for index, chunk in enumerate(_chunks(len(hidden_ND), ctx.chunk_tokens)):
                logits_CV = _logits(hidden_ND[chunk], head, ctx.temperature, ctx.logit_cap)
                slope_CV = None if ctx.logit_cap is None else 1 - (logits_CV * (ctx.temperature / ctx.logit_cap)) ** 2
                if ctx.kept is not None:
                    logits_CV = ctx.kept.restrict(logits_CV, index)
                logp_CV = logits_CV - log_z_N[chunk, None]
                chunk_grads = [None if grad is None else grad[chunk] for grad in grads_N]
                grad_CV = _logits_gradient(logp_CV, targets_N[chunk], entropy_N[chunk], *chunk_grads)
                grad_CV = grad_CV * (1.0 / ctx.temperature)
                grad_CV = (grad_CV if slope_CV is None else grad_CV * slope_CV).to(ctx.compute_dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = (grad_CV @ head).to(grad_hidden.dtype)
                if grad_head is not None:
                    grad_head += grad_CV.T @ hidden_ND[chunk].to(ctx.compute_dtype)
        grad_head = None if grad_head is None else grad_head.to(head_VD.dtype)
        return grad_hidden, grad_head, *([None] * 7)


class _BucketLogprobs(torch.autograd.Function):
    """Saves its inputs; everything of width V is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        ids_NK: torch.Tensor,
        inverse_temperature: float,
        chunk_tokens: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, head_VD, ids_NK)
        ctx.settings = inverse_temperature, chunk_tokens
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = _exact(head_VD)
            chunks = [
                _buckets(_exact_logits(hidden_ND[chunk], head).mul_(inverse_temperature), ids_NK[chunk])
                for chunk in _chunks(len(hidden_ND), chunk_tokens)
            ]
        return torch.cat(chunks)

    @staticmethod
    def backward(ctx: Any, grad_NB: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, head_VD, ids_NK = ctx.saved_tensors
        inverse_temperature, chunk_tokens = ctx.settings
        want_hidden, want_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_ND) if want_hidden else None
        grad_head = torch.zeros_like(head_VD, dtype=grad_NB.dtype) if want_head else None
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head, factor = _exact(head_VD), head_VD.to(hidden_ND.dtype)
            for chunk in _chunks(len(hidden_ND), chunk_tokens):
                logits_CV = _exact_logits(hidden_ND[chunk], head).mul_(inverse_temperature)
                grad_CV = _buckets_gradient(logits_CV, ids_NK[chunk], grad_NB[chunk])
                grad_CV = grad_CV.mul_(inverse_temperature).to(hidden_ND.dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = grad_CV @ factor
                if grad_head is not None:
                    grad_head += grad_CV.T @ hidden_ND[chunk]
        return grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype), None, None, None


def _buckets(logits_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the ids and of the rest, [C, K + 1]. Overwrites the logits of the ids."""
    masses_CB = _log_masses(logits_CV, ids_CK)
    return masses_CB - masses_CB.logsumexp(-1, keepdim=True)


def _log_masses(logits_CV: torch.Tensor, ids_CK: torch.Tensor) -> torch.Tensor:
    # Summed over the rest itself: one minus the mass of the ids would round to nothing where these have almost all.
    picked_CK = logits_CV.gather(-1, ids_CK)
    rest_C1 = logits_CV.scatter_(-1, ids_CK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([picked_CK, rest_C1], -1)


def _buckets_gradient(logits_CV: torch.Tensor, ids_CK: torch.Tensor, grad_CB: torch.Tensor) -> torch.Tensor:
    """Gradient in the logits z, in their place: ``d log P_b / d z_j = [j in b] p_j / P_b - p_j``."""
    masses_CB = _log_masses(logits_CV, ids_CK)
    p_CB = masses_CB.softmax(-1)
    grad_CB = grad_CB - p_CB * grad_CB.sum(-1, keepdim=True)
    within_rest_CV = logits_CV.sub_(masses_CB[:, -1:]).exp_()
    return within_rest_CV.mul_(grad_CB[:, -1:]).scatter_(-1, ids_CK, grad_CB[:, :-1])


def _exact(head_VD: torch.Tensor) -> torch.Tensor:
    """The head as ``_exact_logits`` takes it: float32 instead of half precision, except on a GPU."""
    half = head_VD.dtype in (torch.bfloat16, torch.float16)
    return head_VD.float() if half and not head_VD.is_cuda else head_VD


def _exact_logits(hidden_CD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """``hidden @ head.T`` in float32 at least: half-precision logits are off by more than a good student is."""
    if head_VD.is_cuda and hidden_CD.dtype == head_VD.dtype and head_VD.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden_CD, head_VD.T, out_dtype=torch.float32)
    dtype = torch.promote_types(torch.promote_types(hidden_CD.dtype, head_VD.dtype), torch.float32)
    return hidden_CD.to(dtype) @ head_VD.to(dtype).T


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, start + chunk_tokens)


def _logits(
    hidden_CD: torch.Tensor, head_VD: torch.Tensor, temperature: float, logit_cap: float | None
) -> torch.Tensor:
    logits_CV = hidden_CD.to(head_VD.dtype) @ head_VD.T
    return _capped(logits_CV.to(torch.promote_types(head_VD.dtype, torch.float32)), logit_cap) * (1.0 / temperature)


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """``cap tanh(logits / cap)``, in place; None leaves the logits as they are."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _logits_gradient(
    logp_CV: torch.Tensor,
    targets_C: torch.Tensor,
    entropy_C: torch.Tensor,
    grad_logprobs_C: torch.Tensor | None,
    grad_entropy_C: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient in the logits z: ``d log p_y / d z_j = [j = y] - p_j`` and ``d H / d z_j = -p_j (log p_j + H)``."""
    grad_CV = logp_CV.exp()
    if grad_entropy_C is None:
        scale_CV = torch.zeros_like(entropy_C)[:, None]
    else:
        scale_CV = (logp_CV + entropy_C[:, None]) * grad_entropy_C[:, None]
    if grad_logprobs_C is None:
        return grad_CV.mul_(-scale_CV)
    grad_CV.mul_(-(scale_CV + grad_logprobs_C[:, None]))
    return grad_CV.scatter_add_(-1, targets_C[:, None], grad_logprobs_C[:, None])
