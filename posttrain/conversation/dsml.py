"""DSML, V4's form of tool calls: written here, read by ``posttrain.conversation.dsml_parser``.

Nothing is escaped. A string is written raw, anything else as JSON, so the model never has to escape a quote or a line
break, and the few values that cannot be written are refused (``Unwritable``) and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.conversation.v4_tokens import DSML
from posttrain.errors import RecipeError
from posttrain.tally import TALLY
from posttrain.types import Message, Tool, ToolCall

PARAMETER_END = f"/{DSML}parameter"
"""Where V4's parser sees the end of a value, whatever is around it."""
SKELETON = (
    f"<{DSML}tool_calls>\n"
    f'<{DSML}invoke name="$TOOL_NAME">\n'
    f'<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f'<{DSML}invoke name="$TOOL_NAME2">\n'
    "...\n"
    f"</{DSML}invoke>\n"
    f"</{DSML}tool_calls>"
)


class Unwritable(RecipeError):
    """A value has no form in V4's format. Each one is counted as ``unwritable/REASON``."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        TALLY.add(f"unwritable/{reason}")


def write_calls(calls: Sequence[ToolCall]) -> str:
    """The block at the end of a turn, without the blank line before it. ``Unwritable`` for what has no form."""
    invokes = "\n".join(_invoke(call) for call in calls)
    return f"<{DSML}tool_calls>\n{invokes}\n</{DSML}tool_calls>"


def calls_of(message: Message) -> tuple[ToolCall, ...]:
    """The calls of an assistant's message. ``RecipeError`` for one without a name."""
    calls = []
    for row in message.get("tool_calls") or ():
        function = row.get("function", row)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RecipeError(
                f'tool_calls has {row!r:.200}: expected {{"type": "function", "function": {{"name": ..., '
                '"arguments": {...}}}; correct the message'
            )
        calls.append(ToolCall(function["name"], function.get("arguments", {}), str(row.get("id") or "")))
    return tuple(calls)


def call_row(call: ToolCall) -> dict[str, Any]:
    """A call as a message holds it."""
    named = {"id": call.id} if call.id else {}
    return {**named, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def tool_row(tool: Tool) -> dict[str, Any]:
    """A tool as a message declares it."""
    function = {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}
    return {"type": "function", "function": function}


def arguments_of(call: ToolCall) -> Mapping[str, Any]:
    """The parameters of a call: its object; of arguments that are none, also as JSON text, one named ``arguments``."""
    found = call.arguments
    if isinstance(found, str):
        try:
            found = json.loads(found, parse_constant=_no_number)
        except (ValueError, RecursionError):
            found = None
    return found if isinstance(found, Mapping) else {"arguments": call.arguments}


def to_json(value: Any, where: str) -> str:
    """JSON with non-ASCII kept. ``Unwritable`` for what JSON cannot hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise Unwritable("json", f"{where} = {value!r:.80} is no JSON value ({error}); change it") from error
    return check_text(text, where)


def check_text(text: str, where: str) -> str:
    """The same text. ``Unwritable`` when it is no Unicode text, such as half of a surrogate pair."""
    if not isinstance(text, str):
        raise Unwritable("type", f"{where} = {text!r:.80}: expected a text; change it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unwritable(
            "surrogate", f"{where} has {text[error.start]!r} at {error.start}: expected Unicode text; remove it"
        ) from error
    return text


def _invoke(call: ToolCall) -> str:
    name = _quoted(call.name, "a tool's name")
    parameters = "\n".join(_parameter(call.name, *item) for item in arguments_of(call).items())
    return f'<{DSML}invoke name="{name}">\n{parameters}\n</{DSML}invoke>'


def _parameter(tool: str, name: str, value: Any) -> str:
    name, where = _quoted(name, f"a parameter's name of {tool}"), f"parameter {name!r} of {tool}"
    is_string = isinstance(value, str)
    text = check_text(value, where) if is_string else to_json(value, where)
    if PARAMETER_END in text and not is_string:
        # Within JSON it is part of a string, where the token has another spelling.
        text = text.replace(DSML, "\\uff5cDSML\\uff5c")
    if PARAMETER_END in text:
        raise Unwritable(
            "value_end",
            f"{where} contains {PARAMETER_END!r} at {text.index(PARAMETER_END)}, which ends a value since nothing is "
            "escaped; change the value, or put it into an object, whose strings are JSON",
        )
    return f'<{DSML}parameter name="{name}" string="{str(is_string).lower()}">{text}</{DSML}parameter>'


def _quoted(name: Any, what: str) -> str:
    name = check_text(name, what)
    if '"' in name or "\n" in name or DSML in name:
        raise Unwritable("name", f"{what} is {name!r:.80}: expected no quote, line break or {DSML}; rename it")
    return name


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")
