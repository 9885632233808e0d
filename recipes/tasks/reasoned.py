"""Problems whose demonstrations think as long as an effort mode says.

A demonstration is written in one mode, the modes in turn. ``non-think`` answers at once, ``high`` notes the total after
every number, ``max`` counts there in steps of one. The smaller the steps, the surer a small model is of each.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.conversation.effort import HIGH, MAX, MODES, NON_THINK, thinks
from posttrain.errors import RecipeError
from posttrain.protocols import Demonstration
from posttrain.types import Task
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id, training

TAUGHT = (NON_THINK, HIGH, HIGH, MAX)
"""Whole sums are the hardest steps to learn, so ``high`` is shown twice as often."""


@dataclass(frozen=True, kw_only=True)
class ReasonedSums(DrawnTasks):
    """Small numbers to add to a start or to take from it, for ``rewards.math.MathReward``.

    ``info`` holds ``numbers``; demonstrations carry ``effort`` and, where the mode thinks, ``reasoning``.
    """

    domain: str
    request: str
    """What the numbers are asked for with."""
    start: int = 0
    sign: Literal[1, -1] = 1
    """1 to add, -1 to take away."""
    num_numbers: int = 4
    largest: int = 5
    modes: tuple[str, ...] = MODES
    """The effort modes that demonstrations are written in, in turn; one may come more than once."""

    def __post_init__(self) -> None:
        if not self.modes or {*self.modes} - {*MODES}:
            raise RecipeError(
                f"ReasonedSums.modes = {self.modes}: expected some of {', '.join(MODES)}, for which there are ways to "
                "reason; change it"
            )

    def draw(self, rng: random.Random) -> SolvedTask:
        numbers = [rng.randint(1, self.largest) for _ in range(self.num_numbers)]
        question = "\n".join([self.request, *(f"{name}{number}" for name, number in _named(numbers))])
        task = Task(
            id=problem_id(self.domain, question),
            domain=self.domain,
            prompt=({"role": "user", "content": question},),
            answer=str(self.start + self.sign * sum(numbers)),
            info={"numbers": numbers},
        )
        return SolvedTask(task=task, solution=({"role": "assistant", "content": str(task.answer)},))

    def demonstrations(self, *, count: int, seed: int) -> list[Demonstration]:
        solved = itertools.islice(training(self.draw, seed=seed), count)
        return [self._demonstration(*each) for each in zip(solved, itertools.cycle(self.modes), strict=False)]

    def _demonstration(self, solved: SolvedTask, effort: str) -> Demonstration:
        (asked,), (said,) = solved.task.prompt, solved.solution
        if thinks(effort):
            said = {**said, "reasoning": self._reasoning(solved.task.info["numbers"], by_ones=effort == MAX)}
        return ({**asked, "effort": effort}, said)

    def _reasoning(self, numbers: Sequence[int], *, by_ones: bool) -> str:
        """A line a step: what is left of the number, and the total after the step."""
        lines, total = [], self.start
        for name, number in _named(numbers):
            step = 1 if by_ones else number
            for left in range(number, 0, -step):
                total += self.sign * step
                lines.append(f"{name}{left} {'+' if self.sign > 0 else '-'} {total}")
        return "\n".join(lines)


def _named(numbers: Sequence[int]) -> list[tuple[str, int]]:
    """With a letter each. The digit that follows it is a token of its own, so that a small model finds its way back to
    the number by the letter alone."""
    return list(zip(string.ascii_lowercase, numbers, strict=False))


def bills() -> ReasonedSums:
    return ReasonedSums(domain="bill", request="Add up:", modes=TAUGHT)


def rests() -> ReasonedSums:
    return ReasonedSums(domain="rest", request="Take from 20:", start=20, sign=-1, modes=TAUGHT)
