"""When a completion is over, whatever engine makes it: stop tokens, and stop strings found in its decoded tail."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from posttrain.types import FinishReason, Sampling

Decode = Callable[[Sequence[int]], str]

_CUT_CHARACTER = "\ufffd"
_CHARACTER_BYTES = 4
"""Most bytes of one character in UTF-8."""
_SLACK_TOKENS = 2 * _CHARACTER_BYTES
"""Tokens decoded before the first that could hold part of a stop string. Some tokenizers drop the space in front of
the first token they decode, and a tail that begins inside a character loses up to three more tokens."""


class StopRule:
    """Says after each token whether the completion is over. It keeps nothing between calls, so one serves all rows.

    ``stop_ids`` are the model's own end-of-turn tokens. ``decode`` turns token ids into text; without it stop strings
    are refused. Each token is taken to hold at least one byte of the text, so that the work per call is bounded by the
    longest stop string and not by the completion. Where ``decode`` leaves special tokens out, more of them than the
    slack in the middle of a stop string hide it.
    """

    def __init__(self, stop_ids: Iterable[int], decode: Decode | None = None) -> None:
        self._stop_ids = frozenset(stop_ids)
        self._decode = decode

    def check(self, sampling: Sampling) -> None:
        """Raise ``ValueError`` for stop strings that this rule cannot look for; worth a call before the first token."""
        if sampling.stop and self._decode is None:
            raise ValueError(
                f"Sampling.stop = {sampling.stop!r}, but this engine was given no tokenizer to decode with; expected "
                "no stop strings. Give the engine a decode function, or use Sampling.stop_token_ids"
            )

    def finish(self, sampling: Sampling, token_ids: list[int]) -> FinishReason | None:
        """STOP when the last token of the completion ended it, else None; to be called after every token.

        ``token_ids`` are the completion's tokens without the prompt's. The token that completes a stop string stays,
        with what follows the string inside it. Raises ``ValueError`` as ``check`` does.
        """
        if not token_ids:
            return None
        last = token_ids[-1]
        if last in self._stop_ids or last in sampling.stop_token_ids:
            return FinishReason.STOP
        if sampling.stop:
            self.check(sampling)
            return FinishReason.STOP if self._says(sampling.stop, token_ids) else None
        return None

    def _says(self, strings: Sequence[str], token_ids: list[int]) -> bool:
        """Whether the tail holds one of the strings. An earlier one would have ended the completion then."""
        assert self._decode is not None, "checked by the caller"
        tail = token_ids[-(max(len(string.encode()) for string in strings) + _SLACK_TOKENS) :]
        for start in range(_CHARACTER_BYTES):
            text = self._decode(tail[start:])
            if any(string in text for string in strings):
                return True
            # A decoder of byte tokens gives up on a whole run of them that begins inside a character.
            if not text.startswith(_CUT_CHARACTER):
                return False
        return False
