"""Two splits out of one generator: a task belongs to one side for ever, by the hash of its problem.

A source only says how to draw a solved task from a random number generator. Which split a draw falls into depends
on the problem alone, so no seed, count or order can move a held-out task into training.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from posttrain.protocols import Demonstration
from posttrain.types import Message, Task

HELDOUT_PARTS = 5
"""One problem in this many is held out."""

DRAWS_PER_TASK = 50
"""Draws spent, for each held-out task wanted, on finding one that is new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SolvedTask:
    """A task with a correct conversation: what the policy says, with the world's answers in between."""

    task: Task
    solution: tuple[Message, ...]

    @property
    def demonstration(self) -> Demonstration:
        return (*self.task.prompt, *self.solution)


Draw = Callable[[random.Random], SolvedTask]


def problem_id(domain: str, *parts: Any) -> str:
    """An identifier that depends on the domain and the parts of the problem, and on nothing else."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()
    return f"{domain}-{digest[:16]}"


def is_heldout(task_id: str) -> bool:
    """Whether the problem behind a ``problem_id`` is kept from training."""
    return int(task_id.rpartition("-")[2], 16) % HELDOUT_PARTS == 0


def training(draw: Draw, *, seed: int) -> Iterator[SolvedTask]:
    """Endless training problems in an order fixed by ``seed``; problems may recur."""
    rng = random.Random(seed)
    while True:
        solved = draw(rng)
        if not is_heldout(solved.task.id):
            yield solved


def heldout(draw: Draw, *, count: int) -> list[Task]:
    """The first ``count`` distinct held-out problems, fewer when the generator has no more."""
    rng = random.Random("heldout")
    found: dict[str, Task] = {}
    for _ in range(count * DRAWS_PER_TASK):
        if len(found) == count:
            break
        task = draw(rng).task
        if is_heldout(task.id):
            found.setdefault(task.id, task)
    return list(found.values())


def demonstrations(draw: Draw, *, count: int, seed: int) -> list[Demonstration]:
    """``count`` solved training problems."""
    return [solved.demonstration for solved in islice(training(draw, seed=seed), count)]


@dataclass(frozen=True)
class DrawnTasks(ABC):
    """Base of the sources here: implements ``posttrain.protocols.TaskSource`` on top of ``draw``."""

    @abstractmethod
    def draw(self, rng: random.Random) -> SolvedTask:
        """One problem of either split with its solution."""

    def train(self, *, seed: int) -> Iterator[Task]:
        return (solved.task for solved in training(self.draw, seed=seed))

    def heldout(self, *, count: int) -> list[Task]:
        return heldout(self.draw, count=count)

    def demonstrations(self, *, count: int, seed: int) -> list[Demonstration]:
        return demonstrations(self.draw, count=count, seed=seed)
