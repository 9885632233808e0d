"""What a long episode forgets so that it can go on: the context management of V3.2's agents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from posttrain.protocols import ConversationFormat
from posttrain.types import IntArray, Message, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextClearing:
    """When the window is nearly full, the oldest of the conversation goes and the episode continues in a new sequence.

    What the policy said is kept as its own tokens, and every sequence is trained on. ``what="turns"`` with ``share``
    0.75 is V3.2's Discard-75%, with 1 its Discard-all (arXiv 2512.02556, context management of search agents). Where
    the share does not bring the conversation below ``at``, all but the newest turn goes; where that does not either,
    it goes on until the window is full and the rollout ends with ``StopReason.LENGTH``.

    Raises ``ValueError`` for shares out of range.
    """

    at: float = 0.8
    """Share of the window (``Domain.max_sequence_tokens``) from which on something is cleared."""
    share: float = 0.75
    """Oldest part of the turns that is cleared, rounded up. 1 with ``turns`` leaves the task alone; everywhere else
    the newest turn and its results stay, since the policy has not read them yet."""
    what: Literal["results", "turns"] = "results"
    """``results``: a note takes the place of what tools answered. ``turns``: calls and answers go altogether."""
    note: str = "(cleared to make room; call the tool again if it is needed)"
    """What stands for a result that was cleared."""

    def __post_init__(self) -> None:
        for name in ("at", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"ContextClearing.{name} = {getattr(self, name)}: expected a number in (0, 1]")
        if self.what not in ("results", "turns"):
            raise ValueError(f"ContextClearing.what = {self.what!r}: expected 'results' or 'turns'")

    def steps(self, num_turns: int) -> Sequence[int]:
        """How many of the oldest turns to clear, and how many if that is not enough."""
        if self.share == 1 and self.what == "turns":
            return (num_turns,)
        return sorted({min(math.ceil(self.share * num_turns), num_turns - 1), num_turns - 1})

    def context(
        self, prompt: Sequence[Message], turns: Sequence[Turn], oldest: int, chat: ConversationFormat
    ) -> IntArray:
        """The conversation up to where the policy speaks next, its ``oldest`` turns cleared, shape [T]."""
        ids, said = chat.encode_prompt(prompt), list(prompt)
        for index, turn in enumerate(turns):
            if index < oldest and self.what == "turns":
                continue
            heard = [self._cleared(each) if index < oldest else each for each in turn.observations]
            said.append({"role": "assistant", "content": turn.text})
            ids = np.concatenate([ids, turn.completion.token_ids])
            remembered = chat.forget(ids, heard, after=said)
            ids = np.concatenate(
                [ids if remembered is None else remembered, chat.encode_observations(heard, after=said)]
            )
            said += heard
        return ids.astype(np.int32)

    def _cleared(self, message: Message) -> Message:
        return {**message, "content": self.note} if message["role"] == "tool" else message
