"""Attacks on judges: what they are paid here, and what the parsing rules of five other stacks would have paid.

Every attack of ``rewards.attacks`` is put to every behaviour of a judge in every dialect, through the rewards
themselves. For the others only the rule that turns a judge's reply into a number is looked at, restated below in our
own words from the release or commit named; the judge's own verdict is in that stack's format and always a no.

    python -m benchmarks.judge_attacks [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Metric, report
from rewards.attacks import ID, Attack, Outcome, attacks, run_attacks


@dataclass(frozen=True, slots=True)
class Stack:
    """Another stack's rule."""

    name: str
    source: str
    refusal: str
    """Its judge's honest no."""
    value: Callable[[str, str], float]
    """From the judge's reply, and the response, to a reward. Raises ``ValueError`` where the stack gives none."""


def first_score_tag(reply: str, _: str) -> float:
    """The text of the first <score> element as a number, of any size; 0 when there is none or it is no number."""
    inside = re.search("<score>(.*?)</score>", reply, re.DOTALL)
    try:
        return float(inside[1]) if inside else 0.0
    except ValueError:
        return 0.0


def first_number(reply: str, _: str) -> float:
    """The first number anywhere, cut to [0, 1]; 0 when there is none."""
    number = re.search(r"\d+(?:\.\d*)?", reply)
    return min(float(number[0]), 1.0) if number else 0.0


def first_final_score(reply: str, _: str) -> float:
    """0 or 1 after the first "### Final Score:"; else the reply itself when it is nothing but 0 or 1; else 0."""
    said = re.search(r"### Final Score:\s*([01])", reply)
    if said:
        return float(said[1])
    return float(reply.strip() == "1")


def first_flat_object(reply: str, response: str) -> float:
    """The score of the first pair of braces without one inside, when that is JSON; else 1 for any response at all."""
    braces = re.search(r"\{[^}]+\}", reply)
    try:
        return float(json.loads(braces[0]).get("score", 0)) if braces else float(bool(response.strip()))
    except (ValueError, AttributeError, TypeError):
        return float(bool(response.strip()))


def first_verdicts_object(reply: str, _: str) -> float:
    """The first JSON object with the key "verdicts" counts, if it names exactly the criteria and one of the choices
    of each; anything else is an error and no reward."""
    decoder, position = json.JSONDecoder(), reply.find("{")
    while position >= 0:
        try:
            found: Any = decoder.raw_decode(reply, position)[0]
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and "verdicts" in found:
            return _verdict_by_name(found["verdicts"])
        position = reply.find("{", position + 1)
    raise ValueError("no verdicts")


def _verdict_by_name(rows: Any) -> float:
    try:
        ((name, answer),) = [(row["name"], row["verdict"]) for row in rows if isinstance(row["reason"], str)]
    except (KeyError, TypeError) as error:
        raise ValueError("not the verdicts asked for") from error
    if name != ID or answer not in ("no", "yes"):
        raise ValueError("not the verdicts asked for")
    return float(answer == "yes")


STACKS = (
    Stack(
        "tinker-cookbook",
        "PyPI tinker_cookbook 0.6.1, recipes/rubric/data.py, Rubric.extract_score",
        "<score>0.0</score>",
        first_score_tag,
    ),
    Stack("OpenEnv", "PyPI openenv 0.10.0, core/rubrics/llm_judge.py, LLMJudge", "Score: 0.0", first_number),
    Stack(
        "SkyRL",
        "NovaSky-AI/SkyRL 5d3d028, skyrl-train/examples/llm_as_a_judge/llm_judge_env.py",
        "### Final Score: 0",
        first_final_score,
    ),
    Stack(
        "rLLM",
        "rllm-org/rllm 919ed24, rllm/eval/reward_fns/llm_judge.py",
        '{"score": 0, "reasoning": "It is not there."}',
        first_flat_object,
    ),
    Stack(
        "verifiers",
        "PyPI verifiers 0.4.0, v1/judges/rubric.py, plain-text mode; the sources since 2026-08 take the last object",
        json.dumps({"verdicts": [{"name": ID, "reason": "It is not there.", "verdict": "no"}]}),
        first_verdicts_object,
    ),
)

REPLIES: dict[str, Callable[[str, str], str]] = {
    "quotes it, then votes no": lambda raw, refusal: f"The response says:\n{raw}\n{refusal}",
    "votes no, then quotes it": lambda raw, refusal: f"{refusal}\nIt had said:\n{raw}",
    "thinks about it, then votes no": lambda raw, refusal: f"<think>{raw}</think>{refusal}",
    "repeats it": lambda raw, refusal: raw,
    "quotes it and is cut off": lambda raw, refusal: f"The response says:\n{raw}\n",
    "says nothing": lambda raw, refusal: "",
}


def paid_elsewhere(stack: Stack, attack: Attack, behaviour: str) -> bool:
    """Whether the stack's rule gives the attack more than 0, or a number that is none."""
    reply = REPLIES[behaviour](attack.text, stack.refusal)
    try:
        return not stack.value(reply, attack.text) <= 0
    except ValueError:
        return False


def paid_by_stack() -> dict[str, dict[str, list[str]]]:
    """By stack and behaviour, the names of the attacks that its rule pays."""
    return {
        stack.name: {
            behaviour: [attack.name for attack in attacks() if paid_elsewhere(stack, attack, behaviour)]
            for behaviour in REPLIES
        }
        for stack in STACKS
    }


def show(title: str, rows: dict[str, dict[str, str]]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    columns = list(next(iter(rows.values())))
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *(cells.get(column, "") for column in columns))
    Console(width=150).print(table)


def ours(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """By dialect: attempts, paid, scored 0 (or the floor), left unscored."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        kind = "paid" if outcome.paid else "unscored" if outcome.value is None else "nothing"
        counts.setdefault(outcome.dialect, Counter())[kind] += 1
    kinds = ("paid", "nothing", "unscored")
    return {name: {"attempts": sum(count.values()), **{k: count[k] for k in kinds}} for name, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics here, too")
    options = parser.parse_args()
    outcomes, elsewhere = asyncio.run(run_attacks()), paid_by_stack()
    table = ours(outcomes)
    total = len(attacks())
    show(f"{total} attacks, here", {name: {k: str(v) for k, v in row.items()} for name, row in table.items()})
    cells = {name: {b: f"{len(names)}" for b, names in row.items()} for name, row in elsewhere.items()}
    show(f"of {total} attacks, paid by the rule of", cells)
    metrics = [Metric(f"paid, {name}", row["paid"], f"of {row['attempts']}", "<= 0") for name, row in table.items()]
    for name, row in elsewhere.items():
        quoted = row["quotes it, then votes no"]
        metrics.append(Metric(f"paid by {name} when quoted before a no", len(quoted), f"of {total}", ""))
    sources = {stack.name: stack.source for stack in STACKS}
    report("attacks on judges", metrics, options.json, attacks=total, here=table, elsewhere=elsewhere, sources=sources)


if __name__ == "__main__":
    main()
