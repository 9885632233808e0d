"""How tasks are played: a single answer, or several turns with a shell or with tools in a sandbox."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from posttrain.conversation.dsml_parser import MalformedTurn, parse_shown
from posttrain.conversation.tool_calls import parse_tool_call
from posttrain.protocols import Sandbox, Tools, ToolSession
from posttrain.rollout.observations import describe
from posttrain.tally import TALLY
from posttrain.types import EMPTY, Message, Task, ToolCall

_SHELL_BLOCK = re.compile(r"```bash\n(.*?)\n?```", re.DOTALL)


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """The policy answers once."""

    max_turns: int = 1

    def start(self, task: Task, sandbox: Sandbox | None) -> SingleTurnEpisode:
        return SingleTurnEpisode()


class SingleTurnEpisode:
    async def respond(self, text: str) -> None:
        return None

    async def artifacts(self) -> Mapping[str, bytes]:
        return EMPTY


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """The policy works in a shell: a turn with a fenced ``bash`` block runs it, a turn without one ends.

    Only the first block of a turn is run, since the policy has not seen the first result when it writes a
    second. Files named by ``task.info["expected_files"]`` and ``task.info["forbidden_files"]`` are taken out of the
    box at the end, so that grading happens elsewhere.
    """

    max_turns: int = 4
    command_timeout_s: float = 5.0
    max_observation_chars: int = 2000
    """Longer output keeps its head and tail."""
    max_artifact_bytes: int = 1 << 16

    def start(self, task: Task, sandbox: Sandbox | None) -> ToolUseEpisode:
        sandbox = _required(sandbox, task)
        named = (path for key in ("expected_files", "forbidden_files") for path in task.info.get(key, ()))
        paths = tuple(dict.fromkeys(map(posixpath.normpath, named)))
        outside = [path for path in paths if path == "." or path.split("/")[0] in ("", "..")]
        if outside:
            raise ValueError(
                f"task {task.id!r}: info['expected_files'] or info['forbidden_files'] names {outside[0]!r}; expected "
                "paths of files below the workdir"
            )
        return ToolUseEpisode(rules=self, sandbox=sandbox, artifact_paths=paths)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUseEpisode:
    rules: ToolUse
    sandbox: Sandbox
    artifact_paths: tuple[str, ...] = field(default=())

    async def respond(self, text: str) -> tuple[Message, ...] | None:
        block = _SHELL_BLOCK.search(text)
        if block is None:
            return None
        if "\0" in block[1]:
            # No process takes such an argument; the policy wrote it, so the policy is told.
            return _tool_message("(not run: the command contains a NUL byte)")
        result = await self.sandbox.exec(block[1], timeout_s=self.rules.command_timeout_s)
        return _tool_message(describe(result, max_chars=self.rules.max_observation_chars))

    async def artifacts(self) -> Mapping[str, bytes]:
        """Content by path; of what is there and cannot be read, a note that says why."""
        kept = {}
        for path in self.artifact_paths:
            try:
                kept[path] = await self.sandbox.read(path, max_bytes=self.rules.max_artifact_bytes)
            except (FileNotFoundError, IsADirectoryError):
                continue
            except (OSError, ValueError) as error:
                # Too big, a link, a pipe or locked: a wrong file where one is expected, and still one where none
                # may be. Never empty, since an empty file may be what is expected.
                kept[path] = f"(not read: {error})".encode()
        return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCalling:
    """The policy calls tools, and each call is answered by a message.

    ``fence``: a turn with a ``tool`` block (``posttrain.conversation.tool_calls``) runs that call. ``dsml``: all calls
    of a turn run, in their order, and are answered in it (``posttrain.conversation.dsml_parser``); what can be meant in
    one way only is mended and counted as ``repaired/WHAT``. Calls that cannot be read are the policy's mistake, which
    comes back to it as their answer and is counted as ``malformed/RULE``; none of their turn runs.

    The episode ends when the policy submits, or with a turn that calls nothing. Only what it submitted is kept.
    """

    tools: Tools
    max_turns: int = 30
    form: Literal["fence", "dsml"] = "fence"

    def start(self, task: Task, sandbox: Sandbox | None) -> ToolCallingEpisode:
        return ToolCallingEpisode(self.tools.start(_required(sandbox, task)), _READERS[self.form])


class ToolCallingEpisode:
    def __init__(self, tools: ToolSession, read: Callable[[str], Sequence[ToolCall]]) -> None:
        self._tools = tools
        self._read = read
        self._submitted: Mapping[str, bytes] = EMPTY

    async def respond(self, text: str) -> tuple[Message, ...] | None:
        try:
            calls = self._read(text)
        except ValueError as error:
            return _tool_message(f"(not run: {error})")
        answers: list[Message] = []
        for call in calls:
            observation = await self._tools.call(call)
            if observation.submitted is not None:
                self._submitted = observation.submitted
                return None
            answers += _tool_message(observation.text)
        return tuple(answers) or None

    async def artifacts(self) -> Mapping[str, bytes]:
        return self._submitted


def _read_fenced(text: str) -> Sequence[ToolCall]:
    call = parse_tool_call(text)
    return [] if call is None else [call]


def _read_dsml(text: str) -> Sequence[ToolCall]:
    """The calls of a turn as it was shown. ``ValueError`` for calls that cannot be read."""
    try:
        turn = parse_shown(text, strict=False)
    except MalformedTurn as error:
        TALLY.add(f"malformed/{error.rule}")
        if error.in_call:
            raise
        return []
    for repair in turn.repairs:
        TALLY.add(f"repaired/{repair.name.lower()}")
    TALLY.add("tool_calls", len(turn.calls))
    return turn.calls


_READERS: Mapping[str, Callable[[str], Sequence[ToolCall]]] = {"fence": _read_fenced, "dsml": _read_dsml}


def _tool_message(text: str) -> tuple[Message, ...]:
    return ({"role": "tool", "content": text},)


def _required(sandbox: Sandbox | None, task: Task) -> Sandbox:
    if sandbox is None:
        raise ValueError(
            f"task {task.id!r} is played with tools but has no sandbox; give it Task.sandbox=SandboxSpec(...)"
        )
    return sandbox
