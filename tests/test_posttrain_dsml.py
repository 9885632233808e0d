"""DSML: what is written is read back, whatever the chunks, and what is no DSML is a fault or a named repair."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.conversation.dsml import PARAMETER_END, Unwritable, calls_of, write_calls
from posttrain.conversation.dsml_parser import (
    ArgumentDelta,
    ArgumentStarted,
    CallFinished,
    CallStarted,
    ContentDelta,
    Event,
    Failed,
    MalformedTurn,
    ParsedTurn,
    ReasoningDelta,
    Repair,
    Repaired,
    TurnParser,
    parse_turn,
)
from posttrain.conversation.v4_tokens import BAR, BOS, DSML, END_THINK, EOS, FORBIDDEN, THINK
from posttrain.tally import TALLY
from posttrain.types import ToolCall

OPEN, CLOSE = f"\n\n<{DSML}tool_calls>\n", f"</{DSML}tool_calls>"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
# Pieces of the format, so that chance finds the places where it is delicate.
MARKUP = st.lists(
    st.sampled_from(
        [*FORBIDDEN, BAR, "<", ">", "</", "\n", "\n\n", '"', "|DSML|", "tool_calls", "invoke", "parameter", "x", " "]
    ),
    max_size=8,
).map("".join)
TEXT = ANY_TEXT | MARKUP
SAYABLE = TEXT.filter(lambda text: not any(token in text for token in FORBIDDEN))
STRING = TEXT.filter(lambda text: PARAMETER_END not in text)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
NAME = TEXT.filter(lambda text: not {'"', "\n"} & set(text) and DSML not in text)
CALL = st.builds(
    ToolCall, NAME, st.dictionaries(NAME, STRING | JSON.filter(lambda v: not isinstance(v, str)), max_size=4)
)
CUTS = st.lists(st.integers(0, 1 << 12), max_size=12)
SAID = st.tuples(st.none() | SAYABLE, SAYABLE, st.lists(CALL, max_size=3))


def written(said: tuple[str | None, str, Sequence[ToolCall]]) -> str:
    reasoning, content, calls = said
    thought = "" if reasoning is None else reasoning + END_THINK
    return thought + content + ("\n\n" + write_calls(calls) if calls else "") + EOS


def block(inside: str) -> str:
    return OPEN + inside + CLOSE


def invoke(inside: str = "", name: str = "f") -> str:
    return f'<{DSML}invoke name="{name}">\n{inside}</{DSML}invoke>\n'


def parameter(value: str, *, name: str = "a", string: str = "true") -> str:
    return f'<{DSML}parameter name="{name}" string="{string}">{value}</{DSML}parameter>\n'


ONE = block(invoke(parameter("x")))


def read(text: str, *, thinking: bool = False, strict: bool = False) -> ParsedTurn:
    return parse_turn(text, thinking=thinking, strict=strict)


def stream(chunks: Sequence[str], *, thinking: bool, strict: bool) -> tuple[list[Event], ParsedTurn]:
    """The events of a chunked text, deltas of one kind that follow one another in one piece."""
    parser = TurnParser(thinking=thinking, strict=strict)
    events: list[Event] = []
    for event in [each for chunk in chunks for each in parser.feed(chunk)] + parser.finish():
        last = events[-1] if events else None
        match last, event:
            case (ReasoningDelta(), ReasoningDelta()) | (ContentDelta(), ContentDelta()):
                events[-1] = type(last)(last.text + event.text)
            case ArgumentDelta(), ArgumentDelta():
                events[-1] = ArgumentDelta(last.call, last.text + event.text)
            case _:
                events.append(event)
    return [(type(e), str(e.error), e.error.rule) if isinstance(e, Failed) else e for e in events], parser.turn


def splits(text: str, cuts: Sequence[int]) -> list[str]:
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(places)]


@given(SAID)
@settings(max_examples=150)
def test_what_is_written_is_read_back(said):
    reasoning, content, calls = said
    turn = read(written(said), thinking=reasoning is not None, strict=True)
    assert turn == ParsedTurn(reasoning=reasoning, content=content, calls=calls)
    assert [(call.name, call.arguments) for call in calls_of(turn.message)] == [(c.name, c.arguments) for c in calls]
    assert json.loads(json.dumps(turn.message)) == turn.message


@given(SAID)
@settings(max_examples=150)
def test_the_tolerant_parser_reads_well_formed_turns_as_the_strict_one_does(said):
    reasoning, content, calls = said
    if "DSML" in content:
        content = content.replace("DSML", "")  # look-alikes in content are the one thing it reads otherwise
    turn = read(written((reasoning, content, calls)), thinking=reasoning is not None)
    assert turn == ParsedTurn(reasoning=reasoning, content=content, calls=calls)


@given(SAID, st.booleans(), CUTS)
@settings(max_examples=200)
def test_chunks_change_nothing(said, strict, cuts):
    text = written(said)
    whole = stream([text], thinking=said[0] is not None, strict=strict)
    assert stream(splits(text, cuts), thinking=said[0] is not None, strict=strict) == whole
    assert stream(list(text), thinking=said[0] is not None, strict=strict) == whole


PIECES = st.sampled_from([OPEN, CLOSE, ONE, invoke(), parameter("x"), parameter("[1,]", string="false"), EOS]) | TEXT


@st.composite
def damaged(draw) -> str:
    """A well-formed turn with some places cut out and other things put there."""
    text = written(draw(SAID))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        text = text[:start] + draw(PIECES) + text[start + draw(st.integers(0, 12)) :]
    return text


@given(damaged() | st.lists(PIECES, max_size=6).map("".join), st.booleans(), st.booleans(), CUTS)
@settings(max_examples=250)
def test_chunks_change_nothing_of_what_is_malformed_either(text, thinking, strict, cuts):
    whole = stream([text], thinking=thinking, strict=strict)
    assert stream(splits(text, cuts), thinking=thinking, strict=strict) == whole
    assert stream(list(text), thinking=thinking, strict=strict) == whole


@given(damaged() | st.lists(PIECES, max_size=6).map("".join), st.booleans())
@settings(max_examples=150)
def test_what_the_strict_parser_takes_the_tolerant_one_takes_unmended(text, thinking):
    try:
        turn = read(text, thinking=thinking, strict=True)
    except MalformedTurn:
        return
    if "DSML" not in turn.content:
        assert read(text, thinking=thinking) == turn


FAULTY = {
    "look-alike bars": ONE.replace(BAR, "|"),
    "misspelt wrapper": ONE.replace("tool_calls", "toolcalls"),
    "no wrapper": "\n\n" + invoke(parameter("x")),
    "one line break before the block": ONE[1:],
    "unclosed value": ONE.replace(f"</{DSML}parameter>", ""),
    "value of a look-alike": block(invoke(parameter("a </|DSML|parameter> b"))),
    "plain mention": "Write <|DSML|tool_calls> for that.",
    "nearly JSON": block(invoke(parameter("{'a': True,}", string="false"))),
    "cut off": ONE[:-30],
}


@pytest.mark.parametrize("case", FAULTY)
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("thinking", [True, False])
def test_every_split_in_two_of_a_turn_gives_the_same_events(case, strict, thinking):
    text = ("why" + END_THINK if thinking else "") + "So:" + FAULTY[case] + EOS
    whole = stream([text], thinking=thinking, strict=strict)
    for cut in range(len(text) + 1):
        assert stream([text[:cut], text[cut:]], thinking=thinking, strict=strict) == whole, cut


def test_a_stream_says_what_is_certain_and_no_more():
    parser = TurnParser(thinking=True)
    assert parser.feed("I think</thi") == [ReasoningDelta("I think")]
    assert parser.feed(f"nk>Look:\n\n<{BAR}DS") == [ContentDelta("Look:")]
    assert parser.feed(f'ML{BAR}tool_calls>\n<{DSML}invoke name="cat">\n') == [CallStarted(0, "cat")]
    assert parser.feed(f'<{DSML}parameter name="path" string="true">a/</') == [
        ArgumentStarted(0, "path", True),
        ArgumentDelta(0, "a/"),
    ]
    assert parser.feed("b") == [ArgumentDelta(0, "</b")]
    done = parser.feed(f"</{DSML}parameter>\n</{DSML}invoke>\n{CLOSE}{EOS}")
    assert done == [CallFinished(0, ToolCall("cat", {"path": "a/</b"}))]
    assert parser.finish() == []


def understood(text: str) -> bool:
    """Whether the strict parser sees calls."""
    try:
        return bool(read(text, strict=True).calls)
    except MalformedTurn:
        return False


REPAIRED = {
    Repair.BARS: [ONE.replace(BAR, "|"), ONE.replace(BAR, "\u2502"), ONE.replace(BAR, BAR + BAR)],
    Repair.WRAPPER: [ONE.replace("tool_calls", name) for name in ("toolcalls", "function_calls", "tool_call")],
    Repair.NO_WRAPPER: ["\n\n" + invoke(parameter("x")) + CLOSE],
    Repair.WHITESPACE: [ONE[1:], ONE[2:], ONE.replace(">\n<", "><"), ONE.replace("invoke>", "invoke >"), ONE + "\n"],
    Repair.ATTRIBUTES: [ONE.replace('name="a" string="true"', 'string="true" name="a"'), ONE.replace('"a"', "'a'")],
    Repair.UNCLOSED: [
        ONE.replace(f"</{DSML}parameter>", ""),
        ONE.replace(f"</{DSML}invoke>\n", ""),
        ONE.replace(CLOSE, ""),
    ],
    Repair.TEXT_AFTER: [ONE + "\n\nI am waiting."],
}


@pytest.mark.parametrize(("repair", "text"), [(repair, text) for repair, texts in REPAIRED.items() for text in texts])
def test_what_can_be_meant_in_one_way_only_is_mended_and_named(repair, text):
    assert not understood("So:" + text + EOS)
    turn = read("So:" + text + EOS)
    assert (turn.content, turn.calls, turn.repairs) == ("So:", [ToolCall("f", {"a": "x"})], [repair])


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("{'a': True, 'b': None,}", {"a": True, "b": None}),
        ('["line\nbreak"]', ["line\nbreak"]),
        ("[1, 2,]", [1, 2]),
        ("True", True),
        ("[-1.5e3,]", [-1500.0]),
    ],
)
def test_a_value_that_is_nearly_json_is_mended(value, meant):
    text = block(invoke(parameter(value, string="false"))) + EOS
    turn = read(text)
    assert (turn.calls[0].arguments, turn.repairs) == ({"a": meant}, [Repair.JSON])
    with pytest.raises(MalformedTurn, match="JSON"):
        read(text, strict=True)


@pytest.mark.parametrize(
    "value",
    ["", "Paris", "{", '["a" "b"]', "{'a', 'b'}", "(1, 2)", "b'x'", "f'{x}'", "1_000", "0x10", "[1] # one", "NaN",
     "{1: 2}", "__import__('os')", "[" * 5000],
)  # fmt: skip
def test_a_value_that_may_be_meant_otherwise_is_a_fault(value):
    for strict in (True, False):
        with pytest.raises(MalformedTurn) as caught:
            read(block(invoke(parameter(value, string="false"))) + EOS, strict=strict)
        assert (caught.value.rule, caught.value.in_call) == ("json", True)


BROKEN = {
    "a parameter that is named twice": block(invoke(parameter("x") + parameter("y"))),
    "a call that is cut off within a value": OPEN
    + f'<{DSML}invoke name="f">\n<{DSML}parameter name="a" string="true">x',
    "a parameter without its kind": block(invoke(f'<{DSML}parameter name="a">x</{DSML}parameter>\n')),
    "a kind that is none": block(invoke(parameter("x", string="maybe"))),
    "a second block": ONE + ONE,
    "a block without a call": block(""),
    "a call without a name": block(f"<{DSML}invoke>\n</{DSML}invoke>\n"),
    "the token in content": f"I write {DSML} now.",
    "text between calls": block(invoke() + "and" + invoke()),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_mended_is_the_models_mistake(case):
    for strict in (True, False):
        with pytest.raises(MalformedTurn) as caught:
            read(BROKEN[case] + EOS, strict=strict)
        assert caught.value.in_call


@given(STRING)
@settings(max_examples=100)
def test_repairs_never_touch_a_value(value):
    for text in (ONE.replace("tool_calls", "toolcalls"), "\n\n" + invoke(parameter("x")) + CLOSE):
        turn = read(text.replace(">x<", f">{value}<") + EOS)
        assert turn.repairs
        assert turn.calls == [ToolCall("f", {"a": value})]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (ToolCall("f", {"a": f"see </{DSML}parameter>"}), "value_end"),
        (ToolCall('f"', {}), "name"),
        (ToolCall("f", {"a\n": 1}), "name"),
        (ToolCall("f", {"a": float("nan")}), "json"),
        (ToolCall("f", {"a": {1, 2}}), "json"),
        (ToolCall("f", {"a": "\ud800"}), "surrogate"),
    ],
)
def test_what_has_no_form_is_refused_and_counted(call, reason):
    before = TALLY.sums().get(f"unwritable/{reason}", 0)
    with pytest.raises(Unwritable, match=r"; (change|rename|remove)"):
        write_calls([call])
    assert TALLY.sums()[f"unwritable/{reason}"] == before + 1


def test_a_value_in_json_may_hold_the_end_of_a_value():
    call = ToolCall("f", {"a": [f"see </{DSML}parameter>"]})
    assert read("\n\n" + write_calls([call]) + EOS, strict=True).calls == [call]


def test_faults_that_are_in_no_call_say_so():
    for text, thinking in ((f"a{THINK}b", False), ("never closed", True), (f"a{BOS}", True)):
        with pytest.raises(MalformedTurn) as caught:
            read(text + EOS, thinking=thinking)
        assert not caught.value.in_call


def test_the_repairs_of_a_stream_come_as_events():
    events, turn = stream([ONE.replace("tool_calls", "toolcalls") + EOS], thinking=False, strict=False)
    assert events[0] == Repaired(Repair.WRAPPER)
    assert turn.repairs == [Repair.WRAPPER]
