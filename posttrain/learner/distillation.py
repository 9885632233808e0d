"""Multi-teacher on-policy distillation, as a function of hidden states and heads.

Shape letters: ``N`` loss tokens of the micro-batch, ``S`` its samples, ``V`` vocabulary, ``D`` student width,
``E`` teacher width, ``L`` loss tokens of one sample.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.config import Distill
from posttrain.divergence import Divergence, divergence_sum
from posttrain.learner.distill_losses import bucket_divergence, gated_policy_gradient, sampled_token_advantages
from posttrain.learner.logprobs import bucket_logprobs, token_logprobs, top_k_logprobs
from posttrain.learner.losses import Metrics
from posttrain.learner.objectives import Reference, without_rounding
from posttrain.learner.packing import PackedBatch, Totals
from posttrain.learner.policy import HeadInputs
from posttrain.protocols import OpenTeachers, StateStore, Teacher
from posttrain.types import IntArray, Sample

_TILE_BYTES = 2**28
"""Of a float32 [tokens x vocabulary] tile of the losses that are not ``posttrain.divergence``'s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInputs:
    """What a teacher's logits at the loss positions are made of: ``hidden @ head.T``, soft-capped if there is a cap."""

    hidden_NE: torch.Tensor
    head_VE: torch.Tensor
    logit_cap: float | None


def _no_cap(teacher: str) -> float | None:
    return None


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
    logit_cap_of: Callable[[str], float | None] = _no_cap
    """A teacher's soft-capping of final logits by name, None for none."""
    teachers: OpenTeachers | None = None
    """They fill ``states`` before each mini-batch, which then is freed; None where it is filled beforehand."""

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Have the samples read by their teachers."""
        if self.teachers is not None:
            self.teachers.cache_states(samples)

    def release(self, samples: Sequence[Sample]) -> None:
        """Free the states of the samples."""
        if self.teachers is not None:
            self.states.free(sample.id for sample in samples)

    def costs(self) -> Mapping[str, float]:
        """The teachers' costs since the last call."""
        return {} if self.teachers is None else self.teachers.costs()

    def loss(self, student: HeadInputs, batch: PackedBatch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """The batch's share of the distillation loss and its metrics.

        ``kl`` and ``kl/DOMAIN`` are the divergence in nats per token, unweighted; an unbiased estimate of it, which may
        be negative, with ``config.loss`` "sampled_token", and a lower bound with "teacher_top_k". Where no gradient is
        wanted it is the exact reverse KL whatever is trained on, so that an evaluation compares them.

        Raises ``ValueError`` for samples without teacher or with states of another length, and ``FloatingPointError``
        when the divergence is not finite.
        """
        if batch.teacher is None:
            raise ValueError(f"samples {list(batch.sample_ids)[:3]} name no teacher; distillation needs Sample.teacher")
        teacher = self._teacher(batch, student.hidden_ND.device)
        weights_N = self._weights(batch, totals, student.hidden_ND.device)
        extra: Metrics = {}
        if not torch.is_grad_enabled():
            loss, kl_N = self._full_vocabulary(student, teacher, weights_N, "reverse_kl")
        elif self.config.loss == "sampled_token":
            loss, kl_N, extra = self._sampled_token(student, teacher, batch, weights_N)
        elif self.config.loss == "teacher_top_k":
            loss, kl_N = self._teacher_top_k(student, teacher, weights_N)
        else:
            loss, kl_N = self._full_vocabulary(student, teacher, weights_N, self.config.divergence)
        _require_finite(kl_N, batch)
        return loss, _kl_metrics(kl_N, batch) | extra

    def _weights(self, batch: PackedBatch, totals: Totals, device: torch.device) -> torch.Tensor:
        """What the divergence at each loss token is multiplied by, [N]."""
        weight_S = torch.tensor([sample.weight for sample in batch.samples], device=device)
        if self.config.reduction == "token":
            return weight_S[batch.segment_ids] / totals.num_loss_tokens
        lengths_S = torch.tensor([sample.num_loss_tokens for sample in batch.samples], device=device)
        return (weight_S / lengths_S)[batch.segment_ids] / totals.num_samples

    def _full_vocabulary(
        self, student: HeadInputs, teacher: TeacherInputs, weights_N: torch.Tensor, divergence: Divergence
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and divergence [N]."""
        return divergence_sum(
            student.hidden_ND,
            student.head_VD,
            teacher.hidden_NE,
            teacher.head_VE,
            divergence=divergence,
            beta=self.config.jsd_beta,
            weights_N=weights_N,
            temperature=self.config.temperature,
            chunk_tokens=self.config.loss_chunk_tokens,
            teacher_logit_cap=teacher.logit_cap,
        )

    def _sampled_token(
        self, student: HeadInputs, teacher: TeacherInputs, batch: PackedBatch, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """Loss, one-sample estimate of the KL [N], and metrics, of the policy gradient on the tokens drawn.

        Where sampling was truncated both models are compared over the tokens it chose from.
        """
        logprobs_N = self._token_logprobs(student.hidden_ND, student.head_VD, batch)
        with torch.no_grad():
            teacher_N = self._token_logprobs(teacher.hidden_NE, teacher.head_VE, batch, teacher.logit_cap)
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
        self, student: HeadInputs, teacher: TeacherInputs, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and divergence [N] over the teacher's k likeliest tokens and the bucket of all others."""
        temperature, chunk = self.config.temperature, self._chunk_tokens(student.head_VD)
        ids_NK, teacher_NB = top_k_logprobs(
            teacher.hidden_NE,
            teacher.head_VE,
            self.config.top_k,
            temperature=temperature,
            logit_cap=teacher.logit_cap,
            chunk_tokens=chunk,
        )
        student_NB = bucket_logprobs(
            student.hidden_ND, student.head_VD, ids_NK, temperature=temperature, chunk_tokens=chunk
        )
        kl_N = bucket_divergence(student_NB, teacher_NB, self.config.divergence, self.config.jsd_beta)
        return kl_N @ weights_N, kl_N.detach()

    def _token_logprobs(
        self, hidden_ND: torch.Tensor, head_VD: torch.Tensor, batch: PackedBatch, logit_cap: float | None = None
    ) -> torch.Tensor:
        return token_logprobs(
            hidden_ND,
            head_VD,
            batch.targets,
            kept_ids_K=batch.kept_ids,
            kept_offsets_N1=batch.kept_offsets,
            temperature=self.config.temperature,
            logit_cap=logit_cap,
            chunk_tokens=self._chunk_tokens(head_VD),
            want_entropy=False,
        )[0]

    def _chunk_tokens(self, head_VD: torch.Tensor) -> int:
        return self.config.loss_chunk_tokens or max(64, _TILE_BYTES // (4 * len(head_VD)))

    def _teacher(self, batch: PackedBatch, device: torch.device) -> TeacherInputs:
        name = str(batch.teacher)
        head_VE = self.head_of(name).to(device)
        hidden_NE = torch.cat([self._teacher_states(sample) for sample in batch.samples]).to(device)
        return TeacherInputs(hidden_NE=hidden_NE.to(head_VE.dtype), head_VE=head_VE, logit_cap=self.logit_cap_of(name))

    def _teacher_states(self, sample: Sample) -> torch.Tensor:
        states_LE = self.states.get(sample.id)
        if len(states_LE) != sample.num_loss_tokens:
            raise ValueError(
                f"sample {sample.id!r}: {len(states_LE)} teacher states for {sample.num_loss_tokens} loss tokens; "
                "expected one per loss token. Were the states made from the same sample?"
            )
        return states_LE


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSpec:
    """Of a ``DistillObjective`` whose teachers read each mini-batch before its update."""

    config: Distill
    teachers: Mapping[str, Teacher]
    """By name, as ``Sample.teacher`` has it."""
    student_path: str
    probes: Mapping[str, Sequence[IntArray]]
    """As for ``posttrain.protocols.TeacherLibrary.open``, and so is ``folder``."""
    folder: Path | None = None

    @contextlib.contextmanager
    def open(self, reference: Reference, *, check: bool = True) -> Iterator[DistillObjective]:
        library, probes = self.config.teachers, self.probes if check else None
        with library.open(self.teachers, student_path=self.student_path, probes=probes, folder=self.folder) as opened:
            yield DistillObjective(config=self.config, states=opened.store, head_of=opened.head, teachers=opened)


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
