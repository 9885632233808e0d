"""What a journal holds of one request, put together from the segments of all lives and writers."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from hashlib import blake2b
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.engine.journal import Progress
from posttrain.engine.segments import DIGEST_BYTES, Begin, Columns, Part, token_bytes
from posttrain.types import FinishReason, Request

Span = tuple[int, int]
"""First position and the one after the last."""


@dataclass(slots=True, eq=False)
class Held:
    """A request that was not forgotten. ``progress`` is None until an engine of this process begins it."""

    begin: Begin
    parts: dict[Path, Part] = field(default_factory=dict)
    """What was read, by segment; dropped when it becomes progress."""
    columns: Columns | None = None
    """The longest prefix without a gap."""
    finish: FinishReason | None = None
    """How it finished, as recorded."""
    duplicates: int = 0
    """Tokens that were recorded more than once, copies left out."""
    gap: bool = False
    """Whether there are tokens behind the prefix."""
    progress: Progress | None = None
    slot: int = -1

    @property
    def recorded(self) -> int:
        if self.progress is not None:
            return self.progress.recorded
        return 0 if self.columns is None else len(self.columns)

    def merge(self) -> None:
        """Put the parts together. ``ValueError`` when two of them differ in a token."""
        joined = Columns.join([part.columns for part in self.parts.values()])
        ordered = joined.take(np.argsort(joined.positions, kind="stable"))
        again = np.diff(ordered.positions) == 0
        conflicts = np.flatnonzero(again & (np.diff(ordered.tokens) != 0))
        if len(conflicts):
            raise self._conflict(ordered, int(conflicts[0]))
        originals = ordered.positions[~ordered.copied]
        self.duplicates = len(originals) - len(np.unique(originals))
        unique = ordered.take(np.concatenate([[True], ~again]) if len(ordered) else slice(0))
        gaps = np.flatnonzero(unique.positions != np.arange(len(unique)))
        length = int(gaps[0]) if len(gaps) else len(unique)
        self.columns, self.gap = unique.take(slice(length)), length < len(unique)
        finishes = [part.finishes[length] for part in self.parts.values() if length in part.finishes]
        self.finish = finishes[0] if finishes else None

    def start(self, request: Request, slot: int) -> Progress:
        """Hand what is held to an engine."""
        tokens: dict[str, Any] = {} if self.columns is None else self.rows(0, len(self.columns))
        self.progress = Progress(request, **tokens, finish=self.finish, recorded=self.recorded, slot=slot)
        self.slot, self.parts, self.columns = slot, {}, None
        return self.progress

    def rows(self, start: int, end: int) -> dict[str, list[Any]]:
        """The tokens of these positions as lists, named as in ``Progress``."""
        if self.progress is not None:
            progress = self.progress
            names = ("token_ids", "logprobs", "versions", "kept")
            return {name: getattr(progress, name)[start:end] for name in names}
        assert self.columns is not None
        taken = self.columns.take(slice(start, end))
        return {
            "token_ids": taken.tokens.tolist(),
            "logprobs": taken.logprobs.tolist(),
            "versions": taken.versions.tolist(),
            "kept": list(taken.kept),
        }

    def num_bytes(self, start: int, end: int) -> int:
        """About what these positions would take in a new segment."""
        return token_bytes(self.rows(start, min(end, self.recorded))["kept"]) + len(self.begin.id)

    def _conflict(self, ordered: Columns, row: int) -> ValueError:
        position = int(ordered.positions[row])
        files = [str(path) for path, part in self.parts.items() if position in part.columns.positions]
        return ValueError(
            f"request {self.begin.id!r}: tokens {ordered.tokens[row]} and {ordered.tokens[row + 1]} are both recorded "
            f"at position {position}, in {', '.join(files)}; expected one value, since a request is generated once; "
            "two engines worked on it at the same time: delete one of these files to go on with the other's tokens"
        )


def digest(request: Request) -> bytes:
    """Equal for requests with the same prompt, sampling and random numbers."""
    state = blake2b(digest_size=DIGEST_BYTES)
    sampling = [(f.name, _plain(getattr(request.sampling, f.name))) for f in fields(request.sampling)]
    state.update(repr((int(request.seed), request.numbers, sampling)).encode())
    state.update(np.asarray(request.prompt_ids, "<i4").tobytes())
    return state.digest()


def span_of(part: Part) -> Span:
    """Where a segment's tokens of a request begin and end; a finish alone is at its length."""
    places = list(part.finishes)
    if len(part.columns):
        places += [int(part.columns.positions.min()), int(part.columns.positions.max()) + 1]
    return min(places), max(places)


def _plain(value: Any) -> Any:
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, str):
        return value
    return [_plain(item) for item in value]
