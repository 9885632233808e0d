"""What ``StreamedEngine`` asks of a foreign serving engine: streams of tokens, and weights exchanged in a pause.

Shape letter: ``T`` tokens of one delta.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from posttrain.types import FinishReason, IntArray, Request

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The next tokens of one stream."""

    token_ids: Sequence[int]
    """[T]; includes the stop token that ended the stream."""
    logprobs: Sequence[float]
    """[T], under the distribution each token was drawn from; 0.0 for greedy decoding."""
    kept: Sequence[IntArray | None]
    """[T]: what truncated sampling chose from; None where it was not truncated."""
    finish: FinishReason | None = None
    """Set on the last delta, which may be empty."""
    versions: Sequence[int] | None = None
    """On the last delta, the weight version of every token of the whole stream, where the source counts it itself."""


class TokenSource(Protocol):
    """Generates tokens for many requests at once. All methods but ``stage`` are called in one event loop."""

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        ...

    @property
    def max_length(self) -> int:
        """The window: most tokens of a prompt and its completion together."""
        ...

    def check(self, request: Request) -> None:
        """Raise ``ValueError`` for a sampling that cannot be done here."""
        ...

    def stream(self, request: Request, so_far: Sequence[int], room: int) -> AsyncGenerator[Delta]:
        """Go on after the prompt and the tokens ``so_far``, for at most ``room`` tokens, at least one.

        It ends with a delta that has ``finish``. Closing the generator frees the request's place. Stop strings are
        the caller's. ``ValueError`` concerns this request; any other error means that the source is broken.
        """
        ...

    def stage(self, weights: Mapping[str, torch.Tensor], version: int) -> Any:
        """Put weights where ``load`` takes them from, in any thread, while tokens are generated.

        Raises ``ValueError`` when they are not those of this model.
        """
        ...

    async def pause(self) -> None:
        """Stop between two tokens; what was drawn is on its way to the streams. Streams may still be opened."""
        ...

    async def load(self, staged: Any, version: int) -> None:
        """Exchange the weights while paused. On return all that was drawn before has left the streams."""
        ...

    async def resume(self) -> None:
        """Go on with every stream, its states computed again by the new weights."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...
