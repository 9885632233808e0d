"""Advantages against TRL's own formula and against their algebraic properties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from posttrain.learner.advantages import group_advantages

SCORES = st.lists(
    st.lists(st.none() | st.floats(-5, 5, allow_nan=False, width=32), min_size=4, max_size=4), min_size=1, max_size=5
)


def trl_advantages(scores: list[list[float | None]], scale_rewards: str) -> torch.Tensor:
    """The lines of GRPOTrainer that do this, on equal-sized groups (``sum_then_normalize``), in float64."""
    rewards = torch.tensor([[math.nan if s is None else s for s in group] for group in scores], dtype=torch.float64)
    advantages = rewards - torch.nanmean(rewards, dim=1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)
    if scale_rewards == "batch":
        advantages = advantages / (nanstd(rewards) + 1e-4)
    return torch.nan_to_num(advantages, nan=0.0)


@given(scores=SCORES, scale_rewards=st.sampled_from(["group", "batch", "none"]))
def test_equals_trl(scores, scale_rewards):
    expected = trl_advantages(scores, scale_rewards).tolist()
    for group, ours, theirs in zip(scores, group_advantages(scores, scale_rewards), expected, strict=True):
        for score, mine, trl in zip(group, ours, theirs, strict=True):
            assert (mine is None) == (score is None)
            assert (mine or 0.0) == pytest.approx(trl, rel=1e-6, abs=1e-6)


def test_unscored_rollouts_leave_the_baseline():
    assert group_advantages([[1.0, None, 0.0, None]], "none") == [[0.5, None, -0.5, None]]


def test_groups_may_differ_in_size_and_be_empty_or_unscored():
    assert group_advantages([[1.0, 3.0], [2.0], [None, None], []], "none") == [[-1.0, 1.0], [0.0], [None, None], []]
    assert group_advantages([], "batch") == []


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_equal_scores_give_exactly_zero(scale_rewards):
    assert group_advantages([[0.5] * 4, [0.1] * 3], scale_rewards) == [[0.0] * 4, [0.0] * 3]
    assert group_advantages([[0.7, None] * 6], scale_rewards) == [[0.0, None] * 6]


def test_group_scale_is_the_sample_deviation():
    (advantages,) = group_advantages([[0.0, 1.0]], "group")
    assert advantages[1] == pytest.approx(0.5 / (math.sqrt(0.5) + 1e-4))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match="rollout 1 in group 2"):
        group_advantages([[0.0], [1.0], [0.0, bad]], "none")
