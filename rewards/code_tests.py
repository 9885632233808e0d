"""Tests for ``CodeReward`` from the asserts of HumanEval and MBPP.

``assert f(3) == 9`` becomes the call ``f(3)`` and the value 9, which never enters the box. Asserts in loops, with
values drawn at random or computed, are run once with the reference solution, in a box; what it was asked and said is
kept.
"""

from __future__ import annotations

import ast
import asyncio
import json
import operator
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from posttrain.errors import RecipeError, SandboxError
from posttrain.protocols import Sandbox, Substrate
from posttrain.types import Score, Task
from rewards.code import CODE_BOX, CodeReward, run_python
from rewards.controls import PROGRAMS, Case
from rewards.values import parse_literal

CodeTests = list[dict[str, Any]]
"""``task.info["tests"]`` of ``CodeReward``."""
_CANDIDATE = "candidate"
_HACKS = ("always equal", "equal number", "exit in call", "patched builtins", "printed success")
_RECORDED_TOLERANCE = 1e-4
_MAX_SIZE = 10_000
_AT_ONCE = 2
"""Boxes open at the same time."""
_OPERATORS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_MAKERS: Mapping[str, Callable[..., Any]] = {
    "set": set, "frozenset": frozenset, "list": list, "tuple": tuple, "dict": dict, "float": float, "int": int,
    "str": str, "sorted": sorted,
}  # fmt: skip

# Runs the reference and its own checks, and writes down each call with its value. Nothing here is a policy's.
_RECORDER = r"""
import json, os, random, sys
out = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
payload = json.loads(sys.stdin.buffer.read())
names = {"__name__": "solution"}
random.seed(0)
exec(compile(payload["program"], "solution.py", "exec"), names)
solution, calls = names[payload["entry_point"]], []
def candidate(*args, **named):
    call = ", ".join([repr(arg) for arg in args] + [f"{name}={value!r}" for name, value in named.items()])
    value = solution(*args, **named)
    calls.append((payload["entry_point"] + "(" + call + ")", repr(value)))
    return value
exec(compile(payload["test"], "test.py", "exec"), names)
names["check"](candidate)
os.write(out, json.dumps(calls).encode())
"""


class NotStatic(ValueError):
    """An assert whose value is only known when it runs."""


def humaneval_task(row: Mapping[str, Any], tests: CodeTests) -> Task:
    """A HumanEval row (``task_id``, ``prompt``, ``entry_point``) with the tests of its ``test`` field."""
    request = f"Complete this Python function. Answer with the whole program in a ```python fence.\n\n{row['prompt']}"
    return Task(
        id=row["task_id"],
        domain="code",
        prompt=({"role": "user", "content": request},),
        info={"entry_point": row["entry_point"], "tests": tests},
    )


async def humaneval_tests(row: Mapping[str, Any], sandbox: Sandbox) -> CodeTests:
    """Its ``check(candidate)`` as calls and values; the box is used only where a check has to be run to be known."""
    try:
        return static_tests(_body_of_check(row["test"]), row["entry_point"])
    except NotStatic:
        program = row["prompt"] + row["canonical_solution"]
        return await record_tests(program, row["test"], row["entry_point"], sandbox)


def mbpp_task(row: Mapping[str, Any]) -> Task:
    """An MBPP row (``task_id``, ``text``, ``test_list``); the function's name is taken from its first assert."""
    asserts = [*row["test_list"], *row.get("challenge_test_list", ())]
    statements = [statement for text in asserts for statement in ast.parse(text).body]
    entry_point = _called(statements[0], _defined(row["code"]))
    request = f"{row['text']}\nYour function must pass this test:\n{row['test_list'][0]}\nAnswer in a ```python fence."
    return Task(
        id=f"MBPP/{row['task_id']}",
        domain="code",
        prompt=({"role": "user", "content": request},),
        info={"entry_point": entry_point, "tests": static_tests(statements, entry_point)},
    )


def static_tests(statements: Sequence[ast.stmt], entry_point: str) -> CodeTests:
    """One test for every assert. ``assert True`` and docstrings are left out; anything else raises ``NotStatic``."""
    tests = []
    for statement in statements:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue
        if not isinstance(statement, ast.Assert):
            raise NotStatic(f"{ast.unparse(statement)[:80]!r} is no assert")
        if not (isinstance(statement.test, ast.Constant) and statement.test.value is True):
            tests.append(_static_test(statement.test, entry_point))
    if not tests:
        raise NotStatic("there are no asserts")
    return tests


def _static_test(test: ast.expr, entry_point: str) -> dict[str, Any]:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and _calls(test.operand, entry_point):
        return _row(test.operand, False, entry_point, compare="truth")
    if isinstance(test, ast.Call) and _calls(test, entry_point):
        return _row(test, True, entry_point, compare="truth")
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        raise NotStatic(f"{ast.unparse(test)[:80]!r} is no comparison")
    left, sign, right = test.left, test.ops[0], test.comparators[0]
    if isinstance(sign, ast.Eq | ast.Is):
        called, value = (left, right) if _calls(left, entry_point) else (right, left)
        compare = "equal" if isinstance(sign, ast.Eq) else "same"
        return _row(called, fold(value), entry_point, compare=compare)
    if isinstance(sign, ast.Lt | ast.LtE) and (difference := _difference(left)) is not None:
        called, value = difference
        return _row(called, fold(value), entry_point, compare="same", tolerance=float(fold(right)))
    raise NotStatic(f"{ast.unparse(test)[:80]!r} compares otherwise")


def _difference(node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """a and b of ``abs(a - b)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "abs" and len(node.args) == 1:
        inner = node.args[0]
        if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Sub):
            return inner.left, inner.right
    return None


def _row(called: ast.expr, expected: Any, entry_point: str, **how: Any) -> dict[str, Any]:
    if not _calls(called, entry_point):
        raise NotStatic(f"{ast.unparse(called)[:80]!r} does not call {entry_point}")
    renamed = _Rename(entry_point).visit(called)
    return {"call": ast.unparse(renamed), "expected": repr(expected), **how}


class _Rename(ast.NodeTransformer):
    def __init__(self, name: str) -> None:
        self.name = name

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.name, node.ctx) if node.id == _CANDIDATE else node


def _calls(node: ast.AST, entry_point: str) -> bool:
    return any(isinstance(each, ast.Name) and each.id in (entry_point, _CANDIDATE) for each in ast.walk(node))


def fold(node: ast.expr) -> Any:
    """The value of a constant expression: literals, arithmetic, ``set([...])`` and such. Raises ``NotStatic``."""
    try:
        return parse_literal(ast.unparse(node))
    except (ValueError, SyntaxError):
        pass
    try:
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            value = _OPERATORS[type(node.op)](fold(node.left), fold(node.right))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            value = _MAKERS[node.func.id](*map(fold, node.args))
        else:
            raise NotStatic(f"{ast.unparse(node)[:80]!r} is no constant")
        if hasattr(value, "__len__") and len(value) > _MAX_SIZE:
            raise NotStatic(f"{ast.unparse(node)[:80]!r} is too large")
        return value
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise NotStatic(f"{ast.unparse(node)[:80]!r}: {error}") from error


async def record_tests(program: str, test: str, entry_point: str, sandbox: Sandbox) -> CodeTests:
    """Calls and values of a reference solution while it passes its own ``check(candidate)``.

    Random numbers are seeded. Floats are compared to 1e-4 later, so a task with several right answers to one call keeps
    only the reference's. Raises ``RecipeError`` when the reference fails, ``SandboxError`` when the box did.
    """
    payload = json.dumps({"program": program, "test": test, "entry_point": entry_point}).encode()
    result = await run_python(sandbox, _RECORDER, payload, 60.0)
    if not result.ok:
        raise RecipeError(
            f"the reference solution of {entry_point} does not pass its own test ({result.status.value}, exit code "
            f"{result.exit_code}): {result.stderr[-300:].decode(errors='replace')!r}"
        )
    try:
        calls = json.loads(result.stdout)
    except ValueError as error:
        raise SandboxError(f"the recorder of {entry_point} gave no usable answer: {error}") from error
    return [
        {"call": call, "expected": value, "compare": "equal", "tolerance": _RECORDED_TOLERANCE}
        for call, value in dict(map(tuple, calls)).items()
    ]


def _body_of_check(source: str) -> list[ast.stmt]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "check":
            return node.body
    raise RecipeError("the test defines no check(candidate); expected a HumanEval row")


def _defined(source: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def _called(statement: ast.stmt, defined: set[str]) -> str:
    names = [each.id for each in ast.walk(statement) if isinstance(each, ast.Name) and each.id in defined]
    if not names:
        raise RecipeError(f"{ast.unparse(statement)[:80]!r} calls nothing that the reference defines")
    return names[0]


Solved = tuple[Mapping[str, Score], Mapping[str, Score]]
"""Scores of the reference solutions by task id, and of the hacks by task id and name."""


async def solve_humaneval(rows: Sequence[Mapping[str, Any]], substrate: Substrate) -> Solved:
    """What ``CodeReward`` gives every row's reference solution, and hacks of its tests."""

    async def read(row: Mapping[str, Any]) -> tuple[Task, str]:
        async with substrate.open(CODE_BOX) as box:
            return humaneval_task(row, await humaneval_tests(row, box)), row["prompt"] + row["canonical_solution"]

    return await _solve(rows, read, substrate)


async def solve_mbpp(rows: Sequence[Mapping[str, Any]], substrate: Substrate) -> Solved:
    """What ``CodeReward`` gives every row's reference solution, and hacks of its tests."""

    async def read(row: Mapping[str, Any]) -> tuple[Task, str]:
        # The setup may use classes that the solution defines, so it goes after it.
        return mbpp_task(row), f"{row['code']}\n{row.get('test_setup_code') or ''}".replace("\r\n", "\n")

    return await _solve(rows, read, substrate)


async def _solve(
    rows: Sequence[Mapping[str, Any]],
    read: Callable[[Mapping[str, Any]], Awaitable[tuple[Task, str]]],
    substrate: Substrate,
) -> Solved:
    places = asyncio.Semaphore(_AT_ONCE)
    solutions: dict[str, Score] = {}
    hacks: dict[str, Score] = {}

    async def solve(row: Mapping[str, Any]) -> None:
        async with places:
            task, program = await read(row)
            solutions[task.id] = await score_program(task, program, substrate)
            for name in _HACKS:
                hack = PROGRAMS[name].replace("FUNCTION", task.info["entry_point"])
                hacks[f"{task.id} {name}"] = await score_program(task, hack, substrate)

    await asyncio.gather(*map(solve, rows))
    return solutions, hacks


async def score_program(task: Task, program: str, substrate: Substrate) -> Score:
    """What ``CodeReward`` gives a response that holds this program."""
    reward = CodeReward()
    rollout = Case(task=task, reference="").rollout(f"```python\n{program}\n```")
    async with substrate.open(reward.sandbox) as box:
        return await reward.score(rollout, box)
