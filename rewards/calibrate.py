"""``posttrain rewards calibrate``: a judge measured against people, and a gate that says whether to trust it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.errors import JudgeError, RecipeError
from posttrain.protocols import Judge
from posttrain.types import Judgment, Rollout
from rewards.agreement import (
    Weights,
    agreement,
    corrected_rate,
    count_table,
    kappa,
    kappa_interval,
    mean_pairwise_kappa,
    rate_interval,
)
from rewards.criteria import Criterion
from rewards.golden import Golden, draw, read_golden
from rewards.judge import CANNOT_ASSESS, Dialect, JsonDialect, LineDialect
from rewards.rubric import UNREADABLE, Rubric, RubricReward, fill_criterion, judged_text
from rewards.rule_judge import KnownVerdicts, RuleJudge, refusal_by_wording
from rewards.score import open_judge

NO_VERDICT = "no verdict"
_BUCKETS = ((0, 50), (50, 150), (150, 10**9))
"""Words of a response, from and below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """What a judge has to reach to be trusted. Never agreement alone, which a constant answer may have."""

    min_kappa: float = 0.6
    min_ceiling_share: float = 0.8
    """Of the kappa that people have among themselves, where that is known."""
    min_tpr: float = 0.8
    min_tnr: float = 0.8
    max_no_verdict: float = 0.1
    """Share of cases without a verdict; a judge that answers only the easy ones would look good."""
    min_per_class: int = 30
    """Cases of each class; fewer prove nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How one criterion was judged, on one slice. Rates are of the cases with a verdict; NaN where there is none."""

    criterion: str
    slice: str
    n: int
    positives: int
    """Cases that people call met, or by the best of the choices."""
    agreement: float
    kappa: float
    """Weighted linearly for choices."""
    kappa_low: float
    kappa_high: float
    tpr: float
    """Of the cases that are met, how many the judge calls met."""
    tpr_low: float
    tpr_high: float
    tnr: float
    tnr_low: float
    tnr_high: float
    abstained: float
    """Share of all cases the judge could not assess."""
    unread: float
    """Share of all cases without a readable reply, or with a judge that failed."""
    ceiling: float
    """Kappa of people among themselves."""
    swap_consistency: float
    """Share of equal verdicts when the labels are listed in the other order."""
    judge_rate: float
    """Share the judge calls met."""
    corrected_rate: float
    """The share that are met, corrected for the judge's errors (Rogan-Gladen)."""
    errors_by_words: Mapping[str, float]
    """Share of wrong verdicts by the response's number of words."""

    def failures(self, gate: Gate) -> list[str]:
        """Why the judge is not to be trusted with this criterion; empty when it is."""
        wanted = [
            ("kappa", self.kappa, gate.min_kappa),
            ("TPR", self.tpr, gate.min_tpr),
            ("TNR", self.tnr, gate.min_tnr),
            ("cases per class", min(self.positives, self.n - self.positives), gate.min_per_class),
        ]
        if not math.isnan(self.ceiling):
            wanted.append(("kappa", self.kappa, round(gate.min_ceiling_share * self.ceiling, 3)))
        found = [f"{name} {value:.3g} < {least:g}" for name, value, least in wanted if not value >= least]
        missing = self.abstained + self.unread
        return found + (
            [f"no verdict on {missing:.0%} > {gate.max_no_verdict:.0%}"] if missing > gate.max_no_verdict else []
        )


@dataclass(frozen=True, slots=True)
class _Judged:
    """One case of one criterion."""

    golden: Golden
    criterion: Criterion
    verdict: str
    """A label, ``cannot_assess`` or ``unreadable``."""
    swapped: str
    """The verdict with the labels in the other order; ``unreadable`` when that was not asked."""

    @property
    def truth(self) -> str:
        return self.golden.labels[self.criterion.id]

    @property
    def answered(self) -> bool:
        return self.verdict in self.criterion.labels


async def judge_all(
    reward: RubricReward, golden: Sequence[Golden], *, swap: bool = True, concurrency: int = 16
) -> list[_Judged]:
    """A verdict, and one under swapped labels, for every label of every row.

    ``reward`` has one rubric for all rows, and one vote.
    """
    rubric, dialect = reward.rubric, reward.dialect
    assert isinstance(rubric, Rubric)
    # Before anything is paid for.
    criteria = [{name: _criterion(rubric, row, name) for name in row.labels} for row in golden]
    orders = [dialect] * (2 if swap else 1)
    if swap and isinstance(dialect, JsonDialect):
        orders = [replace(dialect, order="given"), replace(dialect, order="reversed")]
    places = asyncio.Semaphore(concurrency)

    async def verdicts(row: Golden, number: int, order: Dialect) -> Mapping[str, str]:
        # Another name of the task asks the line dialect's question with another nonce and seed.
        task = replace(row.rollout.task, id=f"{row.rollout.task.id}/{number}")
        async with places:
            return await _verdicts(replace(reward, dialect=order), replace(row.rollout, task=task))

    asked = [verdicts(row, number, order) for row in golden for number, order in enumerate(orders)]
    given = await asyncio.gather(*asked)
    judged = []
    for i, row in enumerate(golden):
        first, last = given[i * len(orders)], given[i * len(orders) + len(orders) - 1]
        for name, criterion in criteria[i].items():
            again = last.get(name, UNREADABLE) if swap else UNREADABLE
            judged.append(_Judged(row, criterion, first.get(name, UNREADABLE), again))
    return judged


async def _verdicts(reward: RubricReward, rollout: Rollout) -> Mapping[str, str]:
    try:
        judgments: Sequence[Judgment] = (await reward.score(rollout)).judgments
    except JudgeError:
        return {}
    return {judgment.criterion: judgment.verdict for judgment in judgments}


def _criterion(rubric: Rubric, row: Golden, name: str) -> Criterion:
    """The criterion that a row has a label for. ``RecipeError`` when the rubric has none, or not this label."""
    found = next((c for c in rubric.criteria if c.id == name and c.kind == "judge"), None)
    if found is None:
        known = ", ".join(c.id for c in rubric.criteria if c.kind == "judge")
        raise RecipeError(
            f"row {row.rollout.id}: rubric {rubric.id!r} has no judge criterion {name!r}; its own are {known}; give "
            "the rubric that the labels are about"
        )
    if row.labels[name] not in found.labels:
        raise RecipeError(
            f"row {row.rollout.id}: label {row.labels[name]!r} of {name!r}; expected one of {', '.join(found.labels)}"
        )
    strange = [said for rater in row.raters if (said := rater.get(name)) not in (None, *found.labels)]
    if strange:
        raise RecipeError(
            f"row {row.rollout.id}: a rater says {strange[0]!r} of {name!r}; expected one of {', '.join(found.labels)}"
        )
    return found


def reports(judged: Sequence[_Judged], slice_by: str | None = None) -> Iterator[Report]:
    """By criterion: one for all cases, and one for each value of the field ``slice_by``."""
    for name in dict.fromkeys(case.criterion.id for case in judged):
        cases = [case for case in judged if case.criterion.id == name]
        yield _report(cases, "all")
        if slice_by is not None:
            values = dict.fromkeys(str(case.golden.fields.get(slice_by)) for case in cases)
            for value in values:
                part = [case for case in cases if str(case.golden.fields.get(slice_by)) == value]
                yield _report(part, f"{slice_by}={value}")


def _report(cases: Sequence[_Judged], where: str) -> Report:
    criterion = cases[0].criterion
    labels, best = criterion.labels, criterion.labels[-1]
    answered = [case for case in cases if case.answered]
    table = count_table([case.truth for case in answered], [case.verdict for case in answered], labels)
    weights: Weights = "linear" if criterion.choices else "none"
    low, high = kappa_interval(table, weights)
    met, unmet = table[-1].sum(), table[:-1].sum()
    hits, rejections = table[-1, -1], table[:-1, :-1].sum()
    tpr, tnr = _share(hits, met), _share(rejections, unmet)
    rate = _share(table[:, -1].sum(), table.sum())
    (tpr_low, tpr_high), (tnr_low, tnr_high) = rate_interval(hits, met), rate_interval(rejections, unmet)
    both = [case for case in answered if case.swapped in labels]
    return Report(
        criterion=criterion.id,
        slice=where,
        n=len(cases),
        positives=sum(case.truth == best for case in cases),
        agreement=agreement(table),
        kappa=kappa(table, weights),
        kappa_low=low,
        kappa_high=high,
        tpr=tpr,
        tpr_low=tpr_low,
        tpr_high=tpr_high,
        tnr=tnr,
        tnr_low=tnr_low,
        tnr_high=tnr_high,
        abstained=_share(sum(case.verdict == CANNOT_ASSESS for case in cases), len(cases)),
        unread=_share(sum(case.verdict == UNREADABLE for case in cases), len(cases)),
        ceiling=_ceiling(cases),
        swap_consistency=_share(sum(case.verdict == case.swapped for case in both), len(both)),
        judge_rate=rate,
        corrected_rate=corrected_rate(rate, tpr, tnr),
        errors_by_words=_errors_by_words(answered),
    )


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _ceiling(cases: Sequence[_Judged]) -> float:
    criterion = cases[0].criterion
    ratings = [[rater.get(criterion.id) for rater in case.golden.raters] for case in cases]
    return mean_pairwise_kappa(ratings, criterion.labels, "linear" if criterion.choices else "none")


def _errors_by_words(answered: Sequence[_Judged]) -> dict[str, float]:
    found = {}
    for low, high in _BUCKETS:
        part = [case for case in answered if low <= len(case.golden.rollout.text.split()) < high]
        if part:
            name = f"{low}-{high - 1}" if high < 10**9 else f"{low}+"
            found[name] = _share(sum(case.verdict != case.truth for case in part), len(part))
    return found


@contextlib.contextmanager
def choose_judge(
    spec: str, rubric: Rubric, golden: Sequence[Golden], *, model: str = "", key_env: str | None = None
) -> Iterator[Judge]:
    """The judge that ``--judge`` names: ``perfect`` knows the labels, ``regex`` looks for words of refusal,
    ``forced:PATH`` is a checkpoint's likelier reply in the line dialect, all others are those of ``rewards score``."""
    kind, _, path = spec.partition(":")
    if spec == "perfect":
        yield RuleJudge(known_verdicts(rubric, golden))
    elif spec == "regex":
        yield RuleJudge(refusal_by_wording)
    elif kind == "forced":
        from rewards.hf_judge import HFJudge

        yield HFJudge(path=path, forced=True)
    else:
        with open_judge(spec, model=model, key_env=key_env) as judge:
            if judge is None:
                raise RecipeError(f"--judge {spec}: there is nothing to calibrate; name a judge")
            yield judge


def known_verdicts(rubric: Rubric, golden: Sequence[Golden]) -> KnownVerdicts:
    """A rule that answers with the rows' own labels; where equal cases have different ones, with the last."""
    verdicts = {}
    for row in golden:
        task = "\n".join(message["content"] for message in row.rollout.task.prompt)
        for name, label in row.labels.items():
            criterion = fill_criterion(_criterion(rubric, row, name), rubric, row.rollout.task)
            verdicts[KnownVerdicts.case(criterion.claim, judged_text(row.rollout.text), task)] = label
    return KnownVerdicts(verdicts)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Hang ``calibrate`` on the command line."""
    text = "Measure a judge against verdicts by people."
    parser = commands.add_parser(
        "calibrate",
        help=text,
        description=text,
        epilog="Exit code: 0 when the judge passes the gate on every criterion, 1 when it does not.",
    )
    parser.add_argument("golden", type=Path, nargs="+", help="JSON Lines with labels; XSTest and PyRIT as they come")
    parser.add_argument("--rubric", required=True, help="TOML file or packaged name, such as refusal")
    parser.add_argument(
        "--judge",
        required=True,
        help="perfect (knows the labels), regex (words of refusal), checkpoint:PATH, forced:PATH (the likelier of two "
        "replies), http(s)://... with --model, or module:attribute",
    )
    parser.add_argument("--model", default="", help="name of the model at the endpoint")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the endpoint's key")
    parser.add_argument("--dialect", default="json", choices=("json", "line"))
    parser.add_argument("--slice", metavar="FIELD", help="also report the values of this field apart")
    parser.add_argument("--split", help="only rows with this value of 'split'")
    parser.add_argument("--limit", type=int, help="draw so many rows, evenly by label")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--no-swap", action="store_true", help="do not ask again with the labels in the other order")
    parser.add_argument("--max-tokens", type=int, default=512, help="budget of a reply (default: 512)")
    parser.add_argument("--max-retries", type=int, default=2, help="for unreadable replies (default: 2)")
    gate = Gate()
    for name in Gate.__dataclass_fields__:
        default = getattr(gate, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"gate (default: {default:g})"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    rubric = Rubric.load(arguments.rubric)
    if arguments.limit is not None and arguments.limit < 1:
        raise RecipeError(f"--limit {arguments.limit}: expected at least 1 row")
    golden = read_golden(arguments.golden, split=arguments.split)
    if arguments.limit is not None:
        golden = draw(golden, arguments.limit, arguments.seed)
    with choose_judge(arguments.judge, rubric, golden, model=arguments.model, key_env=arguments.api_key_env) as judge:
        reward = RubricReward(
            rubric,
            judge,
            dialect=LineDialect() if arguments.dialect == "line" else JsonDialect(),
            max_tokens=arguments.max_tokens,
            max_retries=arguments.max_retries,
        )
        judged = asyncio.run(judge_all(reward, golden, swap=not arguments.no_swap))
    found = list(reports(judged, arguments.slice))
    gate = Gate(**{name: getattr(arguments, name) for name in Gate.__dataclass_fields__})
    failures = {report.criterion: report.failures(gate) for report in found if report.slice == "all"}
    _show(found)
    for criterion, reasons in failures.items():
        print(f"{criterion}: {'not trusted: ' + ', '.join(reasons) if reasons else 'passes the gate'}")
    if arguments.json is not None:
        content = {
            "judge": arguments.judge,
            "dialect": arguments.dialect,
            "golden": [path.name for path in arguments.golden],
            "rubric": {"id": rubric.id, "version": rubric.version},
            "gate": asdict(gate),
            "not_trusted": failures,
            "reports": [_plain(asdict(report)) for report in found],
        }
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(failures.values()))


def _plain(value: Any) -> Any:
    """NaN is not JSON."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _show(found: Sequence[Report]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="judge against people", title_justify="left")
    for heading in ("criterion", "slice", "n", "met", "agree", "kappa [95 %]", "TPR", "TNR", "abstain", "unread"):
        table.add_column(heading)
    for heading in ("people", "swap", "corrected", "errors by words"):
        table.add_column(heading)
    for row in found:
        table.add_row(
            row.criterion,
            row.slice,
            str(row.n),
            str(row.positives),
            _text(row.agreement),
            f"{_text(row.kappa)} [{_text(row.kappa_low)}, {_text(row.kappa_high)}]",
            _text(row.tpr),
            _text(row.tnr),
            _text(row.abstained),
            _text(row.unread),
            _text(row.ceiling),
            _text(row.swap_consistency),
            _text(row.corrected_rate),
            ", ".join(f"{words} {_text(share)}" for words, share in row.errors_by_words.items()),
        )
    Console(width=180).print(table)


def _text(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
