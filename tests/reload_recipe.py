"""A run whose rubric is edited as it goes on: ``RELOAD_FOLDER`` holds the rubric and what happens to it when."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import GRPO, Domain, Evaluation, Model, Optim, Recipe, Workers
from posttrain.protocols import Demonstration
from posttrain.rollout.environments import SingleTurn
from posttrain.types import Sampling, Task
from rewards.compose import WeightedSum
from rewards.reload import RubricFile
from rewards.rubric import RubricReward


@dataclass(frozen=True, slots=True)
class EditingTasks:
    """When its n-th task is drawn, ``edit-n.toml`` takes the rubric's place, and ``stop-n`` ends the run."""

    folder: str

    def train(self, *, seed: int) -> Iterable[Task]:
        for number in range(20):
            self._act(number)
            yield self._task(number)

    def heldout(self, *, count: int) -> Sequence[Task]:
        return [self._task(100 + i) for i in range(min(count, 2))]

    def demonstrations(self, *, count: int, seed: int) -> Sequence[Demonstration]:
        return ()

    def _act(self, number: int) -> None:
        if not Path(self.folder, "run/stages/grpo-letters/reward_files-letters.jsonl").exists():
            # Tasks are looked at before the run, too.
            return
        edit, stop = Path(self.folder, f"edit-{number}.toml"), Path(self.folder, f"stop-{number}")
        if edit.exists():
            # As an edit that was finished a while ago.
            os.utime(edit, (1_700_000_000 + number, 1_700_000_000 + number))
            shutil.move(edit, Path(self.folder, "rubric.toml"))
        if stop.exists():
            stop.unlink()
            raise OSError("the run ends here")

    def _task(self, number: int) -> Task:
        return Task(id=f"letters-{number}", domain="letters", prompt=({"role": "user", "content": f"q{number}"},))


def recipe() -> Recipe:
    folder = os.environ["RELOAD_FOLDER"]
    rubric = RubricFile(Path(folder, "rubric.toml"), anchors=Path(folder, "anchors.jsonl"))
    return Recipe(
        name="reload",
        model=Model(path="set-model-path", dtype="float32"),
        domains={
            "letters": Domain(
                tasks=EditingTasks(folder),
                reward=WeightedSum({"rubric": RubricReward(rubric)}, {"rubric": 1.0}),
                environment=SingleTurn(),
                sampling=Sampling(max_tokens=4),
                grpo=GRPO(
                    max_steps=5, groups_per_step=2, num_generations=2, save_steps=2, optim=Optim(learning_rate=1e-3)
                ),
                max_sequence_tokens=64,
            )
        },
        evaluation=Evaluation(num_tasks=2, num_samples=1, bootstrap_resamples=50),
        workers=Workers(threads_per_actor=1, max_retries=1),
    )
