"""How strongly each domain's teacher speaks, so that none outweighs the others by it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from posttrain.types import Sample

_BOUNDS = (0.25, 4.0)
_MEMORY = 0.9
"""Share of the older steps in a running estimate."""


@dataclass(slots=True)
class DomainScales:
    """Running scale of what each domain's teacher says, and what its loss is multiplied by for it (DN-MOPD)."""

    moments: dict[str, list[float]] = field(default_factory=dict)
    """Per domain: tokens, sum and sum of squares of log pi_T - log mu; of a step, averaged over steps."""

    @classmethod
    def restore(cls, kept: Mapping[str, Any] | None) -> Self:
        """As ``state`` saved them; new ones from None."""
        return cls({name: list(moments) for name, moments in (kept or {}).get("log_ratio_moments", {}).items()})

    def state(self, pending: Sequence[int] = ()) -> dict[str, Any]:
        """What a checkpoint keeps, whatever is under way."""
        return {"log_ratio_moments": self.moments}

    def factors(self) -> dict[str, float]:
        """clip(sigma_all / sigma_d, 0.25, 4) by domain; 1 where either is not known or 0."""
        whole = _std([sum(column) for column in zip(*self.moments.values(), strict=True)])
        factors = {}
        for name, moments in self.moments.items():
            own = _std(moments)
            ratio = whole / own if own and whole else 1.0
            factors[name] = min(max(ratio, _BOUNDS[0]), _BOUNDS[1])
        return factors

    def take(self, metrics: dict[str, float], samples: Sequence[Sample]) -> dict[str, float]:
        """Take a step's moments out of its metrics; what to report instead: the scales it was learned with, and the
        new deviations."""
        report = {f"domain_scale/{name}": factor for name, factor in self.factors().items()}
        tokens: Counter[str] = Counter()
        for sample in samples:
            tokens[sample.domain] += sample.num_loss_tokens
        for name, count in tokens.items():
            mean, square = metrics.pop(f"log_ratio/{name}"), metrics.pop(f"log_ratio_sq/{name}")
            new = [float(count), mean * count, square * count]
            old = self.moments.get(name, new)
            self.moments[name] = [_MEMORY * a + (1 - _MEMORY) * b for a, b in zip(old, new, strict=True)]
        return report | {f"log_ratio_std/{name}": _std(moments) for name, moments in self.moments.items()}


def _std(moments: list[float]) -> float:
    """Population standard deviation from count, sum and sum of squares."""
    if not moments or moments[0] < 2:
        return 0.0
    count, total, square = moments
    return math.sqrt(max(square / count - (total / count) ** 2, 0.0))
