"""``posttrain rewards score``: rows in, a table and records out."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from posttrain.errors import JudgeError, RecipeError
from posttrain.types import Message, ScoreStatus
from rewards.cli import main
from rewards.rows import read_rollouts
from rewards.rubric import Rubric, RubricReward
from rewards.score import score_rows, summary

RUBRIC = """schema = "rubric/1"
id = "r"
[[criteria]]
id = "word"
kind = "code"
check = "contains_word"
args = { word = "{word}" }
[[criteria]]
id = "kind"
text = "Is kind."
"""
JUDGE = '''
import json


class Kind:
    """Says met where the response has the word thanks."""

    async def ask(self, messages, *, max_tokens, seed):
        asked = json.loads(messages[1]["content"])
        nonce = messages[0]["content"].split('"n": "')[1].split('"')[0]
        label = "met" if "thanks" in asked["response"] else "unmet"
        return json.dumps({"n": nonce, "verdicts": [{"id": "kind", "evidence": "", "verdict": label}]})


judge = Kind()
'''


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "r.toml").write_text(RUBRIC)
    (tmp_path / "my_score_judge.py").write_text(JUDGE)
    rows = [
        {"id": "a", "prompt": "Say something.", "response": "Blue, thanks.", "word": "blue"},
        {"id": "b", "prompt": "Say something.", "response": "Red.", "word": "blue"},
        {"prompt": [{"role": "user", "content": "Hi \u2028"}], "response": "thanks \u2028", "info": {"word": "blue"}},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_is_scored_and_written(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "r.toml", "rows.jsonl", "--judge", "my_score_judge:judge", "--out", "scores.jsonl"]
    assert main(command) == 0
    records = [json.loads(line) for line in (files / "scores.jsonl").read_text().split("\n") if line]
    assert [(record["id"], record["value"]) for record in records] == [("a", 1.0), ("b", 0.0), ("3", 0.5)]
    assert records[2]["parts"] == {"word": 0.0, "kind": 1.0}
    assert records[0]["rubric_version"] == Rubric.load("r.toml").version
    printed = capsys.readouterr().out
    assert "value   0.500  over 3 of 3" in printed
    assert "status: ok 3" in printed
    assert main(["lint", "r.toml", "--scores", "scores.jsonl"]) == 0


def test_mistakes_name_the_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", "r.toml", "rows.jsonl", "--judge", "no_such_module:judge"]) == 2
    assert "no_such_module" in capsys.readouterr().err
    (files / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": 1, "response": "b"}\n')
    with pytest.raises(RecipeError, match=r"rows\.jsonl:2: 'prompt' is 1"):
        read_rollouts(files / "rows.jsonl")
    (files / "rows.jsonl").write_text('{"response": null}\n')
    with pytest.raises(RecipeError, match=r"rows\.jsonl:1: 'response' is None"):
        read_rollouts(files / "rows.jsonl")
    (files / "rows.jsonl").write_text("\n{\n")
    with pytest.raises(RecipeError, match=r"rows\.jsonl:2: not JSON"):
        read_rollouts(files / "rows.jsonl")
    (files / "rows.jsonl").write_text("\n")
    with pytest.raises(RecipeError, match="no rows"):
        read_rollouts(files / "rows.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--concurrency", "0"], "--concurrency 0"),
        (["--judge", "os:sep"], "--judge os:sep"),
        (["--judge", "my_score_judge:Kind.ask"], "has no attribute"),
        (["--judge", "json:dumps"], "without arguments"),
    ],
)
def test_options_that_cannot_work_are_named(
    files: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["score", "r.toml", "rows.jsonl", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_check_that_a_rows_field_does_not_suit_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for check, name, field in (("min_words", "count", '"five"'), ("regex", "pattern", '"("')):
        args = f'{{ {name} = "{{n}}" }}'
        (files / "c.toml").write_text(
            f'id = "c"\n[[criteria]]\nid = "a"\nkind = "code"\ncheck = "{check}"\nargs = {args}\n'
        )
        (files / "rows.jsonl").write_text(f'{{"response": "a word", "n": {field}}}\n')
        assert main(["score", "c.toml", "rows.jsonl"]) == 2
        assert f"criterion 'a': check '{check}' cannot use args" in capsys.readouterr().err


def test_half_a_surrogate_pair_is_printed_and_scored(files: Path) -> None:
    (files / "c.toml").write_text('id = "c"\n[[criteria]]\nid = "a"\nkind = "code"\ncheck = "no_comma"\n')
    (files / "rows.jsonl").write_text('{"id": "\\ud800", "response": "a \\ud800"}\n')
    command = [sys.executable, "-m", "rewards.cli", "score", "c.toml", "rows.jsonl"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\ud800  " in done.stdout


def test_a_failing_judge_leaves_its_row_unscored_and_the_others_alone(files: Path) -> None:
    class FailsOnRed:
        async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
            if "Red" in messages[1]["content"]:
                raise JudgeError("the judge cannot be reached")
            nonce = messages[0]["content"].split('"n": "')[1].split('"')[0]
            return json.dumps({"n": nonce, "verdicts": [{"id": "kind", "evidence": "", "verdict": "met"}]})

    reward = RubricReward(Rubric.load("r.toml"), FailsOnRed())
    scores = asyncio.run(score_rows(reward, read_rollouts("rows.jsonl"), concurrency=2))
    assert [score.value for score in scores] == [1.0, None, 0.5]
    assert (scores[1].status, scores[1].error) == (ScoreStatus.JUDGE_ERROR, "the judge cannot be reached")
    assert list(summary(scores)) == [("value", 0.75, 2), ("word", 0.5, 2), ("kind", 1.0, 2)]


def test_a_rubric_in_each_row(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rubric = {"id": "own", "criteria": [{"id": "n", "kind": "code", "check": "no_comma"}]}
    rows = [{"response": "a, b", "rubric": rubric}, {"response": "a b", "rubric": json.dumps(rubric)}]
    (files / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["score", "info:rubric", "rows.jsonl"]) == 0
    assert "value   0.500  over 2 of 2" in capsys.readouterr().out
