"""Arithmetic from reasoning-gym's generators (https://github.com/open-thought/reasoning-gym)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.types import Message, Task
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id


def _short_sums() -> dict[str, Any]:
    return {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}


@dataclass(frozen=True)
class MathTasks(DrawnTasks):
    """Problems of one reasoning-gym data set, answered with the bare answer.

    ``info`` holds ``dataset`` and ``entry``, the two things ``reasoning_gym.get_score_answer_fn`` grading needs.
    """

    dataset: str = "chain_sum"
    config: Mapping[str, Any] = field(default_factory=_short_sums)
    """Settings of the reasoning-gym generator; more terms and digits make ``chain_sum`` harder."""
    request: str = "Answer with the number only."
    """What follows the question; empty for a model that is to learn the form from demonstrations."""
    system: str | None = None
    """A system message; an empty one keeps a chat template from adding its own."""

    worked: bool = False
    """Whether demonstrations of ``chain_sum`` show the sum done place by place before the answer."""

    def draw(self, rng: random.Random) -> SolvedTask:
        import reasoning_gym

        entry = reasoning_gym.create_dataset(self.dataset, seed=rng.getrandbits(32), size=1, **self.config)[0]
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt: Message = {"role": "user", "content": f"{entry['question']} {self.request}".rstrip()}
        task = Task(
            id=problem_id("math", self.dataset, entry["question"]),
            domain="math",
            prompt=(*system, prompt),
            answer=entry["answer"],
            info={"dataset": self.dataset, "entry": entry},
        )
        answer = worked_sum(entry["metadata"]["expression"]) if self.worked else entry["answer"]
        return SolvedTask(task=task, solution=({"role": "assistant", "content": answer},))


def worked_sum(expression: str) -> str:
    """A chain of sums done place by place: ``42 - 25`` gives ``40 - 20 = 20, 2 - 5 = -3, so 20 - 3 = 17.``

    Prose on purpose: a pretrained model ends it here by itself, where a bare list would go on. A student that never
    samples the end cannot be taught it by a reverse KL, whose gradient vanishes with the student's probability.
    """
    signs, numbers = expression.split()[1::2], [int(term) for term in expression.split()[::2]]
    places = [10**power for power in reversed(range(len(str(max(numbers)))))]
    columns = [[number // place % 10 * place for number in numbers] for place in places]
    steps = [(_chain(column, signs), _total(column, signs)) for column in columns]
    running = steps[0][1]
    for _, value in list(steps[1:]):
        sign = "-" if value < 0 else "+"
        steps.append((_chain([running, abs(value)], [sign]), running + value))
        running += value
    *worked, last = [f"{said} = {value}" for said, value in steps]
    return ", ".join([*worked, f"so {last}." if worked else f"{last}."])


def _chain(numbers: Sequence[int], signs: Sequence[str]) -> str:
    return " ".join([str(numbers[0]), *(f"{s} {n}" for s, n in zip(signs, numbers[1:], strict=True))])


def _total(numbers: Sequence[int], signs: Sequence[str]) -> int:
    return numbers[0] + sum(n if s == "+" else -n for s, n in zip(signs, numbers[1:], strict=True))
