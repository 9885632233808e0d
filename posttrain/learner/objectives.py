"""What the learner minimises: GRPO and multi-teacher distillation, as functions of hidden states and a head.

An objective sees one packed micro-batch at a time and the totals of the whole mini-batch. It returns the
micro-batch's share of the loss, so the shares of a mini-batch add up to the same number however it was packed.

Shape letters: ``N`` loss tokens of the micro-batch, ``S`` its samples, ``V`` vocabulary, ``D`` student width,
``E`` teacher width, ``L`` loss tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from posttrain.config import GRPO, Distill
from posttrain.divergence import reverse_kl_sum
from posttrain.errors import RecipeError
from posttrain.learner.logprobs import token_logprobs
from posttrain.learner.losses import Metrics, Normaliser, PolicyTokens, grpo_loss, high_entropy_mask
from posttrain.learner.packing import PackedBatch, Totals
from posttrain.learner.policy import HeadInputs
from posttrain.protocols import StateStore
from posttrain.types import Sample

ROUNDING = 1e-5
"""Nats by which two float32 computations of one log-probability may differ."""


class Objective(Protocol):
    """The loss of one kind of training."""

    def loss(self, student: HeadInputs, batch: PackedBatch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """The micro-batch's share of the loss, a float32 scalar to call ``backward`` on, and its metrics.

        Metrics are (numerator, denominator) pairs of detached scalars, added up over micro-batches.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """What a policy says of the loss tokens of one sample, or of a micro-batch: [L] float32 each, without gradient."""

    logprobs: torch.Tensor
    entropies: torch.Tensor
    """In nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoObjective:
    """Group relative policy optimisation on the samples' advantages."""

    config: GRPO
    max_completion_tokens: int
    """Generation budget of one sample; dr_grpo's denominator."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts, so that ratios compare like with like."""
    reference: Callable[[PackedBatch], HeadInputs] | None = None
    """The model at the start of the stage, such as ``Learner.reference``; needed when ``beta`` is not 0."""
    chunk_tokens: int = 512
    """Loss positions per [tokens x vocabulary] tile."""
    at_start: Mapping[str, TokenStats] = field(default_factory=dict)
    """By sample id, on the CPU: what the policy at the start of the step says, where a term compares with it."""
    entropy_threshold: float | None = None
    """The policy loss acts on tokens whose entropy at the start of the step is at least this."""

    def __post_init__(self) -> None:
        if self.config.beta > 0 and self.reference is None:
            raise RecipeError(
                f"GRPO.beta = {self.config.beta} needs the model at the start of the stage; build the learner with "
                "keep_reference=True and pass reference=learner.reference, or set beta to 0"
            )

    @property
    def compares_with_start(self) -> bool:
        """Whether a step needs ``starting_at`` before its first update."""
        return self.config.importance_sampling_correction is not None or self.config.top_entropy_quantile < 1.0

    def starting_at(self, at_start: Mapping[str, TokenStats]) -> GrpoObjective:
        """The objective of a step that starts with the policy that says this of its samples (``Learner.measure``)."""
        entropies = [stats.entropies for stats in at_start.values()]
        threshold = None
        if self.config.top_entropy_quantile < 1.0 and entropies:
            # NumPy's, as torch.quantile refuses more than 2^24 numbers.
            threshold = float(np.quantile(torch.cat(entropies).numpy(), 1 - self.config.top_entropy_quantile))
        return replace(self, at_start=at_start, entropy_threshold=threshold)

    @torch.no_grad()
    def measure(self, student: HeadInputs, batch: PackedBatch) -> TokenStats:
        """What the policy says of a micro-batch's loss tokens."""
        logprobs, entropies = self._logprobs(student, batch)
        assert entropies is not None
        return TokenStats(logprobs=logprobs, entropies=entropies)

    def loss(self, student: HeadInputs, batch: PackedBatch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """GRPO's loss in the variant of ``config``; metrics are those of ``posttrain.learner.losses``."""
        logprobs, entropies = self._logprobs(student, batch)
        old, high_entropy = self._from_start(batch, logprobs)
        tokens = PolicyTokens(
            logprobs=logprobs,
            behaviour_logprobs=without_rounding(batch.behaviour_logprobs, logprobs if old is None else old),
            old_logprobs=old,
            high_entropy=high_entropy,
            advantages=batch.advantages[batch.segment_ids],
            segment=batch.segment_ids,
            num_segments=len(batch.samples),
            ref_logprobs=self._reference_logprobs(batch),
            entropies=entropies,
        )
        normaliser = Normaliser(
            num_rows=totals.num_samples,
            num_tokens=totals.num_loss_tokens,
            max_completion_tokens=self.max_completion_tokens,
        )
        return grpo_loss(tokens, self.config, normaliser=normaliser)

    def _from_start(
        self, batch: PackedBatch, logprobs_N: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The old log-probabilities and the mask of high entropy, [N] each, where they are wanted."""
        if not self.compares_with_start:
            return None, None
        missing = [sample_id for sample_id in batch.sample_ids if sample_id not in self.at_start]
        if missing:
            raise ValueError(
                f"samples {missing[:3]}: unknown what the policy at the start of the step says of them; take the "
                "step's objective from starting_at(learner.measure(samples, objective))"
            )
        stats = [self.at_start[sample_id] for sample_id in batch.sample_ids]
        old = high_entropy = None
        if self.config.importance_sampling_correction is not None:
            old = without_rounding(torch.cat([each.logprobs for each in stats]).to(logprobs_N.device), logprobs_N)
        if self.entropy_threshold is not None:
            entropies_N = torch.cat([each.entropies for each in stats]).to(logprobs_N.device)
            high_entropy = high_entropy_mask(entropies_N, self.entropy_threshold)
        return old, high_entropy

    def _reference_logprobs(self, batch: PackedBatch) -> torch.Tensor | None:
        if self.config.beta == 0 or self.reference is None:
            return None
        with torch.no_grad():
            return self._logprobs(self.reference(batch), batch, want_entropy=False)[0]

    def _logprobs(
        self, model: HeadInputs, batch: PackedBatch, *, want_entropy: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        masked = self.config.keep_sampling_mask
        return token_logprobs(
            model.hidden_ND,
            model.head_VD,
            batch.targets,
            kept_ids_K=batch.kept_ids if masked else None,
            kept_offsets_N1=batch.kept_offsets if masked else None,
            temperature=self.temperature,
            chunk_tokens=self.chunk_tokens,
            want_entropy=want_entropy,
        )


def without_rounding(behaviour_N: torch.Tensor, logprobs_N: torch.Tensor) -> torch.Tensor:
    """The sampler's log-probabilities, and the learner's own where they differ by no more than float32 rounding.

    What shares a batch with a token moves the last bits of its log-probability, so a run that was interrupted would
    train on ratios of 1 + 1e-7 where another trains on 1, and drift away from it. Here both are 1.
    """
    own_N = logprobs_N.detach()
    return torch.where((behaviour_N - own_N).abs() <= ROUNDING, own_N, behaviour_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillObjective:
    """Multi-teacher on-policy distillation: the token mean of ``w KL(student || teacher)``, exact over the vocabulary.

    DeepSeek-V4, Eq. 29, with one teacher per sample.
    """

    config: Distill
    states: StateStore
    """Teacher states by sample id: [L, E], one row per loss token, in order."""
    head_of: Callable[[str], torch.Tensor]
    """A teacher's head [V, E] by name. Called once per micro-batch; micro-batches come ordered by teacher."""

    def loss(self, student: HeadInputs, batch: PackedBatch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """The batch's share of the distillation loss; metrics ``kl`` and ``kl/DOMAIN`` in nats per token, unweighted.

        Raises ``ValueError`` for samples without teacher or with states of another length, and ``FloatingPointError``
        when the divergence is not finite.
        """
        if batch.teacher is None:
            raise ValueError(f"samples {list(batch.sample_ids)[:3]} name no teacher; distillation needs Sample.teacher")
        device = student.hidden_ND.device
        head_VE = self.head_of(batch.teacher).to(device)
        hidden_NE = torch.cat([self._teacher_states(sample) for sample in batch.samples]).to(device)
        weight_S = torch.tensor([sample.weight for sample in batch.samples], device=device)
        loss, kl_N = reverse_kl_sum(
            student.hidden_ND,
            student.head_VD,
            hidden_NE.to(head_VE.dtype),
            head_VE,
            weights_N=weight_S[batch.segment_ids] / totals.num_loss_tokens,
            temperature=self.config.temperature,
            chunk_tokens=self.config.loss_chunk_tokens,
        )
        _require_finite(kl_N, batch)
        return loss, _kl_metrics(kl_N, batch)

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
