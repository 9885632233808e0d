"""Effort modes with a specialist each: who trains in what, whom the merge asks, what is measured."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from posttrain.config import GRPO, Effort, Mixture, Optim, Recipe, Workers
from posttrain.conversation.effort import HIGH, MAX, MODES, NON_THINK
from posttrain.conversation.v4_tokens import END_THINK, EOS
from posttrain.errors import RecipeError
from posttrain.loader import load_recipe
from posttrain.pipeline import plan, run_recipe
from posttrain.preflight import check_recipe
from posttrain.protocols import TaskSource
from posttrain.rollout.player import GroupJob, Player
from posttrain.rollout.samples import distill_samples
from posttrain.runs.durable import iter_jsonl
from posttrain.runs.evaluation import (
    DomainEvaluation,
    EffortScores,
    ModelScores,
    load_evaluations,
    summarise,
    summarise_efforts,
)
from posttrain.runs.html import efforts_table
from posttrain.runs.metrics import MetricsLog
from posttrain.runs.plots import draw_efforts
from posttrain.runs.progress import Progress, print_report
from posttrain.runs.rundir import RunDir
from posttrain.runs.stats import Bootstrap
from posttrain.stages.distill import open_groups, teachers_of
from posttrain.stages.evaluate import Contestant, contestants, evaluate
from posttrain.stages.grpo import Training
from posttrain.stages.schedule import phases, planned_tasks
from posttrain.stages.session import Position, Session
from posttrain.tasks import TasksInMode
from posttrain.types import Group, Route, Task
from rewards.length import OverlongPenalty
from teachers.sources import HFTeacher
from tests import mini_recipe
from tests.test_posttrain_schedule import Routing
from tests.test_posttrain_v4_rollout import Says, chat, modes_recipe
from tests.tiny_models import tiny_chat

OWN = GRPO(max_steps=2, groups_per_step=2, num_generations=4, optim=Optim(learning_rate=1e-3), save_steps=1)
SPECIALISTS = ["vowels.non-think", "vowels.high", "vowels.90", "digits"]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Vowels with a specialist for each of three modes, digits with one."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    shared = modes_recipe(tmp_path)
    vowels = shared.domains["vowels"]
    efforts = {name: mode.replace(grpo=OWN, share=1.0) for name, mode in vowels.efforts.items()}
    domains = {
        "vowels": vowels.replace(grpo=None, efforts=efforts),
        "digits": mini_recipe.recipe().domains["digits"].replace(grpo=OWN),
    }
    return shared.replace(domains=domains)


def session_of(recipe: Recipe, folder: Path) -> Session:
    run = RunDir(folder)
    return Session(recipe=recipe, run=run, metrics=MetricsLog(run), progress=Progress())


def test_each_mode_has_a_stage_and_starts_from_the_domains_sft(recipe: Recipe) -> None:
    assert list(recipe.specialties()) == SPECIALISTS
    assert [stage.name for stage in plan(recipe)] == [
        "sft-vowels",
        *(f"grpo-{name}" for name in SPECIALISTS[:3]),
        "sft-digits",
        "grpo-digits",
        "distill",
        "evaluate",
    ]
    task = Task(id="t", domain="vowels", prompt=())
    assert [recipe.specialist_of(replace(task, effort=mode)) for mode in recipe.domains["vowels"].efforts] == (
        SPECIALISTS[:3]
    )
    assert recipe.specialist_of(replace(task, domain="digits", effort=HIGH)) == "digits"


def test_a_specialist_plays_its_mode_alone_with_what_belongs_to_it(recipe: Recipe, tmp_path: Path) -> None:
    session = session_of(recipe, tmp_path / "run")
    training = Training.specialist(recipe, "vowels.non-think")
    assert (training.config, training.per_step) == (OWN, {"vowels": 2})
    tasks = list(islice(training.domains["vowels"].tasks.train(seed=0), 3))
    for task in tasks:
        job = session.job("g", task, num_rollouts=4)
        assert {job.form(i).effort for i in range(4)} == {NON_THINK}
        assert (job.play.sampling.max_tokens, job.play.length_penalty is not None) == (3, True)


@dataclass(frozen=True)
class SomeSayTheirMode:
    """Another source's tasks, in turn of no mode and of these."""

    source: TaskSource
    modes: tuple[str | None, ...]

    def train(self, *, seed: int) -> list[Task]:
        return self._with_modes(self.source.train(seed=seed))

    def heldout(self, *, count: int) -> list[Task]:
        return self._with_modes(self.source.heldout(count=count))

    def demonstrations(self, *, count: int, seed: int) -> object:
        return self.source.demonstrations(count=count, seed=seed)

    def _with_modes(self, tasks) -> list[Task]:
        return [replace(task, effort=self.modes[i % len(self.modes)]) for i, task in enumerate(tasks)]


def test_tasks_that_say_their_mode_go_to_its_specialist_only(recipe: Recipe) -> None:
    vowels = recipe.domains["vowels"]
    source = SomeSayTheirMode(vowels.tasks, (None, HIGH))
    everything = list(source.train(seed=0))
    high, other = (list(TasksInMode(tasks=source, effort=mode).train(seed=0)) for mode in (HIGH, NON_THINK))
    assert [task.id for task in high] == [task.id for task in everything]
    assert [task.id for task in other] == [task.id for task in everything if task.effort is None]
    assert ({task.effort for task in high}, {task.effort for task in other}) == ({HIGH}, {NON_THINK})

    def with_tasks(*modes: str | None) -> Recipe:
        domain = vowels.replace(tasks=SomeSayTheirMode(vowels.tasks, modes))
        return recipe.replace(domains={"vowels": domain})

    check_recipe(with_tasks(None, HIGH))
    with pytest.raises(RecipeError, match=r"domains\.vowels\.tasks has tasks of effort 'max', which has no specialist"):
        check_recipe(with_tasks(None, MAX))
    with pytest.raises(RecipeError, match=r"domains\.vowels\.efforts has '90', but the tasks name other efforts"):
        check_recipe(with_tasks(HIGH, NON_THINK))


def test_wrong_specialists_are_refused(recipe: Recipe, tiny_model: str) -> None:
    vowels, teacher = recipe.domains["vowels"], HFTeacher(tiny_model)
    efforts = dict(vowels.efforts)
    ready = {name: mode.replace(grpo=None, teacher=teacher) for name, mode in efforts.items()}
    for change, message in (
        (lambda: efforts[HIGH].replace(teacher=teacher), "grpo and teacher are both set"),
        (lambda: vowels.replace(efforts=efforts | {HIGH: Effort()}), r"efforts\['high'\] has neither grpo nor teacher"),
        (lambda: vowels.replace(grpo=GRPO(num_generations=6)), "grpo is set and so are specialists of its efforts"),
        (lambda: vowels.replace(sft=None, teacher=teacher), "teacher is set and so are specialists of its efforts"),
        (lambda: vowels.replace(efforts=ready), "every effort has a ready-made teacher"),
        (
            lambda: recipe.replace(domains={**recipe.domains, "vowels.high": recipe.domains["digits"]}),
            r"domains\.vowels\.high has the name of the specialist of domains\.vowels at effort 'high'",
        ),
        (
            lambda: recipe.replace(distill=recipe.distill.replace(schedule={1: Mixture(teachers={"vowels": teacher})})),
            r"schedule\[1\]\.teachers names 'vowels'; expected names of specialists: \['digits', 'vowels\.90'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            change()


def test_the_merge_asks_the_teacher_of_each_mode(recipe: Recipe, tmp_path: Path, tiny_model: str) -> None:
    vowels = recipe.domains["vowels"]
    efforts = {name: mode.replace(share=4.0 if name == HIGH else 1.0) for name, mode in vowels.efforts.items()}
    ready = HFTeacher(tiny_model)
    efforts["90"] = efforts["90"].replace(grpo=None, teacher=ready)
    domains = {**recipe.domains, "vowels": vowels.replace(efforts=efforts, weight=0.5)}
    config = recipe.distill.replace(max_steps=60, schedule={30: Mixture(teachers={"vowels.high": ready})})
    recipe = recipe.replace(domains=domains, distill=config)
    trained = dict.fromkeys(SPECIALISTS, tiny_model)
    teachers = teachers_of(recipe.specialties(), config, trained)
    assert list(teachers) == SPECIALISTS
    assert teachers["vowels.90"] is ready
    with pytest.raises(RecipeError, match=r"domains\.vowels\.efforts\.high has no teacher"):
        teachers_of(recipe.specialties(), config, {"vowels.non-think": tiny_model})

    assert phases(recipe, config)[1].routes["vowels.high"] == Route(teacher="vowels.high@30", weight=0.5)
    steps = list(planned_tasks(recipe, config))
    counts: Counter[str | None] = Counter()
    for number, step in enumerate(steps):
        for task, route in step:
            name = recipe.specialist_of(task)
            later = "@30" if name == "vowels.high" and number >= 30 else ""
            assert route == Route(teacher=name + later, weight=1.0 if name == "digits" else 0.5)
            counts[task.effort] += 1
    assert counts[None] == 60 * 4
    assert counts[HIGH] / (60 * 4) == pytest.approx(4 / 6, abs=0.1)

    session = session_of(recipe, tmp_path / "run")
    session.rollouts = Routing()
    stream = open_groups(session, session.run.stage("distill"), config, Position(step=0), {})
    for groups, step in zip((stream.take() for _ in range(2)), steps, strict=False):
        assert [(group.task.effort, group.route) for group in groups] == [(task.effort, route) for task, route in step]
        assert [sample.teacher for sample in distill_samples(groups)] == [route.teacher for _, route in step]


def test_modes_without_specialists_of_their_own_are_merged_from_the_domains(tmp_path: Path) -> None:
    recipe = modes_recipe(tmp_path)
    found = {(task.effort, route.teacher) for step in planned_tasks(recipe, recipe.distill) for task, route in step}
    assert found == {(NON_THINK, "vowels"), ("90", "vowels")}


def test_contestants_are_the_specialist_of_each_mode(recipe: Recipe, tmp_path: Path) -> None:
    session = session_of(recipe, tmp_path / "run")
    session.base_path = "base"
    specialists = {name: f"grpo/{name}" for name in SPECIALISTS}
    found = list(contestants(session, {"vowels": "sft"}, specialists, "student"))
    of_vowels = [(c.model, c.path, c.effort) for c in found if c.domain == "vowels"]
    assert of_vowels == [
        ("base", "base", None),
        ("sft", "sft", None),
        *(("specialist", f"grpo/vowels.{mode}", mode) for mode in (NON_THINK, HIGH, "90")),
        ("student", "student", None),
    ]


class Plays:
    """Plays jobs at once, with an engine that says one text."""

    def __init__(self, text: str) -> None:
        self._player = Player(
            engine=Says([text]), judge_engine=None, chat=chat(), substrate=None, workers=Workers(max_retries=0)
        )

    def play(self, jobs: list[GroupJob]) -> list[Group]:
        return asyncio.run(self._player.play(jobs))


def test_every_mode_is_measured_on_every_task_and_length_costs_nothing(recipe: Recipe, tmp_path: Path) -> None:
    session = session_of(recipe, tmp_path / "run")
    session.rollouts = Plays(f"aa{END_THINK}a{EOS}")
    scores, groups = evaluate(session, Contestant(model="student", path="", domain="vowels"))
    num_tasks, samples = recipe.evaluation.num_tasks, recipe.evaluation.num_samples
    assert (scores.sampled.shape, scores.greedy.shape) == ((num_tasks, 3 * samples), (num_tasks, 3))
    assert len(groups) == 2 * 3 * num_tasks
    # Of the budgets 3, 4 and 8 the first cuts the turn off right after its reasoning.
    thought = {mode: set(effort.thinking_tokens.flat) for mode, effort in scores.efforts.items()}
    assert thought == {NON_THINK: {0.0}, HIGH: {2.0}, "90": {2.0}}
    assert (scores.sampled == 1).all()
    assert recipe.domains["vowels"].efforts[NON_THINK].length_penalty == OverlongPenalty(max_tokens=4, cache_tokens=4)

    parts = []
    for mode in scores.efforts:
        entrant = Contestant(model="specialist", path="", domain="vowels", effort=mode)
        part, groups = evaluate(session, entrant)
        assert {rollout.task.effort for group in groups for rollout in group.rollouts} == {mode}
        parts.append(part)
        np.testing.assert_array_equal(part.sampled, scores.efforts[mode].sampled)
    for part in (scores, *parts[:2]):
        part.save(tmp_path)
    (partial,) = load_evaluations(tmp_path)
    assert list(partial.models) == ["student"]
    parts[2].save(tmp_path)
    (whole,) = load_evaluations(tmp_path)
    assert whole.models["specialist"].sampled.shape == scores.sampled.shape
    assert list(whole.models["specialist"].efforts) == [*sorted(scores.efforts)]


def test_a_task_in_one_mode_only_leaves_the_others_empty_and_nothing_unscored(recipe: Recipe, tmp_path: Path) -> None:
    vowels = recipe.domains["vowels"]
    domain = vowels.replace(tasks=SomeSayTheirMode(vowels.tasks, (None, HIGH)))
    session = session_of(recipe.replace(domains={"vowels": domain}), tmp_path / "run")
    session.rollouts = Plays(f"a{END_THINK}a{EOS}")
    scores, _ = evaluate(session, Contestant(model="student", path="", domain="vowels"))
    assert np.isnan(scores.efforts["90"].sampled).any(axis=1).tolist() == [False, True] * 3
    assert np.isfinite(scores.efforts[HIGH].sampled).all()
    assert ModelScores.load(scores.save(tmp_path)).unscored == {"greedy": 0, "sampled": 0}


@pytest.mark.parametrize(("said", "expected"), [("a1</think>c", 2), ("a1c", 3), ("</think>a", 0)])
def test_reasoning_is_what_comes_before_its_end(said: str, expected: int) -> None:
    ids = np.array(chat().tokenizer(said, add_special_tokens=False)["input_ids"], np.int32)
    assert chat().at(HIGH).num_reasoning(ids) == expected
    assert chat().at(NON_THINK).num_reasoning(ids) == 0


def test_reasoning_by_template_needs_a_token_that_ends_it() -> None:
    form = tiny_chat()
    assert form.num_reasoning(form.encode("a1</think>c")) == 0
    form.tokenizer.add_tokens(["</think>"])
    ids = form.encode("a1</think>c")
    assert (form.num_reasoning(ids), form.at(NON_THINK).num_reasoning(ids)) == (2, 0)


def by_effort(model: str, tokens: dict[str, float], right: dict[str, float]) -> ModelScores:
    efforts = {
        mode: EffortScores(
            sampled=np.array([[1.0], [0.0], [right[mode]]]), thinking_tokens=np.full((3, 1), tokens[mode])
        )
        for mode in tokens
    }
    sampled = np.hstack([effort.sampled for effort in efforts.values()])
    return ModelScores(
        model=model,
        domain="math",
        task_ids=("a", "b", "c"),
        greedy=np.empty((3, 0)),
        sampled=sampled,
        efforts=efforts,
    )


def test_the_report_shows_length_and_score_of_each_mode() -> None:
    lengths = {NON_THINK: 0.0, HIGH: 12.5, MAX: 40.0}
    evaluation = DomainEvaluation.of(
        [by_effort(model, lengths, dict.fromkeys(lengths, 1.0)) for model in ("base", "specialist", "student")]
    )
    found = summarise_efforts(evaluation, Bootstrap(resamples=50))
    assert list(found) == list(MODES)
    for mode, models in found.items():
        assert set(models) == {"base", "specialist", "student"}
        assert models["student"]["thinking_tokens"] == lengths[mode]
        assert models["student"]["score"] == pytest.approx(2 / 3)
        assert models["student"]["thinking_tokens_ci"] == [lengths[mode]] * 2

    entry = summarise(evaluation, Bootstrap(resamples=50))
    assert entry["efforts"] == found
    out = io.StringIO()
    print_report({"recipe": "efforts", "domains": [entry]}, Console(file=out, width=80))
    for word in ("non-think", "high", "max", "12.5 tok", "40.0 tok", "0.667"):
        assert word in out.getvalue()
    assert efforts_table([entry]).count("<tr>") == 1 + len(MODES)
    assert efforts_table([entry | {"efforts": {}}]) == ""

    figure = draw_efforts([evaluation], Bootstrap(resamples=50))
    above, below = figure.axes
    drawn = [line.get_ydata().tolist() for line in above.get_lines() if len(line.get_ydata()) == len(MODES)]
    assert [*lengths.values()] in drawn
    assert [tick.get_text() for tick in below.get_xticklabels()] == list(MODES)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_trains_merges_and_measures_each_mode(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.replace(
        distill=recipe.distill.replace(max_steps=2, start="sft_mean"),
        evaluation=recipe.evaluation.replace(num_tasks=3, num_samples=1, bootstrap_resamples=20),
    )
    report = run_recipe(recipe, tmp_path / "run", resume=False)
    run = RunDir(tmp_path / "run")
    for mode in recipe.domains["vowels"].efforts:
        played = {record["effort"] for record in iter_jsonl(run.stage(f"grpo-vowels.{mode}").rollouts)}
        assert played == {mode}
        assert (run.stage(f"grpo-vowels.{mode}").final / "model.safetensors").is_file()
    entry = next(entry for entry in report["domains"] if entry["domain"] == "vowels")
    assert {mode: set(models) for mode, models in entry["efforts"].items()} == {
        mode: {"base", "sft", "specialist", "student"} for mode in recipe.domains["vowels"].efforts
    }
    assert (run.plots / "efforts.png").read_bytes().startswith(b"\x89PNG")
    assert not run.stage("distill").start.exists()
    assert "Effort modes" in run.report_html.read_text()
    assert {"kl/vowels", "kl/digits"} <= set(json.loads(run.metrics.read_text().splitlines()[-1]))


def test_the_recipe_has_a_teacher_for_each_mode_and_ways_to_think() -> None:
    recipe = load_recipe("efforts")
    assert list(recipe.specialties()) == [f"{domain}.{mode}" for domain in ("bill", "rest") for mode in MODES]
    check_recipe(recipe)
    for domain in recipe.domains.values():
        budgets = [domain.sampling_at(mode).max_tokens for mode in MODES]
        assert budgets == sorted(set(budgets))
