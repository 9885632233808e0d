"""reasoning-gym's scorers behind their fences."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import reasoning_gym
import reasoning_gym.factory

from posttrain.errors import RecipeError
from posttrain.protocols import TaskSource
from posttrain.types import Task
from recipes.tasks.puzzles import PuzzleTasks
from rewards.controls import Case
from rewards.math import MathReward
from rewards.puzzles import CHANCE, NO_REFERENCE, REFUSED, require_usable


def value(text: str, info: dict[str, Any]) -> float | None:
    task = Task(id="t", domain="puzzles", prompt=(), info=info)
    return asyncio.run(MathReward().score(Case(task=task, reference="").rollout(text))).value


@pytest.mark.parametrize("name", ["chain_sum", "spell_backward", "countdown", "spiral_matrix", "knights_knaves"])
def test_reasoning_gym_oracles_score_one_and_padding_does_not(name: str) -> None:
    entry = reasoning_gym.create_dataset(name, size=1, seed=3)[0]
    info = {"dataset": name, "entry": entry}
    assert value(f"Some thought.\nAnswer: {entry['answer']}", info) == 1.0
    assert value("Answer: banana", info) == 0.0
    assert value("", info) == 0.0


def test_containing_the_oracle_is_not_a_full_match() -> None:
    entry = reasoning_gym.create_dataset("spell_backward", size=1, seed=3)[0]
    assert value(f"Answer: {entry['answer']} maybe", {"dataset": "spell_backward", "entry": entry}) == 0.0


def test_scorer_that_raises_at_the_answer_gives_zero_but_a_broken_entry_is_an_error() -> None:
    entry = reasoning_gym.create_dataset("prime_factorization", size=1, seed=1)[0]
    assert value("Answer: x times y", {"dataset": "prime_factorization", "entry": entry}) == 0.0
    with pytest.raises(RecipeError, match="its own reference answer"):
        value("Answer: x", {"dataset": "prime_factorization", "entry": {"answer": "y", "metadata": {}}})


@pytest.mark.parametrize("name", ["game_of_life_halting", "coin_flip", "simple_integration", "no_such_dataset"])
def test_datasets_without_a_usable_scorer_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        value("Answer: 0", {"dataset": name, "entry": {"answer": "0", "metadata": {}}})


def test_answers_are_never_run_as_programs(tmp_path: Any) -> None:
    marker = tmp_path / "ran"
    attack = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    for name in ("countdown", "spiral_matrix", "string_insertion", "binary_matrix", "n_queens", "puzzle24"):
        entry = {"answer": "1", "metadata": {}}
        assert value(f"Answer: {attack}", {"dataset": name, "entry": entry}) == 0.0
        assert value("Answer: 9**9**9**9", {"dataset": name, "entry": entry}) == 0.0
    assert not marker.exists()


def test_one_letter_too_many_in_a_long_answer_is_no_full_match() -> None:
    oracle = "x" * 200
    entry = {"answer": oracle, "metadata": {}}
    assert value(f"Answer: {oracle}", {"dataset": "spell_backward", "entry": entry}) == 1.0
    assert value(f"Answer: {oracle}y", {"dataset": "spell_backward", "entry": entry}) == 0.0


def test_what_is_said_of_datasets_is_about_datasets_that_exist() -> None:
    known = reasoning_gym.factory.DATASETS.keys()
    assert REFUSED.keys() | CHANCE.keys() | NO_REFERENCE <= known
    for name in CHANCE:
        require_usable(name)
    with pytest.raises(RecipeError, match="any text"):
        require_usable("game_of_life_halting")


def test_the_refused_scorers_still_pay_for_nothing() -> None:
    """When this fails, a new release has mended them and the fence may go."""
    for name, answer in (("game_of_life_halting", "anything"), ("coin_flip", "0")):
        entries = reasoning_gym.create_dataset(name, size=5, seed=1)
        assert sum(entries.score_answer(answer, entry) == 1.0 for entry in entries) >= 3


def test_a_source_draws_from_all_its_data_sets_and_its_demonstrations_are_right() -> None:
    source = PuzzleTasks(datasets={"spell_backward": {}, "chain_sum": {"min_terms": 2, "max_terms": 3}})
    assert isinstance(source, TaskSource)
    heldout = source.heldout(count=6)
    assert heldout == source.heldout(count=6)
    train = [task for task, _ in zip(source.train(seed=1), range(20), strict=False)]
    assert {task.info["dataset"] for task in train} == {"spell_backward", "chain_sum"}
    assert not {task.id for task in train} & {task.id for task in heldout}
    for task in heldout:
        assert value(f"Answer: {task.answer}", dict(task.info)) == 1.0
    assert len(source.demonstrations(count=3, seed=1)) == 3


@pytest.mark.parametrize("name", ["coin_flip", "rush_hour", "no_such_dataset"])
def test_a_source_refuses_what_cannot_be_learned_from(name: str) -> None:
    with pytest.raises(RecipeError, match=name):
        PuzzleTasks(datasets={name: {}})
    with pytest.raises(RecipeError, match="at least one"):
        PuzzleTasks(datasets={})


LENIENT = (
    "advanced_geometry",
    "gsm_symbolic",
    "kakurasu",
    "knights_knaves",
    "letter_jumble",
    "quantum_lock",
    "sokoban",
    "spell_backward",
    "survo",
    "word_sorting",
)


@pytest.mark.parametrize("name", LENIENT)
def test_scorers_that_find_the_answer_in_any_text_are_fenced(name: str) -> None:
    """reasoning-gym's own scorer gives each of these full marks for at least one of the additions."""
    scorer = reasoning_gym.factory.get_score_answer_fn(name)
    lenient = 0
    for seed in (1, 2):
        entry = reasoning_gym.create_dataset(name, size=1, seed=seed)[0]
        oracle = str(entry["answer"])
        info = {"dataset": name, "entry": entry}
        assert value(f"\\boxed{{{oracle}}}", info) == 1.0, oracle
        for answer in (f"{oracle} maybe", f"maybe {oracle}", f"{oracle} = zzz", f"{oracle}, 7", f"{oracle}x"):
            lenient += scorer(answer, entry) >= 0.9999
            assert value(f"\\boxed{{{answer}}}", info) == 0.0, answer
    assert lenient
