"""A tiny random model with a byte-level tokenizer, and fakes of the ports that episodes are played with.

The tokenizer knows one merge, ``ab``, so that a text has more than one way to be written in tokens: whoever
re-tokenises what a policy said gives itself away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.conversation.chat import ChatFormat
from posttrain.types import Completion, ExecResult, ExecStatus, FinishReason, Request, SandboxSpec

SPECIALS = ["<pad>", "<|user|>", "<|assistant|>", "<|tool|>", "<|system|>", "<|end|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_tokenizer(extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Bytes, the merge ``ab``, and the special tokens; ``extra`` adds tokens in front, which moves all ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*extra, *SPECIALS, *letters, "ab"])}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|end|>", additional_special_tokens=SPECIALS[1:5]
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@cache
def tiny_chat() -> ChatFormat:
    return ChatFormat(tiny_tokenizer())


def save_tiny_model(
    folder: Path, *, seed: int = 0, spread: float = 0.4, hidden_size: int = 32, extra: Sequence[str] = ()
) -> str:
    """A random Llama with its tokenizer; a wide ``spread`` of the weights gives peaked distributions."""
    tokenizer = tiny_tokenizer(extra)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=spread,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


END = tiny_tokenizer().get_vocab()["<|end|>"]


def spell(text: str) -> list[int]:
    """One token a byte, which is not how the tokenizer itself would write ``ab``."""
    vocabulary = tiny_tokenizer().get_vocab()
    core = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [vocabulary[letter] for letter in "".join(piece for piece, _ in core.pre_tokenize_str(text))]


Reply = str | list[int] | BaseException | float
"""A text to say (with its end token), exact tokens, an error to raise, or seconds to hang first."""


class ScriptedEngine:
    """An engine that says what it is told and remembers what it was shown.

    ``script`` gives the reply to a request. The log-probability of a token is minus its position in the whole
    sequence and its version is ``version`` plus its place in the completion, so that a misplaced one is seen.
    """

    def __init__(self, script: Callable[[Request], Reply], *, version: int = 5) -> None:
        self.version = version
        self.requests: list[Request] = []
        self._script = script

    async def generate(self, request: Request) -> Completion:
        self.requests.append(request)
        reply = self._script(request)
        if isinstance(reply, BaseException):
            raise reply
        if isinstance(reply, float):
            await asyncio.sleep(reply)
            reply = "late"
        wanted = [*spell(reply), END] if isinstance(reply, str) else reply
        given = wanted[: request.sampling.max_tokens]
        first = len(request.prompt_ids)
        return Completion(
            request_id=request.id,
            token_ids=np.array(given, np.int32),
            logprobs=-np.arange(first, first + len(given), dtype=np.float32),
            versions=np.arange(len(given), dtype=np.int32) + self.version,
            finish=FinishReason.STOP if given and given[-1] == END else FinishReason.LENGTH,
        )

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        self.version = version

    def close(self) -> None:
        """Nothing to free."""


@dataclass
class FakeBox:
    """A box whose commands are answered by a function; a file is what was written to it."""

    answer: Callable[[str], ExecResult]
    files: dict[str, bytes] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    async def exec(self, command: str | Sequence[str], **options: Any) -> ExecResult:
        self.commands.append(str(command))
        return self.answer(str(command))

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        if path not in self.files:
            raise FileNotFoundError(path)
        if len(self.files[path]) > max_bytes:
            raise ValueError(f"{path} is longer than {max_bytes} bytes")
        return self.files[path]

    async def write(self, path: str, data: bytes) -> None:
        self.files[path] = data

    async def list(self, path: str = ".") -> list[str]:
        return sorted(self.files)


@dataclass
class FakeSubstrate:
    """Opens fake boxes and counts how many are open; ``fail`` is raised at the opening of the first boxes."""

    answer: Callable[[str], ExecResult] = lambda command: said(f"ran {command}")
    failures: list[BaseException] = field(default_factory=list)
    boxes: list[FakeBox] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    name: str = "fake"

    def capabilities(self) -> Mapping[str, Any]:
        return {"isolation": "none"}

    def check(self) -> None:
        """Always there."""

    @contextlib.asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[FakeBox]:
        if self.failures:
            raise self.failures.pop(0)
        box = FakeBox(self.answer, dict(spec.files))
        self.boxes.append(box)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            yield box
        finally:
            self.num_open -= 1


def said(text: str, *, exit_code: int = 0) -> ExecResult:
    return ExecResult(status=ExecStatus.EXITED, exit_code=exit_code, stdout=text.encode())
