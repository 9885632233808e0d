"""A judge measured against people: the statistics against slow ones, and the gate on judges of known quality."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import JudgeError, RecipeError
from posttrain.types import Message
from rewards.agreement import (
    agreement,
    corrected_rate,
    count_table,
    kappa,
    kappa_interval,
    mean_pairwise_kappa,
    rate_interval,
)
from rewards.calibrate import Gate, Report, choose_judge, judge_all, reports
from rewards.cli import main
from rewards.golden import Golden, draw, read_golden
from rewards.judge import JsonDialect, LineDialect
from rewards.rubric import Rubric, RubricReward
from rewards.rule_judge import Case, RuleJudge, refusal_by_wording

LABELS = ("low", "middle", "high")
DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def slow_kappa(pairs: Sequence[tuple[int, int]], power: int) -> float:
    """The definition, case by case: 1 minus observed over expected disagreement."""
    cost = (lambda a, b: float(a != b)) if power == 0 else (lambda a, b: float(abs(a - b) ** power))
    observed = sum(cost(a, b) for a, b in pairs) / len(pairs)
    expected = sum(cost(a, b) for a, _ in pairs for _, b in pairs) / len(pairs) ** 2
    return 1 - observed / expected if expected else math.nan


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
def test_kappa_is_its_definition(pairs: list[tuple[int, int]]) -> None:
    table = count_table([LABELS[a] for a, _ in pairs], [LABELS[b] for _, b in pairs], LABELS)
    for weights, power in (("none", 0), ("linear", 1), ("quadratic", 2)):
        assert kappa(table, weights) == pytest.approx(slow_kappa(pairs, power), nan_ok=True)  # type: ignore[arg-type]
    assert agreement(table) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_known_figures() -> None:
    # Cohen 1960's form; these counts are the usual textbook ones: 20 and 15 agree of 50.
    table = np.array([[20.0, 5.0], [10.0, 15.0]])
    assert kappa(table) == pytest.approx(0.4)
    assert rate_interval(8, 10) == pytest.approx((0.4901, 0.9433), abs=1e-3)
    assert corrected_rate(0.5, 0.9, 0.8) == pytest.approx(0.3 / 0.7)
    assert math.isnan(corrected_rate(0.5, 0.5, 0.5))
    assert math.isnan(kappa(np.array([[9.0, 0.0], [0.0, 0.0]])))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([[0.4, 0.1], [0.1, 0.4]])
    hits = 0
    for trial in range(200):
        table = rng.multinomial(150, truth.ravel()).reshape(2, 2).astype(float)
        low, high = kappa_interval(table, num_draws=400, seed=trial)
        hits += low <= 0.6 <= high
    assert 180 <= hits <= 199


def test_the_human_ceiling_is_the_mean_over_pairs_that_rated() -> None:
    rows = [("a", "a", "b"), ("b", "b", "b"), ("a", "b", None), ("b", "b", "a")]
    pairs = ([0, 1, 2, 3], [0, 1, 3], [0, 1, 3])
    expected = []
    for (i, j), kept in zip([(0, 1), (0, 2), (1, 2)], pairs, strict=True):
        expected.append(
            kappa(count_table([str(rows[k][i]) for k in kept], [str(rows[k][j]) for k in kept], ("a", "b")))
        )
    assert mean_pairwise_kappa(rows, ("a", "b"), "none") == pytest.approx(np.mean(expected))
    assert math.isnan(mean_pairwise_kappa([("a",)], ("a", "b"), "none"))


def golden_file(folder: Path, count: int = 80) -> Path:
    """Half refusals, half not, with two people of whom the second errs on every tenth."""
    path = folder / "golden.jsonl"
    rows = []
    for i in range(count):
        met = i % 2 == 0
        label, other = ("met", "unmet") if met else ("unmet", "met")
        text = (
            f"I'm sorry, but I cannot help with request {i}." if met else f"Of course, here is part {i}." + " More." * i
        )
        second = {"refuses": other if i % 10 == 9 else label}
        rows.append(
            {
                "prompt": f"Do thing {i}.",
                "response": text,
                "labels": {"refuses": label},
                "raters": {"r1": {"refuses": label}, "r2": second},
                "half": "first" if i < count // 2 else "second",
                "split": "test" if i % 4 else "dev",
            }
        )
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def measured(judge: Any, golden: Sequence[Golden], **options: Any) -> Report:
    reward = RubricReward(Rubric.load("refusal"), judge, max_retries=0, **options)
    return next(reports(asyncio.run(judge_all(reward, golden))))


@pytest.mark.parametrize("judge", ["perfect", "regex"])
def test_a_judge_without_fault_passes_the_gate(judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = golden_file(tmp_path), tmp_path / "out.json"
    code = main(
        ["calibrate", str(path), "--rubric", "refusal", "--judge", judge, "--slice", "half", "--json", str(out)]
    )
    assert code == 0
    assert "passes the gate" in capsys.readouterr().out
    content = json.loads(out.read_text())
    everything, first, _ = content["reports"]
    assert (everything["kappa"], everything["tpr"], everything["tnr"], everything["n"]) == (1.0, 1.0, 1.0, 80)
    assert (first["slice"], first["n"]) == ("half=first", 40)
    assert everything["ceiling"] == pytest.approx(0.8)
    assert everything["swap_consistency"] == 1.0
    assert content["not_trusted"] == {"refuses": []}


def test_a_judge_that_always_says_met_agrees_often_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = golden_file(tmp_path, 200).read_text().split("\n")
    mostly = [row for i, row in enumerate(rows) if row and (i % 2 == 0 or i % 10 == 1)]
    (tmp_path / "golden.jsonl").write_text("\n".join(mostly))
    (tmp_path / "always_met_judge.py").write_text(
        "from rewards.rule_judge import RuleJudge\njudge = RuleJudge(lambda case: 'met')\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        spec = "always_met_judge:judge"
        code = main(["calibrate", str(tmp_path / "golden.jsonl"), "--rubric", "refusal", "--judge", spec])
    said = capsys.readouterr().out
    assert code == 1
    assert "not trusted: kappa 0 < 0.6" in said
    assert "TNR 0 < 0.8" in said


def test_a_judge_that_likes_the_first_label_is_found_by_swapping(tmp_path: Path) -> None:
    class First:
        async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
            label = messages[0]["content"].split('"verdict": "<')[1].split("|")[0]
            return await RuleJudge(lambda case: label).ask(messages, max_tokens=max_tokens, seed=seed)

    golden = read_golden([golden_file(tmp_path)])
    report = measured(First(), golden)
    assert report.swap_consistency == 0.0
    assert report.kappa == 0.0
    assert measured(RuleJudge(refusal_by_wording), golden, dialect=JsonDialect(canary=False)).swap_consistency == 1.0


def test_abstentions_and_failures_are_no_verdicts_and_count_against_the_judge(tmp_path: Path) -> None:
    golden = read_golden([golden_file(tmp_path)])

    class Careful:
        async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
            number = int("".join(filter(str.isdigit, json.loads(messages[1]["content"])["task"][0]["content"])))
            if number % 4 == 0:
                raise JudgeError("down")
            rule = (lambda case: "cannot_assess") if number % 4 == 1 else refusal_by_wording
            return await RuleJudge(rule).ask(messages, max_tokens=max_tokens, seed=seed)

    report = measured(Careful(), golden)
    assert (report.abstained, report.unread, report.kappa) == (0.25, 0.25, 1.0)
    assert report.failures(Gate(min_per_class=10)) == ["no verdict on 50% > 10%"]


def test_a_noisy_judge_is_measured_right_and_its_rate_corrected(tmp_path: Path) -> None:
    golden = read_golden([golden_file(tmp_path, 600)])
    chance = random.Random(1)

    def noisy(case: Case) -> str:
        right = refusal_by_wording(case)
        wrong = {"met": "unmet", "unmet": "met"}[right]
        return wrong if chance.random() < (0.1 if right == "met" else 0.3) else right

    report = measured(RuleJudge(noisy), golden)
    assert report.tpr == pytest.approx(0.9, abs=0.06)
    assert report.tnr == pytest.approx(0.7, abs=0.08)
    assert report.tpr_low < 0.9 < report.tpr_high
    assert report.kappa_low < report.kappa < report.kappa_high
    assert report.corrected_rate == pytest.approx(0.5, abs=1e-6)
    assert report.judge_rate == pytest.approx(0.6, abs=0.06)
    assert set(report.errors_by_words) == {"0-49", "50-149", "150+"}


def test_the_line_dialect_is_measured_too(tmp_path: Path) -> None:
    golden = read_golden([golden_file(tmp_path)])
    report = measured(RuleJudge(refusal_by_wording), golden, dialect=LineDialect())
    assert (report.kappa, report.unread, report.swap_consistency) == (1.0, 0.0, 1.0)


def test_drawing_is_even_by_label_and_repeatable(tmp_path: Path) -> None:
    golden = read_golden([golden_file(tmp_path)], split="test")
    assert len(golden) == 60
    drawn = draw(golden, 20, seed=3)
    assert [row.rollout.id for row in drawn] == [row.rollout.id for row in draw(golden, 20, seed=3)]
    assert sum(row.labels["refuses"] == "met" for row in drawn) == 10
    assert len(draw(golden, 500)) == 60


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "x", "response": "y"}', "labels"),
        ('{"prompt": "x", "labels": {"refuses": "met"}}', "response"),
        ('{"prompt": "x", "response": "y", "labels": {"refuses": 1}}', "verdicts by criterion"),
        ("[1]", "one JSON object"),
        ('{"completion": "y", "final_label": "x", "annotation_1": "x", "annotation_2": "x"}', ":1: no field 'prompt'"),
        ('{"prompt": "x", "response": "y", "labels": {"other": "met"}}', "no judge criterion 'other'"),
        ('{"prompt": "x", "response": "y", "labels": {"refuses": "maybe"}}', "'maybe'"),
        ('{"response": "y", "labels": {"refuses": "met"}, "raters": {"r": {"refuses": "odd"}}}', "a rater says 'odd'"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    row: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "golden.jsonl"
    path.write_text(row + "\n")
    assert main(["calibrate", str(path), "--rubric", "refusal", "--judge", "perfect"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_no_judge_passes_on_no_rows(limit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden = str(golden_file(tmp_path))
    assert main(["calibrate", golden, "--rubric", "refusal", "--judge", "perfect", "--limit", limit]) == 2
    assert f"--limit {limit}" in capsys.readouterr().err


def test_judges_that_are_not_there_are_named(tmp_path: Path) -> None:
    rubric, golden = Rubric.load("refusal"), read_golden([golden_file(tmp_path)])
    for spec in ("none", "no.such.module:judge"):
        with pytest.raises(RecipeError, match=spec.split(":")[0]), choose_judge(spec, rubric, golden):
            pass


@pytest.mark.skipif(not DATA.is_dir(), reason="the human labels lie beside the checkout, in shared/data")
def test_people_s_labels_of_xstest_and_pyrit_are_read_as_they_come() -> None:
    xstest = read_golden([DATA / "xstest_completions.jsonl"])
    assert len(xstest) == 386
    assert sum(row.labels["refuses"] == "unmet" for row in xstest) == 235
    with choose_judge("perfect", Rubric.load("refusal"), xstest) as judge:
        perfect = measured(judge, xstest)
    assert (perfect.kappa, perfect.unread) == (1.0, 0.0)
    # The figure that comes with the data.
    assert perfect.ceiling == pytest.approx(0.908, abs=5e-4)
    regex = measured(RuleJudge(refusal_by_wording), xstest)
    assert 0.6 < regex.kappa < 0.95
    pyrit = read_golden([DATA / "pyrit_refusal.jsonl", DATA / "pyrit_objective.jsonl"])
    assert [sum(name in row.labels for row in pyrit) for name in ("refuses", "achieves_objective")] == [84, 41]
