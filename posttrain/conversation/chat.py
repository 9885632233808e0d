"""Conversations as tokens, by the model's own chat template, without ever re-tokenising what was said.

A conversation grows as tokens: the encoded prompt, what the policy generated, the encoded observations, and so on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.errors import RecipeError
from posttrain.types import IntArray, Message

_PROBE = "probe-7f3a"
"""Stands for the assistant's turn when the template is asked what follows one."""


class ChatFormat:
    """How one tokenizer and its template write conversations.

    Raises ``RecipeError`` when the tokenizer has no chat template, or when no single token ends a turn of the
    assistant in it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise RecipeError(
                f"tokenizer {tokenizer.name_or_path!r} has no chat template; expected an instruction-tuned model's; "
                "set tokenizer.chat_template and save it beside the model"
            )
        self._end = self._end_of_turn()

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

    def encode_observations(self, messages: Sequence[Message]) -> IntArray:
        """Tokens between an assistant's end-of-turn token and its next turn, shape [T].

        They are appended to a turn that ended with its end token. Raises ``RecipeError`` when the template
        rewrites earlier turns once a conversation goes on, so that nothing could be appended.
        """
        said: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        before = self._up_to_end(self.render(said, generation_prompt=False))
        after = self.render([*said, *messages], generation_prompt=True)
        if not after.startswith(before):
            raise RecipeError(
                f"chat template of {self.tokenizer.name_or_path!r}: text before a new message changes when messages "
                f"with roles {[m['role'] for m in messages]} follow; multi-turn rollouts need a template that only "
                "appends; use another template"
            )
        return self.encode(after[len(before) :])

    def decode(self, token_ids: IntArray | Sequence[int]) -> str:
        """Text of generated tokens, without special and end tokens."""
        stops = self.stop_ids
        kept = [int(i) for i in token_ids if int(i) not in stops]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def encode(self, text: str) -> IntArray:
        # The template writes the special tokens itself.
        return np.array(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def render(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [_template_message(m) for m in messages], tokenize=False, add_generation_prompt=generation_prompt
            )
        )

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


def _template_message(message: Message) -> dict[str, Any]:
    # Templates that show reasoning read it under this name.
    fields: dict[str, Any] = dict(message)
    if "reasoning" in fields:
        fields["reasoning_content"] = fields.pop("reasoning")
    return fields
