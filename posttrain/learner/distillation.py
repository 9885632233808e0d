"""Multi-teacher on-policy distillation, as a function of hidden states and heads.

Shape letters: ``N`` loss tokens of the micro-batch, ``S`` its samples, ``V`` vocabulary, ``D`` student width,
``E`` teacher width, ``L`` loss tokens of one sample.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from posttrain.config import Distill
from posttrain.divergence import Divergence, TeacherLogits, divergence_sum, divergence_sum_by_teacher
from posttrain.errors import RecipeError
from posttrain.learner.distill_losses import (
    bucket_divergence,
    gated_policy_gradient,
    prefix_importance,
    sampled_token_advantages,
)
from posttrain.learner.logprobs import bucket_logprobs, token_logprobs, top_k_logprobs
from posttrain.learner.losses import Metrics
from posttrain.learner.objectives import Reference, without_rounding
from posttrain.learner.packing import PackedBatch, Totals
from posttrain.learner.policy import HeadInputs
from posttrain.protocols import OpenTeachers, StateStore, Teacher
from posttrain.types import IntArray, Sample

_NEGATIVE = -1e-3
"""Nats below which a divergence of whole distributions is no rounding: elsewhere such ones are clamped to 0."""
_TILE_BYTES = 2**28
"""Of a float32 [tokens x vocabulary] tile of the losses that are not ``posttrain.divergence``'s."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens the engine drew, as the student of now and the engine of then saw them, [N] in nats."""

    logprobs_N: torch.Tensor
    """With gradient."""
    behaviour_logprobs_N: torch.Tensor

    def policy_gradient(
        self, advantages_N: torch.Tensor, bounds: tuple[float, float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``gated_policy_gradient``."""
        return gated_policy_gradient(self.logprobs_N, self.behaviour_logprobs_N, advantages_N, *bounds)

    def prefix_importance(self, batch: PackedBatch, bounds: tuple[float, float]) -> torch.Tensor:
        """See ``posttrain.learner.distill_losses.prefix_importance``."""
        log_ratio_N = self.logprobs_N.detach() - self.behaviour_logprobs_N
        return prefix_importance(log_ratio_N, batch.segment_ids, *bounds)


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
    """A teacher's head [V, E] by name. Called once per teacher of a micro-batch, in the order of names over all."""
    logit_cap_of: Callable[[str], float | None] = _no_cap
    """A teacher's soft-capping of final logits by name, None for none."""
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """Sampling temperature of the rollouts by domain, 1 where not named."""
    reference: Reference | None = None
    """Needed when ``beta`` is not 0."""
    teachers: OpenTeachers | None = None
    """They fill ``states`` before each mini-batch, which then is freed; None where it is filled beforehand."""

    def __post_init__(self) -> None:
        if self.config.beta > 0 and self.reference is None:
            raise RecipeError(
                f"Distill.beta = {self.config.beta} needs the model at the start of the stage; build the learner with "
                "keep_reference=True and pass reference=learner.reference, or set beta to 0"
            )

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
        wanted it is the exact reverse KL whatever is trained on, so that an evaluation compares them. ``clamped_share``
        are the tokens whose divergence is below 0 by more than rounding, or whose advantage was clipped, and
        ``nonfinite_share`` those without a finite divergence; both are 0 unless something is wrong or clips are wanted.

        Raises ``ValueError`` for samples without teacher or with states of another length, and ``FloatingPointError``
        when the divergence is not finite.
        """
        if any(sample.teacher is None for sample in batch.samples):
            raise ValueError(f"samples {list(batch.sample_ids)[:3]} name no teacher; distillation needs Sample.teacher")
        weights_N = self._weights(batch, totals, student.hidden_ND.device)
        if not torch.is_grad_enabled():
            loss, kl_N = self._full_vocabulary(student, self._teachers(batch), weights_N, "reverse_kl")
            _require_finite(kl_N, batch)
            return loss, _kl_metrics(kl_N, batch)
        metrics: Metrics = {}
        drawn = self._drawn(student, batch) if self._asks_what_was_drawn else None
        # Filled as the teachers are visited, so that each is visited once.
        teacher_logprobs: list[torch.Tensor] = []
        teachers = self._teachers(batch, teacher_logprobs)
        if drawn is not None and self.config.loss == "sampled_token":
            collections.deque(teachers, maxlen=0)
            loss, kl_N, metrics = self._sampled_token(drawn, torch.cat(teacher_logprobs), weights_N)
        else:
            if drawn is not None and self.config.max_staleness > 0:
                importance_N = drawn.prefix_importance(batch, self.config.importance_bounds)
                weights_N = weights_N * importance_N
                metrics["importance_weight"] = _mean(importance_N)
            loss, kl_N = self._distributions(student, teachers, weights_N)
            metrics["clamped_share"] = _mean((kl_N < _NEGATIVE).float())
        _require_finite(kl_N, batch)
        metrics |= _kl_metrics(kl_N, batch) | {"nonfinite_share": _mean((~kl_N.isfinite()).float())}
        if drawn is not None and self.config.reward_coef > 0:
            loss = loss + self.config.reward_coef * self._reward_loss(drawn, batch, totals)
        if self.reference is not None and self.config.beta > 0:
            reference_loss, reference_kl_N = self._reference_kl(student, self.reference(batch), batch, totals)
            loss = loss + self.config.beta * reference_loss
            metrics["kl_ref"] = _mean(reference_kl_N)
        if self.config.rescale_domains:
            metrics |= _log_ratio_moments(torch.cat(teacher_logprobs), batch)
        return loss, metrics

    @property
    def _asks_what_was_drawn(self) -> bool:
        config = self.config
        return config.loss == "sampled_token" or config.reward_coef > 0 or config.max_staleness > 0

    def _weights(
        self, batch: PackedBatch, totals: Totals, device: torch.device, *, of_teachers: bool = True
    ) -> torch.Tensor:
        """What the loss of each token is multiplied by, [N]; without ``of_teachers`` only what makes it a mean."""
        weight_S = torch.tensor([sample.weight if of_teachers else 1.0 for sample in batch.samples], device=device)
        if self.config.reduction == "token":
            return weight_S[batch.segment_ids] / totals.num_loss_tokens
        lengths_S = torch.tensor([sample.num_loss_tokens for sample in batch.samples], device=device)
        return (weight_S / lengths_S)[batch.segment_ids] / totals.num_samples

    def _full_vocabulary(
        self,
        student: HeadInputs,
        teachers: Iterable[TeacherLogits],
        weights_N: torch.Tensor,
        divergence: Divergence,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and divergence [N]."""
        return divergence_sum_by_teacher(
            student.hidden_ND,
            student.head_VD,
            teachers,
            divergence=divergence,
            beta=self.config.jsd_beta,
            weights_N=weights_N,
            temperature=self.config.temperature,
            chunk_tokens=self.config.loss_chunk_tokens,
        )

    def _distributions(
        self, student: HeadInputs, teachers: Iterable[TeacherLogits], weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and divergence [N] of whole distributions, or of the teacher's top k."""
        if self.config.loss == "teacher_top_k":
            return self._teacher_top_k(student, teachers, weights_N)
        return self._full_vocabulary(student, teachers, weights_N, self.config.divergence)

    def _sampled_token(
        self, drawn: Drawn, teacher_logprobs_N: torch.Tensor, weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """Loss, one-sample estimate of the KL [N], and metrics, of the policy gradient on the tokens drawn.

        Where sampling was truncated both models are compared over the tokens it chose from.
        """
        advantages_N = sampled_token_advantages(teacher_logprobs_N, drawn.logprobs_N)
        clip = self.config.advantage_clip
        clipped_N = advantages_N if clip is None else advantages_N.clamp(-clip, clip)
        loss_N, importance_N = drawn.policy_gradient(clipped_N, self.config.importance_bounds)
        metrics = {
            "clamped_share": _mean((clipped_N != advantages_N).float()),
            "importance_weight": _mean(importance_N),
        }
        return loss_N @ weights_N, -advantages_N, metrics

    def _reward_loss(self, drawn: Drawn, batch: PackedBatch, totals: Totals) -> torch.Tensor:
        advantages_N = batch.advantages[batch.segment_ids]
        loss_N, _ = drawn.policy_gradient(advantages_N, self.config.importance_bounds)
        return loss_N @ self._weights(batch, totals, loss_N.device, of_teachers=False)

    def _reference_kl(
        self, student: HeadInputs, reference: HeadInputs, batch: PackedBatch, totals: Totals
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and values [N] of KL(student || start)."""
        return divergence_sum(
            student.hidden_ND,
            student.head_VD,
            reference.hidden_ND,
            reference.head_VD,
            weights_N=self._weights(batch, totals, student.hidden_ND.device, of_teachers=False),
            chunk_tokens=self.config.loss_chunk_tokens,
        )

    def _teacher_top_k(
        self, student: HeadInputs, teachers: Iterable[TeacherLogits], weights_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and divergence [N] over each teacher's k likeliest tokens and the bucket of all others."""
        temperature, chunk = self.config.temperature, self._chunk_tokens(student.head_VD)
        found = []
        for teacher in teachers:
            found.append(
                top_k_logprobs(
                    teacher.hidden_NE,
                    teacher.head_VE,
                    self.config.top_k,
                    temperature=temperature,
                    logit_cap=teacher.logit_cap,
                    chunk_tokens=chunk,
                )
            )
            del teacher
        ids_NK, teacher_NB = (torch.cat(parts) for parts in zip(*found, strict=True))
        student_NB = bucket_logprobs(
            student.hidden_ND, student.head_VD, ids_NK, temperature=temperature, chunk_tokens=chunk
        )
        kl_N = bucket_divergence(student_NB, teacher_NB, self.config.divergence, self.config.jsd_beta)
        return kl_N @ weights_N, kl_N.detach()

    def _drawn(self, student: HeadInputs, batch: PackedBatch) -> Drawn:
        everything = slice(0, batch.num_loss_tokens)
        logprobs_N = self._token_logprobs(student.hidden_ND, student.head_VD, batch, everything)
        return Drawn(logprobs_N, without_rounding(batch.behaviour_logprobs, logprobs_N))

    def _token_logprobs(
        self,
        hidden_ND: torch.Tensor,
        head_VD: torch.Tensor,
        batch: PackedBatch,
        rows: slice,
        logit_cap: float | None = None,
    ) -> torch.Tensor:
        """Of the tokens drawn at ``rows``, among those that could be drawn and at the temperature they were drawn with;
        the hidden states are those of the rows."""
        found = []
        for temperature, _, run in batch.runs(lambda sample: self.temperatures.get(sample.domain, 1.0)):
            mine = slice(max(run.start, rows.start), min(run.stop, rows.stop))
            if mine.start >= mine.stop:
                continue
            kept_ids_K, kept_offsets_N1 = batch.kept(mine)
            found.append(
                token_logprobs(
                    hidden_ND[mine.start - rows.start : mine.stop - rows.start],
                    head_VD,
                    batch.targets[mine],
                    kept_ids_K=kept_ids_K,
                    kept_offsets_N1=kept_offsets_N1,
                    temperature=temperature,
                    logit_cap=logit_cap,
                    chunk_tokens=self._chunk_tokens(head_VD),
                    want_entropy=False,
                )[0]
            )
        return torch.cat(found)

    def _chunk_tokens(self, head_VD: torch.Tensor) -> int:
        return self.config.loss_chunk_tokens or max(64, _TILE_BYTES // (4 * len(head_VD)))

    def _teachers(self, batch: PackedBatch, logprobs: list[torch.Tensor] | None = None) -> Iterator[TeacherLogits]:
        """The teachers of the loss tokens in turn, each brought when it is asked for.

        ``logprobs`` gets what each says of the tokens drawn, where the loss or its metrics want to know.
        """
        device = batch.targets.device
        wants_logprobs = self.config.loss == "sampled_token" or self.config.rescale_domains
        for name, samples, rows in batch.runs(lambda sample: str(sample.teacher)):
            head_VE = self.head_of(name).to(device)
            hidden_NE = torch.cat([self._teacher_states(sample) for sample in samples]).to(device, head_VE.dtype)
            teacher = TeacherLogits(hidden_NE=hidden_NE, head_VE=head_VE, logit_cap=self.logit_cap_of(name))
            if logprobs is not None and wants_logprobs:
                with torch.no_grad():
                    logprobs.append(self._token_logprobs(hidden_NE, head_VE, batch, rows, teacher.logit_cap))
            # The pool holds one head at a time, and so must whoever asks it.
            del head_VE
            yield teacher
            del teacher

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
    temperatures: Mapping[str, float] = field(default_factory=dict)
    """As for ``DistillObjective``."""

    @contextlib.contextmanager
    def open(self, reference: Reference, *, check: bool = True) -> Iterator[DistillObjective]:
        library, probes = self.config.teachers, self.probes if check else None
        with library.open(self.teachers, student_path=self.student_path, probes=probes, folder=self.folder) as opened:
            yield DistillObjective(
                config=self.config,
                states=opened.store,
                head_of=opened.head,
                logit_cap_of=opened.logit_cap,
                temperatures=self.temperatures,
                reference=reference if self.config.beta > 0 else None,
                teachers=opened,
            )


def _require_finite(kl_N: torch.Tensor, batch: PackedBatch) -> None:
    bad_N = ~kl_N.isfinite()
    if not bad_N.any():
        return
    samples = [batch.samples[segment] for segment in batch.segment_ids[bad_N].unique().tolist()]
    teachers = ", ".join(sorted({repr(sample.teacher) for sample in samples}))
    raise FloatingPointError(
        f"the KL to teacher {teachers} is not finite at {int(bad_N.sum())} of {len(kl_N)} loss tokens, in samples "
        f"{[sample.id for sample in samples]}; look for non-finite states or weights of the teacher or the student"
    )


def _log_ratio_moments(teacher_logprobs_N: torch.Tensor, batch: PackedBatch) -> Metrics:
    """Per domain, mean and mean square of log pi_T - log mu over the tokens drawn, for ``rescale_domains``."""
    log_ratio_N = teacher_logprobs_N - batch.behaviour_logprobs
    return _by_domain("log_ratio", log_ratio_N, batch) | _by_domain("log_ratio_sq", log_ratio_N**2, batch)


def _kl_metrics(kl_N: torch.Tensor, batch: PackedBatch) -> Metrics:
    return {"kl": _mean(kl_N)} | _by_domain("kl", kl_N, batch)


def _by_domain(name: str, values_N: torch.Tensor, batch: PackedBatch) -> Metrics:
    """``NAME/DOMAIN`` for each domain in the batch."""
    metrics: Metrics = {}
    domains = [sample.domain for sample in batch.samples]
    for domain in sorted(set(domains)):
        of_domain_S = torch.tensor([other == domain for other in domains], device=values_N.device)
        metrics[f"{name}/{domain}"] = _mean(values_N[of_domain_S[batch.segment_ids]])
    return metrics


def _mean(values_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator and denominator."""
    return values_N.sum(), torch.tensor(float(len(values_N)))
