"""TRL's reward functions run unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from trl.rewards import think_format_reward

from posttrain.errors import RecipeError
from posttrain.protocols import GroupReward
from posttrain.types import Completion, FinishReason, Rollout, Score, StopReason, Task, Turn
from rewards.adapters import from_trl

TASK = Task(
    id="t",
    domain="d",
    prompt=({"role": "user", "content": "2 + 2?"},),
    answer="4",
    info={"level": 3, "prompt": "not a column"},
)


def rollout(text: str, num_tokens: int = 2) -> Rollout:
    completion = Completion(
        request_id="r",
        token_ids=np.arange(num_tokens, dtype=np.int32) + 10,
        logprobs=np.zeros(num_tokens, np.float32),
        versions=np.full(num_tokens, 5, np.int32),
        finish=FinishReason.STOP,
    )
    turn = Turn(context_ids=np.zeros(3, np.int32), completion=completion, text=text)
    return Rollout(id=text, task=TASK, turns=(turn,), stop=StopReason.FINISHED)


def scores(reward: Any, *texts: str) -> Sequence[Score]:
    return asyncio.run(reward.score_group([rollout(text) for text in texts]))


def exact(completions: list[list[dict[str, str]]], answer: list[str], **kwargs: Any) -> list[float | None]:
    texts = [completion[0]["content"] for completion in completions]
    return [None if text == "pass" else float(text == right) for text, right in zip(texts, answer, strict=True)]


async def length(completion_ids: list[list[int]], log_metric: Callable[..., None], **kwargs: Any) -> list[float]:
    log_metric("mean_length", 2.0)
    return [len(ids) / 10 for ids in completion_ids]


def never(completions: list[Any], **kwargs: Any) -> list[float | None]:
    return [None if i else float("nan") for i in range(len(completions))]


def broken(**kwargs: Any) -> list[float]:
    raise KeyError("solution")


def too_few(**kwargs: Any) -> list[float]:
    return [1.0]


def infinite(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float("inf")] * len(completions)


def test_trl_own_function_runs_as_is() -> None:
    good, bad = scores(from_trl(think_format_reward), "<think>\nadd\n</think>\n4", "4")
    assert (good.value, bad.value) == (1.0, 0.0)
    assert good.parts == {"think_format_reward": 1.0}


def test_sync_and_async_functions_are_weighted_and_none_does_not_apply() -> None:
    reward = from_trl(exact, length, weights=[2.0, 1.0])
    assert isinstance(reward, GroupReward)
    right, wrong, skipped = scores(reward, "4", "5", "pass")
    assert [right.value, wrong.value, skipped.value] == pytest.approx([2.2, 0.2, 0.2])
    assert right.parts == {"exact": 1.0, "length": 0.2, "metric/mean_length": 2.0}
    assert skipped.parts["exact"] is None


def test_rollout_no_function_applies_to_is_unscored() -> None:
    for score in scores(from_trl(never), "4", "5"):
        assert score.value is None
        assert score.error is not None
        assert "never" in score.error


def test_arguments_are_those_of_trl() -> None:
    seen: dict[str, Any] = {}

    def spy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        kwargs["log_extra"]("note", ["first", "second"])
        return [0.0, 1.0]

    first, second = scores(from_trl(spy), "4", "5")
    assert seen["prompts"] == [[{"role": "user", "content": "2 + 2?"}]] * 2
    assert seen["completions"][1] == [{"role": "assistant", "content": "5"}]
    assert seen["completion_ids"] == [[10, 11], [10, 11]]
    assert (seen["answer"], seen["level"]) == (["4", "4"], [3, 3])
    assert seen["trainer_state"].global_step == 5
    assert "prompt" not in seen
    assert "environments" not in seen
    assert (first.explanation, second.explanation) == ("note = first", "note = second")


def test_a_function_may_be_named() -> None:
    assert scores(from_trl("trl.rewards:think_format_reward"), "<think>\nadd\n</think>\n4")[0].value == 1.0


def test_plain_text_form() -> None:
    def ends_in_4(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        assert prompts == ["2 + 2?"]
        return [float(completion.endswith("4")) for completion in completions]

    assert scores(from_trl(ends_in_4, conversational=False), "= 4")[0].value == 1.0


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (broken, RuntimeError, "broken raised KeyError"),
        (too_few, ValueError, "too_few returned 1 rewards for 2"),
        (infinite, ValueError, "infinite returned inf"),
    ],
)
def test_failures_name_the_function(function: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scores(from_trl(exact, function), "4", "5")


def test_weights_must_fit() -> None:
    with pytest.raises(RecipeError, match="2 functions and 1 weights"):
        from_trl(exact, length, weights=[1.0])
    with pytest.raises(RecipeError, match="0 functions"):
        from_trl()
