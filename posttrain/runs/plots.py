"""The pictures of a report: PNG files, and SVG that takes its ink from the page it stands in.

Stages are named ``<kind>-<domain>`` (``sft-math``, ``grpo-code``) or just ``<kind>`` (``distill``); a metric
of one domain within a shared stage is named ``<metric>/<domain>`` (``kl/math``).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.runs.durable import write_atomic
from posttrain.runs.evaluation import MODELS, DomainEvaluation, summarise_efforts
from posttrain.runs.rundir import RunDir
from posttrain.runs.stats import Bootstrap, bootstrap_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which people with any of the common colour deficiencies can tell apart; these
# tones hold on white and on black.
MODEL_COLOURS = {"base": "#8C8C8C", "sft": "#56B4E9", "specialist": "#E69F00", "student": "#009E73"}
MODEL_LABELS = {"base": "base", "sft": "SFT", "specialist": "specialist", "student": "student"}
LINE_COLOURS = ("#0083C9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#8C8C8C")
INK = "#24292F"
"""Text and axes. In SVG this colour becomes ``currentColor``, so it follows the page's theme."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One picture of a metric over steps, a line per domain."""

    name: str
    kind: str
    metric: str
    title: str
    label: str


CURVES = (
    Curve(name="grpo_reward", kind="grpo", metric="reward", title="Reward during GRPO", label="mean reward"),
    Curve(name="mixed_reward", kind="distill", metric="reward", title="Reward during mixed RL", label="mean reward"),
    Curve(name="distill_kl", kind="distill", metric="kl", title="KL to the teachers", label="KL, nats per token"),
    Curve(name="grpo_length", kind="grpo", metric="completion_tokens", title="Response length in GRPO", label="tokens"),
    Curve(name="grpo_entropy", kind="grpo", metric="entropy", title="Entropy in GRPO", label="nats per token"),
    Curve(name="grpo_kl", kind="grpo", metric="kl_ref", title="KL to the start of GRPO", label="KL, nats per token"),
    Curve(name="sft_loss", kind="sft", metric="loss", title="SFT loss", label="nats per token"),
)

Line = tuple[list[int], list[float]]


def lines_of(curve: Curve, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    """Steps and values per domain; steps without a value are left out."""
    lines: dict[str, Line] = {}
    for record in metrics:
        kind, _, domain = record["stage"].partition("-")
        if kind != curve.kind:
            continue
        for name, value in record.items():
            metric, _, part = name.partition("/")
            # A stage of one domain has the bare metric; a stage of many has one metric per domain.
            if metric != curve.metric or bool(part) == bool(domain) or not math.isfinite(value):
                continue
            steps, values = lines.setdefault(domain or part, ([], []))
            steps.append(record["step"])
            values.append(value)
    return dict(sorted(lines.items()))


def draw_curve(curve: Curve, lines: Mapping[str, Line]) -> Figure:
    """Raw values faint, a moving average on top."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _canvas(5.2, 2.9, curve.title)
    for index, (domain, (steps, values)) in enumerate(lines.items()):
        colour = LINE_COLOURS[index % len(LINE_COLOURS)]
        style = ("-", "--", ":")[index // len(LINE_COLOURS) % 3]
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        axes.plot(
            steps, _smooth(values), color=colour, linestyle=style, linewidth=2, label=domain, marker=_marker(steps)
        )
    axes.set_xlabel("step")
    axes.set_ylabel(curve.label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    _legend(axes, len(lines))
    return figure


def draw_scores(evaluations: Sequence[DomainEvaluation], options: Bootstrap) -> Figure:
    """The main picture: per domain, bars of the four models' sampled means with their intervals."""
    figure, axes = _canvas(max(6.4, 2.2 + 2.1 * len(evaluations)), 3.7, "Held-out score, sampled rollouts")
    present = [name for name in MODELS if any(name in evaluation.models for evaluation in evaluations)]
    width = 0.84 / max(1, len(present))
    for column, evaluation in enumerate(evaluations):
        common = evaluation.common_scores("sampled")
        for row, model in enumerate(present):
            if model not in common:
                continue
            estimate = bootstrap_mean(common[model], options)
            if math.isnan(estimate.value):
                continue
            place = column + (row - (len(present) - 1) / 2) * width
            axes.bar(place, estimate.value, width * 0.9, color=MODEL_COLOURS[model])
            whiskers = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
            axes.errorbar(place, estimate.value, whiskers, color=INK, capsize=3, linewidth=1.2)
            axes.annotate(
                f"{estimate.value:.2f}",
                (place, estimate.high),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                color=INK,
                fontsize=9,
            )
    axes.set_xticks(range(len(evaluations)), [evaluation.domain for evaluation in evaluations], fontsize=11)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(evaluations) - 0.4)
    axes.margins(y=0.14)
    axes.set_ylabel(f"mean score, {options.confidence:.0%} interval")
    for model in present:
        axes.bar([0], [0], color=MODEL_COLOURS[model], label=MODEL_LABELS[model])
    _legend(axes, len(present))
    return figure


def draw_efforts(evaluations: Sequence[DomainEvaluation], options: Bootstrap) -> Figure:
    """How long specialist and student think in each effort mode, and what they score; a column per domain."""
    from matplotlib.figure import Figure

    found = {evaluation.domain: summarise_efforts(evaluation, options) for evaluation in evaluations}
    found = {domain: efforts for domain, efforts in found.items() if efforts}
    figure = Figure(figsize=(max(4.6, 3.7 * len(found)), 5.6), layout="constrained")
    grid = figure.subplots(2, len(found), squeeze=False, sharey="row")
    measures = (("thinking_tokens", "thinking tokens"), ("score", f"mean score, {options.confidence:.0%} interval"))
    for row, (measure, label) in enumerate(measures):
        for axes, (domain, efforts) in zip(grid[row], found.items(), strict=True):
            _style(axes, domain if row == 0 else "")
            for place, model in enumerate(("specialist", "student")):
                _draw_by_effort(axes, efforts, model, measure, shift=0.1 * place - 0.05)
            axes.set_xticks(range(len(efforts)), list(efforts))
            axes.set_xlim(-0.4, len(efforts) - 0.6)
        grid[row][0].set_ylim(bottom=min(0.0, grid[row][0].get_ylim()[0]))
        grid[row][0].set_ylabel(label, color=INK)
    _legend(grid[0][0], 2)
    return figure


def _draw_by_effort(
    axes: Axes, efforts: Mapping[str, Mapping[str, Any]], model: str, measure: str, *, shift: float
) -> None:
    known = [
        (place + shift, models[model][measure], models[model][f"{measure}_ci"])
        for place, models in enumerate(efforts.values())
        if model in models and models[model][f"{measure}_ci"] is not None
    ]
    if not known:
        return
    places, values, intervals = zip(*known, strict=True)
    whiskers = np.abs(np.transpose(intervals) - np.array(values))
    axes.errorbar(
        places,
        values,
        whiskers,
        color=MODEL_COLOURS[model],
        label=MODEL_LABELS[model],
        marker="o",
        linewidth=2,
        capsize=3,
    )


def save_plots(
    rundir: RunDir,
    evaluations: Sequence[DomainEvaluation],
    metrics: Sequence[Mapping[str, Any]],
    options: Bootstrap,
) -> dict[str, str]:
    """Write ``plots/<name>.png`` for all that there are data for; returns the same pictures as SVG, by name."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "posttrain", "font.size": 10}):
        figures = {"scores": draw_scores(evaluations, options)} if evaluations else {}
        if any(summarise_efforts(evaluation, options) for evaluation in evaluations):
            figures["efforts"] = draw_efforts(evaluations, options)
        for curve in CURVES:
            lines = lines_of(curve, metrics)
            if lines:
                figures[curve.name] = draw_curve(curve, lines)
        for name, figure in figures.items():
            write_atomic(rundir.plots / f"{name}.png", _png(figure))
        return {name: _svg(figure, name) for name, figure in figures.items()}


def _canvas(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    # Figure without pyplot: no global state, no display, and the Agg canvas by default.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _style(axes, title)
    return figure, axes


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", color=INK, fontsize=11, pad=24)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.tick_params(colors=INK, labelcolor=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)


def _legend(axes: Axes, entries: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=min(entries, 5),
        frameon=False,
        labelcolor=INK,
        handlelength=1.2,
        columnspacing=1.2,
        borderaxespad=0.1,
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over about a tenth of the curve, centred so that it does not lag; the ends see half the window."""
    half = len(values) // 20
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _marker(steps: Sequence[int]) -> str:
    return "o" if len(steps) == 1 else ""


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK.lower(), "currentColor")
    # The page's own font; ids must be unique in the page that holds several pictures.
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)
    text = re.sub(r'((?: id=|xlink:href=)")(#?)', rf"\1\2{name}-", text).replace("url(#", f"url(#{name}-")
    return text.replace("<svg ", f'<svg role="img" aria-label="{name.replace("_", " ")}" ', 1)
