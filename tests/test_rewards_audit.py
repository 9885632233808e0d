"""The audit finds what it is for: rewards that pay for nothing, raise, hang or pay nobody."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import pkgutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import rewards
from posttrain.errors import RecipeError
from posttrain.types import Task
from rewards.audit import REFERENCE, Audited, Report, audit, read_cases, table
from rewards.cli import main
from rewards.controls import CONTROLS, Case, controls_for
from rewards.functions import from_function, load_object
from rewards.math import MathReward
from rewards.shipped import SHIPPED
from sandbox.function import Function
from sandbox.pool import close_pools
from sandbox.process import Process
from tests.boxes import require

CASE = Case(
    task=Task(id="sum", domain="math", prompt=({"role": "user", "content": "What is 17 + 25?"},), answer="42"),
    reference="Answer: 42",
    gold="42",
    wrong="43",
)


def tried(function: Any, **settings: Any) -> Report:
    return asyncio.run(audit(Audited(name="own", reward=from_function(function), cases=(CASE,), **settings), None))


def found(report: Report) -> set[str]:
    return {trial.control for trial in report.faults}


def test_a_reward_that_looks_for_the_answer_anywhere_is_found_out() -> None:
    report = tried(lambda text, answer: float(answer in text))
    assert {"enumeration", "hedge: gold denied", "hedge: either or", "hedge: gold in thinking"} <= found(report)
    assert report.reference == 1.0
    assert max(report.values) == 1.0


def test_a_reward_for_anything_is_found_out_by_constants() -> None:
    assert {"zero", "colon", "echo", "spoof: override", "unicode: tag block", "bomb: very long"} <= found(
        tried(lambda text: 1.0)
    )


def test_a_reward_that_pays_nobody_fails_by_the_reference() -> None:
    report = tried(lambda text: 0.0)
    assert found(report) == {REFERENCE}
    assert "expected at least 1" in report.faults[0].fault


def test_exceptions_unscored_responses_and_slow_calls_are_faults() -> None:
    def careless(text: str) -> float | None:
        if text == "Answer: 42":
            return 1.0
        if "{" in text:
            return None
        if text == "0":
            time.sleep(0.3)
        return float(int(text or "0") * 0)

    report = tried(careless, deadline_s=0.25)
    reasons = {trial.control: trial.fault for trial in report.faults}
    assert reasons["letter A"].startswith("raised ValueError")
    assert "was not scored (reward_error" in reasons["empty object"]
    assert "above the deadline" in reasons["zero"]
    assert "one" not in reasons


def test_a_call_that_never_ends_does_not_hold_up_the_audit() -> None:
    async def hangs(text: str) -> float:
        if text == "yes":
            await asyncio.sleep(3600)
        return float(text == "Answer: 42")

    report = tried(hangs, deadline_s=0.05)
    assert "yes" in found(report)
    assert "TimeoutError" in next(trial.fault for trial in report.faults if trial.control == "yes")


def test_exemptions_and_limits_are_kept() -> None:
    assert tried(lambda text: 1.0 if text == "Answer: 42" else 0.2, limit=0.2).faults == []
    generous = tried(lambda text: float(text in ("Answer: 42", "yes")), exempt={"yes": "it is the right answer here"})
    assert generous.faults == []
    assert max(generous.values) == 0.0


def test_controls_fit_their_case() -> None:
    names = [control.name for control in CONTROLS]
    assert len(names) == len(set(names)) > 100
    plain = dict(controls_for(replace(CASE, gold=None, wrong=None)))
    assert not any(name.startswith(("hedge", "program")) for name in plain)
    coded = dict(controls_for(replace(CASE, entry_point="f", spoilt=("x",))))
    assert "def f(" in coded["program: returns None"]
    assert coded["program: returns None"].startswith("```python")
    assert coded["spoilt 0"] == "x"
    assert all(text.strip() != "42" for text in coded.values())


# What needs a box is tried below with it; the rest is fast.
BOXED = ("code", "code_partial", "hidden_tests")


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in BOXED])
def test_shipped_rewards_pass(name: str) -> None:
    report = asyncio.run(audit(SHIPPED[name](), None))
    assert report.faults == []


@pytest.mark.parametrize("name", ["code", "hidden_tests"])
def test_shipped_rewards_that_run_programs_pass(name: str) -> None:
    substrate = require(Function() if name == "code" else Process())
    audited = SHIPPED[name]()

    async def run() -> Report:
        try:
            return await audit(audited, substrate)
        finally:
            await close_pools()

    report = asyncio.run(run())
    assert report.faults == []
    assert report.slowest.seconds < audited.deadline_s


def run(*words: str) -> int:
    return main(["audit", *words])


def test_command_audits_ones_own_reward(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reward, tasks, out = tmp_path / "mine.py", tmp_path / "tasks.jsonl", tmp_path / "trials.json"
    reward.write_text("def lazy(text, answer):\n    return float(answer in text)\n")
    rows = [{"prompt": "What is 17 + 25?", "answer": 42, "reference": "Answer: 42", "gold": "42", "wrong": "43"}]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(f"{reward}:lazy", "--tasks", str(tasks), "--json", str(out)) == 1
    printed = capsys.readouterr().out
    assert "hedge: gold denied: earned 1, allowed at most 0" in printed
    (written,) = json.loads(out.read_text())
    assert not written["passed"]
    assert {"control": "reference", "value": 1.0}.items() <= written["trials"][0].items()
    reward.write_text(
        "from rewards.shipped import EXACT as made\nfrom posttrain.types import Score\n"
        "class Blind:\n    async def score(self, rollout, sandbox=None):\n        return Score(value=0.0)\n"
    )
    load_object.cache_clear()
    assert run(f"{reward}:made", "--tasks", str(tasks)) == 0
    assert run(f"{reward}:Blind", "--tasks", str(tasks)) == 1
    assert "reference: earned 0, expected at least 1" in capsys.readouterr().out
    reward.write_text("class Wants:\n    def __init__(self, model):\n        self.model = model\n")
    load_object.cache_clear()
    assert run(f"{reward}:Wants", "--tasks", str(tasks)) == 2
    assert "without arguments" in capsys.readouterr().err


def test_command_audits_ours_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--only", "from_verl", "--only", "gate") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["reward", "from_verl", "gate"]
    assert run("--only", "nothing") == 2
    assert "no such reward" in capsys.readouterr().err
    assert run("rewards.math:MathReward") == 2
    assert "--tasks" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "field"), [("humaneval", "canonical_solution"), ("mbpp", "code")])
def test_reference_files_with_other_fields_are_named(
    kind: str, field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"task_id": "1"}\n')
    (tmp_path / "box.py").write_text("class Box:\n    def check(self):\n        pass\n")
    words = ("--substrate", f"{tmp_path / 'box.py'}:Box", "--only", "cap")
    assert run(f"--{kind}", str(path), *words) == 2
    assert f"rows.jsonl:1: no field '{field}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"), [("", "no rows"), ("[]", ":1"), ("{", ":1"), ('{"prompt": "x"}', "'reference'")]
)
def test_tasks_files_are_read_with_line_numbers(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_cases(path)


def test_table_lines_up() -> None:
    report = asyncio.run(audit(Audited(name="own", reward=from_function(lambda text: 0.0), cases=(CASE,)), None))
    head, line = table([report]).splitlines()
    assert len(head) == len(line)
    assert line.startswith("own")
    assert line.endswith("1")


def parts_of(value: Any) -> Iterator[type]:
    """The classes of a reward and of all that it is made of."""
    if isinstance(value, Mapping):
        for part in value.values():
            yield from parts_of(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        for each in dataclasses.fields(value):
            yield from parts_of(getattr(value, each.name))


def test_no_reward_of_ours_is_left_out() -> None:
    modules = [importlib.import_module(f"rewards.{info.name}") for info in pkgutil.iter_modules(rewards.__path__)
               if info.name != "worker_process"]  # fmt: skip
    ours = {
        kind
        for module in modules
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == module.__name__
        and (callable(getattr(kind, "score", None)) or callable(getattr(kind, "score_group", None)))
    }  # fmt: skip
    assert MathReward in ours
    assert ours - {part for make in SHIPPED.values() for part in parts_of(make().reward)} == set()
