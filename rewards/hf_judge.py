"""A judge that is a Hugging Face model in this process, answering all questions of the moment in one batch."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from posttrain.errors import JudgeError
from posttrain.tally import TALLY
from posttrain.types import Message
from rewards.judge import MET, UNMET

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from posttrain.conversation.chat import ChatFormat
    from posttrain.rollout.player import EngineAsk


@dataclass(frozen=True, slots=True, kw_only=True)
class HFJudge:
    """Implements ``posttrain.protocols.Judge`` with the embedded engine, in a thread of its own.

    A value: it pickles, and the model is loaded where and when it is first asked, once a process. Models without full
    attention in every layer are for an endpoint (``transformers serve``, vLLM) and ``EndpointJudge``. Raises
    ``UnreadableReply`` for a reply cut off by its budget, ``JudgeError`` for a question longer than the window.
    """

    path: str
    """A local folder, a hub name, ``package:IMPORT/sub/path``, or any of these ending in ``.gguf``."""
    temperature: float = 0.5
    """Above 0, so that another seed can give another reply."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_batch_size: int = 16
    max_length: int | None = None
    """Window, question and reply together; None takes the model's."""
    forced: bool = False
    """For models too small to keep to a form: say, without evidence, whichever of the ``line`` dialect's two replies is
    the likelier to the model. The same for every seed."""

    @property
    def identity(self) -> str:
        """What its replies depend on, besides the question."""
        return f"{self.path} {self.dtype} {self.temperature} {self.forced}"

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        if self.forced:
            TALLY.add("judge/calls")
            return await asyncio.to_thread(_likelier, self, messages)
        ask = await asyncio.to_thread(_loaded, self)
        TALLY.add("judge/calls")
        try:
            reply = await ask(messages, max_tokens=max_tokens, temperature=self.temperature, seed=seed)
        except ValueError as error:
            raise JudgeError(f"judge {self.path!r} cannot be asked this: {error}") from error
        TALLY.add("judge/replies")
        return reply


_ENGINES: dict[HFJudge, EngineAsk] = {}
_MODELS: dict[HFJudge, tuple[PreTrainedModel, ChatFormat]] = {}
_LOADING = threading.Lock()


def _loaded(judge: HFJudge) -> EngineAsk:
    with _LOADING:
        if judge not in _ENGINES:
            _ENGINES[judge] = _load(judge)
        return _ENGINES[judge]


def _likelier(judge: HFJudge, messages: Sequence[Message]) -> str:
    """The reply of the line dialect that the model gives more probability, from its first token on to its end."""
    import torch

    content = messages[0]["content"]
    if len(messages) != 1 or not content.startswith("Judge "):
        raise JudgeError("HFJudge.forced is for LineDialect(); this question is in another dialect")
    with _LOADING:
        if judge not in _MODELS:
            _MODELS[judge] = _model(judge)
        model, chat = _MODELS[judge]
        nonce = content.split()[1]
        replies = [f'"" {nonce} {label}' for label in (UNMET, MET)]
        with torch.inference_mode():
            scores = _logprobs(model, chat, chat.render(messages, generation_prompt=True), replies)
    return max(zip(scores, replies, strict=True))[1]


def _logprobs(model: PreTrainedModel, chat: ChatFormat, asked: str, replies: Sequence[str]) -> list[float]:
    """Of each reply and the end of its turn, in nats. The question is computed once."""
    import torch

    start = len(chat.encode(asked))
    rows = [
        torch.as_tensor([*chat.encode(asked + reply), chat.stop_ids[0]], dtype=torch.long, device=model.device)
        for reply in replies
    ]
    shared = model(rows[0][None, : start - 1], use_cache=True).past_key_values
    scores = []
    for ids in rows:
        cache = copy.deepcopy(shared)
        logits = model(ids[None, start - 1 :], past_key_values=cache, use_cache=True).logits[0, :-1].float()
        scores.append(float(logits.log_softmax(-1).gather(1, ids[start:, None]).sum()))
    return scores


def _load(judge: HFJudge) -> EngineAsk:
    from posttrain.engine.transformers_engine import TransformersEngine
    from posttrain.rollout.player import EngineAsk

    model, chat = _model(judge)
    engine = TransformersEngine(
        model,
        stop_ids=chat.stop_ids,
        max_batch_size=judge.max_batch_size,
        max_length=judge.max_length,
    )
    return EngineAsk(engine=engine, chat=chat)


def _model(judge: HFJudge) -> tuple[PreTrainedModel, ChatFormat]:
    import torch

    from posttrain.conversation.chat import ChatFormat
    from posttrain.models import compute_dtype, load_model, load_tokenizer

    chat = ChatFormat(load_tokenizer(judge.path))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(judge.path, torch.float32)
    model = torch.nn.Module.to(model, device, compute_dtype(judge.dtype, model.num_parameters(), device))
    return model.eval(), chat
