"""Light groups and samples: the same as whole ones to driver and learner, with their arrays elsewhere until needed."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from posttrain.config import GRPO, Optim
from posttrain.learner.learner import Learner
from posttrain.learner.losses import Metrics
from posttrain.learner.objectives import GrpoObjective
from posttrain.learner.packing import PackedBatch, Totals
from posttrain.learner.policy import HeadInputs
from posttrain.models import load_model
from posttrain.protocols import ArrayRef, ArrayStore
from posttrain.rollout.arrays import attach, free_groups, split, store_group
from posttrain.rollout.local_store import LocalRef, LocalStore
from posttrain.rollout.samples import distill_samples, group_advantage_rows, group_metrics, grpo_samples
from posttrain.runs.rollout_log import rollout_record
from posttrain.stages.grpo import minibatches
from posttrain.types import (
    Completion,
    FinishReason,
    Group,
    KeptTokens,
    Rollout,
    Route,
    Sample,
    Score,
    StopReason,
    Task,
    TokenArrays,
    Tokens,
    Turn,
)


@pytest.fixture
def store() -> Iterator[LocalStore]:
    store = LocalStore(segment_bytes=1 << 20)
    yield store
    store.close()


def token_arrays(length: int, *, seed: int = 0, kept: bool = False) -> TokenArrays:
    rng = np.random.default_rng([seed, length])
    mask = (rng.random(length) < 0.7) & (np.arange(length) > 0)
    rows = [rng.integers(0, 200, 3).astype(np.int32) if masked else None for masked in mask]
    return TokenArrays(
        token_ids=rng.integers(0, 200, length).astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -rng.random(length), np.nan).astype(np.float32),
        versions=np.where(mask, seed, -1).astype(np.int32),
        kept=KeptTokens.of(rows) if kept else None,
        starts=np.array([0], np.int32) if kept and length else None,
    )


def assert_same(found: Mapping[str, npt.NDArray[Any]], expected: Mapping[str, npt.NDArray[Any]]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("length", [0, 1, 33, 5000])
def test_tokens_come_out_of_a_store_as_they_went_in(store: LocalStore, length: int, kept: bool) -> None:
    arrays = token_arrays(length, seed=3, kept=kept)
    tokens = Tokens.of(arrays).put_in(store)
    assert_same(tokens.load().parts(), arrays.parts())
    assert (tokens.num_tokens, tokens.num_loss_tokens) == (length, int(arrays.loss_mask.sum()))
    assert tokens.version_range == ((3, 3) if arrays.loss_mask.any() else None)


@pytest.mark.parametrize("starts", [[1], [0, 3, 3], [0, 5], [0, 2]])
def test_a_sequence_that_begins_where_none_can_is_named(starts: list[int]) -> None:
    arrays = TokenArrays.unsampled(np.arange(5, dtype=np.int32))
    with pytest.raises(ValueError, match=r"starts|position 0"):
        replace(arrays, starts=np.array(starts, np.int32))


def rollout_of(name: str, *, tokens: int = 5, stop: StopReason = StopReason.FINISHED) -> Rollout:
    def turn(first: int, text: str, observations: tuple[Any, ...] = ()) -> Turn:
        completion = Completion(
            request_id=name,
            token_ids=np.arange(first, first + tokens, dtype=np.int32),
            logprobs=np.full(tokens, -0.5, np.float32),
            versions=np.full(tokens, first, np.int32),
            finish=FinishReason.STOP,
        )
        context = np.array([1, 2], np.int32)
        return Turn(context_ids=context, completion=completion, text=text, observations=observations)

    turns = (turn(10, "look", ({"role": "tool", "content": "seen"},)), turn(30, "done"))
    task = Task(id="t", domain="d", prompt=({"role": "user", "content": "go"},))
    return Rollout(id=name, task=task, turns=turns, stop=stop, wall_s=1.5, failures=("box lost",))


def group_of(*values: float | None) -> Group:
    stops = [StopReason.ERROR if value is None else StopReason.FINISHED for value in values]
    rollouts = tuple(rollout_of(f"r{i}", tokens=3 + i, stop=stop) for i, stop in enumerate(stops))
    return Group(task=rollouts[0].task, rollouts=rollouts, scores=tuple(Score(value=value) for value in values))


def test_the_driver_logs_and_trains_on_light_groups_as_on_whole_ones(store: LocalStore) -> None:
    whole = group_of(1.0, 0.0, None, 0.5)
    light = store_group(whole, store)
    for one, other, score in zip(light.rollouts, whole.rollouts, whole.scores, strict=True):
        assert rollout_record(one, score) == rollout_record(other, score)
        assert (one.text, one.messages, one.failed) == (other.text, other.messages, other.failed)
    assert group_metrics([light]) == group_metrics([whole])
    config, route = GRPO(scale_rewards="none"), Route(teacher="d", weight=2.0)
    rows = group_advantage_rows([whole], config, min_group_size=2)
    for made, expected in (
        (grpo_samples([light], rows, config), grpo_samples([whole], rows, config)),
        (distill_samples([replace(light, route=route)]), distill_samples([replace(whole, route=route)])),
    ):
        assert [sample.id for sample in made] == [sample.id for sample in expected] != []
        for sample, other_sample in zip(made, expected, strict=True):
            assert replace(sample, tokens=other_sample.tokens) == other_sample
            assert sample.num_loss_tokens == other_sample.num_loss_tokens
            assert_same(sample.load().parts(), other_sample.load().parts())


def test_a_light_half_is_small_however_long_its_rollouts(store: LocalStore) -> None:
    rollout = rollout_of("r", tokens=100_000)
    group = Group(task=rollout.task, rollouts=(rollout,), scores=(Score(value=1.0),))
    light, arrays = split(group)
    assert len(pickle.dumps(light)) < 2000
    assert len(pickle.dumps(store_group(group, store))) < 3000
    with pytest.raises(KeyError, match="attach their references first"):
        light.rollouts[0].tokens.load()
    with pytest.raises(ValueError, match="split before"):
        split(light)
    with pytest.raises(ValueError, match="references"):
        attach(light, [])
    attached = attach(light, [store.put(each) for each in arrays])
    np.testing.assert_array_equal(attached.rollouts[0].tokens.load().token_ids, rollout.token_ids)


def test_a_pickled_rollout_has_each_token_once() -> None:
    rollout = rollout_of("r", tokens=1000)
    before = pickle.dumps(rollout)
    expected = rollout.tokens.load()
    assert len(pickle.dumps(rollout)) == len(before)
    assert_same(pickle.loads(pickle.dumps(rollout)).tokens.load().parts(), expected.parts())


def test_a_rollout_whose_engine_miscounted_is_named() -> None:
    rollout = rollout_of("r7")
    completion = replace(rollout.turns[0].completion, logprobs=np.zeros(1, np.float32))
    broken = replace(rollout, turns=(replace(rollout.turns[0], completion=completion),))
    with pytest.raises(ValueError, match=r"Rollout 'r7': TokenArrays\.logprobs has 3 entries for 7 tokens"):
        broken.light()


def test_arrays_are_freed_mini_batch_by_mini_batch_in_the_last_pass_only(store: LocalStore) -> None:
    groups = [store_group(group_of(1.0, 0.0, None, 0.5, 0.5), store) for _ in range(3)]
    config = GRPO(num_iterations=2, minibatches_per_step=3)
    samples = grpo_samples(groups, group_advantage_rows(groups, config, min_group_size=2), config)
    seen = []
    for minibatch in minibatches(samples, config, seed="s"):
        seen.append([sample.load().token_ids.copy() for sample in minibatch])
        left = sum(is_there(sample) for sample in samples)
        assert left == len(samples) - sum(map(len, seen[3:-1]))
    assert len(seen) == 6
    assert not any(is_there(sample) for sample in samples)
    assert store.num_bytes > 0, "the failed rollouts are in no mini-batch"
    free_groups(groups)
    assert store.num_bytes == 0


def is_there(sample: Sample) -> bool:
    try:
        sample.load()
    except KeyError:
        return False
    return True


# A step's memory


class WatchedStore:
    """Counts the bytes of its arrays that somebody holds."""

    def __init__(self, store: LocalStore) -> None:
        self.store, self.held, self.peak, self.loads = store, 0, 0, 0

    def put(self, arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRef:
        return WatchedRef(self, self.store.put(arrays))

    def count(self, num_bytes: int) -> None:
        self.held += num_bytes
        self.peak = max(self.peak, self.held)


class WatchedRef:
    def __init__(self, store: WatchedStore, ref: LocalRef) -> None:
        self._store, self._ref = store, ref

    def load(self) -> Mapping[str, npt.NDArray[Any]]:
        arrays = self._ref.load()
        self._store.loads += 1
        for array in arrays.values():
            self._store.count(array.nbytes)
            weakref.finalize(array, self._store.count, -array.nbytes)
        return arrays

    def free(self) -> None:
        self._ref.free()


def sample_of(index: int, length: int, store: ArrayStore) -> Sample:
    tokens = Tokens.of(token_arrays(length, seed=index)).put_in(store)
    return Sample(
        id=f"s{index}", task_id="t", domain="d", tokens=tokens, advantage=1.0 if index % 2 else -1.0, silent=not index
    )


def test_a_step_holds_the_arrays_of_one_micro_batch_at_a_time(tiny_model: str) -> None:
    store = WatchedStore(LocalStore())
    samples = [sample_of(index, 2000 if index == 7 else 16, store) for index in range(600)]
    learner = Learner(
        load_model(tiny_model, torch.float32), optim=Optim(learning_rate=1e-3), num_steps=4, tokens_per_micro_batch=512
    )
    objective = WatchfulObjective(store)
    metrics = learner.update(samples, objective)
    per_token = 4 + 1 + 4 + 4
    assert metrics["micro_batches"] == objective.batches == 1 + -(-598 * 16 // 512)
    assert metrics["tokens"] == 2000 + 598 * 16
    assert store.peak == 2000 * per_token
    store.peak = 0
    learner.update([sample for sample in samples if len(sample) == 16], WatchfulObjective(store))
    assert store.peak == 512 * per_token
    assert store.held == 0


class WatchfulObjective:
    """GRPO that looks, at each micro-batch, for arrays of the one before and of the ones to come."""

    def __init__(self, store: WatchedStore) -> None:
        self._store, self._grpo = store, GrpoObjective(config=GRPO(), max_completion_tokens=2000)
        self._before: weakref.ref[torch.Tensor] | None = None
        self._expected_loads = store.loads
        self.batches = 0

    def loss(self, student: HeadInputs, batch: PackedBatch, totals: Totals) -> tuple[torch.Tensor, Metrics]:
        self._expected_loads += len(batch.samples)
        assert self._store.loads == self._expected_loads
        assert self._store.held == 0, "collated, so no longer needed"
        assert self._before is None or self._before() is None
        self._before = weakref.ref(batch.token_ids)
        self.batches += 1
        return self._grpo.loss(student, batch, totals)
