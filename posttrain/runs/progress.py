"""Live progress in the terminal, plain lines elsewhere, and the final table."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import progress as bars
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.runs.verdict import gain_of, gain_verdict, headline, kept_verdict, number, percent, thinking

SHOWN = (("reward", "reward"), ("kl", "KL"), ("loss", "loss"), ("tokens_per_s", "tok/s"))
"""Metrics worth a place on the line, with their labels."""

STYLES = {"good": "green", "bad": "red", "unclear": "yellow", "none": "dim"}


class StageProgress:
    """One stage's line."""

    def __init__(self, owner: Progress, task: bars.TaskID | None, name: str, total_steps: int, first_step: int) -> None:
        self._owner, self._task = owner, task
        self._name, self._total, self._first = name, total_steps, first_step
        self._began = time.monotonic()
        self._printed = -math.inf

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that ``step`` steps are done, with the metrics of the last."""
        line = " ".join(f"{label} {_short(metrics[key])}" for key, label in SHOWN if key in metrics)
        if self._task is not None:
            self._owner.bars.update(self._task, completed=step, line=line)
            return
        now = time.monotonic()
        if step < self._total and now - self._printed < self._owner.interval_s:
            return
        self._printed = now
        text = f"{self._name}: step {step}/{self._total} {line}{self._eta(step, now)}"
        self._owner.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _eta(self, step: int, now: float) -> str:
        done = step - self._first
        if done <= 0 or step >= self._total:
            return ""
        return f" ETA {duration((now - self._began) / done * (self._total - step))}"


class Progress:
    """``with Progress() as progress: stage = progress.stage("grpo-math", 100); stage.update(1, metrics)``.

    On a terminal each stage is a line that moves; elsewhere (a log file, CI) a line is printed at the first
    step, the last, and every ``interval_s`` seconds in between.
    """

    def __init__(self, console: Console | None = None, *, interval_s: float = 10.0) -> None:
        self.console = console or Console()
        self.interval_s = interval_s
        self.bars = bars.Progress(
            bars.TextColumn("[bold]{task.description}"),
            bars.BarColumn(bar_width=24),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[line]}", markup=False),
            bars.TimeElapsedColumn(),
            bars.TextColumn("ETA"),
            bars.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def stage(self, name: str, total_steps: int, first_step: int = 0) -> StageProgress:
        """Add a stage; ``first_step`` steps are done already when it is resumed."""
        task = None
        if self.console.is_terminal:
            task = self.bars.add_task(name, total=total_steps, completed=first_step, line="")
        return StageProgress(self, task, name, total_steps, first_step)


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a report's table: one row per domain, means of sampled rollouts, intervals below the numbers."""
    console = console or Console()
    # Narrow enough that intervals stay whole in 80 columns.
    table = Table(
        title=f"{report['recipe']}: held-out scores",
        title_justify="left",
        box=None,
        padding=(0, 1, 1, 0),
        pad_edge=False,
    )
    table.add_column("domain")
    for name in ("base", "SFT", "specialist", "student", "gain", "RL gain", "kept"):
        table.add_column(name, justify="right")
    for entry in report["domains"]:
        table.add_row(
            entry["domain"],
            *(number(entry[model]) for model in ("base", "sft", "specialist", "student")),
            _gain_cell(entry, "base", "gain_ci"),
            _gain_cell(entry, "sft", "rl_gain_ci"),
            _kept_cell(entry),
        )
    console.print(table)
    if any(entry["efforts"] for entry in report["domains"]):
        console.print(_efforts_table(report["domains"]))
    console.print(headline(report["domains"]), highlight=False)


def _efforts_table(domains: Sequence[Mapping[str, Any]]) -> Table:
    """One row per domain and effort mode: mean score, its interval, and mean number of thinking tokens."""
    table = Table(
        title="by effort: held-out score, thinking tokens",
        title_justify="left",
        box=None,
        padding=(0, 1, 1, 0),
        pad_edge=False,
    )
    for name in ("domain", "effort"):
        table.add_column(name)
    for name in ("base", "SFT", "specialist", "student"):
        table.add_column(name, justify="right")
    for entry in domains:
        for effort, models in entry["efforts"].items():
            cells = [_effort_cell(models.get(model)) for model in ("base", "sft", "specialist", "student")]
            table.add_row(entry["domain"], effort, *cells)
    return table


def _effort_cell(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return number(None)
    low, high = measured["score_ci"] or (None, None)
    lines = (number(measured["score"]), f"{number(low)}..{number(high)}", thinking(measured["thinking_tokens"]))
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _gain_cell(entry: Mapping[str, Any], before: str, interval: str) -> Text:
    gain, verdict = gain_of(entry, before), gain_verdict(entry[interval])
    if gain is None:
        return Text("\u2013", style="dim")
    lines = (number(gain, signed=True), _bounds(entry[interval]), verdict.words)
    return Text("\n".join(lines), style=STYLES[verdict.tone])


def _kept_cell(entry: Mapping[str, Any]) -> Text:
    verdict = kept_verdict(entry)
    lines = (percent(entry["kept"]), _bounds(entry["kept_ci"], share=True), verdict.words)
    return Text("\n".join(line for line in lines if line), style=STYLES[verdict.tone])


def _bounds(interval: Sequence[float | None] | None, *, share: bool = False) -> str:
    """``+0.21..+0.30``, half as wide as the report's form."""
    form = percent if share else (lambda value: f"{value:+.2f}")
    return "" if interval is None else "..".join("open" if bound is None else form(bound) for bound in interval)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
