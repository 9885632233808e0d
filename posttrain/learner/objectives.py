"""What the learner minimises, as a function of hidden states and a head. GRPO here, OPD in ``distillation``.

An objective sees one packed micro-batch at a time and the totals of the whole mini-batch. It returns the
micro-batch's share of the loss, so the shares of a mini-batch add up to the same number however it was packed.

Shape letter: ``N`` loss tokens of the micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from posttrain.config import GRPO
from posttrain.errors import RecipeError
from posttrain.learner.logprobs import token_logprobs
from posttrain.learner.losses import Metrics, Normaliser, PolicyTokens, grpo_loss
from posttrain.learner.packing import PackedBatch, Totals
from posttrain.learner.policy import HeadInputs
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


@runtime_checkable
class Prepares(Protocol):
    """An objective with work of its own around each mini-batch. A learner among several calls it on its own share."""

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Before the first micro-batch of these samples."""
        ...

    def release(self, samples: Sequence[Sample]) -> None:
        """After the last one, or after a failure: what ``prepare`` made of these samples may go."""
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

    def loss(self, student: HeadInputs, batch: PackedBatch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        """GRPO's loss in the variant of ``config``; metrics are those of ``posttrain.learner.losses``."""
        logprobs, entropies = self._logprobs(student, batch)
        tokens = PolicyTokens(
            logprobs=logprobs,
            behaviour_logprobs=without_rounding(batch.behaviour_logprobs, logprobs),
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
