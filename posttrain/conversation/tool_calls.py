"""Tool calls as text: one JSON object in a fenced block marked ``tool``."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from posttrain.types import Tool, ToolCall

_BLOCK = re.compile(r"^```tool[ \t]*\n(.*?)\n?^```[ \t]*$", re.DOTALL | re.MULTILINE)


def parse_tool_call(text: str) -> ToolCall | None:
    """The first call in what a model said; None when there is none. ``ValueError`` for a block that is no call.

    Only the first counts, since the model has not seen its result when it writes a second.
    """
    block = _BLOCK.search(text)
    if block is None:
        return None
    try:
        # Line breaks inside strings are no JSON, and models write them.
        found = json.loads(block[1], strict=False)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the tool block is not JSON: {error}") from error
    if not isinstance(found, dict) or found.keys() != {"name", "arguments"} or not isinstance(found["name"], str):
        raise ValueError('the tool block is not {"name": "...", "arguments": {...}}')
    return ToolCall(found["name"], found["arguments"])


def format_tool_call(call: ToolCall) -> str:
    """The block that ``parse_tool_call`` reads, for prompts and demonstrations."""
    return f"```tool\n{json.dumps({'name': call.name, 'arguments': call.arguments})}\n```"


def describe_tools(tools: Sequence[Tool]) -> str:
    """What a prompt has to say for a model to call these tools."""
    listed = [f"{tool.name}: {tool.description}\narguments: {json.dumps(tool.parameters)}" for tool in tools]
    example = '```tool\n{"name": "...", "arguments": {...}}\n```'
    return "\n\n".join([f"To call a tool, end your turn with one block\n{example}\nThe tools:", *listed])
