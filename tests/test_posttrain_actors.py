"""Rollout workers in real Ray actors: exact weights, deaths that change nothing, hangs that end."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from posttrain.config import Workers
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.engine.weights import export_weights, import_weights
from posttrain.models import load_model
from posttrain.protocols import Sandbox
from posttrain.rollout.actors import RolloutService, Weights, WorkerSpec, ray_session
from posttrain.rollout.environments import SingleTurn
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.types import Group, Message, Sampling, StopReason, Task
from tests.tiny_models import save_tiny_model, tiny_chat

pytestmark = pytest.mark.timeout(120)

WORKERS = Workers(threads_per_actor=1, max_retries=1, episode_deadline_s=4.0)


@dataclass(frozen=True)
class WaitsForDeath:
    """Names its process in ``folder/pid`` and hangs at the end, unless ``folder/over`` exists."""

    folder: Path
    max_turns: int = 1

    def start(self, task: Task, sandbox: Sandbox | None) -> WaitingEpisode:
        return WaitingEpisode(self.folder)


@dataclass(frozen=True)
class WaitingEpisode:
    folder: Path

    async def respond(self, text: str) -> tuple[Message, ...] | None:
        return None

    async def artifacts(self) -> Mapping[str, bytes]:
        if not (self.folder / "over").exists():
            draft = self.folder / f"draft-{time.monotonic_ns()}"
            draft.write_text(str(os.getpid()))
            draft.rename(self.folder / "pid")
            await asyncio.sleep(1000)
        return {}


@dataclass(frozen=True)
class Deadly:
    """Kills the process that plays it."""

    max_turns: int = 1

    def start(self, task: Task, sandbox: Sandbox | None) -> WaitingEpisode:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")


def jobs(environment: Any, *, count: int = 2, name: str = "a") -> list[GroupJob]:
    play = Play(environment=environment, reward=None, sampling=Sampling(max_tokens=12), max_sequence_tokens=64)
    tasks = [Task(id=f"t{i}", domain="d", prompt=({"role": "user", "content": f"q{i}"},)) for i in range(count)]
    return [GroupJob(id=f"{name}/{i}", task=task, num_rollouts=3, play=play, seed=1) for i, task in enumerate(tasks)]


def tokens_and_logprobs(groups: list[Group]) -> list[Any]:
    return [(r.id, r.token_ids.tolist(), r.logprobs[r.loss_mask].tolist()) for g in groups for r in g.rollouts]


def process_of(service: RolloutService) -> int:
    return ray.get(service._actors[0].__ray_call__.remote(lambda worker: os.getpid()))


@pytest.fixture(scope="module")
def service(tiny_model: str) -> Iterator[RolloutService]:
    spec = WorkerSpec(model_path=tiny_model, dtype="float32", max_length=64, workers=WORKERS, substrate=None)
    with ray_session(WORKERS), RolloutService(spec) as service:
        yield service


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Weights of a model that the workers were not started with."""
    model = load_model(save_tiny_model(tmp_path_factory.mktemp("other"), seed=1), torch.float32)
    return export_weights(model.named_parameters(), torch.float32)


@pytest.fixture(scope="module")
def play_here(tiny_model: str, other_weights: Weights) -> Callable[[list[GroupJob]], list[Group]]:
    """Plays in this process, with the other weights."""

    def play(wanted: list[GroupJob]) -> list[Group]:
        model = load_model(tiny_model, torch.float32)
        engine = TransformersEngine(model, stop_ids=tiny_chat().stop_ids, max_length=64)
        engine.load_weights(import_weights(other_weights), 7)
        player = Player(engine=engine, judge_engine=None, chat=tiny_chat(), substrate=None, workers=WORKERS)
        groups = asyncio.run(player.play(wanted))
        engine.close()
        return groups

    return play


def test_weights_arrive_bit_for_bit_and_their_version_is_on_every_token(service, other_weights, play_here):
    before = service.play(jobs(SingleTurn()))
    service.load_weights(other_weights, 7)
    after = service.play(jobs(SingleTurn()))
    for groups, version in ((before, 0), (after, 7)):
        for rollout in (r for g in groups for r in g.rollouts):
            assert set(rollout.versions[rollout.loss_mask].tolist()) == {version}
    # One flipped bit anywhere would move some log-probability of a forward pass through all the weights.
    assert tokens_and_logprobs(after) == tokens_and_logprobs(play_here(jobs(SingleTurn())))
    assert tokens_and_logprobs(after) != tokens_and_logprobs(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_of_a_tensor_survives_the_object_store(service, dtype):
    bits = torch.randint(-(2**15), 2**15, (7, 64), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    sent = bits.view(dtype)
    received = import_weights(ray.get(ray.put(export_weights([("w", sent)], dtype))))["w"]
    assert received.dtype == dtype
    assert torch.equal(received.contiguous().view(torch.int16), bits)


def test_groups_come_back_in_the_order_of_the_jobs(service):
    groups = service.play(jobs(SingleTurn(), count=5))
    assert [g.task.id for g in groups] == [f"t{i}" for i in range(5)]
    assert [[r.id for r in g.rollouts] for g in groups] == [[f"a/{i}/{k}" for k in range(3)] for i in range(5)]


def test_a_worker_killed_while_it_plays_is_replaced_and_changes_nothing(service, other_weights, play_here, tmp_path):
    service.load_weights(other_weights, 7)
    victim = process_of(service)
    counted = service.counters.actors_replaced, service.counters.jobs_replayed
    killed = threading.Thread(target=kill_when_named, args=(tmp_path,))
    killed.start()
    groups = service.play(jobs(WaitsForDeath(tmp_path)))
    killed.join()
    assert int((tmp_path / "pid").read_text()) == victim != process_of(service)
    assert service.counters.actors_replaced - counted[0] == 1
    assert service.counters.jobs_replayed - counted[1] == 2
    assert {r.stop for g in groups for r in g.rollouts} <= {StopReason.FINISHED, StopReason.LENGTH}
    assert tokens_and_logprobs(groups) == tokens_and_logprobs(play_here(jobs(SingleTurn())))
    versions = np.concatenate([r.versions[r.loss_mask] for g in groups for r in g.rollouts])
    assert set(versions.tolist()) == {7}


def kill_when_named(folder: Path) -> None:
    give_up = time.monotonic() + 60
    while not (folder / "pid").exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    (folder / "over").touch()
    os.kill(int((folder / "pid").read_text()), signal.SIGKILL)


def test_an_environment_that_hangs_ends_at_its_deadline(service, tmp_path):
    groups = service.play(jobs(WaitsForDeath(tmp_path), count=1))
    assert {r.stop for g in groups for r in g.rollouts} == {StopReason.DEADLINE}
    assert {s.value for g in groups for s in g.scores} == {None}
    again = service.play(jobs(SingleTurn(), count=1))
    assert not any(r.failed for r in again[0].rollouts)


def test_a_worker_whose_engine_has_stopped_is_replaced(service, other_weights):
    victim = process_of(service)
    ray.get(service._actors[0].__ray_call__.remote(lambda worker: worker._engine.close()))
    service.load_weights(other_weights, 9)
    assert process_of(service) != victim
    [group] = service.play(jobs(SingleTurn(), count=1))
    assert set(group.rollouts[0].versions.tolist()) == {-1, 9}
    with pytest.raises(ray.exceptions.RayTaskError, match="unknown tensors"):
        service.load_weights({**other_weights, "no_such_weight": next(iter(other_weights.values()))}, 10)
    service.load_weights(other_weights, 11)


def test_work_that_kills_every_worker_ends_with_a_message_and_a_living_worker(service, other_weights):
    service.load_weights(other_weights, 8)
    with pytest.raises(RuntimeError, match="died or hung 2 times on the same 1 groups"):
        service.play(jobs(Deadly(), count=1))
    [group] = service.play(jobs(SingleTurn(), count=1))
    assert set(group.rollouts[0].versions.tolist()) == {-1, 8}
