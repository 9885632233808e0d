"""Advantages: how much better a rollout did than its group. Pure NumPy, no configuration object, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

STD_EPSILON = 1e-4
"""Added to the standard deviation before dividing, as TRL does; keeps groups of equal scores from 0 / 0."""

Float64Array = npt.NDArray[np.float64]


def group_advantages(
    scores_per_group: Sequence[Sequence[float | None]], scale_rewards: Literal["group", "batch", "none"]
) -> list[list[float | None]]:
    """One advantage per rollout: ``A_i = (R_i - mean(R)) / scale``, the mean over the group's scored rollouts.

    ``none`` divides by 1 (DeepSeek-V3.2, arXiv 2512.02556; Dr. GRPO, arXiv 2503.20783), ``group`` by the standard
    deviation of the group plus 1e-4 (DeepSeekMath, arXiv 2402.03300), ``batch`` by that of all scores of the call
    plus 1e-4 (arXiv 2508.08221). Deviations carry Bessel's correction. Formulas and constants are those of TRL 1.16,
    ``GRPOTrainer._generate_and_score_completions`` with ``sum_then_normalize``.

    A score of None could not be graded: it leaves the baseline and the deviation, and its advantage is None.
    A group with a single scored rollout has nothing to compare with and gets 0.

    Raises ``ValueError`` on a score that is not finite, naming group and rollout.
    """
    groups = [_as_array(scores, index) for index, scores in enumerate(scores_per_group)]
    batch_std = _std(np.concatenate(groups)) if groups else 0.0
    advantages: list[list[float | None]] = []
    for scores in groups:
        centred = scores - _mean(scores) if not np.isnan(scores).all() else scores
        if scale_rewards != "none":
            centred = centred / ((_std(scores) if scale_rewards == "group" else batch_std) + STD_EPSILON)
        advantages.append([None if np.isnan(value) else float(value) for value in centred])
    return advantages


def _as_array(scores: Sequence[float | None], group: int) -> Float64Array:
    """Scores as float64 with NaN where there is none."""
    for rollout, score in enumerate(scores):
        if score is not None and not np.isfinite(score):
            raise ValueError(
                f"score of rollout {rollout} in group {group} is {score!r}: expected a finite number, or None for a "
                "rollout that could not be scored; fix the reward"
            )
    return np.array([np.nan if score is None else score for score in scores], dtype=np.float64)


def _mean(scores: Float64Array) -> float:
    """Mean of what was scored; never beyond the scores, as rounding would have it: three times 0.1 is 0.1."""
    scored = scores[~np.isnan(scores)]
    return float(np.clip(scored.mean(), scored.min(), scored.max()))


def _std(scores: Float64Array) -> float:
    """Sample standard deviation of what was scored; 0 below two scores, where it is not defined."""
    scored = scores[~np.isnan(scores)]
    return float(scored.std(ddof=1)) if len(scored) > 1 else 0.0
