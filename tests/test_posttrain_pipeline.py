"""A whole run from the command line: what it leaves behind, and what a second run may do with it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.loader import load_recipe
from posttrain.pipeline import plan

RECIPE = str(Path(__file__).parent / "mini_recipe.py")
STAGES = ["sft-vowels", "grpo-vowels", "sft-digits", "grpo-digits", "distill", "evaluate"]
MODE_KEYS = {"n", "base", "sft", "specialist", "student", "gain_ci", "rl_gain_ci", "kept", "kept_ci", "unscored"}
MODE_KEYS |= {"student_gain_ci"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_the_plan_is_each_specialist_then_the_merge_then_the_proof():
    assert [stage.name for stage in plan(load_recipe(RECIPE))] == STAGES
    alone = load_recipe(RECIPE, ["distill=none", "domains.vowels.sft=none", "domains.digits.grpo=none"])
    assert [stage.name for stage in plan(alone)] == ["grpo-vowels", "sft-digits", "evaluate"]


def test_a_run_leaves_its_files(mini_run):
    run_dir, output = mini_run
    for name in ("recipe.json", "metrics.jsonl", "events.jsonl", "report.json", "report.html"):
        assert (run_dir / name).stat().st_size > 0
    for stage in STAGES:
        assert (run_dir / "stages" / stage / "done.json").is_file()
    for stage in STAGES[:-1]:
        assert (run_dir / "stages" / stage / "final" / "model.safetensors").is_file()
        assert (run_dir / "stages" / stage / "final" / "tokenizer.json").is_file()
    assert len(list((run_dir / "stages/evaluate/scores").glob("*.json"))) == 8
    assert not list(run_dir.rglob("*partial*"))
    assert f"report: {run_dir / 'report.html'}" in output
    assert "Traceback" not in output


def test_metrics_have_a_line_for_every_step_of_every_stage(mini_run):
    lines = [json.loads(line) for line in (mini_run[0] / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step + 1) for stage in STAGES[:-1] for step in range(8 if stage.startswith("sft") else 5)
    ]
    for line in lines:
        assert math.isfinite(line["loss"])
        if line["stage"].startswith("grpo"):
            assert 0 <= line["reward"] <= 1
            assert (line["generated_tokens"] > 0, line["failed_rollouts"], line["unscored"]) == (True, 0, 0)
        if line["stage"] == "distill":
            assert line["kl"] > 0
            assert line["teacher/bytes_cached"] > 0


def test_rollouts_are_kept_with_all_that_explains_their_reward(mini_run):
    path = mini_run[0] / "stages/grpo-digits/rollouts.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 5 * 2 * 4
    for record in records:
        said = record["conversation"][0]["content"]
        assert record["score"] == float("7" in said)
        assert record["parts"] == {"length": len(said)}
        # Played with the weights of its own step: on-policy.
        assert record["versions"] == [record["step"]] * 2


def test_the_report_has_one_entry_a_domain_with_the_promised_numbers(mini_run):
    report = json.loads((mini_run[0] / "report.json").read_text())
    assert {"recipe", "created", "resumed", "domains", "costs", "stages"} <= set(report)
    assert (report["recipe"], report["resumed"]) == ("mini", [])
    assert [entry["domain"] for entry in report["domains"]] == ["digits", "vowels"]
    for entry in report["domains"]:
        assert set(entry) == {"domain", "greedy", "efforts"} | MODE_KEYS
        assert set(entry["greedy"]) == MODE_KEYS
        assert entry["n"] == 6
        for model in ("base", "sft", "specialist", "student"):
            assert 0 <= entry[model] <= 1
            assert entry["unscored"][model] == 0
        low, high = entry["gain_ci"]
        assert low <= entry["specialist"] - entry["base"] <= high
    assert [stage["stage"] for stage in report["stages"]] == STAGES
    assert report["costs"]["generated tokens"] > 0
    assert report["costs"]["distillation"]["bytes cached per token"] == 2 * 32


def test_the_page_is_complete_in_itself_and_the_plots_are_images(mini_run):
    page = (mini_run[0] / "report.html").read_text(encoding="utf-8")
    references = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page) + re.findall(r"url\(([^)]*)\)", page)
    assert [r for r in references if not r.strip("'\"").startswith(("#", "data:"))] == []
    assert "<script" not in page
    assert "@import" not in page
    for name in ("vowels", "digits"):
        assert name in page
    plots = list((mini_run[0] / "plots").glob("*.png"))
    assert plots
    assert all(plot.read_bytes().startswith(b"\x89PNG\r\n") for plot in plots)


def test_a_second_run_into_the_same_directory_is_refused(mini_run, tiny_model, capsys):
    run_dir = mini_run[0]
    before = (run_dir / "events.jsonl").read_bytes()
    assert main(["run", RECIPE, "--set", f"model.path={tiny_model}", "--run-dir", str(run_dir)]) == 2
    message = capsys.readouterr().err
    assert "already holds a run" in message
    assert "--resume" in message
    assert (run_dir / "events.jsonl").read_bytes() == before


def test_resuming_with_another_recipe_is_refused(mini_run, tiny_model, capsys):
    settings = ["--set", f"model.path={tiny_model}", "--set", "domains.*.grpo.max_steps=4"]
    assert main(["run", RECIPE, *settings, "--run-dir", str(mini_run[0]), "--resume"]) == 2
    message = capsys.readouterr().err
    assert "domains.vowels.grpo.max_steps was 5 and is 4" in message


def test_resuming_a_finished_run_repeats_nothing(mini_run, tiny_model):
    run_dir = mini_run[0]
    before = (run_dir / "metrics.jsonl").read_bytes()
    arguments = ["run", RECIPE, "--set", f"model.path={tiny_model}", "--run-dir", str(run_dir), "--resume"]
    assert main(arguments) == 0
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert json.loads((run_dir / "report.json").read_text())["resumed"] == []


def test_the_report_can_be_written_again(mini_run, capsys):
    run_dir = mini_run[0]
    before = json.loads((run_dir / "report.json").read_text())
    (run_dir / "report.json").unlink()
    assert main(["report", str(run_dir)]) == 0
    assert json.loads((run_dir / "report.json").read_text()) == before
    assert "held-out scores" in capsys.readouterr().out


def test_any_checkpoint_can_be_measured(mini_run, tiny_model, tmp_path, capsys):
    run_dir = mini_run[0]
    report = {entry["domain"]: entry for entry in json.loads((run_dir / "report.json").read_text())["domains"]}
    arguments = ["eval", RECIPE, "--set", f"model.path={tiny_model}", "--json", str(tmp_path / "scores.json")]
    arguments += ["--run-dir", str(tmp_path / "eval")]
    assert main([*arguments, "--model", str(run_dir / "stages/distill/final")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [entry["domain"] for entry in scores] == ["digits", "vowels"]
    for entry in scores:
        # The same tasks and random numbers as in the run's own proof, hence the same scores.
        assert entry["sampled"] == report[entry["domain"]]["student"]
        assert entry["greedy"] == report[entry["domain"]]["greedy"]["student"]
    capsys.readouterr()
    assert main([*arguments, "--model", tiny_model]) == 2
    assert "already holds" in capsys.readouterr().err
