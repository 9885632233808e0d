"""Rewards that depend on how long a rollout is, in generated tokens of all its turns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from posttrain.conversation.effort import HIGH, MIN_BUDGET, budget_of
from posttrain.errors import RecipeError
from posttrain.protocols import Reward, Sandbox
from posttrain.types import Rollout, SandboxSpec, Score
from rewards.composite import Composite, finite


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlongPenalty:
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13): 0 up to ``max_tokens - cache_tokens``, then falling
    in a straight line to -1 at ``max_tokens``, and -1 beyond. Add it to a reward for being right."""

    max_tokens: int
    cache_tokens: int

    def __post_init__(self) -> None:
        if not 0 < self.cache_tokens <= self.max_tokens:
            raise RecipeError(
                f"OverlongPenalty: max_tokens = {self.max_tokens}, cache_tokens = {self.cache_tokens}; expected "
                "0 < cache_tokens <= max_tokens"
            )

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        length = rollout.num_generated
        free = self.max_tokens - self.cache_tokens
        value = min(0.0, max(-1.0, (free - length) / self.cache_tokens))
        return Score(value=value, explanation=f"{length} tokens, {free} of them free.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EffortPenalty:
    """The effort-conditioned length penalty of V4.1 (arXiv 2609.19969): - min(C_max, k(b) * length / L_norm) with
    k(b) = k0 * exp(-(b - b_min) / tau), so that the less effort b is asked for, the more each token costs.

    b is the task's scalar effort, for a mode what ``posttrain.conversation.effort.BUDGETS`` says, and ``high`` for a
    task without effort. Advantages have to be normalised within one prompt and effort. k0, tau, L_norm and C_max were
    not published. Add it to a reward for being right.
    """

    normal_tokens: int
    """L_norm: the length that costs k(b)."""
    k0: float = 0.5
    """What a response of that length costs at the least effort."""
    tau: float = 30.0
    """Budget points over which the price falls to 1/e."""
    max_penalty: float = 1.0
    """C_max."""
    least_budget: int = MIN_BUDGET
    """b_min."""

    def __post_init__(self) -> None:
        if self.normal_tokens < 1 or min(self.k0, self.tau, self.max_penalty) <= 0:
            raise RecipeError(
                f"EffortPenalty: normal_tokens = {self.normal_tokens}, k0 = {self.k0}, tau = {self.tau}, max_penalty = "
                f"{self.max_penalty}; expected all of them above 0"
            )

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        effort = budget_of(rollout.task.effort or HIGH)
        price = self.k0 * math.exp(-(effort - self.least_budget) / self.tau)
        length = rollout.num_generated
        value = -min(self.max_penalty, price * length / self.normal_tokens)
        return Score(value=value, explanation=f"{length} tokens at effort {effort}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CosineLength(Composite):
    """The cosine length reward (arXiv 2502.03373): short right answers earn more than long ones, long wrong answers
    lose less than short ones, along half a cosine from 0 to ``max_tokens``; ``exceeded`` beyond.

    An answer is right when ``reward`` gives at least ``threshold``. Unscored stays unscored.
    """

    reward: Reward
    max_tokens: int
    right: tuple[float, float] = (2.0, 1.0)
    """Value of a right answer at length 0 and at ``max_tokens``."""
    wrong: tuple[float, float] = (-10.0, 0.0)
    """The same for a wrong one."""
    exceeded: float = -10.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.right[0] < self.right[1] or self.wrong[0] > self.wrong[1]:
            raise RecipeError(
                f"CosineLength: max_tokens = {self.max_tokens}, right = {self.right}, wrong = {self.wrong}; expected "
                "max_tokens >= 1, right not rising with length, wrong not falling"
            )

    @property
    def sandbox(self) -> SandboxSpec | None:
        spec = getattr(self.reward, "sandbox", None)  # optional by the Reward protocol
        return spec if isinstance(spec, SandboxSpec) else None

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        score = finite(await self.reward.score(rollout, sandbox))
        if score.value is None:
            return score
        length = rollout.num_generated
        value = self._value(length, right=score.value >= self.threshold)
        parts = {**score.parts, "reward": score.value}
        return replace(score, value=value, parts=parts, explanation=f"{score.explanation} {length} tokens.".strip())

    def _value(self, length: int, *, right: bool) -> float:
        if length > self.max_tokens:
            return self.exceeded
        at_zero, at_max = self.right if right else self.wrong
        return at_max + (at_zero - at_max) * (1 + math.cos(math.pi * length / self.max_tokens)) / 2
