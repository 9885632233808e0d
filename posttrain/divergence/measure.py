"""Which divergence, between which distributions, and which processes hold a slice of the vocabulary each.

With z and y the logits of student and teacher over the temperature, the teacher's capped before, p and q their softmax
and m = (1 - beta) p + beta q:

    reverse_kl   D = sum_v p_v log(p_v / q_v)                                    dD/dz_v = p_v (log(p_v / q_v) - D)
    forward_kl   D = sum_v q_v log(q_v / p_v)                                    dD/dz_v = p_v - q_v
    jsd          D = sum_v beta q_v log(q_v / m_v) + (1 - beta) p_v log(p_v / m_v)
                 dD/dz_v = (1 - beta) p_v (log(p_v / m_v) - KL(p || m))

The last is the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, Eq. 1) with the beta of TRL, where beta
0 stands for forward and beta 1 for reverse KL, though the limits themselves are 0. All gradients are
p_v (g_v - sum_w p_w g_w) with g_v the derivative of D by p_v.

Shape letters: ``C`` positions, ``V`` vocabulary or this process's slice of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import distributed

Divergence = Literal["reverse_kl", "forward_kl", "jsd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """A divergence with its settings, checked; raises ``ValueError`` for those that make no sense."""

    divergence: Divergence = "reverse_kl"
    beta: float = 0.5
    """Share of the teacher in the mixture of ``jsd``."""
    temperature: float = 1.0
    """Divides the logits of both models."""
    teacher_logit_cap: float | None = None
    """The teacher's logits are ``cap tanh(logit / cap)``, before the temperature."""
    vocabulary_group: distributed.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence = {self.divergence!r}; expected one of {list(get_args(Divergence))}")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta = {self.beta}; expected the teacher's share in the mixture of jsd, from 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature}; expected a number above 0, such as 1.0")
        if self.teacher_logit_cap is not None and not self.teacher_logit_cap > 0:
            raise ValueError(
                f"teacher_logit_cap = {self.teacher_logit_cap}; expected a number above 0, or None for a teacher "
                "without soft-capping"
            )

    @property
    def kind(self) -> Divergence:
        """The divergence, with the ends of ``jsd`` as what they stand for."""
        ends: dict[float, Divergence] = {0.0: "forward_kl", 1.0: "reverse_kl"}
        return ends.get(self.beta, "jsd") if self.divergence == "jsd" else self.divergence

    def highest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest over the processes' slices of the vocabulary, entry by entry and in place."""
        if self.vocabulary_group is not None:
            distributed.all_reduce(values, distributed.ReduceOp.MAX, group=self.vocabulary_group)
        return values

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the processes' slices of the vocabulary, in place; float32 in any case on the way."""
        if self.vocabulary_group is None:
            return values
        summed = values.float().contiguous()
        distributed.all_reduce(summed, group=self.vocabulary_group)
        return values if summed is values else values.copy_(summed)

    def of_blocks(self, sums_5BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Either KL [C], and what makes probabilities [2, B, C] of a block's exponentials, from sums over each block.

        ``sums_5BC`` are, per block, the highest logit of student and teacher, the sums of their exponentials below it,
        and the mean of how far the student's is above the teacher's then, under the student for reverse KL and under
        the teacher for forward KL. The probability of an entry is the exponential of what it is below its block's
        highest plus the number returned here.
        """
        top_2BC, mass_2BC, mean_BC = sums_5BC[:2], sums_5BC[2:4], sums_5BC[4]
        below_2BC = top_2BC - self.highest(top_2BC.amax(1))[:, None]
        mass_2BC = mass_2BC * below_2BC.exp()
        side = 0 if self.kind == "reverse_kl" else 1
        apart_C = (mass_2BC[side] * (mean_BC + below_2BC[0] - below_2BC[1])).sum(0)
        totals_3C = self.total(torch.cat([mass_2BC.sum(1), apart_C[None]]))
        log_mass_2C = totals_3C[:2].log()
        kl_C = totals_3C[2] / totals_3C[side] - log_mass_2C[0] + log_mass_2C[1]
        return (kl_C if side == 0 else -kl_C), below_2BC - log_mass_2C[:, None]

    def agreed(self, *facts: int) -> list[int]:
        """The largest of each fact over the processes."""
        if self.vocabulary_group is None:
            return list(facts)
        device = "cuda" if distributed.get_backend(self.vocabulary_group) == "nccl" else "cpu"
        largest = torch.tensor(facts, device=device)
        distributed.all_reduce(largest, distributed.ReduceOp.MAX, group=self.vocabulary_group)
        return [int(fact) for fact in largest]
