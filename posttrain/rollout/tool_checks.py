"""Whether a call is one that its tool takes: known, and with arguments that its schema allows."""

from __future__ import annotations

from collections.abc import Sequence

from jsonschema import Draft202012Validator, SchemaError

from posttrain.errors import RecipeError
from posttrain.rollout.observations import clip
from posttrain.tally import TALLY
from posttrain.types import Tool, ToolCall

MAX_CHARS = 300
"""Of what is said about one fault."""
MAX_FAULTS = 5


class ToolChecks:
    """Checks calls against what the model was told of its tools. ``RecipeError`` for a schema that is none."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        for tool in tools:
            try:
                Draft202012Validator.check_schema(tool.parameters)
            except SchemaError as error:
                raise RecipeError(
                    f"tool {tool.name!r}: parameters are no JSON schema ({error.message}); correct its definition"
                ) from error
        self._validators = {tool.name: Draft202012Validator(tool.parameters) for tool in tools}

    def fault(self, call: ToolCall) -> str | None:
        """What is wrong with a call, for the model to read; None for one to run. Counted as ``refused/WHAT``."""
        if call.name not in self._validators:
            TALLY.add("refused/unknown_tool")
            return f"there is no tool {call.name!r:.{MAX_CHARS}}; there are {', '.join(self._validators)}"
        faults = self._faults(call)
        if not faults:
            return None
        TALLY.add("refused/arguments")
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        return f"{call.name}: {'; '.join(faults[:MAX_FAULTS])}{more}"

    def _faults(self, call: ToolCall) -> list[str]:
        try:
            found = sorted(self._validators[call.name].iter_errors(call.arguments), key=lambda error: error.json_path)
        except RecursionError:
            return ["the arguments are nested too deeply"]
        # Half of a surrogate pair cannot be encoded, and messages repeat what the model wrote.
        said = [f"{error.json_path.replace('$', 'arguments', 1)}: {error.message}" for error in found]
        return [clip(each, MAX_CHARS).encode(errors="replace").decode() for each in said]
