"""Sums with the thoughts that lead to the answer: none, the steps, or the steps with a check.

A demonstration is written in one effort mode, the modes in turn, with the reasoning of that mode: ``non-think`` has
none, ``high`` takes the steps one by one, ``max`` does each sum the other way round, too, and once more where the two
differ.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.conversation.effort import MAX, MODES, thinks
from posttrain.errors import RecipeError
from posttrain.protocols import Demonstration
from posttrain.types import Task
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id, training


@dataclass(frozen=True)
class ReasonedSums(DrawnTasks):
    """Sums of digits, or where a dial comes to rest that is turned by them, for ``rewards.math.MathReward``.

    Demonstrations carry ``effort`` and, where the mode thinks, ``reasoning``; ``info`` holds the ``numbers``.
    """

    domain: str
    request: str
    """The question, with ``{numbers}`` where they are to stand."""
    modulus: int | None = None
    """Places of the dial; None for a plain sum."""
    num_numbers: int = 4
    efforts: tuple[str, ...] = MODES
    """The modes that demonstrations are written in, in turn."""
    slips: float = 0.1
    """Share of the sums in ``max`` demonstrations that are wrong at first, until the check finds it."""

    def __post_init__(self) -> None:
        if not self.efforts or {*self.efforts} - {*MODES}:
            raise RecipeError(
                f"ReasonedSums.efforts = {self.efforts}: expected some of {', '.join(MODES)}, for which there are ways "
                "to reason; change it"
            )

    def draw(self, rng: random.Random) -> SolvedTask:
        numbers = [rng.randrange(10) for _ in range(self.num_numbers)]
        text = self.request.format(numbers=" ".join(map(str, numbers)))
        task = Task(
            id=problem_id(self.domain, text),
            domain=self.domain,
            prompt=({"role": "user", "content": text},),
            answer=str(self._carried(sum(numbers))),
            info={"numbers": numbers},
        )
        return SolvedTask(task=task, solution=({"role": "assistant", "content": str(task.answer)},))

    def demonstrations(self, *, count: int, seed: int) -> list[Demonstration]:
        rng, modes = random.Random(seed), itertools.cycle(self.efforts)
        solved = itertools.islice(training(self.draw, seed=seed), count)
        return [self._demonstration(each, next(modes), rng) for each in solved]

    def _demonstration(self, solved: SolvedTask, effort: str, rng: random.Random) -> Demonstration:
        (asked,), (said,) = solved.task.prompt, solved.solution
        if thinks(effort):
            slips = rng if effort == MAX else None
            said = {**said, "reasoning": "\n".join(self._thoughts(solved.task.info["numbers"], slips))}
        return ({**asked, "effort": effort}, said)

    def _thoughts(self, numbers: Sequence[int], slips: random.Random | None) -> list[str]:
        """What is left to add and the sum of the first two of it, in turn, and the answer; with checks where there are
        ``slips`` to be found."""
        lines, left = [], list(numbers)
        while len(left) > 1:
            first, second, *rest = left
            lines += [" ".join(map(str, left)), f"{first} + {second} = {first + second}"]
            if slips is not None:
                lines.append(f"{second} + {first} = {first + second}")
                if slips.random() < self.slips:
                    lines[-2:] = [
                        f"{first} + {second} = {first + second + slips.choice((-1, 1))}",
                        lines[-1],
                        lines[-2],
                    ]
            left = [self._carried(first + second), *rest]
        return [*lines, str(left[0])]

    def _carried(self, total: int) -> int:
        return total if self.modulus is None else total % self.modulus


def sums() -> ReasonedSums:
    return ReasonedSums(domain="sum", request="Add up {numbers}.")


def dial() -> ReasonedSums:
    return ReasonedSums(domain="dial", request="Turn a dial of ten by {numbers}.", modulus=10)
