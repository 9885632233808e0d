"""Final-state grading of tool-using tasks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from posttrain.errors import RecipeError
from posttrain.types import Rollout, StopReason, Task
from rewards.agent import FinalStateReward

EXPECTED = {"out/a.txt": "alpha\nbeta\n", "b.txt": "b"}


def value(artifacts: dict[str, bytes], info: dict[str, Any], *, partial: bool = False) -> float | None:
    task = Task(id="t", domain="agent", prompt=(), info=info)
    rollout = Rollout(id="r", task=task, turns=(), stop=StopReason.FINISHED, artifacts=artifacts)
    return asyncio.run(FinalStateReward(partial=partial).score(rollout)).value


@pytest.mark.parametrize(
    ("artifacts", "whole", "share"),
    [
        ({"out/a.txt": b"alpha\nbeta", "./b.txt": b"b\n\n", "scratch": b"x"}, 1.0, 1.0),
        ({"out/a.txt": b"alpha\nbeta\n"}, 0.0, 0.5),
        ({"out/a.txt": b"alpha\n\nbeta", "b.txt": b"b"}, 0.0, 0.5),
        ({"out/a.txt": b"\xff", "b.txt": b" b"}, 0.0, 0.0),
        ({}, 0.0, 0.0),
    ],
)
def test_files_count_not_words(artifacts: dict[str, bytes], whole: float, share: float) -> None:
    assert value(artifacts, {"expected_files": EXPECTED}) == whole
    assert value(artifacts, {"expected_files": EXPECTED}, partial=True) == share


def test_forbidden_file_costs_everything() -> None:
    info = {"expected_files": {"b.txt": "b"}, "forbidden_files": ["tmp/../secret"]}
    assert value({"b.txt": b"b"}, info) == 1.0
    assert value({"b.txt": b"b", "secret": b""}, info, partial=True) == 0.0


@pytest.mark.parametrize("info", [{}, {"expected_files": {}}, {"expected_files": {"a": b"bytes"}}])
def test_task_without_expectations_is_an_error(info: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="expected_files"):
        value({}, info)
