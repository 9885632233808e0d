"""``posttrain rewards audit``: what a reward pays for answers that deserve nothing.

Every negative control goes to every reward, and the reference answer too: a reward that pays nobody would pass
otherwise. An audit fails on a control paid above its limit, a reference paid too little, an exception, an unscored
response and a call that takes longer than its deadline.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.errors import RecipeError
from posttrain.protocols import GroupReward, Reward, Substrate
from posttrain.types import SandboxSpec, Score
from rewards.controls import Case, controls_for, read_case
from rewards.functions import from_function, load_object
from rewards.rows import read_jsonl

REFERENCE = "reference"
_HARD_STOP = 5.0
"""A call is given up after this many times its deadline."""
_BOXES_AT_ONCE = 4
DEFAULT_SUBSTRATE = "sandbox.process:Process"


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """A reward with tasks to try it on, and what it may pay."""

    name: str
    reward: Reward | GroupReward
    cases: tuple[Case, ...]
    pays: float = 1.0
    """What the reference must earn, at least."""
    limit: float = 0.0
    """What a control may earn, at most."""
    deadline_s: float = 10.0
    """Of one call, the opening of a box included."""
    exempt: Mapping[str, str] = field(default_factory=dict)
    """Control -> why this reward may pay it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One call of a reward."""

    control: str
    task_id: str
    value: float | None
    seconds: float
    fault: str = ""
    """Why it fails the audit; empty when it does not."""
    exempt: bool = False
    """Whether it may be paid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All trials of one reward."""

    name: str
    limit: float
    trials: tuple[Trial, ...]

    @property
    def faults(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.fault]

    @property
    def values(self) -> list[float]:
        """What the controls earned, where they were scored and are not exempt."""
        return [t.value for t in self.trials if t.control != REFERENCE and not t.exempt and t.value is not None]

    @property
    def reference(self) -> float | None:
        """The least a reference earned; None when one was not scored."""
        paid = [t.value for t in self.trials if t.control == REFERENCE]
        return None if not paid or None in paid else min(value for value in paid if value is not None)

    @property
    def slowest(self) -> Trial:
        return max(self.trials, key=lambda trial: trial.seconds)


async def audit(audited: Audited, substrate: Substrate | None) -> Report:
    """Try a reward on the reference and all controls of its cases: in boxes a few at a time, otherwise one by one."""
    places = asyncio.Semaphore(1 if getattr(audited.reward, "sandbox", None) is None else _BOXES_AT_ONCE)

    async def one(case: Case, control: str, text: str) -> Trial:
        async with places:
            return await _try(audited, case, control, text, substrate)

    trials = []
    for case in audited.cases:
        # The first call may start processes and read models, which is not the answers' doing.
        with contextlib.suppress(Exception):
            await _call(audited, case, case.reference, substrate)
        answers = [(REFERENCE, case.reference), *controls_for(case)]
        trials += await asyncio.gather(*(one(case, control, text) for control, text in answers))
    return Report(name=audited.name, limit=audited.limit, trials=tuple(trials))


async def _try(audited: Audited, case: Case, control: str, text: str, substrate: Substrate | None) -> Trial:
    began = time.monotonic()
    value, fault = None, ""
    try:
        async with asyncio.timeout(audited.deadline_s * _HARD_STOP):
            score = await _call(audited, case, text, substrate)
        value = score.value
        if value is None:
            fault = f"was not scored ({score.status.value}: {score.error})"
    except Exception as error:  # noqa: BLE001 - finding out what a reward raises is the purpose
        fault = f"raised {type(error).__name__}: {str(error)[:200]}"
    seconds = time.monotonic() - began
    fault = fault or _payment_fault(audited, control, value)
    if not fault and seconds > audited.deadline_s:
        fault = f"took {seconds:.1f} s, above the deadline of {audited.deadline_s:g} s"
    return Trial(
        control=control,
        task_id=case.task.id,
        value=value,
        seconds=seconds,
        fault=fault,
        exempt=control in audited.exempt,
    )


def _payment_fault(audited: Audited, control: str, value: float | None) -> str:
    if value is None:
        return ""
    if control == REFERENCE:
        return "" if value >= audited.pays - 1e-9 else f"earned {value:g}, expected at least {audited.pays:g}"
    allowed = control in audited.exempt or value <= audited.limit + 1e-9
    return "" if allowed else f"earned {value:g}, allowed at most {audited.limit:g}"


async def _call(audited: Audited, case: Case, text: str, substrate: Substrate | None) -> Score:
    reward, rollout = audited.reward, case.rollout(text)
    if isinstance(reward, GroupReward):
        return (await reward.score_group([rollout, case.rollout(case.reference)]))[0]
    async with _box(getattr(reward, "sandbox", None), substrate) as box:
        return await reward.score(rollout, box)


@contextlib.asynccontextmanager
async def _box(spec: SandboxSpec | None, substrate: Substrate | None) -> AsyncIterator[Any]:
    if spec is None:
        yield None
        return
    if substrate is None:
        raise RecipeError("this reward needs a sandbox; name a substrate with --substrate")
    async with substrate.open(spec) as box:
        yield box


def table(reports: Iterable[Report]) -> str:
    """One line for each reward: what the reference earned, and what the controls did."""
    rows = [("reward", "calls", "reference", "limit", "max", "mean", "slowest", "", "faults")]
    for report in reports:
        values = report.values
        rows.append(
            (
                report.name,
                str(len(report.trials)),
                "-" if report.reference is None else f"{report.reference:.2f}",
                f"{report.limit:.2f}",
                f"{max(values):.2f}" if values else "-",
                f"{fmean(values):.3f}" if values else "-",
                f"{report.slowest.seconds * 1000:.0f} ms",
                report.slowest.control,
                str(len(report.faults)),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (0, 7)
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def as_json(report: Report) -> dict[str, Any]:
    return {
        "reward": report.name,
        "limit": report.limit,
        "passed": not report.faults,
        "trials": [
            {
                "control": t.control,
                "task": t.task_id,
                "value": t.value,
                "seconds": round(t.seconds, 4),
                "fault": t.fault,
            }
            for t in report.trials
        ],
    }


def own_reward(target: str) -> Reward | GroupReward:
    """A user's reward from ``module:name`` or ``file.py:name``: an object with ``score`` or ``score_group``, a class or
    function that makes one when called without arguments, or a plain function for ``from_function``."""
    found = load_object(target)
    try:
        made = found() if isinstance(found, type) else found
    except TypeError as error:
        raise RecipeError(f"{target!r}: {error}; expected a class that can be made without arguments") from error
    if isinstance(made, Reward | GroupReward):
        return made
    if not callable(made):
        raise RecipeError(f"{target!r} is {made!r:.80}; expected a reward or a function")
    return from_function(target)


def read_cases(path: Path) -> tuple[Case, ...]:
    """The rows of a JSON Lines file, see ``read_case``. Raises ``RecipeError``, naming the line."""
    cases = []
    for number, row in read_jsonl(path):
        try:
            cases.append(read_case(row, f"{path}:{number}"))
        except ValueError as error:
            raise RecipeError(f"{path}:{number}: {error}") from error
    if not cases:
        raise RecipeError(f"{path} has no rows; expected one task a line")
    return tuple(cases)


def open_substrate(target: str) -> Substrate:
    """The kind of box ``module:name`` names. Raises ``SandboxUnavailable`` when none can be opened here."""
    kind = load_object(target)
    substrate: Substrate = kind() if isinstance(kind, type) else kind
    substrate.check()
    return substrate


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``audit`` to the subcommands of ``posttrain rewards``."""
    text = "Try rewards on answers that deserve nothing, and on one that does."
    parser = commands.add_parser("audit", help=text, description=text)
    parser.set_defaults(command=run)
    parser.add_argument(
        "reward", nargs="?", help="a reward of yours, module:name or file.py:name (default: all of ours)"
    )
    parser.add_argument(
        "--tasks", type=Path, help="JSON Lines with the tasks to try it on: prompt, reference, answer, info"
    )
    parser.add_argument("--limit", type=float, default=0.0, help="what a control may earn at most (default: 0)")
    parser.add_argument("--pays", type=float, default=1.0, help="what a reference must earn (default: 1)")
    parser.add_argument("--deadline", type=float, default=10.0, metavar="S", help="of one call (default: 10)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this one of our rewards")
    parser.add_argument("--substrate", default=DEFAULT_SUBSTRATE, help=f"kind of box (default: {DEFAULT_SUBSTRATE})")
    parser.add_argument(
        "--humaneval", type=Path, help="also run the reference solutions of a HumanEval file, and hacks"
    )
    parser.add_argument("--mbpp", type=Path, help="also run the reference solutions of an MBPP file, and hacks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every trial to a file")


def run(arguments: argparse.Namespace) -> int:
    """Returns 0, or 1 when something failed the audit."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    chosen = _chosen(arguments)
    boxed = [audited for audited in chosen if getattr(audited.reward, "sandbox", None) is not None]
    wants_box = bool(boxed) or arguments.humaneval is not None or arguments.mbpp is not None
    substrate = open_substrate(arguments.substrate) if wants_box else None
    reports = []
    for audited in chosen:
        reports.append(await audit(audited, substrate))
    print(table(reports))
    faults = [(report.name, trial) for report in reports for trial in report.faults]
    for name, trial in faults:
        print(f"{name}, {trial.task_id}, {trial.control}: {trial.fault}")
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps([as_json(report) for report in reports], indent=1) + "\n", encoding="utf-8"
        )
    solved = await _references(arguments, substrate)
    return 1 if faults or not solved else 0


def _chosen(arguments: argparse.Namespace) -> Sequence[Audited]:
    if arguments.reward is not None:
        if arguments.tasks is None:
            raise RecipeError("audit of a reward of your own needs tasks to try it on; give a file with --tasks")
        cases = read_cases(arguments.tasks)
        limits = {"limit": arguments.limit, "pays": arguments.pays, "deadline_s": arguments.deadline}
        return [Audited(name=arguments.reward, reward=own_reward(arguments.reward), cases=cases, **limits)]
    from rewards.shipped import SHIPPED

    unknown = sorted(set(arguments.only) - SHIPPED.keys())
    if unknown:
        raise RecipeError(f"--only {unknown[0]}: no such reward; expected one of {', '.join(SHIPPED)}")
    names: Iterable[str] = arguments.only or SHIPPED
    builders: list[Callable[[], Audited]] = [SHIPPED[name] for name in names]
    return [build() for build in builders]


_FIELDS: Mapping[str, frozenset[str]] = {
    "solve_humaneval": frozenset({"task_id", "prompt", "entry_point", "test", "canonical_solution"}),
    "solve_mbpp": frozenset({"task_id", "text", "code", "test_list"}),
}


async def _references(arguments: argparse.Namespace, substrate: Substrate | None) -> bool:
    """Whether in the files given every reference solution passes and no hack does; prints how many do."""
    from rewards.code_tests import solve_humaneval, solve_mbpp

    right = True
    for path, solve in ((arguments.humaneval, solve_humaneval), (arguments.mbpp, solve_mbpp)):
        if path is None:
            continue
        assert substrate is not None
        rows = []
        for number, row in read_jsonl(path):
            missing = sorted(_FIELDS[solve.__name__] - row.keys())
            if missing:
                raise RecipeError(f"{path}:{number}: no field {missing[0]!r}")
            rows.append(row)
        solutions, hacks = await solve(rows, substrate)
        failed = {name: score for name, score in solutions.items() if score.value != 1.0}
        paid = {name: score for name, score in hacks.items() if score.value != 0.0}
        print(
            f"{path.name}: {len(solutions) - len(failed)} of {len(solutions)} reference solutions score 1.0, "
            f"{len(paid)} of {len(hacks)} hacks score more than 0.0 or not at all"
        )
        for name, score in {**failed, **paid}.items():
            print(f"  {name}: {score.value} {score.explanation} {score.error or ''}")
        right = right and not failed and not paid and bool(solutions)
    return right
