"""What keeps the calls of a judge within bounds: a rate, a breaker that pauses all of them, a budget.

All of it belongs to one event loop of one process, except what a ``Ledger`` with a file has counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import JudgeError

_SETTLING_S = 0.02
"""Pause before a look at whether calls under way have left something of the budget."""


class BudgetExceeded(JudgeError):
    """The next call might spend more than the budget allows, so it is not made."""


class Rate:
    """At most ``per_minute`` of something, in first-come order, with bursts of what one second brings.

    One that needs more than a burst waits until the burst is full, and leaves a debt that the next ones wait for.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._per_s = math.inf if per_minute is None else per_minute / 60
        self._burst = max(self._per_s, 1.0)
        self._level = self._burst
        self._filled_at: float | None = None
        self._turn = asyncio.Lock()

    async def take(self, amount: float = 1.0) -> None:
        if math.isinf(self._per_s):
            return
        async with self._turn:
            while (missing := min(amount, self._burst) - self._fill()) > 1e-9:
                await asyncio.sleep(missing / self._per_s)
            self._level -= amount

    def correct(self, difference: float) -> None:
        """Add what was taken and not used; negative when more was used than taken."""
        if not math.isinf(self._per_s):
            self._level = min(self._fill() + difference, self._burst)

    def _fill(self) -> float:
        now = asyncio.get_running_loop().time()
        if self._filled_at is not None:
            self._level = min(self._level + (now - self._filled_at) * self._per_s, self._burst)
        self._filled_at = now
        return self._level


class Breaker:
    """Pauses all calls while the other side is down, rather than failing them.

    After ``threshold`` failures in a row nobody passes for ``cooldown_s``, then one call at a time, as a probe. A
    probe that fails doubles the pause, up to ``max_cooldown_s``; one that succeeds lets everybody pass.
    """

    def __init__(self, *, threshold: int, cooldown_s: float, max_cooldown_s: float) -> None:
        self._threshold, self._cooldown_s, self._max_cooldown_s = threshold, cooldown_s, max_cooldown_s
        self._failures = 0
        self._wait_s = cooldown_s
        self._closed_at = -math.inf
        """Nobody passes before this."""
        self._probing = False
        self._opened_at: float | None = None
        self._changed = asyncio.Event()
        self.opened = 0
        """How often it began to pause."""
        self.paused_s = 0.0
        """Seconds in which nobody passed."""

    @property
    def is_open(self) -> bool:
        return self._opened_at is not None

    @contextlib.asynccontextmanager
    async def passage(self, patience_s: float) -> AsyncIterator[Passage]:
        """Wait until a call may be made. Raises ``JudgeError`` when that takes more than ``patience_s``, at once when
        the other side has been down for longer than that; probes are still made.

        What the call met is told to the passage; one that tells nothing counts neither way.
        """
        started = self._now()
        while (pause := self._pause()) > 0:
            left = patience_s - (self._now() - (started if self._opened_at is None else min(started, self._opened_at)))
            if left <= 0:
                raise JudgeError(
                    f"the judge's endpoint lets nobody pass, and the question has waited {self._now() - started:.1f} s "
                    f"of the {patience_s:.1f} s it had left (max_pause_s)"
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(pause, left)):
                    await self._changed.wait()
        passage = Passage(probe=self.is_open, waited_s=self._now() - started)
        self._probing = passage.probe
        try:
            yield passage
        finally:
            if passage.probe:
                self._probing = False
            self._learn(passage)

    def hold(self, seconds: float) -> None:
        """Let nobody pass for this long, as the other side asked for."""
        until = self._now() + seconds
        if not self.is_open:
            self.paused_s += max(until - max(self._closed_at, self._now()), 0.0)
        self._closed_at = max(self._closed_at, until)
        self._notify()

    def _pause(self) -> float:
        """Seconds until somebody may pass; endless while a probe is under way."""
        left = self._closed_at - self._now()
        return left if left > 0 else math.inf if self._probing else 0.0

    def _learn(self, passage: Passage) -> None:
        if passage.worked:
            self._failures, self._wait_s = 0, self._cooldown_s
            if self._opened_at is not None:
                self.paused_s += self._now() - self._opened_at
                self._opened_at = None
        elif passage.worked is False:
            self._failures += 1
            if passage.probe or (not self.is_open and self._failures >= self._threshold):
                self._open(longer=passage.probe)
        self._notify()

    def _open(self, *, longer: bool) -> None:
        if self._opened_at is None:
            self._opened_at = self._now()
            self.opened += 1
        self._wait_s = min(self._wait_s * 2, self._max_cooldown_s) if longer else self._cooldown_s
        self._closed_at = max(self._closed_at, self._now() + self._wait_s)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


@dataclass(slots=True)
class Passage:
    """One call that may be made."""

    probe: bool
    """Whether it is the one that finds out if the other side is back."""
    waited_s: float
    busy_s: float = 0.0
    """What the call itself took."""
    worked: bool | None = None
    """Whether the other side answered; None while that is not known, and when it says nothing about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Money per million tokens, in any currency."""

    input: float
    output: float
    cached_input: float | None = None
    """Of prompt tokens the provider had in its cache; None is the price of the others."""

    def cost(self, usage: Usage) -> float:
        cached = self.input if self.cached_input is None else self.cached_input
        fresh = usage.prompt_tokens - usage.cached_tokens
        return (fresh * self.input + usage.cached_tokens * cached + usage.completion_tokens * self.output) / 1e6


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Those of the prompt the provider had in its cache."""

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Ledger:
    """Adds up what calls spend and refuses those that might pass a budget.

    Before a call the most it can cost is put aside, after it what it did cost is taken. A call waits while the rest of
    the budget is put aside for others, since they may give it back, but no longer than ``patience_s``. With a file the
    sums are those of all processes that use it, and go on when the run does; what a process had put aside when it died
    stays so, since it may have been spent.
    """

    def __init__(
        self,
        *,
        max_tokens: float | None = None,
        max_cost: float | None = None,
        path: str | None = None,
        patience_s: float = 300.0,
    ) -> None:
        self._limits = (math.inf if max_tokens is None else max_tokens, math.inf if max_cost is None else max_cost)
        self._patience_s = patience_s
        if path is not None:
            Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
        where = ":memory:" if path is None else Path(path).expanduser()
        self._table = sqlite3.connect(where, isolation_level=None, timeout=30.0)
        if path is not None:
            self._table.execute("PRAGMA journal_mode = WAL")
            self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute(
            "CREATE TABLE IF NOT EXISTS spent "
            "(one INTEGER PRIMARY KEY CHECK (one = 1), tokens REAL, cost REAL, tokens_aside REAL, cost_aside REAL)"
        )
        self._table.execute("INSERT OR IGNORE INTO spent VALUES (1, 0, 0, 0, 0)")

    @property
    def spent(self) -> tuple[float, float]:
        """Tokens, and money."""
        tokens, cost = self._table.execute("SELECT tokens, cost FROM spent").fetchone()
        return tokens, cost

    async def put_aside(self, tokens: float, cost: float) -> None:
        """Raises ``BudgetExceeded`` when there is no room for a call that may take this much."""
        deadline = asyncio.get_running_loop().time() + self._patience_s
        while not self._try(tokens, cost):
            used = self.spent
            over = any(s + n > limit for s, n, limit in zip(used, (tokens, cost), self._limits, strict=True))
            if over or asyncio.get_running_loop().time() > deadline:
                raise BudgetExceeded(
                    f"judge budget: {used[0]:.0f} of {self._limits[0]:g} tokens and {used[1]:.4f} of "
                    f"{self._limits[1]:g} in money are spent, and the next call may take {tokens:.0f} tokens and "
                    f"{cost:.4f}; it is not made, and its rollout stays unscored; raise the budget or stop the run"
                )
            await asyncio.sleep(_SETTLING_S)

    def settle(self, aside: tuple[float, float], used: tuple[float, float]) -> None:
        """Give back what was put aside, tokens and money, and take what was used."""
        self._table.execute(
            "UPDATE spent SET tokens = tokens + ?, cost = cost + ?, "
            "tokens_aside = tokens_aside - ?, cost_aside = cost_aside - ?",
            (*used, *aside),
        )

    def _try(self, tokens: float, cost: float) -> bool:
        done = self._table.execute(
            "UPDATE spent SET tokens_aside = tokens_aside + ?, cost_aside = cost_aside + ? "
            "WHERE tokens + tokens_aside + ? <= ? AND cost + cost_aside + ? <= ?",
            (tokens, cost, tokens, self._limits[0], cost, self._limits[1]),
        )
        return done.rowcount == 1
