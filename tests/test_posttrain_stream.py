"""Groups for a learner: in step or ahead of it, in which order, and what happens when the machinery breaks."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from posttrain.config import Workers
from posttrain.errors import RecipeError
from posttrain.rollout.environments import SingleTurn
from posttrain.rollout.player import GroupJob, Play
from posttrain.rollout.samples import staleness_metrics, without_stale_tokens
from posttrain.rollout.stream import GroupStream
from posttrain.types import (
    Group,
    Rollout,
    Sample,
    Sampling,
    Score,
    ScoreStatus,
    StopReason,
    Task,
    TokenArrays,
    Tokens,
)

PLAY = Play(environment=SingleTurn(), reward=None, sampling=Sampling(), max_sequence_tokens=10)


def job(number: int) -> tuple[int, GroupJob]:
    task = Task(id=f"t{number}", domain="d", prompt=())
    return number, GroupJob(id=f"s/{number}", task=task, num_rollouts=2, play=PLAY, seed=0)


def group(asked: GroupJob, status: ScoreStatus = ScoreStatus.OK) -> Group:
    rollouts = tuple(
        Rollout(id=f"{asked.id}/{i}", task=asked.task, turns=(), stop=StopReason.FINISHED)
        for i in range(asked.num_rollouts)
    )
    score = Score(value=1.0 if status is ScoreStatus.OK else None, status=status, error="no box")
    return Group(task=asked.task, rollouts=rollouts, scores=(score,) * asked.num_rollouts)


@dataclass
class Service:
    """Completes jobs in the order that it is told to."""

    order: Callable[[Sequence[GroupJob]], GroupJob] = lambda waiting: waiting[0]
    at_once: int = 1
    outcome: Callable[[GroupJob], ScoreStatus] = lambda asked: ScoreStatus.OK
    waiting: deque[GroupJob] = field(default_factory=deque)
    submitted: list[str] = field(default_factory=list)

    def submit(self, jobs: Sequence[GroupJob]) -> None:
        self.waiting += jobs
        self.submitted += [asked.id for asked in jobs]

    def collect(self) -> list[tuple[GroupJob, Group]]:
        complete = []
        for _ in range(min(self.at_once, len(self.waiting))):
            done = self.order(self.waiting)
            self.waiting.remove(done)
            complete.append((done, group(done, self.outcome(done))))
        return complete


def stream_of(
    service: Service, *, staleness: int = 0, jobs: Iterator[Any] | None = None, **workers: Any
) -> GroupStream:
    return GroupStream(
        service=service,
        jobs=map(job, itertools.count()) if jobs is None else jobs,
        groups_per_step=3,
        max_staleness=staleness,
        workers=Workers(**workers),
        on_pause=lambda why: None,
    )


def tasks(groups: Sequence[Group]) -> list[str]:
    return [each.task.id for each in groups]


def test_in_step_a_step_starts_its_own_jobs_and_gets_them_in_order():
    service = Service(order=lambda waiting: waiting[-1])
    stream = stream_of(service)
    assert tasks(stream.take()) == ["t0", "t1", "t2"]
    assert service.submitted == ["s/0", "s/1", "s/2"]
    assert stream.pending() == []
    assert tasks(stream.take()) == ["t3", "t4", "t5"]


def test_ahead_a_step_takes_the_first_that_are_complete():
    slow = "s/0"
    service = Service(order=lambda waiting: next((j for j in waiting if j.id != slow), waiting[0]))
    stream = stream_of(service, staleness=1)
    assert tasks(stream.take()) == ["t1", "t2", "t3"]
    assert stream.pending() == [0, 4, 5], "a step's worth goes on while this one is learned"
    assert tasks(stream.take()) == ["t4", "t5", "t6"]
    assert len(service.submitted) == 6 + 3, "another one began when the step asked"


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_groups_taken_in_their_order_began_no_more_steps_before_than_the_staleness_allows(staleness):
    service = Service()
    stream = stream_of(service, staleness=staleness)
    began: dict[str, int] = {}
    ages = []
    for step in range(8):
        # Whatever a step starts, before or after it has waited, is played with the weights from before it.
        taken = stream.take()
        began.update((f"t{id.partition('/')[2]}", step) for id in service.submitted[len(began) :])
        ages += [step - began[task] for task in tasks(taken)]
    assert max(ages) == staleness


def test_of_the_complete_groups_the_oldest_are_taken_first():
    service = Service(order=lambda waiting: waiting[-1], at_once=6)
    stream = stream_of(service, staleness=1)
    assert tasks(stream.take()) == ["t0", "t1", "t2"]


def test_a_stream_that_is_used_up_gives_what_is_left():
    stream = stream_of(Service(), jobs=map(job, range(4)))
    assert [tasks(stream.take()) for _ in range(3)] == [["t0", "t1", "t2"], ["t3"], []]


def test_a_resumed_stage_begins_with_what_was_under_way():
    service = Service(order=lambda waiting: waiting[-1])
    before = stream_of(service, staleness=1)
    before.take()
    pending = before.pending()
    resumed = itertools.chain(pending, itertools.count(max(pending) + 1))
    after = stream_of(Service(), staleness=1, jobs=map(job, resumed))
    assert tasks(after.take()) == [f"t{number}" for number in pending]


def test_a_broken_machinery_pauses_the_stream_and_costs_no_group(monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []
    monkeypatch.setattr("posttrain.rollout.stream.time.sleep", slept.append)
    told: list[str] = []
    service = Service(outcome=lambda asked: ScoreStatus.SANDBOX_ERROR if len(slept) < 3 else ScoreStatus.OK)
    stream = stream_of(service)
    stream.on_pause = told.append
    groups = stream.take()
    assert tasks(groups) == ["t0", "t1", "t2"]
    assert {score.status for each in groups for score in each.scores} == {ScoreStatus.OK}
    # Three probes of one group, and then the two others.
    assert service.submitted == ["s/0", "s/1", "s/2", "s/0", "s/0", "s/0", "s/1", "s/2"]
    assert slept == [5.0, 10.0, 20.0]
    assert stream.take_paused_s() == 35.0
    assert stream.take_paused_s() == 0.0
    assert "no box" in told[0]


def test_a_machinery_that_stays_broken_ends_the_stage_with_its_reason(monkeypatch: pytest.MonkeyPatch):
    clock = itertools.count(0.0, 10.0)
    monkeypatch.setattr("posttrain.rollout.stream.time.sleep", lambda seconds: None)
    monkeypatch.setattr("posttrain.rollout.stream.time.monotonic", lambda: next(clock))
    service = Service(outcome=lambda asked: ScoreStatus.SANDBOX_ERROR)
    with pytest.raises(RecipeError, match="failed 100% of the rollouts of a step for 60 s"):
        stream_of(service, breaker_patience_s=60).take()


@pytest.mark.parametrize("status", [ScoreStatus.REWARD_ERROR, ScoreStatus.PARSE_ERROR])
def test_what_is_wrong_with_a_reward_does_not_get_better_by_waiting(status: ScoreStatus):
    groups = stream_of(Service(outcome=lambda asked: status)).take()
    assert {score.status for each in groups for score in each.scores} == {status}


def test_few_failures_do_not_stop_a_step():
    service = Service(outcome=lambda asked: ScoreStatus.SANDBOX_ERROR if asked.id == "s/1" else ScoreStatus.OK)
    assert tasks(stream_of(service).take()) == ["t0", "t1", "t2"]
    assert service.submitted == ["s/0", "s/1", "s/2"]


def sample(versions: list[int]) -> Sample:
    size = len(versions)
    arrays = TokenArrays(
        token_ids=np.zeros(size, np.int32),
        loss_mask=np.array([version >= 0 for version in versions]),
        logprobs=np.zeros(size, np.float32),
        versions=np.array(versions, np.int32),
    )
    return Sample(id="s", task_id="t", domain="d", tokens=Tokens.of(arrays))


def test_tokens_that_are_too_old_carry_no_loss_and_the_others_do():
    [mixed, fresh, old] = without_stale_tokens(
        [sample([-1, 3, 4, 5]), sample([-1, 5, 5]), sample([-1, 1, 1])], oldest=4
    )
    assert mixed.load().loss_mask.tolist() == [False, False, True, True]
    assert (mixed.num_loss_tokens, fresh.num_loss_tokens, old.num_loss_tokens) == (2, 2, 0)


def test_staleness_is_the_age_of_a_rollouts_oldest_token():
    task = Task(id="t", domain="d", prompt=())

    @dataclass
    class Played:
        tokens: Tokens

    played = tuple(Played(sample(versions).tokens) for versions in ([-1, 3, 5], [-1, 5, 5], [-1]))
    scores = (Score(value=0.0),) * 3
    metrics = staleness_metrics([Group(task=task, rollouts=played, scores=scores)], 6, oldest=4)  # type: ignore[arg-type]
    assert metrics == {"staleness": 2.0, "max_staleness": 3.0, "stale_rollouts": 1.0}
