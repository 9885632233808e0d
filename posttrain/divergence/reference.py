"""The slow obvious form of the divergences: full logits, float64, gradients left to autograd.

Shape letters: ``N`` positions, ``V`` vocabulary, ``D`` student width, ``E`` teacher width.
"""

from __future__ import annotations

import torch


def reverse_kl_reference(
    student_hidden_ND: torch.Tensor,
    student_head_VD: torch.Tensor,
    teacher_hidden_NE: torch.Tensor,
    teacher_head_VE: torch.Tensor,
    *,
    temperature: float = 1.0,
) -> torch.Tensor:
    """KL(student || teacher) of each position in nats, float64 [N], differentiable, from logits kept in full."""
    student_NV = student_hidden_ND.double() @ student_head_VD.double().T / temperature
    teacher_NV = teacher_hidden_NE.double() @ teacher_head_VE.double().T / temperature
    log_p_NV = student_NV.log_softmax(-1)
    log_q_NV = teacher_NV.log_softmax(-1)
    return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
