"""Plain functions as rewards: our own by-name form, verl's ``compute_score`` and verifiers' reward functions.

A function is sync or async and is given as itself or as ``"path/to/file.py:name"`` or ``"package.module:name"``. It
says by the names of its parameters what it wants, so a misspelt one is an error and never a default. It returns a
number, a bool, None (it cannot tell, which is not 0) or a mapping of named parts.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.protocols import Sandbox
from posttrain.types import EMPTY, Message, Rollout, Score, ScoreStatus, Task

Function = Callable[..., Any]


@functools.lru_cache(maxsize=256)
def load_object(target: str) -> Any:
    """What ``file.py:name`` or ``module:name`` names. Raises ``RecipeError``."""
    where, _, name = target.rpartition(":")
    if not where or not name:
        raise RecipeError(f"{target!r}: expected 'path/to/file.py:name' or 'package.module:name'")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except (ImportError, OSError, SyntaxError) as error:
        raise RecipeError(f"{target!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise RecipeError(f"{target!r}: {where} has no {name!r}")
    return getattr(module, name)


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise OSError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def resolve(function: Function | str) -> Function:
    """A function, loaded where it is used: what is sent to other processes is its name."""
    found = load_object(function) if isinstance(function, str) else function
    if not callable(found):
        raise RecipeError(f"{function!r} is {found!r:.80}; expected a function")
    return found


def name_of(function: Function | str) -> str:
    if isinstance(function, str):
        return function.rpartition(":")[2]
    return str(getattr(function, "__name__", type(function).__name__))


async def call(function: Function, available: Mapping[str, Any]) -> Any:
    """Call with those of the arguments it names; a slow sync function holds nobody up. ``RecipeError`` when it names
    one that is not there and has no default."""
    parameters = inspect.signature(function).parameters.values()
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        given = dict(available)
    else:
        given = {each.name: available[each.name] for each in parameters if each.name in available}
    missing = [
        each.name
        for each in parameters
        if each.default is each.empty
        and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        and each.name not in given
    ]
    if missing:
        raise RecipeError(
            f"reward function {name_of(function)} wants an argument {missing[0]!r}; expected some of "
            f"{', '.join(available)}"
        )
    output = await asyncio.to_thread(function, **given)
    return await output if inspect.isawaitable(output) else output


def number(value: Any, name: str) -> float | None:
    """A function's value: None and NaN mean that it cannot tell. Raises ``ValueError`` for what is no number."""
    if isinstance(value, str | bytes):
        raise ValueError(f"reward function {name} returned {value!r:.80}; expected a number or None")
    found = math.nan if value is None else float(value)
    if math.isinf(found):
        raise ValueError(f"reward function {name} returned {found}; expected a finite number or None")
    return None if math.isnan(found) else found


def to_score(value: Any, name: str, *, total: str = "score") -> Score:
    """A score from what a function returned; of a mapping, ``total`` is the value and every number a part."""
    if isinstance(value, Score):
        return value
    parts: dict[str, float | None] = {}
    if isinstance(value, Mapping):
        if total not in value:
            raise ValueError(f"reward function {name} returned the keys {sorted(map(str, value))}; expected {total!r}")
        numbers = {k: v for k, v in value.items() if k != total and (v is None or isinstance(v, int | float))}
        parts = {str(key): number(part, name) for key, part in numbers.items()}
        value = value[total]
    found = number(value, name)
    if found is None:
        error = f"reward function {name} gave no number"
        return Score(value=None, parts=parts, status=ScoreStatus.REWARD_ERROR, error=error)
    return Score(value=found, parts=parts)


@dataclass(frozen=True, slots=True)
class FunctionReward:
    """A reward from one function of a rollout, see ``from_function`` and ``from_verl``."""

    function: Function | str
    arguments: Callable[[Rollout], Mapping[str, Any]]

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        return to_score(await call(resolve(self.function), self.arguments(rollout)), name_of(self.function))


def from_function(function: Function | str) -> FunctionReward:
    """A reward from a function of any of ``text``, ``prompt``, ``messages``, ``answer``, ``info``, ``task``,
    ``rollout``; of a mapping it returns, ``score`` is the value."""
    return FunctionReward(function, own_arguments)


def own_arguments(rollout: Rollout) -> Mapping[str, Any]:
    task = rollout.task
    return {
        "text": rollout.text,
        "prompt": [dict(message) for message in task.prompt],
        "messages": [dict(message) for message in rollout.messages],
        "answer": task.answer,
        "info": task.info,
        "task": task,
        "rollout": rollout,
    }


def from_verl(compute_score: Function | str) -> FunctionReward:
    """A reward from verl's ``compute_score(data_source, solution_str, ground_truth, extra_info)``, which gives a number
    or a mapping with ``score``.

    ``data_source`` is ``task.info["data_source"]`` or the task's domain; ``ground_truth`` is ``task.answer`` or, as in
    verl's rows, ``task.info["reward_model"]["ground_truth"]``; ``extra_info`` is ``task.info["extra_info"]`` or all of
    ``task.info``. A function that wants a reward model's address is refused.
    """
    return FunctionReward(compute_score, verl_arguments)


def verl_arguments(rollout: Rollout) -> Mapping[str, Any]:
    info = rollout.task.info
    truth = rollout.task.answer
    if truth is None:
        truth = info.get("reward_model", EMPTY).get("ground_truth", info.get("ground_truth"))
    return {
        "data_source": info.get("data_source", rollout.task.domain),
        "solution_str": rollout.text,
        "ground_truth": truth,
        "extra_info": dict(info.get("extra_info") or info),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceTask:
    """``trace.task``: the row that was solved."""

    data: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """``trace.task.data`` and ``task``: the fields of ``task.info``, and ``prompt``, ``answer`` and ``id``, by dot."""

    fields: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.fields[name]
        except KeyError:
            raise AttributeError(f"the task has no field {name!r}; it has {', '.join(sorted(self.fields))}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """The part of verifiers' ``Trace`` that a reward reads of a finished rollout."""

    id: str
    task: TraceTask
    messages: Sequence[Message]
    last_reply: str
    stop_condition: str
    num_turns: int
    is_completed: bool = True
    info: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def assistant_messages(self) -> list[Message]:
        return [message for message in self.messages if message["role"] == "assistant"]


_PLURALS = {"prompts": "prompt", "completions": "completion", "answers": "answer", "states": "state", "infos": "info",
            "tasks": "task", "traces": "trace", "rollouts": "rollout"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class VerifiersReward:
    """A ``GroupReward`` from reward functions written for verifiers, see ``from_verifiers``."""

    functions: tuple[Function | str, ...]
    weights: tuple[float, ...]

    async def score_group(self, rollouts: Sequence[Rollout]) -> Sequence[Score]:
        """One score per rollout. Raises ``RuntimeError``, naming the function, when one of them raises."""
        columns = await asyncio.gather(*(self._column(function, rollouts) for function in self.functions))
        return [self._score(row) for row in zip(*columns, strict=True)]

    async def _column(self, function: Function | str, rollouts: Sequence[Rollout]) -> Sequence[Any]:
        resolved = resolve(function)
        rows = [verifiers_arguments(rollout) for rollout in rollouts]
        names = inspect.signature(resolved).parameters
        try:
            if not _PLURALS.keys() & names.keys():
                return await asyncio.gather(*(call(resolved, row) for row in rows))
            columns = {plural: [row[single] for row in rows] for plural, single in _PLURALS.items()}
            values = await call(resolved, columns)
        except RecipeError:
            raise
        except Exception as error:
            raise RuntimeError(f"reward function {name_of(function)} raised {type(error).__name__}: {error}") from error
        if len(values) != len(rollouts):
            raise ValueError(
                f"reward function {name_of(function)} returned {len(values)} rewards for {len(rollouts)} rollouts; "
                "expected exactly one per rollout"
            )
        return list(values)

    def _score(self, values: Sequence[Any]) -> Score:
        parts: dict[str, float | None] = {}
        total, missing = 0.0, ""
        for function, weight, value in zip(self.functions, self.weights, values, strict=True):
            name = name_of(function)
            keyed = value if isinstance(value, Mapping) else {name: value}
            for key, one in keyed.items():
                parts[str(key)] = found = number(one, name)
                if weight != 0 and found is None:
                    missing = missing or str(key)
                total += weight * (found or 0.0)
        if missing:
            error = f"{missing}: the reward function gave no number"
            return Score(value=None, parts=parts, status=ScoreStatus.REWARD_ERROR, error=error)
        return Score(value=total, parts=parts)


def from_verifiers(*functions: Function | str, weights: Sequence[float] | None = None) -> VerifiersReward:
    """A reward from functions written for verifiers; the value is their weighted sum, weight 0 is a metric.

    Both generations: ``f(prompt, completion, answer, state, info, task)`` by name, where plural names take the whole
    group and give a list, and ``f(trace)`` or ``f(task, trace)`` of ``verifiers.v1`` (bound methods of a task), marked
    ``@vf.reward(weight=)`` or ``@vf.metric``. Weights not given are those of the mark, or 1. A counting function that
    gives None leaves the rollout unscored.
    """
    chosen = tuple(weights) if weights is not None else tuple(map(_marked_weight, functions))
    if not functions or len(chosen) != len(functions):
        raise RecipeError(
            f"from_verifiers: {len(functions)} functions and {len(chosen)} weights; expected at least one function and "
            "one weight for each"
        )
    return VerifiersReward(functions, chosen)


def _marked_weight(function: Function | str) -> float:
    resolved = resolve(function)
    if getattr(resolved, "metric", False) is True:
        return 0.0
    return float(getattr(resolved, "_vf_weight", 1.0))


def verifiers_arguments(rollout: Rollout) -> Mapping[str, Any]:
    task = rollout.task
    row = Row(fields={**task.info, "id": task.id, "prompt": task.prompt, "answer": task.answer})
    messages = [dict(message) for message in rollout.messages]
    trace = Trace(
        id=rollout.id,
        task=TraceTask(data=row),
        messages=(*task.prompt, *rollout.messages),
        last_reply=rollout.text.strip(),
        stop_condition=rollout.stop.value,
        num_turns=rollout.num_turns,
    )
    return {
        "prompt": [dict(message) for message in task.prompt],
        "completion": messages,
        "answer": task.answer if task.answer is not None else "",
        "state": _state(task, messages),
        "info": dict(task.info),
        "task": row,
        "trace": trace,
        "rollout": rollout,
    }


def _state(task: Task, messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {"prompt": list(task.prompt), "completion": messages, "answer": task.answer, "info": dict(task.info)}
