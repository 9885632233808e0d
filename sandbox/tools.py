"""The tools a model works with in a box: bash, read, write, edit, submit.

What the model did wrong (arguments, paths, a text that is not there) and what its commands did is told to it. What the
machinery fails at (``SandboxError``) is raised, and never looks like the output of a tool.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.errors import Unsupported
from posttrain.protocols import Sandbox
from posttrain.rollout.observations import clip, describe
from posttrain.types import ExecResult, Observation, Tool, ToolCall

CONTEXT_LINES = 3
"""Shown around an edit."""
MAX_PLACES = 5
"""Named to the model when a text to replace is not unique."""

REPLACE = """\
new=$(mktemp "$1.XXXXXX") && cat > "$new" && case $(stat -c %A "$1") in
???x*) chmod 775 "$new" ;;
*) chmod 664 "$new" ;;
esac && mv -f "$new" "$1" || { status=$?; rm -f "$new"; exit $status; }
"""
"""Shell program: the file ``$1`` gets the content of standard input. Commands may run under different uids of one
group, so that the group gets what the owner has."""


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class Bash(_Arguments):
    """Run a command in bash. The shell keeps its directory, variables and functions from call to call."""

    command: str
    """What to run; several lines are allowed. Its standard input is closed."""
    timeout_s: float | None = Field(default=None, gt=0)
    """Seconds after which it is interrupted."""


class Read(_Arguments):
    """Show a text file with line numbers."""

    path: str
    """Relative to the working directory, wherever the shell is."""
    first_line: int = Field(default=1, ge=1)
    num_lines: int | None = Field(default=None, ge=1)
    """All that follow, if left out."""


class Write(_Arguments):
    """Create a file, or replace all of it, with its parent directories."""

    path: str
    """Relative to the working directory, wherever the shell is."""
    content: str


class Edit(_Arguments):
    """Replace a text that occurs exactly once in a file."""

    path: str
    """Relative to the working directory, wherever the shell is."""
    old: str = Field(min_length=1)
    """The text to replace, exactly as in the file, with enough around it to be unique."""
    new: str
    """The text to put there; empty to delete."""


class Submit(_Arguments):
    """Hand in files for grading and end the work. Nothing but these files is graded."""

    paths: list[str] = Field(min_length=1)
    """Relative to the working directory, wherever the shell is."""


KINDS: Mapping[str, type[_Arguments]] = {kind.__name__.lower(): kind for kind in (Bash, Read, Write, Edit, Submit)}


@runtime_checkable
class Shell(Protocol):
    """A bash that goes on from command to command."""

    @property
    def ended(self) -> str:
        """Why there is no shell any more; empty while there is one."""
        ...

    async def run(self, command: str, *, timeout_s: float | None = None, max_output: int = 1 << 20) -> ExecResult:
        """Run one command. ``EOFError`` when the shell has ended before."""
        ...


@runtime_checkable
class HasSessions(Sandbox, Protocol):
    """A box with shells that keep their state."""

    async def session(self) -> Shell: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxTools:
    """The five tools, for boxes that have sessions. Satisfies ``posttrain.protocols.Tools``."""

    timeout_s: float = 30.0
    """Of a command for which the model names no time."""
    max_timeout_s: float = 300.0
    """A model that asks for more gets this."""
    max_chars: int = 8000
    """Longer observations keep their head and tail."""
    max_file_bytes: int = 1 << 20
    """Largest file to read, edit or submit."""
    max_submitted: int = 100
    """Files of a submission."""
    workdir: str = "/work"
    """Absolute paths below it are understood, too."""

    @property
    def definitions(self) -> Sequence[Tool]:
        """What the model may call."""
        return [_definition(name, kind) for name, kind in KINDS.items()]

    def start(self, sandbox: Sandbox) -> BoxToolSession:
        """Tools in an open box. The shell starts with the first command."""
        if not isinstance(sandbox, HasSessions):
            raise Unsupported(
                f"tools need shell sessions, which a {type(sandbox).__name__} has not; use another substrate"
            )
        return BoxToolSession(self, sandbox)


class BoxToolSession:
    """The tools of one episode."""

    def __init__(self, rules: BoxTools, sandbox: HasSessions) -> None:
        self._rules = rules
        self._sandbox = sandbox
        self._shell: Shell | None = None

    async def call(self, call: ToolCall) -> Observation:
        """Run a tool. What it says is at most a few lines longer than ``max_chars``."""
        if call.name not in KINDS:
            return self._say(f"(there is no tool {call.name!r}; there are {', '.join(KINDS)})")
        try:
            arguments = KINDS[call.name].model_validate(call.arguments)
        except ValidationError as error:
            return self._say(f"({call.name} was not run: {_faults(error)})")
        try:
            return await self._run(arguments)
        except OSError as error:
            if error.errno is None:
                # No answer of a file system: a deadline or a connection of ours.
                raise
            return self._say(f"({call.name} failed: {error.strerror})")
        except ValueError as error:
            return self._say(f"({call.name} failed: {error})")

    async def _run(self, arguments: _Arguments) -> Observation:
        match arguments:
            case Bash():
                return Observation(await self._bash(arguments))
            case Read():
                return self._say(await self._read(arguments))
            case Write():
                data = arguments.content.encode()
                await self._sandbox.write(self._path(arguments.path), data)
                return self._say(f"(wrote {len(data)} bytes to {arguments.path})")
            case Edit():
                return self._say(await self._edit(arguments))
            case Submit():
                submitted = await self._submit(arguments)
                return Observation(self._say(f"(submitted {', '.join(submitted)})").text, submitted)
            case _:
                raise AssertionError(arguments)

    def _say(self, text: str) -> Observation:
        # A model may write half of a surrogate pair, and an error message repeat it.
        return Observation(clip(text, self._rules.max_chars).encode(errors="replace").decode())

    async def _bash(self, arguments: Bash) -> str:
        rules = self._rules
        timeout_s = min(arguments.timeout_s or rules.timeout_s, rules.max_timeout_s)
        if self._shell is None or self._shell.ended:
            self._shell = await self._sandbox.session()
        try:
            result = await self._shell.run(arguments.command, timeout_s=timeout_s, max_output=4 * rules.max_chars)
        except EOFError:
            # Something that an earlier command left running has ended the shell just now.
            self._shell = None
            return "(not run: the shell has ended; the next command gets a new one)"
        said = describe(result, max_chars=rules.max_chars)
        return f"{said}\n(the shell has ended; the next command gets a new one)" if self._shell.ended else said

    async def _read(self, arguments: Read) -> str:
        text = await self._text(arguments.path)
        if not text:
            return "(the file is empty)"
        lines = text.removesuffix("\n").split("\n")
        if arguments.first_line > len(lines):
            return f"(the file has only {len(lines)} lines)"
        first = arguments.first_line - 1
        last = len(lines) if arguments.num_lines is None else first + arguments.num_lines
        return numbered(lines, first, last)

    async def _edit(self, arguments: Edit) -> str:
        text = await self._text(arguments.path)
        changed, shown = replace_once(text, arguments.old, arguments.new)
        await self._replace(self._path(arguments.path), changed.encode())
        return shown

    async def _replace(self, path: str, data: bytes) -> None:
        """Give a file other content. It stays executable, for which the box's protocol has no call."""
        result = await self._sandbox.exec(["/bin/sh", "-c", REPLACE, "sh", f"./{path}"], stdin=data)
        if not result.ok:
            raise ValueError(describe(result, max_chars=self._rules.max_chars))

    async def _submit(self, arguments: Submit) -> Mapping[str, bytes]:
        rules, left = self._rules, self._rules.max_file_bytes
        if len(arguments.paths) > rules.max_submitted:
            raise ValueError(f"{len(arguments.paths)} files: expected at most {rules.max_submitted}")
        submitted = {}
        for path in map(self._path, arguments.paths):
            try:
                submitted[path] = await self._sandbox.read(path, max_bytes=left)
            except (FileNotFoundError, IsADirectoryError) as error:
                raise ValueError(f"{path}: {error.strerror}; nothing was submitted") from error
            left -= len(submitted[path])
        return submitted

    async def _text(self, path: str) -> str:
        data = await self._sandbox.read(self._path(path), max_bytes=self._rules.max_file_bytes)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text; use bash") from error

    def _path(self, path: str) -> str:
        """Relative to the workdir. The box refuses what leads out of it."""
        pure = PurePosixPath(path)
        return str(pure.relative_to(self._rules.workdir) if pure.is_relative_to(self._rules.workdir) else pure)


def _definition(name: str, kind: type[_Arguments]) -> Tool:
    schema = kind.model_json_schema()
    for described in (schema, *schema["properties"].values()):
        described.pop("title")
    description = schema.pop("description")
    return Tool(name=name, description=description, parameters=schema, concurrent=kind is Read)


def _faults(error: ValidationError) -> str:
    found = ((".".join(map(str, fault["loc"])) or "arguments", fault["msg"]) for fault in error.errors())
    return "; ".join(f"{where}: {what}" for where, what in found)


def replace_once(text: str, old: str, new: str) -> tuple[str, str]:
    """A text after an edit, and what the model reads of it. ``ValueError`` unless ``old`` occurs exactly once."""
    places = list(_places(text, old))
    if len(places) != 1:
        raise ValueError(_not_unique(text, old, places))
    changed = text[: places[0]] + new + text[places[0] + len(old) :]
    first = text.count("\n", 0, places[0])
    last = first + new.count("\n") + 1
    return changed, numbered(changed.split("\n"), max(0, first - CONTEXT_LINES), last + CONTEXT_LINES)


def numbered(lines: Sequence[str], first: int, last: int) -> str:
    """Lines from index ``first`` to before ``last`` as the model reads them, counted from 1."""
    return "\n".join(f"{number:6}\t{line}" for number, line in enumerate(lines[first:last], first + 1))


def _places(text: str, wanted: str) -> Iterator[int]:
    """Where a text occurs, overlaps included."""
    at = text.find(wanted)
    while at >= 0:
        yield at
        at = text.find(wanted, at + 1)


def _not_unique(text: str, old: str, places: Sequence[int]) -> str:
    if places:
        lines = [str(text.count("\n", 0, at) + 1) for at in places[:MAX_PLACES]]
        more = " and more" if len(places) > MAX_PLACES else ""
        return f"old occurs {len(places)} times, in lines {', '.join(lines)}{more}; add what is around one of them"
    if " ".join(old.split()) in " ".join(text.split()):
        return "old does not occur, except with other white space; copy it exactly, without line numbers"
    return "old does not occur in the file; read it again"
