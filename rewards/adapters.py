"""Reward functions written for other trainers, taken as they are."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import RecipeError
from posttrain.types import Rollout, Score, ScoreStatus
from rewards.functions import resolve

TrlFunction = Callable[..., Any]
"""``f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric) -> list[float | None]``,
sync or async, as ``trl.GRPOTrainer`` 1.16 calls it."""

_RESERVED = frozenset({"prompt", "completion", "completion_ids"})
"""Fields TRL does not pass on as columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """The part of ``transformers.TrainerState`` that is known where rewards are computed."""

    global_step: int
    """Newest weight version that wrote any of the rollouts."""


@dataclass(frozen=True, slots=True)
class TrlReward:
    """A ``GroupReward`` made of TRL reward functions.

    The value is the weighted sum over the functions that gave a number; a function's None or NaN means that it does
    not apply. When none applies the value is None. Columns are the fields of ``task.info`` that all tasks have, and
    ``answer``. What a function logs appears in the score's parts (metrics) and explanation (extra columns).
    """

    functions: tuple[TrlFunction, ...]
    weights: tuple[float, ...]
    conversational: bool = True
    """Give prompts and completions as lists of messages; otherwise as plain text."""

    async def score_group(self, rollouts: Sequence[Rollout]) -> Sequence[Score]:
        """One score per rollout. Raises ``RuntimeError``, naming the function, when one of them raises."""
        calls = [_Call(function, self._arguments(rollouts)) for function in self.functions]
        columns = await asyncio.gather(*(call.run() for call in calls))
        names = _unique_names(self.functions)
        return [self._score(names, values, calls, i) for i, values in enumerate(zip(*columns, strict=True))]

    def _score(self, names: Sequence[str], values: Sequence[float | None], calls: Sequence[_Call], i: int) -> Score:
        applied = [weight * value for weight, value in zip(self.weights, values, strict=True) if value is not None]
        parts: dict[str, float | None] = dict(zip(names, values, strict=True))
        for call in calls:
            parts.update({f"metric/{name}": value for name, value in call.metrics.items()})
        extra = [f"{name} = {column[i]}" for call in calls for name, column in call.extra.items() if i < len(column)]
        return Score(
            value=sum(applied) if applied else None,
            parts=parts,
            status=ScoreStatus.OK if applied else ScoreStatus.REWARD_ERROR,
            error=None if applied else f"no reward function applies: {', '.join(names)} gave None",
            explanation="; ".join(extra),
        )

    def _arguments(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        shared = set.intersection(*(set(rollout.task.info) for rollout in rollouts)) if rollouts else set()
        columns = {name: [rollout.task.info[name] for rollout in rollouts] for name in sorted(shared - _RESERVED)}
        return {
            "answer": [rollout.task.answer for rollout in rollouts],
            **columns,
            "prompts": [self._prompt(rollout) for rollout in rollouts],
            "completions": [self._completion(rollout) for rollout in rollouts],
            "completion_ids": [_completion_ids(rollout) for rollout in rollouts],
            "trainer_state": TrainerState(global_step=max(map(_newest_version, rollouts), default=0)),
        }

    def _prompt(self, rollout: Rollout) -> Any:
        messages = rollout.task.prompt
        return list(map(dict, messages)) if self.conversational else "\n".join(m["content"] for m in messages)

    def _completion(self, rollout: Rollout) -> Any:
        return list(map(dict, rollout.messages)) if self.conversational else rollout.text


def from_trl(
    *functions: TrlFunction | str, weights: Sequence[float] | None = None, conversational: bool = True
) -> TrlReward:
    """A reward from functions in TRL 1.16's signature; ``weights`` (``GRPOConfig.reward_weights``) default to 1.

    A function may also be given as ``"file.py:name"`` or ``"module:name"``.
    Raises ``RecipeError`` when there is no function, or not one weight for each.
    """
    chosen = tuple(weights) if weights is not None else (1.0,) * len(functions)
    if not functions or len(chosen) != len(functions):
        raise RecipeError(
            f"from_trl: {len(functions)} functions and {len(chosen)} weights; expected at least one function and one "
            "weight for each"
        )
    return TrlReward(tuple(map(resolve, functions)), chosen, conversational)


@dataclass(frozen=True, slots=True)
class _Call:
    """One function's run over a group, with what it logged."""

    function: TrlFunction
    arguments: Mapping[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    async def run(self) -> list[float | None]:
        arguments = {**self.arguments, "log_metric": self.metrics.__setitem__, "log_extra": self._log_extra}
        name = _name(self.function)
        try:
            # In a thread, so that a slow function does not hold up other rollouts or their deadlines.
            output = await asyncio.to_thread(self.function, **arguments)
            if inspect.isawaitable(output):
                output = await output
        except Exception as error:
            raise RuntimeError(f"reward function {name} raised {type(error).__name__}: {error}") from error
        expected = len(self.arguments["completions"])
        if len(output) != expected:
            raise ValueError(
                f"reward function {name} returned {len(output)} rewards for {expected} completions; "
                "expected exactly one (a number or None) per completion"
            )
        return [_number(value, name) for value in output]

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        self.extra.setdefault(column, []).extend(values)


def _number(value: Any, name: str) -> float | None:
    number = math.nan if value is None else float(value)
    if math.isinf(number):
        raise ValueError(f"reward function {name} returned {number}; expected a finite number or None")
    return None if math.isnan(number) else number


def _completion_ids(rollout: Rollout) -> list[int]:
    """All tokens after the prompt, what the world answered included."""
    prompt_length = len(rollout.turns[0].context_ids) if rollout.turns else 0
    return [int(token) for token in rollout.token_ids[prompt_length:]]


def _newest_version(rollout: Rollout) -> int:
    return int(max(rollout.versions, default=0))


def _name(function: TrlFunction) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _unique_names(functions: Sequence[TrlFunction]) -> list[str]:
    """Function names, numbered where two are the same."""
    names = list(map(_name, functions))
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
