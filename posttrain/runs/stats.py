"""Confidence intervals by the paired bootstrap over tasks.

Tasks are drawn with replacement, all models' scores of a task together, because models are compared on the
same tasks and the samples of one task are not independent. A task's value is the mean of its scored samples,
so sampling noise within tasks is part of the spread between them (cluster bootstrap; Efron and Tibshirani,
An Introduction to the Bootstrap, 1993, ch. 13 for the percentile interval).

Limits: percentile intervals are a little narrow for few tasks (under about 30), and when every task has the
same value the interval has width 0, whatever the truth.

Shapes: N tasks, S samples, R resamples, K quantities.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
"""[N, S] scores of one model, NaN where a rollout could not be scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """How intervals are drawn."""

    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value and its percentile interval. NaN: not defined; an infinite bound: not bounded by the data."""

    value: float
    low: float
    high: float


UNDEFINED = Estimate(value=math.nan, low=math.nan, high=math.nan)


def task_means(scores: Scores) -> Scores:
    """Mean of the scored samples of each task, [N, S] -> [N]; NaN for a task without any."""
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2:
        raise ValueError(f"scores have shape {scores.shape}; expected [num_tasks, num_samples]")
    count = np.isfinite(scores).sum(axis=1)
    total = np.where(np.isfinite(scores), scores, 0.0).sum(axis=1)
    return np.divide(total, count, out=np.full(len(scores), np.nan), where=count > 0)


def bootstrap_mean(scores: Scores, options: Bootstrap) -> Estimate:
    """Mean score over tasks."""
    values_N1 = _common_tasks(scores)
    if not len(values_N1):
        return UNDEFINED
    return _percentile(float(values_N1.mean()), _resampled_means(values_N1, options)[:, 0], options)


def bootstrap_gain(after: Scores, before: Scores, options: Bootstrap) -> Estimate:
    """Difference of means ``after - before`` over the tasks that both could be scored on."""
    values_N2 = _common_tasks(after, before)
    if not len(values_N2):
        return UNDEFINED
    gain_N1 = values_N2[:, :1] - values_N2[:, 1:]
    return _percentile(float(gain_N1.mean()), _resampled_means(gain_N1, options)[:, 0], options)


def bootstrap_kept(student: Scores, specialist: Scores, base: Scores, options: Bootstrap) -> Estimate:
    """Share of the specialist's gain that the student kept, (student - base) / (specialist - base).

    A ratio of means, not a mean of ratios. Without a gain of the specialist there is nothing to keep: the
    estimate is undefined. A resample in which the specialist does not gain has no ratio and says nothing
    about its size, so it counts as minus infinity for the lower bound and as plus infinity for the upper:
    too many of them, and the interval is unbounded, which is the truth about a gain that may be none.
    """
    values_N3 = _common_tasks(student, specialist, base)
    if not len(values_N3):
        return UNDEFINED
    gains_N2 = values_N3[:, :2] - values_N3[:, 2:]
    student_gain, specialist_gain = gains_N2.mean(axis=0)
    # A gain of a few ulps is rounding, not learning, and would make any ratio.
    if specialist_gain <= 1e-12:
        return UNDEFINED
    means_R2 = _resampled_means(gains_N2, options)
    defined_R = means_R2[:, 1] > 1e-12
    ratios_R = np.divide(means_R2[:, 0], means_R2[:, 1], out=np.full(len(means_R2), np.nan), where=defined_R)
    low = _quantile(np.where(defined_R, ratios_R, -np.inf), _tail(options))
    high = _quantile(np.where(defined_R, ratios_R, np.inf), 1 - _tail(options))
    return Estimate(value=float(student_gain / specialist_gain), low=low, high=high)


def _common_tasks(*scores: Scores) -> npt.NDArray[np.float64]:
    """Task means side by side, [N', K], over the tasks where none is NaN."""
    sizes = {len(matrix) for matrix in scores}
    if len(sizes) > 1:
        raise ValueError(f"models were scored on {sorted(sizes)} tasks; expected the same tasks in the same order")
    values = np.stack([task_means(matrix) for matrix in scores], axis=1)
    return values[np.isfinite(values).all(axis=1)]


def _resampled_means(values_NK: npt.NDArray[np.float64], options: Bootstrap) -> npt.NDArray[np.float64]:
    """Means over R resamples of the rows, [R, K]. How often each row is drawn is multinomial."""
    num_tasks = len(values_NK)
    counts_RN = np.random.default_rng(options.seed).multinomial(
        num_tasks, np.full(num_tasks, 1 / num_tasks), size=options.resamples
    )
    return counts_RN @ values_NK / num_tasks


def _percentile(value: float, resampled_R: npt.NDArray[np.float64], options: Bootstrap) -> Estimate:
    tail = _tail(options)
    return Estimate(value=value, low=_quantile(resampled_R, tail), high=_quantile(resampled_R, 1 - tail))


def _tail(options: Bootstrap) -> float:
    return (1 - options.confidence) / 2


def _quantile(values_R: npt.NDArray[np.float64], q: float) -> float:
    # An order statistic, since interpolating next to an infinity gives NaN; the outer one, to be conservative.
    return float(np.quantile(values_R, q, method="lower" if q < 0.5 else "higher"))
