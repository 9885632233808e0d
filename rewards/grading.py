"""Work graded by running it where the policy has never been: a fresh box with its named files and nothing else.

Whatever the policy did to its own box (another ``bash`` or ``python``, a ``sitecustomize.py`` or ``conftest.py`` beside
its work, processes left running) stays there. What is expected never enters the grading box either: what the cases
print is compared here, so that a program which ends early with exit code 0, or rewrites the tests, has printed nothing
that helps it.

What this does not cover: a test script that runs the work in its own process and prints a verdict believes whatever
that work makes of the process. Let it print values, and name the values as what is expected.
"""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import RecipeError, SandboxError
from posttrain.protocols import Sandbox
from posttrain.types import ExecResult, ExecStatus, Rollout, SandboxSpec, Score, Task

GRADING_BOX = SandboxSpec(timeout_s=30.0)
MAX_OUTPUT = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One command and what it should print."""

    command: str | Sequence[str]
    stdout: str
    """Trailing newlines do not count. Never empty: a program that does nothing prints that."""
    stdin: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTests:
    """Share of the task's cases that the submitted files pass, or all-or-nothing.

    ``task.info`` is ``{"artifacts": ["solution.py"], "hidden_files": {"run.py": "..."}, "cases": [{"command": "python3
    run.py", "stdin": "3", "stdout": "12"}]}``. Of ``rollout.artifacts`` only those named in ``artifacts`` are copied,
    and ``hidden_files`` over them. Every case starts with these files as they should be.

    A missing file and running out of time or memory are the policy's fault. Raises ``RecipeError`` for a task without
    usable cases, and for one whose hidden files lie in the policy's own box; ``SandboxError`` when the box failed.
    """

    sandbox: SandboxSpec = GRADING_BOX
    partial: bool = False
    """Give the share of cases passed instead of all or nothing."""
    max_artifact_bytes: int = 1 << 20
    """All artifacts together; more scores 0."""

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        wanted, hidden, cases = _read_task(rollout.task)
        handed_in = {posixpath.normpath(path): data for path, data in rollout.artifacts.items()}
        missing = [path for path in wanted if path not in handed_in]
        if missing:
            return Score(value=0.0, explanation=f"{missing[0]!r} was not handed in.")
        files = {path: handed_in[path] for path in wanted}
        if sum(map(len, files.values())) > self.max_artifact_bytes:
            return Score(value=0.0, explanation=f"The files hold more than {self.max_artifact_bytes} bytes.")
        if sandbox is None:
            raise SandboxError("HiddenTests.score got no sandbox; open one from its sandbox spec for this rollout")
        placed = {**files, **hidden}
        faults = [await self._run(sandbox, placed, case, first=i == 0) for i, case in enumerate(cases)]
        parts = {f"case_{i}": float(not fault) for i, fault in enumerate(faults)}
        share = sum(parts.values()) / len(parts)
        failed = [i for i, fault in enumerate(faults) if fault]
        explanation = (
            f"{len(cases) - len(failed)} of {len(cases)} cases pass; case {failed[0]} {faults[failed[0]]}."
            if failed
            else f"All {len(cases)} cases pass."
        )
        return Score(value=share if self.partial else float(share == 1.0), parts=parts, explanation=explanation)

    async def _run(self, sandbox: Sandbox, files: Mapping[str, bytes], case: Case, *, first: bool) -> str:
        """Why a case fails; empty when it passes."""
        for path, data in files.items():
            try:
                await sandbox.write(path, data)
            except OSError as error:
                if error.errno is None or first:
                    raise SandboxError(f"{path!r} could not be put into the grading box: {error}") from error
                # An earlier case could, so the work is in the way.
                return f"cannot start: {path}: {error.strerror}"
        result = await sandbox.exec(
            case.command, stdin=case.stdin.encode(), timeout_s=self.sandbox.timeout_s, max_output=MAX_OUTPUT
        )
        return _fault(result, case)


def _fault(result: ExecResult, case: Case) -> str:
    if result.status is ExecStatus.CANCELLED:
        raise SandboxError("a grading command was cancelled; grade the rollout again")
    if result.status is not ExecStatus.EXITED:
        return f"ended with {result.status.value}"
    if result.exit_code != case.exit_code:
        return f"exits with {result.exit_code} instead of {case.exit_code}"
    if result.stdout.rstrip(b"\n") != case.stdout.encode().rstrip(b"\n"):
        # Never what was expected: explanations are kept, and shown to whoever improves the policy.
        return f"prints {result.stdout[:80].decode(errors='replace')!r}"
    return ""


def _read_task(task: Task) -> tuple[tuple[str, ...], Mapping[str, bytes], tuple[Case, ...]]:
    """What to take, what to add, and what to run."""
    wanted = tuple(_checked_path(path, task, "artifacts") for path in task.info.get("artifacts", ()))
    hidden = {
        _checked_path(path, task, "hidden_files"): text.encode()
        for path, text in task.info.get("hidden_files", {}).items()
    }
    cases = tuple(_read_case(row, index, task) for index, row in enumerate(task.info.get("cases", ())))
    if not wanted or not cases:
        raise RecipeError(
            f"task {task.id!r}: info has {len(wanted)} artifacts and {len(cases)} cases; expected at least one of each"
        )
    shown = set(task.sandbox.files.values()) if task.sandbox else set()
    for path, data in hidden.items():
        if data and data in shown:
            raise RecipeError(
                f"task {task.id!r}: info['hidden_files'][{path!r}] is also in the box the policy works in; take it out "
                "of Task.sandbox.files"
            )
    return wanted, hidden, cases


def _checked_path(path: str, task: Task, where: str) -> str:
    plain = posixpath.normpath(path)
    if plain == "." or plain.split("/")[0] in ("", "..") or "\0" in plain:
        raise RecipeError(f"task {task.id!r}: info[{where!r}] names {path!r}; expected paths below the workdir")
    return plain


def _read_case(row: Mapping[str, Any], index: int, task: Task) -> Case:
    try:
        case = Case(**row)
        if case.stdout.strip():
            return case
        problem = "stdout is empty, which a program that does nothing prints, too"
    except (TypeError, AttributeError) as error:
        problem = str(error)
    raise RecipeError(
        f"task {task.id!r}: info['cases'][{index}] = {row!r}: expected 'command' and 'stdout', and perhaps 'stdin' and "
        f"'exit_code'; {problem}"
    )
