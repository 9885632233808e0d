"""Rewards made of rewards. A part that could not be scored leaves the whole unscored; it is never taken as 0."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import Literal

from posttrain.errors import RecipeError
from posttrain.protocols import GroupReward, Reward, Sandbox
from posttrain.types import Rollout, SandboxSpec, Score, ScoreStatus
from rewards.composite import Composite, finite


@dataclass(frozen=True, slots=True)
class WeightedSum(Composite):
    """Sum of weight times value over named rewards, scored at the same time.

    A reward of weight 0 is only reported, so it may fail to give a value. At most one reward may need a sandbox,
    since a box belongs to one grading alone.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.rewards or self.rewards.keys() != self.weights.keys():
            raise RecipeError(
                f"WeightedSum: rewards {sorted(self.rewards)} and weights {sorted(self.weights)}; expected one weight "
                "for every reward, and at least one of them"
            )
        _one_sandbox(self.rewards.values())

    @property
    def sandbox(self) -> SandboxSpec | None:
        return _one_sandbox(self.rewards.values())

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        answers = await asyncio.gather(*(_score(reward, rollout, sandbox) for reward in self.rewards.values()))
        scores = dict(zip(self.rewards, answers, strict=True))
        total: float | None = 0.0
        blocked = None
        for name, score in scores.items():
            if self.weights[name] == 0:
                continue
            if score.value is None:
                total, blocked = None, blocked or name
            elif total is not None:
                total += self.weights[name] * score.value
        merged = _merge(scores)
        if blocked is not None:
            return _unscored(merged, blocked, scores[blocked])
        return replace(merged, value=total)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate(Composite):
    """A reward that counts only when another one, the condition, reaches a threshold; below it the value is ``floor``.

    The condition goes first, so a failed one saves the cost of the reward behind it.
    """

    condition: Reward
    reward: Reward
    threshold: float = 0.5
    floor: float = 0.0

    def __post_init__(self) -> None:
        _one_sandbox((self.condition, self.reward))

    @property
    def sandbox(self) -> SandboxSpec | None:
        return _one_sandbox((self.condition, self.reward))

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        condition = await _score(self.condition, rollout, sandbox)
        alone = _merge({"condition": condition})
        if condition.value is None:
            return _unscored(alone, "condition", condition)
        if condition.value < self.threshold:
            return replace(alone, value=self.floor, status=ScoreStatus.VETOED)
        score = await _score(self.reward, rollout, sandbox)
        merged = _merge({"condition": condition, "reward": score})
        return replace(merged, value=score.value, status=score.status, error=score.error)


@dataclass(frozen=True, slots=True)
class Product(Composite):
    """Product of named rewards, such as tests times a rubric on style: what fails the tests earns nothing for style.

    In the order given, and the first 0 ends it, so a failed test saves the judge's cost. Values below 0 are refused,
    since two of them would earn.
    """

    rewards: Mapping[str, Reward]

    def __post_init__(self) -> None:
        if not self.rewards:
            raise RecipeError("Product: no rewards; expected at least one")
        _one_sandbox(self.rewards.values())

    @property
    def sandbox(self) -> SandboxSpec | None:
        return _one_sandbox(self.rewards.values())

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        scores: dict[str, Score] = {}
        value = 1.0
        for name, reward in self.rewards.items():
            scores[name] = score = await _score(reward, rollout, sandbox)
            if score.value is None:
                return _unscored(_merge(scores), name, score)
            if score.value < 0:
                raise RecipeError(
                    f"Product: reward {name!r} gave {score.value}; expected a value >= 0, since a product of two "
                    "losses is a gain; use WeightedSum or shift the reward"
                )
            value *= score.value
            if value == 0:
                break
        return replace(_merge(scores), value=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap(Composite):
    """A reward held within ``low`` and ``high``; None stays None. The part ``uncapped`` keeps what it was."""

    reward: Reward
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise RecipeError(f"Cap: low = {self.low}, high = {self.high}; expected low < high")

    @property
    def sandbox(self) -> SandboxSpec | None:
        return _spec(self.reward)

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        score = await _score(self.reward, rollout, sandbox)
        if score.value is None:
            return score
        value = min(max(score.value, self.low), self.high)
        return replace(score, value=value, parts={**score.parts, "uncapped": score.value})


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSum(Composite):
    """A ``GroupReward`` that adds rewards of both kinds over the rollouts of one task.

    ``sum_then_normalize`` is the plain weighted sum, which the trainer then centres; ``normalize_then_sum`` brings
    every reward to mean 0 and deviation 1 within the group first, so that none drowns the others (GDPO, arXiv
    2601.05242). A rollout some counting part could not score is unscored, and takes no part in any mean. Rewards that
    need a sandbox are refused: boxes are only lent to rewards of single rollouts.
    """

    rewards: Mapping[str, Reward | GroupReward]
    weights: Mapping[str, float]
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"

    def __post_init__(self) -> None:
        if not self.rewards or self.rewards.keys() != self.weights.keys():
            raise RecipeError(
                f"GroupSum: rewards {sorted(self.rewards)} and weights {sorted(self.weights)}; expected one weight for "
                "every reward, and at least one of them"
            )
        boxed = [name for name, reward in self.rewards.items() if getattr(reward, "sandbox", None) is not None]
        if boxed:
            raise RecipeError(
                f"GroupSum: reward {boxed[0]!r} needs a sandbox, which only rewards of single rollouts are lent; use "
                "WeightedSum"
            )

    async def score_group(self, rollouts: Sequence[Rollout]) -> Sequence[Score]:
        columns = await asyncio.gather(*(_score_all(reward, rollouts) for reward in self.rewards.values()))
        rows = [dict(zip(self.rewards, row, strict=True)) for row in zip(*columns, strict=True)]
        counting = [name for name in self.rewards if self.weights[name] != 0]
        blocked = [next((name for name in counting if row[name].value is None), None) for row in rows]
        usable = [row for row, name in zip(rows, blocked, strict=True) if name is None]
        shapes = {name: self._shape([row[name].value or 0.0 for row in usable]) for name in counting}
        scores = []
        for row, name in zip(rows, blocked, strict=True):
            if name is not None:
                scores.append(_unscored(_merge(row), name, row[name]))
                continue
            scaled = {n: ((row[n].value or 0.0) - shapes[n][0]) / shapes[n][1] for n in counting}
            scores.append(replace(_merge(row), value=sum(self.weights[n] * scaled[n] for n in counting)))
        return scores

    def _shape(self, values: Sequence[float]) -> tuple[float, float]:
        """What to subtract and to divide by; rewards that do not differ within the group give 0."""
        if self.aggregation == "sum_then_normalize" or not values:
            return 0.0, 1.0
        deviation = pstdev(values)
        return fmean(values), deviation if deviation > 1e-8 else 1.0


async def _score_all(reward: Reward | GroupReward, rollouts: Sequence[Rollout]) -> Sequence[Score]:
    if isinstance(reward, GroupReward):
        return [finite(score) for score in await reward.score_group(rollouts)]
    return await asyncio.gather(*(_score(reward, rollout, None) for rollout in rollouts))


async def _score(reward: Reward, rollout: Rollout, sandbox: Sandbox | None) -> Score:
    """The box goes to the part that asked for it."""
    return finite(await reward.score(rollout, sandbox if _spec(reward) is not None else None))


def _spec(reward: Reward) -> SandboxSpec | None:
    spec = getattr(reward, "sandbox", None)  # optional by the Reward protocol
    return spec if isinstance(spec, SandboxSpec) else None


def _one_sandbox(rewards: Iterable[Reward]) -> SandboxSpec | None:
    specs = [spec for spec in map(_spec, rewards) if spec is not None]
    if len(specs) > 1:
        raise RecipeError(
            f"{len(specs)} of the combined rewards need a sandbox; expected at most one, since what one grading leaves "
            "in a box could change the next; grade both in one reward"
        )
    return specs[0] if specs else None


def _merge(scores: Mapping[str, Score]) -> Score:
    """Everything but the value: parts under ``name`` and ``name/part``, judgments, flags and explanations."""
    parts: dict[str, float | None] = {}
    for name, score in scores.items():
        parts[name] = score.value
        parts.update({f"{name}/{part}": value for part, value in score.parts.items()})
    versions = [score.rubric_version for score in scores.values() if score.rubric_version]
    return Score(
        value=None,
        parts=parts,
        judgments=tuple(judgment for score in scores.values() for judgment in score.judgments),
        rubric_version="+".join(versions) or None,
        flags=tuple(f"{name}:{flag}" for name, score in scores.items() for flag in score.flags),
        explanation=" ".join(f"{name}: {score.explanation}" for name, score in scores.items() if score.explanation),
    )


def _unscored(merged: Score, name: str, score: Score) -> Score:
    reason = score.error or score.explanation or score.status.value
    status = ScoreStatus.REWARD_ERROR if score.status is ScoreStatus.OK else score.status
    return replace(merged, value=None, status=status, error=f"{name}: {reason}")
