"""What a run cost, added up from its metrics."""

from __future__ import annotations

import math

from posttrain.runs.costs import summarise_costs

NAN = math.nan


def test_rollout_stages_are_totalled_and_sft_lines_are_not():
    metrics = [
        {"stage": "sft-math", "step": 1, "loss": 2.0},
        {"stage": "grpo-math", "step": 1, "generated_tokens": 100.0, "failed_rollouts": 1.0, "unscored": 3.0},
        {"stage": "grpo-math", "step": 2, "generated_tokens": 50.0, "failed_rollouts": 0.0, "unscored": NAN},
    ]
    costs = summarise_costs(metrics)
    assert (costs["generated tokens"], costs["rollouts that failed"], costs["rollouts unscored"]) == (150.0, 1.0, 3.0)
    assert "distillation" not in costs


def test_distillation_is_charged_per_step_and_token_and_what_has_no_teacher_is_not():
    lines = [
        {"teacher/bytes_cached": 64.0, "loss_tokens": 8.0, "teacher/teacher_loads": 2.0, "teacher/head_loads": 2.0},
        {"teacher/bytes_cached": 64.0, "loss_tokens": 24.0, "teacher/teacher_loads": 0.0, "teacher/head_loads": 1.0},
    ]
    lines[0] |= {"kl": 0.5, "kl/math": 0.5, "clamped_share": 0.25, "nonfinite_share": 0.0}
    lines[1] |= {"kl": 0.1, "kl/math": 0.125, "kl/code": 0.0625, "clamped_share": 0.125, "nonfinite_share": 0.0}
    common = {"stage": "distill", "generated_tokens": 8.0, "failed_rollouts": 0.0}
    costs = summarise_costs([{**common, **line, "teacher/load_wait_s": 0.5} for line in lines])
    assert costs["rollouts unscored"] == 0.0
    assert costs["distillation"] == {
        "bytes cached per token": 4.0,
        "teacher loads per step": 1.0,
        "head loads per step": 1.5,
        "seconds waiting for loads": 1.0,
        "clamped share of positions, worst step": 0.25,
        "non-finite share of positions, worst step": 0.0,
        "KL in code, first and last step": "0.0625, 0.0625",
        "KL in math, first and last step": "0.5, 0.125",
    }
    mixed = summarise_costs([{**common, "unscored": 4.0}, {"stage": "distill", "step": 1, "moved": 0.5}])
    assert mixed["rollouts unscored"] == 4.0
    assert "distillation" not in mixed


def test_what_was_not_measured_is_not_zero():
    costs = summarise_costs([{"stage": "distill", "step": 1, "teacher/bytes_cached": NAN}])
    assert math.isnan(costs["distillation"]["bytes cached per token"])
    assert math.isnan(costs["distillation"]["teacher loads per step"])
