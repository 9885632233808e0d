"""Multi-teacher on-policy distillation, as a function of hidden states and heads.

Shape letters: ``N`` loss tokens of the micro-batch, ``S`` its samples, ``V`` vocabulary, ``D`` student width,
``E`` teacher width, ``L`` loss tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from posttrain.config import Distill
from posttrain.divergence import reverse_kl_sum
from posttrain.learner.distill_losses import bucket_divergence, gated_policy_gradient, sampled_token_advantages
from posttrain.learner.logprobs import bucket_logprobs, token_logprobs, top_k_logprobs
from posttrain.learner.losses import Metrics
from posttrain.learner.objectives import without_rounding
from posttrain.learner.packing import PackedBatch, Totals
from posttrain.learner.policy import HeadInputs
from posttrain.protocols import StateStore
from posttrain.types import Sample

_TILE_BYTES = 2**28
"""Of a float32 [tokens x vocabulary] tile of the losses that are not ``posttrain.divergence``'s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillObjective:
    """The token mean of ``w KL(student || teacher)``, exact over the vocabulary, or what ``config.loss`` puts in its
    place.

    DeepSeek-V4, Eq. 29, with one teacher per sample.
    """

    config: Distill
    states: StateStore
    """Teacher states by sample id: [L, E], one row per loss token, in order."""
    head_of: Callable[[str], torch.Tensor]
    """A teacher's head [V, E] by name. Called once per micro-batch; micro-batches come ordered by teacher."""

    def loss(self, student: HeadInputs, batch: PackedBatch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """The batch's share of the distillation loss and its metrics.

        ``kl`` and ``kl/DOMAIN`` are the divergence in nats per token, unweighted; an unbiased estimate of it, which may
        be negative, with ``loss`` "sampled_token", and a lower bound with "teacher_top_k".

        Raises ``ValueError`` for samples without teacher or with states of another length, and ``FloatingPointError``
        when the divergence is not finite.
        """
        if batch.teacher is None:
            raise ValueError(f"samples {list(batch.sample_ids)[:3]} name no teacher; distillation needs Sample.teacher")
        teacher = self._teacher(batch, student.hidden_ND.device)
        weight_S = torch.tensor([sample.weight for sample in batch.samples], device=student.hidden_ND.device)
        weights_N = weight_S[batch.segment_ids] / totals.num_loss_tokens
        extra: Metrics = {}
        if self.config.loss == "sampled_token":
            loss, kl_N, extra = self._sampled_token(student, teacher, batch, weights_N)
        elif self.config.loss == "teacher_top_k":
            loss, kl_N = self._teacher_top_k(student, teacher, weights_N)
        else:
            loss, kl_N = reverse_kl_sum(
                student.hidden_ND,
                student.head_VD,
                teacher.hidden_ND,
                teacher.head_VD,
                weights_N=weights_N,
                temperature=self.config.temperature,
                chunk_tokens=self.config.loss_chunk_tokens,
            )
        _require_finite(kl_N, batch)
        return loss, _kl_metrics(kl_N, batch) | extra

    def _sampled_token(
        self, student: HeadInputs, teacher: HeadInputs, batch: PackedBatch, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """Loss, one-sample estimate of the KL [N], and metrics, of the policy gradient on the tokens drawn.

        Where sampling was truncated both models are compared over the tokens it chose from.
        """
        logprobs_N = self._token_logprobs(student, batch)
        with torch.no_grad():
            teacher_N = self._token_logprobs(teacher, batch)
        advantages_N = sampled_token_advantages(teacher_N, logprobs_N)
        clip = self.config.advantage_clip
        clipped_N = advantages_N if clip is None else advantages_N.clamp(-clip, clip)
        behaviour_N = without_rounding(batch.behaviour_logprobs, logprobs_N)
        loss_N, importance_N = gated_policy_gradient(logprobs_N, behaviour_N, clipped_N, *self.config.importance_bounds)
        metrics = {
            "clamped_share": _mean((clipped_N != advantages_N).float()),
            "importance_weight": _mean(importance_N),
        }
        return loss_N @ weights_N, -advantages_N, metrics

    def _teacher_top_k(
        self, student: HeadInputs, teacher: HeadInputs, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and divergence [N] over the teacher's k likeliest tokens and the bucket of all others."""
        temperature, chunk = self.config.temperature, self._chunk_tokens(student)
        ids_NK, teacher_NB = top_k_logprobs(
            teacher.hidden_ND, teacher.head_VD, self.config.top_k, temperature=temperature, chunk_tokens=chunk
        )
        student_NB = bucket_logprobs(
            student.hidden_ND, student.head_VD, ids_NK, temperature=temperature, chunk_tokens=chunk
        )
        kl_N = bucket_divergence(student_NB, teacher_NB)
        return kl_N @ weights_N, kl_N.detach()

    def _token_logprobs(self, model: HeadInputs, batch: PackedBatch) -> torch.Tensor:
        return token_logprobs(
            model.hidden_ND,
            model.head_VD,
            batch.targets,
            kept_ids_K=batch.kept_ids,
            kept_offsets_N1=batch.kept_offsets,
            temperature=self.config.temperature,
            chunk_tokens=self._chunk_tokens(model),
            want_entropy=False,
        )[0]

    def _chunk_tokens(self, model: HeadInputs) -> int:
        return self.config.loss_chunk_tokens or max(64, _TILE_BYTES // (4 * len(model.head_VD)))

    def _teacher(self, batch: PackedBatch, device: torch.device) -> HeadInputs:
        head_VE = self.head_of(str(batch.teacher)).to(device)
        hidden_NE = torch.cat([self._teacher_states(sample) for sample in batch.samples]).to(device)
        return HeadInputs(hidden_ND=hidden_NE.to(head_VE.dtype), head_VD=head_VE)

    def _teacher_states(self, sample: Sample) -> torch.Tensor:
        states_LE = self.states.get(sample.id)
        if len(states_LE) != sample.num_loss_tokens:
            raise ValueError(
                f"sample {sample.id!r}: {len(states_LE)} teacher states for {sample.num_loss_tokens} loss tokens; "
                "expected one per loss token. Were the states made from the same sample?"
            )
        return states_LE


def _require_finite(kl_N: torch.Tensor, batch: PackedBatch) -> None:
    bad_N = ~kl_N.isfinite()
    if not bad_N.any():
        return
    samples = [batch.sample_ids[segment] for segment in batch.segment_ids[bad_N].unique().tolist()]
    raise FloatingPointError(
        f"the KL to teacher {batch.teacher!r} is not finite at {int(bad_N.sum())} of {len(kl_N)} loss tokens, in "
        f"samples {samples}; look for non-finite states or weights of the teacher or the student"
    )


def _kl_metrics(kl_N: torch.Tensor, batch: PackedBatch) -> Metrics:
    metrics: Metrics = {"kl": (kl_N.sum(), torch.tensor(float(len(kl_N))))}
    domains = [sample.domain for sample in batch.samples]
    for domain in sorted(set(domains)):
        of_domain_S = torch.tensor([name == domain for name in domains], device=kl_N.device)
        kl = kl_N[of_domain_S[batch.segment_ids]]
        metrics[f"kl/{domain}"] = (kl.sum(), torch.tensor(float(len(kl))))
    return metrics


def _mean(values_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return values_N.sum(), torch.tensor(float(len(values_N)))
