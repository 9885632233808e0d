"""Log-probabilities of given tokens from hidden states, without ever holding a [tokens x vocabulary] tensor.

The projection to the vocabulary is by far the largest activation of a small model: 4096 tokens x 150k entries are
2.4 GB in float32. Here it exists for ``chunk_tokens`` tokens at a time, in the forward pass and, recomputed, in the
backward pass.

Shape letters: ``N`` tokens, ``D`` hidden width, ``V`` vocabulary, ``C`` tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def token_logprobs(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    targets_N: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int = 512,
    want_entropy: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``log p(target)`` and the entropy of ``p = softmax(hidden @ head.T / temperature)``, both [N], in nats.

    The product runs in the autocast type where autocast is on and in ``hidden``'s type otherwise; the softmax, the
    sums and the results are float32 (float64 for float64 input). Both outputs are differentiable in ``hidden`` and
    ``head``; the gradient of the head is accumulated in float32 over the chunks. Apply a model's own logit scaling
    to ``hidden`` beforehand; soft-capped logits are not covered.

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
    device = hidden_ND.device.type
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    logprobs, entropy = _ChunkedLogprobs.apply(
        hidden_ND, head_VD, targets_N.long(), 1.0 / temperature, chunk_tokens, want_entropy, compute_dtype
    )
    return logprobs, entropy


class _ChunkedLogprobs(torch.autograd.Function):
    """Saves inputs and two [N] vectors (log-partition and entropy); everything of width V is recomputed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        targets_N: torch.Tensor,
        inverse_temperature: float,
        chunk_tokens: int,
        want_entropy: bool,
        compute_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # An entropy that is only logged then gets no gradient of zeros, which would cost a pass over the vocabulary.
        ctx.set_materialize_grads(False)
        ctx.inverse_temperature, ctx.chunk_tokens, ctx.compute_dtype = inverse_temperature, chunk_tokens, compute_dtype
        accumulate = torch.promote_types(compute_dtype, torch.float32)
        logprobs_N = hidden_ND.new_empty(len(hidden_ND), dtype=accumulate)
        log_z_N, entropy_N = torch.empty_like(logprobs_N), torch.empty_like(logprobs_N)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            head = head_VD.to(compute_dtype)
            for chunk in _chunks(len(hidden_ND), chunk_tokens):
                logits_CV = _logits(hidden_ND[chunk], head, inverse_temperature)
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
            for chunk in _chunks(len(hidden_ND), ctx.chunk_tokens):
                logp_CV = _logits(hidden_ND[chunk], head, ctx.inverse_temperature) - log_z_N[chunk, None]
                chunk_grads = [None if grad is None else grad[chunk] for grad in grads_N]
                grad_CV = _logits_gradient(logp_CV, targets_N[chunk], entropy_N[chunk], *chunk_grads)
                grad_CV = (grad_CV * ctx.inverse_temperature).to(ctx.compute_dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = (grad_CV @ head).to(grad_hidden.dtype)
                if grad_head is not None:
                    grad_head += grad_CV.T @ hidden_ND[chunk].to(ctx.compute_dtype)
        return grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype), None, None, None, None, None


def _chunks(num_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, num_tokens, chunk_tokens):
        yield slice(start, start + chunk_tokens)


def _logits(hidden_CD: torch.Tensor, head_VD: torch.Tensor, inverse_temperature: float) -> torch.Tensor:
    logits_CV = hidden_CD.to(head_VD.dtype) @ head_VD.T
    return logits_CV.to(torch.promote_types(head_VD.dtype, torch.float32)) * inverse_temperature


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
