"""Tool calls as the model should write them: read, checked against the tools' schemas, compared with those expected."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from posttrain.conversation.tool_calls import parse_tool_call
from posttrain.errors import RecipeError
from posttrain.protocols import Sandbox
from posttrain.types import Rollout, Score, Task, Tool, ToolCall
from rewards.answers import visible
from rewards.values import same_value

MAX_CHARS = 1 << 17
"""Longer text holds no call."""
_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_TAG = re.compile(r"</?tool_call>")
_FENCES = re.compile(r"^```tool\b", re.MULTILINE)
Form = Literal["fence", "tags"]


def read_fenced(text: str) -> list[ToolCall]:
    """The one call in a ```` ```tool ```` fence of ``posttrain.conversation``. ``ValueError`` for a bad one."""
    if len(_FENCES.findall(text)) > 1:
        raise ValueError("there is more than one tool block, of which only the first would run")
    call = parse_tool_call(text)
    if call is None and _FENCES.search(text):
        raise ValueError("the tool block is never closed")
    return [] if call is None else [call]


def read_tagged(text: str) -> list[ToolCall]:
    """All calls between ``<tool_call>`` tags, as Hermes and Qwen write them. ``ValueError`` for a bad one."""
    tags = _TAG.findall(text)
    if tags != ["<tool_call>", "</tool_call>"] * (len(tags) // 2):
        raise ValueError("a <tool_call> is never closed, or closed twice")
    return [_read_object(block) for block in _TAGGED.findall(text)]


def _read_object(block: str) -> ToolCall:
    try:
        found = json.loads(block, strict=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the call is not JSON: {error}") from error
    if not isinstance(found, dict) or found.keys() != {"name", "arguments"} or not isinstance(found["name"], str):
        raise ValueError('the call is not {"name": "...", "arguments": {...}}')
    return ToolCall(found["name"], found["arguments"])


_READERS: Mapping[str, Callable[[str], list[ToolCall]]] = {"fence": read_fenced, "tags": read_tagged}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallReward:
    """1.0 when the calls of the last turn can be read, fit the tools' schemas and are those expected, else 0.0.

    ``task.info["tools"]`` lists the tools, each a ``Tool`` or ``{"name", "description", "parameters"}`` with a JSON
    schema. With ``task.info["expected_calls"]``, ``[{"name": "f", "arguments": {"city": ["Paris", "paris"]}}]``, the
    calls must be these, in any order, each argument one of the values listed; ``""`` among them means that it may be
    left out (the form of the Berkeley function-calling data). An empty list expects no call. Without it any call that
    fits earns the point, so use that as a gate or a small term only. Parts: ``readable``, ``schema``, ``expected``.
    Raises ``RecipeError`` for a task without usable tools.
    """

    form: Form = "fence"

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        tools = _read_tools(rollout.task)
        expected = _read_expected(rollout.task)
        text = visible(rollout.text)
        if len(text) > MAX_CHARS:
            return _failed("readable", f"the text has more than {MAX_CHARS} characters")
        try:
            calls = _READERS[self.form](text)
        except ValueError as error:
            return _failed("readable", str(error))
        if not calls and (expected is None or len(expected) > 0 or not text.strip()):
            return _failed("readable", "there is no call")
        faults = [fault for call in calls if (fault := schema_fault(call, tools)) is not None]
        if faults:
            return _failed("schema", faults[0])
        if expected is not None and not same_calls(calls, expected):
            return _failed("expected", f"{len(calls)} calls are not the {len(expected)} expected")
        return Score(
            value=1.0,
            parts=dict.fromkeys(_PARTS if expected is not None else _PARTS[:2], 1.0),
            explanation=f"{len(calls)} calls, as they should be.",
        )


_PARTS = ("readable", "schema", "expected")


def _failed(part: str, reason: str) -> Score:
    """0.0, with 1.0 for the stages that were passed before."""
    passed = _PARTS[: _PARTS.index(part)]
    # The model's own words may hold lone surrogates, which no file could take.
    explanation = f"The calls are wrong: {reason[:300]}.".encode(errors="replace").decode()
    return Score(value=0.0, parts={**dict.fromkeys(passed, 1.0), part: 0.0}, explanation=explanation)


def schema_fault(call: ToolCall, tools: Mapping[str, Tool]) -> str | None:
    """Why a call fits no tool; None when it does. An argument the schema does not name is a fault."""
    import jsonschema

    tool = tools.get(call.name)
    if tool is None:
        return f"there is no tool {call.name[:80]!r}"
    if not isinstance(call.arguments, dict):
        return f"the arguments of {call.name} are no object"
    named = tool.parameters.get("properties", {})
    unknown = sorted(call.arguments.keys() - set(named))
    if unknown and tool.parameters.get("additionalProperties", False) is False:
        return f"{call.name} has no argument {unknown[0][:80]!r}"
    try:
        error = next(_validator(json.dumps(tool.parameters, sort_keys=True)).iter_errors(call.arguments), None)
    except (RecursionError, jsonschema.exceptions.SchemaError) as problem:
        return f"the arguments of {call.name} cannot be checked ({type(problem).__name__})"
    return None if error is None else f"{call.name}: {error.message[:200]}"


@lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(schema))


def same_calls(calls: Sequence[ToolCall], expected: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every call is another one of those expected, and none is missing."""
    if len(calls) != len(expected):
        return False
    fits = [[i for i, one in enumerate(expected) if _is_expected(call, one)] for call in calls]
    taken: dict[int, int] = {}

    def place(call: int, tried: set[int]) -> bool:
        """Give a call a place; one that has it moves on to another that it fits."""
        for i in fits[call]:
            if i not in tried:
                tried.add(i)
                if i not in taken or place(taken[i], tried):
                    taken[i] = call
                    return True
        return False

    return all(place(call, set()) for call in range(len(calls)))


def _is_expected(call: ToolCall, expected: Mapping[str, Any]) -> bool:
    allowed = expected["arguments"]
    return (
        call.name == expected["name"]
        and call.arguments.keys() <= allowed.keys()
        and all(
            any(same_value(value, call.arguments[name]) for value in values) if name in call.arguments else "" in values
            for name, values in allowed.items()
        )
    )


def _read_tools(task: Task) -> Mapping[str, Tool]:
    rows = task.info.get("tools")
    try:
        tools = [row if isinstance(row, Tool) else Tool(**row) for row in rows or ()]
        _check_schemas(tools)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"task {task.id!r}: info['tools'] cannot be used: {error}; {_TOOLS_HELP}") from error
    if not tools:
        raise RecipeError(f"task {task.id!r}: info['tools'] = {rows!r}; {_TOOLS_HELP}")
    return {tool.name: tool for tool in tools}


_TOOLS_HELP = "expected a non-empty list of {'name', 'description', 'parameters'} whose parameters are a JSON schema"


def _check_schemas(tools: Sequence[Tool]) -> None:
    import jsonschema

    for tool in tools:
        try:
            jsonschema.Draft202012Validator.check_schema(dict(tool.parameters))
        except jsonschema.exceptions.SchemaError as error:
            raise ValueError(f"the parameters of {tool.name!r} are no JSON schema ({error.message})") from error


def _read_expected(task: Task) -> Sequence[Mapping[str, Any]] | None:
    rows = task.info.get("expected_calls")
    if rows is None:
        return None
    usable = isinstance(rows, Sequence) and all(
        isinstance(row, Mapping)
        and isinstance(row.get("name"), str)
        and isinstance(row.get("arguments"), Mapping)
        and all(isinstance(values, Sequence) and not isinstance(values, str) for values in row["arguments"].values())
        for row in rows
    )
    if not usable:
        raise RecipeError(
            f"task {task.id!r}: info['expected_calls'] = {rows!r:.120}; expected a list of "
            '{"name": ..., "arguments": {argument: [allowed values]}}'
        )
    return rows
