"""The guide from a rubric file to a specialist: what it shows is what its commands take, and say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from posttrain.loader import load_recipe
from rewards.cli import main
from rewards.reload import RubricFile
from rewards.rubric import RubricReward

GUIDE = (Path(__file__).parent.parent / "rewards" / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)[0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, language in (("postcard.toml", "toml"), ("anchors.jsonl", "json"), ("postcard.py", "python")):
        (tmp_path / name).write_text(block(language), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_rubric_is_sound_and_the_recipe_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "postcard.toml", "--fields", "topic,word", "--strict"]) == 0
    assert capsys.readouterr().out == "1 read: 0 errors, 0 warnings\n"
    reward = load_recipe("./postcard.py").domains["writing"].reward
    assert isinstance(reward, RubricReward)
    assert isinstance(reward.rubric, RubricFile)
    assert len(reward.rubric.anchors) == 4


def test_the_scores_are_those_of_the_guide(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = ["--judge", "checkpoint:package:recipes/tiny", "--dialect", "line"]
    assert main(["score", "postcard.toml", "anchors.jsonl", *judge]) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        line.rstrip() for line in block("text").splitlines()
    ]


def test_every_rule_of_the_linter_is_in_the_guide() -> None:
    sources = [Path(__file__).parent.parent / "rewards" / name for name in ("traps.py", "lint.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    used = set(re.findall(r'(?:yield|Trap|rule=)\s*\(?\s*"([a-z-]+)"', text)) | {"always-met", "never-met", "duplicate"}
    assert {"invalid", "veto-weight", "compound", "countable", "correlated"} <= used
    assert {rule for rule in used if f"`{rule}`" not in GUIDE} == set()
