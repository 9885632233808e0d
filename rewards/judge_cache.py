"""Replies of a judge, kept on disk: a question that was answered is not paid for again.

A question is the whole conversation, so it holds the criterion as filled in, the response as shown, and a nonce of its
own for every vote and every retry: a rubric version that asks something else, or another vote, is another question.
Equal responses to a task are one. Only replies are kept, never failures.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.protocols import Judge
from posttrain.tally import TALLY
from posttrain.types import Message


@dataclass(frozen=True, slots=True)
class CachedJudge:
    """Implements ``posttrain.protocols.Judge``. For calibration ask the judge itself: its golden set is no place for
    old replies."""

    judge: Judge
    """One with an ``identity``: a text that says what its replies depend on besides the question."""
    path: str
    """The file, which all processes of a machine may share."""

    def __post_init__(self) -> None:
        if not isinstance(getattr(self.judge, "identity", None), str):
            raise RecipeError(
                f"CachedJudge.judge is a {type(self.judge).__name__} without an identity, so its replies could be "
                "taken for another's; give it a property identity that names model and sampling"
            )

    @property
    def identity(self) -> str:
        return str(self.judge.identity)  # type: ignore[attr-defined]

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        question = [self.identity, [[m["role"], m["content"]] for m in messages], max_tokens, seed]
        key = hashlib.sha256(json.dumps(question).encode()).hexdigest()
        found = _table(self.path).execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        TALLY.add("judge/cache_hits" if found else "judge/cache_misses")
        if found:
            return str(found[0])
        reply = await self.judge.ask(messages, max_tokens=max_tokens, seed=seed)
        _table(self.path).execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", (key, reply))
        return reply


@cache
def _table(path: str) -> sqlite3.Connection:
    file = Path(path).expanduser()
    file.parent.mkdir(parents=True, exist_ok=True)
    table = sqlite3.connect(file, isolation_level=None, timeout=30.0, check_same_thread=False)
    table.execute("PRAGMA journal_mode = WAL")
    table.execute("PRAGMA synchronous = OFF")
    table.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT) WITHOUT ROWID")
    return table
