"""The divergences in plain PyTorch, float32: any dtype, any device.

Two float32 numbers per entry of a tile; what lies between the products and the gradient runs over a few rows at a time,
so that its intermediate results stay small, and on a CPU in the cache.

Shape letters: ``C`` positions of a tile, ``R`` a few of them, ``V`` vocabulary, ``D`` student width,
``E`` teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from posttrain.divergence.measure import Measure

_HALF = (torch.bfloat16, torch.float16)
_CPU_ENTRIES, _GPU_ENTRIES = 1 << 19, 1 << 24


class TorchTiles:
    """Divergence and logit gradient of tiles of up to ``max_positions`` positions; the memory of one is used again."""

    BYTES_PER_ENTRY = 8

    def __init__(
        self,
        max_positions: int,
        student_head_VD: torch.Tensor,
        teacher_head_VE: torch.Tensor,
        measure: Measure,
        *,
        largest_slice: int,
    ) -> None:
        self._heads = student_head_VD.detach(), teacher_head_VE.detach()
        self._measure = measure
        self._logits = tuple(
            torch.empty(max_positions, len(head), dtype=torch.float32, device=head.device) for head in self._heads
        )
        entries = _GPU_ENTRIES if student_head_VD.is_cuda else _CPU_ENTRIES
        # Processes that share a vocabulary meet at every few rows, hence the same number for all.
        self._rows = max(1, entries // largest_slice)

    def divergence_and_logit_gradient(
        self,
        student_hidden_CD: torch.Tensor,
        teacher_hidden_CE: torch.Tensor,
        *,
        weights_C: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Divergence [C] in nats, float32, and the gradient [C, V] of ``sum_c weights_c D_c``.

        The gradient is with respect to the student's logits, in the dtype of its hidden states, None without weights,
        and overwritten by the next call.
        """
        count = len(student_hidden_CD)
        student_CV, teacher_CV = (logits[:count] for logits in self._logits)
        _logits_into(student_CV, student_hidden_CD, self._heads[0])
        _logits_into(teacher_CV, teacher_hidden_CE, self._heads[1])
        divergence_C = torch.empty(count, dtype=torch.float32, device=student_CV.device)
        for start in range(0, count, self._rows):
            rows = slice(start, start + self._rows)
            log_p_RV, log_q_RV = self._log_probs(student_CV[rows], teacher_CV[rows])
            divergence_C[rows], grad_RV = _FORMS[self._measure.kind](
                log_p_RV, log_q_RV, self._measure, weights_C is not None
            )
            if weights_C is not None:
                torch.mul(grad_RV, weights_C[rows, None] / self._measure.temperature, out=student_CV[rows])
        return divergence_C, None if weights_C is None else student_CV.to(student_hidden_CD.dtype)

    def _log_probs(self, student_RV: torch.Tensor, teacher_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities in place of the logits."""
        cap, temperature = self._measure.teacher_logit_cap, self._measure.temperature
        if cap is not None:
            teacher_RV.div_(cap).tanh_().mul_(cap)
        both = student_RV, teacher_RV
        if temperature != 1.0:
            for logits in both:
                logits.div_(temperature)
        # First the highest, as a logit of some hundreds would round what is subtracted along with it.
        for top_R, logits in zip(self._measure.highest(torch.stack([z.amax(-1) for z in both])), both, strict=True):
            logits.sub_(top_R[:, None])
        mass_2R = self._measure.total(torch.stack([z.exp().sum(-1) for z in both]))
        for log_mass_R, logits in zip(mass_2R.log_(), both, strict=True):
            logits.sub_(log_mass_R[:, None])
        return both


def _reverse_kl(
    log_p_RV: torch.Tensor, log_q_RV: torch.Tensor, measure: Measure, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    p_RV, log_ratio_RV = log_p_RV.exp(), log_p_RV - log_q_RV
    kl_R = measure.total(torch.linalg.vecdot(p_RV, log_ratio_RV))
    return kl_R, log_ratio_RV.sub_(kl_R[:, None]).mul_(p_RV) if wants_gradient else p_RV


def _forward_kl(
    log_p_RV: torch.Tensor, log_q_RV: torch.Tensor, measure: Measure, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    q_RV = log_q_RV.exp()
    kl_R = measure.total(torch.linalg.vecdot(q_RV, log_q_RV - log_p_RV))
    return kl_R, log_p_RV.exp().sub_(q_RV) if wants_gradient else q_RV


def _jsd(
    log_p_RV: torch.Tensor, log_q_RV: torch.Tensor, measure: Measure, wants_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    beta = measure.beta
    p_RV, apart_RV = log_p_RV.exp(), log_q_RV - log_p_RV
    # log(max(p, q) / m), exactly 0 where p equals q.
    share_RV = torch.where(apart_RV >= 0, 1 - beta, beta)
    top_RV = apart_RV.abs().neg_().expm1_().mul_(share_RV).log1p_().neg_()
    p_over_m_RV, q_over_m_RV = top_RV - apart_RV.clamp_min(0), top_RV + apart_RV.clamp_max(0)
    pointwise_RV = log_q_RV.exp().mul_(beta).mul_(q_over_m_RV).addcmul_(p_RV, p_over_m_RV, value=1 - beta)
    jsd_R, student_kl_R = measure.total(torch.stack([pointwise_RV.sum(-1), torch.linalg.vecdot(p_RV, p_over_m_RV)]))
    if wants_gradient:
        p_over_m_RV.sub_(student_kl_R[:, None]).mul_(p_RV).mul_(1 - beta)
    return jsd_R, p_over_m_RV


_Form = Callable[[torch.Tensor, torch.Tensor, Measure, bool], tuple[torch.Tensor, torch.Tensor]]
"""From log-probabilities of a few rows, the divergence of each and, if wanted, the gradient by z (else anything)."""
_FORMS: dict[str, _Form] = {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "jsd": _jsd}


def _logits_into(logits_CV: torch.Tensor, hidden_CD: torch.Tensor, head_VD: torch.Tensor) -> None:
    """``hidden_CD @ head_VD.T`` in float32; half precision is multiplied as such only where the product is float32."""
    if head_VD.is_cuda and hidden_CD.dtype == head_VD.dtype and head_VD.dtype in _HALF:
        torch.mm(hidden_CD, head_VD.T, out_dtype=torch.float32, out=logits_CV)
        return
    hidden_CD = hidden_CD.float()
    num_parts = 1 if head_VD.dtype == torch.float32 else math.ceil(head_VD.numel() / _CPU_ENTRIES)
    for part, head in zip(logits_CV.chunk(num_parts, 1), head_VD.chunk(num_parts), strict=True):
        torch.mm(hidden_CD, head.float().T, out=part)
