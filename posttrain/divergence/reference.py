"""The slow obvious form of the divergences: full logits, float64, gradients left to autograd.

Shape letters: ``N`` positions, ``V`` vocabulary, ``D`` student width, ``E`` teacher width.
"""

from __future__ import annotations

import math

import torch

from posttrain.divergence.measure import Divergence


def divergence_reference(
    student_hidden_ND: torch.Tensor,
    student_head_VD: torch.Tensor,
    teacher_hidden_NE: torch.Tensor,
    teacher_head_VE: torch.Tensor,
    *,
    divergence: Divergence = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    teacher_logit_cap: float | None = None,
) -> torch.Tensor:
    """The divergence of each position in nats, float64 [N], differentiable, from logits kept in full.

    Arguments as in ``divergence_sum``, except that ``jsd`` wants a beta between 0 and 1.
    """
    student_NV = student_hidden_ND.double() @ student_head_VD.double().T
    teacher_NV = teacher_hidden_NE.double() @ teacher_head_VE.double().T
    if teacher_logit_cap is not None:
        teacher_NV = teacher_logit_cap * torch.tanh(teacher_NV / teacher_logit_cap)
    log_p_NV = (student_NV / temperature).log_softmax(-1)
    log_q_NV = (teacher_NV / temperature).log_softmax(-1)
    if divergence == "reverse_kl":
        return _kl(log_p_NV, log_q_NV)
    if divergence == "forward_kl":
        return _kl(log_q_NV, log_p_NV)
    log_m_NV = torch.logaddexp(log_p_NV + math.log(1 - beta), log_q_NV + math.log(beta))
    return beta * _kl(log_q_NV, log_m_NV) + (1 - beta) * _kl(log_p_NV, log_m_NV)


def _kl(log_a_NV: torch.Tensor, log_b_NV: torch.Tensor) -> torch.Tensor:
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)
