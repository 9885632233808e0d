"""Math answers: extraction order, exact comparison, reasoning-gym's scorers and their fences."""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import RecipeError
from posttrain.types import Completion, FinishReason, Rollout, StopReason, Task, Turn
from rewards.math import MathReward, extract_answer, parse_number, same_answer


def rollout(text: str, answer: str | None = None, info: dict[str, Any] | None = None) -> Rollout:
    completion = Completion(
        request_id="r",
        token_ids=np.zeros(1, np.int32),
        logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
        finish=FinishReason.STOP,
    )
    turn = Turn(context_ids=np.zeros(1, np.int32), completion=completion, text=text)
    task = Task(id="t", domain="math", prompt=({"role": "user", "content": "?"},), answer=answer, info=info or {})
    return Rollout(id="r", task=task, turns=(turn,), stop=StopReason.FINISHED)


def value(text: str, answer: str | None = None, info: dict[str, Any] | None = None) -> float | None:
    return asyncio.run(MathReward().score(rollout(text, answer, info))).value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"5 so \boxed{6}, or \boxed{\frac{1}{2}} and 9", r"\frac{1}{2}"),
        ("Answer: 3\nno wait\nanswer: 4\n5 is not it", "4"),
        ("17 - 5 = 12\n#### 1,234", "1,234"),
        ("The answer is 12.", "12"),
        ("between 1 and -2.5", "-2.5"),
        ("it is 7/8 of it", "7/8"),
        ("2024-01-05", "05"),
        ("1e99999", None),
        ("no number", None),
        ("", None),
        (r"\boxed{12", "12"),
    ],
)
def test_extraction_order(text: str, found: str | None) -> None:
    assert extract_answer(text) == found


def test_text_answers_are_taken_whole() -> None:
    assert (
        extract_answer("So:\nAnswer: Zoe is a knave,\nRex a knight", numeric=False) == "Zoe is a knave,\nRex a knight"
    )
    assert extract_answer(" gnidnib 3 ", numeric=False) == "gnidnib 3"


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6), st.integers(1, 50))
def test_equal_fractions_are_one_answer(top: int, bottom: int, factor: int) -> None:
    assert parse_number(f"{top * factor}/{bottom * factor}") == Fraction(top, bottom)
    assert same_answer(rf"\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}")
    assert parse_number(f"{top:,}.") == top
    assert not same_answer(f"{top + 1}/{bottom}", f"{top}/{bottom}")


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("0.5", "1/2", True),
        ("$0.50$", "1/2", True),
        ("1e3", "1000", True),
        ("1,000", "1000", True),
        ("10,00", "1000", False),
        ("0.3333", "1/3", False),
        ("1/0", "0", False),
        ("9" * 200, "9", False),
        ("1e9999999", "1", False),
        ("nan", "0", False),
        ("True", "1", False),
        ("Paris.", " paris ", True),
        ("Paris or Rome", "Paris", False),
    ],
)
def test_exact_comparison(found: str, expected: str, same: bool) -> None:
    assert same_answer(found, expected) is same


def test_reward_with_reference_answer() -> None:
    assert value("First 41. The answer is 42.", "42") == 1.0
    assert value("It is 42 or 43.", "42") == 0.0
    assert value("", "42") == 0.0
    with pytest.raises(RecipeError, match="reference answer"):
        value("42")


@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "countdown", "spiral_matrix", "knights_knaves"])
def test_reasoning_gym_oracles_score_one_and_padding_does_not(name: str) -> None:
    entry = reasoning_gym.create_dataset(name, size=1, seed=3)[0]
    info = {"dataset": name, "entry": entry}
    assert value(f"Some thought.\nAnswer: {entry['answer']}", info=info) == 1.0
    assert value("Answer: banana", info=info) == 0.0
    assert value("", info=info) == 0.0


def test_containing_the_oracle_is_not_a_full_match() -> None:
    entry = reasoning_gym.create_dataset("spell_backward", size=1, seed=3)[0]
    assert value(f"Answer: {entry['answer']} maybe", info={"dataset": "spell_backward", "entry": entry}) == 0.0


def test_scorer_that_raises_at_the_answer_gives_zero_but_a_broken_entry_is_an_error() -> None:
    entry = reasoning_gym.create_dataset("prime_factorization", size=1, seed=1)[0]
    assert value("Answer: x times y", info={"dataset": "prime_factorization", "entry": entry}) == 0.0
    with pytest.raises(RecipeError, match="its own reference answer"):
        value("Answer: x", info={"dataset": "prime_factorization", "entry": {"answer": "y", "metadata": {}}})


@pytest.mark.parametrize("name", ["game_of_life_halting", "coin_flip", "simple_integration", "no_such_dataset"])
def test_datasets_without_a_usable_scorer_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        value("Answer: 0", info={"dataset": name, "entry": {"answer": "0", "metadata": {}}})


def test_answers_are_never_run_as_programs(tmp_path: Any) -> None:
    marker = tmp_path / "ran"
    attack = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    for name in ("countdown", "spiral_matrix", "string_insertion", "binary_matrix", "n_queens", "puzzle24"):
        entry = {"answer": "1", "metadata": {}}
        assert value(f"Answer: {attack}", info={"dataset": name, "entry": entry}) == 0.0
        assert value("Answer: 9**9**9**9", info={"dataset": name, "entry": entry}) == 0.0
    assert not marker.exists()
