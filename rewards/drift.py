"""How a judge does on a frozen set of texts, and whether it drifts: agreement, leniency, self-preference, length.

A policy that judges itself may learn to be lenient, to prefer its own texts or long ones, and no reward of the run
would show it, since the judge gives the rewards. So the same texts are judged again and again, and their answers
never change.

Shape letters: N rows, one text with one criterion each; K replies to a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from posttrain.errors import RecipeError
from posttrain.types import Group, JudgeTask, Score
from rewards.agreement import kappa
from rewards.checks import words
from rewards.joint import GoldenRow, PreferencePair, golden_task, pair_task
from rewards.judge import Dialect, LineDialect

FloatArray = npt.NDArray[np.float64]
RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenSet:
    """A frozen set of rows and pairs, and the measures on it (``posttrain.protocols.JudgeMonitor``)."""

    rows: tuple[GoldenRow, ...]
    """Held out: never among what is trained on. Two labels each."""
    pairs: tuple[PreferencePair, ...] = ()
    dialect: Dialect = field(default_factory=LineDialect)
    samples: int = 1
    """Replies per prompt."""
    temperature: float = 0.5
    votes: tuple[int, ...] = ()
    """Numbers of votes, up to ``samples``, whose sum is also measured."""

    def __post_init__(self) -> None:
        ids = [row.id for row in self.rows]
        if not ids or len(set(ids)) < len(ids) or any(len(row.labels) != 2 for row in self.rows):
            raise RecipeError(
                f"FrozenSet.rows has {len(ids)} rows with {len(set(ids))} ids; expected at least one row, every id "
                "once, and two labels in each"
            )
        if any(not 1 <= count <= self.samples for count in self.votes):
            raise RecipeError(f"FrozenSet.votes = {self.votes}; expected numbers from 1 to samples = {self.samples}")

    def tasks(self) -> list[JudgeTask]:
        rows = [golden_task(row, self.dialect) for row in self.rows]
        return rows + [pair_task(pair, self.dialect) for pair in self.pairs]

    def scores(self, groups: Sequence[Group]) -> dict[str, float]:
        """Mean value of the readable verdicts on each row's text, by task id."""
        verdicts = {group.task.id: verdict_values(group) for group in groups if _is_row(group)}
        return {name: float(np.nanmean(values)) for name, values in verdicts.items() if not np.isnan(values).all()}

    def measure(self, groups: Sequence[Group], start: Mapping[str, float]) -> dict[str, float]:
        """Metrics by name; ``..._low`` and ``..._high`` bound 95 % bootstrap intervals over rows.

        ``accuracy`` counts a reply without a readable verdict as wrong, ``kappa`` as an answer of its own. ``shift`` is
        the mean score less the one at the start, ``bias`` less the true share of met. ``self_preference`` is the mean
        score of the policy's texts less that of others', at the same true answer, averaged over the answers.
        """
        everything = [group for group in groups if _is_row(group)]
        # What the machinery failed at is no answer of the judge's.
        rows = [group for group in everything if all(score.value is not None for score in group.scores)]
        if not rows:
            return {"unscored_rows": float(len(everything))}
        pairs = [group for group in groups if not _is_row(group)]
        verdicts_NK = np.stack([verdict_values(group) for group in rows])
        truth_N = np.array([_truth(group) for group in rows])
        metrics = agreement(verdicts_NK, truth_N)
        scores_N = _row_means(verdicts_NK)
        before_N = np.array([start.get(group.task.id, math.nan) for group in rows])
        metrics |= interval("shift", scores_N - before_N)
        metrics |= interval("bias", scores_N - truth_N)
        metrics |= {"mean_score": _nanmean(scores_N), "unscored_rows": float(len(everything) - len(rows))}
        own_N = np.array([group.task.info["author"] == "policy" for group in rows])
        metrics["self_preference"] = self_preference(scores_N, truth_N, own_N)
        lengths_N = np.array([len(words(group.task.info["response"])) for group in rows], np.float64)
        metrics["length_correlation"] = correlation(scores_N, lengths_N)
        metrics["length_bias"] = correlation(scores_N - truth_N, lengths_N)
        if pairs:
            # Scores are credited for both orders together.
            metrics["swap_consistent"] = _nanmean(np.array([s.value for g in pairs for s in g.scores], np.float64))
        return metrics | {f"vote@{k}": vote_accuracy(verdicts_NK, truth_N, k) for k in self.votes}


def verdict_values(group: Group) -> FloatArray:
    """1 for met, 0 for unmet, NaN where a reply has no readable verdict, [K]."""
    return np.array([_verdict_value(score) for score in group.scores], np.float64)


def _verdict_value(score: Score) -> float:
    found = score.judgments[0].score if score.judgments else None
    return math.nan if found is None else found


def _is_row(group: Group) -> bool:
    return bool(group.task.info["source"] != "pair")


def _truth(group: Group) -> float:
    return float(group.task.answer == group.task.info["labels"][-1])


def agreement(verdicts_NK: FloatArray, truth_N: FloatArray) -> dict[str, float]:
    """Accuracy and kappa with intervals, rates by true answer, and the share of unreadable replies."""
    right_NK = verdicts_NK == truth_N[:, None]
    kappas = [cohen_kappa(verdicts_NK[i], truth_N[i]) for i in _resamples(len(truth_N))]
    low, high = _bounds(np.array(kappas))
    return interval("accuracy", right_NK.mean(axis=1)) | {
        "kappa": cohen_kappa(verdicts_NK, truth_N),
        "kappa_low": low,
        "kappa_high": high,
        "true_positive_rate": _nanmean(right_NK[truth_N == 1].ravel()),
        "true_negative_rate": _nanmean(right_NK[truth_N == 0].ravel()),
        "unreadable": float(np.isnan(verdicts_NK).mean()),
    }


def cohen_kappa(verdicts_NK: FloatArray, truth_N: FloatArray) -> float:
    """Cohen's kappa between all replies and the truth. No verdict is a third answer, which is never right.

    NaN when both sides give one and the same answer throughout: agreement by chance is then certain.
    """
    given = np.nan_to_num(verdicts_NK, nan=2.0).ravel().astype(int)
    truth = np.repeat(truth_N, verdicts_NK.shape[1]).astype(int)
    table = np.zeros((3, 3))
    np.add.at(table, (truth, given), 1)
    return kappa(table)


def self_preference(scores_N: FloatArray, truth_N: FloatArray, own_N: npt.NDArray[np.bool_]) -> float:
    """Mean over true answers of (mean score of own texts - mean score of others'); NaN without both kinds."""
    gaps = []
    for answer in (0.0, 1.0):
        same = truth_N == answer
        if (same & own_N).any() and (same & ~own_N).any():
            gaps.append(_nanmean(scores_N[same & own_N]) - _nanmean(scores_N[same & ~own_N]))
    return _nanmean(np.array(gaps))


def correlation(x_N: FloatArray, y_N: FloatArray) -> float:
    """Pearson's r over the rows where both are known; NaN where one is constant."""
    both = ~(np.isnan(x_N) | np.isnan(y_N))
    x, y = x_N[both], y_N[both]
    if len(x) < 3 or not x.std() or not y.std():
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def vote_accuracy(verdicts_NK: FloatArray, truth_N: FloatArray, votes: int) -> float:
    """Accuracy of the sum of ``votes`` verdicts, averaged over the disjoint sets of that many; a tie is half right.

    Summing rather than taking one reply is how a judge is scaled at inference (SPCT, arXiv 2504.02495, Eq. 14).
    """
    num_sets = verdicts_NK.shape[1] // votes
    sets_NSV = verdicts_NK[:, : num_sets * votes].reshape(len(truth_N), num_sets, votes)
    lead_NS = np.nansum(np.where(np.isnan(sets_NSV), np.nan, 2 * sets_NSV - 1), axis=2)
    right = np.where(lead_NS == 0, 0.5, (lead_NS > 0) == (truth_N[:, None] == 1))
    return float(right.mean())


def interval(name: str, values_N: npt.NDArray[np.floating] | npt.NDArray[np.bool_]) -> dict[str, float]:
    """Mean over rows, NaN left out, and the bounds of its bootstrap interval."""
    known = np.asarray(values_N, np.float64)
    known = known[~np.isnan(known)]
    if not len(known):
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), math.nan)
    low, high = _bounds(np.array([known[i].mean() for i in _resamples(len(known))]))
    return {name: float(known.mean()), f"{name}_low": low, f"{name}_high": high}


def _resamples(count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, count, (RESAMPLES, count))


def _bounds(values: FloatArray) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    known = values[~np.isnan(values)]
    if not len(known):
        return math.nan, math.nan
    return float(np.quantile(known, tail)), float(np.quantile(known, 1 - tail))


def _row_means(values_NK: FloatArray) -> FloatArray:
    known = ~np.isnan(values_NK)
    total = np.where(known, values_NK, 0.0).sum(axis=1)
    return np.divide(total, known.sum(axis=1), out=np.full(len(total), math.nan), where=known.any(axis=1))


def _nanmean(values: npt.NDArray[np.floating] | npt.NDArray[np.bool_]) -> float:
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else math.nan
