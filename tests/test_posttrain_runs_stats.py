"""Bootstrap intervals: hand-computed cases, a slow reference, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from posttrain.runs.stats import Bootstrap, bootstrap_gain, bootstrap_kept, bootstrap_mean, task_means

NAN = math.nan


def column(*values: float) -> np.ndarray:
    return np.array(values, float)[:, None]


def test_task_means_skip_unscored_samples():
    means = task_means(np.array([[1.0, 0.0], [NAN, 1.0], [NAN, NAN]]))
    np.testing.assert_array_equal(means, [0.5, 1.0, NAN])


def test_task_means_refuse_a_vector():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        task_means(np.zeros(3))


def test_mean_is_over_tasks_not_over_samples():
    scores = np.array([[1.0, NAN, NAN], [0.0, 0.0, 0.0]])
    assert bootstrap_mean(scores, Bootstrap()).value == 0.5


def test_two_tasks_have_the_known_resampling_distribution():
    # Resampled means of (0, 1) are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    wide = bootstrap_mean(column(0, 1), Bootstrap(confidence=0.6))
    narrow = bootstrap_mean(column(0, 1), Bootstrap(confidence=0.4))
    assert (wide.low, wide.value, wide.high) == (0.0, 0.5, 1.0)
    assert (narrow.low, narrow.high) == (0.5, 0.5)


def test_gain_is_paired():
    # A constant gain on very different tasks is certain when tasks are paired, and only then.
    before = np.random.default_rng(0).random((50, 1))
    estimate = bootstrap_gain(before + 0.25, before, Bootstrap())
    assert estimate.low == pytest.approx(0.25)
    assert estimate.high == pytest.approx(0.25)


def test_gain_uses_only_tasks_that_both_were_scored_on():
    estimate = bootstrap_gain(column(1, 1, NAN), column(0, NAN, 1), Bootstrap())
    assert (estimate.value, estimate.low, estimate.high) == (1.0, 1.0, 1.0)


def test_gain_agrees_with_a_slow_bootstrap():
    rng = np.random.default_rng(1)
    after, before = rng.random((40, 3)), rng.random((40, 3))
    fast = bootstrap_gain(after, before, Bootstrap(resamples=20000))
    differences = after.mean(axis=1) - before.mean(axis=1)
    slow = [differences[rng.integers(0, 40, 40)].mean() for _ in range(20000)]
    assert fast.low == pytest.approx(np.quantile(slow, 0.025), abs=0.005)
    assert fast.high == pytest.approx(np.quantile(slow, 0.975), abs=0.005)


def test_seed_decides_the_interval():
    scores = np.random.default_rng(2).random((30, 2))
    assert bootstrap_mean(scores, Bootstrap(seed=5)) == bootstrap_mean(scores, Bootstrap(seed=5))
    assert bootstrap_mean(scores, Bootstrap(seed=5)) != bootstrap_mean(scores, Bootstrap(seed=6))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        base = rng.random((60, 4)) < 0.3
        specialist = rng.random((60, 4)) < 0.5
        estimate = bootstrap_gain(specialist.astype(float), base.astype(float), Bootstrap(resamples=500, seed=trial))
        covered += estimate.low <= 0.2 <= estimate.high
    # Binomial(200, 0.95) has standard deviation 3.1; four of them plus the known slight undercoverage.
    assert 174 <= covered <= 199


def test_kept_is_a_ratio_of_means():
    estimate = bootstrap_kept(column(0, 1, 1, 0), column(1, 1, 1, 1), column(0, 0, 0, 0), Bootstrap())
    assert estimate.value == 0.5
    assert 0.0 <= estimate.low < 0.5 < estimate.high <= 1.0


def test_kept_interval_covers_the_truth():
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        base, student, specialist = ((rng.random((80, 4)) < p).astype(float) for p in (0.2, 0.5, 0.6))
        estimate = bootstrap_kept(student, specialist, base, Bootstrap(resamples=500, seed=trial))
        covered += estimate.low <= 0.75 <= estimate.high
    assert 174 <= covered <= 199


@pytest.mark.parametrize("specialist", [(0, 0, 0), (1, 0, 0)])
def test_kept_is_undefined_without_a_gain(specialist):
    estimate = bootstrap_kept(column(1, 1, 1), column(*specialist), column(1, 0, 0), Bootstrap())
    assert all(math.isnan(bound) for bound in (estimate.value, estimate.low, estimate.high))


def test_kept_is_unbounded_when_the_gain_may_be_none():
    # Gain on one task of four, loss on none: (3/4)^4 = 32% of the resamples have no gain at all.
    estimate = bootstrap_kept(column(1, 0, 0, 0), column(1, 0, 0, 0), column(0, 0, 0, 0), Bootstrap())
    assert (estimate.value, estimate.low, estimate.high) == (1.0, -math.inf, math.inf)


def test_nothing_scored_is_undefined():
    empty = np.full((4, 2), NAN)
    assert math.isnan(bootstrap_mean(empty, Bootstrap()).value)
    assert math.isnan(bootstrap_gain(empty, np.zeros((4, 2)), Bootstrap()).low)


def test_different_tasks_are_refused():
    with pytest.raises(ValueError, match=r"\[3, 4\] tasks"):
        bootstrap_gain(np.zeros((3, 1)), np.zeros((4, 1)), Bootstrap())
