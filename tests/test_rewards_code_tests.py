"""Asserts become calls and values, and reference solutions pass them in a box."""

from __future__ import annotations

import ast
import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import RecipeError
from posttrain.types import SandboxSpec
from rewards.code_tests import (
    NotStatic,
    fold,
    humaneval_tests,
    mbpp_task,
    record_tests,
    score_program,
    solve_humaneval,
    solve_mbpp,
    static_tests,
)
from sandbox.local import LocalUnsafe
from sandbox.process import Process
from tests.boxes import require

DATA = Path(__file__).parents[2] / "shared" / "data"
LOCAL = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)


def converted(source: str) -> list[dict[str, Any]]:
    return static_tests(ast.parse(source).body, "f")


@pytest.mark.parametrize(
    ("source", "test"),
    [
        ("assert f(3) == 9", {"call": "f(3)", "expected": "9", "compare": "equal"}),
        ("assert candidate(3) == 9, 'why'", {"call": "f(3)", "expected": "9", "compare": "equal"}),
        ("assert [1] * 2 == f('a')", {"call": "f('a')", "expected": "[1, 1]", "compare": "equal"}),
        ("assert set(f(1)) == set([2])", {"call": "set(f(1))", "expected": "{2}", "compare": "equal"}),
        ("assert f(1) is True", {"call": "f(1)", "expected": "True", "compare": "same"}),
        ("assert f(1)", {"call": "f(1)", "expected": "True", "compare": "truth"}),
        ("assert not f(1)", {"call": "f(1)", "expected": "False", "compare": "truth"}),
        ("assert abs(f(1.5) - 6.0 / 3.0) < 1e-6", {"call": "f(1.5)", "expected": "2.0", "compare": "same",
                                                   "tolerance": 1e-6}),
    ],
)  # fmt: skip
def test_an_assert_becomes_a_call_and_a_value(source: str, test: dict[str, Any]) -> None:
    assert converted(f"assert True, 'just so'\n{source}") == [test]


@pytest.mark.parametrize(
    "source",
    [
        "for i in range(3):\n    assert f(i) == i",
        "assert f(1) == g(1)",
        "assert f(1) > 3",
        "assert 1 == 1",
        "x = 1",
        "",
    ],
)
def test_what_has_to_run_is_told(source: str) -> None:
    with pytest.raises(NotStatic):
        converted(source)


def test_constants_are_folded_without_running_anything() -> None:
    assert fold(ast.parse("{'a': float('inf'), 'b': (1, -2) * 2}", mode="eval").body.values[1]) == (1, -2, 1, -2)  # type: ignore[attr-defined]
    for source in ("open('x')", "[].append(1)", "'a' * 10 ** 9", "[0] * 100000"):
        with pytest.raises(NotStatic):
            fold(ast.parse(source, mode="eval").body)


HUMANEVAL = {
    "task_id": "own/0",
    "prompt": "def f(n):\n    '''The square of n.'''\n",
    "entry_point": "f",
    "canonical_solution": "    return n * n\n",
    "test": (
        "METADATA = {}\n\ndef check(candidate):\n    import random\n    for _ in range(5):\n"
        "        n = random.randint(0, 10 ** 6)\n        assert candidate(n) == n * n\n"
    ),
}
MBPP = {
    "task_id": 1,
    "text": "Square a number.",
    "code": "def g(n):\r\n    return n * n",
    "test_list": ["assert g(3) == 9"],
}


def test_checks_that_have_to_run_are_recorded_once() -> None:
    async def record() -> list[dict[str, Any]]:
        async with LOCAL.open(SandboxSpec()) as box:
            first = await humaneval_tests(HUMANEVAL, box)
            assert first == await humaneval_tests(HUMANEVAL, box)
            with pytest.raises(RecipeError, match="does not pass its own test"):
                await record_tests("def f(n): return 1", HUMANEVAL["test"], "f", box)
            return first

    tests = asyncio.run(record())
    assert len(tests) == 5
    for test in tests:
        number = int(test["call"].removeprefix("f(").removesuffix(")"))
        assert int(test["expected"]) == number**2


def test_a_task_names_its_function_and_keeps_its_tests() -> None:
    task = mbpp_task(MBPP)
    assert task.info == {"entry_point": "g", "tests": [{"call": "g(3)", "expected": "9", "compare": "equal"}]}
    assert "assert g(3) == 9" in task.prompt[0]["content"]


@pytest.mark.parametrize(
    ("compare", "expected", "program", "value"),
    [
        ("equal", "1", "return True", 1.0),
        ("same", "1", "return True", 0.0),
        ("equal", "{'a': 1}", "import collections\n    return collections.Counter('a')", 1.0),
        ("truth", "True", "return [0]", 1.0),
        ("truth", "False", "return ''", 1.0),
        ("truth", "True", "return object()", 0.0),
        ("equal", "1", "return type('E', (), {'__eq__': lambda *a: True})()", 0.0),
        ("equal", "1", "return type('E', (int,), {'__eq__': lambda *a: True})(7)", 0.0),
        ("truth", "False", "return type('E', (), {'__bool__': lambda *a: False})()", 0.0),
    ],
)
def test_comparisons_of_asserts_are_made_outside(compare: str, expected: str, program: str, value: float) -> None:
    task = mbpp_task(MBPP)
    task = type(task)(id="t", domain="code", prompt=(), info={
        "entry_point": "f", "tests": [{"call": "f()", "expected": expected, "compare": compare}]})  # fmt: skip
    score = asyncio.run(score_program(task, f"def f():\n    {program}", LOCAL))
    assert score.value == value, score.explanation


def test_tolerance_is_absolute_and_reaches_into_lists() -> None:
    test = {"call": "f()", "expected": "[1.0, 2]", "tolerance": 1e-3}
    task = type(mbpp_task(MBPP))(id="t", domain="code", prompt=(), info={"entry_point": "f", "tests": [test]})
    for returned, value in (("[1.0005, 2]", 1.0), ("[1.01, 2]", 0.0), ("[1.0005, True]", 0.0), ("[1.0, 2, 3]", 0.0)):
        assert asyncio.run(score_program(task, f"def f(): return {returned}", LOCAL)).value == value


def rows(name: str, count: int) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"shared/data/{name} is not beside the checkout")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line][:count]


def test_reference_solutions_score_one_in_a_box() -> None:
    """A part of them; `posttrain rewards audit --humaneval FILE --mbpp FILE` runs all."""
    substrate = require(Process())

    for solve, chosen in (
        (solve_humaneval, rows("humaneval.jsonl", 60)[25:60:4]),
        (solve_mbpp, rows("mbpp_test.jsonl", 8)),
    ):
        solutions, hacks = asyncio.run(solve(chosen, substrate))
        assert len(solutions) == len(chosen)
        assert {name: score.explanation for name, score in solutions.items() if score.value != 1.0} == {}
        assert len(hacks) == 5 * len(chosen)
        assert {score.value for score in hacks.values()} == {0.0}
