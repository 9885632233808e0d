"""The rules of the linter: wordings and weights that lead a judge astray or pay for nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from rewards.checks import CHECKS, words
from rewards.criteria import Criterion, aggregate
from rewards.rubric import PLACEHOLDER, Rubric

ERROR, WARNING = "error", "warning"

_NEGATION = re.compile(
    # Near the start, since "a rule that is not in the policy" is no negation of the claim.
    r"^\W*(?:(?!that\b|which\b|who\b)[\w'\u2019-]+\W+){0,3}?"
    r"(?:(?:does|do|did|is|are|was|were|has|have|should|must|can|could|will|would)(?:\s+not\b|n['\u2019]t\b)"
    r"|(?:cannot|never|avoids?|avoiding|refrains?|without)\b|free\s+of\b|no\s+(?!more\b|fewer\b|less\b))",
    re.IGNORECASE,
)
_FAULT = re.compile(
    r"^(?:(?:the|this)\s+\w+\s+)?(?:invents?|fabricates?|hallucinates?|contradicts?|ignores?|insults?|misstates?|"
    r"misleads?|fails?\s+to|omits?|repeats?\s+itself|refuses?\s+to|contains?\s+(?:an?\s+)?(?:errors?|mistakes?)|"
    r"makes?\s+(?:an?\s+)?(?:errors?|mistakes?|false))\b",
    re.IGNORECASE,
)
_COMPOUND = re.compile(r"\b(?:and(?:/or)?|as well as|along with)\b|;", re.IGNORECASE)
_RANGE = re.compile(r"\bbetween\s+\S+\s+and\s+\S+", re.IGNORECASE)
_QUOTED = re.compile(r"\"[^\"]*\"|'[^'\n]*'(?!\w)|`[^`]*`|\{[^{}]*\}|\u201c[^\u201d]*\u201d")
_SENTENCE_END = re.compile(r"[.!?](?=\s+[A-Z\"'{])")
_ABOUT_JUDGE = re.compile(
    r"\b(?:judges?|graders?|evaluators?|you|your|score|rate|give|award|assign|deduct)\b(?=.*\b(?:points?|scores?|rating|"
    r"marks?|out of|\d)\b)|\b(?:you should|your (?:judg|rating|score|verdict))|\bout of (?:5|10|100)\b|"
    r"\b(?:the|this|a) (?:judge|grader|evaluator)\b",
    re.IGNORECASE,
)
_UNFINISHED = re.compile(r"\b(?:TODO|TBD|FIXME|XXX|lorem ipsum)\b|<[A-Za-z_][\w -]*>|\[(?:INSERT|ADD|YOUR)\b[^\]]*\]")
_DOUBLE_BRACES = re.compile(r"\{\{\s*\w+\s*\}\}")
_COUNTS = re.compile(
    r"\b(?:at (?:least|most)|no more than|fewer than|less than|more than|exactly|between|under|over|within)\b"
    r"[^.]{0,30}\b(?:words?|characters?|letters?|sentences?|lines?|paragraphs?)\b",
    re.IGNORECASE,
)
_LENGTH_WORDS = re.compile(
    r"\b(?:long|longer|lengthy|short|shorter|brief|concise|detailed|words?|characters?|length)\b", re.IGNORECASE
)
_LENGTH_CHECKS = frozenset({"min_words", "max_words", "words_between", "max_chars", "single_line"})
_ABSTAINS = re.compile(
    r"^(?:n/?a|not applicable|not sure|unsure|unknown|cannot (?:say|tell|assess)|can't (?:say|tell)|unclear)$",
    re.IGNORECASE,
)
_GOOD = frozenset({"excellent", "great", "good", "best", "perfect", "high", "always", "yes", "kind", "correct", "full"})
_BAD = frozenset({"poor", "bad", "worst", "terrible", "low", "never", "no", "rude", "wrong", "none", "incorrect"})
_CONSTANTS = ("Yes.", "I cannot help with that.", "0", "The answer is 42.")
_LONG = " ".join(f"Sentence{i} says something new about number{i}." for i in range(200))
_ALIKE = 0.85
"""Share of common words from which two criteria count as the same."""
_FREE_SHARE = 0.5
"""Share of the full score that a fixed text may earn without convincing a judge of anything."""


@dataclass(frozen=True, slots=True)
class Trap:
    """A finding that has no line yet."""

    rule: str
    severity: str
    message: str
    index: int | None = None
    """Of the criterion; None for the rubric as a whole."""
    key: str = "text"
    """Field whose line is named."""


def traps(rubric: Rubric, fields: Sequence[str] | None = None) -> Iterator[Trap]:
    """Everything that is wrong with a rubric, or likely to be. ``fields`` are those tasks have in ``info``."""
    for index, criterion in enumerate(rubric.criteria):
        for look in _LOOKS:
            for rule, severity, message, key in look(criterion):
                yield Trap(rule, severity, message, index, key)
        if rubric.scope == "task" and (double := _DOUBLE_BRACES.search(criterion.text)):
            # Where each task brings its rubric, braces have nothing to be filled with and are meant.
            message = f"{double[0]} reaches the judge as literal braces; a field is written {{field}}, with single ones"
            yield Trap("placeholder", ERROR, message, index)
        if fields is not None:
            yield from _missing_fields(criterion, index, fields)
    yield from _duplicates(rubric.criteria)
    yield from _constant_answer(rubric)
    yield from _length_only(rubric)
    yield from _unsure_penalties(rubric)


_Look = Iterator[tuple[str, str, str, str]]
"""Rule, severity, message and key."""


def _plain(text: str) -> str:
    """A criterion's own words: without what it quotes, and without its placeholders."""
    return _QUOTED.sub("X", text)


def is_negation(text: str) -> bool:
    """Whether a claim is worded as the absence of something: "Does not mention ...", "Avoids ..."."""
    return bool(_NEGATION.search(_plain(text)))


def _polarity(c: Criterion) -> _Look:
    text = _plain(c.text)
    if c.kind != "judge":
        return
    if c.polarity == "penalty" and is_negation(c.text):
        yield (
            "negated-penalty",
            WARNING,
            "is a penalty worded as a negation, so avoiding the fault may be what costs; say what is wrong, as in "
            '"Mentions X", or set polarity = "reward"',
            "polarity",
        )
    if c.polarity == "reward" and c.tier == "pitfall":
        yield "polarity", WARNING, 'is a pitfall that earns; set polarity = "penalty" or another tier', "tier"
    elif c.polarity == "reward" and not c.choices and _FAULT.search(text):
        yield (
            "polarity",
            WARNING,
            'names a fault and earns when it is met; set polarity = "penalty" or say what a good response does',
            "text",
        )


def _wording(c: Criterion) -> _Look:
    text = _plain(c.text)
    if c.kind != "judge":
        return
    several = len(_SENTENCE_END.findall(text)) >= 1
    if several or _COMPOUND.search(_RANGE.sub("", text)):
        what = "has several sentences" if several else "asks for more than one thing"
        yield "compound", WARNING, f"{what}, and a judge has one verdict for all; split it into criteria", "text"
    if _ABOUT_JUDGE.search(text):
        yield (
            "about-the-judge",
            WARNING,
            "talks to the judge or about points; state a claim about the response, the weights do the adding",
            "text",
        )
    if _COUNTS.search(text):
        yield "countable", WARNING, 'asks a judge to count; use kind = "code" with a check such as max_words', "text"


def _unfinished(c: Criterion) -> _Look:
    for text, key in ((c.text, "text"), *((str(value), "args") for value in c.args.values())):
        if unfinished := _UNFINISHED.search(text):
            yield "placeholder", ERROR, f"still has something to fill in: {unfinished[0]!r}", key
        left = PLACEHOLDER.sub("", text)
        if key == "text" and ("{" in left or "}" in left):
            yield (
                "placeholder",
                ERROR,
                "has a brace that belongs to no {field}; a field's name is letters, digits and _, a literal brace is "
                "written twice",
                key,
            )


def _choices(c: Criterion) -> _Look:
    if not c.choices:
        return
    folded = [" ".join(choice.split()).casefold() for choice in c.choices]
    if len(set(folded)) < len(folded) or any(choice != choice.strip() or not choice for choice in c.choices):
        yield (
            "unreachable-choice",
            ERROR,
            f"choices {list(c.choices)} cannot all be answered: some differ in blanks or capitals only, or are empty",
            "choices",
        )
    unsure = [choice for choice in c.choices if _ABSTAINS.match(choice.strip())]
    if unsure:
        yield (
            "unreachable-choice",
            ERROR,
            f"choice {unsure[0]!r} would be paid as a place on the scale; a judge may always answer cannot_assess, so "
            "drop it",
            "choices",
        )
    if _runs_downwards(folded):
        message = f"choices run from {c.choices[0]!r} to {c.choices[-1]!r}; list the worst first"
        yield "choices-order", ERROR, message, "choices"


def _runs_downwards(folded: Sequence[str]) -> bool:
    try:
        numbers = [float(choice) for choice in folded]
    except ValueError:
        first, last = set(words(folded[0])), set(words(folded[-1]))
        return bool(first & _GOOD and last & _BAD)
    return numbers == sorted(numbers, reverse=True)


def _veto(c: Criterion) -> _Look:
    if not c.veto or c.weight == 0:
        return
    if c.polarity == "penalty":
        message = (
            f"its weight {c.weight:g} never counts: met, the veto decides, and unmet it costs nothing; set weight = 0"
        )
    else:
        message = (
            f"every response that passes the veto earns its weight {c.weight:g} too, which brings all scores closer "
            "together; set weight = 0"
        )
    yield "veto-weight", WARNING, message, "veto"


def _evidence(c: Criterion) -> _Look:
    if c.evidence and c.polarity == "reward" and is_negation(c.text):
        yield (
            "evidence-of-absence",
            ERROR,
            "wants a quote for something that is not there, so it can never be met; drop evidence, or make the "
            "presence a penalty",
            "evidence",
        )


def _code(c: Criterion) -> _Look:
    if c.kind != "code" or c.check is None:
        return
    if c.check == "regex" and not _compiles(str(c.args.get("pattern", ""))):
        yield "check-fails", ERROR, f"pattern {c.args.get('pattern')!r} is no regular expression", "args"
        return
    low, high = c.args.get("low"), c.args.get("high")
    if isinstance(low, int) and isinstance(high, int) and low > high:
        yield "never-met", ERROR, f"low = {low} is above high = {high}, so nothing meets it", "args"
    try:
        outcomes = _tried(c)
    except _FAILS as error:
        yield "check-fails", ERROR, f"{c.check} cannot use args = {dict(c.args)!r:.200}: {str(error)[:200]}", "args"
        return
    if outcomes is None or c.weight == 0:
        return
    if c.polarity == "reward" and all(outcomes):
        yield (
            "constant-answer",
            WARNING,
            f"is met by {_CONSTANTS[0]!r} and any other text, short or long, so it pays for nothing; drop it, or "
            "make its opposite a penalty",
            "check",
        )


_FAILS = (TypeError, ValueError, AttributeError, re.error)


def _outcomes(c: Criterion) -> list[bool] | None:
    """As ``_tried``; None where the check fails, too."""
    try:
        return _tried(c)
    except _FAILS:
        return None


def _tried(c: Criterion) -> list[bool] | None:
    """What a code check says of fixed texts; None where it needs fields of a task. Raises what the check raises."""
    if any(isinstance(value, str) and PLACEHOLDER.search(value) for value in c.args.values()):
        return None
    assert c.check is not None
    return [bool(CHECKS[c.check](text, **c.args)) for text in (*_CONSTANTS, _LONG)]


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


_LOOKS: tuple[Callable[[Criterion], _Look], ...] = (
    _polarity,
    _wording,
    _unfinished,
    _choices,
    _veto,
    _evidence,
    _code,
)


def _missing_fields(criterion: Criterion, index: int, fields: Sequence[str]) -> Iterator[Trap]:
    for value, key in ((criterion.text, "text"), *((value, "args") for value in criterion.args.values())):
        wanted = {match[1] for match in PLACEHOLDER.finditer(value) if match[1]} if isinstance(value, str) else set()
        for name in sorted(wanted - set(fields)):
            message = f"needs the field {name!r}, but tasks have {', '.join(sorted(fields)) or 'none'}"
            yield Trap("placeholder", ERROR, message, index, key)


def _duplicates(criteria: Sequence[Criterion]) -> Iterator[Trap]:
    for (_, first), (j, second) in combinations(enumerate(criteria), 2):
        if first.kind != second.kind:
            continue
        if first.kind == "code":
            if (first.check, dict(first.args)) == (second.check, dict(second.args)):
                yield Trap(
                    "duplicate", ERROR, f"checks the same as {first.id}; keep one and add up weights", j, "check"
                )
            continue
        one, other = set(words(first.text)), set(words(second.text))
        if words(first.text) == words(second.text):
            yield Trap("duplicate", ERROR, f"says the same as {first.id}; keep one and add up the weights", j)
        elif len(one & other) >= _ALIKE * len(one | other):
            yield Trap("duplicate", WARNING, f"says nearly the same as {first.id}; keep one, or say what differs", j)


def _constant_answer(rubric: Rubric) -> Iterator[Trap]:
    """What a fixed text earns when a judge grants it nothing and finds no fault."""
    judged = {c.id: 0.0 for c in rubric.criteria if c.kind == "judge"}
    outcomes = {c.id: _outcomes(c) for c in rubric.criteria if c.kind == "code"}
    low, high = rubric.aggregation.clip
    best, which = 0.0, ""
    for i, text in enumerate(_CONSTANTS):
        checked = {name: float(found[i]) if found else 0.0 for name, found in outcomes.items()}
        value = aggregate(rubric.criteria, {**judged, **checked}, rubric.aggregation.clip).value
        if value is not None and value > best:
            best, which = value, text
    if best - low >= _FREE_SHARE * (high - low):
        yield Trap(
            "constant-answer",
            WARNING,
            f"the fixed text {which!r} earns {best:.2f} although no judge found anything good in it; add criteria that "
            "only a real answer meets, or a veto",
            None,
            "criteria",
        )


def _length_only(rubric: Rubric) -> Iterator[Trap]:
    earning = [c for c in rubric.criteria if c.polarity == "reward" and c.weight > 0]
    total = sum(c.weight for c in earning)
    length = sum(c.weight for c in earning if _about_length(c))
    if total and length > 0.5 * total:
        yield Trap(
            "length-only",
            WARNING,
            f"{length / total:.0%} of what can be earned is for length alone; what a policy learns from it is length",
            None,
            "criteria",
        )


def _about_length(c: Criterion) -> bool:
    if c.kind == "code":
        return c.check in _LENGTH_CHECKS
    text = words(_plain(c.text))
    return bool(_LENGTH_WORDS.search(_plain(c.text))) and len(text) <= 8


def _unsure_penalties(rubric: Rubric) -> Iterator[Trap]:
    if rubric.aggregation.na == "zero" and any(c.polarity == "penalty" and c.kind == "judge" for c in rubric.criteria):
        yield Trap(
            "unsure-penalty",
            WARNING,
            'na = "zero" lets a penalty off whenever the judge cannot assess it; use "fail", or "skip"',
            None,
            "aggregation",
        )
