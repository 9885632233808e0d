"""Problems whose demonstrations think as long as an effort mode says.

A demonstration is written in one mode, the modes in turn. ``non-think`` answers at once, ``high`` goes through the
numbers with a running total, ``max`` goes through them backwards as well and, where the two totals differ, once more.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.conversation.effort import MAX, MODES, thinks
from posttrain.errors import RecipeError
from posttrain.protocols import Demonstration
from posttrain.types import Task
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id, training

AGAIN = "again"
"""Between two goes through the numbers."""


@dataclass(frozen=True, kw_only=True)
class ReasonedSums(DrawnTasks):
    """Sums of small numbers, plain or round a dial, for ``rewards.math.MathReward``.

    ``info`` holds ``numbers``; demonstrations carry ``effort`` and, where the mode thinks, ``reasoning``.
    """

    domain: str
    request: str
    """What the numbers are asked for with."""
    modulus: int | None = None
    """Places of the dial; None for plain sums."""
    num_numbers: int = 4
    largest: int = 5
    modes: tuple[str, ...] = MODES
    """The effort modes that demonstrations are written in."""
    slips: float = 0.2
    """Share of ``max`` demonstrations with a mistake in the first go, which the second shows."""

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
            answer=str(self._turned(sum(numbers))),
            info={"numbers": numbers},
        )
        return SolvedTask(task=task, solution=({"role": "assistant", "content": str(task.answer)},))

    def demonstrations(self, *, count: int, seed: int) -> list[Demonstration]:
        rng, modes = random.Random(seed), itertools.cycle(self.modes)
        solved = itertools.islice(training(self.draw, seed=seed), count)
        return [self._demonstration(each, next(modes), rng) for each in solved]

    def _demonstration(self, solved: SolvedTask, effort: str, rng: random.Random) -> Demonstration:
        (asked,), (said,) = solved.task.prompt, solved.solution
        if thinks(effort):
            goes = self._goes(_named(solved.task.info["numbers"]), rng if effort == MAX else None)
            said = {**said, "reasoning": f"\n{AGAIN}\n".join(goes)}
        return ({**asked, "effort": effort}, said)

    def _goes(self, named: Sequence[tuple[str, int]], slips: random.Random | None) -> list[str]:
        right = self._go_through(named)
        if slips is None:
            return [right]
        backwards = self._go_through(named[::-1])
        if slips.random() >= self.slips:
            return [right, backwards]
        slip = (slips.randrange(len(named)), slips.choice((-1, 1)))
        return [self._go_through(named, slip=slip), backwards, right]

    def _go_through(self, named: Sequence[tuple[str, int]], *, slip: tuple[int, int] | None = None) -> str:
        """A line for each number with the total so far; a slip is where it goes wrong and by how much."""
        lines, total = [], 0
        for index, (name, number) in enumerate(named):
            wrong_by = slip[1] if slip is not None and index == slip[0] else 0
            before, total = total, self._turned(total + number + wrong_by)
            lines.append(f"{name}{number}: {before} + {number} = {total}")
        return "\n".join(lines)

    def _turned(self, total: int) -> int:
        return total if self.modulus is None else total % self.modulus


def _named(numbers: Sequence[int]) -> list[tuple[str, int]]:
    """With a letter each. The digit that follows it is a token of its own, so that a small model finds its way back to
    the number by the letter alone."""
    return list(zip(string.ascii_lowercase, numbers, strict=False))


def bills() -> ReasonedSums:
    return ReasonedSums(domain="bill", request="Add up:")


def dials() -> ReasonedSums:
    return ReasonedSums(domain="dial", request="Turn a dial of ten:", modulus=10)
