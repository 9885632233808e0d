"""The V4 wire format, rule by rule of its description, over a byte-level tokenizer prepared for it."""

from __future__ import annotations

import itertools
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.conversation import v4
from posttrain.conversation.dsml import Unwritable, tool_row
from posttrain.conversation.dsml_parser import MalformedTurn
from posttrain.conversation.effort import HIGH, MAX, NON_THINK, prefix
from posttrain.conversation.v4 import V4Format
from posttrain.conversation.v4_tokens import (
    ALL,
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    FORBIDDEN,
    REMINDER,
    TASKS,
    THINK,
    USER,
)
from posttrain.conversation.vocabulary import prepare_tokenizer
from posttrain.errors import RecipeError
from posttrain.tally import TALLY
from posttrain.types import Message, Tool
from tests.tiny_models import tiny_tokenizer


@cache
def chat(effort: str = HIGH) -> V4Format:
    tokenizer = tiny_tokenizer()
    prepare_tokenizer(tokenizer)
    return V4Format(tokenizer, effort=effort)


def system(text: str, **extras: object) -> Message:
    return {"role": "system", "content": text, **extras}


def user(text: str, **extras: object) -> Message:
    return {"role": "user", "content": text, **extras}


def developer(text: str, **extras: object) -> Message:
    return {"role": "developer", "content": text, **extras}


def said(text: str, reasoning: str | None = None, *calls: dict, **extras: object) -> Message:
    message: Message = {"role": "assistant", "content": text, **extras}
    if reasoning is not None:
        message["reasoning"] = reasoning
    return {**message, "tool_calls": list(calls)} if calls else message


def call(name: str, arguments: object, id: str | None = None) -> dict:
    row = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return row if id is None else {"id": id, **row}


def result(text: str, id: str | None = None) -> Message:
    message: Message = {"role": "tool", "content": text}
    return message if id is None else {**message, "tool_call_id": id}


TOOLS = [tool_row(Tool(name="look", description="Looks.", parameters={"type": "object"}))]


def block(*invokes: str) -> str:
    return f"\n\n<{DSML}tool_calls>\n" + "\n".join(invokes) + f"\n</{DSML}tool_calls>"


def invoke(name: str, *parameters: str) -> str:
    return f'<{DSML}invoke name="{name}">\n' + "\n".join(parameters) + f"\n</{DSML}invoke>"


def parameter(name: str, string: str, value: str) -> str:
    return f'<{DSML}parameter name="{name}" string="{string}">{value}</{DSML}parameter>'


def declared(text: str, *, tools: list = TOOLS) -> str:
    """What the format makes of a system text with tools, which a test of its own looks at."""
    rendered = chat().render([system(text, tools=tools), user("?")])
    return rendered[len(BOS) : rendered.index(USER)]


TWO = (call("look", {"at": "x"}, "1"), call("look", {"at": "y"}, "2"))
LOOK = [invoke("look", parameter("at", "true", at)) for at in "xy"]

ROWS = {
    "wire: thinking": (
        HIGH,
        [system("s"), user("u"), said("c", "r")],
        f"{BOS}s{USER}u{ASSISTANT}{THINK}r{END_THINK}c{EOS}",
    ),
    "wire: chat mode": (NON_THINK, [user("u"), said("c", "r")], f"{BOS}{USER}u{ASSISTANT}{END_THINK}c{EOS}"),
    "mode: non-think": (NON_THINK, [user("u")], f"{BOS}{USER}u{ASSISTANT}{END_THINK}"),
    "mode: think high": (HIGH, [user("u")], f"{BOS}{USER}u{ASSISTANT}{THINK}"),
    "mode: think max": (MAX, [system("s"), user("u")], f"{BOS}{prefix(MAX)}s{USER}u{ASSISTANT}{THINK}"),
    "mode: scalar effort": ("30", [user("u")], f"{BOS}{prefix('30')}{USER}u{ASSISTANT}{THINK}"),
    "role: developer": (NON_THINK, [developer("d"), said("c")], f"{BOS}{USER}d{ASSISTANT}{END_THINK}c{EOS}"),
    "role: latest_reminder": (
        HIGH,
        [system("s"), {"role": "latest_reminder", "content": "now"}, user("u")],
        f"{BOS}s{REMINDER}now{USER}u{ASSISTANT}{THINK}",
    ),
    "extras: wo_eos": (HIGH, [user("u"), said("c", "r", wo_eos=True)], f"{BOS}{USER}u{ASSISTANT}{THINK}r{END_THINK}c"),
    "turn order": (
        HIGH,
        [user("u"), said("c", "r", TWO[0])],
        f"{BOS}{USER}u{ASSISTANT}{THINK}r{END_THINK}c{block(LOOK[0])}{EOS}",
    ),
    "escaping": (
        NON_THINK,
        [user("u"), said("", None, call("f", {"s": 'a"b\n<é>', "n": 1, "l": ["é", None], "b": True, "e": ""}))],
        f"{BOS}{USER}u{ASSISTANT}{END_THINK}"
        + block(
            invoke(
                "f",
                parameter("s", "true", 'a"b\n<é>'),
                parameter("n", "false", "1"),
                parameter("l", "false", '["é", null]'),
                parameter("b", "false", "true"),
                parameter("e", "true", ""),
            )
        )
        + EOS,
    ),
    "non-JSON arguments": (
        NON_THINK,
        [user("u"), said("", None, call("f", "not json"), call("f", "[1]"), call("f", '{"a": 1}'))],
        f"{BOS}{USER}u{ASSISTANT}{END_THINK}"
        + block(
            invoke("f", parameter("arguments", "true", "not json")),
            invoke("f", parameter("arguments", "true", "[1]")),
            invoke("f", parameter("a", "false", "1")),
        )
        + EOS,
    ),
    "no parameters": (
        NON_THINK,
        [user("u"), said("", None, call("f", {}))],
        f"{BOS}{USER}u{ASSISTANT}{END_THINK}" + block(f'<{DSML}invoke name="f">\n\n</{DSML}invoke>') + EOS,
    ),
    "tool result": (
        NON_THINK,
        [user("u"), said("c", None, TWO[0]), result("R", "1")],
        f"{BOS}{USER}u{ASSISTANT}{END_THINK}c{block(LOOK[0])}{EOS}"
        f"{USER}<tool_result>R</tool_result>{ASSISTANT}{END_THINK}",
    ),
    "several results": (
        NON_THINK,
        [user("u"), said("", None, *TWO), result("second", "2"), result("first", "1"), user("more")],
        f"{BOS}{USER}u{ASSISTANT}{END_THINK}{block(*LOOK)}{EOS}"
        f"{USER}<tool_result>first</tool_result>\n\n<tool_result>second</tool_result>\n\nmore{ASSISTANT}{END_THINK}",
    ),
    "several results: a task closes the turn": (
        NON_THINK,
        [user("u", task="query"), said("q"), user("v", task="domain"), said("d"), user("w")],
        f"{BOS}{USER}u{TASKS['query']}q{EOS}{USER}v{TASKS['domain']}d{EOS}{USER}w{ASSISTANT}{END_THINK}",
    ),
    "thinking: V4, tools declared": (
        HIGH,
        [system("s", tools=TOOLS), user("u"), said("c", "r", TWO[0]), result("R"), said("d", "q"), user("v")],
        f"{BOS}{declared('s')}{USER}u{ASSISTANT}{THINK}r{END_THINK}c{block(LOOK[0])}{EOS}"
        f"{USER}<tool_result>R</tool_result>{ASSISTANT}{THINK}q{END_THINK}d{EOS}{USER}v{ASSISTANT}{THINK}",
    ),
    "thinking: V4, plain chat": (
        HIGH,
        [user("u"), said("c", "r"), user("v"), said("d", "q")],
        f"{BOS}{USER}u{ASSISTANT}{END_THINK}c{EOS}{USER}v{ASSISTANT}{THINK}q{END_THINK}d{EOS}",
    ),
    # The path of tools is not taken, so that the results, which are plain user messages, drop the reasoning.
    "thinking: tools faked by user messages": (
        HIGH,
        [user("u"), said("run ls", "r"), user("a.txt")],
        f"{BOS}{USER}u{ASSISTANT}{END_THINK}run ls{EOS}{USER}a.txt{ASSISTANT}{THINK}",
    ),
    "thinking: dropping takes earlier developer messages along": (
        HIGH,
        [system("s"), developer("d"), said("c", "r"), developer("e"), said("f", "q")],
        f"{BOS}sc{EOS}{USER}e{ASSISTANT}{THINK}q{END_THINK}f{EOS}",
    ),
    "thinking: dropping takes a first developer message along": (
        HIGH,
        [developer("d"), said("c", "r"), user("e", task="query")],
        f"{BOS}c{EOS}{USER}e{TASKS['query']}",
    ),
    "thinking: tools on any message keep it": (
        HIGH,
        [developer("d", tools=TOOLS), said("c", "r"), user("v")],
        f"{BOS}{USER}{declared('d')}{ASSISTANT}{THINK}r{END_THINK}c{EOS}{USER}v{ASSISTANT}{THINK}",
    ),
    "quick instruction: action": (
        HIGH,
        [user("p", task="action")],
        f"{BOS}{USER}p{ASSISTANT}{THINK}{TASKS['action']}",
    ),
    "quick instruction: action in chat mode": (
        NON_THINK,
        [user("p", task="action"), said("search")],
        f"{BOS}{USER}p{ASSISTANT}{END_THINK}{TASKS['action']}search{EOS}",
    ),
    "quick instruction: title": (
        HIGH,
        [user("p"), said("c", "r", task="title"), said("A title", "never")],
        f"{BOS}{USER}p{ASSISTANT}{THINK}r{END_THINK}c{EOS}{TASKS['title']}A title{EOS}",
    ),
    "quick instruction: query": (HIGH, [user("p", task="query")], f"{BOS}{USER}p{TASKS['query']}"),
    "quick instruction: authority": (HIGH, [user("p", task="authority")], f"{BOS}{USER}p{TASKS['authority']}"),
    "quick instruction: domain": (HIGH, [user("p", task="domain")], f"{BOS}{USER}p{TASKS['domain']}"),
    "quick instruction: read_url": (
        HIGH,
        [user("p", url="http://x", task="read_url"), said("yes", "never")],
        f"{BOS}{USER}p<\uff5cextracted_url\uff5c>http://x{TASKS['read_url']}yes{EOS}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_rule(row):
    """The rendered text, its tokens, and, of a turn it ends with, the message read back from the tokens."""
    effort, messages, expected = ROWS[row]
    form, prompt = chat(effort), messages[-1]["role"] != "assistant"
    assert form.render(messages, generation_prompt=prompt) == expected
    ids = form.encode(form.write(messages, generation_prompt=prompt))
    assert form.tokenizer.decode(ids) == expected
    if not prompt and not messages[-1].get("wo_eos"):
        asked = form.encode_prompt(messages[:-1])
        assert ids[: len(asked)].tolist() == asked.tolist()
        task = messages[-2].get("task")
        turn = (form if task is None else form.at(NON_THINK)).parse(ids[len(asked) :])
        last = messages[-1]
        assert turn.content == last["content"]
        assert turn.reasoning == (last.get("reasoning", "") if form.thinking and task is None else None)
        assert [c.name for c in turn.calls] == [c["function"]["name"] for c in last.get("tool_calls", ())]


def test_rule_declaring_tools():
    more = tool_row(Tool(name="cut", description="Schneidet \u00e9.", parameters={"type": "object"}))
    rendered = chat().render([system("s", tools=[*TOOLS, more]), user("u")])
    text = rendered[len(BOS) : rendered.index(USER)]
    assert text.startswith("s\n\n## Tools\n")
    places = [
        text.index(part)
        for part in (
            "## Tools",
            f"<{DSML}tool_calls>\n<{DSML}invoke name=",
            'string="true"',
            f"After {THINK}",
            "### Available Tool Schemas\n\n",
            '{"name": "look", "description": "Looks.", "parameters": {"type": "object"}}\n{"name": "cut", "desc',
            "Schneidet \u00e9.",
            "keep strictly",
        )
    ]
    assert places == sorted(places)
    ids = chat().encode_prompt([system("s", tools=TOOLS), user("u")]).tolist()
    vocabulary = chat().tokenizer.get_vocab()
    assert ids.count(vocabulary[DSML]) == text.count(DSML) == 8


def test_rule_structured_reply():
    rendered = chat().render(
        [system("s", tools=TOOLS, response_format={"type": "object", "title": "\u00e9"}), user("u")]
    )
    text = rendered[len(BOS) : rendered.index(USER)]
    assert text.index("## Tools") < text.index("\n\n## Response Format:\n\n")
    assert text.endswith('strictly:\n{"type": "object", "title": "\u00e9"}')


def test_rule_max_prefix_is_three_lines_before_the_system_text_in_thinking_mode_only():
    assert prefix(MAX).count("\n") == 4
    assert prefix(MAX).endswith("\n\n")
    assert prefix(HIGH) == prefix(NON_THINK) == ""
    assert chat(NON_THINK).render([system("s"), user("u")]).startswith(f"{BOS}s{USER}")


STRICTNESS = {
    "the block starts after a blank line": f"c\n<{DSML}tool_calls>\n{LOOK[0]}\n</{DSML}tool_calls>{EOS}",
    "exactly >\\n follows its name": f"c\n\n<{DSML}tool_calls> \n{LOOK[0]}\n</{DSML}tool_calls>{EOS}",
    "exactly >\\n after each closing parameter": f"c{block(LOOK[0].replace('parameter>', 'parameter> '))}{EOS}",
    "exactly >\\n after each closing invoke": f"c{block(LOOK[0] + ' ')}{EOS}",
    "invoke carries one name": f"c{block(LOOK[0].replace('invoke name', 'invoke id=1 name'))}{EOS}",
    "name, then string": f"c{block(LOOK[0].replace(chr(32) + 'name=' + chr(34) + 'at' + chr(34) + ' string=' + chr(34) + 'true' + chr(34), ' string=' + chr(34) + 'true' + chr(34) + ' name=' + chr(34) + 'at' + chr(34)))}{EOS}",  # noqa: E501
    "single spaces": f"c{block(LOOK[0].replace(' string', '  string'))}{EOS}",
    "string is true or false": f"c{block(LOOK[0].replace('true', 'yes'))}{EOS}",
    "no parameter twice": f"c{block(invoke('f', parameter('a', 'true', 'x'), parameter('a', 'true', 'y')))}{EOS}",
    "no text after the block": f"c{block(LOOK[0])}\nand{EOS}",
    "plain content ends with EOS": "c",
    "no BOS in content": f"c{BOS}{EOS}",
    "no EOS in content": f"c{EOS}d{EOS}",
    "no <think> in content": f"c{THINK}{EOS}",
    "no </think> in content": f"c{END_THINK}{EOS}",
    "no DSML in content": f"c{DSML}{EOS}",
    "JSON values are JSON": f"c{block(invoke('f', parameter('a', 'false', 'x')))}{EOS}",
}  # fmt: skip


@pytest.mark.parametrize("row", STRICTNESS)
@pytest.mark.parametrize("effort", [NON_THINK, HIGH])
def test_strictness(row, effort):
    form = chat(effort)
    text = ("r" + END_THINK if form.thinking else "") + STRICTNESS[row]
    ids = form.tokenizer(text, add_special_tokens=False)["input_ids"]
    with pytest.raises(MalformedTurn):
        form.parse(ids)


def test_strictness_thinking_needs_its_end_and_holds_no_control_token():
    form = chat()
    for text in ("r", f"r{DSML}{END_THINK}c", f"{THINK}r{END_THINK}c"):
        with pytest.raises(MalformedTurn):
            form.parse(form.tokenizer(text + EOS, add_special_tokens=False)["input_ids"])


def test_strictness_after_a_block_the_end_may_be_missing():
    form = chat(NON_THINK)
    ids = form.tokenizer("c" + block(LOOK[0]), add_special_tokens=False)["input_ids"]
    assert form.parse(ids).calls[0].arguments == {"at": "x"}


PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
HEARD = PLAIN | st.lists(st.sampled_from([*ALL, "<|end|>", "<|user|>", "ab", "<", "\n"]), max_size=5).map("".join)
SPOKEN = PLAIN.filter(lambda text: not any(token in text for token in FORBIDDEN))
ARGUMENTS = st.dictionaries(
    PLAIN.filter(lambda t: not {'"', "\n"} & set(t)), PLAIN | st.lists(st.integers(), max_size=2), max_size=2
)
ANSWER = st.builds(
    lambda content, reasoning, calls: said(content, reasoning, *(call("f", a, str(i)) for i, a in enumerate(calls))),
    SPOKEN, SPOKEN, st.lists(ARGUMENTS, max_size=2),
)  # fmt: skip


@given(HEARD, st.lists(st.tuples(ANSWER, HEARD), min_size=1, max_size=3), st.sampled_from([NON_THINK, HIGH, MAX, "7"]))
@settings(max_examples=60, deadline=None)
def test_a_conversation_grows_by_appending_and_every_turn_is_read_back(first, turns, effort):
    form = chat(effort)
    messages: list[Message] = [system("s", tools=TOOLS), user(first)]
    ids = form.encode_prompt(messages)
    for answer, heard in turns:
        (whole, mask) = form.encode_demonstration([*messages, answer])[-1]
        completion = whole[mask][-len(whole) + len(ids) :] if len(whole) > len(ids) else whole[:0]
        turn = form.parse(completion)
        assert (turn.content, turn.reasoning or "") == (answer["content"], answer["reasoning"] if form.thinking else "")
        assert [c.arguments for c in turn.calls] == [c["function"]["arguments"] for c in answer.get("tool_calls", ())]
        results = [result(heard, c["id"]) for c in reversed(answer.get("tool_calls", ()))]
        observed = [*results, user(heard)]
        messages = [*messages, answer]
        ids = np.concatenate([ids, completion, form.encode_observations(observed, after=messages)])
        messages += observed
        assert ids.tolist() == form.encode_prompt(messages).tolist()
        assert form.tokenizer.decode(ids) == form.render(messages)


@given(HEARD)
@settings(max_examples=100, deadline=None)
def test_nobody_but_the_format_writes_control_tokens(text):
    form = chat(NON_THINK)
    ids = form.encode_prompt([user(text)])
    added = set(form.tokenizer.get_added_vocab().values())
    assert [i for i in ids.tolist() if i in added] == form.encode_prompt([user("")]).tolist()
    assert form.tokenizer.decode(ids) == form.render([user(text)])


def test_text_that_spells_a_control_token_is_counted():
    before = TALLY.sums().get("spelled_tokens", 0)
    chat().encode_prompt([user(f"What is {USER}?")])
    assert TALLY.sums()["spelled_tokens"] == before + 1


@pytest.mark.parametrize("token", FORBIDDEN)
def test_an_assistant_that_says_a_control_token_is_refused(token):
    for message in (said(f"a{token}", "r"), said("a", f"r{token}")):
        with pytest.raises(Unwritable, match="which V4 reads as part of the format"):
            chat().render([user("u"), message], generation_prompt=False)


def test_reasoning_is_forgotten_token_by_token():
    """What a rollout in plain chat goes on from when a user message comes: the tokens it had, less the reasoning."""
    form = chat()
    before = [user("u"), said("abab", "think")]
    spelled = form.tokenizer("ab", add_special_tokens=False)["input_ids"] + [
        form.tokenizer.get_vocab()[c] for c in "ab"
    ]
    reasoning = form.tokenizer(f"think{END_THINK}", add_special_tokens=False)["input_ids"]
    end = form.tokenizer.get_vocab()[EOS]
    played = np.array([*form.encode_prompt(before[:1]), *reasoning, *spelled, end], np.int32)
    kept = form.forget(played, [user("v")], after=before)
    assert form.tokenizer.decode(kept) == form.render(before, generation_prompt=False).replace(
        f"{THINK}think{END_THINK}", END_THINK
    )
    assert kept[-4:].tolist() == [*spelled, end]
    for still, observed, after in (
        (form, [result("R")], before),
        (form, [user("v")], [system("s", tools=TOOLS), *before]),
        (form.at(NON_THINK), [user("v")], before),
        (V4Format(form.tokenizer, drop_thinking=False), [user("v")], before),
    ):
        assert still.forget(played, observed, after=after) is None


def test_a_demonstration_carries_loss_on_what_the_assistant_says_once():
    form = chat()
    demonstration = [user("u"), said("c", "r"), user("v"), said("d", "q", mask=True), user("w"), said("e", "p")]
    sequences = form.encode_demonstration(demonstration)
    imitated = [form.tokenizer.decode(ids[mask]) for ids, mask in sequences]
    assert imitated == [f"r{END_THINK}c{EOS}", f"p{END_THINK}e{EOS}"]
    assert form.tokenizer.decode(sequences[1][0]) == form.render(demonstration, generation_prompt=False)
    (one,) = form.encode_demonstration([system("s", tools=TOOLS), *demonstration])
    assert form.tokenizer.decode(one[0][one[1]]) == f"r{END_THINK}c{EOS}p{END_THINK}e{EOS}"
    (quick,) = form.encode_demonstration([{**user("u"), "effort": NON_THINK}, said("c", "r")])
    assert form.tokenizer.decode(quick[0]) == f"{BOS}{USER}u{ASSISTANT}{END_THINK}c{EOS}"


REFUSED = {
    "message with role 'critic'": [{"role": "critic", "content": "?"}],
    "second system message": [system("s"), user("u"), said("c"), system("t"), user("v")],
    "follows none that asks": [user("u"), said("c"), said("d"), user("v")],
    "asks nothing": [system("s")],
    "ends with an assistant's message": [user("u"), said("c")],
    "tools is on a user message": [user("u", tools=TOOLS)],
    "task 'sing'": [user("u", task="sing")],
    "answers none of the calls": [user("u"), said("", None, *TWO), result("a", "1"), result("b", "3")],
    "tool_calls has": [user("u"), said("", None, {"function": {}}), user("v")],
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_conversation_without_a_form_is_refused(fault):
    with pytest.raises(RecipeError, match=fault):
        chat().encode_prompt(REFUSED[fault])


def test_generation_continues_a_message_without_its_end():
    form = chat()
    begun = [user("u"), said("The ans", "r", wo_eos=True)]
    assert form.render(begun).endswith(f"{END_THINK}The ans")


def test_what_was_generated_is_shown_with_its_reasoning():
    form = chat()
    ids = form.tokenizer(f"r{END_THINK}c{EOS}", add_special_tokens=False)["input_ids"]
    assert form.decode(ids) == f"{THINK}r{END_THINK}c"
    assert form.at(NON_THINK).decode(ids) == f"r{END_THINK}c"
    assert form.stop_ids == (form.tokenizer.get_vocab()[EOS],)


def test_fingerprints_tell_formats_apart():
    prepared = chat().tokenizer
    assert chat().fingerprint == V4Format(prepared).fingerprint
    assert chat().fingerprint != V4Format(prepared, drop_thinking=False).fingerprint
    with pytest.raises(RecipeError, match="lacks 15 tokens"):
        V4Format(tiny_tokenizer())


def test_efforts_that_are_none_are_refused():
    for effort in ("low", "0", "101", "07", "\u0661"):
        with pytest.raises(RecipeError, match="a number from 1 to 100"):
            chat().at(effort)


def test_orders_of_results_do_not_matter():
    calls = [call("f", {"i": i}, str(i)) for i in range(3)]
    results = [result(f"R{i}", str(i)) for i in range(3)]
    asked = [user("u"), said("", None, *calls)]
    renderings = {chat(NON_THINK).render([*asked, *order]) for order in itertools.permutations(results)}
    observed = {
        tuple(chat(NON_THINK).encode_observations(order, after=asked)) for order in itertools.permutations(results)
    }
    assert len(renderings) == len(observed) == 1


def test_messages_are_plain_json():
    messages = [message for _, row, _ in ROWS.values() for message in row]
    assert json.loads(json.dumps(messages)) == messages


def test_the_guides_snippets_run():
    guide = Path(v4.__file__).with_name("README.md").read_text(encoding="utf-8")
    names: dict = {}
    for source in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(source, names)
    assert (names["in_v4"].chat, list(names["efforts"])) == ("v4", [NON_THINK, HIGH, MAX])
    for demonstration, task in ((names["title"], "title"), (names["worth_reading"], "read_url")):
        assert f"{TASKS[task]}{demonstration[-1]['content']}{EOS}" in chat().render(
            demonstration, generation_prompt=False
        )
