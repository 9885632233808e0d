"""The token journal: a write-ahead log of every generated token (DeepSeek-V4, section 5.2, rollout service)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from posttrain.types import Completion, FinishReason, IntArray, KeptTokens, Request, RouteArray


@dataclass(slots=True, eq=False)
class Progress:
    """A request's tokens so far. The engine appends to the lists, then tells the journal."""

    request: Request
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    kept: list[IntArray | None] = field(default_factory=list)
    """What truncated sampling chose from, per token; None where it was not truncated."""
    finish: FinishReason | None = None
    routes: RouteArray | None = None
    """``Completion.routes``, once it has finished. Not recorded: they are those of the states, which are not either."""
    recorded: int = 0
    """How many of the tokens the journal holds."""
    slot: int = -1
    """The journal's own number for the request."""

    def completion(self) -> Completion:
        """What whoever asked is given, once the request has finished."""
        assert self.finish is not None
        return Completion(
            request_id=self.request.id,
            token_ids=np.array(self.token_ids, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            versions=np.array(self.versions, np.int32),
            finish=self.finish,
            kept=KeptTokens.of(self.kept),
            routes=self.routes,
        )


class Journal(Protocol):
    """Where an engine records tokens before anyone sees them. Any engine can use one."""

    def begin(self, request: Request) -> Progress:
        """What is known of a request; empty for a new one.

        A request is the same when id, prompt, sampling and seed are. Called from any thread.
        """
        ...

    def append(self, rows: Sequence[Progress]) -> None:
        """Record what these rows gained since they were last recorded, and how they finished, in one write.

        On return the death of the process loses nothing; see ``when_durable`` for the death of the machine.
        Raises ``OSError`` when they cannot be written. Rows of requests that were forgotten meanwhile are left out.
        """
        ...

    def when_durable(self, callback: Callable[[], None], failed: Callable[[OSError], None] | None = None) -> None:
        """Call back, from another thread, as soon as all that was appended until now is on the disk.

        If it cannot be brought there, ``failed`` hears why instead and ``append`` raises from then on.
        """
        ...

    def forget(self, prefix: str) -> None:
        """The requests whose ids start with this are complete and recorded elsewhere; their tokens may go."""
        ...

    def close(self) -> None: ...


class NoJournal:
    """Keeps nothing: for evaluations that would rather start over."""

    def begin(self, request: Request) -> Progress:
        return Progress(request)

    def append(self, rows: Sequence[Progress]) -> None:
        pass

    def when_durable(self, callback: Callable[[], None], failed: Callable[[OSError], None] | None = None) -> None:
        callback()

    def forget(self, prefix: str) -> None:
        pass

    def close(self) -> None:
        pass
