"""A whole run in seconds: two domains in which a letter has to be said. ``--set model.path=FOLDER`` gives the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posttrain.config import GRPO, SFT, Distill, Domain, Evaluation, Model, Optim, Recipe, Workers
from posttrain.protocols import Demonstration, Sandbox
from posttrain.rollout.environments import SingleTurn
from posttrain.types import Rollout, Sampling, Score, Task
from teachers.library import SwapOnDemand

NUM_TASKS = 24
NUM_HELDOUT = 6


@dataclass(frozen=True, slots=True)
class LetterTasks:
    """Asks for a letter. Half of the demonstrations say it, so that the other half is left to learn."""

    domain: str
    letter: str

    def train(self, *, seed: int) -> Iterable[Task]:
        return [self._task((i + seed) % NUM_TASKS) for i in range(NUM_TASKS)]

    def heldout(self, *, count: int) -> Sequence[Task]:
        return [self._task(NUM_TASKS + i) for i in range(min(count, NUM_HELDOUT))]

    def demonstrations(self, *, count: int, seed: int) -> Sequence[Demonstration]:
        said = (self.letter * 2, "no")
        return [
            (*self._task(i % NUM_TASKS).prompt, {"role": "assistant", "content": said[i % 2]}) for i in range(count)
        ]

    def _task(self, number: int) -> Task:
        prompt = ({"role": "user", "content": f"{self.domain[0]}{number}"},)
        return Task(id=f"{self.domain}-{number}", domain=self.domain, prompt=prompt, answer=self.letter)


@dataclass(frozen=True, slots=True)
class SaysLetter:
    """1 when the answer contains the letter, else 0."""

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        said = rollout.task.answer in rollout.text
        return Score(value=float(said), parts={"length": float(len(rollout.text))})


def domain(name: str, letter: str) -> Domain:
    return Domain(
        tasks=LetterTasks(name, letter),
        reward=SaysLetter(),
        environment=SingleTurn(),
        sampling=Sampling(max_tokens=4),
        sft=SFT(num_demonstrations=16, max_steps=8, batch_size=8, optim=Optim(learning_rate=4e-3), save_steps=1),
        grpo=GRPO(
            max_steps=5,
            groups_per_step=2,
            num_generations=4,
            beta=0.01,
            optim=Optim(learning_rate=1e-3),
            save_steps=1,
        ),
        max_sequence_tokens=64,
    )


def recipe() -> Recipe:
    return Recipe(
        name="mini",
        model=Model(path="set-model-path", dtype="float32"),
        domains={"vowels": domain("vowels", "a"), "digits": domain("digits", "7")},
        distill=Distill(
            teachers=SwapOnDemand(), max_steps=5, rollouts_per_step=8, optim=Optim(learning_rate=1e-3), save_steps=1
        ),
        evaluation=Evaluation(num_tasks=6, num_samples=2, bootstrap_resamples=200),
        workers=Workers(threads_per_actor=1, max_retries=1),
    )
