"""What the numbers of a report say, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

KEPT_ENOUGH = 0.9
"""A student that keeps this share of a specialist's gain has kept it, for all we claim."""
SURELY_KEPT = 0.8
"""What the whole interval of the kept share must reach for that claim to stand without a caveat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A judgment on one number."""

    tone: Literal["good", "bad", "unclear", "none"]
    words: str


def gain_of(entry: Mapping[str, Any], before: str = "base") -> float | None:
    """The specialist's mean minus the mean of ``before`` (base or sft); None where one is missing."""
    if entry["specialist"] is None or entry[before] is None:
        return None
    return entry["specialist"] - entry[before]


def gain_verdict(interval: Sequence[float | None] | None) -> Verdict:
    """Does the interval of a gain lie on one side of zero?"""
    if interval is None or interval[0] is None or interval[1] is None:
        return Verdict(tone="none", words="not measured")
    if interval[0] > 0:
        return Verdict(tone="good", words="better")
    if interval[1] < 0:
        return Verdict(tone="bad", words="worse")
    return Verdict(tone="unclear", words="not shown")


def kept_verdict(entry: Mapping[str, Any]) -> Verdict:
    """Did the student keep the specialist's gain?"""
    if entry["student"] is None:
        return Verdict(tone="none", words="no student")
    if entry["kept"] is None:
        return Verdict(tone="none", words="no gain to keep")
    low, high = entry["kept_ci"]
    if entry["kept"] >= KEPT_ENOUGH:
        certain = low is not None and low >= SURELY_KEPT
        return Verdict(tone="good", words="kept") if certain else Verdict(tone="unclear", words="kept, uncertain")
    if high is None or high >= KEPT_ENOUGH:
        return Verdict(tone="unclear", words="partly kept, uncertain")
    if entry["kept"] <= 0:
        return Verdict(tone="bad", words="lost")
    return Verdict(tone="bad", words="partly kept" if entry["kept"] >= 0.5 else "mostly lost")


def headline(domains: Sequence[Mapping[str, Any]]) -> str:
    """One or two sentences: did every specialist beat base, did the student keep the gains."""
    sentences = [_specialists_sentence(domains), _student_sentence(domains), _losses_sentence(domains)]
    return " ".join(sentence for sentence in sentences if sentence)


def _specialists_sentence(domains: Sequence[Mapping[str, Any]]) -> str:
    judged = [(entry["domain"], gain_verdict(entry["gain_ci"])) for entry in domains]
    judged = [(name, verdict) for name, verdict in judged if verdict.tone != "none"]
    if not judged:
        return "No specialist was compared with the base model."
    better = [name for name, verdict in judged if verdict.tone == "good"]
    if len(better) == len(judged):
        who = f"All {len(judged)} specialists beat" if len(judged) > 1 else f"The {better[0]} specialist beats"
        return f"{who} the base model."
    rest = [f"{name} ({verdict.words})" for name, verdict in judged if verdict.tone != "good"]
    return f"{len(better)} of {len(judged)} specialists beat the base model; the exceptions: {', '.join(rest)}."


def _student_sentence(domains: Sequence[Mapping[str, Any]]) -> str:
    judged = [(entry, kept_verdict(entry)) for entry in domains if entry["kept"] is not None]
    if not judged:
        return ""
    shares = ", ".join(f"{percent(entry['kept'])} in {entry['domain']}" for entry, _ in judged)
    tones = {verdict.tone for _, verdict in judged}
    if tones == {"good"}:
        return f"The student kept their gains: {shares}."
    if "bad" not in tones:
        return f"The student seems to have kept their gains, but not every interval is narrow enough: {shares}."
    lost = [entry["domain"] for entry, verdict in judged if verdict.tone == "bad"]
    return f"The student lost part of the gain in {', '.join(lost)}; what it kept: {shares}."


def _losses_sentence(domains: Sequence[Mapping[str, Any]]) -> str:
    """Where the student is worse than what it started from, gain or no gain of the specialist."""
    worse = [entry["domain"] for entry in domains if gain_verdict(entry["student_gain_ci"]).tone == "bad"]
    return f"The student is worse than the base model in {', '.join(worse)}." if worse else ""


def percent(value: float | None) -> str:
    """A share for people: ``97%``; a dash for None."""
    return "\u2013" if value is None else f"{100 * value:.0f}%"


def number(value: float | None, *, signed: bool = False) -> str:
    """A score for people, three decimals; a dash for None."""
    return "\u2013" if value is None else f"{value:{'+' if signed else ''}.3f}"


def thinking(num_tokens: float | None) -> str:
    """A mean number of thinking tokens for people."""
    return "\u2013" if num_tokens is None else f"{num_tokens:.1f} tok"


def interval_text(interval: Sequence[float | None] | None, *, share: bool = False) -> str:
    """``[0.10, 0.25]``; an open bound reads ``unbounded``; nothing for None."""
    if interval is None:
        return ""
    form = percent if share else (lambda value: f"{value:+.3f}")
    low, high = ("unbounded" if bound is None else form(bound) for bound in interval)
    return f"[{low}, {high}]"
