"""Small Python functions from a spoken description: a pipeline of steps on a number, a list or a string.

A problem is a start and some steps, such as ``x``, ``plus 3``, ``times 2``. Its reference program is put together
from the steps, and the expected values of its tests come from running that program here.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.types import Message, Task
from recipes.tasks.splits import DrawnTasks, SolvedTask, problem_id

Value = int | str | list[int]


@dataclass(frozen=True, slots=True)
class Step:
    """One operation: how it is said and how it is written. ``{n}`` is its number, ``{x}`` what came before."""

    says: str
    code: str
    gives: str
    """Kind of the result: ``number``, ``list`` or ``string``."""
    binds: bool = True
    """Whether the code needs no parentheses when an operator or method follows."""


STEPS: Mapping[str, tuple[Step, ...]] = {
    "number": (
        Step("plus {n}", "{x} + {n}", "number", binds=False),
        Step("minus {n}", "{x} - {n}", "number", binds=False),
        Step("times {n}", "{x} * {n}", "number", binds=False),
    ),
    "list": (
        Step("the sum", "sum({x})", "number"),
        Step("the largest", "max({x})", "number"),
        Step("the smallest", "min({x})", "number"),
        Step("the count", "len({x})", "number"),
        Step("the first", "{x}[0]", "number"),
        Step("the last", "{x}[-1]", "number"),
        Step("sorted", "sorted({x})", "list"),
        Step("in reverse order", "{x}[::-1]", "list"),
    ),
    "string": (
        Step("in upper case", "{x}.upper()", "string"),
        Step("in lower case", "{x}.lower()", "string"),
        Step("reversed", "{x}[::-1]", "string"),
        Step("repeated {n} times", "{x} * {n}", "string", binds=False),
        Step("the length", "len({x})", "number"),
    ),
}

MAX_REPEATS = 9
"""Strings are not repeated more often in one step, which keeps expected values short."""

INPUTS: Mapping[str, tuple[Value, ...]] = {
    "number": (0, 3, -4, 11),
    "list": ([3, 1, 2], [5], [-2, 7, 7, 0]),
    "string": ("ab", "Tide", "x"),
}


@dataclass(frozen=True)
class CodeTasks(DrawnTasks):
    """Functions of one argument, graded by running them.

    ``info`` holds ``entry_point`` and ``tests``, each ``{"call": expression, "expected": Python literal}``.
    """

    kinds: tuple[str, ...] = ("number", "list", "string")
    min_steps: int = 2
    max_steps: int = 2
    max_number: int = 9
    template: str = "Write f(x) that returns x, {steps}."
    """The request; ``{steps}`` stands for the steps in words. A model that knows English can be told more."""
    fenced: bool = False
    """Whether demonstrations put the program in a ```python block."""
    system: str | None = None
    """A system message; an empty one keeps a chat template from adding its own."""

    def draw(self, rng: random.Random) -> SolvedTask:
        kind = rng.choice(self.kinds)
        said, expression = self._pipeline(rng, kind)
        program = f"def f(x):\n    return {expression}"
        steps = ", then ".join(said)
        system: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        prompt: Message = {"role": "user", "content": self.template.format(steps=steps)}
        task = Task(
            id=problem_id("code", steps),
            domain="code",
            prompt=(*system, prompt),
            info={"entry_point": "f", "tests": unit_tests(program, INPUTS[kind])},
        )
        reply = f"```python\n{program}\n```" if self.fenced else program
        return SolvedTask(task=task, solution=({"role": "assistant", "content": reply},))

    def _pipeline(self, rng: random.Random, kind: str) -> tuple[list[str], str]:
        said: list[str] = []
        expression, binds = "x", True
        for _ in range(rng.randint(self.min_steps, self.max_steps)):
            step = rng.choice(STEPS[kind])
            number = rng.randint(1, min(self.max_number, MAX_REPEATS) if kind == "string" else self.max_number)
            before = expression if binds or not step.code.startswith("{x}") else f"({expression})"
            expression, binds = step.code.format(x=before, n=number), step.binds
            said.append(step.says.format(n=number))
            kind = step.gives
        return said, expression


def unit_tests(program: str, inputs: tuple[Value, ...]) -> list[dict[str, Any]]:
    """Calls of ``f`` with the values that the reference program gives."""
    names: dict[str, Any] = {}
    exec(program, names)
    return [{"call": f"f({value!r})", "expected": repr(names["f"](value))} for value in inputs]
