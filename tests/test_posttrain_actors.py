"""Rollout workers in real Ray actors: exact weights, deaths that change nothing, hangs that end."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
from posttrain.rollout.actors import EngineActor, RemoteEngine, Weights, WorkerSpec
from posttrain.rollout.environments import SingleTurn
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.rollout.service import RolloutService, ray_session
from posttrain.tally import TALLY
from posttrain.types import (
    Completion,
    FinishReason,
    Group,
    Message,
    Request,
    Rollout,
    Sampling,
    Score,
    StopReason,
    Task,
)
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


@dataclass(frozen=True)
class Counts:
    """A reward that tallies two judge calls a rollout."""

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        TALLY.add("judge/calls", 2)
        return Score(value=1.0)


_calls = itertools.count()


def jobs(environment: Any, *, count: int = 2, name: str = "") -> list[GroupJob]:
    """Jobs that nobody has played before, unless they are given a name."""
    name = name or f"fresh{next(_calls)}"
    play = Play(environment=environment, reward=None, sampling=Sampling(max_tokens=12), max_sequence_tokens=64)
    tasks = [Task(id=f"t{i}", domain="d", prompt=({"role": "user", "content": f"q{i}"},)) for i in range(count)]
    return [GroupJob(id=f"{name}/{i}", task=task, num_rollouts=3, play=play, seed=1) for i, task in enumerate(tasks)]


def tokens_and_logprobs(groups: list[Group]) -> list[Any]:
    arrays = [(r.id, r.tokens.load()) for g in groups for r in g.rollouts]
    return [(name, a.token_ids.tolist(), a.logprobs[a.loss_mask].tolist()) for name, a in arrays]


def check_same(groups: list[Group], expected: list[Group]) -> None:
    """The same tokens and log-probabilities, to the last bit."""
    for (name, tokens, logprobs), (other, wanted, likely) in zip(
        tokens_and_logprobs(groups), tokens_and_logprobs(expected), strict=True
    ):
        assert (name, tokens) == (other, wanted)
        assert logprobs == likely


def versions_of(groups: list[Group]) -> set[int]:
    arrays = [r.tokens.load() for g in groups for r in g.rollouts]
    return set(np.concatenate([a.versions[a.loss_mask] for a in arrays]).tolist())


def process_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))


@pytest.fixture(scope="module")
def service(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RolloutService]:
    folder = tmp_path_factory.mktemp("rollouts")
    spec = WorkerSpec(
        model_path=tiny_model, dtype="float32", max_length=64, workers=WORKERS, substrate=None, folder=folder
    )
    with ray_session(WORKERS), RolloutService(spec) as service:
        yield service


@pytest.fixture(scope="module")
def other_weights(tmp_path_factory: pytest.TempPathFactory) -> Weights:
    """Weights of a model that the workers were not started with."""
    model = load_model(save_tiny_model(tmp_path_factory.mktemp("other"), seed=1), torch.float32)
    return export_weights(model.named_parameters(), torch.float32)


@pytest.fixture(scope="module")
def base_weights(tiny_model: str) -> Weights:
    return export_weights(load_model(tiny_model, torch.float32).named_parameters(), torch.float32)


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


def test_weights_arrive_bit_for_bit_and_their_version_is_on_every_token(
    service, base_weights, other_weights, play_here
):
    service.load_weights(base_weights, 0)
    before = service.play(jobs(SingleTurn(), name="first"))
    service.load_weights(other_weights, 7)
    after = service.play(jobs(SingleTurn(), name="second"))
    for groups, version in ((before, 0), (after, 7)):
        assert versions_of(groups) == {version}
    # One flipped bit anywhere would move some log-probability of a forward pass through all the weights.
    assert tokens_and_logprobs(after) == tokens_and_logprobs(play_here(jobs(SingleTurn(), name="second")))
    assert [t for _, *t in tokens_and_logprobs(after)] != [t for _, *t in tokens_and_logprobs(before)]


def test_weights_that_arrive_after_later_ones_are_left_out(service, base_weights, other_weights):
    """As when an engine is replaced while a step is learned: both snapshots wait for it to start."""
    actor = ray.remote(EngineActor).options(num_cpus=0).remote(service._spec, 7, awaits_weights=True)
    try:
        ray.get([actor.load_weights.remote(weights, version, False, version) for weights, version in (
            (other_weights, 8), (base_weights, 7), (base_weights, 6)
        )])  # fmt: skip
        assert ray.get(actor.__ray_call__.remote(lambda engine: engine._engines[False].version)) == 8
    finally:
        ray.kill(actor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_of_a_tensor_survives_the_object_store(service, dtype):
    bits = torch.randint(-(2**15), 2**15, (7, 64), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    sent = bits.view(dtype)
    received = import_weights(ray.get(ray.put(export_weights([("w", sent)], dtype))))["w"]
    assert received.dtype == dtype
    assert torch.equal(received.contiguous().view(torch.int16), bits)


def test_groups_come_back_in_the_order_of_the_jobs(service):
    groups = service.play(jobs(SingleTurn(), count=5, name="a"))
    assert [g.task.id for g in groups] == [f"t{i}" for i in range(5)]
    assert [[r.id for r in g.rollouts] for g in groups] == [[f"a/{i}/{k}" for k in range(3)] for i in range(5)]


def test_what_a_reward_counts_where_it_runs_is_in_the_metrics_of_the_step(service):
    service.take_counters()
    counting = [replace(job, play=replace(job.play, reward=Counts())) for job in jobs(SingleTurn(), count=4)]
    service.play(counting)
    assert service.take_counters()["judge/calls"] == 4 * 3 * 2
    assert service.take_counters()["judge/calls"] == 0


def test_a_worker_killed_while_it_plays_is_replaced_and_changes_nothing(service, other_weights, play_here, tmp_path):
    service.load_weights(other_weights, 7)
    victim, engine = process_of(service._players[0].actor), process_of(service._engines[0].actor)
    service.take_counters()
    killed = threading.Thread(target=kill_when_named, args=(tmp_path,))
    killed.start()
    groups = service.play(jobs(WaitsForDeath(tmp_path), name="killed"))
    killed.join()
    assert int((tmp_path / "pid").read_text()) == victim != process_of(service._players[0].actor)
    assert engine == process_of(service._engines[0].actor)
    counted = service.take_counters()
    assert (counted["workers_replaced"], counted["engines_replaced"], counted["jobs_resubmitted"]) == (1, 0, 2)
    assert {r.stop for g in groups for r in g.rollouts} <= {StopReason.FINISHED, StopReason.LENGTH}
    check_same(groups, play_here(jobs(SingleTurn(), name="killed")))
    assert versions_of(groups) == {7}
    drawn = sum(r.num_generated for g in groups for r in g.rollouts)
    assert counted["decode_tokens"] == drawn, "what the dead worker had asked for was not drawn again"


def duplicates_in_the_journal(service: RolloutService) -> int:
    return ray.get(
        service._engines[0].actor.__ray_call__.remote(lambda engine: engine._engines[False]._journal.duplicates)
    )


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


def test_an_engine_that_has_stopped_is_replaced(service, other_weights):
    actor = service._engines[0].actor
    victim = process_of(actor)
    ray.get(actor.__ray_call__.remote(lambda engine: engine._engines[False].close()))
    service.load_weights(other_weights, 9)
    assert process_of(service._engines[0].actor) != victim
    assert versions_of(service.play(jobs(SingleTurn(), count=1))) == {9}
    with pytest.raises(ray.exceptions.RayTaskError, match="unknown tensors"):
        service.load_weights({**other_weights, "no_such_weight": next(iter(other_weights.values()))}, 10)
    service.load_weights(other_weights, 11)


def test_an_engine_killed_in_mid_generation_draws_no_token_twice(service, other_weights, play_here):
    service.load_weights(other_weights, 12)
    service.take_counters()
    asked = jobs(SingleTurn(), count=40, name="engine-killed")
    service.submit(asked)
    actor, victim = service._engines[0].actor, process_of(service._engines[0].actor)
    while ray.get(actor.counters.remote())["decode_steps"] < 5:
        time.sleep(0.001)
    os.kill(victim, signal.SIGKILL)
    groups = {}
    while len(groups) < len(asked):
        groups.update((job.id, group) for job, group in service.collect())
    assert service.take_counters()["engines_replaced"] == 1
    assert process_of(service._engines[0].actor) != victim
    check_same([groups[job.id] for job in asked], play_here(asked))
    assert duplicates_in_the_journal(service) == 0


def test_a_driver_that_was_long_away_replaces_nobody(service, other_weights):
    service.load_weights(other_weights, 8)
    service.play(jobs(SingleTurn(), count=1))
    service.take_counters()
    for _ in range(3):
        service._looked_at -= 10_000
        for member in (*service._engines, *service._players):
            member.moved_at -= 10_000
        service.collect()
    counted = service.take_counters()
    assert (counted["engines_replaced"], counted["workers_replaced"]) == (0, 0)


def test_work_that_kills_its_worker_ends_as_a_failed_group_and_takes_nothing_along(service, other_weights):
    service.load_weights(other_weights, 8)
    [deadly] = jobs(Deadly(), count=1)
    others = jobs(SingleTurn(), count=3)
    *groups, failed = service.play([*others, deadly])
    assert {r.stop for r in failed.rollouts} == {StopReason.ERROR}
    assert "its worker was lost 3 times" in str(failed.rollouts[0].error)
    assert not any(r.failed for g in groups for r in g.rollouts)
    assert versions_of(groups) == {8}
    assert service.take_counters()["jobs_given_up"] == 1


def test_actors_that_hang_are_replaced_and_what_they_had_goes_on(tiny_model, other_weights, play_here, tmp_path):
    # The other tests have a service of their own, which holds a core.
    workers = WORKERS.replace(num_actors=2, hang_timeout_s=3.0, cpus_per_actor=0.25)
    spec = WorkerSpec(
        model_path=tiny_model, dtype="float32", max_length=64, workers=workers, substrate=None, folder=tmp_path
    )
    asked = jobs(SingleTurn(), count=30, name="hung")
    with ray_session(workers), RolloutService(spec) as service:
        service.load_weights(other_weights, 5)
        engine, player = service._engines[0].actor, service._players[1].actor
        victims = process_of(engine), process_of(player)
        service.play(jobs(SingleTurn(), count=2))
        service.submit(asked)
        for victim in victims:
            os.kill(victim, signal.SIGSTOP)
        groups: dict[str, Group] = {}
        while len(groups) < len(asked):
            groups.update((job.id, group) for job, group in service.collect())
        counted = service.take_counters()
    assert (counted["engines_replaced"], counted["workers_replaced"]) == (1, 1)
    check_same([groups[job.id] for job in asked], play_here(asked))


class AnswersLate(RemoteEngine):
    """Answers all it was asked for since the last time once it is let; the ids of each time are kept."""

    def __init__(self) -> None:
        super().__init__("none")
        self.let = asyncio.Event()
        self.asked: list[list[str]] = []

    async def _ask(self, waiting: Mapping[str, tuple[Request, asyncio.Future[Completion]]]) -> None:
        self.asked.append(list(waiting))
        await self.let.wait()
        for name, (request, future) in waiting.items():
            if not future.done():
                none = np.zeros(0, np.float32)
                future.set_result(
                    Completion(
                        request_id=name,
                        token_ids=request.prompt_ids,
                        logprobs=none,
                        versions=none.astype(np.int32),
                        finish=FinishReason.STOP,
                    )
                )


def test_equal_requests_under_way_are_asked_for_once_and_answered_to_all() -> None:
    def request(name: str) -> Request:
        return Request(id=name, prompt_ids=np.zeros(1, np.int32), sampling=Sampling())

    async def ask() -> None:
        engine = AnswersLate()
        together = [asyncio.create_task(engine.generate(request(name))) for name in ("a", "b", "a")]
        await asyncio.sleep(0.01)
        later, given_up = (asyncio.create_task(engine.generate(request("a"))) for _ in range(2))
        alone = asyncio.create_task(engine.generate(request("c")))
        await asyncio.sleep(0.01)
        given_up.cancel()
        alone.cancel()
        await asyncio.sleep(0.01)
        engine.let.set()
        done = await asyncio.wait_for(asyncio.gather(*together, later), timeout=5)
        assert [completion.request_id for completion in done] == ["a", "b", "a", "a"]
        assert engine.asked == [["a", "b"], ["c"]]
        assert given_up.cancelled()
        assert alone.cancelled()
        assert (await engine.generate(request("a"))).request_id == "a"
        assert engine.asked[2:] == [["a"]]

    asyncio.run(ask())
