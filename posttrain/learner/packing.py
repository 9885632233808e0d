"""Samples to packed micro-batches: no padding, a token budget, teachers kept apart.

Planning reads only metadata (length, teacher, id); ``PackedBatch.collate`` touches the per-token arrays, one
micro-batch at a time. Within a micro-batch samples lie longest first, so that equal lengths are neighbours and share
one attention call.

Shape letters: ``T`` tokens of the row, ``S`` segments (samples), ``N`` loss tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from posttrain.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch: samples concatenated into one row of T tokens."""

    samples: tuple[Sample, ...]
    """The samples in row order, longest first; all have the same teacher."""
    token_ids: torch.Tensor
    """[T] int64."""
    position_ids: torch.Tensor
    """[T] int64, restarting at 0 with each sample."""
    cu_seqlens: torch.Tensor
    """[S + 1] int32: where each sample starts, then T."""
    loss_positions: torch.Tensor
    """[N] int64: index in the row of the hidden state that predicts each loss token, its predecessor's."""
    targets: torch.Tensor
    """[N] int64: the loss tokens."""
    behaviour_logprobs: torch.Tensor
    """[N] float32: log-probability of each loss token under the policy that sampled it."""
    advantages: torch.Tensor
    """[S] float32."""
    segment_ids: torch.Tensor
    """[N] int64: which sample each loss token belongs to, 0 to S - 1, ascending."""

    @classmethod
    def collate(cls, samples: Sequence[Sample]) -> PackedBatch:
        """Concatenate samples in the given order, on the CPU."""
        starts = [0, *accumulate(len(sample) for sample in samples)]
        masks = [np.flatnonzero(sample.loss_mask) for sample in samples]
        loss_tokens = np.concatenate([start + mask for start, mask in zip(starts, masks, strict=False)])
        token_ids = np.concatenate([sample.token_ids for sample in samples])
        logprobs = np.concatenate([sample.logprobs for sample in samples])
        return cls(
            samples=tuple(samples),
            token_ids=torch.from_numpy(token_ids.astype(np.int64)),
            position_ids=torch.from_numpy(np.concatenate([np.arange(len(sample)) for sample in samples])),
            cu_seqlens=torch.tensor(starts, dtype=torch.int32),
            loss_positions=torch.from_numpy(loss_tokens - 1),
            targets=torch.from_numpy(token_ids[loss_tokens].astype(np.int64)),
            behaviour_logprobs=torch.from_numpy(logprobs[loss_tokens].astype(np.float32)),
            advantages=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
            segment_ids=torch.from_numpy(np.repeat(np.arange(len(samples)), [len(mask) for mask in masks])),
        )

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.samples)

    @property
    def segment_lengths(self) -> tuple[int, ...]:
        """Tokens of each sample, in row order."""
        return tuple(len(sample) for sample in self.samples)

    @property
    def teacher(self) -> str | None:
        return self.samples[0].teacher

    @property
    def num_loss_tokens(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its tensors on ``device``."""
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name in self.__slots__
            if isinstance(value := getattr(self, name), torch.Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the whole mini-batch holds; every micro-batch is normalised by it, so the packing cannot matter."""

    num_samples: int
    num_loss_tokens: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Totals:
        return cls(num_samples=len(samples), num_loss_tokens=sum(sample.num_loss_tokens for sample in samples))


def plan_micro_batches(samples: Sequence[Sample], tokens_per_micro_batch: int) -> list[tuple[Sample, ...]]:
    """Distribute samples over micro-batches of at most ``tokens_per_micro_batch`` tokens.

    First-fit decreasing (at most 11/9 of the best possible number of bins, plus one), ties broken by id, so the plan
    depends on the set of samples and not on their order. Micro-batches hold one teacher each and come ordered by
    teacher name. A sample longer than the budget is a micro-batch of its own.
    """
    plan: list[tuple[Sample, ...]] = []
    for teacher in sorted({sample.teacher or "" for sample in samples}):
        mine = [sample for sample in samples if (sample.teacher or "") == teacher]
        plan += _first_fit_decreasing(mine, tokens_per_micro_batch)
    return plan


def fill(plan: Sequence[Sequence[Sample]], tokens_per_micro_batch: int) -> float:
    """Share of the token budgets of a plan that is used; above 1 where samples exceed the budget."""
    used = sum(len(sample) for micro_batch in plan for sample in micro_batch)
    return used / (len(plan) * tokens_per_micro_batch)


def _first_fit_decreasing(samples: Sequence[Sample], budget: int) -> list[tuple[Sample, ...]]:
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda sample: (-len(sample), sample.id)):
        index = next((i for i, left in enumerate(room) if len(sample) <= left), None)
        if index is None:
            bins.append([])
            room.append(budget)
            index = len(bins) - 1
        bins[index].append(sample)
        room[index] -= len(sample)
    return [tuple(members) for members in bins]
