"""Programs graded by their values: honest ones pass, tricks earn nothing, lost boxes are not scored."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import RecipeError, SandboxError, SandboxLost
from posttrain.types import (
    Completion,
    ExecResult,
    ExecStatus,
    FinishReason,
    Rollout,
    SandboxSpec,
    Score,
    StopReason,
    Task,
    Turn,
)
from rewards.code import CodeReward, extract_program
from rewards.values import MALFORMED, parse_literal, read_value, same_value

TESTS = [{"call": "f(3)", "expected": "9"}, {"call": "f(-2)", "expected": "4"}]


@dataclass
class LocalProcess:
    """A box without walls: runs the driver as a child process in a temporary folder."""

    commands: list[Sequence[str]] = field(default_factory=list)

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = None,
        max_output: int = 1 << 20,
        env: Mapping[str, str] | None = None,
    ) -> ExecResult:
        assert not isinstance(command, str)
        self.commands.append(command)
        pipe = asyncio.subprocess.PIPE
        with tempfile.TemporaryDirectory() as workdir:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *command[1:], stdin=pipe, stdout=pipe, stderr=pipe, cwd=workdir, start_new_session=True
            )
            killer = asyncio.get_running_loop().call_later(timeout_s or 10, os.killpg, process.pid, signal.SIGKILL)
            out, err = await process.communicate(stdin)
            timed_out = killer.when() <= asyncio.get_running_loop().time()
            killer.cancel()
        status = ExecStatus.TIMEOUT if timed_out else ExecStatus.EXITED
        return ExecResult(status=status, exit_code=None if timed_out else process.returncode, stdout=out, stderr=err)

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        raise FileNotFoundError(path)

    async def write(self, path: str, data: bytes) -> None:
        raise AssertionError("the reward sends everything in one command")

    async def list(self, path: str = ".") -> list[str]:
        return []


@dataclass
class FixedResult(LocalProcess):
    """Answers every command with the same result, or fails with it."""

    result: ExecResult | Exception = field(kw_only=True)

    async def exec(self, command: str | Sequence[str], **options: Any) -> ExecResult:  # type: ignore[override]
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def rollout(text: str, tests: Any = TESTS) -> Rollout:
    completion = Completion(
        request_id="r",
        token_ids=np.zeros(1, np.int32),
        logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
        finish=FinishReason.STOP,
    )
    task = Task(id="t", domain="code", prompt=(), info={"entry_point": "f", "tests": tests})
    turn = Turn(context_ids=np.zeros(1, np.int32), completion=completion, text=text)
    return Rollout(id="r", task=task, turns=(turn,), stop=StopReason.FINISHED)


def grade(program: str, tests: Any = TESTS, *, partial: bool = False, timeout_s: float = 10.0) -> Score:
    reward = CodeReward(sandbox=SandboxSpec(timeout_s=timeout_s), partial=partial)
    return asyncio.run(reward.score(rollout(f"```python\n{program}\n```", tests), LocalProcess()))


def test_right_program_passes_in_one_command() -> None:
    box = LocalProcess()
    text = "Draft:\n```python\ndef f(x): return 0\n```\nBetter:\n```python\ndef f(x):\n    return x * x\n```\nDone."
    score = asyncio.run(CodeReward().score(rollout(text), box))
    assert (score.value, dict(score.parts)) == (1.0, {"test_0": 1.0, "test_1": 1.0})
    assert len(box.commands) == 1


def test_partial_credit_and_exceptions_stay_with_their_call() -> None:
    program = "def f(x):\n    if x > 0: raise ValueError('no')\n    return x * x"
    assert grade(program).value == 0.0
    score = grade(program, partial=True)
    assert score.value == 0.5
    assert "f(3) raises" in score.explanation
    assert "ValueError: no" in score.explanation


@pytest.mark.parametrize(
    "program",
    [
        "class E(int):\n    def __eq__(self, o): return True\n    __hash__ = int.__hash__\ndef f(x): return E(9)",
        "class A:\n    def __eq__(self, o): return True\ndef f(x): return A()",
        "import sys\nsys.exit(0)",
        "import os\ndef f(x): os._exit(0)",
        "def f(x):\n    raise SystemExit(0)",
        'print(\'2 passed\'); print(\'[0, "value", ["int", "16"]]\')\ndef f(x): return None',
        "import builtins\nbuiltins.print = builtins.repr = lambda *a, **k: '9'\ndef f(x): return '9'",
        'import json\njson.dumps = lambda *a, **k: \'[0, "value", ["int", "9"]]\'\ndef f(x): return 0',
        "import os\nfor n in os.listdir('.'): os.remove(n)\ndef f(x): return True",
        "def f(x): return str(x * x)",
        "def g(x): return x * x",
        "def f(x): return x * x +",
        "def f(x):\n    return " + "(" * 5000 + "x" + ")" * 5000,
        "\x00",
        "",
    ],
)
def test_tricks_and_mistakes_earn_nothing(program: str) -> None:
    score = grade(program, partial=True)
    assert score.value == 0.0
    assert score.explanation


def test_a_forged_frame_is_the_programs_fault() -> None:
    frame = b'[0,"value",["bytes","("]]\n'
    score = grade(f"""
import contextlib, os
for fd in range(3, 20):
    with contextlib.suppress(OSError):
        os.write(fd, {frame!r})
os._exit(0)
""")
    assert score.value == 0.0
    assert "f(3) gives" in score.explanation


def test_the_programs_words_can_be_written_down() -> None:
    score = grade(r"raise Exception('\ud800')")
    assert score.explanation.encode() == b"The program raises Exception: ?."


def test_endless_program_is_its_own_fault() -> None:
    score = grade("def f(x):\n    while x > 0: pass\n    return x * x", timeout_s=1.0)
    assert score.value == 0.0
    assert "timeout" in score.explanation


def test_running_out_of_memory_is_its_own_fault() -> None:
    box = FixedResult(result=ExecResult(status=ExecStatus.OOM, exit_code=None, stdout=b'["ready"]\n'))
    score = asyncio.run(CodeReward().score(rollout("def f(x): return [0] * 10**9"), box))
    assert score.value == 0.0
    assert "oom" in score.explanation


@pytest.mark.parametrize(
    "result",
    [
        SandboxLost("the box is gone"),
        ExecResult(status=ExecStatus.EXITED, exit_code=127, stderr=b"python3: not found"),
        ExecResult(status=ExecStatus.CANCELLED, exit_code=None, stdout=b'["ready"]\n'),
    ],
)
def test_machinery_failure_is_raised(result: ExecResult | Exception) -> None:
    with pytest.raises(SandboxError):
        asyncio.run(CodeReward().score(rollout("def f(x): return 9"), FixedResult(result=result)))


def test_syntax_error_needs_no_box_but_a_program_does() -> None:
    score = asyncio.run(CodeReward().score(rollout("def f(x) return 9")))
    assert score.value == 0.0
    assert "syntax error in line 1" in score.explanation
    with pytest.raises(SandboxError, match="no sandbox"):
        asyncio.run(CodeReward().score(rollout("def f(x): return 9")))


@pytest.mark.parametrize("tests", [[], None, [{"call": "f(1)"}], [{"call": "f(", "expected": "1"}],
                                   [{"call": "f(1)", "expected": "open('x')"}]])  # fmt: skip
def test_unusable_tests_are_a_recipe_error(tests: Any) -> None:
    with pytest.raises(RecipeError, match="tests"):
        grade("def f(x): return 1", tests)


def test_values_of_every_plain_type_travel() -> None:
    literals = ["[1, (2.5, None)]", "{'a': {1, 2}, 3: b'\\xff'}", "nan", "-inf", "'\\ud83d\\n'", "1 + 2j", "set()"]
    tests = [{"call": f"f({i})", "expected": literal} for i, literal in enumerate(literals)]
    program = f"from math import nan, inf\ndef f(i): return [{', '.join(literals)}][i]"
    assert grade(program, tests).value == 1.0


@pytest.mark.parametrize(
    ("expected", "found", "same"),
    [
        ("1", True, False),
        ("True", 1, False),
        ("12", 12.0, True),
        ("0.3", 0.1 + 0.2, True),
        ("0.3", 0.31, False),
        ("1.0", True, False),
        ("[1]", (1,), False),
        ("{1: 'a'}", {True: "a"}, False),
        ("{1}", {True}, False),
        ("{1, 2}", {2, 1}, True),
        ("{'a': 1, 'b': 2}", {"b": 2, "a": 1}, True),
        ("[nan]", [math.nan], True),
        ("nan", 0.0, False),
        pytest.param("1e308", 10**400, False, id="int-beyond-float"),
        ("None", False, False),
    ],
)
def test_comparison_checks_types(expected: str, found: Any, same: bool) -> None:
    assert same_value(parse_literal(expected), found) is same


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(plain)
def test_equal_literals_are_the_same_value(value: Any) -> None:
    assert same_value(value, parse_literal(repr(value)))
    assert not same_value([value], (value,))


@pytest.mark.parametrize(
    "tagged",
    [
        None,
        [],
        ["int"],
        ["int", 3],
        ["int", "x"],
        ["object", 1],
        ["bool", 1],
        ["set", [["list", []]]],
        ["bytes", "f()"],
        ["bytes", "("],
        ["bytes", "-" * 100_000 + "1"],
        ["bytes", ["00"]],
        ["int", "9" * 5000],
        json.loads('["list", [' * 400 + '["int", "1"]' + "]]" * 400),
    ],
)
def test_forged_frames_are_malformed(tagged: Any) -> None:
    assert read_value(tagged) is MALFORMED


def test_unclosed_fence_and_bare_text_are_programs() -> None:
    assert extract_program("x\n```python\na = 1\n") == "a = 1\n"
    assert extract_program("a = 1") == "a = 1"
    for opening in ("```Python\n", "```python3\n", "``` python\n", "```python\r\n"):
        assert extract_program(f"x\n{opening}a = 1\n```\n") == "a = 1\n"
    assert ast.parse(extract_program("```py\na = 1\n```\n```\noutput\n```"))


def test_folder_is_left_as_it_was() -> None:
    before = sorted(Path.cwd().iterdir())
    with contextlib.suppress(SandboxError):
        grade("open('x', 'w').write('y')\ndef f(x): return x * x")
    assert sorted(Path.cwd().iterdir()) == before
