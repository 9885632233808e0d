"""Rubrics edited during a run: between steps only, never a broken one, and over a resumption as if nothing happened."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.config import Domain, Model, Recipe
from posttrain.errors import RecipeError
from posttrain.protocols import Reloadable
from posttrain.rollout.environments import SingleTurn
from posttrain.runs.describe import describe
from posttrain.runs.rundir import EventKind, StageDir
from posttrain.stages.reward_files import RewardFiles
from posttrain.types import Message
from rewards.compose import Gate, WeightedSum
from rewards.math import MathReward
from rewards.pairwise import PairwiseReward
from rewards.reload import RubricFile
from rewards.rubric import Rubric, RubricReward
from tests.mini_recipe import LetterTasks

ROOT = Path(__file__).parent.parent
RECIPE = Path(__file__).parent / "reload_recipe.py"


def rubric_text(*suffixes: str) -> str:
    """A rubric that pays for each of these endings."""
    criteria = "".join(
        f'[[criteria]]\nid = "c{i}"\nkind = "code"\ncheck = "ends_with"\nargs = {{ suffix = "{suffix}" }}\n'
        for i, suffix in enumerate(suffixes)
    )
    return f'# lint: ignore[constant-answer]\nschema = "rubric/1"\nid = "r"\n{criteria}'


A, B, C = rubric_text("a"), rubric_text("a", "b"), rubric_text("c")
ANCHORS = [{"response": "xa"}, {"response": "xb"}, {"response": "xc"}]


def write(path: Path, text: str, *, age_s: float = 100) -> Path:
    path.write_text(text)
    os.utime(path, (path.stat().st_mtime - age_s,) * 2)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "anchors.jsonl").write_text("\n".join(map(json.dumps, ANCHORS)))
    return write(tmp_path / "rubric.toml", A)


def rubric_file(path: Path) -> RubricFile:
    return RubricFile(path, anchors=path.parent / "anchors.jsonl")


def test_a_file_is_its_text_until_told_otherwise(path: Path) -> None:
    source = rubric_file(path)
    write(path, B)
    assert source.text == A
    assert source.read() == B
    other = source.with_text(B)
    assert other.rubric == Rubric.parse("r", B)
    assert (source.text, other.text) == (A, B)
    assert other != source == pickle.loads(pickle.dumps(source))
    assert len(other.anchors) == 3


def test_a_file_that_is_being_written_waits(path: Path) -> None:
    source = rubric_file(path)
    write(path, B, age_s=0)
    assert source.read() == A
    write(path, B, age_s=5)
    assert source.read() == B


def test_the_text_is_no_part_of_the_recipe_but_the_anchors_are(path: Path) -> None:
    before = describe(RubricReward(rubric_file(path)))
    write(path, B)
    assert describe(RubricReward(rubric_file(path))) == before
    (path.parent / "anchors.jsonl").write_text('{"response": "other"}')
    assert describe(RubricReward(rubric_file(path))) != before


def test_what_cannot_be_used_is_refused(path: Path) -> None:
    source = rubric_file(path)
    for text in ("criteria = [", A.replace('id = "c0"', 'id = "c 0"'), A + '[[criteria]]\nid = "z"\ntext = "TODO"\n'):
        with pytest.raises(RecipeError, match=r"rubric\.toml:\d+: error"):
            source.with_text(text)
        write(path, text)
        with pytest.raises(RecipeError, match=r"rubric\.toml:\d+: error"):
            rubric_file(path)


class FixedJudge:
    """Prefers, in each pair, the response that comes later in the alphabet."""

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        shown = json.loads(messages[1]["content"])
        nonce = messages[0]["content"].split('"n": "')[1].split('"')[0]
        verdict = "first" if shown["first"] > shown["second"] else "second"
        return json.dumps({"n": nonce, "verdicts": [{"id": "better", "evidence": "", "verdict": verdict}]})


def test_combined_rewards_pass_files_on(path: Path) -> None:
    inner = RubricReward(rubric_file(path))
    for reward in (
        inner,
        WeightedSum({"math": MathReward(), "rubric": inner}, {"math": 1.0, "rubric": 1.0}),
        Gate(condition=inner, reward=MathReward()),
        Gate(condition=MathReward(), reward=WeightedSum({"rubric": inner}, {"rubric": 1.0})),
    ):
        assert isinstance(reward, Reloadable)
        assert reward.files == {str(path): A}
        write(path, B)
        assert reward.read_files() == {str(path): B}
        edited = reward.with_files({str(path): B, "another.toml": C})
        assert edited.files == {str(path): B}
        assert asyncio.run(reward.score_anchors()) == {str(path): (1.0, 0.0, 0.0)}
        assert asyncio.run(edited.score_anchors()) == {str(path): (0.5, 0.5, 0.0)}
        write(path, A)
    fixed = WeightedSum({"math": MathReward()}, {"math": 1.0})
    assert (fixed.files, fixed.with_files({"a": "b"})) == ({}, fixed)


def test_pairwise_anchors_are_compared(path: Path) -> None:
    write(path, 'schema = "rubric/1"\nid = "r"\n[[criteria]]\nid = "a"\ntext = "Is late."\n')
    reward = PairwiseReward(rubric=rubric_file(path), judge=FixedJudge())
    assert asyncio.run(reward.score_anchors()) == {str(path): (0.0, 0.5, 1.0)}


class FakeSession:
    """The parts of a session that taking up files needs, with a reward that scores in this process."""

    def __init__(self, reward: Any) -> None:
        self.current = reward
        self.recipe = Recipe(
            name="r",
            model=Model(path="none"),
            domains={"d": Domain(tasks=LetterTasks("d", "a"), reward=reward, environment=SingleTurn())},
        )
        self.warnings: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.run = self.rollouts = self
        self.broken = ""

    def reward(self, domain: str) -> Any:
        return self.current

    def use_reward(self, domain: str, reward: Any) -> None:
        self.current = reward

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def log_event(self, kind: EventKind, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})

    def score_anchors(self, reward: Reloadable) -> Any:
        if self.broken:
            raise RuntimeError(self.broken)
        return asyncio.run(reward.score_anchors())

    @property
    def text(self) -> str:
        return next(iter(self.current.files.values()))


def start(path: Path, step: int = 0) -> tuple[FakeSession, RewardFiles]:
    session = FakeSession(RubricReward(rubric_file(path)))
    files = RewardFiles(session, StageDir(path.parent / "stage"), "d")  # type: ignore[arg-type]
    files.restore(step)
    return session, files


def test_an_edit_takes_effect_with_the_next_step_and_says_how_far_the_scale_moved(path: Path) -> None:
    session, files = start(path)
    assert files.refresh(0) == {}
    write(path, B)
    assert session.text == A
    shift = pytest.approx(2 / 6 - 1 / 3)
    assert files.refresh(1) == {"reloaded_files": 1.0, "anchor_shift": shift}
    assert session.text == B
    anchors = {
        "num_scored": 3,
        "num_anchors": 3,
        "old": pytest.approx(1 / 3),
        "new": pytest.approx(1 / 3),
        "shift": shift,
    }
    assert session.events == [
        {"kind": "reloaded", "stage": "stage", "step": 1, "files": [str(path)], "anchors": {str(path): anchors}}
    ]
    assert files.refresh(2) == {}
    assert session.warnings == []


def test_a_broken_edit_keeps_the_old_version_and_warns_once(path: Path) -> None:
    session, files = start(path)
    files.refresh(0)
    write(path, "criteria = [")
    for step in (1, 2):
        assert files.refresh(step) == {}
    assert session.text == A
    assert len(session.warnings) == 1
    assert f"the edit of {path} is not taken up" in session.warnings[0]
    path.unlink()
    for step in (3, 4):
        files.refresh(step)
    assert len(session.warnings) == 2
    write(path, B)
    files.refresh(5)
    assert session.text == B


def test_an_edit_that_needs_fields_the_tasks_lack_is_refused(path: Path) -> None:
    session, files = start(path)
    files.refresh(0)
    write(path, rubric_text("{ending}"))
    assert files.refresh(1) == {}
    assert session.text == A
    assert "needs the field 'ending', but task.info has none" in session.warnings[0]


def test_an_edit_whose_check_cannot_use_what_the_tasks_have_is_refused(path: Path) -> None:
    edited = rubric_file(path).with_text(A.replace('suffix = "a"', 'suffix = "{ending}"'))
    task = replace(next(iter(LetterTasks("d", "a").train(seed=0))), info={"ending": 3})
    with pytest.raises(RecipeError, match="check 'ends_with' cannot use args"):
        RubricReward(edited).check_task(task)
    RubricReward(edited).check_task(replace(task, info={"ending": "a"}))


def test_an_edit_whose_anchors_cannot_be_scored_waits(path: Path) -> None:
    session, files = start(path)
    files.refresh(0)
    write(path, B)
    session.broken = "the judge cannot be reached"
    assert files.refresh(1) == {}
    assert (session.text, len(session.warnings)) == (A, 1)
    session.broken = ""
    files.refresh(2)
    assert session.text == B


def test_a_resumed_stage_repeats_its_steps_with_the_texts_they_had(path: Path) -> None:
    session, files = start(path)
    files.refresh(0)
    write(path, B)
    metrics = files.refresh(1)
    files.refresh(2)
    write(path, C)
    texts = []
    for first in (0, 1, 2, 3):
        session, files = start(path, first)
        assert session.text == (C if first == 0 else A if first == 1 else B)
        for step in range(first, 4):
            got = files.refresh(step)
            assert got == metrics if step == 1 else step == 3 or got == {}
            texts.append((step, session.text))
        (path.parent / "stage" / "reward_files-d.jsonl").write_text(
            "".join(
                line
                for line in (path.parent / "stage" / "reward_files-d.jsonl").read_text().splitlines(keepends=True)
                if json.loads(line)["step"] < 3
            )
        )
    assert set(texts) == {(0, A), (1, B), (2, B), (3, C)}


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_an_edit_reaches_the_workers_of_a_real_run_and_survives_a_resumption(tmp_path: Path, tiny_model: str) -> None:
    """Edits: one in step 0, a broken one in step 1, and one in step 3, in which the run also ends."""
    (tmp_path / "anchors.jsonl").write_text("\n".join(map(json.dumps, ANCHORS)))
    write(tmp_path / "rubric.toml", A)
    for number, text in ((0, B), (2, "criteria = ["), (6, C)):
        (tmp_path / f"edit-{number}.toml").write_text(text)
    (tmp_path / "stop-7").touch()
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "posttrain.cli", "run", str(RECIPE), "--run-dir", str(run_dir)]
    command += ["--set", f"model.path={tiny_model}"]
    environment = {**os.environ, "RELOAD_FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT)}
    stopped = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, check=False)
    assert stopped.returncode == 2, stopped.stderr
    assert "the run ends here" in stopped.stderr
    done = subprocess.run(
        [*command, "--resume"], capture_output=True, text=True, timeout=90, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr

    version = {text: Rubric.parse("r", text).version for text in (A, B, C)}
    rollouts = [json.loads(line) for line in (run_dir / "stages/grpo-letters/rollouts.jsonl").read_text().splitlines()]
    found = {(rollout["step"], rollout["rubric_version"]) for rollout in rollouts}
    assert found == {(0, version[A]), (1, version[B]), (2, version[B]), (3, version[B]), (4, version[C])}
    # A response without words is settled before any criterion is looked at.
    parts = {(rollout["step"], *rollout["parts"]) for rollout in rollouts if "rubric:empty" not in rollout["flags"]}
    expected = {(step, "rubric", "rubric/c0", *(["rubric/c1"] if step in (1, 2, 3) else [])) for step in range(5)}
    assert {1, 4} <= {step for step, *_ in parts}
    assert parts <= expected

    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    reloads = [event for event in events if event["kind"] == "reloaded"]
    assert [(event["step"], event["anchors"][str(tmp_path / "rubric.toml")]["shift"]) for event in reloads] == [
        (1, pytest.approx(0)),
        (4, pytest.approx(0)),
    ]
    refused = [
        event["message"] for event in events if event["kind"] == "warning" and "not taken up" in event["message"]
    ]
    assert len(refused) == 1
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if line.get("reloaded_files")] == [2, 5]
    judged = [json.loads(line) for line in (run_dir / "stages/evaluate/rollouts.jsonl").read_text().splitlines()]
    assert {rollout["rubric_version"] for rollout in judged} == {version[C]}
