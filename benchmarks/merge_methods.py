"""Every way to make one student of several specialists, from one start and with as many rollouts, on held-out tasks.

    python -m benchmarks.merge_methods quickstart runs/quickstart --out runs/merge_methods [--methods A,B]
    python -m benchmarks.merge_methods --quick

The specialists are those of a run of the recipe, finished or not. Each method is a run of its own below ``--out``,
whose evaluation plays the same tasks with the same random numbers; what is finished is not repeated. ``--rates`` gives
a method several learning rates, or scales where it merges weights. The one with the best last fifth of training
(reward, or KL to the teachers), or with the best rollouts of training tasks, is evaluated: held-out tasks decide
nothing.
``results.json``, ``results.md`` and ``kept.png`` go to ``--out``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from benchmarks.measure import machine
from posttrain.config import GRPO, SFT, Distill, Evaluation, MixedRL, Optim, Recipe, Ties, Value, WeightAverage
from posttrain.errors import RecipeError
from posttrain.learner.weight_merging import Checkpoint, WeightMerge
from posttrain.loader import load_recipe
from posttrain.models import compute_dtype, load_model, load_tokenizer, resolve_path
from posttrain.pipeline import run_recipe
from posttrain.rollout.service import ray_session
from posttrain.runs.durable import iter_jsonl, write_json
from posttrain.runs.evaluation import load_evaluations
from posttrain.runs.metrics import read_metrics
from posttrain.runs.rundir import RunDir, StageDir
from posttrain.runs.stats import Bootstrap, Estimate, Scores, bootstrap_gain, bootstrap_kept, bootstrap_mean
from recipes import quickstart
from teachers.sources import HFTeacher

console = Console(width=140)
OURS = "full_vocabulary"
GOAL = 0.95
DISTANCE, PLAYED = "distance-", "played-"
"""Names of the runs that measure a student's KL to its teachers, and its reward, on training tasks."""
STILL = Optim(learning_rate=1e-12)
GROUP = 8
"""Rollouts of a task in mixed RL."""
INK, HIGHLIGHT, PLAIN = "#24292F", "#009E73", "#6E7781"

Build = Callable[[Distill, float | None, Recipe], Value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to make a student."""

    label: str
    build: Build
    """The recipe's ``distill``, from that of the study, a learning rate if one was chosen, and the whole recipe."""
    from_sft: bool = False
    """Starts from the mean of the SFT checkpoints instead of the base."""
    chosen_by: Literal["kl", "reward", "played"] = "kl"
    """What chooses among learning rates: the KL to the teachers or the reward in training; among the scales of weights
    that are merged, the reward of rollouts of training tasks, played for that."""


def distilled(**changes: Any) -> Build:
    def build(distill: Distill, rate: float | None, recipe: Recipe) -> Value:
        optim = distill.optim if rate is None else distill.optim.replace(learning_rate=rate)
        return distill.replace(optim=optim, **changes)

    return build


def mixed_rl(distill: Distill, rate: float | None, recipe: Recipe) -> Value:
    """As many rollouts as a distillation, in groups, with the specialists' own GRPO settings."""
    template = next((domain.grpo for domain in recipe.domains.values() if domain.grpo is not None), GRPO())
    return MixedRL(
        grpo=template.replace(
            max_steps=distill.max_steps,
            groups_per_step=max(len(recipe.domains), distill.rollouts_per_step // GROUP),
            num_generations=GROUP,
            optim=distill.optim.replace(learning_rate=rate or template.optim.learning_rate),
            save_steps=distill.save_steps,
        )
    )


def long_mixed_rl(distill: Distill, rate: float | None, recipe: Recipe) -> Value:
    """The same with the rollouts that the specialists were trained on besides."""
    stages = [domain.grpo for domain in recipe.domains.values() if domain.grpo is not None]
    rollouts = sum(grpo.max_steps * grpo.groups_per_step * grpo.num_generations for grpo in stages)
    steps = distill.max_steps + rollouts // distill.rollouts_per_step
    return mixed_rl(distill.replace(max_steps=steps), rate, recipe)


METHODS = {
    OURS: Method(label="full-vocabulary OPD, reverse KL", build=distilled()),
    "forward_kl": Method(label="full-vocabulary OPD, forward KL", build=distilled(divergence="forward_kl")),
    "jsd": Method(label="full-vocabulary OPD, JSD", build=distilled(divergence="jsd")),
    "teacher_top_k": Method(label="OPD, teacher top-k with tail", build=distilled(loss="teacher_top_k")),
    "sampled_token": Method(label="OPD, sampled-token advantage", build=distilled(loss="sampled_token")),
    "off_policy": Method(
        label="off-policy distillation, forward KL",
        build=distilled(rollouts_from="teachers", divergence="forward_kl"),
    ),
    "mixed_rl": Method(label="mixed RL", build=mixed_rl, chosen_by="reward"),
    "weight_average": Method(label="weight average", build=lambda *_: WeightAverage()),
    "ties": Method(label="TIES", build=lambda *_: Ties()),
    "task_arithmetic": Method(
        label="task arithmetic", build=lambda _, scale, __: WeightAverage(scale=scale or 1.0), chosen_by="played"
    ),
    "scaled_ties": Method(
        label="TIES, scaled", build=lambda _, scale, __: Ties(scale=scale or 1.0), chosen_by="played"
    ),
    "full_vocabulary_from_sft": Method(label="full-vocabulary OPD from SFT mean", build=distilled(), from_sft=True),
    "mixed_rl_from_sft": Method(label="mixed RL from SFT mean", build=mixed_rl, from_sft=True, chosen_by="reward"),
    "long_mixed_rl_from_sft": Method(
        label="mixed RL from SFT mean, specialists' rollouts too",
        build=long_mixed_rl,
        from_sft=True,
        chosen_by="reward",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Study:
    """The specialists, the common settings, and the folder of all runs."""

    whole: Recipe
    source: RunDir
    out: Path
    rates: Mapping[str, Sequence[float]]
    probed: int = 256
    """Rollouts, over all domains, that measure a student on training tasks; 0 leaves out its KL to the teachers."""

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with its specialists as ready-made teachers."""
        domains = {
            name: domain.replace(sft=None, grpo=None, teacher=HFTeacher(str(self._trained(name, "grpo", "sft"))))
            for name, domain in self.whole.domains.items()
        }
        return self.whole.replace(domains=domains, distill=None)

    @property
    def distill(self) -> Distill:
        if not isinstance(self.whole.distill, Distill):
            raise RecipeError(f"recipe {self.whole.name}: expected a distillation to compare with; set distill")
        return self.whole.distill

    @cached_property
    def sft_mean(self) -> str:
        """The mean of the SFT checkpoints, made once."""
        folder = self.out / "sft_mean"
        if not folder.is_dir():
            base = resolve_path(self.whole.model.path)
            dtype = compute_dtype(self.whole.model.dtype, load_model(base, torch.bfloat16).num_parameters())
            with contextlib.ExitStack() as stack:
                paths = {name: self._trained(name, "sft") for name in self.whole.domains}
                merge = WeightMerge(
                    base=stack.enter_context(Checkpoint(base)),
                    specialists={name: stack.enter_context(Checkpoint(str(path))) for name, path in paths.items()},
                    weights=dict.fromkeys(paths, 1.0),
                )
                merge.write(folder, WeightAverage(), load_tokenizer(base), dtype)
        return str(folder)

    def reference(self) -> None:
        """Measure base and specialists, once for all methods."""
        self._run("reference", self.recipe)

    def student(self, name: str) -> None:
        """Train and measure the student of a method, at the best of its learning rates."""
        for rate in self.rates.get(name, ()):
            self._run(f"{name}-{rate:g}", self._recipe_of(name, rate), stop_before="evaluate")
            if METHODS[name].chosen_by == "played":
                self._probe(PLAYED, self.out / f"{name}-{rate:g}", self._still_rl)
        chosen = self.chosen_run(name)
        scores = self.out / "reference" / "stages" / "evaluate" / "scores"
        shutil.copytree(scores, RunDir(chosen).stage("evaluate").path / "scores", dirs_exist_ok=True)
        self._run(chosen.name, self._recipe_of(name, self.rate_of(name, chosen)))
        if self.probed:
            step = self.distill.replace(max_steps=1, rollouts_per_step=self.probed, optim=STILL)
            self._probe(DISTANCE, chosen, step)

    def chosen_run(self, name: str) -> Path:
        """The run of a method: the one whose learning rate did best in training."""
        runs = [self.out / f"{name}-{rate:g}" for rate in self.rates.get(name, ())]
        return min(runs, key=lambda run: regret(run, METHODS[name]), default=self.out / name)

    @property
    def _still_rl(self) -> Value:
        return MixedRL(grpo=GRPO(max_steps=1, groups_per_step=self.probed // GROUP, num_generations=GROUP, optim=STILL))

    def _probe(self, prefix: str, run: Path, step: Value) -> None:
        """One step of a stage from a student, for what it measures before its update."""
        model = self.recipe.model.replace(path=str(RunDir(run).stage("distill").final.resolve()))
        recipe = self.recipe.replace(distill=step, model=model)
        self._run(f"{prefix}{run.name}", recipe, stop_before="evaluate")

    def rate_of(self, name: str, run: Path) -> float | None:
        return next((rate for rate in self.rates.get(name, ()) if run.name == f"{name}-{rate:g}"), None)

    def _recipe_of(self, name: str, rate: float | None) -> Recipe:
        method = METHODS[name]
        model = self.recipe.model.replace(path=self.sft_mean) if method.from_sft else self.recipe.model
        return self.recipe.replace(distill=method.build(self.distill, rate, self.whole), model=model)

    def _run(self, name: str, recipe: Recipe, stop_before: str | None = None) -> None:
        path = self.out / name
        if not RunDir(path).stage("evaluate").done and not (stop_before and RunDir(path).stage("distill").done):
            console.rule(name)
            run_recipe(recipe, path, resume=RunDir(path).recipe.exists(), stop_before=stop_before)

    def _trained(self, domain: str, *kinds: str) -> Path:
        stages = [self.source.stage(f"{kind}-{domain}") for kind in kinds]
        for stage in stages:
            if stage.done is not None:
                return stage.final.resolve()
        raise RecipeError(
            f"{self.source.path}: none of {[stage.name for stage in stages]} is finished; expected a run that trained "
            f"a specialist of {domain!r}; go on with it (posttrain run --resume), or give another run"
        )


def regret(run: Path, method: Method) -> float:
    """How badly a method did on training tasks: its KL, or its reward lost."""
    lines = _distill_lines(run.with_name(PLAYED + run.name) if method.chosen_by == "played" else run)
    last = lines[-max(1, len(lines) // 5) :]
    return float(np.mean([line["kl"] if method.chosen_by == "kl" else -line["reward"] for line in last]))


def _distill_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(RunDir(run).metrics) if line["stage"] == "distill"]


def summarise(study: Study, names: Sequence[str]) -> dict[str, Any]:
    """Everything that is known of the methods whose runs are finished."""
    settings = study.whole.evaluation
    options = Bootstrap(resamples=settings.bootstrap_resamples, confidence=settings.confidence)
    runs = {name: study.chosen_run(name) for name in names}
    scores = {name: _scores(run) for name, run in runs.items()}
    reference = _scores(study.out / "reference")
    return {
        "recipe": study.whole.name,
        "machine": machine(),
        "steps": study.distill.max_steps,
        "rollouts_per_step": study.distill.rollouts_per_step,
        "tasks": settings.num_tasks,
        "samples": settings.num_samples,
        "reference": {
            domain: {model: _interval(bootstrap_mean(matrix, options)) for model, matrix in models.items()}
            for domain, models in reference.items()
        },
        "methods": [
            {
                "method": name,
                "label": METHODS[name].label,
                **_costs(run),
                "chosen": study.rate_of(name, run),
                "rates": {f"{rate:g}": _trial(study.out / f"{name}-{rate:g}", name) for rate in study.rates[name]}
                if name in study.rates
                else {},
                "domains": {
                    domain: _standing(models, scores.get(OURS, {}).get(domain), options)
                    | _answers(run, domain)
                    | _greedy(run, domain, options)
                    | _distance(run, domain)
                    for domain, models in scores[name].items()
                },
            }
            for name, run in runs.items()
        ],
    }


def _scores(run: Path) -> dict[str, dict[str, Scores]]:
    """Domain -> model -> [N, S] sampled scores."""
    evaluations = load_evaluations(RunDir(run).stage("evaluate").path)
    return {e.domain: {model: scores.sampled for model, scores in e.models.items()} for e in evaluations}


def _distance(run: Path, domain: str) -> dict[str, float]:
    """The KL to the teacher, in nats per token, where it was measured."""
    lines = _distill_lines(run.with_name(DISTANCE + run.name))
    return {"kl": lines[0][f"kl/{domain}"]} if lines else {}


def _greedy(run: Path, domain: str, options: Bootstrap) -> dict[str, Any]:
    """The kept share with greedy decoding, where that was played."""
    found = next(e for e in load_evaluations(RunDir(run).stage("evaluate").path) if e.domain == domain)
    student, specialist, base = (found.models[name].greedy for name in ("student", "specialist", "base"))
    return {"kept_greedy": _interval(bootstrap_kept(student, specialist, base, options))} if student.size else {}


def _trial(run: Path, name: str) -> float:
    return regret(run, METHODS[name]) * (1 if METHODS[name].chosen_by == "kl" else -1)


def _standing(models: Mapping[str, Scores], ours: Mapping[str, Scores] | None, options: Bootstrap) -> dict[str, Any]:
    student = models["student"]
    over_ours = {} if ours is None else {"over_ours": _interval(bootstrap_gain(student, ours["student"], options))}
    return {
        "score": _interval(bootstrap_mean(student, options)),
        "kept": _interval(bootstrap_kept(student, models["specialist"], models["base"], options)),
    } | over_ours


def _interval(estimate: Estimate) -> list[float]:
    return [estimate.value, estimate.low, estimate.high]


def _costs(run: Path) -> dict[str, Any]:
    """What training took. Tokens trained are those with loss."""
    lines = _distill_lines(run)
    done = RunDir(run).stage("distill").done
    return {
        "run": run.name,
        "learning_rate": max((line.get("learning_rate", 0.0) for line in lines), default=0.0) or None,
        "tokens_generated": sum(line.get("generated_tokens", 0.0) for line in lines),
        "tokens_trained": sum(line.get("loss_tokens", 0.0) for line in lines),
        "seconds": None if done is None else done["seconds"],
    }


def _answers(run: Path, domain: str) -> dict[str, float]:
    """How the student's held-out answers look: tokens, and the share cut off."""
    stage: StageDir = RunDir(run).stage("evaluate")
    found = [r for r in iter_jsonl(stage.rollouts) if r["model"] == "student" and r["domain"] == domain]
    return {
        "tokens_per_answer": float(np.mean([r["tokens"]["generated"] for r in found])),
        "cut_off": float(np.mean([r["stop"] == "length" for r in found])),
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The tables of a README."""
    domains = list(results["reference"])
    models = {model for scores in results["reference"].values() for model in scores}
    heads = ["method", *(f"{domain}: kept" for domain in domains), "least kept", "mean kept"]
    kept = []
    for row in results["methods"]:
        values = [row["domains"][domain]["kept"] for domain in domains]
        middle = [value[0] for value in values]
        kept.append([row["label"], *map(_percents, values), f"{min(middle):.0%}", f"{np.mean(middle):.0%}"])
    order = np.argsort([-np.mean([row["domains"][d]["kept"][0] for d in domains]) for row in results["methods"]])
    scores = [
        [model, *(_numbers(results["reference"][domain][model]) for domain in domains)]
        for model in ("base", "specialist")
        if model in models
    ] + [[row["label"], *(_numbers(row["domains"][d]["score"]) for d in domains)] for row in results["methods"]]
    over = [
        [row["label"], *(_numbers(row["domains"][d]["over_ours"], signed=True) for d in domains)]
        for row in results["methods"]
        if row["method"] != OURS and "over_ours" in row["domains"][domains[0]]
    ]
    greedy = [
        [row["label"], *(_percents(row["domains"][d]["kept_greedy"]) for d in domains)]
        for row in results["methods"]
        if "kept_greedy" in row["domains"][domains[0]]
    ]
    costs = [
        [
            row["label"],
            f"{row['tokens_generated']:,.0f}",
            f"{row['tokens_trained']:,.0f}",
            f"{row['seconds']:,.0f}",
            f"{row['learning_rate'] or row['chosen'] or 1:g}",
            *(f"{row['domains'][d]['tokens_per_answer']:.1f} ({row['domains'][d]['cut_off']:.0%})" for d in domains),
        ]
        for row in results["methods"]
    ]
    cost_heads = ["method", "tokens generated", "tokens trained on", "seconds", "learning rate or scale"]
    parts = [
        _table(heads, [kept[index] for index in order]),
        _table(["held-out score", *domains], scores),
        _table(["kept, greedy decoding", *domains], greedy) if greedy else "",
        _table(["score less that of full-vocabulary OPD", *domains], over) if over else "",
        _table(
            ["KL(student, teacher) on the student's answers, nats a token", *domains],
            [[row["label"], *(f"{row['domains'][d]['kl']:.4f}" for d in domains)] for row in results["methods"]],
        )
        if all("kl" in row["domains"][d] for row in results["methods"] for d in domains)
        else "",
        _table([*cost_heads, *(f"{d}: tokens an answer (cut off)" for d in domains)], costs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _percents(interval: Sequence[float]) -> str:
    value, low, high = (f"{100 * x:.0f}" for x in interval)
    return f"{value} % [{low}, {high}]"


def _numbers(interval: Sequence[float], *, signed: bool = False) -> str:
    value, low, high = (f"{x:{'+' if signed else ''}.3f}" for x in interval)
    return f"{value} [{low}, {high}]"


def draw_kept(results: Mapping[str, Any]) -> Figure:
    """A panel per domain, a line per method: what it kept, with its interval, beside the goal."""
    domains, methods = list(results["reference"]), results["methods"]
    figure = Figure(figsize=(2.6 + 2.5 * len(domains), 1.5 + 0.32 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    rows = sorted(methods, key=lambda row: float(np.mean([row["domains"][d]["kept"][0] for d in domains])))
    for axes, domain in zip(panels, domains, strict=True):
        axes.axvline(GOAL, color=INK, linewidth=1, linestyle=":")
        for place, row in enumerate(rows):
            value, low, high = row["domains"][domain]["kept"]
            colour = HIGHLIGHT if row["method"] == OURS else PLAIN
            axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
            axes.plot([value], [place], marker="o", markersize=6, color=colour)
            axes.annotate(
                f"{value:.0%}",
                (high, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=INK,
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        axes.set_title(domain, loc="left", color=INK, fontsize=11)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.margins(x=0.16)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.8)
        axes.tick_params(colors=INK, length=0, labelsize=9)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    level = "95 % intervals, paired bootstrap over tasks; dotted: 95 % kept"
    figure.suptitle(
        f"{results['recipe']}: share of each specialist's gain the student kept\n{level}",
        x=0.01, ha="left", color=INK, fontsize=11,
    )  # fmt: skip
    return figure


def small_study(folder: Path) -> Study:
    """Two specialists of the quickstart, of a few SFT steps, trained here; too small for any claim."""
    whole = quickstart.recipe()
    assert isinstance(whole.distill, Distill)
    sft = SFT(num_demonstrations=64, max_steps=4, batch_size=16, optim=Optim(learning_rate=2e-4))
    whole = whole.replace(
        domains={name: whole.domains[name].replace(sft=sft, grpo=None) for name in ("math", "code")},
        distill=whole.distill.replace(max_steps=2, rollouts_per_step=16),
        evaluation=Evaluation(num_tasks=8, num_samples=1, bootstrap_resamples=200, greedy=False),
    )
    run_recipe(whole, folder / "specialists", resume=False, stop_before="distill")
    return Study(whole=whole, source=RunDir(folder / "specialists"), out=folder / "methods", rates={}, probed=0)


def compare(study: Study, names: Sequence[str]) -> None:
    """Run what is missing; print and write the results so far after each method."""
    study.reference()
    for index, name in enumerate(names):
        study.student(name)
        results = summarise(study, names[: index + 1])
        write_json(study.out / "results.json", results)
        (study.out / "results.md").write_text(markdown(results), encoding="utf-8")
        draw_kept(results).savefig(study.out / "kept.png", dpi=150, facecolor="white", metadata={"Software": None})
    console.print(markdown(results), markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("recipe", nargs="?", help="the recipe of the run")
    parser.add_argument("run", nargs="?", type=Path, help="a run directory with finished specialists")
    parser.add_argument("--out", type=Path, help="where the methods' runs go; those there are taken up")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--domains", help="of the recipe, those to merge (default: all)")
    parser.add_argument("--probed", type=int, default=256, help="rollouts that measure a student on training tasks")
    parser.add_argument("--rates", action="append", default=[], metavar="METHOD=RATE,RATE", help="to choose from")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides")
    parser.add_argument("--quick", action="store_true", help="a form that takes less than 50 s and claims nothing")
    arguments = parser.parse_args()
    disable_progress_bar()
    # As the command line sets it: torch reads this before its first allocation.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    names = arguments.methods.split(",")
    if unknown := sorted(set(names) - set(METHODS)):
        parser.error(f"--methods {unknown[0]}: expected some of {', '.join(METHODS)}")
    rates = {name: [float(r) for r in given.split(",")] for name, given in (t.split("=") for t in arguments.rates)}
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder, ray_session(quickstart.recipe().workers):
            chosen = names if arguments.methods != ",".join(METHODS) else [OURS, "ties"]
            compare(small_study(Path(folder)), chosen)
        return
    if arguments.run is None or arguments.out is None:
        parser.error("expected a recipe, a run directory and --out, or --quick")
    whole = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.domains:
        whole = whole.replace(domains={name: whole.domains[name] for name in arguments.domains.split(",")})
    source = RunDir(arguments.run)
    study = Study(whole=whole, source=source, out=arguments.out, rates=rates, probed=arguments.probed)
    with ray_session(whole.workers):
        compare(study, names)


if __name__ == "__main__":
    main()
