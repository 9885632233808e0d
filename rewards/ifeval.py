r"""Instruction following checked by code: the 25 kinds of IFEval (arXiv 2311.07911), without a network.

Our own code, close to the published checks, with these differences. Keywords are taken literally, not as patterns.
Words and sentences are split by rules here instead of NLTK's models. Language is that of ``rewards.language``. JSON
must be an object or a list. A text without letters is in no language. A prompt that is repeated and not answered, and
two of the fixed answers at once, do not count.

These checks see form and never sense: of IFEval's first 300 prompts an echo of the prompt follows all instructions of
64. Multiply by a reward that reads the answer.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.errors import RecipeError
from posttrain.protocols import Sandbox
from posttrain.types import Rollout, Score, Task
from rewards.answers import visible
from rewards.language import in_language

AT_LEAST, LESS_THAN = "at least", "less than"
MAX_CHARS = 200_000
"""A longer response follows nothing: none of the prompts asks for one."""

_WORD = re.compile(r"\w+")
_TOKEN = re.compile(r"\w+(?:[-'\u2019.&]\w+)*")
_ENDING = re.compile(r"(?:[.!?]+|\u2026)[\"'\u2019\u201d)\]*_]*(?=\s|$)|[\u3002\uff01\uff1f\u0964]")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'])(?:[A-Za-z]|(?:[A-Za-z]\.)+[A-Za-z]|Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|vs|etc|approx|dept|est|inc|ltd|co|no"
    r"|vol|fig|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec)\.$",
    re.IGNORECASE,
)
_HIGHLIGHT = re.compile(r"\*\*([^\n*]*)\*\*|\*([^\n*]*)\*")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def count_sentences(text: str) -> int:
    """Sentences, by their ends: ``.!?`` before a space, not after an abbreviation or an initial, nor, for a full stop,
    before a small letter. What follows the last end counts when it has words."""
    count, start = 0, 0
    for ending in _ENDING.finditer(text):
        end = ending.end()
        if _goes_on(text[max(0, end - 40) : end], ending.group(), text[end : end + 8].lstrip()):
            continue
        count += _WORD.search(text, start, end) is not None
        start = end
    return count + (_WORD.search(text, start) is not None)


def _goes_on(before: str, ending: str, after: str) -> bool:
    """Whether a full stop ends no sentence."""
    if not ending.startswith(".") or not after:
        return False
    return after[0].islower() or (ending == "." and _ABBREVIATION.search(before) is not None)


def _compare(count: int, relation: str, wanted: int) -> bool:
    if relation not in (AT_LEAST, LESS_THAN):
        raise RecipeError(f"relation = {relation!r}: expected {AT_LEAST!r} or {LESS_THAN!r}")
    return count >= wanted if relation == AT_LEAST else count < wanted


def _number(count: int) -> int:
    """JSON gives some counts as floats."""
    return int(count)


def keywords_existence(text: str, *, keywords: Sequence[str]) -> bool:
    return all(keyword.lower() in text.lower() for keyword in keywords)


def keywords_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(text.lower().count(keyword.strip().lower()), relation, _number(frequency))


def keywords_forbidden(text: str, *, forbidden_words: Sequence[str]) -> bool:
    """None of the words occurs as a whole word, in any case."""
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Counts a letter, or another character, in any case."""
    return _compare(text.lower().count(letter.lower()), let_relation, _number(let_frequency))


def response_language(text: str, *, language: str) -> bool:
    return in_language(text, language)


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    return _compare(count_sentences(text), relation, _number(num_sentences))


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """Paragraphs are parted by ``***``; only the first and the last part may be empty."""
    parts = [part.strip() for part in text.split("***")]
    inner = parts[1:-1]
    return all(inner) and sum(map(bool, parts)) == _number(num_paragraphs)


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    return _compare(len(_WORD.findall(text)), relation, _number(num_words))


def nth_paragraph_first_word(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are parted by empty lines; quotes around the word and punctuation after it do not count."""
    paragraphs = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    nth = _number(nth_paragraph)
    if len(paragraphs) != _number(num_paragraphs) or not 1 <= nth <= len(paragraphs):
        return False
    word = paragraphs[nth - 1].split()[0].lstrip("'\"\u2018\u201c")
    return re.split(r"[.,?!'\"\u2019\u201d:;]", word)[0].lower() == first_word.strip().lower()


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """At least so many ``[placeholders]`` in square brackets."""
    return len(re.findall(r"\[[^\[\]\n]+\]", text)) >= _number(num_placeholders)


def postscript(text: str, *, postscript_marker: str) -> bool:
    """A postscript with its marker, whatever the spaces and full stops in ``P.S.`` or ``P.P.S``, and words after it."""
    marker = postscript_marker.strip()
    if re.fullmatch(r"(?:P\.?\s?)+S\.?", marker, re.IGNORECASE):
        letters = [letter for letter in marker.upper() if letter.isalpha()]
        pattern = r"(?<![\w.])" + r"\.\s?".join(letters) + r"(?:\.|(?=[\s:]))"
    else:
        pattern = re.escape(marker)
    return re.search(pattern + r"\W{0,200}\w", text, re.IGNORECASE) is not None


def constrained_response(text: str) -> bool:
    """One of the three sentences "My answer is yes/no/maybe." occurs, and not several of them."""
    return sum(answer in text for answer in _ANSWERS) == 1


def json_format(text: str) -> bool:
    """The whole response is one JSON object or list, in a code fence or not."""
    plain = re.sub(r"\A```(?:json)?[ \t]*\n?", "", text.strip(), flags=re.IGNORECASE)
    try:
        found = json.loads(plain.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict | list)


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections, each begun by the word and a number, as in ``SECTION 1``."""
    return len(re.findall(rf"(?<!\w){re.escape(section_spliter.strip())}\s+\d+", text)) >= _number(num_sections)


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that begin with ``* `` or ``- ``; bold text and rules are no bullets."""
    bullets = re.findall(r"^[ \t]*(?:\*(?!\*)|-(?!-))[^\S\n]*\S", text, re.MULTILINE)
    return len(bullets) == _number(num_bullets)


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """At least so many parts in ``*asterisks*``, one or two on each side, with something between them."""
    found = [double or single for double, single in _HIGHLIGHT.findall(text)]
    return sum(bool(part.strip()) for part in found) >= _number(num_highlights)


def title(text: str) -> bool:
    """A title in double angular brackets, ``<<title>>``."""
    return any(found.strip() for found in re.findall(r"<<([^\n<>]+)>>", text))


def two_responses(text: str) -> bool:
    """Two different responses parted by six asterisks, ``******``."""
    parts = [part.strip() for part in text.split("******")]
    given = [part for part in parts if part]
    return all(parts[1:-1]) and len(given) == 2 and given[0] != given[1]


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """The response begins with the prompt, word for word but for case, and goes on: an echo answers nothing."""
    plain, prompt = text.strip().lower(), prompt_to_repeat.strip().lower()
    return plain.startswith(prompt) and _WORD.search(plain[len(prompt) :]) is not None


def end_checker(text: str, *, end_phrase: str) -> bool:
    """The response ends with exactly this phrase; quotes around the whole and case do not count."""
    return text.strip().strip('"').strip().lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    """The whole response stands in double quotes."""
    plain = text.strip()
    return len(plain) > 2 and plain[0] == plain[-1] == '"'


def capital_word_frequency(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Counts words all in capitals, "I" and "A" included."""
    return _compare(sum(map(str.isupper, _TOKEN.findall(text))), capital_relation, _number(capital_frequency))


def english_capital(text: str) -> bool:
    return text.isupper() and in_language(text, "en")


def english_lowercase(text: str) -> bool:
    return text.islower() and in_language(text, "en")


def no_comma(text: str) -> bool:
    return "," not in text


INSTRUCTIONS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": keywords_existence,
    "keywords:frequency": keywords_frequency,
    "keywords:forbidden_words": keywords_forbidden,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:json_format": json_format,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""IFEval's name of each kind of instruction -> its check; keyword arguments as in IFEval's ``kwargs``."""


def follows(text: str, instruction: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a response follows one instruction; an empty response follows none.

    Arguments that are None are left out. Raises ``RecipeError`` for an unknown kind or arguments that do not fit.
    """
    check = INSTRUCTIONS.get(instruction)
    given = {name: value for name, value in arguments.items() if value is not None}
    if check is None:
        raise RecipeError(f"instruction {instruction!r} is unknown; expected one of {', '.join(sorted(INSTRUCTIONS))}")
    try:
        inspect.signature(check).bind("", **given)
    except TypeError as error:
        raise RecipeError(f"instruction {instruction!r}: kwargs {given!r} do not fit: {error}") from error
    return bool(text.strip()) and len(text) <= MAX_CHARS and check(text, **given)


def loosened(text: str) -> Iterator[str]:
    """The eight variants IFEval's loose mode tries: with and without first line, last line and asterisks."""
    lines = text.split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        variant = "\n".join(part).strip()
        yield variant
        yield variant.replace("*", "")


def follows_loosely(text: str, instruction: str, arguments: Mapping[str, Any]) -> bool:
    """Whether any variant of the response follows the instruction."""
    return any(follows(variant, instruction, arguments) for variant in loosened(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class IFEvalReward:
    """1.0 when every instruction of the task is followed, else 0.0.

    ``task.info`` is ``{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}``, as in IFEval's rows. Parts
    are the four scores of that benchmark for this response, ``prompt_strict``, ``prompt_loose``, ``instruction_strict``
    and ``instruction_loose``, whose means over tasks are what it reports (the latter two weighted by the number of
    instructions), and each instruction's own. Raises ``RecipeError`` for a task without usable instructions.
    """

    mode: Literal["strict", "loose"] = "strict"
    partial: bool = False
    """Give the share of instructions followed instead of all or nothing."""

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        text = visible(rollout.text).strip()
        wanted = _read_instructions(rollout.task)
        strict = [follows(text, name, arguments) for name, arguments in wanted]
        loose = [followed or follows_loosely(text, *one) for followed, one in zip(strict, wanted, strict=True)]
        parts = {f"{i}/{name}": float(ok) for i, ((name, _), ok) in enumerate(zip(wanted, strict, strict=True))}
        for mode, row in (("strict", strict), ("loose", loose)):
            parts |= {f"prompt_{mode}": float(all(row)), f"instruction_{mode}": sum(row) / len(row)}
        missed = [
            name for (name, _), ok in zip(wanted, strict if self.mode == "strict" else loose, strict=True) if not ok
        ]
        return Score(
            value=parts[f"{'instruction' if self.partial else 'prompt'}_{self.mode}"],
            parts=parts,
            explanation=f"Not followed: {', '.join(missed)}." if missed else "All instructions are followed.",
        )


def _read_instructions(task: Task) -> list[tuple[str, Mapping[str, Any]]]:
    names, arguments = task.info.get("instruction_id_list"), task.info.get("kwargs")
    if not names or not isinstance(arguments, Sequence) or len(names) != len(arguments):
        raise RecipeError(
            f"task {task.id!r}: info has instruction_id_list {names!r:.80} and kwargs {arguments!r:.80}; expected a "
            "non-empty list of names and one mapping for each"
        )
    return list(zip(names, arguments, strict=True))
