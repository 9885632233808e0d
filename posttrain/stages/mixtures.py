"""What a distillation learns from, step by step: each domain's teacher, weight and share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from posttrain.config import Distill, Domain
from posttrain.protocols import Teacher
from posttrain.types import Route

_SCALE_BOUNDS = (0.25, 4.0)
_MEMORY = 0.9
"""Share of the older steps in a running estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What holds from one step until the next change."""

    first_step: int
    routes: Mapping[str, Route]
    """By domain."""
    num_tasks: Mapping[str, int]
    """Of one step, by domain."""


def phases(domains: Mapping[str, Domain], config: Distill) -> list[Phase]:
    """From the start and from each change of ``config.schedule`` on. Teachers are named by ``teacher_name``."""
    shares = {name: domain.share for name, domain in domains.items()}
    routes = {name: Route(teacher=teacher_name(name, 0), weight=domain.weight) for name, domain in domains.items()}
    total = config.rollouts_per_step // config.num_generations
    found = [Phase(first_step=0, routes=dict(routes), num_tasks=tasks_per_step(shares, total))]
    for step, change in sorted(config.schedule.items()):
        shares |= change.shares
        for name, route in routes.items():
            routes[name] = Route(
                teacher=teacher_name(name, step) if name in change.teachers else route.teacher,
                weight=change.weights.get(name, route.weight),
            )
        found.append(Phase(first_step=step, routes=dict(routes), num_tasks=tasks_per_step(shares, total)))
    return found


def teacher_name(domain: str, since: int) -> str:
    """A domain's teacher among those of a run; the one it starts with has the domain's own name."""
    return f"{domain}@{since}" if since else domain


def scheduled_teachers(config: Distill) -> dict[str, tuple[str, Teacher]]:
    """Domain and teacher of every teacher that comes in later, by its name."""
    return {
        teacher_name(domain, step): (domain, teacher)
        for step, change in config.schedule.items()
        for domain, teacher in change.teachers.items()
    }


def tasks_per_step(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """``total`` tasks over domains by largest remainder; every domain with a share gets at least one."""
    whole = sum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    given = {name: max(1, int(value)) if value else 0 for name, value in exact.items()}
    by_remainder = sorted((name for name in exact if given[name]), key=lambda name: given[name] - exact[name])
    for name in itertools.islice(itertools.cycle(by_remainder), max(0, total - sum(given.values()))):
        given[name] += 1
    while sum(given.values()) > max(total, len(by_remainder)):
        given[max(given, key=lambda name: given[name] - exact[name] if given[name] > 1 else -math.inf)] -= 1
    return given


@dataclass(slots=True)
class DomainScales:
    """Running scale of what each domain's teacher says, and what its loss is multiplied by for it (DN-MOPD)."""

    moments: dict[str, list[float]] = field(default_factory=dict)
    """Per domain: tokens, sum and sum of squares of log pi_T - log mu; of a step, averaged over steps."""

    @classmethod
    def restore(cls, kept: Mapping[str, Any] | None) -> Self:
        """As ``state`` saved them; new ones from None."""
        return cls({name: list(moments) for name, moments in (kept or {}).get("log_ratio_moments", {}).items()})

    def state(self) -> dict[str, Any]:
        return {"log_ratio_moments": self.moments}

    def factors(self) -> dict[str, float]:
        """clip(sigma_all / sigma_d, 0.25, 4) by domain; 1 where either is not known or 0."""
        whole = _std([sum(column) for column in zip(*self.moments.values(), strict=True)])
        factors = {}
        for name, moments in self.moments.items():
            own = _std(moments)
            ratio = whole / own if own and whole else 1.0
            factors[name] = min(max(ratio, _SCALE_BOUNDS[0]), _SCALE_BOUNDS[1])
        return factors

    def take(self, metrics: dict[str, float], tokens: Mapping[str, int]) -> dict[str, float]:
        """Take a step's moments out of its metrics, given its loss tokens by domain; what to report of them."""
        for name, count in tokens.items():
            mean, square = metrics.pop(f"log_ratio/{name}"), metrics.pop(f"log_ratio_sq/{name}")
            new = [float(count), mean * count, square * count]
            old = self.moments.get(name, new)
            self.moments[name] = [_MEMORY * a + (1 - _MEMORY) * b for a, b in zip(old, new, strict=True)]
        return {f"log_ratio_std/{name}": _std(moments) for name, moments in self.moments.items()}


def _std(moments: list[float]) -> float:
    """Population standard deviation from count, sum and sum of squares."""
    if not moments or moments[0] < 2:
        return 0.0
    count, total, square = moments
    return math.sqrt(max(square / count - (total / count) ** 2, 0.0))
