"""Samples to packed micro-batches: no padding, a token budget, one teacher after the other.

Planning reads only metadata (length, teacher, id); ``PackedBatch.collate`` loads the per-token arrays, one
micro-batch at a time. A micro-batch has two orders. Its row of tokens goes from the longest sample to the shortest, so
that equal lengths are neighbours and share one attention call. Samples and loss tokens stay in the order planned, so
that those of one teacher are neighbours and share one head.

Shape letters: ``T`` tokens of the row, ``S`` segments (samples), ``N`` loss tokens, ``K`` kept tokens of all of them.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from posttrain.types import IntArray, Sample, TokenArrays

_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch: samples concatenated into one row of T tokens, longest first."""

    samples: tuple[Sample, ...]
    """The samples in the order of their loss tokens."""
    token_ids: torch.Tensor
    """[T] int64."""
    position_ids: torch.Tensor
    """[T] int64, restarting at 0 with each sequence."""
    segment_lengths: tuple[int, ...]
    """Tokens of each sequence, in row order: one of a sample, or several where its rollout began anew."""
    cu_seqlens: torch.Tensor
    """[sequences + 1] int32: where each sequence starts, then T."""
    loss_positions: torch.Tensor
    """[N] int64: place in the row of the hidden state that predicts each loss token, its predecessor's."""
    targets: torch.Tensor
    """[N] int64: the loss tokens."""
    behaviour_logprobs: torch.Tensor
    """[N] float32: log-probability of each loss token under the policy that sampled it."""
    advantages: torch.Tensor
    """[S] float32."""
    segment_ids: torch.Tensor
    """[N] int64: which sample each loss token belongs to, 0 to S - 1, ascending."""
    kept_ids: torch.Tensor | None = None
    """[K] int64: where sampling was truncated, the tokens it chose from, loss token after loss token; or None."""
    kept_offsets: torch.Tensor | None = None
    """[N + 1] int64: where each loss token's kept ids begin, then K. One without any was drawn from all tokens."""
    old_logprobs: torch.Tensor | None = None
    """[N] float32: under the policy at the start of the step, where all samples know it (``Sample.start``)."""
    high_entropy: torch.Tensor | None = None
    """[N] bool: ``StepStart.high_entropy``."""
    routes: torch.Tensor | None = None
    """[T, layers, experts per token] int16: ``TokenArrays.routes``, where any sample knows some."""

    @classmethod
    def collate(cls, samples: Sequence[Sample]) -> PackedBatch:
        """Concatenate samples, on the CPU; their loss tokens stay in the given order."""
        arrays = [sample.load() for sample in samples]
        order = sorted(range(len(samples)), key=lambda index: -len(arrays[index]))
        row = [arrays[index] for index in order]
        starts = dict(zip(order, accumulate(map(len, row), initial=0), strict=False))
        lengths = [length for each in row for length in each.lengths]
        masks = [np.flatnonzero(each.loss_mask) for each in arrays]
        loss_tokens = np.concatenate([starts[index] + mask for index, mask in enumerate(masks)])
        token_ids = np.concatenate([each.token_ids for each in row])
        logprobs = np.concatenate([each.logprobs for each in row])
        kept_ids, kept_offsets = _kept(samples, arrays, masks)
        starts_of = [sample.start for sample in samples if sample.start is not None]
        started = len(starts_of) == len(samples) > 0
        return cls(
            samples=tuple(samples),
            token_ids=torch.from_numpy(token_ids.astype(np.int64)),
            position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
            segment_lengths=tuple(lengths),
            cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
            loss_positions=torch.from_numpy(loss_tokens - 1),
            targets=torch.from_numpy(token_ids[loss_tokens].astype(np.int64)),
            behaviour_logprobs=torch.from_numpy(logprobs[loss_tokens].astype(np.float32)),
            advantages=torch.tensor([sample.advantage for sample in samples], dtype=torch.float32),
            segment_ids=torch.from_numpy(np.repeat(np.arange(len(samples)), [len(mask) for mask in masks])),
            kept_ids=kept_ids,
            kept_offsets=kept_offsets,
            routes=_routes(row),
            old_logprobs=torch.from_numpy(np.concatenate([each.logprobs for each in starts_of])) if started else None,
            high_entropy=(
                torch.from_numpy(np.concatenate([each.high_entropy for each in starts_of])) if started else None
            ),
        )

    @property
    def sample_ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.samples)

    def runs(self, key: Callable[[Sample], _Key]) -> Iterator[tuple[_Key, tuple[Sample, ...], slice]]:
        """Neighbouring samples with the same key, and the places of their loss tokens among the N."""
        start = 0
        for each, members in itertools.groupby(self.samples, key):
            run = tuple(members)
            rows = slice(start, start + sum(sample.num_loss_tokens for sample in run))
            yield each, run, rows
            start = rows.stop

    def kept(self, rows: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """``kept_ids`` and ``kept_offsets`` of some loss tokens."""
        if self.kept_ids is None or self.kept_offsets is None:
            return None, None
        offsets = self.kept_offsets[rows.start : rows.stop + 1]
        return self.kept_ids[int(offsets[0]) : int(offsets[-1])], offsets - offsets[0]

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


def _routes(arrays: Sequence[TokenArrays]) -> torch.Tensor | None:
    like = next((each.routes for each in arrays if each.routes is not None), None)
    if like is None:
        return None
    unknown = (np.full((len(each), *like.shape[1:]), -1, np.int16) for each in arrays)
    rows = [each.routes if each.routes is not None else none for each, none in zip(arrays, unknown, strict=True)]
    return torch.from_numpy(np.concatenate(rows))


def _kept(
    samples: Sequence[Sample], arrays: Sequence[TokenArrays], masks: Sequence[npt.NDArray[np.int64]]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``kept_ids`` and ``kept_offsets`` of a batch."""
    if all(each.kept is None for each in arrays):
        return None, None
    ids, counts = [np.zeros(0, np.int32)], []
    for sample, each, mask in zip(samples, arrays, masks, strict=True):
        if each.kept is None:
            counts.append(np.zeros(len(mask), np.int64))
            continue
        sizes = np.diff(each.kept.offsets)
        has_loss = np.zeros(len(each), np.bool_)
        has_loss[mask] = True
        mine = each.kept.ids[np.repeat(has_loss, sizes)]
        _require_drawn(sample, each.token_ids[mask], mine, sizes[mask])
        ids.append(mine)
        counts.append(sizes[mask])
    offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))
    return torch.from_numpy(np.concatenate(ids).astype(np.int64)), torch.from_numpy(offsets)


def _require_drawn(sample: Sample, targets: IntArray, ids: IntArray, sizes: npt.NDArray[np.int64]) -> None:
    """Every token must be among those it was chosen from."""
    position = np.repeat(np.arange(len(targets)), sizes)
    found = np.bincount(position[ids == targets[position]], minlength=len(targets)) > 0
    missing = np.flatnonzero(~found & (sizes > 0))
    if len(missing):
        raise ValueError(
            f"Sample {sample.id!r}: token {targets[missing[0]]} is not among the {sizes[missing[0]]} that truncated "
            "sampling is said to have chosen it from; fix the engine that reported them"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What the whole mini-batch holds; every micro-batch is normalised by it, so the packing cannot matter."""

    num_samples: int
    num_loss_tokens: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Totals:
        return cls(num_samples=len(samples), num_loss_tokens=sum(sample.num_loss_tokens for sample in samples))


def plan_micro_batches(samples: Sequence[Sample], tokens_per_micro_batch: int) -> list[tuple[Sample, ...]]:
    """Distribute samples over as many micro-batches of at most ``tokens_per_micro_batch`` tokens as the work needs.

    Best-fit decreasing (at most 11/9 of the best possible number, plus a few), ties broken by id, so the plan depends
    on the set of samples and not on their order. Teachers come one after the other by name, within a micro-batch and
    over all of them; the last micro-batch of one has room for the next one's samples. A sample longer than the budget
    is a micro-batch of its own. Takes O(n log n) comparisons.
    """
    plan: list[list[Sample]] = []
    for _, mine in sorted(_by_teacher(samples).items()):
        plan += _best_fit_decreasing(mine, tokens_per_micro_batch, begun=plan.pop() if plan else [])
    return [tuple(members) for members in plan]


def divide_over_ranks(samples: Sequence[Sample], num_ranks: int) -> list[list[Sample]]:
    """Shares of about equally many tokens for learner processes, each with few teachers.

    Teachers are laid out over the ranks by name: a rank keeps its teachers while the mixture stays the same, and all
    ranks together meet about ``num_ranks - 1`` teachers more than there are. Within a teacher longer samples go first,
    to the rank with most room. The shares depend on the set of samples, not on their order; with fewer samples than
    ranks some are empty.
    """
    shares: list[list[Sample]] = [[] for _ in range(num_ranks)]
    room = [sum(map(len, samples)) / num_ranks] * num_ranks
    for _, mine in sorted(_by_teacher(samples).items()):
        quotas = _quotas(room, sum(map(len, mine)))
        for sample in sorted(mine, key=lambda sample: (-len(sample), sample.id)):
            rank = max(quotas, key=lambda rank: (quotas[rank], -rank))
            quotas[rank] -= len(sample)
            room[rank] -= len(sample)
            shares[rank].append(sample)
    return shares


def _quotas(room: Sequence[float], num_tokens: int) -> dict[int, float]:
    """Which ranks the next ``num_tokens`` fill, the first with room first, and how much of it each."""
    quotas: dict[int, float] = {}
    for rank, free in enumerate(room):
        if free > 0 and num_tokens > sum(quotas.values()):
            quotas[rank] = min(free, num_tokens - sum(quotas.values()))
    return quotas or {max(range(len(room)), key=room.__getitem__): num_tokens}


def _by_teacher(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.teacher or "", []).append(sample)
    return found


def _best_fit_decreasing(samples: Sequence[Sample], budget: int, *, begun: list[Sample]) -> list[list[Sample]]:
    """Bins of at most ``budget`` tokens, the first of which has what is ``begun`` in it already, if anything."""
    bins: list[list[Sample]] = []
    open_bins: list[tuple[int, int]] = []  # (room left, index of the bin), sorted, those with room only
    if begun:
        bins.append(list(begun))
        open_bins += [(room, 0)] if (room := budget - sum(map(len, begun))) > 0 else []
    for sample in sorted(samples, key=lambda sample: (-len(sample), sample.id)):
        size = len(sample)
        place = bisect_left(open_bins, (size, 0))
        if place < len(open_bins):
            room, index = open_bins.pop(place)
        else:
            room, index = budget, len(bins)
            bins.append([])
        bins[index].append(sample)
        if room > size:
            insort(open_bins, (room - size, index))
    return bins
