"""Programs graded by running them on test calls.

The sandbox gets the program and the calls, never the expected values. It sends back the value of each call as plain
data, and the comparison happens here, in the trusted process: an object that claims to be equal to everything, an
early ``exit(0)``, a patched ``print`` or a printed "all tests passed" therefore earn nothing.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from posttrain.errors import RecipeError, SandboxError
from posttrain.protocols import Sandbox
from posttrain.types import ExecResult, ExecStatus, Rollout, SandboxSpec, Score, Task
from rewards.answers import visible
from rewards.values import MALFORMED, near, parse_literal, read_value, same_value

CODE_BOX = SandboxSpec(timeout_s=10.0)
MAX_PROGRAM_CHARS = 1 << 16
_MAX_OUTPUT = 4 << 20
_FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?:python3?|py)[ \t]*\r?\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL | re.IGNORECASE
)

# Runs inside the sandbox. Answers go to a private copy of stdout, one JSON line each; whatever the program prints
# goes to /dev/null. Values are tagged by exact type, so an instance of a subclass is not taken for its base; the
# mappings of the standard library are dictionaries.
_DRIVER = r"""
import json, os, sys
from collections import Counter, OrderedDict, defaultdict
out = os.dup(1)
null = os.open(os.devnull, os.O_WRONLY)
payload = json.loads(sys.stdin.buffer.read())

def send(*frame, dumps=json.dumps, write=os.write, limit=1 << 18):
    line = dumps(frame)
    data = (line if len(line) <= limit else dumps([frame[0], "error", "value is too large"])).encode() + b"\n"
    while data:
        data = data[write(out, data):]

def plain(value, type=type, repr=repr, TypeError=TypeError, maps=(Counter, OrderedDict, defaultdict)):
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return [kind.__name__, value]
    if kind is int or kind is float or kind is complex:
        return [kind.__name__, repr(value)]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is list or kind is tuple or kind is set or kind is frozenset:
        return [kind.__name__, [plain(item) for item in value]]
    if kind is dict or kind is maps[0] or kind is maps[1] or kind is maps[2]:
        return ["dict", [[plain(key), plain(item)] for key, item in value.items()]]
    raise TypeError("a value of type " + kind.__name__ + " is not plain data")

send("ready")
os.dup2(null, 1)
os.dup2(null, 2)
names = {"__name__": "solution"}
try:
    exec(compile(payload["program"], "solution.py", "exec"), names)
except BaseException as error:
    send("program", "raises " + type(error).__name__ + ": " + str(error)[:200])
    os._exit(0)
if payload["entry_point"] not in names:
    send("program", "does not define " + payload["entry_point"])
    os._exit(0)
for index, call in enumerate(payload["calls"]):
    try:
        send(index, "value", plain(eval(compile(call, "test", "eval"), names)))
    except BaseException as error:
        send(index, "error", type(error).__name__ + ": " + str(error)[:200])
os._exit(0)
"""


Compare = Literal["same", "equal", "truth"]


@dataclass(frozen=True, slots=True)
class CodeTest:
    """One call and the value it should return."""

    call: str
    expected: Any
    compare: Compare = "same"
    """``same`` checks types all the way down; ``equal`` is what ``==`` says of the two, as in an ``assert``, or
    ``same``; ``truth`` compares what ``if`` makes of them. Both sides are plain data by then, so none is fooled."""
    tolerance: float = 0.0
    """Largest absolute difference of two numbers."""

    def passed_by(self, found: Any) -> bool:
        """Whether a value that came out of the box is right."""
        if self.compare == "truth":
            return bool(found) is bool(self.expected)
        if same_value(self.expected, found) or (self.tolerance > 0 and near(self.expected, found, self.tolerance)):
            return True
        return self.compare == "equal" and bool(self.expected == found)


@runtime_checkable
class CallsPython(Protocol):
    """A box with a Python interpreter that is already started, which saves most of the time of a short program."""

    async def call(
        self, source: str, *, stdin: bytes = b"", timeout_s: float | None = None, max_output: int = 1 << 20
    ) -> ExecResult:
        """As ``exec`` of ``python3 -I -c source``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeReward:
    """Share of ``task.info["tests"]`` the program passes, or all-or-nothing.

    ``task.info`` is ``{"entry_point": "f", "tests": [{"call": "f(3)", "expected": "12"}, ...]}`` where ``expected`` is
    a Python literal (``nan`` and ``inf`` included), and perhaps ``compare`` and ``tolerance`` of ``CodeTest``
    (``rewards.code_tests`` makes tests of asserts). The program is the last ```` ```python ```` fence of the rollout's
    text, or the whole text. Integers and floats compare as numbers, floats to a relative 1e-9; every other type must
    be the same, ``True`` is not 1 and a tuple is not a list.

    Running out of time or memory is the program's fault. Raises ``RecipeError`` for a task without usable tests and
    ``SandboxError`` when the box, not the program, failed.
    """

    sandbox: SandboxSpec = CODE_BOX
    partial: bool = False
    """Give the share of tests passed instead of all or nothing."""

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        entry_point, tests = _read_tests(rollout.task)
        program = extract_program(visible(rollout.text))
        fault = _static_fault(program)
        if fault is not None:
            return Score(value=0.0, explanation=fault)
        if sandbox is None:
            raise SandboxError("CodeReward.score got no sandbox; open one from its sandbox spec for this rollout")
        payload = json.dumps(
            {"program": program, "entry_point": entry_point, "calls": [test.call for test in tests]}
        ).encode()
        return self._grade(await run_python(sandbox, _DRIVER, payload, self.sandbox.timeout_s), tests)

    def _grade(self, result: ExecResult, tests: Sequence[CodeTest]) -> Score:
        frames = _read_frames(result)
        parts = {f"test_{i}": float(_passed(frames.get(i), test)) for i, test in enumerate(tests)}
        share = sum(parts.values()) / len(parts)
        explanation = _explain(result, frames, tests, parts) if share < 1.0 else f"All {len(tests)} tests pass."
        return Score(
            value=share if self.partial else float(share == 1.0),
            parts=parts,
            # The program's words may hold lone surrogates, which no file could take.
            explanation=explanation.encode(errors="replace").decode(),
        )


async def run_python(sandbox: Sandbox, source: str, stdin: bytes, timeout_s: float) -> ExecResult:
    """Run a program in the box, by its waiting interpreter where it has one."""
    if isinstance(sandbox, CallsPython):
        return await sandbox.call(source, stdin=stdin, timeout_s=timeout_s, max_output=_MAX_OUTPUT)
    command = ("python3", "-I", "-c", source)
    return await sandbox.exec(command, stdin=stdin, timeout_s=timeout_s, max_output=_MAX_OUTPUT)


def extract_program(text: str) -> str:
    """The last fenced Python block, closed or not; without one, the whole text."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def _read_tests(task: Task) -> tuple[str, tuple[CodeTest, ...]]:
    entry_point, rows = task.info.get("entry_point"), task.info.get("tests")
    if not isinstance(entry_point, str) or not isinstance(rows, Sequence) or not rows:
        raise RecipeError(
            f"task {task.id!r}: info has entry_point {entry_point!r} and tests {str(rows)[:80]!r}; expected a function "
            'name and a non-empty list of {"call": ..., "expected": ...}'
        )
    return entry_point, tuple(_read_test(row, index, task.id) for index, row in enumerate(rows))


def _read_test(row: Mapping[str, Any], index: int, task_id: str) -> CodeTest:
    try:
        ast.parse(row["call"], mode="eval")
        test = CodeTest(
            row["call"], parse_literal(row["expected"]), row.get("compare", "same"), float(row.get("tolerance", 0.0))
        )
        if test.compare not in get_args(Compare):
            raise ValueError(f"compare = {test.compare!r} is none of {', '.join(get_args(Compare))}")
        return test
    except (KeyError, TypeError, ValueError, SyntaxError, AttributeError) as error:
        raise RecipeError(
            f"task {task_id!r}: info['tests'][{index}] = {row!r}: expected 'call', a Python expression, and "
            f"'expected', a Python literal as text ({type(error).__name__}: {error})"
        ) from error


def _static_fault(program: str) -> str | None:
    """Why the program cannot run at all, found without opening costs; None when it may."""
    if len(program) > MAX_PROGRAM_CHARS:
        return f"The program is longer than {MAX_PROGRAM_CHARS} characters."
    try:
        ast.parse(program)
        program.encode()
    except SyntaxError as error:
        return f"The program has a syntax error in line {error.lineno}: {error.msg}."
    except (ValueError, RecursionError, MemoryError) as error:
        return f"The program cannot be parsed ({type(error).__name__})."
    return None


def _read_frames(result: ExecResult) -> Mapping[object, Sequence[Any]]:
    """The driver's answers by test index. Raises ``SandboxError`` when the driver itself never started."""
    frames: dict[object, Sequence[Any]] = {}
    for line in result.stdout.split(b"\n"):
        try:
            key, *rest = json.loads(line)
        except (ValueError, TypeError, RecursionError):
            continue
        if isinstance(key, int | str):
            frames[key] = rest
    if "ready" not in frames or result.status is ExecStatus.CANCELLED:
        raise SandboxError(
            f"the test driver did not run ({result.status.value}, exit code {result.exit_code}): "
            f"{result.stderr[-300:].decode(errors='replace')!r}; the image needs python3"
        )
    return frames


def _passed(frame: Sequence[Any] | None, test: CodeTest) -> bool:
    if frame is None or len(frame) != 2 or frame[0] != "value":
        return False
    try:
        found = read_value(frame[1])
        return found is not MALFORMED and test.passed_by(found)
    except RecursionError:
        return False


def _explain(
    result: ExecResult, frames: Mapping[object, Sequence[Any]], tests: Sequence[CodeTest], parts: Mapping[str, float]
) -> str:
    if "program" in frames:
        return f"The program {' '.join(map(str, frames['program']))[:200]}."
    first = next(i for i in range(len(tests)) if not parts[f"test_{i}"])
    passed = f"{sum(map(int, parts.values()))} of {len(tests)} tests pass; {tests[first].call[:80]}"
    frame = frames.get(first)
    if frame is None:
        ending = "never answered" if result.ok else f"did not answer before the run ended ({result.status.value})"
        return f"{passed} {ending}."
    kind, detail = "raises" if frame[:1] == ["error"] else "gives", str(frame[-1:])[1:-1][:200]
    return f"{passed} {kind} {detail} instead of {str(tests[first].expected)[:80]}."
