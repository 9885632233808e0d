"""Sums and gates: None stays None, sandboxes and judges reach the parts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import JudgeError, RecipeError
from posttrain.protocols import Ask, Sandbox
from posttrain.types import Rollout, SandboxSpec, Score, ScoreStatus, StopReason, Task
from rewards.compose import Gate, WeightedSum

ROLLOUT = Rollout(id="r", task=Task(id="t", domain="d", prompt=()), turns=(), stop=StopReason.FINISHED)
BOX: Any = object()


@dataclass(frozen=True)
class Fixed:
    value: float | None
    status: ScoreStatus = ScoreStatus.OK

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        return Score(value=self.value, parts={"inner": self.value}, status=self.status, explanation="fixed")


@dataclass(frozen=True)
class Boxed:
    sandbox: SandboxSpec | None = field(default_factory=SandboxSpec)

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        return Score(value=float(sandbox is BOX))


@dataclass(frozen=True)
class Unboxed:
    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        return Score(value=float(sandbox is None))


@dataclass(frozen=True)
class Judged:
    judge: Ask | None = None

    def with_policy(self, ask: Ask) -> Judged:
        return replace(self, judge=ask)

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        if self.judge is None:
            raise JudgeError("no judge")
        return Score(value=float(await self.judge([], max_tokens=1, temperature=1.0, seed=0)))


async def half(messages: Any, *, max_tokens: int, temperature: float, seed: int) -> str:
    return "0.5"


def run(reward: Any, box: Any = None) -> Score:
    return asyncio.run(reward.score(ROLLOUT, box))


@given(st.lists(st.tuples(st.floats(-2, 2), st.none() | st.floats(-1, 1)), min_size=1, max_size=5))
def test_sum_is_none_exactly_when_a_part_that_counts_is(rows: list[tuple[float, float | None]]) -> None:
    names = [f"r{i}" for i in range(len(rows))]
    reward = WeightedSum(
        {name: Fixed(value) for name, (_, value) in zip(names, rows, strict=True)},
        {name: weight for name, (weight, _) in zip(names, rows, strict=True)},
    )
    value = run(reward).value
    if any(weight != 0 and part is None for weight, part in rows):
        assert value is None
    else:
        assert value == pytest.approx(sum(weight * (part or 0.0) for weight, part in rows))


def test_sum_keeps_parts_and_says_which_one_is_missing() -> None:
    reward = WeightedSum({"a": Fixed(1.0), "b": Fixed(None, ScoreStatus.JUDGE_ERROR)}, {"a": 2.0, "b": 1.0})
    score = run(reward)
    assert (score.value, score.status) == (None, ScoreStatus.JUDGE_ERROR)
    assert score.parts == {"a": 1.0, "a/inner": 1.0, "b": None, "b/inner": None}
    assert score.error is not None
    assert score.error.startswith("b: ")
    reported = run(replace(reward, weights={"a": 2.0, "b": 0.0}))
    assert (reported.value, reported.status, reported.parts["b"]) == (2.0, ScoreStatus.OK, None)


def test_gate_closes_opens_and_stays_unscored() -> None:
    closed = run(Gate(condition=Fixed(0.0), reward=Judged()))
    assert (closed.value, closed.status) == (0.0, ScoreStatus.VETOED)
    opened = run(Gate(condition=Fixed(1.0), reward=Fixed(0.25)))
    assert (opened.value, opened.status) == (0.25, ScoreStatus.OK)
    unknown = run(Gate(condition=Fixed(None), reward=Fixed(1.0)))
    assert (unknown.value, unknown.status) == (None, ScoreStatus.REWARD_ERROR)
    behind = run(Gate(condition=Fixed(1.0), reward=Fixed(None, ScoreStatus.PARSE_ERROR)))
    assert (behind.value, behind.status) == (None, ScoreStatus.PARSE_ERROR)


def test_failures_propagate() -> None:
    with pytest.raises(JudgeError):
        run(WeightedSum({"a": Fixed(1.0), "j": Judged()}, {"a": 1.0, "j": 1.0}))
    with pytest.raises(JudgeError):
        run(Gate(condition=Fixed(1.0), reward=Judged()))


def test_policy_and_sandbox_reach_the_parts() -> None:
    total = WeightedSum({"j": Judged(), "b": Boxed(), "u": Unboxed()}, {"j": 1.0, "b": 1.0, "u": 1.0})
    gate = Gate(condition=Boxed(), reward=WeightedSum({"j": Judged()}, {"j": 1.0}))
    assert total.sandbox == gate.sandbox == SandboxSpec()
    assert run(total.with_policy(half), BOX).value == 2.5
    assert run(gate.with_policy(half), BOX).value == 0.5
    assert WeightedSum({"u": Unboxed()}, {"u": 1.0}).sandbox is None


def test_wrong_combinations_are_refused() -> None:
    with pytest.raises(RecipeError, match="at most one"):
        WeightedSum({"a": Boxed(), "b": Boxed()}, {"a": 1.0, "b": 1.0})
    with pytest.raises(RecipeError, match="at most one"):
        Gate(condition=Boxed(), reward=Boxed())
    with pytest.raises(RecipeError, match="one weight"):
        WeightedSum({"a": Fixed(1.0)}, {"b": 1.0})
    with pytest.raises(RecipeError, match="at least one"):
        WeightedSum({}, {})
