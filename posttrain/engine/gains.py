"""What requests gained since they were last recorded, as the columns of one record.

This runs once per decode step, so it goes column by column rather than row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter, itemgetter, sub
from typing import Any

from posttrain.engine.journal import Progress
from posttrain.engine.segments import FINISH_CODES, Kind, Record, tokens_record

_LISTS = [attrgetter(name) for name in ("token_ids", "versions", "logprobs", "kept")]
_RECORDED, _SLOT, _FINISH = attrgetter("recorded"), attrgetter("slot"), attrgetter("finish")
_LAST = itemgetter(-1)


class Gains:
    """The new tokens of some rows. ``ValueError`` when a row's lists do not fit together."""

    def __init__(self, rows: Sequence[Progress]) -> None:
        self.rows = rows
        self._lists = [list(map(get, rows)) for get in _LISTS]
        self._recorded = list(map(_RECORDED, rows))
        self.sizes = list(map(len, self._lists[0]))
        """Tokens of each row by now."""
        self.counts = list(map(sub, self.sizes, self._recorded))
        """New tokens of each row."""
        if min(self.counts, default=0) < 0 or any(list(map(len, lists)) != self.sizes for lists in self._lists[1:]):
            raise _misfit(rows)

    def record(self) -> Record:
        """A STEP. Not for no rows at all."""
        if min(self.counts) == max(self.counts) == 1:
            tokens, versions, logprobs, kept = (list(map(_LAST, lists)) for lists in self._lists)
        else:
            tokens, versions, logprobs, kept = (self._new(lists) for lists in self._lists)
        finishes = [FINISH_CODES[finish] for finish in map(_FINISH, self.rows)]
        return tokens_record(
            Kind.STEP,
            [list(map(_SLOT, self.rows)), self._recorded, self.counts, finishes],
            tokens=tokens,
            versions=versions,
            logprobs=logprobs,
            kept=kept,
        )

    def _new(self, lists: Sequence[list[Any]]) -> list[Any]:
        return list(chain.from_iterable(x[start:] for x, start in zip(lists, self._recorded, strict=True)))


def _misfit(rows: Sequence[Progress]) -> ValueError:
    for row in rows:
        size = len(row.token_ids)
        if size < row.recorded or not len(row.versions) == len(row.logprobs) == len(row.kept) == size:
            break
    return ValueError(
        f"request {row.request.id!r}: {size} tokens, {len(row.versions)} versions, {len(row.logprobs)} "
        f"log-probabilities, {len(row.kept)} kept sets, {row.recorded} recorded before; expected as many of each, and "
        "none taken back; append to all four lists of the Progress"
    )
