"""Effort modes: how long a model thinks before it answers.

``non-think`` answers at once, ``high`` thinks, ``max`` thinks after being told to spare nothing (V4), and a number
from 1 to 100 thinks after being told that number (V4.1's scalar effort). Prefixes are data, in ``wording.toml``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from posttrain.errors import RecipeError

NON_THINK = "non-think"
HIGH = "high"
MAX = "max"
MODES = (NON_THINK, HIGH, MAX)
MIN_BUDGET, MAX_BUDGET = 1, 100
BUDGETS: Mapping[str, int] = {NON_THINK: MIN_BUDGET, HIGH: 75, MAX: MAX_BUDGET}
"""The scalar efforts that the modes stand for: V4.1's presets, and the least for the mode it has not."""


def check_effort(effort: str) -> str:
    """The same effort. ``RecipeError`` when there is none such."""
    if effort not in MODES and budget(effort) is None:
        raise RecipeError(
            f"effort = {effort!r}: expected one of {', '.join(MODES)} or a number from {MIN_BUDGET} to {MAX_BUDGET}; "
            "correct it"
        )
    return effort


def thinks(effort: str) -> bool:
    """Whether a turn begins with reasoning."""
    return check_effort(effort) != NON_THINK


def budget(effort: str) -> int | None:
    """The number of a scalar effort; None for a mode."""
    if not (effort.isascii() and effort.isdigit() and effort == str(int(effort))):
        return None
    return int(effort) if MIN_BUDGET <= int(effort) <= MAX_BUDGET else None


def budget_of(effort: str) -> int:
    """The scalar effort that is asked for."""
    return BUDGETS[effort] if effort in BUDGETS else int(check_effort(effort))


def prefix(effort: str) -> str:
    """What is said to the model before the system text; empty for most modes."""
    texts = wording()["effort"]
    number = budget(check_effort(effort))
    text = texts.get(effort, "") if number is None else texts["budget"].format(budget=number)
    return str(text)


@cache
def wording() -> Mapping[str, Any]:
    """The texts of ``wording.toml``."""
    return tomllib.loads(files("posttrain.conversation").joinpath("wording.toml").read_text(encoding="utf-8"))
