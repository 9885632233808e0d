r"""The final answer in a text, and whether two answers are the same: exact, and cheap enough for every rollout.

A number is compared as a fraction, so 0.5, 1/2 and 2/4 are one answer. What this cannot decide (``\sqrt{8}`` against
``2\sqrt{2}``) goes to ``rewards.math_pool``.
"""

from __future__ import annotations

import re
from fractions import Fraction

_MAX_NUMBER_CHARS = 128
_TAIL_CHARS = 20_000
"""Where a number that nothing marks as the answer is looked for."""
_MARKER = re.compile(r"(?:\banswer\s*(?:\*\*)?\s*:(?:\*\*)?|####)", re.IGNORECASE)
_BOLD = re.compile(r"(?:\*\*)?((?:(?!\*\*).)+)\*\*\.?", re.DOTALL)
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = rf"[+\u2212-]?(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{{1,3}})?(?![0-9])"
_IN_TEXT = re.compile(rf"(?<![\w.]){_NUMBER}(?![eE][+-]?[0-9])(?:\s*/\s*{_DIGITS}(?![0-9.]))?")
_DECIMAL = re.compile(_NUMBER)
_RATIO = re.compile(rf"()([+-]?{_DIGITS})\s*/\s*([+-]?{_DIGITS})")
_LATEX_RATIO = re.compile(r"([+-]?)\\[dt]?frac\{\s*([+-]?[0-9]+)\s*\}\{\s*([+-]?[0-9]+)\s*\}")
_LISTED = re.compile(r"[\s,;/&|*$]*(?:\b(?:or|nor|maybe|perhaps|else|either|possibly)\b[\s,;/&|*$]*)*", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|,|!|;|:|quad|qquad)(?![A-Za-z])|\\ ")


def visible(text: str) -> str:
    """What a policy said after its own thinking; nothing when that was begun and never closed."""
    _, _, answer = text.rpartition("</think>")
    return "" if "<think>" in answer else answer


def extract_answer(text: str, *, numeric: bool = True) -> str | None:
    r"""The final answer in a text, None when there is none.

    In this order: the content of the last ``\boxed{}``; what follows the last ``answer:`` or ``####`` (up to the end
    of the line for a numeric answer); the last number for a numeric answer, the whole text otherwise. Several numbers
    in a row that only commas or "or" join are a list of guesses and no answer.
    """
    answer = last_boxed(text)
    if answer is None:
        markers = list(_MARKER.finditer(text))
        if markers:
            answer = text[markers[-1].end() :].strip()
            answer = answer.partition("\n")[0].strip() if numeric else answer
            bold = _BOLD.fullmatch(answer)
            answer = bold[1] if bold else answer
        else:
            answer = _last_number(text) if numeric else text
    return (answer.strip() or None) if answer is not None else None


def last_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{}`` or ``\fbox{}``, None when it is not there or never closed."""
    start, opening = max((text.rfind(opening), opening) for opening in ("\\boxed{", "\\fbox{"))
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(opening) - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(opening) : position]
    return None


def _last_number(text: str) -> str | None:
    text = text[-_TAIL_CHARS:]
    numbers = list(_IN_TEXT.finditer(text))
    if not numbers:
        return None
    last = numbers[-1]
    if len(numbers) > 1:
        between = text[numbers[-2].end() : last.start()]
        if between.strip(" ") and "\n" not in between and _LISTED.fullmatch(between):
            return None
        if between and not between.strip(" "):
            return None
    return last.group()


def parse_number(text: str) -> Fraction | None:
    r"""An integer, decimal, ``a/b`` or ``\frac{a}{b}`` as an exact fraction; None for anything else.

    A surrounding ``$``, a final full stop and thousands commas are dropped. Numbers over 128 characters or with an
    exponent over three digits are refused, since their value may not fit in memory.
    """
    plain = bare(text).replace("\u2212", "-")
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
    """Equal as numbers when the reference is one, else equal as text up to case, whitespace and LaTeX's layout."""
    number = parse_number(expected)
    if number is not None:
        return parse_number(found) == number
    return _plain(found) == _plain(expected)


def bare(text: str) -> str:
    """The text without math delimiters and a final full stop."""
    plain = text.strip().removesuffix(".").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)")):
        if plain.startswith(opening) and plain.endswith(closing) and len(plain) >= len(opening) + len(closing):
            return plain[len(opening) : -len(closing)].strip()
    return plain.removeprefix("$").strip()


def _plain(text: str) -> list[str]:
    words = _TEXT.sub(r"\1", _LAYOUT.sub("", bare(text))).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return words.casefold().split()
