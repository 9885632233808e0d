"""Tasks of reasoning-gym (https://github.com/open-thought/reasoning-gym) and its scorers, with fences around them.

Three kinds of scorer are not used as they come: those that pay for anything (refused), those that run the answer as a
program (refused, or limited to answers that cannot call anything), and those that pay a part for containing the answer
(only a full match counts). Those that do more than compare text work in a process that can be killed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from posttrain.errors import RecipeError
from posttrain.types import Score, ScoreStatus
from rewards.answers import extract_answer, parse_number
from rewards.worker_pool import Limits, shared_pool

MAX_ANSWER_CHARS = 4096
"""A longer answer is wrong: no task here has one, and a scorer must not be handed a bomb."""
FULL_MATCH = 1 - 1e-6
"""reasoning-gym pays part of a point for containing the answer, over 0.99 for one letter too many in a long one."""

REFUSED: Mapping[str, str] = {
    "game_of_life_halting": "gives full marks to any text",
    "coin_flip": 'gives full marks to the constant "0"',
    "polynomial_multiplication": "runs the answer as a program",
    "simple_integration": "runs the answer as a program",
    "intermediate_integration": "runs the answer as a program",
}
"""Datasets whose scorers are not safe to train on, and why."""

ONE_ANSWER = frozenset({"spell_backward", "knights_knaves", "letter_jumble", "word_sorting"})
"""Datasets with one right answer whose scorers give full marks to more than that, such as anything that begins with it:
here their words are compared, case and punctuation aside."""

NO_REFERENCE = frozenset({"boxnet", "graph_color", "propositional_logic", "rush_hour", "rubiks_cube"})
"""Datasets with items whose ``answer`` is None: they can be scored, but there is nothing to imitate."""

CHANCE: Mapping[str, float] = {
    "circuit_logic": 0.65,
    "course_schedule": 0.60,
    "isomorphic_strings": 0.55,
    "ransom_note": 0.55,
    "syllogism": 0.55,
    "gcd": 0.45,
    "letter_counting": 0.45,
    "polynomial_equations": 0.43,
    "self_reference": 0.40,
    "rectangle_count": 0.33,
    "rotten_oranges": 0.25,
}
"""What the best constant answer earns, for datasets where it is much (20 items, seed 7, release 0.1.25)."""

_ARITHMETIC = re.compile(r"(?:[0-9+\-/()\s.]|(?<!\*)\*(?!\*))*")
_PLAIN_LITERAL = re.compile(r"[0-9A-Z_\[\],'\"\s.]*")
_FORMS = {
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "string_insertion": _PLAIN_LITERAL,
    "spiral_matrix": _PLAIN_LITERAL,
    "binary_matrix": _PLAIN_LITERAL,
    "n_queens": _PLAIN_LITERAL,
    "advanced_geometry": re.compile(r"-?[0-9./]+\s*\u00b0?|\(\s*-?[0-9./]+\s*,\s*-?[0-9./]+\s*\)"),
    "kakurasu": re.compile(r"[01\s\[\],]*"),
    "survo": re.compile(r"[0-9\s]*"),
    "sokoban": re.compile(r"[UDLRudlr]*"),
    "quantum_lock": re.compile(r"[A-Ca-c](?:\s*(?:\u2192|->)\s*[A-Ca-c])*"),
}
"""Scorers that pass the answer to Python's ``eval``, or that take the first thing they can use out of any text: only
answers of this form, which can call nothing, get that far."""


def require_usable(dataset: str) -> None:
    """Raise ``RecipeError`` for a dataset that does not exist or whose scorer is refused."""
    if dataset in REFUSED:
        raise RecipeError(
            f"dataset {dataset!r}: reasoning-gym's scorer {REFUSED[dataset]}; choose another dataset or grade it "
            "with a reward of your own"
        )
    import reasoning_gym.factory

    if dataset not in reasoning_gym.factory.DATASETS:
        raise RecipeError(
            f"dataset {dataset!r}: reasoning-gym has no dataset of that name; expected one of "
            "sorted(reasoning_gym.factory.DATASETS)"
        )


def score_puzzle(text: str, info: Mapping[str, Any], task_id: str, limits: Limits) -> Score:
    """1.0 when reasoning-gym's scorer gives the answer in ``text`` full marks, else 0.0; blocks while it is checked.

    ``info`` holds ``dataset``, its name, and ``entry``, the item as the dataset made it.
    """
    name, entry = info["dataset"], info.get("entry")
    if not isinstance(entry, Mapping) or "answer" not in entry:
        raise RecipeError(
            f"task {task_id!r}: info['entry'] = {str(entry)[:80]!r}; expected the reasoning-gym item of dataset "
            f"{name!r} with its 'question', 'answer' and 'metadata'"
        )
    compares_text = name in ONE_ANSWER or _compares_text(name)
    oracle = entry["answer"]
    found = extract_answer(text, numeric=isinstance(oracle, str) and parse_number(oracle) is not None)
    if found is None or len(found) > MAX_ANSWER_CHARS:
        return Score(value=0.0, explanation="The text holds no answer, or one that is too long.")
    allowed = _FORMS.get(name)
    if allowed is not None and not allowed.fullmatch(found):
        return Score(value=0.0, explanation=f"The answer {found[:80]!r} is not in the form {name} asks for.")
    if compares_text:
        return _score(float(_same_text(found, str(oracle), words_only=name in ONE_ANSWER)), found, "")
    if isinstance(oracle, str) and parse_number(oracle) is not None and parse_number(found) is None:
        return Score(value=0.0, explanation=f"The answer {found[:80]!r} is no number.")
    verdict = shared_pool("puzzle", limits).check({"dataset": name, "entry": entry, "answer": found})
    if verdict.value is None:
        return Score(value=None, status=ScoreStatus.REWARD_ERROR, error=f"the answer was not checked: {verdict.reason}")
    if verdict.value < 0:
        raise RecipeError(
            f"task {task_id!r}: reasoning-gym dataset {name!r} cannot score its own reference answer "
            f"({verdict.reason}); expected info['entry'] as the dataset made it"
        )
    return _score(verdict.value, found, verdict.reason)


def _same_text(found: str, oracle: str, *, words_only: bool) -> bool:
    if not words_only:
        return found == oracle.strip()
    return re.findall(r"\w+", found.casefold()) == re.findall(r"\w+", oracle.casefold())


def _score(value: float, found: str, reason: str) -> Score:
    right = value >= FULL_MATCH
    outcome = reason or ("is right" if right else "is wrong")
    return Score(value=float(right), explanation=f"The answer {found[:80]!r}: {outcome}.")


@lru_cache(maxsize=128)
def _compares_text(name: str) -> bool:
    """Whether the dataset has the common scorer, which only compares text with the one answer."""
    require_usable(name)
    import reasoning_gym.factory  # imports all 105 generators
    from reasoning_gym.dataset import ProceduralDataset

    kind, _ = reasoning_gym.factory.DATASETS[name]
    return kind.score_answer is ProceduralDataset.score_answer
