"""What ``benchmarks.tool_call_formats`` counts: each kind of error in either form, and errors per 1,000 calls."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.tool_call_formats import (
    ERRORS,
    FAMILIES,
    FORMS,
    FULL,
    QUICK,
    TEMPERATURES,
    Kind,
    PassOn,
    Played,
    Reply,
    classify,
    end_tag,
    fault,
    metrics_of,
    num_escapes,
    options_of,
    plan_of,
)
from posttrain.conversation.dsml import Unwritable, write_calls
from posttrain.conversation.tool_calls import format_tool_call
from posttrain.types import Task, ToolCall

TEXT = 'echo "$a"\n\\b <i>'
WANTED = ToolCall("insert", {"line": 3, "text": TEXT})


def dsml(call: ToolCall) -> str:
    return f"\n\n{write_calls([call])}"


def insert(line: object, text: str) -> ToolCall:
    return ToolCall("insert", {"line": line, "text": text})


RIGHT = {"dsml": dsml(WANTED), "json": format_tool_call(WANTED)}
WRITE = {"dsml": dsml, "json": format_tool_call}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (WANTED, Kind.RIGHT),
        (insert(3, TEXT.replace("\n", "\\n")), Kind.QUOTING),
        (insert(3, TEXT.replace('"', '\\"')), Kind.QUOTING),
        (insert(3, TEXT.replace("\\", "")), Kind.QUOTING),
        (insert(3, TEXT.replace("<", "&lt;")), Kind.QUOTING),
        (insert("3", TEXT), Kind.QUOTING),
        (insert(4, TEXT), Kind.CONTENT),
        (insert(3, TEXT.replace("$a", "$b")), Kind.CONTENT),
        (insert(3, TEXT.replace("\n", " ")), Kind.PUNCTUATION),
        (insert(3, TEXT.replace('"', "")), Kind.PUNCTUATION),
        (insert(3, TEXT.replace("<i>", "<i>>")), Kind.PUNCTUATION),
        (ToolCall("insert", {"text": TEXT}), Kind.CONTENT),
        (ToolCall("bash", WANTED.arguments), Kind.CONTENT),
        (ToolCall("insert", [TEXT]), Kind.CONTENT),
    ],
)
def test_a_call_that_can_be_read_is_right_or_differs_in_quoting_or_content(form, call, kind):
    assert classify(FORMS[form], WRITE[form](call), WANTED, ended=True) is kind


@pytest.mark.parametrize(
    ("form", "text", "kind"),
    [
        ("dsml", RIGHT["dsml"].replace('string="true"', "string='true'"), Kind.REPAIRED),
        ("dsml", RIGHT["dsml"] + "\nDone.", Kind.REPAIRED),
        ("dsml", RIGHT["dsml"].replace(' string="true"', ""), Kind.UNREADABLE),
        ("dsml", RIGHT["dsml"].replace(TEXT, f"{TEXT}</｜DSML｜parameter>"), Kind.UNREADABLE),  # noqa: RUF001
        ("dsml", RIGHT["dsml"][:-60], Kind.UNREADABLE),
        ("dsml", "I insert it.", Kind.UNREADABLE),
        ("json", RIGHT["json"].replace("\\n", "\n"), Kind.REPAIRED),
        ("json", RIGHT["json"] + "\nDone.", Kind.REPAIRED),
        ("json", RIGHT["json"].replace('\\"', '"'), Kind.UNREADABLE),
        ("json", RIGHT["json"].replace("\\\\b", "\\d"), Kind.UNREADABLE),
        ("json", RIGHT["json"].replace("\\\\b", "\\b"), Kind.QUOTING),
        ("json", RIGHT["json"][:-4], Kind.UNREADABLE),
        ("json", "I insert it.", Kind.UNREADABLE),
    ],
)
def test_what_the_strict_parser_refuses_is_repaired_or_unreadable(form, text, kind):
    assert text != RIGHT[form]
    assert classify(FORMS[form], text, WANTED, ended=True) is kind


@pytest.mark.parametrize(
    ("form", "text", "ended", "why"),
    [
        ("dsml", RIGHT["dsml"], True, ""),
        ("dsml", RIGHT["dsml"], False, "cut off"),
        ("dsml", RIGHT["dsml"].replace(TEXT, f"{TEXT}</｜DSML｜parameter>"), True, "value"),  # noqa: RUF001
        ("dsml", "I insert it.", True, "no call"),
        ("json", RIGHT["json"], True, ""),
        ("json", RIGHT["json"], False, "cut off"),
        ("json", RIGHT["json"].replace('\\"', '"'), True, "Expecting ',' delimiter"),
        ("json", RIGHT["json"].replace("\\\\b", "\\d"), True, "Invalid \\escape"),
        ("json", RIGHT["json"].replace("\\n", "\n"), True, "Invalid control character at"),
    ],
)
def test_why_a_call_is_not_exactly_in_its_form(form, text, ended, why):
    assert fault(FORMS[form], text, ended=ended) == why


def test_every_prompt_but_the_impossible_can_be_answered_in_both_forms():
    rng = random.Random(0)
    for family in FAMILIES:
        for _ in range(50):
            call = PassOn((family,)).draw(rng).task.info["call"]
            for name, form in FORMS.items():
                assert classify(form, WRITE[name](call), call, ended=True) is Kind.RIGHT
    impossible = PassOn((end_tag,)).draw(rng).task.info["call"]
    assert classify(FORMS["json"], format_tool_call(impossible), impossible, ended=True) is Kind.RIGHT
    with pytest.raises(Unwritable):
        write_calls([impossible])


def test_errors_are_counted_per_1000_calls_and_the_impossible_apart():
    tasks = [*PassOn(FAMILIES[:1]).heldout(count=2), *PassOn((end_tag,)).heldout(count=1)]
    by_seed = [(Kind.RIGHT, Kind.QUOTING, Kind.UNREADABLE), (Kind.CONTENT, Kind.QUOTING, Kind.UNREADABLE)]
    played = Played(tasks, [[Reply("", kind) for kind in kinds] for kinds in by_seed])
    assert played.per_1000(ERRORS).tolist() == [[0, 1000], [1000, 1000]]
    assert played.per_1000([Kind.QUOTING]).mean() == 500
    assert played.per_1000(ERRORS, end_tag.__name__).tolist() == [[1000, 1000]]
    assert [example["prompt"] for example in played.examples(Kind.QUOTING)] == [tasks[1].prompt[0]["content"]]


def test_the_difference_is_dsml_less_json_on_the_same_prompts():
    tasks = PassOn(FAMILIES[:1]).heldout(count=4) + PassOn((end_tag,)).heldout(count=1)
    kinds = {
        "dsml": [Kind.RIGHT, Kind.RIGHT, Kind.RIGHT, Kind.CONTENT, Kind.UNREADABLE],
        "json": [Kind.RIGHT, Kind.QUOTING, Kind.UNREADABLE, Kind.CONTENT, Kind.RIGHT],
    }
    played = {
        name: {label: Played(tasks, [[Reply("", kind) for kind in found]]) for label in TEMPERATURES}
        for name, found in kinds.items()
    }
    values = {metric.name: metric.value for metric in metrics_of(played, {})}
    assert values["dsml/greedy/errors"] == 250
    assert values["json/greedy/errors"] == 750
    assert values["json/greedy/form_errors"] == 500
    assert values["dsml/greedy/form_errors"] == 0
    assert values["dsml_less_json/greedy/errors"] == -500
    assert values["dsml_less_json/greedy/form_errors"] == -500
    assert values["dsml/greedy/end_tag_errors"] == 1000


def test_errors_are_told_apart_by_how_much_json_has_to_escape():
    tasks = PassOn(FAMILIES).heldout(count=6)
    by_escapes = sorted(tasks, key=num_escapes)
    assert num_escapes(by_escapes[0]) < num_escapes(by_escapes[-1])
    played = Played(by_escapes, [[Reply("", kind) for kind in 4 * [Kind.RIGHT] + 2 * [Kind.CONTENT]]])
    assert [third["errors"] for third in played.by_escapes()] == [0, 0, 1000]


def test_what_json_has_to_escape():
    call = ToolCall("bash", {"command": 'a "b"\n\\', "line": 3})
    assert num_escapes(Task(id="a", domain="tools", prompt=(), info={"call": call})) == 4


def test_options_change_the_form_that_is_chosen_and_nothing_else():
    assert plan_of(options_of([])) == FULL
    assert plan_of(options_of(["--quick"])) == QUICK
    assert plan_of(options_of(["--quick", "--model", "a", "--steps", "3"])) == replace(QUICK, model="a", steps=3)
