"""The proof of a run: ``report.json`` for programs, ``report.html`` for people, ``plots/*.png`` for slides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from posttrain.runs import history, html
from posttrain.runs.durable import read_json, write_atomic, write_json
from posttrain.runs.evaluation import DomainEvaluation, summarise
from posttrain.runs.examples import pick_examples
from posttrain.runs.plots import save_plots
from posttrain.runs.rundir import RunDir
from posttrain.runs.stats import Bootstrap
from posttrain.runs.verdict import headline


def write_report(
    rundir: RunDir,
    evaluations: Sequence[DomainEvaluation],
    metrics: Sequence[Mapping[str, Any]],
    costs: Mapping[str, Any],
    options: Bootstrap,
) -> Path:
    """Write the report of a run; returns the path of ``report.html``.

    Works on a run that is not finished and leaves out what there is none of. ``metrics`` are the lines of
    ``metrics.jsonl``; ``costs`` is free-form, name -> number, text or a mapping of those.
    """
    report = build_report(rundir, evaluations, metrics, costs, options)
    svgs = save_plots(rundir, evaluations, metrics, options)
    write_json(rundir.report_json, report)
    write_atomic(rundir.report_html, render(rundir, report, svgs, options).encode())
    return rundir.report_html


def build_report(
    rundir: RunDir,
    evaluations: Sequence[DomainEvaluation],
    metrics: Sequence[Mapping[str, Any]],
    costs: Mapping[str, Any],
    options: Bootstrap,
) -> dict[str, Any]:
    """The content of ``report.json``; times are Unix seconds, an entry of ``domains`` is ``summarise``'s."""
    events = rundir.read_events()
    return {
        "recipe": _recipe(rundir).get("name", rundir.path.name),
        "created": history.created(events),
        "resumed": history.resumptions(events),
        "domains": [summarise(evaluation, options) for evaluation in evaluations],
        "costs": dict(costs),
        "stages": history.stage_timings(events, metrics),
    }


def render(rundir: RunDir, report: Mapping[str, Any], svgs: Mapping[str, str], options: Bootstrap) -> str:
    """The page, complete in itself: no script, no external resource."""
    home = files("posttrain.runs")
    return Template((home / "report.html.template").read_text(encoding="utf-8")).substitute(
        title=escape(report["recipe"]),
        eyebrow=f"Post-training report &middot; {html.clock(report['created'])}",
        headline=escape(headline(report["domains"])),
        style=(home / "report.css").read_text(encoding="utf-8"),
        sections=_sections(rundir, report, svgs, options),
    )


def _sections(rundir: RunDir, report: Mapping[str, Any], svgs: Mapping[str, str], options: Bootstrap) -> str:
    domains = report["domains"]
    curves = {name: svg for name, svg in svgs.items() if name not in ("scores", "efforts")}
    greedy = html.scores_table([entry for entry in domains if entry["greedy"]["n"]], "greedy")
    tables = html.scores_table(domains) + (html.unscored_note(domains) if domains else "")
    if greedy:
        tables += f"<details><summary>The same with greedy decoding</summary>{greedy}</details>"
    spent = html.stages_table(report["stages"]), html.costs_table(report["costs"])
    return "\n".join(
        (
            html.section("Results", tables, _method(options)),
            html.section("Scores at a glance", html.figures({n: s for n, s in svgs.items() if n == "scores"})),
            html.section(
                "Effort modes",
                html.efforts_table(domains) + html.figures({n: s for n, s in svgs.items() if n == "efforts"}),
                "Mean score of sampled rollouts with its interval, and mean number of tokens of reasoning.",
            ),
            html.section("Training curves", html.figures(curves), "Faint: each step. Strong: moving average."),
            html.section("Rollouts and their rewards", html.examples_section(pick_examples(rundir))),
            html.section("Time and costs", f'<div class="columns">{"".join(spent)}</div>' if any(spent) else ""),
            html.section("Resumed", html.resumed_list(report["resumed"])),
            html.section("Warnings", html.warning_list(history.warnings(rundir.read_events()))),
            html.section("Recipe", html.recipe_block(_recipe(rundir)) if rundir.recipe.exists() else ""),
        )
    )


def _method(options: Bootstrap) -> str:
    return (
        "Means over held-out tasks, sampled rollouts. Brackets: "
        f"{options.confidence:.0%} intervals from {options.resamples:,} paired bootstrap resamples of the tasks. "
        "Kept: the student's gain over base as a share of the specialist's."
    )


def _recipe(rundir: RunDir) -> dict[str, Any]:
    return read_json(rundir.recipe) if rundir.recipe.exists() else {}
