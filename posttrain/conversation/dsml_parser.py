"""Reads what a model wrote in a V4 turn: reasoning, content and DSML calls, from text in chunks of any size.

One state machine serves the whole text and the stream, so both read the same. Strict, it accepts what V4's own parser
does, and checks the JSON besides. Tolerant, it repairs what can be meant in one way only and says what it repaired; it
never makes up a value. Neither touches a value: a string is everything up to ``</DSML parameter>``.

Two things are read otherwise than by the strict parser although that accepts them: a block written with look-alike bars
is a block, where the strict parser sees plain content, and one call without any wrapper is a call.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import regex

from posttrain.conversation.dsml import PARAMETER_END, call_row
from posttrain.conversation.v4_tokens import BOS, DSML, END_THINK, EOS, FORBIDDEN, THINK
from posttrain.types import Message, ToolCall

MAX_LITERAL_CHARS = 1 << 16
"""Longer values that are no JSON are not tried as Python."""


class Repair(StrEnum):
    """What the tolerant parser mended."""

    BARS = "look-alike bars"
    WRAPPER = "misspelt wrapper"
    NO_WRAPPER = "calls without a wrapper"
    WHITESPACE = "white space around tags"
    ATTRIBUTES = "attributes in another order or with other quotes"
    UNCLOSED = "a tag that is never closed"
    JSON = "a value that is nearly JSON"
    TEXT_AFTER = "text after the calls"
    NO_EOS = "no end of turn"


class MalformedTurn(ValueError):
    """A turn that cannot be read. The model's own mistake; the message is written for it."""

    def __init__(self, rule: str, message: str, *, in_call: bool) -> None:
        super().__init__(message)
        self.rule = rule
        """Which rule was broken, one word, for counts."""
        self.in_call = in_call
        """Whether the model was about to call a tool."""


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    call: int
    """Its place among the calls of the turn."""
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentStarted:
    call: int
    name: str
    is_string: bool


@dataclass(frozen=True, slots=True)
class ArgumentDelta:
    """More of the newest argument, as written: raw text of a string, JSON of anything else."""

    call: int
    text: str


@dataclass(frozen=True, slots=True)
class CallFinished:
    call: int
    value: ToolCall


@dataclass(frozen=True, slots=True)
class Repaired:
    repair: Repair


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a turn that cannot be read."""

    error: MalformedTurn


Event = ReasoningDelta | ContentDelta | CallStarted | ArgumentStarted | ArgumentDelta | CallFinished | Repaired | Failed


@dataclass(slots=True)
class ParsedTurn:
    """What a turn says."""

    reasoning: str | None
    """None where the turn is not to begin with reasoning."""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)

    @property
    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [call_row(call) for call in self.calls]
        return message


def parse_turn(text: str, *, thinking: bool, strict: bool = True) -> ParsedTurn:
    """What follows the generation prompt, up to and with the end of the turn. ``MalformedTurn``."""
    parser = TurnParser(thinking=thinking, strict=strict)
    for event in (*parser.feed(text), *parser.finish()):
        if isinstance(event, Failed):
            raise event.error
    return parser.turn


def parse_shown(text: str, *, ended: bool = True, strict: bool = True) -> ParsedTurn:
    """A turn as ``V4Format.decode`` shows it: from its first ``<think>`` on where it begins with reasoning, and without
    its end, which it had when it ``ended``. ``MalformedTurn``."""
    thinking = text.startswith(THINK)
    return parse_turn(text.removeprefix(THINK) + EOS * ended, thinking=thinking, strict=strict)


_BARS = "[\uff5c|\u2502\u2503\u2223\u2758\u01c0\u4e28\uffe8\u00a6]"
_LOOSE = rf"(?P<token>{_BARS}{{1,2}} ?DSML ?{_BARS})"
"""The token or what looks like it."""
_TAG, _END_TAG = rf" *< *{_LOOSE}{_BARS}? *", rf" *< */ *{_LOOSE}{_BARS}? *"
_WRAPPERS = r"(?P<wrapper>(?:tool|function)[ _-]?calls?|calls)"
_QUOTED = r"""(?:"[^"\n]*"|'[^'\n]*')"""


def _literal(*texts: str) -> Any:
    return regex.compile("|".join(map(regex.escape, texts)))


_STRICT = {
    "open": _literal(f"\n\n<{DSML}tool_calls>\n"),
    "invoke": regex.compile(rf'<{DSML}invoke name="(?P<name>[^"\n]*)">\n'),
    "parameter": regex.compile(rf'<{DSML}parameter name="(?P<name>[^"\n]*)" string="(?P<string>true|false)">'),
    "value end": _literal(f"<{PARAMETER_END}>\n"),
    # In place of parameters there may be an empty line.
    "empty": _literal(f"\n</{DSML}invoke>\n"),
    "invoke end": _literal(f"</{DSML}invoke>\n"),
    "close": _literal(f"</{DSML}tool_calls>"),
}
_LOOSELY = {
    "open": regex.compile(rf"\n{{0,2}}{_TAG}{_WRAPPERS} *>(?=\s*{_TAG}invoke\s)"),
    "bare": regex.compile(rf"\n{{0,2}} *(?={_TAG}invoke\s+name\s*=)"),
    "invoke": regex.compile(rf"""\s*{_TAG}invoke\s+name\s*=\s*(?:"(?P<name>[^"\n]*)"|'(?P<name>[^'\n]*)')\s*>"""),
    "parameter": regex.compile(rf"\s*{_TAG}parameter(?P<attributes>(?:\s+(?:name|string)\s*=\s*{_QUOTED}){{2}})\s*>"),
    "value end": regex.compile(rf"{_END_TAG}parameter *>"),
    "invoke end": regex.compile(rf"\s*{_END_TAG}invoke *>"),
    "close": regex.compile(rf"\s*{_END_TAG}{_WRAPPERS} *>"),
}
_ATTRIBUTE = regex.compile(rf"(?P<key>name|string)\s*=\s*(?P<value>{_QUOTED})")
_IN_ORDER, _IN_ORDER_EXAMPLE = regex.compile(r' name="[^"]*" string="[^"]*"'), ' name="" string=""'
_IN_REASONING = _literal(END_THINK, BOS, EOS, THINK, DSML)
_IN_CONTENT = _literal(f"\n\n<{DSML}", *FORBIDDEN)
_IN_CONTENT_LOOSELY = regex.compile(rf"\n{{0,2}} *< *{_LOOSE}|" + _literal(*FORBIDDEN).pattern)
_IN_VALUE = regex.compile(f"<?{regex.escape(PARAMETER_END)}")
_IN_VALUE_LOOSELY = {
    True: regex.compile(rf"< */ *{DSML} *parameter *>"),
    False: regex.compile(rf"< */ *{_LOOSE}{_BARS}? *parameter *>"),
}
"""By whether the parameter was opened with the token itself: then a look-alike belongs to the value."""
_UNCLOSED_VALUE = regex.compile(rf"\n?{_END_TAG}invoke *>\s*{_END_TAG}{_WRAPPERS} *>\s*(?:{regex.escape(EOS)})?\s*\Z")
"""What ends call and block behind a value that was not closed."""


class TurnParser:
    """Reads one turn. ``feed`` and ``finish`` give what has become certain; ``turn`` is complete after ``finish``."""

    def __init__(self, *, thinking: bool, strict: bool = True) -> None:
        self.turn = ParsedTurn(reasoning="" if thinking else None)
        self._strict = strict
        self._text = ""
        """What is not read yet."""
        self._final = False
        self._events: list[Event] = []
        self._state: Callable[[], bool] = self._in_reasoning if thinking else self._in_content
        self._reasoning, self._content, self._value = list[str](), list[str](), list[str]()
        self._name, self._arguments = "", dict[str, Any]()
        self._key, self._is_string, self._exact = "", True, True
        self._line_ends = False
        """Whether the line break that V4 puts behind the newest tag may still come."""

    def feed(self, text: str) -> list[Event]:
        """Read some more text."""
        self._text += text
        return self._run()

    def finish(self) -> list[Event]:
        """The turn is over; what it lacks is an error or a repair."""
        self._final = True
        events = self._run()
        self.turn.content = "".join(self._content)
        if self.turn.reasoning is not None:
            self.turn.reasoning = "".join(self._reasoning)
        return events

    def _run(self) -> list[Event]:
        self._events = []
        try:
            while self._state():
                pass
        except MalformedTurn as error:
            self._events.append(Failed(error))
            self._state = self._over
        return self._events

    # The states. Each reads what it can and says whether there is more to do with the text there is.

    def _in_reasoning(self) -> bool:
        found = self._until(_IN_REASONING, self._say_reasoning)
        unclosed = f"the reasoning is never closed with {END_THINK}"
        if found is None:
            return self._wait("think", unclosed, in_call=False)
        if found == EOS:
            raise MalformedTurn("think", unclosed, in_call=False)
        if found != END_THINK:
            raise MalformedTurn("special", f"{found} is inside the reasoning", in_call=found == DSML)
        self._drop(len(found))
        return self._go(self._in_content)

    def _in_content(self) -> bool:
        found = self._until(_IN_CONTENT if self._strict else _IN_CONTENT_LOOSELY, self._say_content)
        if found is None:
            if not self._final:
                return False
            self._mend(Repair.NO_EOS, "eos", "the turn does not end", in_call=False)
            return self._go(self._over)
        if found == EOS:
            self._drop(len(EOS))
            return self._go(self._after)
        if found in FORBIDDEN:
            raise MalformedTurn("special", f"{found} is inside the content", in_call=found == DSML)
        return self._go(self._at_opening)

    def _at_opening(self) -> bool:
        kind, match = self._tag("open", "bare")
        if kind == "wait":
            return False
        if match is not None:
            self._drop(match.end())
            return self._go(self._in_block)
        start = _IN_CONTENT_LOOSELY.match(self._text)[0]
        if DSML in start:
            raise MalformedTurn(
                "opening", f"the calls have to begin with an empty line and <{DSML}tool_calls> on a line", in_call=True
            )
        self._say_content(start)
        self._drop(len(start))
        return self._go(self._in_content)

    def _in_block(self) -> bool:
        """Between calls."""
        kind, match = self._tag("invoke", *(("close",) if self.turn.calls else ()))
        if kind == "invoke":
            self._drop(match.end())
            self._name, self._arguments = match["name"], {}
            self._events.append(CallStarted(len(self.turn.calls), self._name))
            return self._go(self._in_call)
        if kind == "close":
            self._drop(match.end())
            return self._go(self._after)
        if kind == "wait" or (not self._final and self.turn.calls and EOS.startswith(self._text.strip())):
            return False
        closing = f" or </{DSML}tool_calls>" if self.turn.calls else ""
        if not self.turn.calls or self._text.strip() not in ("", EOS):
            raise MalformedTurn("invoke", f'expected <{DSML}invoke name="..."> on a line{closing}', in_call=True)
        self._mend(Repair.UNCLOSED, "invoke", f"the calls are not closed with </{DSML}tool_calls>")
        self._text = self._text.strip()
        return self._go(self._after)

    def _in_call(self) -> bool:
        """Between the parameters of a call."""
        kind, match = self._tag("parameter", "invoke end", *(() if self._arguments else ("empty",)))
        if kind == "wait":
            return False
        if kind == "parameter":
            self._drop(match.end())
            self._start_argument(match.groupdict())
            return self._go(self._in_value)
        if kind == "none":
            following = self._tag("invoke", "close")[0]
            if following == "wait":
                return False
            if following == "none" or self._strict:
                raise MalformedTurn(
                    "parameter",
                    f'expected <{DSML}parameter name="..." string="true|false"> or </{DSML}invoke>, each on a line, in '
                    f"the call of {self._name}",
                    in_call=True,
                )
            self._mend(Repair.UNCLOSED, "parameter", "a call is not closed")
        else:
            self._drop(match.end())
        call = ToolCall(self._name, self._arguments)
        self._events.append(CallFinished(len(self.turn.calls), call))
        self.turn.calls.append(call)
        return self._go(self._in_block)

    def _in_value(self) -> bool:
        pattern = _IN_VALUE if self._strict else _IN_VALUE_LOOSELY[self._exact]
        found = self._until(pattern, self._say_value, held=None if self._strict else _UNCLOSED_VALUE)
        if found is None:
            unclosed = None if self._strict or not self._final else _UNCLOSED_VALUE.match(self._text)
            if unclosed is None:
                return self._wait("value", f"the value of {self._key!r} in {self._name} is never closed")
            self._mend(Repair.UNCLOSED, "value", "a value is not closed")
            self._drop(len(self._text) - len(self._text.removeprefix("\n")))
        else:
            kind, match = self._tag("value end")
            if kind == "wait":
                return False
            if match is None:
                raise MalformedTurn(
                    "value",
                    f"the value of {self._key!r} in {self._name} has to end with <{PARAMETER_END}> and a line break",
                    in_call=True,
                )
            self._drop(match.end())
        self._arguments[self._key] = self._read_value("".join(self._value))
        return self._go(self._in_call)

    def _after(self) -> bool:
        """Behind the calls or the end of the turn."""
        if not self._final:
            return False
        rest = self._text.removeprefix(EOS) if self.turn.calls else self._text
        if rest:
            if DSML in rest:
                raise MalformedTurn("after", "there is a second block of calls behind the first", in_call=True)
            self._mend(
                Repair.TEXT_AFTER if rest.replace(EOS, "").strip() else Repair.WHITESPACE,
                "after",
                "there is text behind the calls" if self.turn.calls else "there is text behind the end of the turn",
                in_call=bool(self.turn.calls),
            )
        return self._go(self._over)

    def _over(self) -> bool:
        self._text = ""
        return False

    # What the states are made of.

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _drop(self, length: int) -> None:
        self._text = self._text[length:]

    def _wait(self, rule: str, fault: str, *, in_call: bool = True) -> bool:
        if self._final:
            raise MalformedTurn(rule, fault, in_call=in_call)
        return False

    def _until(self, pattern: Any, say: Callable[[str], None], held: Any = None) -> str | None:
        """Say what comes before the pattern, which is left; None, with all said that cannot be part of it, when it is
        not there yet. What may turn out to be ``held`` is left as well."""
        found = pattern.search(self._text, partial=not self._final)
        also = None if held is None else held.search(self._text, partial=not self._final)
        stop = min((match.start() for match in (found, also) if match is not None), default=len(self._text))
        whole = found is not None and not found.partial
        say(self._text[: found.start() if whole else stop])
        self._drop(found.start() if whole else stop)
        return found[0] if whole else None

    def _tag(self, *kinds: str) -> tuple[str, Any]:
        """Which tag comes next, with its match: as V4 writes it, else as it may be meant, which is a repair. ``wait``
        or ``none``, without a match, when that is not certain yet or none does."""
        if self._line_ends:
            if not self._text and not self._final:
                return "wait", None
            self._text = self._text.removeprefix("\n")
            self._line_ends = False
        for table in (_STRICT,) if self._strict else (_STRICT, _LOOSELY):
            found = {kind: table[kind].match(self._text, partial=not self._final) for kind in kinds if kind in table}
            for kind, match in found.items():
                if match is not None and not match.partial:
                    if table is _LOOSELY:
                        self._mend_tag(kind, match.groupdict())
                        self._line_ends = kind in ("open", "invoke", "value end", "invoke end")
                    return ("invoke end" if kind == "empty" else kind), match
            if any(found.values()):
                return "wait", None
        return "none", None

    def _mend_tag(self, kind: str, groups: dict[str, str | None]) -> None:
        repairs = []
        if kind == "bare":
            repairs.append(Repair.NO_WRAPPER)
        if groups.get("token") not in (None, DSML):
            repairs.append(Repair.BARS)
        if groups.get("wrapper") not in (None, "tool_calls"):
            repairs.append(Repair.WRAPPER)
        if _IN_ORDER.fullmatch(groups.get("attributes") or _IN_ORDER_EXAMPLE) is None:
            repairs.append(Repair.ATTRIBUTES)
        for repair in repairs or [Repair.WHITESPACE]:
            self._mend(repair, kind, "")

    def _mend(self, repair: Repair, rule: str, fault: str, *, in_call: bool = True) -> None:
        """Note a repair; strict, it is a fault."""
        if self._strict:
            raise MalformedTurn(rule, fault, in_call=in_call)
        if repair not in self.turn.repairs:
            self.turn.repairs.append(repair)
            self._events.append(Repaired(repair))

    def _say_reasoning(self, text: str) -> None:
        if text:
            self._reasoning.append(text)
            self._events.append(ReasoningDelta(text))

    def _say_content(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._events.append(ContentDelta(text))

    def _say_value(self, text: str) -> None:
        if text:
            self._value.append(text)
            self._events.append(ArgumentDelta(len(self.turn.calls), text))

    def _start_argument(self, groups: dict[str, str]) -> None:
        self._exact = groups.get("token", DSML) == DSML
        if "attributes" in groups:
            pairs = [(each["key"], each["value"][1:-1]) for each in _ATTRIBUTE.finditer(groups["attributes"])]
            groups = dict(pairs)
            if groups.keys() != {"name", "string"} or groups["string"] not in ("true", "false"):
                raise MalformedTurn(
                    "parameter", f'a parameter of {self._name} is not name="..." string="true|false"', in_call=True
                )
        self._key, self._is_string, self._value = groups["name"], groups["string"] == "true", []
        if self._key in self._arguments:
            raise MalformedTurn("duplicate", f"{self._name} has the parameter {self._key!r} twice", in_call=True)
        self._events.append(ArgumentStarted(len(self.turn.calls), self._key, self._is_string))

    def _read_value(self, text: str) -> Any:
        if self._is_string:
            return text
        try:
            return json.loads(text, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            fault = str(error)
        if not self._strict:
            with contextlib.suppress(ValueError):
                value = _nearly_json(text)
                self._mend(Repair.JSON, "json", fault)
                return value
        raise MalformedTurn(
            "json",
            f'the value of {self._key!r} in {self._name} is no JSON ({fault}); a string is marked string="true"',
            in_call=True,
        )


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON value")


def _nearly_json(text: str) -> Any:
    """The value of JSON with line breaks in strings, or with Python's commas, quotes and names. ``ValueError``."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text, strict=False, parse_constant=_refuse)
    if len(text) > MAX_LITERAL_CHARS:
        raise ValueError("too long to be tried")
    try:
        _check_tokens(text)
        value = ast.literal_eval(text.strip())
        return json.loads(json.dumps(_plain(value), allow_nan=False))
    except (SyntaxError, TypeError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ValueError(str(error)) from error


def _check_tokens(text: str) -> None:
    """Refuse what Python reads in another way than it looks: joined strings, prefixes, comments, other numbers."""
    last = None
    for token in tokenize.generate_tokens(io.StringIO(text.strip()).readline):
        joined = token.type == last == tokenize.STRING
        prefixed = token.type == tokenize.STRING and token.string[0] not in "\"'"
        number = token.type == tokenize.NUMBER and _NUMBER.fullmatch(token.string) is None
        if joined or prefixed or number or token.type == tokenize.COMMENT:
            raise ValueError(f"{token.string!r} cannot be read in one way only")
        last = token.type


_NUMBER = re.compile(r"(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")


def _plain(value: Any) -> Any:
    """The same value, ``TypeError`` when it has a part that JSON has not."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [_plain(item) for item in value]
        case dict() if all(isinstance(key, str) for key in value):
            return {key: _plain(item) for key, item in value.items()}
    raise TypeError(f"{value!r:.80} is no JSON value")
