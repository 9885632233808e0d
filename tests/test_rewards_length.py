"""Length rewards follow their published formulas."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import RecipeError
from posttrain.protocols import Sandbox
from posttrain.types import Rollout, SandboxSpec, Score, ScoreStatus, Task
from rewards.controls import Case
from rewards.length import CosineLength, EffortPenalty, OverlongPenalty


def rollout(tokens: int) -> Rollout:
    made = Case(task=Task(id="t", domain="d", prompt=()), reference="").rollout("abcd" * tokens)
    assert made.num_generated == tokens
    return made


@dataclass(frozen=True)
class Fixed:
    value: float | None
    sandbox: SandboxSpec | None = field(default_factory=SandboxSpec)

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        status = ScoreStatus.OK if self.value is not None else ScoreStatus.JUDGE_ERROR
        return Score(value=self.value, parts={"box": float(sandbox is not None)}, status=status, error="gone")


def value(reward: Any, tokens: int, box: Any = None) -> float | None:
    return asyncio.run(reward.score(rollout(tokens), box)).value


@pytest.mark.parametrize(("tokens", "expected"), [(1, 0.0), (60, 0.0), (70, -0.25), (100, -1.0), (500, -1.0)])
def test_overlong_penalty_is_that_of_dapo(tokens: int, expected: float) -> None:
    assert value(OverlongPenalty(max_tokens=100, cache_tokens=40), tokens) == pytest.approx(expected)


@given(st.integers(1, 300), st.integers(1, 300))
def test_overlong_penalty_never_rises_with_length(short: int, more: int) -> None:
    reward = OverlongPenalty(max_tokens=200, cache_tokens=80)
    first, second = value(reward, short), value(reward, short + more)
    assert first is not None
    assert second is not None
    assert -1.0 <= second <= first <= 0.0


@pytest.mark.parametrize(
    ("effort", "tokens", "expected"),
    [
        ("1", 100, -0.5),
        ("non-think", 100, -0.5),
        ("31", 100, -0.5 * math.exp(-1)),
        ("max", 100, -0.5 * math.exp(-3.3)),
        (None, 50, -0.25 * math.exp(-74 / 30)),
        ("1", 1000, -1.0),
    ],
)
def test_effort_penalty_is_that_of_v4_1(effort: str | None, tokens: int, expected: float) -> None:
    reward = EffortPenalty(normal_tokens=100, k0=0.5, tau=30.0, max_penalty=1.0)
    asked = replace(rollout(tokens), task=Task(id="t", domain="d", prompt=(), effort=effort))
    assert asyncio.run(reward.score(asked)).value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("right", "tokens", "expected"),
    [(1.0, 50, 1.5), (1.0, 100, 1.0), (0.0, 50, -5.0), (0.0, 100, 0.0), (1.0, 101, -10.0), (0.0, 101, -10.0)],
)
def test_cosine_has_its_ends_and_its_middle(right: float, tokens: int, expected: float) -> None:
    assert value(CosineLength(reward=Fixed(right), max_tokens=100), tokens) == pytest.approx(expected)


def test_cosine_prefers_short_right_answers_and_long_wrong_ones() -> None:
    right = [value(CosineLength(reward=Fixed(1.0), max_tokens=100), n) or 0.0 for n in range(1, 101, 9)]
    wrong = [value(CosineLength(reward=Fixed(0.0), max_tokens=100), n) or 0.0 for n in range(1, 101, 9)]
    assert right == sorted(right, reverse=True)
    assert wrong == sorted(wrong)
    assert min(right) > max(wrong)


def test_unscored_stays_unscored_and_the_box_is_passed_on() -> None:
    reward = CosineLength(reward=Fixed(None), max_tokens=100)
    score = asyncio.run(reward.score(rollout(5)))
    assert (score.value, score.status, score.error) == (None, ScoreStatus.JUDGE_ERROR, "gone")
    assert reward.sandbox == SandboxSpec()
    scored = asyncio.run(replace(reward, reward=Fixed(1.0)).score(rollout(5), object()))  # type: ignore[arg-type]
    assert scored.parts == {"box": 1.0, "reward": 1.0}


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(RecipeError, match="cache_tokens"):
        OverlongPenalty(max_tokens=10, cache_tokens=20)
    with pytest.raises(RecipeError, match="not rising"):
        CosineLength(reward=Fixed(1.0), max_tokens=10, right=(0.0, 1.0))
