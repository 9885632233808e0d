"""Tool calls: read, checked against schemas, compared with what is expected."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from posttrain.conversation.tool_calls import format_tool_call
from posttrain.errors import RecipeError
from posttrain.types import Score, Task, Tool, ToolCall
from rewards.controls import Case
from rewards.tool_calls import ToolCallReward, read_tagged, same_calls, schema_fault

WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1}},
        "required": ["city"],
    },
}
EXPECTED = [{"name": "weather", "arguments": {"city": ["Oslo", "oslo"], "days": ["", 1]}}]


def tagged(*calls: tuple[str, Any]) -> str:
    bodies = [json.dumps({"name": name, "arguments": arguments}) for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def grade(text: str, *, form: Any = "tags", **info: Any) -> Score:
    task = Task(id="t", domain="tools", prompt=(), info={"tools": [WEATHER], **info})
    return asyncio.run(ToolCallReward(form=form).score(Case(task=task, reference="").rollout(text)))


def test_a_call_that_fits_is_paid_in_both_forms() -> None:
    fenced = f"Let me look.\n{format_tool_call(ToolCall('weather', {'city': 'Oslo'}))}"
    assert grade(fenced, form="fence").parts == {"readable": 1.0, "schema": 1.0}
    assert grade(fenced, form="fence", expected_calls=EXPECTED).value == 1.0
    assert grade(tagged(("weather", {"city": "Oslo"})), expected_calls=EXPECTED).value == 1.0
    assert grade(tagged(("weather", {"city": "oslo", "days": 1})), expected_calls=EXPECTED).value == 1.0


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        ("", "readable"),
        ("The weather is fine.", "readable"),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}', "readable"),
        ('<tool_call>{"name": "weather"}</tool_call>', "readable"),
        ("<tool_call>{'name': 'weather'}</tool_call>", "readable"),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', "readable"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "readable"),
        (f"<think>{tagged(('weather', {'city': 'Oslo'}))}</think>", "readable"),
        (tagged(("rain", {"city": "Oslo"})), "schema"),
        (tagged(("weather", {})), "schema"),
        (tagged(("weather", "Oslo")), "schema"),
        (tagged(("weather", {"city": 3})), "schema"),
        (tagged(("weather", {"city": "Oslo", "days": 0})), "schema"),
        (tagged(("weather", {"city": "Oslo", "days": True})), "schema"),
        (tagged(("weather", {"city": "Oslo", "why": "x"})), "schema"),
        (tagged(("weather", {"city": "Oslo"}), ("rain", {})), "schema"),
        (tagged(("weather", {"city": "Rome"})), "expected"),
        (tagged(("weather", {"city": "Oslo", "days": 2})), "expected"),
        (tagged(("weather", {"city": "Oslo"}), ("weather", {"city": "Oslo"})), "expected"),
    ],
)
def test_the_first_stage_that_fails_is_named(text: str, failed: str) -> None:
    score = grade(text, expected_calls=EXPECTED)
    assert score.value == 0.0
    assert score.parts[failed] == 0.0
    assert score.explanation


def test_two_fenced_calls_are_one_too_many() -> None:
    call = format_tool_call(ToolCall("weather", {"city": "Oslo"}))
    assert grade(f"{call}\n{call}", form="fence").value == 0.0
    assert grade(call.removesuffix("```"), form="fence").value == 0.0


def test_no_call_may_be_what_is_expected() -> None:
    assert grade("It cannot be known.", expected_calls=[]).value == 1.0
    assert grade("", expected_calls=[]).value == 0.0
    assert grade(tagged(("weather", {"city": "Oslo"})), expected_calls=[]).value == 0.0


def test_calls_match_in_any_order_and_each_only_once() -> None:
    rome, oslo = ToolCall("f", {"city": "Rome"}), ToolCall("f", {"city": "Oslo"})
    either = {"name": "f", "arguments": {"city": ["Rome", "Oslo"]}}
    only = {"name": "f", "arguments": {"city": ["Oslo"]}}
    assert same_calls([oslo, rome], [only, either])
    assert not same_calls([rome, rome], [only, either])
    assert not same_calls([oslo], [only, either])
    assert not same_calls([ToolCall("f", {"n": True})], [{"name": "f", "arguments": {"n": [1]}}])


def test_a_schema_may_allow_other_arguments() -> None:
    tool = Tool(name="f", description="", parameters={"type": "object", "additionalProperties": {"type": "integer"}})
    assert schema_fault(ToolCall("f", {"any": 3}), {"f": tool}) is None
    assert schema_fault(ToolCall("f", {"any": "x"}), {"f": tool}) is not None


def test_words_in_the_text_may_be_anything() -> None:
    assert read_tagged("no call \ud800") == []
    assert grade('<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>').explanation.encode()


@pytest.mark.parametrize(
    "info",
    [
        {"tools": []},
        {"tools": None},
        {"tools": [{"name": "weather"}]},
        {"tools": [{**WEATHER, "parameters": {"type": "nonsense"}}]},
        {"expected_calls": {"name": "weather"}},
        {"expected_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}]},
    ],
)
def test_unusable_tasks_are_a_recipe_error(info: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="info"):
        grade(tagged(("weather", {"city": "Oslo"})), **info)


def test_a_call_that_fits_two_of_the_expected_leaves_the_other_call_its_place() -> None:
    expected = [{"name": "f", "arguments": {"x": [1, 2]}}, {"name": "f", "arguments": {"x": [1]}}]
    one, two, three = (ToolCall("f", {"x": x}) for x in (1, 2, 3))
    assert same_calls([one, two], expected)
    assert same_calls([two, one], expected)
    assert same_calls([one, one], expected)
    assert not same_calls([two, two], expected)
    assert not same_calls([one, three], expected)
    assert not same_calls([one], expected)
