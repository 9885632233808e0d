"""What stands in place of the exact divergence in other projects, as pure functions of per-token vectors.

Shape letters: ``N`` loss tokens, ``B`` buckets: the teacher's k likeliest tokens, and all others together.
"""

from __future__ import annotations

import math

import torch

from posttrain.divergence import Divergence


def sampled_token_advantages(teacher_logprobs_N: torch.Tensor, logprobs_N: torch.Tensor) -> torch.Tensor:
    """``sg[log pi_T(y_t) - log pi_theta(y_t)]``, [N]: MOPD's advantage (MiMo-V2-Flash), also of GLM-5 and Nemotron.

    Minus its mean over tokens that the student drew is an unbiased estimate of KL(student || teacher).
    """
    return (teacher_logprobs_N - logprobs_N).detach()


def gated_policy_gradient(
    logprobs_N: torch.Tensor, behaviour_logprobs_N: torch.Tensor, advantages_N: torch.Tensor, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``-w_t A_t log pi_theta(y_t)`` and ``w_t``, both [N]; w_t is a constant.

    ``w_t = pi_theta(y_t) / mu(y_t)``, mu the engine that drew the token, where that lies within ``[low, high]``, and
    0 elsewhere: the gate of MiMo-V2-Flash. On policy this is the plain policy gradient.
    """
    ratio_N = (logprobs_N.detach() - behaviour_logprobs_N).exp()
    weight_N = torch.where((ratio_N >= low) & (ratio_N <= high), ratio_N, 0.0)
    return -weight_N * advantages_N * logprobs_N, weight_N


def prefix_importance(log_ratio_N: torch.Tensor, segment_N: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``prod_{j<t} pi_theta(y_j) / mu(y_j)`` over the loss tokens of t's sample before it, cut to ``[low, high]``, [N].

    ``log_ratio_N`` is log pi_theta - log mu, and ``segment_N`` the sample of each token, ascending. Without the cut it
    makes the mean of a function of the text before t over mu's rollouts that over the current policy's.
    """
    before_N = log_ratio_N.double().cumsum(0) - log_ratio_N
    starts_N = torch.ones_like(segment_N, dtype=torch.bool)
    starts_N[1:] = segment_N.diff() != 0
    at_start_S = before_N[starts_N]
    before_N -= at_start_S[starts_N.cumsum(0) - 1]
    return before_N.exp().clamp(low, high).to(log_ratio_N.dtype)


def bucket_divergence(
    student_NB: torch.Tensor, teacher_NB: torch.Tensor, divergence: Divergence = "reverse_kl", beta: float = 0.5
) -> torch.Tensor:
    """Divergence in nats over buckets, [N], from log-probabilities [N, B] that sum to one; the kinds are those of
    ``posttrain.divergence``.

    Never negative and never more than the divergence over all tokens, to which it grows with the number of buckets.
    Without the bucket of the rest the reverse KL of a teacher's top k is least where the student has little mass on
    them at all, and falls below zero on the way, as the forward KL does (verl#5041, verl#7856).
    """
    if divergence == "reverse_kl":
        return _kl(student_NB, teacher_NB)
    if divergence == "forward_kl":
        return _kl(teacher_NB, student_NB)
    mixture_NB = torch.logaddexp(student_NB + math.log1p(-beta), teacher_NB + math.log(beta))
    return beta * _kl(teacher_NB, mixture_NB) + (1 - beta) * _kl(student_NB, mixture_NB)


def _kl(log_a_NB: torch.Tensor, log_b_NB: torch.Tensor) -> torch.Tensor:
    return (log_a_NB.exp() * (log_a_NB - log_b_NB)).sum(-1)
