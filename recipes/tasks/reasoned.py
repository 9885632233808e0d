"""Problems with the thoughts that lead to the answer: none, the steps, or the steps with a check.

A demonstration is written in one effort mode, the modes in turn, with the reasoning of that mode: ``non-think`` has
none, ``high`` takes the steps one by one, ``max`` takes them, then takes them again and, where the two disagree, once
more.
"""

from __future__ import annotations

import itertools
import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.conversation.effort import HIGH, MAX, MODES, thinks
from posttrain.errors import RecipeError
from posttrain.protocols import Demonstration
from posttrain.types import Task
from recipes.tasks.math import MathTasks
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id, training

Steps = Sequence[str]
"""Lines of reasoning, the last of which ends with the answer."""


@dataclass(frozen=True)
class ReasonedTasks(DrawnTasks):
    """Base of the sources here. Demonstrations carry ``effort`` and, where the mode thinks, ``reasoning``."""

    efforts: tuple[str, ...] = MODES
    """The modes that demonstrations are written in, in turn."""
    slips: float = 0.15
    """Share of the ``max`` demonstrations in which the first attempt is wrong and the check finds it."""

    def __post_init__(self) -> None:
        strangers = sorted({*self.efforts} - {*MODES})
        if strangers or not self.efforts:
            raise RecipeError(
                f"{type(self).__name__}.efforts = {self.efforts}: expected some of {', '.join(MODES)}, for which there "
                "are ways to reason; change it"
            )

    def demonstrations(self, *, count: int, seed: int) -> list[Demonstration]:
        rng, modes = random.Random(seed), itertools.cycle(self.efforts)
        solved = itertools.islice(training(self.draw, seed=seed), count)
        return [self.demonstration(each, next(modes), rng) for each in solved]

    def demonstration(self, solved: SolvedTask, effort: str, rng: random.Random) -> Demonstration:
        """The problem answered in one mode."""
        first, *rest = solved.task.prompt
        (said,) = solved.solution
        if thinks(effort):
            said = {**said, "reasoning": "\n".join(self._thoughts(solved.task, effort, rng))}
        return ({**first, "effort": effort}, *rest, said)

    def _thoughts(self, task: Task, effort: str, rng: random.Random) -> Steps:
        if effort == HIGH:
            return self.steps(task)
        assert effort == MAX
        again = "again"
        if rng.random() < self.slips:
            return [*self.steps(task, slip=rng), again, *self.check(task), again, *self.steps(task)]
        return [*self.steps(task), again, *self.check(task)]

    @abstractmethod
    def steps(self, task: Task, *, slip: random.Random | None = None) -> Steps:
        """The way to the answer; with ``slip`` one of its steps is wrong, and what follows from it."""

    def check(self, task: Task) -> Steps:
        """Another way to the same answer."""
        return self.steps(task)


@dataclass(frozen=True)
class ReasonedSums(ReasonedTasks):
    """Chains of sums, for ``rewards.math.MathReward``: term by term, checked by adding what is added and what is taken
    away apart."""

    problems: MathTasks = field(
        default_factory=lambda: MathTasks(config={"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1})
    )

    def draw(self, rng: random.Random) -> SolvedTask:
        return self.problems.draw(rng)

    def steps(self, task: Task, *, slip: random.Random | None = None) -> Steps:
        first, *rest = signed_terms(task.info["entry"]["metadata"]["expression"])
        wrong = slip.randrange(len(rest)) if slip is not None else None
        return _sums(first, rest, off={wrong: slip.choice((-1, 1))} if slip is not None and wrong is not None else {})

    def check(self, task: Task) -> Steps:
        terms = signed_terms(task.info["entry"]["metadata"]["expression"])
        added, taken = [t for t in terms if t >= 0], [-t for t in terms if t < 0]
        lines = [*_sums(added[0], added[1:]), *_sums(taken[0], taken[1:])] if taken else _sums(added[0], added[1:])
        return [*lines, *_sums(sum(added), [-sum(taken)])] if taken else lines


@dataclass(frozen=True)
class ReasonedWalks(ReasonedTasks):
    """Walks from number to number along arrows, link by link. The answer is where they end."""

    num_places: int = 7
    num_steps: int = 4

    def draw(self, rng: random.Random) -> SolvedTask:
        places = rng.sample(range(10), self.num_places)
        links = list(zip(places, [*places[1:], places[0]], strict=True))
        start, end = places[0], places[self.num_steps % self.num_places]
        rng.shuffle(links)
        arrows = " ".join(f"{a}>{b}" for a, b in links)
        task = Task(
            id=problem_id("walk", arrows, start, self.num_steps),
            domain="walk",
            prompt=({"role": "user", "content": f"{arrows} From {start} go {self.num_steps} steps."},),
            answer=str(end),
            info={"links": dict(links), "start": start},
        )
        return SolvedTask(task=task, solution=({"role": "assistant", "content": str(end)},))

    def steps(self, task: Task, *, slip: random.Random | None = None) -> Steps:
        links, place = task.info["links"], task.info["start"]
        wrong = slip.randrange(self.num_steps) if slip is not None else None
        lines = []
        for step in range(self.num_steps):
            to = slip.choice([p for p in links if p not in (place, links[place])]) if step == wrong else links[place]
            lines.append(f"{place}>{to}")
            place = to
        return lines


def signed_terms(expression: str) -> list[int]:
    """``4 - 3 + 9`` as [4, -3, 9]."""
    first, *rest = expression.split()
    return [
        int(first),
        *(int(term) * (1 if sign == "+" else -1) for sign, term in zip(rest[::2], rest[1::2], strict=True)),
    ]


def _sums(total: int, terms: Sequence[int], off: dict[int, int] | None = None) -> Steps:
    """One line for each term that is added to the total; ``off`` says by how much the result of a line is wrong."""
    lines = []
    for index, term in enumerate(terms):
        result = total + term + (off or {}).get(index, 0)
        lines.append(f"{total} {'+' if term >= 0 else '-'} {abs(term)} = {result}")
        total = result
    return lines
