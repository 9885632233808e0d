"""Which language a text is in, and a reward for staying in one.

Where the writing system decides (Hangul, Kannada, Thai, ...) it decides; otherwise py3langid, a naive Bayes classifier
whose answer depends on the text alone. Below about 20 letters a language written in Latin, Cyrillic, Arabic or
Devanagari letters cannot be told from its neighbours.
"""

from __future__ import annotations

import copy
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.errors import RecipeError
from posttrain.protocols import Sandbox
from posttrain.types import Rollout, Score
from rewards.answers import visible

MAX_CHARS = 20_000
"""Only so much of a text is looked at."""
_MIN_LETTERS = 20
"""Shorter pieces are judged by their writing system alone."""

_SCRIPTS: Mapping[str, tuple[str, ...]] = {
    "LATIN": (),
    "CYRILLIC": ("ru", "uk", "be", "bg", "mk", "sr", "kk", "ky", "mn"),
    "ARABIC": ("ar", "fa", "ur", "ug", "ps"),
    "DEVANAGARI": ("hi", "mr", "ne"),
    "HANGUL": ("ko",),
    "KANNADA": ("kn",),
    "GURMUKHI": ("pa",),
    "GUJARATI": ("gu",),
    "BENGALI": ("bn", "as"),
    "TAMIL": ("ta",),
    "TELUGU": ("te",),
    "MALAYALAM": ("ml",),
    "ORIYA": ("or",),
    "SINHALA": ("si",),
    "THAI": ("th",),
    "LAO": ("lo",),
    "KHMER": ("km",),
    "GEORGIAN": ("ka",),
    "ARMENIAN": ("hy",),
    "HEBREW": ("he",),
    "GREEK": ("el",),
    "ETHIOPIC": ("am",),
    "HIRAGANA": ("ja",),
    "KATAKANA": ("ja",),
    "CJK": ("zh", "ja"),
}
"""Writing system (first word of Unicode's character names) -> its languages; empty: too many to list."""

_NOT_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|https?://\S+|\\[A-Za-z]+", re.DOTALL)
_PIECE = re.compile(r"[^.!?\n\u3002\uff01\uff1f\u0964]+[.!?\n\u3002\uff01\uff1f\u0964]*")


@functools.lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    return name.partition(" ")[0]


def scripts(text: str) -> Counter[str]:
    """How many letters of each writing system there are."""
    return Counter(_script(letter) for letter in text if letter.isalpha())


def detect_language(text: str) -> str | None:
    """ISO 639-1 code of the language most of the text is in, None when it has no letters."""
    text = text[:MAX_CHARS]
    found = scripts(text)
    if not found:
        return None
    if found["HIRAGANA"] + found["KATAKANA"] > 0.1 * found.total():
        return "ja"
    main = found.most_common(1)[0][0]
    candidates = _SCRIPTS.get(main, ())
    if len(candidates) == 1:
        return candidates[0]
    if main == "CJK":
        return "zh"
    return _classify(text, candidates)


def _classify(text: str, candidates: tuple[str, ...]) -> str:
    # Capitals are another alphabet to a classifier of bytes.
    return str(_identifier(candidates).classify(text.lower())[0])


@functools.lru_cache(maxsize=64)
def _identifier(candidates: tuple[str, ...]) -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    if not candidates:
        return LanguageIdentifier.from_model_file(MODEL_FILE)
    # Shares the model's tables, which a choice of languages replaces and does not change.
    identifier = copy.copy(_identifier(()))
    identifier.set_languages([code for code in candidates if code in identifier.labels])
    return identifier


def in_language(text: str, language: str) -> bool:
    """Whether a text is in this language (ISO 639-1 code). One without letters is in none."""
    if language not in known_languages():
        raise RecipeError(
            f"language = {language!r}: expected an ISO 639-1 code, one of {', '.join(sorted(known_languages()))}"
        )
    found = scripts(text[:MAX_CHARS])
    if not found:
        return False
    main = found.most_common(1)[0][0]
    if found.total() < _MIN_LETTERS and len(_SCRIPTS.get(main, ())) != 1:
        return main in _scripts_of(language)
    return detect_language(text) == language


@functools.lru_cache(maxsize=1)
def known_languages() -> frozenset[str]:
    return frozenset(_identifier(()).labels) | {code for codes in _SCRIPTS.values() for code in codes}


@functools.lru_cache(maxsize=256)
def _scripts_of(language: str) -> frozenset[str]:
    """The writing systems of a language; Latin when no other is listed."""
    listed = frozenset(name for name, codes in _SCRIPTS.items() if language in codes)
    return listed | ({"LATIN"} if not listed or language == "sr" else frozenset())


def prose_of(text: str) -> str:
    """The text without code, formulas and addresses."""
    return _NOT_PROSE.sub(" ", text[:MAX_CHARS])


def share_in_language(prose: str, language: str) -> float | None:
    """Share of the letters that stand in sentences of this language and in its writing system; None without letters."""
    total = right = 0
    for piece in _pieces(prose):
        found = scripts(piece)
        total += found.total()
        if in_language(piece, language):
            right += sum(found[name] for name in _scripts_of(language))
    return min(right / total, 1.0) if total else None


def _pieces(text: str) -> list[str]:
    """Sentences and lines, short ones together with what follows them."""
    pieces: list[str] = []
    start = letters = 0
    for match in _PIECE.finditer(text):
        letters += sum(map(str.isalpha, match.group()))
        if letters >= 2 * _MIN_LETTERS:
            pieces.append(text[start : match.end()])
            start, letters = match.end(), 0
    return [*pieces, text[start:]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageReward:
    """Share of the letters that are in the task's language (DeepSeek-R1's language consistency, arXiv 2501.12948).

    The language is ``task.info["language"]`` (ISO 639-1), or ``language`` for tasks that name none. Thinking counts
    unless ``visible_only``. A text of fewer than ``min_letters`` letters gets 0.0, since "A" is in any language, so use
    it as a term or a gate only where prose is asked for. Raises ``RecipeError`` for an unknown language.
    """

    language: str | None = None
    visible_only: bool = False
    min_letters: int = 40
    """Letters of prose; code, formulas and addresses do not count."""
    threshold: float | None = None
    """With a number: 1.0 from this share on and 0.0 below, instead of the share."""

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        language = rollout.task.info.get("language", self.language)
        if not isinstance(language, str):
            raise RecipeError(
                f"task {rollout.task.id!r}: info['language'] is missing and LanguageReward.language is None; set one "
                "to an ISO 639-1 code such as 'en'"
            )
        text = visible(rollout.text) if self.visible_only else rollout.text
        in_language("", language)
        prose = prose_of(text)
        share = share_in_language(prose, language)
        if share is None or sum(map(str.isalpha, prose)) < self.min_letters:
            return Score(value=0.0, explanation=f"The text has fewer than {self.min_letters} letters.")
        value = share if self.threshold is None else float(share >= self.threshold)
        return Score(value=value, parts={"share": share}, explanation=f"{share:.0%} of the letters are in {language}.")
