"""Groups for a learner, from a service that plays ahead of it as far as the recipe lets it."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from posttrain.config import Workers
from posttrain.errors import RecipeError
from posttrain.rollout.player import GroupJob
from posttrain.types import Group, Score, ScoreStatus, StopReason

if TYPE_CHECKING:
    from posttrain.rollout.service import RolloutService

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 5.0
_LONGEST_PAUSE_S = 60.0
_MACHINERY = (ScoreStatus.SANDBOX_ERROR, ScoreStatus.JUDGE_ERROR, ScoreStatus.TIMEOUT)


class Groups(Protocol):
    """Where a stage's groups come from."""

    @property
    def groups_per_step(self) -> int: ...

    def take(self) -> list[Group]:
        """The groups of the next step."""
        ...

    def pending(self) -> list[int]:
        """Numbers of the jobs that were started and that a resumed stage begins with."""
        ...

    def take_paused_s(self) -> float:
        """Seconds spent pausing since the last call."""
        ...


More = Callable[[Sequence[Group]], Sequence[GroupJob]]
"""Given all groups of a step so far, the jobs to play besides; none when the step has what it needs."""


@dataclass(slots=True)
class GroupStream:
    """Hands a learner the groups of each step.

    With ``max_staleness`` 0 the jobs of a step start when the step asks for them, and come back in their order.
    Otherwise a step takes the first groups that are complete, of these the oldest first. While it is learned,
    ``max_staleness`` steps' worth of groups are under way or waiting, and one more while the learner waits for the
    next: taken in the order they began, none has a token more than ``max_staleness`` steps old. One that is overtaken
    gets older.

    Where the machinery (sandboxes, judges, workers) fails a large share of a step's rollouts, the stream pauses and
    tries one of the failed groups now and then; when that works, all failed groups are played again.
    """

    service: RolloutService
    jobs: Iterator[tuple[int, GroupJob]]
    """Jobs with their numbers, in order."""
    groups_per_step: int
    max_staleness: int
    workers: Workers
    on_pause: Callable[[str], None]
    """Told, once a pause, why the stream pauses."""
    paused_s: float = 0.0
    """Seconds spent pausing since ``take_paused_s`` was last called."""
    refilled: Counter[str] = field(default_factory=Counter)
    """Jobs played so far because a step wanted more, by domain."""
    _numbers: dict[str, int] = field(default_factory=dict)
    """Job id -> number, of the jobs under way."""
    _complete: list[tuple[GroupJob, Group]] = field(default_factory=list)

    def take(self, more: More | None = None) -> list[Group]:
        """The groups of the next step; fewer, or none, when the jobs are used up.

        Those that ``more`` asks for come behind them, all of a round before it is asked again. An interruption leaves
        the whole step pending.
        """
        self._fill(1 + self.max_staleness)
        while len(self._complete) < self.groups_per_step and len(self._complete) < len(self._numbers):
            self._complete += self.service.collect()
        self._complete.sort(key=lambda pair: self._numbers[pair[0].id])
        taken, self._complete = self._complete[: self.groups_per_step], self._complete[self.groups_per_step :]
        taken = self._without_breakdown(taken)
        groups = [group for _, group in taken]
        besides: Counter[str] = Counter()
        while more is not None and (jobs := more(groups)):
            played = self.play_aside(jobs)
            groups += [group for _, group in self._without_breakdown([(job, played[job.id]) for job in jobs])]
            besides.update(job.task.domain for job in jobs)
        for job, _ in taken:
            del self._numbers[job.id]
        self.refilled += besides
        self._fill(self.max_staleness)
        return groups

    def pending(self) -> list[int]:
        """Numbers of the jobs that were started and not taken; a resumed stage begins with them."""
        return sorted(self._numbers.values())

    def take_paused_s(self) -> float:
        paused_s, self.paused_s = self.paused_s, 0.0
        return paused_s

    def _fill(self, steps: int) -> None:
        """Start jobs until so many steps' worth are under way."""
        room = self.groups_per_step * steps - len(self._numbers)
        started = list(itertools.islice(self.jobs, max(room, 0)))
        self._numbers.update((job.id, number) for number, job in started)
        if started:
            self.service.submit([job for _, job in started])

    def _without_breakdown(self, taken: list[tuple[GroupJob, Group]]) -> list[tuple[GroupJob, Group]]:
        """The same groups, those that the machinery failed played again once it works."""
        give_up_at = time.monotonic() + self.workers.breaker_patience_s
        pause_s = _FIRST_PAUSE_S
        while broken := self._broken(taken):
            why = _first_failure([group for _, group in taken])
            if time.monotonic() + pause_s > give_up_at:
                if self.workers.breaker_patience_s == 0:
                    return taken
                raise RecipeError(
                    f"the machinery failed {_share(group for _, group in taken):.0%} of the rollouts of a step for "
                    f"{self.workers.breaker_patience_s:g} s (workers.breaker_patience_s), first: {why}; mend that and "
                    "go on with --resume, nothing before this step is lost"
                )
            self.on_pause(f"rollouts pause, since the machinery fails them; first: {why}")
            time.sleep(pause_s)
            self.paused_s += pause_s
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            probe, *others = broken
            again = self.play_aside([probe])
            if _share([again[probe.id]]) < self.workers.breaker_threshold:
                again |= self.play_aside(others)
            taken = [(job, again.get(job.id, group)) for job, group in taken]
        return taken

    def _broken(self, taken: Sequence[tuple[GroupJob, Group]]) -> list[GroupJob]:
        """The jobs with rollouts that the machinery failed, if these are too many to go on without them."""
        if not taken or _share(group for _, group in taken) < self.workers.breaker_threshold:
            return []
        return [job for job, group in taken if _share([group]) > 0]

    def play_aside(self, jobs: Sequence[GroupJob]) -> dict[str, Group]:
        """Play jobs that are no part of the stream; its own groups that become complete meanwhile wait their turn."""
        self.service.submit(jobs)
        wanted = {job.id for job in jobs}
        again: dict[str, Group] = {}
        while len(again) < len(jobs):
            for job, group in self.service.collect():
                if job.id in wanted:
                    again[job.id] = group
                else:
                    self._complete.append((job, group))
        return again


def _share(groups: Iterator[Group] | Sequence[Group]) -> float:
    """Share of rollouts that the machinery failed, or whose grading it failed."""
    failed = [
        rollout.stop in (StopReason.ERROR, StopReason.DEADLINE) or score.status in _MACHINERY
        for group in groups
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
    ]
    return sum(failed) / max(len(failed), 1)


def _first_failure(groups: Sequence[Group]) -> str:
    scores: list[Score] = [score for group in groups for score in group.scores]
    return next((score.error or score.status.value for score in scores if score.error), "unknown")
