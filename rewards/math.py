"""Math with one right answer: the last answer in the text, compared exactly.

A number is compared as a fraction, so 0.5, 1/2 and 2/4 are one answer. Tasks drawn from reasoning-gym are scored by
reasoning-gym's own scorer, except where that scorer is known to be wrong or to run the answer as a program.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from posttrain.errors import RecipeError
from posttrain.protocols import Sandbox
from posttrain.types import Rollout, Score

MAX_ANSWER_CHARS = 4096
"""A longer answer is wrong: no task here has one, and a scorer must not be handed a bomb."""
_MAX_NUMBER_CHARS = 128
FULL_MATCH = 0.99
"""reasoning-gym pays part of a point for containing the answer; only a full match counts."""

_MARKER = re.compile(r"(?:\banswer\s*:|####)", re.IGNORECASE)
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = rf"[+-]?(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}})?(?![0-9])"
_IN_TEXT = re.compile(rf"(?<![\w.]){_NUMBER}(?![eE][+-]?[0-9])(?:\s*/\s*{_DIGITS}(?![0-9.]))?")
_DECIMAL = re.compile(_NUMBER)
_RATIO = re.compile(rf"()([+-]?{_DIGITS})\s*/\s*([+-]?{_DIGITS})")
_LATEX_RATIO = re.compile(r"([+-]?)\\[dt]?frac\{\s*([+-]?[0-9]+)\s*\}\{\s*([+-]?[0-9]+)\s*\}")

_WRONG_SCORERS = {
    "game_of_life_halting": "gives full marks to any text",
    "coin_flip": 'gives full marks to the constant "0"',
    "polynomial_multiplication": "runs the answer as a program",
    "simple_integration": "runs the answer as a program",
    "intermediate_integration": "runs the answer as a program",
}
_ARITHMETIC = re.compile(r"(?:[0-9+\-/()\s.]|(?<!\*)\*(?!\*))*")
_PLAIN_LITERAL = re.compile(r"[0-9A-Z_\[\],'\"\s.]*")
_EVALUATED = {
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "string_insertion": _PLAIN_LITERAL,
    "spiral_matrix": _PLAIN_LITERAL,
    "binary_matrix": _PLAIN_LITERAL,
    "n_queens": _PLAIN_LITERAL,
}
"""Scorers that pass the answer to Python's ``eval``: only answers that cannot call anything get that far."""


@dataclass(frozen=True, slots=True)
class MathReward:
    """1.0 for the right final answer, else 0.0.

    Compares with ``task.answer``, or, when ``task.info`` holds ``dataset`` and ``entry``, asks that reasoning-gym
    dataset's ``score_answer``. Raises ``RecipeError`` for a task that cannot be graded this way.
    """

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        task = rollout.task
        if "dataset" in task.info:
            return await asyncio.to_thread(_score_with_reasoning_gym, rollout.text, task.info, task.id)
        if task.answer is None:
            raise RecipeError(
                f"task {task.id!r}: answer is None; MathReward needs a reference answer, or info with the "
                "reasoning-gym fields 'dataset' and 'entry'"
            )
        found = extract_answer(rollout.text, numeric=parse_number(task.answer) is not None)
        if found is None:
            return Score(value=0.0, explanation="The text holds no answer.")
        right = same_answer(found, task.answer)
        return _verdict(right, found, task.answer)


def extract_answer(text: str, *, numeric: bool = True) -> str | None:
    r"""The final answer in a text, None when there is none.

    In this order: the content of the last ``\boxed{}``; what follows the last ``answer:`` or ``####`` (up to the end
    of the line for a numeric answer); the last number for a numeric answer, the whole text otherwise.
    """
    answer = _last_boxed(text)
    if answer is None:
        markers = list(_MARKER.finditer(text))
        if markers:
            answer = text[markers[-1].end() :].strip()
            answer = answer.partition("\n")[0] if numeric else answer
        elif numeric:
            numbers = _IN_TEXT.findall(text)
            answer = numbers[-1] if numbers else None
        else:
            answer = text
    return (answer.strip() or None) if answer is not None else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None


def parse_number(text: str) -> Fraction | None:
    r"""An integer, decimal, ``a/b`` or ``\frac{a}{b}`` as an exact fraction; None for anything else.

    A surrounding ``$``, a final full stop and thousands commas are dropped. Numbers over 128 characters or with an
    exponent over three digits are refused, since their value may not fit in memory.
    """
    plain = _bare(text).replace("\u2212", "-")
    if len(plain) > _MAX_NUMBER_CHARS:
        return None
    ratio = _RATIO.fullmatch(plain) or _LATEX_RATIO.fullmatch(plain)
    if ratio:
        sign, *terms = ratio.groups()
        numerator, denominator = (int(term.replace(",", "")) for term in terms)
        if denominator == 0:
            return None
        return Fraction(-numerator if sign == "-" else numerator, denominator)
    return Fraction(plain.replace(",", "")) if _DECIMAL.fullmatch(plain) else None


def same_answer(found: str, expected: str) -> bool:
    """Equal as numbers when the reference is one, else equal as text up to case and whitespace."""
    number = parse_number(expected)
    if number is not None:
        return parse_number(found) == number
    return _bare(found).casefold().split() == _bare(expected).casefold().split()


def _bare(text: str) -> str:
    """The text without math delimiters and a final full stop."""
    plain = text.strip().removesuffix(".").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)")):
        if plain.startswith(opening) and plain.endswith(closing) and len(plain) >= len(opening) + len(closing):
            return plain[len(opening) : -len(closing)].strip()
    return plain.removeprefix("$").strip()


def _verdict(right: bool, found: str, expected: object) -> Score:
    relation = "matches" if right else "differs from"
    return Score(value=float(right), explanation=f"The answer {found[:80]!r} {relation} {str(expected)[:80]!r}.")


def _score_with_reasoning_gym(text: str, info: Mapping[str, Any], task_id: str) -> Score:
    name, entry = info["dataset"], info.get("entry")
    if not isinstance(entry, Mapping) or "answer" not in entry:
        raise RecipeError(
            f"task {task_id!r}: info['entry'] = {str(entry)[:80]!r}; expected the reasoning-gym item of dataset "
            f"{name!r} with its 'question', 'answer' and 'metadata'"
        )
    scorer = _scorer(name)
    oracle = entry["answer"]
    found = extract_answer(text, numeric=isinstance(oracle, str) and parse_number(oracle) is not None)
    if found is None or len(found) > MAX_ANSWER_CHARS:
        return Score(value=0.0, explanation="The text holds no answer, or one that is too long.")
    allowed = _EVALUATED.get(name)
    if allowed is not None and not allowed.fullmatch(found):
        return Score(value=0.0, explanation=f"The answer {found[:80]!r} is not in the form {name} asks for.")
    try:
        right = scorer(found, entry) >= FULL_MATCH
    except Exception as error:  # noqa: BLE001 - a scorer may raise anything at an answer it cannot parse
        _require_scorable(scorer, entry, name, task_id)
        return Score(value=0.0, explanation=f"The answer {found[:80]!r} cannot be read ({type(error).__name__}).")
    return _verdict(right, found, oracle)


def _require_scorable(scorer: Callable[[Any, Any], float], entry: Mapping[str, Any], name: str, task_id: str) -> None:
    """Raise ``RecipeError`` when the scorer fails at the reference answer too, so that the entry is to blame."""
    if entry["answer"] is None:
        return
    try:
        scorer(entry["answer"], entry)
    except Exception as error:
        raise RecipeError(
            f"task {task_id!r}: reasoning-gym dataset {name!r} cannot score its own reference answer "
            f"({type(error).__name__}: {error}); expected info['entry'] as the dataset made it"
        ) from error


@lru_cache(maxsize=128)
def _scorer(name: str) -> Callable[[Any, Any], float]:
    if name in _WRONG_SCORERS:
        raise RecipeError(
            f"dataset {name!r}: reasoning-gym's scorer {_WRONG_SCORERS[name]}; choose another dataset or grade it "
            "with a reward of your own"
        )
    import reasoning_gym.factory  # imports all 105 generators

    try:
        return reasoning_gym.factory.get_score_answer_fn(name)
    except (ValueError, TypeError, AssertionError) as error:
        raise RecipeError(
            f"dataset {name!r}: reasoning-gym has no scorer of that name ({error}); expected one of "
            "sorted(reasoning_gym.factory.DATASETS)"
        ) from error
