"""How tasks are played: a single answer, or several turns with a shell or with tools in a sandbox."""

from __future__ import annotations

import asyncio
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from posttrain.conversation.dsml_parser import MalformedTurn, parse_shown
from posttrain.conversation.tool_calls import parse_tool_call
from posttrain.protocols import Sandbox, Tools, ToolSession
from posttrain.rollout.clearing import ContextClearing
from posttrain.rollout.observations import clip, describe
from posttrain.rollout.tool_checks import ToolChecks
from posttrain.tally import TALLY
from posttrain.types import EMPTY, Message, Observation, Task, ToolCall

MAX_STRANGERS = 20
"""Files of a tree that are kept although the task does not know them."""

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
    clearing: ContextClearing | None = None
    """What goes when the window is nearly full; None: nothing, and the rollout ends when it is full."""

    def start(self, task: Task, sandbox: Sandbox | None) -> ToolUseEpisode:
        return ToolUseEpisode(rules=self, sandbox=_required(sandbox, task), artifact_paths=_named_files(task))


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
        return await _contents(self.sandbox, self.artifact_paths, max_bytes=self.rules.max_artifact_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCalling:
    """The policy calls tools, and each call is answered by a message.

    ``fence``: a turn with a ``tool`` block (``posttrain.conversation.tool_calls``) runs that call. ``dsml``: all calls
    of a turn run, in their order, and are answered in it (``posttrain.conversation.dsml_parser``); what can be meant in
    one way only is mended and counted as ``repaired/WHAT``. Calls that cannot be read are the policy's mistake, which
    comes back to it as their answer and is counted as ``malformed/RULE``; none of their turn runs.

    A call that cannot run (no such tool, or arguments against its schema) is answered with the reason and counted as
    ``refused/WHAT``; what a tool says of its own failures and limits is an answer too. What the machinery fails at ends
    the rollout unscored.

    The episode ends when the policy submits, with a turn that calls nothing, at ``max_turns`` (``StopReason.TURNS``) or
    when the window is full (``StopReason.LENGTH``); ``keep`` says what is graded then.
    """

    tools: Tools
    max_turns: int = 30
    form: Literal["fence", "dsml"] = "fence"
    max_calls: int = 32
    """Calls of one turn that run; each one beyond them is answered with a note."""
    max_parallel: int = 1
    """Calls of a turn that run at once. Only neighbours do whose tools are ``Tool.concurrent``; every other call waits
    for those before it."""
    max_answer_chars: int | None = None
    """Longer answers keep their head and tail around a note; None leaves their length to the tools."""
    warn_turns: int = 0
    """With this many turns left, or fewer, the last answer of a turn says how many."""
    clearing: ContextClearing | None = None
    """What goes when the window is nearly full; None: nothing."""
    keep: Literal["submitted", "tree"] = "submitted"
    """``submitted``: what the policy handed in, nothing where it did not. ``tree``: the files of the box however the
    episode ended, those that the task brought or expects with their content, the others with a note in its place;
    links and empty directories are not seen."""
    max_artifact_bytes: int = 1 << 16
    """Largest file of a ``tree``; a note takes the place of a larger one."""

    def __post_init__(self) -> None:
        for name, least in (("max_turns", 1), ("max_calls", 1), ("max_parallel", 1), ("warn_turns", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"ToolCalling.{name} = {getattr(self, name)}: expected an integer >= {least}")
        for name, value, known in (("form", self.form, tuple(_READERS)), ("keep", self.keep, ("submitted", "tree"))):
            if value not in known:
                raise ValueError(f"ToolCalling.{name} = {value!r}: expected one of {', '.join(known)}")

    def start(self, task: Task, sandbox: Sandbox | None) -> ToolCallingEpisode:
        return ToolCallingEpisode(self, task, _required(sandbox, task))


class ToolCallingEpisode:
    def __init__(self, rules: ToolCalling, task: Task, sandbox: Sandbox) -> None:
        self._rules = rules
        self._sandbox = sandbox
        self._tools: ToolSession = rules.tools.start(sandbox)
        self._read = _READERS[rules.form]
        self._checks = ToolChecks(rules.tools.definitions)
        self._concurrent = {tool.name for tool in rules.tools.definitions if tool.concurrent}
        self._places = asyncio.Semaphore(rules.max_parallel)
        brought = task.sandbox.files if task.sandbox is not None else ()
        self._known = tuple(dict.fromkeys([*map(posixpath.normpath, brought), *_named_files(task)]))
        self._turns_left = rules.max_turns
        self._submitted: Mapping[str, bytes] = EMPTY

    async def respond(self, text: str) -> tuple[Message, ...] | None:
        self._turns_left -= 1
        try:
            calls = self._read(text)
        except ValueError as error:
            return self._warned([f"(not run: {error})"])
        answers: list[str] = []
        limit = self._rules.max_calls
        for concurrent, neighbours in groupby(calls[:limit], lambda call: call.name in self._concurrent):
            for batch in [list(neighbours)] if concurrent else [[call] for call in neighbours]:
                for observation in await self._run(batch):
                    if observation.submitted is not None:
                        self._submitted = observation.submitted
                        return None
                    answers.append(self._clipped(observation.text))
        answers += [f"(not run: a turn may have {limit} calls)"] * len(calls[limit:])
        return self._warned(answers) or None

    async def artifacts(self) -> Mapping[str, bytes]:
        if self._rules.keep == "submitted":
            return self._submitted
        return await _tree(self._sandbox, self._known, max_bytes=self._rules.max_artifact_bytes)

    async def _run(self, calls: Sequence[ToolCall]) -> list[Observation]:
        """What these calls are answered, in their order; all of them may run at once."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._call(call)) for call in calls]
        except BaseExceptionGroup as failures:
            # Whose fault a failure is can be told from it alone.
            raise failures.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _call(self, call: ToolCall) -> Observation:
        fault = self._checks.fault(call)
        if fault is not None:
            return Observation(f"(not run: {fault})")
        async with self._places:
            return await self._tools.call(call)

    def _clipped(self, text: str) -> str:
        return text if self._rules.max_answer_chars is None else clip(text, self._rules.max_answer_chars)

    def _warned(self, answers: list[str]) -> tuple[Message, ...]:
        left = self._turns_left
        if answers and 0 < left <= self._rules.warn_turns:
            answers[-1] += f"\n({left} {'turn' if left == 1 else 'turns'} left)"
        return tuple(message for answer in answers for message in _tool_message(answer))


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


def _named_files(task: Task) -> tuple[str, ...]:
    """The files that a task's grading names. ``ValueError`` for a path out of the workdir."""
    named = (path for key in ("expected_files", "forbidden_files") for path in task.info.get(key, ()))
    paths = tuple(dict.fromkeys(map(posixpath.normpath, named)))
    outside = [path for path in paths if path == "." or path.split("/")[0] in ("", "..")]
    if outside:
        raise ValueError(
            f"task {task.id!r}: info['expected_files'] or info['forbidden_files'] names {outside[0]!r}; expected "
            "paths of files below the workdir"
        )
    return paths


async def _contents(sandbox: Sandbox, paths: Iterable[str], *, max_bytes: int) -> dict[str, bytes]:
    """Content by path; of what is there and cannot be read, a note that says why."""
    kept = {}
    for path in paths:
        try:
            kept[path] = await sandbox.read(path, max_bytes=max_bytes)
        except (FileNotFoundError, IsADirectoryError):
            continue
        except (OSError, ValueError) as error:
            # Too big, a link, a pipe or locked: a wrong file where one is expected, and still one where none
            # may be. Never empty, since an empty file may be what is expected.
            kept[path] = f"(not read: {error})".encode()
    return kept


async def _tree(sandbox: Sandbox, known: Sequence[str], *, max_bytes: int) -> dict[str, bytes]:
    """All files of a box: the known ones with their content, a few of the others by name."""
    try:
        strangers = [path for path in await sandbox.list() if path not in known]
    except ValueError as error:
        # More files than can be listed, which the policy has made.
        strangers = [f"({error})"]
    kept = await _contents(sandbox, known, max_bytes=max_bytes)
    return kept | dict.fromkeys(strangers[:MAX_STRANGERS], b"(not read: no file of the task)")


def _required(sandbox: Sandbox | None, task: Task) -> Sandbox:
    if sandbox is None:
        raise ValueError(
            f"task {task.id!r} is played with tools but has no sandbox; give it Task.sandbox=SandboxSpec(...)"
        )
    return sandbox
