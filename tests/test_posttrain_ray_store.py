"""Arrays in Ray's object store: who owns them, who frees them, and what a dead worker takes along."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray._private import internal_api

from posttrain.config import Workers
from posttrain.rollout.arrays import attach, free_groups, split
from posttrain.rollout.ray_store import RayRef, RayStore
from posttrain.rollout.service import ray_session
from posttrain.types import Completion, FinishReason, Group, Rollout, Score, StopReason, Task, Turn

pytestmark = pytest.mark.timeout(120)

TOKENS = 300_000


@pytest.fixture(scope="module", autouse=True)
def session() -> Iterator[None]:
    with ray_session(Workers()):
        yield


def played(num_rollouts: int, tokens: int) -> Group:
    task = Task(id="t", domain="d", prompt=())
    rollouts = []
    for index in range(num_rollouts):
        completion = Completion(
            request_id=f"r{index}",
            token_ids=np.full(tokens, index, np.int32),
            logprobs=np.zeros(tokens, np.float32),
            versions=np.zeros(tokens, np.int32),
            finish=FinishReason.LENGTH,
        )
        turn = Turn(context_ids=np.zeros(2, np.int32), completion=completion, text="x")
        rollouts.append(Rollout(id=f"r{index}", task=task, turns=(turn,), stop=StopReason.LENGTH))
    return Group(task=task, rollouts=tuple(rollouts), scores=(Score(value=1.0),) * num_rollouts)


class Worker:
    def play_group(self, num_rollouts: int, tokens: int) -> tuple[Any, ...]:
        light, arrays = split(played(num_rollouts, tokens))
        return (light, *arrays)

    def play_and_put(self) -> list[RayRef]:
        _, arrays = split(played(2, TOKENS))
        return [RayStore().put(each) for each in arrays]

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def worker() -> Any:
    return ray.remote(Worker).remote()


def play(worker: Any, num_rollouts: int, tokens: int) -> Group:
    light, *heavy = worker.play_group.options(num_returns=1 + num_rollouts).remote(num_rollouts, tokens)
    return attach(ray.get(light), [RayRef(each) for each in heavy])


def kill(worker: Any) -> None:
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(worker.die.remote())


def object_store_bytes() -> int:
    state = internal_api.get_state_from_address(ray.get_runtime_context().gcs_address)
    return internal_api.get_memory_info_reply(state).store_stats.object_store_bytes_used


def settled_bytes() -> int:
    """What is in the store once all that earlier tests have let go of has gone."""
    before = -1
    while (now := object_store_bytes()) != before:
        before = now
        time.sleep(2)
    return now


def eventually(claim: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not claim():
        assert time.monotonic() < give_up
        time.sleep(0.05)


@pytest.mark.parametrize("tokens", [10, TOKENS])
def test_what_a_worker_returned_outlives_it(worker: Any, tokens: int) -> None:
    group = play(worker, 3, tokens)
    kill(worker)
    for index, rollout in enumerate(group.rollouts):
        arrays = rollout.tokens.load()
        assert arrays.token_ids.tolist() == [0, 0] + [index] * tokens
        assert not arrays.token_ids.flags.writeable


def test_what_a_worker_put_dies_with_it(worker: Any) -> None:
    refs = ray.get(worker.play_and_put.remote())
    assert len(refs[1].load()["token_ids"]) == 2 + TOKENS
    kill(worker)
    eventually(lambda: owner_is_dead(refs[0]))


def owner_is_dead(ref: RayRef) -> bool:
    try:
        ref.load()
    except ray.exceptions.OwnerDiedError:
        return True
    return False


def test_arrays_are_one_copy_in_shared_memory_until_they_are_freed(worker: Any) -> None:
    at_start = settled_bytes()
    group = play(worker, 4, TOKENS)
    per_rollout = 13 * (TOKENS + 2)
    first, second = (group.rollouts[0].tokens.load().token_ids for _ in range(2))
    assert np.shares_memory(first, second)
    assert 4 * per_rollout <= object_store_bytes() - at_start < 4.1 * per_rollout
    del first, second
    group.rollouts[0].tokens.free()
    with pytest.raises(KeyError, match="freed"):
        group.rollouts[0].tokens.load()
    assert group.rollouts[1].tokens.load().token_ids[-1] == 1
    free_groups([group])
    eventually(lambda: object_store_bytes() == at_start)


def test_the_driver_may_put_arrays_itself() -> None:
    ref = RayStore().put({"a": np.arange(5)})
    assert ref.load()["a"].tolist() == [0, 1, 2, 3, 4]
    ref.free()
    ref.free()
    with pytest.raises(KeyError, match="freed"):
        ref.load()
