"""Puzzles of several reasoning-gym data sets, graded by their own scorers (``rewards.puzzles``)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import RecipeError
from posttrain.types import Task
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id
from rewards.puzzles import NO_REFERENCE, require_usable


def _short_puzzles() -> dict[str, Mapping[str, Any]]:
    """Fast to make, and little to gain by a constant answer."""
    return {"spell_backward": {}, "number_sorting": {}, "basic_arithmetic": {}, "shortest_path": {}}


@dataclass(frozen=True)
class PuzzleTasks(DrawnTasks):
    """Problems drawn evenly from these data sets, for ``rewards.math.MathReward``.

    Data sets with a broken scorer, or without a reference answer to imitate, are refused. ``rewards.puzzles.CHANCE``
    says what a constant answer would earn.
    """

    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=_short_puzzles)
    """Name of a data set -> settings of its generator."""
    domain: str = "puzzles"
    request: str = "End your answer with a line 'Answer: ' and nothing but the answer after it."
    """What follows the question."""

    def __post_init__(self) -> None:
        if not self.datasets:
            raise RecipeError("PuzzleTasks.datasets is empty; expected at least one reasoning-gym data set")
        for name in self.datasets:
            require_usable(name)
            if name in NO_REFERENCE:
                raise RecipeError(
                    f"PuzzleTasks.datasets: {name!r} has problems without a reference answer; choose another data set"
                )

    def draw(self, rng: random.Random) -> SolvedTask:
        import reasoning_gym

        name = rng.choice(sorted(self.datasets))
        entry = reasoning_gym.create_dataset(name, seed=rng.getrandbits(32), size=1, **self.datasets[name])[0]
        task = Task(
            id=problem_id(self.domain, name, entry["question"]),
            domain=self.domain,
            prompt=({"role": "user", "content": f"{entry['question']}\n\n{self.request}".rstrip()},),
            answer=entry["answer"],
            info={"dataset": name, "entry": entry},
        )
        return SolvedTask(task=task, solution=({"role": "assistant", "content": f"Answer: {entry['answer']}"},))
