"""A run killed in every kind of stage, each time by ``kill -9``, ends as a run that nothing disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

KILLS = {
    "sft-vowels": "checkpoints/checkpoint-[2-9]",
    "grpo-vowels": "checkpoints/step-00000[1-9]",
    "distill": "checkpoints/step-00000[1-9]",
    "evaluate": "scores/sft-vowels.json",
}
"""Stage -> pattern of what appears once it has saved something whole and has more to do. TRL writes a checkpoint in
place, so only the beginning of the second says that the first is whole."""
TIMES = {"time", "tokens_per_s", "teacher/load_wait_s"}
LOADS = {"teacher/teacher_loads", "teacher/head_loads", "teacher/tokens", "teacher/samples_found"}
"""What a step really loaded and read: a new process has no teacher in memory yet, and finds states of the old one."""
WORK = {
    "decode_steps",
    "decode_tokens",
    "prefill_tokens",
    "reused_tokens",
    "recomputed_tokens",
    "resumed_tokens",
    "resumed_rollouts",
}
"""What a step really computed: a new process finds some of it done, and how requests meet in a step is chance."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]


def test_a_run_killed_in_every_stage_ends_as_if_it_was_never_disturbed(start_mini, mini_run, tmp_path):
    undisturbed, _ = mini_run
    run_dir = tmp_path / "run"
    resume: list[str] = []
    finished: dict[str, bytes] = {}
    for stage, sign in KILLS.items():
        process = start_mini(run_dir, *resume)
        kill_at(process, run_dir / "stages" / stage, sign)
        assert not (run_dir / "stages" / stage / "done.json").exists(), f"{stage} ended before it was killed"
        finished |= {path.parent.name: path.read_bytes() for path in run_dir.glob("stages/*/done.json")}
        resume = ["--resume"]
    process = start_mini(run_dir, *resume)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output

    assert finished.keys() >= {"sft-vowels", "grpo-vowels", "sft-digits", "grpo-digits", "distill"}
    for stage, mark in finished.items():
        assert (run_dir / "stages" / stage / "done.json").read_bytes() == mark, f"{stage} was repeated"
    report = json.loads((run_dir / "report.json").read_text())
    assert [event["stage"] for event in report["resumed"]] == list(KILLS)
    for event in report["resumed"]:
        assert event["step"] >= 1, f"{event['stage']} began again instead of going on"
        told = f"<b>{event['stage']}</b> went on after step {event['step']}"
        assert told in (run_dir / "report.html").read_text(encoding="utf-8")

    assert metrics_of(run_dir) == metrics_of(undisturbed)
    assert report["domains"] == json.loads((undisturbed / "report.json").read_text())["domains"]
    for stage in ("grpo-digits", "grpo-vowels", "distill", "evaluate"):
        assert rollouts_of(run_dir / "stages" / stage) == rollouts_of(undisturbed / "stages" / stage)
    for stage in ("sft-vowels", "grpo-vowels", "distill"):
        weights = Path("stages", stage, "final", "model.safetensors")
        assert (run_dir / weights).read_bytes() == (undisturbed / weights).read_bytes()


def kill_at(process: subprocess.Popen[str], stage: Path, sign: str) -> None:
    """Kill the process group of a run once the sign is there, and see that nothing it started outlives it."""
    give_up = time.monotonic() + 100
    while not any(stage.glob(sign)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < give_up, f"{sign} never appeared"
        time.sleep(0.002)
    started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == [], [left.cmdline() for left in alive]


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES | LOADS | WORK} for line in lines]


def rollouts_of(stage: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (stage / "rollouts.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "wall_s"} for line in lines]


def test_a_run_ahead_of_its_learner_trains_on_every_group_once_over_a_kill(start_mini, tmp_path):
    run_dir = tmp_path / "run"
    ahead = ("--set", "domains.*.grpo.max_staleness=1", "--set", "domains.*.grpo.max_refills=0")
    stage = run_dir / "stages" / "grpo-vowels"
    kill_at(start_mini(run_dir, *ahead), stage, "checkpoints/step-00000[2-9]")
    saved = json.loads(max(stage.glob("checkpoints/step-*/checkpoint.json")).read_text())["caller"]
    assert len(saved["pending"]) == 2, "the two groups of another step are under way while one is learned"
    process = start_mini(run_dir, *ahead, "--resume")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    lines = [line for line in metrics_of(run_dir) if line["stage"] == "grpo-vowels"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert any(line["max_staleness"] >= 1 for line in lines), "rollouts ran a step ahead"
    rollouts = [json.loads(line) for line in (stage / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == len({rollout["id"] for rollout in rollouts}) == 5 * 2 * 4
    assert {rollout["id"].rpartition("/")[0] for rollout in rollouts} == {
        f"grpo-vowels/{step}/{index}" for step in range(5) for index in range(2)
    }
    assert not (run_dir / "rollouts" / "outcomes" / "grpo-vowels").exists()


def test_a_run_told_to_stop_puts_its_states_away_and_goes_on(start_mini, mini_run, tmp_path):
    undisturbed, _ = mini_run
    run_dir = tmp_path / "run"
    process = start_mini(run_dir)
    give_up = time.monotonic() + 100
    while not list((run_dir / "stages" / "grpo-vowels").glob("checkpoints/step-00000[1-9]")):
        assert time.monotonic() < give_up
        time.sleep(0.002)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "stopped by SIGTERM" in output
    assert list((run_dir / "rollouts").glob("states-0")), "the engine has left its states"
    steps = [line["step"] for line in metrics_of(run_dir) if line["stage"] == "grpo-vowels"]
    process = start_mini(run_dir, "--resume")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    report = json.loads((run_dir / "report.json").read_text())
    assert [event["step"] for event in report["resumed"]] == [steps[-1]], "no step is learned twice"
    assert rollouts_of(run_dir / "stages" / "distill") == rollouts_of(undisturbed / "stages" / "distill")
    assert not list((run_dir / "rollouts").glob("states-*"))
