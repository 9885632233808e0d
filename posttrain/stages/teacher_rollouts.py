"""Off-policy distillation: the specialists play the rollouts that the student learns from.

Each specialist is loaded into the rollout workers in turn and plays what is distilled from it, of all steps up to the
next checkpoint, so that weights are sent once a specialist and checkpoint, not once a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from posttrain.rollout.player import GroupJob
from posttrain.stages.session import Session
from posttrain.types import Group


@dataclass(slots=True, kw_only=True)
class TeacherRollouts:
    """The groups of each step, as ``GroupStream`` gives them, played by the specialist they are distilled from."""

    session: Session
    checkpoints: Mapping[str, str]
    """Of the specialists, by the name of the teacher that a job is routed to."""
    steps: Iterator[list[tuple[int, GroupJob]]]
    """Per step, from ``next_step`` on, the numbered jobs."""
    groups_per_step: int
    next_step: int
    steps_per_block: int
    """Steps played at a time; blocks end where this divides the step."""
    _played: dict[int, Group] = field(default_factory=dict)
    _paused_s: float = 0.0

    def take(self) -> list[Group]:
        """The groups of the next step, in the order of their jobs."""
        if not self._played:
            self._play_block()
        start = self.next_step * self.groups_per_step
        groups = [self._played.pop(number) for number in range(start, start + self.groups_per_step)]
        self.next_step += 1
        return groups

    def pending(self) -> list[int]:
        """None: what was played ahead is on disk, and a resumed stage finds it there."""
        return []

    def take_paused_s(self) -> float:
        paused_s, self._paused_s = self._paused_s, 0.0
        return paused_s

    def _play_block(self) -> None:
        count = self.steps_per_block - self.next_step % self.steps_per_block
        jobs = list(itertools.chain.from_iterable(itertools.islice(self.steps, count)))
        for name, checkpoint in self.checkpoints.items():
            own = [(number, job) for number, job in jobs if job.route is not None and job.route.teacher == name]
            if not own:
                continue
            self.session.send_checkpoint(checkpoint, version=self.next_step)
            stream = self.session.open_stream(iter(own), len(own), max_staleness=0)
            self._played.update(zip((number for number, _ in own), stream.take(), strict=True))
            self._paused_s += stream.take_paused_s()
