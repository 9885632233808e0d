"""What the learner minimises, as a function of hidden states and a head. GRPO here, OPD in ``distillation``.

An objective sees one packed micro-batch at a time and the totals of the whole mini-batch. It returns the
micro-batch's share of the loss, so the shares of a mini-batch add up to the same number however it was packed.

Shape letter: ``N`` loss tokens of the micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from posttrain.config import GRPO
from posttrain.errors import RecipeError
from posttrain.learner.logprobs import token_logprobs
from posttrain.learner.losses import Metrics, Normaliser, PolicyTokens, grpo_loss, high_entropy_mask
from posttrain.learner.packing import PackedBatch, Totals
from posttrain.learner.policy import HeadInputs
from posttrain.types import Sample, StepStart

ROUNDING = 1e-5
"""Nats by which two float32 computations of one log-probability may differ."""


class Objective(Protocol):
    """The loss of one kind of training."""

    def loss(self, student: HeadInputs, batch: PackedBatch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """The micro-batch's share of the loss, a float32 scalar to call ``backward`` on, and its metrics.

        Metrics are (numerator, denominator) pairs of detached scalars, added up over micro-batches.
        """
        ...


@runtime_checkable
class Prepares(Protocol):
    """An objective with work of its own around each mini-batch. A learner among several calls it on its own share."""

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Before the first micro-batch of these samples."""
        ...

    def release(self, samples: Sequence[Sample]) -> None:
        """What ``prepare`` made of these samples may go: the step is made. Not called when it failed, so that a run
        which goes on finds what was made."""
        ...

    def costs(self) -> Mapping[str, float]:
        """What was spent since the last call, by metric; summed over learner processes."""
        ...


Reference = Callable[[PackedBatch], HeadInputs]
"""The model at the start of a stage, such as ``Learner.reference``."""


class ObjectiveSpec(Protocol):
    """A value that pickles, of which every learner process makes the objective it uses."""

    def open(self, reference: Reference, *, check: bool = True) -> contextlib.AbstractContextManager[Objective]:
        """The live objective, closed with the context. ``check`` runs start-up checks, which one process does for all.

        ``reference`` is that of the process's own learner.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSpec:
    """Of a ``GrpoObjective``; fields as there."""

    config: GRPO
    max_completion_tokens: int
    temperature: float = 1.0

    @contextlib.contextmanager
    def open(self, reference: Reference, *, check: bool = True) -> Iterator[GrpoObjective]:
        yield GrpoObjective(
            config=self.config,
            max_completion_tokens=self.max_completion_tokens,
            temperature=self.temperature,
            reference=reference if self.config.beta > 0 else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """What a policy says of the loss tokens of one sample, or of a micro-batch: float32, without gradient."""

    logprobs: torch.Tensor
    """[L]."""
    entropies: torch.Tensor
    """[L], in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoObjective:
    """Group relative policy optimisation on the samples' advantages."""

    config: GRPO
    max_completion_tokens: int
    """Generation budget of one sample; dr_grpo's denominator."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts, so that ratios compare like with like."""
    reference: Reference | None = None
    """Needed when ``beta`` is not 0."""
    chunk_tokens: int = 512
    """Loss positions per [tokens x vocabulary] tile."""

    def __post_init__(self) -> None:
        if self.config.beta > 0 and self.reference is None:
            raise RecipeError(
                f"GRPO.beta = {self.config.beta} needs the model at the start of the stage; build the learner with "
                "keep_reference=True and pass reference=learner.reference, or set beta to 0"
            )

    @torch.no_grad()
    def token_stats(self, student: HeadInputs, batch: PackedBatch) -> TokenStats:
        """What the policy says of a micro-batch's loss tokens."""
        logprobs, entropies = self._logprobs(student, batch)
        assert entropies is not None
        return TokenStats(logprobs=logprobs, entropies=entropies)

    def loss(self, student: HeadInputs, batch: PackedBatch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """GRPO's loss in the variant of ``config``; metrics are those of ``posttrain.learner.losses``."""
        logprobs, entropies = self._logprobs(student, batch)
        old = self._old_logprobs(batch, logprobs)
        tokens = PolicyTokens(
            logprobs=logprobs,
            behaviour_logprobs=without_rounding(batch.behaviour_logprobs, logprobs if old is None else old),
            old_logprobs=old,
            high_entropy=batch.high_entropy,
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

    def _old_logprobs(self, batch: PackedBatch, logprobs_N: torch.Tensor) -> torch.Tensor | None:
        """Those that the ratio is to, where it is not to the engine's."""
        if self.config.importance_sampling_correction is None or batch.old_logprobs is None:
            return None
        return without_rounding(batch.old_logprobs, logprobs_N)

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


def compares_with_start(config: GRPO) -> bool:
    """Whether a term compares with the policy at the start of the step, so that samples need their ``start``."""
    return config.importance_sampling_correction is not None or config.top_entropy_quantile < 1.0


def with_start(samples: Sequence[Sample], stats: Mapping[str, TokenStats], config: GRPO) -> list[Sample]:
    """The samples of a step with what the policy at its start says of them, by sample id (``Learner.token_stats``)."""
    entropies = [each.entropies.numpy() for each in stats.values()]
    # Not torch.quantile, which refuses more than 2^24 numbers.
    threshold = float(np.quantile(np.concatenate(entropies), 1 - config.top_entropy_quantile)) if entropies else 0.0
    started = []
    for sample in samples:
        found = stats.get(sample.id)
        if found is not None:
            start = StepStart(
                logprobs=found.logprobs.numpy(), high_entropy=high_entropy_mask(found.entropies, threshold).numpy()
            )
            sample = replace(sample, start=start)
        started.append(sample)
    return started


def without_rounding(behaviour_N: torch.Tensor, logprobs_N: torch.Tensor) -> torch.Tensor:
    """The sampler's log-probabilities, and the learner's own where they differ by no more than float32 rounding.

    What shares a batch with a token moves the last bits of its log-probability, so a run that was interrupted would
    train on ratios of 1 + 1e-7 where another trains on 1, and drift away from it. Here both are 1.
    """
    own_N = logprobs_N.detach()
    return torch.where((behaviour_N - own_N).abs() <= ROUNDING, own_N, behaviour_N)
