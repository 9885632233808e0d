"""The V4 wire format: conversations as DeepSeek-V4 writes them, in text and in tokens.

    BOS {effort prefix}{system} User {message} Assistant <think>{reasoning}</think>{content}{calls} EOS

There is no tool role: results are blocks of the user turn that follows the calls, in the order of the calls. With tools
declared all reasoning stays; without, a new user message drops the reasoning of earlier turns and earlier developer
messages. Control tokens are written by the format alone: where a message spells one it becomes ordinary tokens, except
in what an assistant said, where V4's parser could not read it back and it is refused (``Unwritable``).
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.conversation import v4_tokens as tokens
from posttrain.conversation.chat import tokens_before
from posttrain.conversation.dsml import SKELETON, Unwritable, calls_of, check_text, to_json, write_calls
from posttrain.conversation.dsml_parser import ParsedTurn, parse_turn
from posttrain.conversation.effort import HIGH, check_effort, prefix, thinks, wording
from posttrain.errors import RecipeError
from posttrain.tally import TALLY
from posttrain.types import BoolArray, IntArray, Message

_TEXT_TOKENS = re.compile("|".join(map(re.escape, tokens.TEXT)))


@dataclass(frozen=True, slots=True)
class Token:
    """A control token, where a plain string is text."""

    text: str


Segments = list[Token | str]
"""What a conversation is written as, from left to right."""


@dataclass(slots=True)
class _Turn:
    """What is written together: one message, or the user messages and tool results between two assistant turns."""

    role: str
    messages: list[Message] = field(default_factory=list)

    @property
    def last(self) -> Message:
        return self.messages[-1]

    @property
    def task(self) -> str | None:
        return self.last.get("task")

    @property
    def asks(self) -> bool:
        """Whether an assistant's turn may follow."""
        return self.role in ("user", "developer", "latest_reminder") or self.task is not None


class V4Format:
    """How one tokenizer writes conversations in the V4 format, in one effort mode.

    The tokenizer has to have the format's tokens (``posttrain.conversation.vocabulary``); ``RecipeError`` otherwise.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, effort: str = HIGH, drop_thinking: bool = True) -> None:
        self.tokenizer = tokenizer
        self.effort = check_effort(effort)
        self.drop_thinking = drop_thinking
        """Whether plain chat forgets earlier reasoning, as V4 does; with tools declared it never does."""
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in tokens.ALL if token not in vocabulary]
        if missing:
            raise RecipeError(
                f"tokenizer {tokenizer.name_or_path!r} lacks {len(missing)} tokens of the V4 format, such as "
                f"{missing[0]!r}; set Model.chat to 'v4', or add them with "
                "posttrain.conversation.vocabulary.prepare_tokenizer"
            )
        self._ids = {token: vocabulary[token] for token in tokens.ALL}
        if tokenizer.decode(self._encode_text("b")) != "b":
            raise RecipeError(
                f"tokenizer {tokenizer.name_or_path!r} adds white space to each piece of text; expected one that gives "
                "a text back exactly, such as a byte-level one; choose another model for the V4 format"
            )

    def at(self, effort: str | None) -> Self:
        """The same format in another effort mode; None: in this one."""
        if effort is None or effort == self.effort:
            return self
        other = copy.copy(self)
        other.effort = check_effort(effort)
        return other

    @property
    def thinking(self) -> bool:
        """Whether turns begin with reasoning."""
        return thinks(self.effort)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant turn."""
        ends = {self._ids[tokens.EOS], self.tokenizer.eos_token_id}
        return tuple(sorted(end for end in ends if end is not None))

    @cached_property
    def fingerprint(self) -> str:
        """Hash over vocabulary and wording. Models with equal fingerprints read each other's tokens."""
        content = json.dumps([sorted(self.tokenizer.get_vocab().items()), "v4", wording(), self.drop_thinking])
        return hashlib.sha256(content.encode()).hexdigest()

    def encode_prompt(self, messages: Sequence[Message]) -> IntArray:
        """Tokens of a conversation with the generation prompt at its end, shape [T].

        After an assistant's message that is marked ``wo_eos`` generation continues that message. Raises ``RecipeError``
        for a conversation the format has no place for, such as an unknown role.
        """
        return self.encode(self.write(messages))

    def encode_observations(self, messages: Sequence[Message], *, after: Sequence[Message] = ()) -> IntArray:
        """Tokens between an assistant's end-of-turn token and its next turn, shape [T].

        ``after`` is the conversation before them, as far as it is known. What it loses by them is a matter of
        ``forget``.
        """
        turns = _turns(messages, calls=_last_calls(after))
        if any(turn.role not in ("user", "latest_reminder") for turn in turns):
            raise RecipeError(
                f"observations have the roles {[m['role'] for m in messages]}: expected user, tool and latest_reminder"
            )
        return self.encode([*self._written(turns, keep=True), *self._header(turns[-1])])

    def forget(self, token_ids: IntArray, messages: Sequence[Message], *, after: Sequence[Message]) -> IntArray | None:
        """The tokens of the conversation ``after`` without its reasoning, where that is dropped when these messages
        follow; None where it is not.

        What is between ``<think>`` and ``</think>``, the first of them included, is cut out, and nothing is tokenised
        again.
        """
        asks = any(message["role"] in ("user", "developer") for message in messages)
        if not (asks and self._drops([*after, *messages])):
            return None
        opened, closed = (self._newest(token, token_ids) for token in (tokens.THINK, tokens.END_THINK))
        return token_ids[opened <= closed]

    def _newest(self, token: str, token_ids: IntArray) -> IntArray:
        """By position, where this token came up last; -1 before it did."""
        return np.maximum.accumulate(np.where(token_ids == self._ids[token], np.arange(len(token_ids)), -1))

    def encode_demonstration(self, messages: Sequence[Message]) -> list[tuple[IntArray, BoolArray]]:
        """Token sequences with a mask, both [T], that is True on what the assistant says.

        One sequence, unless reasoning is dropped on the way: then the turn that follows starts a new one with the
        context it would really see. Each assistant turn carries loss exactly once, except those marked ``mask``. What
        follows the last one is left out. The first message may name the ``effort`` all of it is written in.
        """
        chat = self.at(messages[0].get("effort") if messages else None)
        sequences: list[tuple[list[int], list[bool]]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("mask"):
                continue
            prompt = messages[:index]
            context = chat.encode_prompt(prompt).tolist()
            thinking = chat.thinking and prompt[-1].get("task") is None
            said = chat.encode(chat._said(message, thinking=thinking)).tolist()
            if not sequences or context[: len(sequences[-1][0])] != sequences[-1][0]:
                sequences.append(([], []))
            ids, mask = sequences[-1]
            mask += [False] * (len(context) - len(ids)) + [True] * len(said)
            ids += context[len(ids) :] + said
        return [(np.array(ids, np.int32), np.array(mask, np.bool_)) for ids, mask in sequences]

    def decode(self, token_ids: IntArray | Sequence[int]) -> str:
        """Text of a generated turn without its end token, from its first ``<think>`` on where it begins with reasoning.

        Control tokens within it stay visible.
        """
        start = tokens.THINK if self.thinking else ""
        return start + self._text(token_ids).removesuffix(tokens.EOS)

    def num_reasoning(self, token_ids: IntArray) -> int:
        """Tokens of a generated turn before its ``</think>``."""
        return tokens_before(self._ids[tokens.END_THINK], token_ids) if self.thinking else 0

    def parse(self, token_ids: IntArray | Sequence[int], *, strict: bool = True) -> ParsedTurn:
        """What a generated turn says. ``MalformedTurn`` when it cannot be read."""
        return parse_turn(self._text(token_ids), thinking=self.thinking, strict=strict)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> str:
        """A conversation as text."""
        written = self.write(messages, generation_prompt=generation_prompt)
        return "".join(part.text if isinstance(part, Token) else part for part in written)

    def encode(self, segments: Segments) -> IntArray:
        """Tokens of what was written, shape [T]."""
        ids: list[int] = []
        for part in _joined(segments):
            ids += [self._ids[part.text]] if isinstance(part, Token) else self._encode_text(part)
        return np.array(ids, np.int32)

    def write(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> Segments:
        """A conversation as text and control tokens."""
        turns = _turns(messages)
        _check_order(turns)
        keep = not self._drops(messages)
        if not keep:
            last = _last_question(turns)
            turns = [turn for i, turn in enumerate(turns) if turn.role != "developer" or i >= last]
        segments: Segments = [Token(tokens.BOS), prefix(self.effort), *self._written(turns, keep=keep)]
        if generation_prompt:
            if not turns[-1].asks and not turns[-1].last.get("wo_eos"):
                raise RecipeError("the conversation ends with an assistant's message, so nothing is asked of it")
            segments += self._header(turns[-1])
        return segments

    def _text(self, token_ids: IntArray | Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                [int(i) for i in token_ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _drops(self, messages: Sequence[Message]) -> bool:
        return self.thinking and self.drop_thinking and not any(message.get("tools") for message in messages)

    def _written(self, turns: Sequence[_Turn], *, keep: bool) -> Segments:
        """Turns with the headers between them. Unless reasoning is kept, only that after the last question is."""
        last = _last_question(turns)
        segments: Segments = []
        for index, turn in enumerate(turns):
            if turn.role == "assistant":
                thinking = self.thinking and (keep or index > last)
                # What it answers is gone where that was an earlier developer message, and so is the header.
                asked = turns[index - 1] if index and turns[index - 1].asks else None
                segments += [] if asked is None else self._header(asked, thinking=thinking)
                segments += self._said(turn.last, thinking=thinking and (asked is None or asked.task is None))
            else:
                segments += _heard(turn)
        return segments

    def _header(self, turn: _Turn, *, thinking: bool | None = None) -> Segments:
        """What comes between a turn and the assistant's answer to it."""
        thinking = self.thinking if thinking is None else thinking
        begin: Segments = [Token(tokens.ASSISTANT), Token(tokens.THINK if thinking else tokens.END_THINK)]
        if turn.task is not None:
            return [*(begin if turn.task == "action" else ()), Token(tokens.TASKS[turn.task])]
        return begin if turn.asks else []

    def _said(self, message: Message, *, thinking: bool) -> Segments:
        segments: Segments = []
        if thinking:
            segments += [_sayable(message.get("reasoning") or "", "reasoning"), Token(tokens.END_THINK)]
        segments.append(_sayable(message["content"] or "", "content"))
        calls = calls_of(message)
        if calls:
            segments += ["\n\n", *_marked(write_calls(calls), tokens.DSML)]
        return segments if message.get("wo_eos") else [*segments, Token(tokens.EOS)]

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        """Any token of the tokenizer that is taken out of a text before it is split."""
        added = sorted({*self.tokenizer.get_added_vocab(), *tokens.ALL}, key=len, reverse=True)
        return re.compile("|".join(re.escape(token) for token in added if len(token) > 1))

    def _encode_text(self, text: str) -> list[int]:
        """Ordinary tokens of a text, also where it spells a control token: that is encoded in two parts."""
        ids: list[int] = []
        start = 0
        for found in self._cuts(text):
            ids += self.tokenizer(text[start:found], add_special_tokens=False)["input_ids"]
            start = found
        return ids + list(self.tokenizer(text[start:], add_special_tokens=False)["input_ids"] if text[start:] else ())

    def _cuts(self, text: str) -> Iterator[int]:
        found = self._spelled.search(text)
        while found is not None:
            TALLY.add("spelled_tokens")
            yield found.start() + 1
            found = self._spelled.search(text, found.start() + 1)


def _turns(messages: Sequence[Message], *, calls: Sequence[str] = ()) -> list[_Turn]:
    """Messages as turns; ``calls`` are the ids of the calls made last before them."""
    turns: list[_Turn] = []
    for message in messages:
        role = message["role"]
        if role not in ("system", "user", "developer", "assistant", "tool", "latest_reminder"):
            raise RecipeError(
                f"message with role {role!r}: expected system, user, developer, assistant, tool or latest_reminder"
            )
        task = message.get("task")
        if task is not None and task not in tokens.TASKS:
            raise RecipeError(f"message with task {task!r}: expected one of {', '.join(tokens.TASKS)}")
        role = "user" if role == "tool" else role
        if role == "user" and turns and turns[-1].role == "user" and turns[-1].task is None:
            turns[-1].messages.append(message)
        else:
            turns.append(_Turn(role, [message]))
    for turn in turns:
        if turn.role == "assistant":
            calls = _ids(turn.last)
        turn.messages = _in_call_order(turn.messages, calls)
    return turns


def _ids(message: Message) -> list[str]:
    return [call.id for call in calls_of(message) if call.id]


def _last_calls(messages: Sequence[Message]) -> list[str]:
    return next((_ids(message) for message in reversed(messages) if message["role"] == "assistant"), [])


def _in_call_order(messages: list[Message], calls: Sequence[str]) -> list[Message]:
    """The same with the tool results, in the places they have, in the order of their calls."""
    results = [message for message in messages if message["role"] == "tool" and message.get("tool_call_id")]
    if len(results) < 2 or not calls:
        return messages
    strangers = [message["tool_call_id"] for message in results if message["tool_call_id"] not in calls]
    if strangers:
        raise RecipeError(f"tool_call_id {strangers[0]!r} answers none of the calls before it, {list(calls)}")
    ordered = iter(sorted(results, key=lambda message: calls.index(message["tool_call_id"])))
    return [next(ordered) if message in results else message for message in messages]


def _check_order(turns: Sequence[_Turn]) -> None:
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > 0:
            raise RecipeError(f"message {index} is a second system message; the V4 format has one, at the start")
        if turn.role == "assistant" and (index == 0 or not turns[index - 1].asks):
            raise RecipeError(
                f"message {index} is an assistant's but follows none that asks; put a user message before it"
            )
        for message in turn.messages:
            misplaced = {"tools", "response_format"} & message.keys()
            if misplaced and message["role"] not in ("system", "developer"):
                raise RecipeError(f"{min(misplaced)} is on a {message['role']} message; put it on the system message")
    if not turns or not (turns[-1].asks or turns[-1].role == "assistant"):
        raise RecipeError("the conversation asks nothing; add a user message")


def _last_question(turns: Sequence[_Turn]) -> int:
    return max((i for i, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)


def _heard(turn: _Turn) -> Segments:
    """A turn that is not the assistant's."""
    segments: Segments = []
    if turn.role == "latest_reminder":
        segments.append(Token(tokens.REMINDER))
    elif turn.role != "system":
        segments.append(Token(tokens.USER))
    segments.append("\n\n".join(map(_block, turn.messages)))
    if turn.last.get("tools"):
        segments += ["\n\n", *_declared(turn.last["tools"])]
    if turn.last.get("response_format") is not None:
        schema = to_json(turn.last["response_format"], "response_format")
        segments.append("\n\n" + str(wording()["response_format"]["text"]).format(schema=schema))
    if "url" in turn.last:
        segments += [Token(tokens.EXTRACTED_URL), check_text(turn.last["url"], "url")]
    return segments


def _block(message: Message) -> str:
    text = check_text(message["content"] or "", f"content of a {message['role']} message")
    return f"<tool_result>{text}</tool_result>" if message["role"] == "tool" else text


def _declared(tools: Iterable[Mapping[str, Any]]) -> Segments:
    """What the model is told of its tools; tags in it are tokens, in the schemas they are text."""
    text = str(wording()["tools"]["text"])
    before, after = text.split("{schemas}")
    before = before.format(skeleton=SKELETON, think=tokens.THINK, end_think=tokens.END_THINK)
    schemas = "\n".join(to_json(dict(tool.get("function", tool)), "tools") for tool in tools)
    return [*_marked(before, *tokens.TEXT), schemas, *_marked(after, *tokens.TEXT)]


def _marked(text: str, *marks: str) -> Segments:
    """A text in which these spellings are tokens."""
    parts = re.split(f"({'|'.join(map(re.escape, marks))})", text)
    return [Token(part) if part in marks else part for part in parts]


def _sayable(text: str, where: str) -> str:
    """What an assistant says outside of calls. ``Unwritable`` when V4's parser could not read it back."""
    text = check_text(text, where)
    for token in tokens.FORBIDDEN:
        if token in text:
            raise Unwritable(
                "special",
                f"the {where} of an assistant's message contains {token!r} at {text.index(token)}, which V4 reads as "
                "part of the format; change the message or leave it out",
            )
    return text


def _joined(segments: Segments) -> Segments:
    """The same with texts that follow one another in one piece."""
    joined: Segments = []
    for part in segments:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        elif part:
            joined.append(part)
    return joined
