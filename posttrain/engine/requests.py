"""What every engine asks of a request, and how it knows one again."""

from __future__ import annotations

from posttrain.types import Request, Sampling

RequestKey = tuple[str, bytes, Sampling, int]


def request_key(request: Request) -> RequestKey:
    """Equal for requests that want the same completion, so that an engine answers them once."""
    return request.id, request.prompt_ids.tobytes(), request.sampling, request.seed


def check_prompt(request: Request, *, window: int, vocabulary: int) -> None:
    """Raise ``ValueError`` for a prompt that is empty, fills the window or holds ids outside the vocabulary."""
    ids = request.prompt_ids
    if not 0 < len(ids) < window:
        raise ValueError(
            f"request {request.id!r}: prompt of {len(ids)} tokens in a window of {window}; expected at least 1 and at "
            f"most {window - 1}; shorten the prompt or raise the window"
        )
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"request {request.id!r}: token ids from {ids.min()} to {ids.max()}; expected 0 to {vocabulary - 1}; "
            "encode the prompt with this model's tokenizer"
        )
