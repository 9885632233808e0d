"""Sections of the HTML report. Every text that a model, a task or a user wrote is escaped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from posttrain.runs.durable import Record
from posttrain.runs.examples import Examples
from posttrain.runs.progress import duration
from posttrain.runs.verdict import (
    Verdict,
    gain_of,
    gain_verdict,
    interval_text,
    kept_verdict,
    number,
    percent,
    thinking,
)

MARKS = {"good": "&#10003;", "bad": "&#10007;", "unclear": "?", "none": ""}

# The model's own end-of-line spaces and such matter to whoever debugs a reward, a megabyte of them does not.
MAX_TEXT = 6000


def section(title: str, body: str, note: str = "") -> str:
    """A titled section; nothing when there is nothing to show."""
    if not body:
        return ""
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def scores_table(domains: Sequence[Mapping[str, Any]], mode: str = "sampled") -> str:
    """Models, gains and verdicts, a row per domain."""
    if not domains:
        return ""
    names = ("Domain", "Tasks", "Base", "SFT", "Specialist", "Student", "Gain over base", "Gain of RL over SFT", "Kept")
    rows = [_scores_row(entry["domain"], entry if mode == "sampled" else entry["greedy"]) for entry in domains]
    return _table(names, rows, css="scores")


def efforts_table(domains: Sequence[Mapping[str, Any]]) -> str:
    """Scores and thinking tokens of the models, a row per domain and effort mode."""
    rows = [
        (
            f"<b>{escape(entry['domain'])}</b>",
            escape(effort),
            *(_effort_cell(models.get(model)) for model in ("base", "sft", "specialist", "student")),
        )
        for entry in domains
        for effort, models in entry["efforts"].items()
    ]
    return _table(("Domain", "Effort", "Base", "SFT", "Specialist", "Student"), rows) if rows else ""


def unscored_note(domains: Sequence[Mapping[str, Any]]) -> str:
    """Which rollouts have no score, where there are any."""
    counts = [
        f"{escape(entry['domain'])}: {', '.join(f'{escape(m)} {n}' for m, n in entry['unscored'].items() if n)}"
        for entry in domains
        if any(entry["unscored"].values())
    ]
    if not counts:
        return '<p class="note">Every sampled rollout could be scored.</p>'
    return f'<p class="note">Sampled rollouts left out because the machinery failed: {"; ".join(counts)}.</p>'


def figures(svgs: Mapping[str, str]) -> str:
    """Pictures side by side where the page is wide enough."""
    return f'<div class="figures">{"".join(f"<figure>{svg}</figure>" for svg in svgs.values())}</div>' if svgs else ""


def examples_section(examples: Mapping[str, Examples]) -> str:
    """Rollouts to open, per domain."""
    parts = []
    for domain, picked in examples.items():
        rows = [
            *(_example(record, "good") for record in picked.good),
            *(_example(record, "bad") for record in picked.bad),
            *(_example(record, "none") for record in picked.unscored),
        ]
        parts.append(f"<h3>{escape(domain)}</h3>{''.join(rows)}" if rows else "")
    return "".join(parts)


def stages_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """Time per stage."""
    if not stages:
        return ""
    rows = [
        (
            escape(stage["stage"]),
            clock(stage["started"]),
            duration(stage["wall_s"]),
            str(stage["sessions"]),
            "finished" if stage["finished"] else "not finished",
        )
        for stage in stages
    ]
    return _table(("Stage", "Started", "Time", "Sessions", "State"), rows)


def costs_table(costs: Mapping[str, Any]) -> str:
    """Whatever was measured, name and value."""
    rows = [(escape(name.replace("_", " ")), _cost(value)) for name, value in costs.items()]
    return _table(("Cost", "Value"), rows) if rows else ""


def resumed_list(resumed: Sequence[Mapping[str, Any]]) -> str:
    """What was taken up again and when."""
    if not resumed:
        return "<p>Nothing: the run went through in one piece.</p>"
    items = "".join(
        f"<li>{clock(item['time'])}: <b>{escape(str(item['stage']))}</b> went on after step {item['step']}</li>"
        for item in resumed
    )
    return f"<ul>{items}</ul>"


def warning_list(messages: Sequence[str]) -> str:
    """Warnings of the run, if any."""
    return f"<ul>{''.join(f'<li>{escape(message)}</li>' for message in messages)}</ul>" if messages else ""


def recipe_block(recipe: Any) -> str:
    """The recipe as data."""
    text = escape(json.dumps(recipe, indent=2, ensure_ascii=False))
    return f"<details><summary>Show the recipe</summary><pre>{text}</pre></details>"


def clock(seconds: float | None) -> str:
    """A time in UTC for people."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _scores_row(domain: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"<b>{escape(domain)}</b>",
        str(entry["n"]),
        *(number(entry[model]) for model in ("base", "sft", "specialist", "student")),
        _judged(number(gain_of(entry), signed=True), interval_text(entry["gain_ci"]), gain_verdict(entry["gain_ci"])),
        _judged(
            number(gain_of(entry, "sft"), signed=True),
            interval_text(entry["rl_gain_ci"]),
            gain_verdict(entry["rl_gain_ci"]),
        ),
        _judged(percent(entry["kept"]), interval_text(entry["kept_ci"], share=True), kept_verdict(entry)),
    )


def _effort_cell(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return number(None)
    low, high = measured["score_ci"] or (None, None)
    return (
        f'<span class="value">{number(measured["score"])}</span> '
        f'<span class="interval">[{number(low)}, {number(high)}]<br>{thinking(measured["thinking_tokens"])}</span>'
    )


def _judged(value: str, interval: str, verdict: Verdict) -> str:
    mark = f'<span class="verdict {verdict.tone}">{MARKS[verdict.tone]} {escape(verdict.words)}</span>'
    return f'<span class="value">{value}</span> <span class="interval">{escape(interval)}</span>{mark}'


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], css: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _example(record: Record, tone: str) -> str:
    score = "no score" if record["score"] is None else f"{record['score']:.3g}"
    place = " &middot; ".join(
        escape(str(part)) for part in (record["model"], record["stage"], f"step {record['step']}") if part is not None
    )
    summary = (
        f'<span class="verdict {tone}">{MARKS[tone]} {score}</span> <b>{escape(record["task"])}</b> '
        f'<span class="interval">{place}</span>'
    )
    messages = "".join(_message(message) for message in [*record["prompt"], *record["conversation"]])
    return f"<details><summary>{summary}</summary>{messages}{_why(record)}</details>"


def _message(message: Mapping[str, Any]) -> str:
    reasoning = message.get("reasoning")
    thought = f'<pre class="reasoning">{_clip(reasoning)}</pre>' if reasoning else ""
    role = escape(message["role"])
    return f'<div class="message"><span class="role">{role}</span>{thought}<pre>{_clip(message["content"])}</pre></div>'


def _why(record: Record) -> str:
    facts = [("Reward", "none" if record["score"] is None else f"{record['score']:.4g}"), ("Status", record["status"])]
    facts += [("Why", record["explanation"])] if record["explanation"] else []
    facts += [("Error", record["score_error"] or record["error"])] if record["score_error"] or record["error"] else []
    facts += [("Expected", record["answer"])] if record["answer"] is not None else []
    facts += [(f"Part {name}", number(value)) for name, value in record["parts"].items()]
    facts += [(f"Criterion {judged['criterion']}", _judgment(judged)) for judged in record["judgments"]]
    facts += [("Flags", ", ".join(record["flags"]))] if record["flags"] else []
    facts += [("Stopped", record["stop"]), ("Tokens", f"{record['tokens']['generated']} generated")]
    facts += [("Advantage", f"{record['advantage']:+.3f}")] if record["advantage"] is not None else []
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{_clip(str(value))}</dd>" for name, value in facts)
    return f"<dl>{rows}</dl>"


def _judgment(judged: Mapping[str, Any]) -> str:
    evidence = f": {judged['evidence']}" if judged["evidence"] else ""
    return f"{judged['verdict']} ({number(judged['score'])}){evidence}"


def _clip(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return escape(text)
    return f"{escape(text[:MAX_TEXT])} &hellip; ({len(text) - MAX_TEXT} characters more in rollouts.jsonl)"


def _cost(value: Any) -> str:
    if isinstance(value, Mapping):
        return "<br>".join(f"{escape(str(name)).replace('_', ' ')}: {_cost(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
