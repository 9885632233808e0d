"""The quickstart, cut to a step a stage: tools in a sandbox, a judge that is the policy, adapters, and kills."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import quickstart
from tests.boxes import require
from tests.test_posttrain_resume import kill_at

SHORT = {
    "model.lora.rank": 4,
    "domains.*.sft.max_steps": 1,
    "domains.*.sft.num_demonstrations": 16,
    "domains.*.grpo.max_steps": 3,
    "domains.*.grpo.groups_per_step": 4,
    "domains.*.grpo.num_generations": 4,
    "domains.*.grpo.save_steps": 1,
    "judge_lag_steps": 1,
    "distill.max_steps": 2,
    "distill.rollouts_per_step": 8,
    "evaluation.num_tasks": 4,
    "evaluation.num_samples": 1,
    "workers.threads_per_actor": 1,
}
KILLS = {"grpo-agent": "checkpoints/step-00000[1-2]", "grpo-writing": "checkpoints/step-00000[1-2]"}


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_short_quickstart_survives_kills_amid_tools_and_judging(tmp_path):
    substrate = quickstart.recipe().substrate
    assert substrate is not None
    require(substrate)
    run_dir = tmp_path / "run"
    resume: list[str] = []
    for stage, sign in KILLS.items():
        kill_at(start(run_dir, *resume), run_dir / "stages" / stage, sign)
        resume = ["--resume"]
    process = start(run_dir, *resume)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output

    report = json.loads((run_dir / "report.json").read_text())
    assert [event["stage"] for event in report["resumed"]] == list(KILLS)
    assert {entry["domain"] for entry in report["domains"]} == {"math", "code", "agent", "writing"}
    assert not list(run_dir.glob("stages/*/checkpoints")) + list(run_dir.glob("stages/*/judges"))
    rollouts = [json.loads(line) for line in (run_dir / "stages/grpo-writing/rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 3 * 4 * 4
    assert any(judgment["reply"] for rollout in rollouts for judgment in rollout["judgments"])
    agent = [json.loads(line) for line in (run_dir / "stages/grpo-agent/rollouts.jsonl").read_text().splitlines()]
    assert any(message["role"] == "tool" for rollout in agent for message in rollout["conversation"])
    assert {rollout["status"] for rollout in agent} == {"ok"}


def start(run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    settings = [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
    return subprocess.Popen(
        [sys.executable, "-m", "posttrain.cli", "run", "quickstart", "--run-dir", str(run_dir), *settings, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
