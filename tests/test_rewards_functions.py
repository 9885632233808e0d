"""Reward functions written for verl and verifiers, and plain ones, run unchanged."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import RecipeError
from posttrain.protocols import GroupReward, Reward
from posttrain.types import Rollout, Score, ScoreStatus, Task
from rewards.controls import Case
from rewards.functions import from_function, from_verifiers, from_verl, load_object

INFO = {"level": 3, "data_source": "openai/gsm8k", "extra_info": {"split": "train"}}


def rollout(text: str, answer: str | None = "4", info: Mapping[str, Any] = INFO) -> Rollout:
    task = Task(id="t", domain="math", prompt=({"role": "user", "content": "2 + 2?"},), answer=answer, info=info)
    return Case(task=task, reference="").rollout(text)


def score(reward: Any, text: str, **task: Any) -> Score:
    return asyncio.run(reward.score(rollout(text, **task)))


def scores(reward: Any, *texts: str) -> Sequence[Score]:
    return asyncio.run(reward.score_group([rollout(text) for text in texts]))


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> Any:
    assert (data_source, extra_info) == ("openai/gsm8k", {"split": "train"})
    right = solution_str == ground_truth
    return {"score": float(right), "acc": right, "pred": solution_str}


def test_verls_compute_score_runs_and_logs_its_parts() -> None:
    reward = from_verl(compute_score)
    assert isinstance(reward, Reward)
    assert score(reward, "4") == Score(value=1.0, parts={"acc": 1.0})
    assert score(reward, "5").value == 0.0


def test_verls_rows_may_keep_the_truth_in_their_reward_model() -> None:
    def truth(solution_str: str, ground_truth: str) -> bool:
        return solution_str == ground_truth

    assert score(from_verl(truth), "7", answer=None, info={"reward_model": {"ground_truth": "7"}}).value == 1.0


async def close(text: str, answer: str, info: Mapping[str, Any]) -> dict[str, float | None]:
    return {"score": 1 / (1 + abs(int(text) - int(answer))), "level": info["level"], "unknown": None}


def test_a_plain_function_says_by_name_what_it_wants() -> None:
    assert score(from_function(close), "5") == Score(value=0.5, parts={"level": 3.0, "unknown": None})

    def everything(**given: Any) -> float:
        return float(given["rollout"].text == given["text"] and given["task"].answer == given["answer"])

    assert score(from_function(everything), "x").value == 1.0


def test_none_and_nan_are_no_zero() -> None:
    for nothing in (None, float("nan")):
        found = score(from_function(lambda text, nothing=nothing: nothing), "x")
        assert (found.value, found.status) == (None, ScoreStatus.REWARD_ERROR)
        assert found.error is not None


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda txt: 1.0, RecipeError, "wants an argument 'txt'"),
        (lambda text: "1.0", ValueError, "expected a number"),
        (lambda text: float("inf"), ValueError, "finite"),
        (lambda text: {"acc": 1.0}, ValueError, "expected 'score'"),
        (lambda reward_router_address, solution_str: 1.0, RecipeError, "reward_router_address"),
        ("no_colon", RecipeError, "module:name"),
        ("rewards.functions:nothing", RecipeError, "has no 'nothing'"),
        ("rewards.nowhere:f", RecipeError, "cannot be loaded"),
        ("/nowhere.py:f", RecipeError, "no Python file"),
    ],
)
def test_mistakes_are_named(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score(from_function(function), "x")


def test_a_function_in_a_file_is_found_by_name_and_pickles(tmp_path: Path) -> None:
    path = tmp_path / "my_reward.py"
    path.write_text("def short(text):\n    return len(text) < 3\n")
    reward = pickle.loads(pickle.dumps(from_function(f"{path}:short")))
    assert (score(reward, "ab").value, score(reward, "abc").value) == (1.0, 0.0)
    assert load_object("rewards.functions:load_object") is load_object


def exact(completion: Any, answer: str) -> float:
    return float(completion[-1]["content"] == answer)


async def longest(completions: list[Any], infos: list[dict[str, Any]]) -> list[float]:
    lengths = [len(completion[-1]["content"]) for completion in completions]
    assert infos[0]["level"] == 3
    return [float(length == max(lengths)) for length in lengths]


def num_words(state: dict[str, Any]) -> int:
    return len(state["completion"][-1]["content"].split())


def test_verifiers_functions_of_one_rollout_and_of_the_group_are_summed() -> None:
    reward = from_verifiers(exact, longest, num_words, weights=[1.0, 0.5, 0.0])
    assert isinstance(reward, GroupReward)
    right, long = scores(reward, "4", "not four")
    assert right == Score(value=1.0, parts={"exact": 1.0, "longest": 0.0, "num_words": 1.0})
    assert long == Score(value=0.5, parts={"exact": 0.0, "longest": 1.0, "num_words": 2.0})


class V1Task:
    """As a task of ``verifiers.v1`` looks: marked methods that take a trace."""

    async def solved(self, task: Any, trace: Any) -> float:
        assert task.answer == trace.task.data.answer == "4"
        assert trace.assistant_messages[-1]["content"].strip() == trace.last_reply
        return float(trace.last_reply == task.answer)

    async def style(self, trace: Any) -> dict[str, float]:
        return {"short": float(len(trace.last_reply) < 3), "polite": 0.0}

    async def turns(self, trace: Any) -> float:
        return float(trace.num_turns)

    solved._vf_weight = 2.0  # type: ignore[attr-defined]
    style._vf_weight = 0.5  # type: ignore[attr-defined]
    turns.metric = True  # type: ignore[attr-defined]


def test_verifiers_v1_marks_are_read_and_keyed_scores_are_parts() -> None:
    task = V1Task()
    right, wrong = scores(from_verifiers(task.solved, task.style, task.turns), " 4 ", "five")
    assert right == Score(value=2.5, parts={"solved": 1.0, "short": 1.0, "polite": 0.0, "turns": 1.0})
    assert wrong.value == 0.0


def test_a_counting_function_without_a_number_leaves_the_rollout_unscored() -> None:
    def sometimes(completion: Any) -> float | None:
        return None if completion[-1]["content"] == "?" else 1.0

    known, unknown = scores(from_verifiers(exact, sometimes), "4", "?")
    assert known.value == 2.0
    assert (unknown.value, unknown.status, unknown.parts["sometimes"]) == (None, ScoreStatus.REWARD_ERROR, None)
    metric, _ = scores(from_verifiers(exact, sometimes, weights=[1.0, 0.0]), "?", "4")
    assert metric.value == 0.0


def test_verifiers_failures_name_the_function() -> None:
    def broken(completions: Any) -> list[float]:
        raise KeyError("x")

    def too_few(completions: Any) -> list[float]:
        return [1.0]

    with pytest.raises(RuntimeError, match="broken raised KeyError"):
        scores(from_verifiers(broken), "4", "5")
    with pytest.raises(ValueError, match="too_few returned 1 rewards for 2"):
        scores(from_verifiers(too_few), "4", "5")
    with pytest.raises(RecipeError, match="1 functions and 2 weights"):
        from_verifiers(exact, weights=[1.0, 1.0])
