"""Rubrics as others write them: HealthBench, Rubrics as Rewards, Prometheus (a rubric a row) and verifiers (a file).

A reader turns a row into ours, ``{"prompt", "rubric", "id"?, "answer"?, "origin"}``; its writer turns ours back. What a
format has and a rubric has no place for waits in ``origin``. Both raise ``ValueError`` for what does not fit, and
``read`` for what would not come back exactly, so that nothing is changed in silence.

Signs are the trap. HealthBench's negative points mean that meeting the criterion costs, which is a penalty here. In
Rubrics as Rewards some pitfalls are worded as what to avoid ("Does not mention ...") and carry a negative weight all
the same; which of the two was meant is for a person to say (``Pitfalls``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rewards.criteria import Criterion
from rewards.rubric import Rubric, dump_rubric, fill
from rewards.traps import is_negation

Row = Mapping[str, Any]
Pitfalls = Literal["refuse", "avoidance", "penalty"]
"""What a negative weight on a negated wording means: refuse the row; meeting it is good; meeting it is bad."""

_PREFIX = re.compile(r"(Essential|Important|Optional|Pitfall)( Criteria)?: (?=\S)")
_SCORES = tuple(map(str, range(1, 6)))
_NEGATIVE = "rar:negative"
_LONG_PREFIX = "rar:criteria"
_WEIGHT_OF_ONE = "verifiers:weight"
_ID = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Format:
    """How one row is read and written."""

    name: str
    reader: Callable[[Row, Pitfalls], dict[str, Any]]
    writer: Callable[[Row], dict[str, Any]]

    def read(self, row: Row, pitfalls: Pitfalls = "refuse") -> dict[str, Any]:
        """Our row for one of this format. ``ValueError`` where it does not fit, or would not come back the same."""
        ours = self.reader(row, pitfalls)
        back = self.writer(ours)
        if back != dict(row):
            differing = sorted(key for key in {*back, *row} if back.get(key) != row.get(key))
            raise ValueError(f"{', '.join(differing)} would come back changed: {_shorten(row, back, differing[0])}")
        return ours

    def write(self, row: Row) -> dict[str, Any]:
        """A row of this format for one of ours. ``ValueError`` where that cannot say the same."""
        written = self.writer(row)
        ours = self.reader(written, "avoidance" if _has_tag(row, _NEGATIVE) else "penalty")
        for given, back in zip(_rubric(row).criteria, _rubric(ours).criteria, strict=True):
            if _meaning(given) != _meaning(back):
                raise ValueError(f"{self.name} has no place for all that criterion {given.id} says")
        return written


def _meaning(c: Criterion) -> tuple[Any, ...]:
    return c.text, c.weight, c.polarity, c.choices, c.descriptions, c.evidence


def _shorten(row: Row, back: Row, key: str) -> str:
    return f"{key} = {row.get(key)!r:.200} against {back.get(key)!r:.200}"


def _rubric(row: Row) -> Rubric:
    return Rubric.of_data(row["rubric"], "rubric")


def _has_tag(row: Row, tag: str) -> bool:
    return any(tag in c.tags for c in _rubric(row).criteria)


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{field} is {value!r}; expected a finite number")
    return float(value)


def _plain(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def _text(row: Row, field: str) -> str:
    if not isinstance(row.get(field), str) or not row[field].strip():
        raise ValueError(f"{field} is {row.get(field)!r:.80}; expected a text")
    return str(row[field])


def _escape(text: str) -> str:
    """The text as a criterion's, in which single braces hold the name of a field."""
    return text.replace("{", "{{").replace("}", "}}")


def _unescape(text: str) -> str:
    return str(fill(text, {}, "the other format has no fields"))


def _items(row: Row, field: str, keys: Sequence[str]) -> list[Row]:
    items = row.get(field)
    if not isinstance(items, list) or not items:
        raise ValueError(f"{field} is {items!r:.80}; expected a list that is not empty")
    for index, item in enumerate(items):
        if not isinstance(item, Mapping) or set(item) != set(keys):
            found = sorted(item) if isinstance(item, Mapping) else item
            raise ValueError(f"{field}[{index}] has {found!r:.120}; expected exactly {', '.join(keys)}")
    return items


def _ours(
    criteria: list[dict[str, Any]],
    rubric_id: str,
    *,
    clip: tuple[float, float] | None = None,
    scope: Literal["item", "task"] = "item",
) -> dict[str, Any]:
    data: dict[str, Any] = {"id": rubric_id, "scope": scope, "criteria": criteria}
    if clip is not None:
        data["aggregation"] = {"clip": clip}
    return dump_rubric(Rubric.of_data(data, "rubric"))


def _rest(row: Row, *known: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in known}


def read_healthbench(row: Row, pitfalls: Pitfalls = "refuse") -> dict[str, Any]:
    """``{"prompt": messages, "prompt_id", "rubrics": [{"criterion", "points", "tags"}], ...}``.

    The score is sum(points met) / sum(positive points), which may be negative; ``clip`` leaves it so.
    """
    items = _items(row, "rubrics", ("criterion", "points", "tags"))
    points = [_number(item["points"], f"rubrics[{i}].points") for i, item in enumerate(items)]
    earned, lost = sum(p for p in points if p > 0), -sum(p for p in points if p < 0)
    if earned <= 0:
        raise ValueError("no item has positive points, which the score is divided by")
    criteria = [
        {
            "id": f"c{i + 1}",
            "text": _escape(_text(item, "criterion")),
            "weight": abs(p),
            "polarity": "penalty" if p < 0 else "reward",
            "tags": item["tags"],
        }
        for i, (item, p) in enumerate(zip(items, points, strict=True))
    ]
    ours = {"prompt": row.get("prompt"), "rubric": _ours(criteria, "healthbench", clip=(-lost / earned, 1.0))}
    if "prompt_id" in row:
        ours["id"] = row["prompt_id"]
    return {**ours, "origin": {"format": "healthbench", **_rest(row, "prompt", "prompt_id", "rubrics")}}


def write_healthbench(row: Row) -> dict[str, Any]:
    items = []
    for c in _rubric(row).criteria:
        if c.kind != "judge" or c.choices or c.veto:
            raise ValueError(f"criterion {c.id} is a check, a veto or has choices, which HealthBench has no place for")
        signed = -c.weight if c.polarity == "penalty" else c.weight
        items.append({"criterion": _unescape(c.text), "points": _plain(signed), "tags": list(c.tags)})
    written = {"prompt": row.get("prompt"), "rubrics": items, **_origin(row)}
    return written | ({"prompt_id": row["id"]} if "id" in row else {})


def read_rar(row: Row, pitfalls: Pitfalls = "refuse") -> dict[str, Any]:
    """``{"question", "reference_answer", "rubric": [{"title", "description", "weight"}], "rubric_count"?, ...}``."""
    items = _items(row, "rubric", ("title", "description", "weight"))
    if row.get("rubric_count", len(items)) != len(items):
        raise ValueError(f"rubric_count is {row['rubric_count']!r}, but rubric has {len(items)} items")
    criteria = [_rar_criterion(i, item, pitfalls) for i, item in enumerate(items)]
    ours = {"prompt": _text(row, "question"), "rubric": _ours(criteria, "rar")}
    if "reference_answer" in row:
        ours["answer"] = row["reference_answer"]
    return {**ours, "origin": {"format": "rar", **_rest(row, "question", "reference_answer", "rubric")}}


def _rar_criterion(index: int, item: Row, pitfalls: Pitfalls) -> dict[str, Any]:
    description, weight = _text(item, "description"), _number(item["weight"], f"rubric[{index}].weight")
    prefix = _PREFIX.match(description)
    text = description[prefix.end() :] if prefix else description
    tier = prefix[1].lower() if prefix else None
    tags = [_LONG_PREFIX] if prefix and prefix[2] else []
    penalty = weight < 0
    if penalty and is_negation(text):
        if pitfalls == "refuse":
            raise ValueError(
                f"rubric[{index}] has weight {_plain(weight)} and is worded as a negation: {text!r:.80}; say whether "
                "meeting it is good (--pitfalls avoidance) or bad (--pitfalls penalty)"
            )
        penalty = pitfalls == "penalty"
        tags += [] if penalty else [_NEGATIVE]
    elif tier == "pitfall" and weight > 0 and not is_negation(text):
        raise ValueError(
            f"rubric[{index}] is a pitfall that earns {_plain(weight)}: {text!r:.80}; make its weight negative"
        )
    return {
        "id": f"c{index + 1}",
        "title": item["title"],
        "text": _escape(text),
        "weight": abs(weight),
        "polarity": "penalty" if penalty else "reward",
        "tier": tier,
        "tags": tags,
    }


def write_rar(row: Row) -> dict[str, Any]:
    items = []
    for c in _rubric(row).criteria:
        if c.kind != "judge" or c.choices or c.veto:
            raise ValueError(f"criterion {c.id} is a check, a veto or has choices, which RaR has no place for")
        prefix = f"{c.tier.capitalize()}{' Criteria' * (_LONG_PREFIX in c.tags)}: " if c.tier else ""
        signed = -c.weight if c.polarity == "penalty" or _NEGATIVE in c.tags else c.weight
        items.append({"title": c.title, "description": prefix + _unescape(c.text), "weight": _plain(signed)})
    written = {"question": row["prompt"], "rubric": items, **_origin(row)}
    return written | ({"reference_answer": row["answer"]} if "answer" in row else {})


def read_prometheus(row: Row, pitfalls: Pitfalls = "refuse") -> dict[str, Any]:
    """``{"instruction", "criteria", "score1_description" .. "score5_description", "reference_answer"?, ...}``.

    Feedback-Collection's rows have ``orig_`` before each of these names.
    """
    p = "orig_" if "orig_criteria" in row else ""
    descriptions = [_text(row, f"{p}score{score}_description") for score in _SCORES]
    criterion = {
        "id": "c1",
        "text": _escape(_text(row, f"{p}criteria")),
        "choices": _SCORES,
        "descriptions": descriptions,
    }
    ours = {"prompt": row.get(f"{p}instruction", ""), "rubric": _ours([criterion], "prometheus")}
    if f"{p}reference_answer" in row:
        ours["answer"] = row[f"{p}reference_answer"]
    known = ("instruction", "criteria", "reference_answer", *(f"score{score}_description" for score in _SCORES))
    origin = {"format": "prometheus", "prefix": p, "has_instruction": f"{p}instruction" in row}
    return {**ours, "origin": {**origin, "rest": _rest(row, *(p + key for key in known))}}


def write_prometheus(row: Row) -> dict[str, Any]:
    criteria = _rubric(row).criteria
    if len(criteria) != 1 or criteria[0].choices != _SCORES or not criteria[0].descriptions:
        raise ValueError("Prometheus has one criterion with the choices 1 to 5, each described")
    origin = row.get("origin", {})
    written: dict[str, Any] = {"criteria": _unescape(criteria[0].text)}
    described = zip(_SCORES, criteria[0].descriptions, strict=True)
    written |= {f"score{score}_description": text for score, text in described}
    if origin.get("has_instruction", True):
        written["instruction"] = row["prompt"]
    if "answer" in row:
        written["reference_answer"] = row["answer"]
    prefix = origin.get("prefix", "")
    return {prefix + key: value for key, value in written.items()} | origin.get("rest", {})


def read_verifiers(row: Row, pitfalls: Pitfalls = "refuse") -> dict[str, Any]:
    """A whole rubric file of verifiers v1: ``{"criteria": [{"name", "text", "weight"?, "choices"?}]}``."""
    if set(row) != {"criteria"} or not isinstance(row["criteria"], list) or not row["criteria"]:
        raise ValueError(f"has {', '.join(sorted(row))}; expected 'criteria' alone, a list that is not empty")
    criteria: list[dict[str, Any]] = []
    for index, item in enumerate(row["criteria"]):
        if not {"name", "text"} <= set(item) <= {"name", "text", "weight", "choices"}:
            raise ValueError(f"criteria[{index}] has {', '.join(sorted(item))}; expected name, text, weight, choices")
        name = _text(item, "name")
        named = bool(_ID.fullmatch(name))
        criteria.append(
            {
                "id": name if named else f"c{index + 1}",
                "title": "" if named else name,
                "text": _escape(_text(item, "text")),
                "weight": _number(item.get("weight", 1.0), f"criteria[{index}].weight"),
                "choices": item.get("choices", []),
                # Told apart from a weight that is not there.
                "tags": [_WEIGHT_OF_ONE] if item.get("weight") == 1 else [],
            }
        )
    return {"rubric": _ours(criteria, "verifiers", scope="task"), "origin": {"format": "verifiers"}}


def write_verifiers(row: Row) -> dict[str, Any]:
    items = []
    for c in _rubric(row).criteria:
        if c.kind != "judge" or c.polarity == "penalty" or c.veto or c.descriptions:
            raise ValueError(
                f"criterion {c.id} is a check, a penalty, a veto or has descriptions, which verifiers has no place "
                "for; a penalty has to be reworded as what a good response does"
            )
        item: dict[str, Any] = {"name": c.title or c.id, "text": _unescape(c.text)}
        if c.weight != 1 or _WEIGHT_OF_ONE in c.tags:
            item["weight"] = _plain(c.weight)
        if c.choices:
            item["choices"] = list(c.choices)
        items.append(item)
    return {"criteria": items}


def _origin(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.get("origin", {}).items() if key != "format"}


FORMATS: Mapping[str, Format] = {
    found.name: found
    for found in (
        Format("healthbench", read_healthbench, write_healthbench),
        Format("rar", read_rar, write_rar),
        Format("prometheus", read_prometheus, write_prometheus),
        Format("verifiers", read_verifiers, write_verifiers),
    )
}
