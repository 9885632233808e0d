"""How well two raters agree, beyond what chance alone would give.

A table counts cases by both raters' labels, shape [L, L], labels in one order: rows the reference, columns the judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]
Weights = Literal["none", "linear", "quadratic"]


def count_table(reference: Sequence[str], other: Sequence[str], labels: Sequence[str]) -> Table:
    """Cases by both labels, shape [L, L]. ``ValueError`` for labels that are not among ``labels``."""
    position = {label: i for i, label in enumerate(labels)}
    table = np.zeros((len(labels), len(labels)))
    for one, two in zip(reference, other, strict=True):
        if one not in position or two not in position:
            raise ValueError(f"labels {one!r}, {two!r}: expected them among {', '.join(labels)}")
        table[position[one], position[two]] += 1
    return table


def agreement(table: Table) -> float:
    """Share of equal labels; NaN without cases."""
    return float(np.trace(table) / table.sum()) if table.sum() else float("nan")


def kappa(table: Table, weights: Weights = "none") -> float:
    """Cohen's kappa (1960), weighted by distance (1968) for ordered labels; NaN where chance agrees always.

    1 is full agreement, 0 what two raters with these base rates have by chance.
    """
    value = _kappas(table[None], weights)[0]
    return float(value)


def kappa_interval(
    table: Table, weights: Weights = "none", *, level: float = 0.95, num_draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap percentile interval of kappa over cases. Draws in which it does not exist are left out."""
    return _bootstrap(table, lambda tables: _kappas(tables, weights), level, num_draws, seed)


def rate_interval(hits: float, count: float, *, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share."""
    from statistics import NormalDist

    if count == 0:
        return float("nan"), float("nan")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def mean_pairwise_kappa(ratings: Sequence[Sequence[str | None]], labels: Sequence[str], weights: Weights) -> float:
    """Mean kappa over all pairs of raters, each on the cases both have rated; NaN with fewer than two raters.

    ``ratings`` has one row a case, with one entry a rater, None where it has no label.
    """
    num_raters = max((len(row) for row in ratings), default=0)
    found = []
    for i in range(num_raters):
        for j in range(i + 1, num_raters):
            both = [(row[i], row[j]) for row in ratings if len(row) > j]
            rated = [(a, b) for a, b in both if a is not None and b is not None]
            if rated:
                one, two = zip(*rated, strict=True)
                found.append(kappa(count_table(one, two, labels), weights))
    return float(np.nanmean(found)) if found and not np.all(np.isnan(found)) else float("nan")


def corrected_rate(observed: float, tpr: float, tnr: float) -> float:
    """The true share of positives behind a judge's, by Rogan and Gladen (1978), in [0, 1]; NaN for a judge that tells
    nothing."""
    skill = tpr + tnr - 1
    return float(min(max((observed + tnr - 1) / skill, 0.0), 1.0)) if skill > 0 else float("nan")


def _kappas(tables: Table, weights: Weights) -> npt.NDArray[np.float64]:
    """Of tables, shape [N, L, L]."""
    size = tables.shape[-1]
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size))).astype(float)
    cost = {"none": (distance > 0).astype(float), "linear": distance, "quadratic": distance**2}[weights]
    totals = tables.sum((1, 2))
    by_chance = tables.sum(2)[:, :, None] * tables.sum(1)[:, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = (tables * cost).sum((1, 2)) / totals
        expected = (by_chance * cost).sum((1, 2)) / totals**2
        return np.where(expected > 0, 1 - observed / expected, np.nan)


def _bootstrap(
    table: Table, statistic: Callable[[Table], npt.NDArray[np.float64]], level: float, num_draws: int, seed: int
) -> tuple[float, float]:
    total = int(table.sum())
    if total == 0:
        return float("nan"), float("nan")
    # Drawing cases with replacement is drawing the table's cells.
    draws = np.random.default_rng(seed).multinomial(total, (table / total).ravel(), size=num_draws)
    values = statistic(draws.reshape(num_draws, *table.shape).astype(float))
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
