"""Conversations as tokens, by the model's own chat template, without ever re-tokenising what was said.

A conversation grows as tokens: the encoded prompt, what the policy generated, the encoded observations, and so on.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.conversation.effort import prefix, thinks
from posttrain.errors import RecipeError
from posttrain.types import BoolArray, IntArray, Message

_PROBE = "probe-7f3a"
"""Stands for the assistant's turn when the template is asked what follows one."""


class ChatFormat:
    """How one tokenizer and its template write conversations, perhaps in one effort mode.

    A mode switches the template's reasoning on or off, under the names ``enable_thinking`` and ``thinking`` that
    templates have for it, and says its prefix before the system text.

    Raises ``RecipeError`` when the tokenizer has no chat template, or when no single token ends a turn of the
    assistant in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.effort: str | None = None
        if not tokenizer.chat_template:
            raise RecipeError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; expected an instruction-tuned model's; "
                "set tokenizer.chat_template and save it beside the model"
            )
        self._end = self._end_of_turn()

    def at(self, effort: str | None) -> Self:
        """The same format in an effort mode; None: in this one."""
        if effort is None or effort == self.effort:
            return self
        other = copy.copy(self)
        other.effort = effort
        return other

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant turn: the template's own, and the tokenizer's end of text."""
        vocabulary = self.tokenizer.get_vocab()
        ends = {self._end, self.tokenizer.eos_token or self._end}
        return tuple(sorted(vocabulary[token] for token in ends))

    @cached_property
    def fingerprint(self) -> str:
        """Hash over vocabulary and template. Models with equal fingerprints read each other's tokens."""
        content = json.dumps([sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template])
        return hashlib.sha256(content.encode()).hexdigest()

    def encode_prompt(self, messages: Sequence[Message]) -> IntArray:
        """Tokens of a conversation with the generation prompt at its end, shape [T]."""
        return self.encode(self.render(messages, generation_prompt=True))

    def encode_observations(self, messages: Sequence[Message], *, after: Sequence[Message] = ()) -> IntArray:
        """Tokens between an assistant's end-of-turn token and its next turn, shape [T].

        They are appended to a turn that ended with its end token. Raises ``RecipeError`` when the template
        rewrites earlier turns once a conversation goes on, so that nothing could be appended.
        """
        said: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        before = self._up_to_end(self.render(said, generation_prompt=False))
        whole = self.render([*said, *messages], generation_prompt=True)
        if not whole.startswith(before):
            raise RecipeError(
                f"chat template of {self.tokenizer.name_or_path!r}: text before a new message changes when messages "
                f"with roles {[m['role'] for m in messages]} follow; multi-turn rollouts need a template that only "
                "appends; use another template"
            )
        return self.encode(whole[len(before) :])

    def forget(self, token_ids: IntArray, messages: Sequence[Message], *, after: Sequence[Message]) -> None:
        """Nothing: a template that rewrites earlier turns is refused by ``encode_observations``."""

    def encode_demonstration(self, messages: Sequence[Message]) -> list[tuple[IntArray, BoolArray]]:
        """Token sequences with a mask, both [T], that is True on what the assistant says.

        One sequence, unless the template rewrites earlier turns (some drop past reasoning): then the turn that follows
        starts a new sequence with the context it would really see. Each assistant turn carries loss exactly once,
        except those marked ``mask``. What follows the last one is left out.
        """
        chat = self.at(messages[0].get("effort") if messages else None)
        stops = self.tokenizer.convert_ids_to_tokens(list(self.stop_ids))
        sequences: list[tuple[list[int], list[bool]]] = []
        seen = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("mask"):
                continue
            context = chat.render(messages[:index], generation_prompt=True)
            turn = _turn_text(context, chat.render(messages[: index + 1], generation_prompt=False), stops)
            if not sequences or not context.startswith(seen):
                sequences.append(([], []))
                seen = ""
            context_ids, turn_ids = self.encode(context[len(seen) :]).tolist(), self.encode(turn).tolist()
            ids, mask = sequences[-1]
            ids += context_ids + turn_ids
            mask += [False] * len(context_ids) + [True] * len(turn_ids)
            seen = context + turn
        return [(np.array(ids, np.int32), np.array(mask, np.bool_)) for ids, mask in sequences]

    def decode(self, token_ids: IntArray | Sequence[int]) -> str:
        """Text of generated tokens, without special and end tokens."""
        stops = self.stop_ids
        kept = [int(i) for i in token_ids if int(i) not in stops]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def num_reasoning(self, token_ids: IntArray) -> int:
        """Tokens of a generated turn before its ``</think>``; 0 where that is no token of the tokenizer's, or where the
        mode does not think."""
        end = self.tokenizer.get_vocab().get("</think>")
        if end is None or (self.effort is not None and not thinks(self.effort)):
            return 0
        return tokens_before(end, token_ids)

    def encode(self, text: str) -> IntArray:
        # The template writes the special tokens itself.
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        tools = [dict(tool) for message in messages for tool in message.get("tools", ())]
        return str(
            self.tokenizer.apply_chat_template(
                [_template_message(m) for m in _with_prefix(messages, self.effort)],
                tools=tools or None,  # type: ignore[arg-type]
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._switches(),
            )
        )

    def _switches(self) -> Mapping[str, Any]:
        if self.effort is None:
            return {}
        return dict.fromkeys(("enable_thinking", "thinking"), thinks(self.effort))

    def _up_to_end(self, rendered: str) -> str:
        """A rendered conversation, cut behind the end token of its last assistant turn."""
        end = rendered.index(self._end, rendered.rindex(_PROBE)) + len(self._end)
        return rendered[:end]

    def _end_of_turn(self) -> str:
        said: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        rendered = self.render(said, generation_prompt=False)
        tail = rendered[rendered.rindex(_PROBE) + len(_PROBE) :] if _PROBE in rendered else ""
        special = self.tokenizer.all_special_tokens + list(self.tokenizer.get_added_vocab())
        ends = [token for token in special if token and tail.lstrip().startswith(token)]
        if not ends:
            raise RecipeError(
                f"chat template of {self.tokenizer.name_or_path!r}: an assistant turn is followed by {tail!r}; "
                "expected a special token that ends it; add one to the template and the tokenizer"
            )
        return max(ends, key=len)


def _with_prefix(messages: Sequence[Message], effort: str | None) -> Sequence[Message]:
    said = prefix(effort) if effort is not None else ""
    # Where observations are encoded, the conversation has begun before.
    if not said or not messages:
        return messages
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": said + messages[0]["content"]}, *messages[1:]]
    return [{"role": "system", "content": said.rstrip()}, *messages]


def tokens_before(end: int, token_ids: IntArray) -> int:
    """How many tokens come before the first ``end``; all where there is none."""
    found = np.flatnonzero(np.asarray(token_ids) == end)
    return int(found[0]) if len(found) else len(token_ids)


def _turn_text(context: str, rendered: str, stops: Sequence[str]) -> str:
    """What the policy has to write after ``context``, its stop token included."""
    if not rendered.startswith(context):
        raise RecipeError(
            "the chat template does not continue its own generation prompt when an assistant message follows, so the "
            "tokens to imitate cannot be told apart; fix the template"
        )
    turn = rendered[len(context) :]
    end = max((turn.rfind(stop) + len(stop) for stop in stops if stop in turn), default=0)
    if end == 0:
        raise RecipeError(
            f"the chat template ends an assistant message with {turn[-20:]!r}, without any of the stop tokens {stops}; "
            "the model would never learn to stop. Fix the template"
        )
    return turn[:end]


def _template_message(message: Message) -> dict[str, Any]:
    # Templates that show reasoning read it under this name.
    fields: dict[str, Any] = dict(message)
    if "reasoning" in fields:
        fields["reasoning_content"] = fields.pop("reasoning")
    return fields
