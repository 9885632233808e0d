"""Rewards made of rewards. A part that could not be scored leaves the whole unscored; it is never taken as 0."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from posttrain.errors import RecipeError
from posttrain.protocols import Ask, PolicyJudged, Reward, Sandbox
from posttrain.types import Rollout, SandboxSpec, Score, ScoreStatus
from rewards.files import PassesFilesOn


@dataclass(frozen=True, slots=True)
class WeightedSum(PassesFilesOn):
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

    def with_policy(self, ask: Ask) -> WeightedSum:
        """The same sum, with this policy as judge wherever a part is judged by the policy."""
        return replace(self, rewards={name: _lend(reward, ask) for name, reward in self.rewards.items()})

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
class Gate(PassesFilesOn):
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

    def with_policy(self, ask: Ask) -> Gate:
        """The same gate, with this policy as judge on both sides."""
        return replace(self, condition=_lend(self.condition, ask), reward=_lend(self.reward, ask))

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


async def _score(reward: Reward, rollout: Rollout, sandbox: Sandbox | None) -> Score:
    """The box goes to the part that asked for it."""
    return await reward.score(rollout, sandbox if _spec(reward) is not None else None)


def _lend(reward: Reward, ask: Ask) -> Reward:
    return reward.with_policy(ask) if isinstance(reward, PolicyJudged) else reward


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
