"""A merge of two ready-made teachers, as a process that kills itself at an exact place of a step:
``python -m tests.killed_merge RUN_DIR STUDENT VOWELS DIGITS [PLACE STEP]``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from posttrain.config import Distill, Domain, Model, Optim, Recipe, Workers
from posttrain.learner.distillation import DistillObjective
from posttrain.pipeline import run_recipe
from posttrain.protocols import StateStore, TeacherModel
from posttrain.rollout.environments import SingleTurn
from posttrain.types import Sample, Sampling
from teachers.cache import FileStore
from teachers.library import SwapOnDemand
from teachers.pool import TeacherPool
from teachers.sources import HFTeacher
from tests.mini_recipe import LetterTasks, SaysLetter

STEPS = 4
ROLLOUTS = 8
"""Per step, half of them each teacher's."""


def recipe(student: str, vowels: str, digits: str) -> Recipe:
    domains = {
        name: Domain(
            tasks=LetterTasks(name, letter),
            reward=SaysLetter(),
            environment=SingleTurn(),
            sampling=Sampling(max_tokens=4),
            teacher=HFTeacher(teacher),
            max_sequence_tokens=64,
        )
        for name, letter, teacher in (("vowels", "a", vowels), ("digits", "7", digits))
    }
    return Recipe(
        name="killed",
        model=Model(path=student, dtype="float32"),
        domains=domains,
        distill=Distill(
            teachers=SwapOnDemand(),
            max_steps=STEPS,
            rollouts_per_step=ROLLOUTS,
            optim=Optim(learning_rate=1e-3),
            save_steps=1,
        ),
        workers=Workers(threads_per_actor=1, max_retries=1),
    )


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after_a_teacher(step: str) -> None:
    """Between the first teacher of a step and the second."""
    run: Callable[..., None] = TeacherPool._run

    def run_and_die(pool: TeacherPool, model: TeacherModel, samples: Sequence[Any], store: StateStore) -> None:
        run(pool, model, samples, store)
        if samples[0].id.startswith(step):
            kill()

    TeacherPool._run = run_and_die


def in_a_write(step: str) -> None:
    """Halfway through the second file of a step's second teacher."""
    put, replace = FileStore.put, Path.replace
    written: list[str] = []

    def put_and_count(store: FileStore, key: str, *given: Any, **named: Any) -> None:
        if key.startswith(step):
            written.append(key)
        put(store, key, *given, **named)

    def die_instead(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp" and len(written) == ROLLOUTS // 2 + 2:
            os.truncate(path, path.stat().st_size // 2)
            kill()
        return replace(path, target)

    FileStore.put = put_and_count
    Path.replace = die_instead


def in_the_update(step: str) -> None:
    """When the weights have moved, before any state is freed."""
    release = DistillObjective.release

    def release_or_die(objective: DistillObjective, samples: Sequence[Sample]) -> None:
        if samples[0].id.startswith(step):
            kill()
        release(objective, samples)

    DistillObjective.release = release_or_die


PLACES = {place.__name__: place for place in (after_a_teacher, in_a_write, in_the_update)}

if __name__ == "__main__":
    run_dir, student, vowels, digits, *place = sys.argv[1:]
    if place:
        PLACES[place[0]](f"distill/{place[1]}/")
    run_recipe(recipe(student, vowels, digits), Path(run_dir), resume=True, stop_before="evaluate")
