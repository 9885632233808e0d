"""Groups for a learner: in step or ahead of it, in which order, and what happens when the machinery breaks."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from posttrain.config import GRPO, Workers
from posttrain.errors import Preempted, RecipeError
from posttrain.rollout.environments import SingleTurn
from posttrain.rollout.player import GroupJob, Play
from posttrain.rollout.samples import group_advantage_rows, staleness_metrics, without_stale_tokens
from posttrain.rollout.stream import GroupStream
from posttrain.stages.refill import Refills, refill_metrics, teaches_nothing, without_useless
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


class Source:
    """Tasks in an order; the second epoch is another one."""

    def train(self, *, seed: int) -> list[Task]:
        return [Task(id=f"t{seed}-{i}", domain="d", prompt=()) for i in range(20)]


def mixed(asked: GroupJob, *values: float | None) -> Group:
    rollouts = tuple(
        Rollout(id=f"{asked.id}/{i}", task=asked.task, turns=(), stop=StopReason.FINISHED) for i in range(len(values))
    )
    status = {True: ScoreStatus.OK, False: ScoreStatus.SANDBOX_ERROR}
    scores = tuple(Score(value=value, status=status[value is not None]) for value in values)
    return Group(task=asked.task, rollouts=rollouts, scores=scores)


@dataclass
class Scoring(Service):
    """Scores a job's rollouts by its id."""

    values: Callable[[str], Sequence[float | None]] = lambda job_id: (0.0, 1.0)
    interrupt_at: str = ""

    def collect(self) -> list[tuple[GroupJob, Group]]:
        complete = []
        for _ in range(min(self.at_once, len(self.waiting))):
            done = self.order(self.waiting)
            if done.id == self.interrupt_at:
                raise Preempted
            self.waiting.remove(done)
            complete.append((done, mixed(done, *self.values(done.id))))
        return complete


def refills(max_refills: int, *, used: int = 0) -> Refills:
    return Refills(
        {"d": SimpleNamespace(tasks=Source())},  # type: ignore[dict-item]
        seed=0,
        behind={"d": 6 + used},
        job=lambda job_id, task: GroupJob(id=job_id, task=task, num_rollouts=2, play=PLAY, seed=0),
        max_refills=max_refills,
    )


USELESS = {"s/0", "s/2", "s/0/more-0-1"}


def test_a_step_asks_for_other_groups_until_it_has_enough_that_teach_something():
    service = Scoring(values=lambda job_id: (1.0, 1.0) if job_id in USELESS else (0.0, 1.0))
    stream = stream_of(service)
    groups = stream.take(refills(3).of_step("s/0"))
    assert service.submitted == ["s/0", "s/1", "s/2", "s/0/more-0-0", "s/0/more-0-1", "s/0/more-1-0"]
    # Behind the last task of the stage's own, in their order.
    assert tasks(groups)[3:] == ["t0-6", "t0-7", "t0-8"]
    assert refill_metrics(groups, refilled=3) == {
        "refilled_groups": 3.0,
        "zero_variance_groups": 3.0,
        "missing_groups": 0.0,
    }
    rows = without_useless(groups, [[-0.5, 0.5]] * 6)
    assert [np.isnan(row).all() for row in rows] == [True, False, True, False, True, False]
    assert stream.refilled == {"d": 3}


def test_a_step_gives_up_after_so_many_rounds_and_a_round_waits_for_its_slowest():
    slow = "s/0/more-0-0"
    service = Scoring(
        values=lambda job_id: (1.0, 1.0) if job_id != slow else (0.0, 1.0),
        order=lambda waiting: next((j for j in waiting if j.id != slow), waiting[0]),
    )
    stream = stream_of(service, staleness=1)
    groups = stream.take(refills(2).of_step("s/0"))
    assert [id for id in service.submitted if "more" in id] == [
        *("s/0/more-0-0", "s/0/more-0-1", "s/0/more-0-2"),
        *("s/0/more-1-0", "s/0/more-1-1"),
    ]
    assert len(groups) == 8
    assert refill_metrics(groups, refilled=5)["missing_groups"] == 2
    # What the stream had under way meanwhile waits its turn.
    assert tasks(stream.take()) == ["t3", "t4", "t5"]


@pytest.mark.parametrize("values", [(1.0, None), (None, None), (0.0, 1.0)])
def test_what_the_machinery_failed_is_not_replaced_as_if_it_taught_nothing(values: tuple[float | None, ...]):
    service = Scoring(values=lambda job_id: values if job_id == "s/1" else (0.0, 1.0))
    groups = stream_of(service).take(refills(3).of_step("s/0"))
    assert len(groups) == 3
    assert refill_metrics(groups, refilled=0)["zero_variance_groups"] == 0


def test_a_step_interrupted_in_a_refill_is_played_again_with_the_same_jobs():
    def values(job_id: str) -> tuple[float, float]:
        return (1.0, 1.0) if job_id in USELESS else (0.0, 1.0)

    whole = Scoring(values=values)
    stream = stream_of(whole, staleness=1)
    own = refills(3)
    steps = [tasks(stream.take(own.of_step(f"s/{step}"))) for step in range(2)]

    service = Scoring(values=values, interrupt_at="s/0/more-1-0")
    stream = stream_of(service, staleness=1)
    with pytest.raises(Preempted):
        stream.take(refills(3).of_step("s/0"))
    pending = stream.pending()
    assert pending == [0, 1, 2, 3, 4, 5]
    assert stream.refilled.total() == 0
    again = Scoring(values=values)
    resumed = stream_of(again, staleness=1, jobs=map(job, itertools.chain(pending, itertools.count(6))))
    own = refills(3, used=stream.refilled["d"])
    assert [tasks(resumed.take(own.of_step(f"s/{step}"))) for step in range(2)] == steps
    assert again.submitted == whole.submitted


def test_effort_modes_of_one_prompt_have_a_baseline_each():
    """Short answers of one mode and long ones of another are not compared, and one that is alike teaches nothing."""
    forms = [Task(id="t", domain="d", prompt=(), effort=mode) for mode in ("non-think", "high", "max")]
    values = (0.0, 0.5, 1.0, 1.0, 0.5, None)
    rollouts = tuple(
        Rollout(id=f"r/{i}", task=forms[i % 3], turns=(), stop=StopReason.FINISHED) for i in range(len(values))
    )
    status = {True: ScoreStatus.OK, False: ScoreStatus.JUDGE_ERROR}
    scores = tuple(Score(value=value, status=status[value is not None]) for value in values)
    several = Group(task=forms[0], rollouts=rollouts, scores=scores)
    (row,) = group_advantage_rows([several], GRPO(), min_group_size=2)
    assert row[:2] == [-0.5, 0.0]
    assert row[3:5] == [0.5, 0.0]
    assert np.isnan([row[2], row[5]]).all(), "a mode with one scored rollout has nothing to compare with"
    assert not teaches_nothing(several)
    alike = replace(several, scores=tuple(Score(value=float(i % 3)) for i in range(6)))
    assert teaches_nothing(alike)
    assert group_advantage_rows([alike], GRPO(), min_group_size=2) == [[0.0] * 6]


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
