"""The store of finished rollouts: atomic, durable, shared by processes, and wary of damage."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from posttrain.rollout.outcomes import Outcomes
from posttrain.types import Completion, FinishReason, Rollout, Score, StopReason, Task, Turn

IDS = [
    "grpo-code/12/3/5",
    "grpo-code/12/3",
    "../../etc/passwd",
    "a/../b",
    "a/./b",
    "a/%2E%2E/b",
    "a b/\n/\0/é",
    ".hidden",
]


def test_a_rollout_and_its_score_come_back(tmp_path: Path) -> None:
    task = Task(id="t", domain="d", prompt=({"role": "user", "content": "x"},), info={"tests": [1, 2]})
    tokens = np.array([4, 5], np.int32)
    completion = Completion(
        request_id="r", token_ids=tokens, logprobs=-tokens / np.float32(3), versions=tokens, finish=FinishReason.STOP
    )
    turn = Turn(context_ids=np.arange(3, dtype=np.int32), completion=completion, text="ab")
    rollout = Rollout(id="s/1/0/0", task=task, turns=(turn,), stop=StopReason.FINISHED)
    score = Score(value=0.5, parts={"a": None})
    Outcomes(tmp_path).put({rollout.id: (rollout, score)})
    outcomes = Outcomes(tmp_path)
    found, its_score = outcomes.get(rollout.id)
    assert found.task == task
    assert its_score == score
    np.testing.assert_array_equal(found.token_ids, rollout.token_ids)
    np.testing.assert_array_equal(found.logprobs, rollout.logprobs)
    assert outcomes.damaged == 0


def test_ids_never_meet_and_never_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "outcomes"
    outcomes = Outcomes(folder)
    for number, rollout_id in enumerate(IDS):
        assert outcomes.get(rollout_id) is None
        outcomes.put({rollout_id: number})
    assert [outcomes.get(rollout_id) for rollout_id in IDS] == list(range(len(IDS)))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(IDS)
    assert all(path.is_relative_to(folder) for path in files)
    outcomes.put({IDS[0]: "other"})
    assert outcomes.get(IDS[0]) == "other"


@pytest.mark.parametrize("rollout_id", ["", "a//b", "/a", "a/", "x" * 201, "é" * 40])
def test_an_empty_or_overlong_part_is_refused(tmp_path: Path, rollout_id: str) -> None:
    with pytest.raises(ValueError, match=r"rollout id .*expected parts of 1 to 200"):
        Outcomes(tmp_path).put({rollout_id: 1})


def test_a_stage_s_old_steps_are_forgotten_and_nothing_else(tmp_path: Path) -> None:
    outcomes = Outcomes(tmp_path)
    kept = ["a/10/0/0", "a/10/0", "a/11/0/0", "b/9/0/0", "a/notes/1", "ab/1/0/0"]
    for rollout_id in ["a/9/0/0", "a/9/0", "a/2/1/1", "a/3", *kept]:
        outcomes.put({rollout_id: rollout_id})
    outcomes.forget_before("a", 10)
    outcomes.forget_before("never", 10)
    assert [outcomes.get(rollout_id) for rollout_id in kept] == kept
    assert {outcomes.get(rollout_id) for rollout_id in ("a/9/0/0", "a/9/0", "a/2/1/1", "a/3")} == {None}
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == len(kept)


def test_a_file_damaged_anywhere_or_cut_at_any_byte_is_absent_and_counted(tmp_path: Path) -> None:
    outcomes = Outcomes(tmp_path)
    outcomes.put({"a/1/2/3": ("value", 1)})
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
    whole = path.read_bytes()
    broken = [whole[:size] for size in range(len(whole))] + [whole + b"x"]
    for offset in range(len(whole)):
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << offset % 8
        broken.append(bytes(flipped))
    for data in broken:
        path.write_bytes(data)
        outcomes = Outcomes(tmp_path)
        assert outcomes.get("a/1/2/3") is None
        assert outcomes.get("a/1/2/4") is None
        assert outcomes.damaged == 1
    outcomes.put({"a/1/2/3": "again"})
    assert outcomes.get("a/1/2/3") == "again"


def test_values_put_together_share_a_file_and_come_back_one_by_one(tmp_path: Path) -> None:
    outcomes = Outcomes(tmp_path)
    outcomes.put({f"a/1/{group}/{row}": (group, row) for group in range(3) for row in range(4)})
    outcomes.put({"a/1/0/0": "later", "a/2/0/0": "elsewhere"})
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
    for reader in (outcomes, Outcomes(tmp_path)):
        assert reader.get("a/1/2/3") == (2, 3)
        assert reader.get("a/1/0/0") == "later"
        assert reader.get("a/2/0/0") == "elsewhere"
        assert reader.get("a/1/2/4") is None


def test_kills_leave_the_old_value_or_the_new(tmp_path: Path) -> None:
    """Each life replaces values until it is killed; what ``put`` returned for is there, and nothing is torn."""
    chance = random.Random(0)
    outcomes = Outcomes(tmp_path)
    for _ in range(30):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            _put_for_ever(tmp_path, writing)
        os.close(writing)
        started = os.read(reading, 1)
        time.sleep(chance.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as pipe:
            told = len(started + pipe.read())
        found = outcomes.get("a/1/0/0")
        assert found["number"] in (told, told + 1)
        assert found["body"] == bytes([found["number"] % 251]) * 20_000
    assert outcomes.damaged == 0


def _put_for_ever(folder: Path, told: int) -> None:
    try:
        number = 0
        while True:
            number += 1
            Outcomes(folder).put({"a/1/0/0": {"number": number, "body": bytes([number % 251]) * 20_000}})
            os.write(told, b".")
    finally:
        os._exit(1)


def test_putting_and_forgetting_at_the_same_time_fails_neither(tmp_path: Path) -> None:
    rounds = [0] * 4
    stop = time.monotonic() + 1.0

    def work(row: int) -> None:
        outcomes = Outcomes(tmp_path)
        while time.monotonic() < stop:
            outcomes.put({f"a/1/0/{row}": row})
            assert outcomes.get(f"a/1/0/{row}") in (row, None)
            outcomes.forget_before("a", 2)
            rounds[row] += 1

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [None] * 4
    assert min(rounds) > 1
