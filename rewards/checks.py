"""Checks a rubric can make without a judge: small functions of the text, named in a criterion's ``check``.

Words are runs of letters, digits, apostrophes and hyphens; case does not matter unless a check says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise

from rewards.ifeval import INSTRUCTIONS

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")


def words(text: str) -> list[str]:
    """The words of a text in lower case, in order."""
    return [match.group().lower() for match in _WORD.finditer(text)]


def contains_word(text: str, *, word: str) -> bool:
    """The word, or several in a row, occurs as a whole word."""
    wanted, found = words(word), words(text)
    return bool(wanted) and any(found[i : i + len(wanted)] == wanted for i in range(len(found)))


def lacks_word(text: str, *, word: str) -> bool:
    return not contains_word(text, word=word)


def min_words(text: str, *, count: int) -> bool:
    return len(words(text)) >= count


def max_words(text: str, *, count: int) -> bool:
    return len(words(text)) <= count


def words_between(text: str, *, low: int, high: int) -> bool:
    """Number of words from ``low`` to ``high``, both included."""
    return low <= len(words(text)) <= high


def max_chars(text: str, *, count: int) -> bool:
    return len(text) <= count


def single_line(text: str) -> bool:
    return bool(text.strip()) and "\n" not in text.strip()


def starts_with_capital(text: str) -> bool:
    return text.lstrip()[:1].isupper()


def ends_with(text: str, *, suffix: str) -> bool:
    """Ends with exactly this, case included; trailing whitespace is ignored."""
    return text.rstrip().endswith(suffix)


def no_comma(text: str) -> bool:
    return "," not in text


def no_repeated_words(text: str, *, min_letters: int = 4) -> bool:
    """No word of at least ``min_letters`` occurs twice, so that "the" and "and" may."""
    counts = Counter(word for word in words(text) if len(word) >= min_letters)
    return all(count == 1 for count in counts.values())


def no_stutter(text: str, *, times: int = 2) -> bool:
    """No word occurs ``times`` times (at least 2) directly one after another."""
    run = 1
    for previous, word in pairwise(words(text)):
        run = run + 1 if word == previous else 1
        if run >= times:
            return False
    return True


def regex(text: str, *, pattern: str) -> bool:
    """The pattern is found somewhere. Write patterns that cannot backtrack forever: the text is the policy's."""
    return re.search(pattern, text) is not None


CHECKS: Mapping[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        contains_word,
        lacks_word,
        min_words,
        max_words,
        words_between,
        max_chars,
        single_line,
        starts_with_capital,
        ends_with,
        no_comma,
        no_repeated_words,
        no_stutter,
        regex,
    )
} | {f"ifeval:{name}": check for name, check in INSTRUCTIONS.items()}
