"""Teachers, weights and shares that change during a distillation, and the scale of what teachers say."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.config import Distill, Mixture, Recipe
from posttrain.loader import load_recipe
from posttrain.rollout.player import GroupJob
from posttrain.rollout.samples import distill_samples
from posttrain.runs.metrics import MetricsLog
from posttrain.runs.progress import Progress
from posttrain.runs.rundir import RunDir
from posttrain.stages.distill import open_groups
from posttrain.stages.domain_scales import DomainScales
from posttrain.stages.mixture import split
from posttrain.stages.schedule import phases, planned_tasks, scheduled_teachers
from posttrain.stages.session import Position, Session
from posttrain.types import Group, Route, Sample, TokenArrays, Tokens
from teachers.sources import HFTeacher
from tests.test_posttrain_arrays import rollout_of
from tests.test_posttrain_stream import Service

RECIPE = str(Path(__file__).parent / "mini_recipe.py")


def recipe_with(model: str, **changes: object) -> tuple[Recipe, Distill]:
    recipe = load_recipe(RECIPE, [f"model.path={model}"])
    assert recipe.distill is not None
    config = recipe.distill.replace(**changes)
    return recipe.replace(distill=config), config


@pytest.fixture
def changing(tiny_model: str) -> tuple[Recipe, Distill]:
    """Digits get another teacher and weight after 2 steps, and most of the rollouts; vowels none after 4."""
    schedule = {
        4: Mixture(shares={"vowels": 0.0}),
        2: Mixture(teachers={"digits": HFTeacher(tiny_model)}, weights={"digits": 0.5}, shares={"digits": 3.0}),
    }
    return recipe_with(tiny_model, schedule=schedule)


def test_a_change_holds_from_its_step_on_and_keeps_what_it_does_not_name(changing) -> None:
    recipe, config = changing
    assert [
        (phase.first_step, phase.routes["digits"], phase.routes["vowels"], dict(phase.num_tasks))
        for phase in phases(recipe, config)
    ] == [
        (0, Route(teacher="digits"), Route(teacher="vowels"), {"vowels": 4, "digits": 4}),
        (2, Route(teacher="digits@2", weight=0.5), Route(teacher="vowels"), {"vowels": 2, "digits": 6}),
        (4, Route(teacher="digits@2", weight=0.5), Route(teacher="vowels"), {"vowels": 0, "digits": 8}),
    ]
    assert [(name, domain) for name, (domain, _) in scheduled_teachers(config).items()] == [("digits@2", "digits")]


def test_steps_have_as_many_tasks_as_asked_for_whatever_the_shares() -> None:
    rng = np.random.default_rng(0)
    for total, size in itertools.product((4, 7, 64), (1, 3, 4)):
        given = {str(i): float(share) for i, share in enumerate(rng.exponential(size=size) ** 4)}
        found = split(given | {"none": 0.0}, total)
        assert sum(found.values()) == total
        assert found["none"] == 0
        for name, share in given.items():
            exact = total * share / sum(given.values())
            assert found[name] >= 1
            assert found[name] == 1 or found[name] < exact + 1
    assert split({"a": 1.0, "b": 1.0, "c": 1.0}, 2) == {"a": 1, "b": 1, "c": 1}


def test_a_recipe_refuses_a_schedule_that_cannot_be(tiny_model: str) -> None:
    for changes, message in (
        ({"schedule": {5: Mixture()}}, "expected 1 to 4"),
        ({"schedule": {0: Mixture()}}, "expected 1 to 4"),
        ({"schedule": {1: Mixture(weights={"vowel": 2.0})}}, r"schedule\[1\] names 'vowel'.*'digits', 'vowels'"),
        ({"schedule": {1: Mixture(shares={"vowels": 0, "digits": 0})}}, "all are 0"),
        ({"schedule": {1: Mixture()}, "rollouts_per_step": 4, "num_generations": 4}, "room for a group of every"),
        ({"num_generations": 3}, "divisor of rollouts_per_step"),
        ({"reward_coef": 0.5}, "at least 2 with a reward"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe_with(tiny_model, **changes)


class Routing(Service):
    """Completes groups with a rollout in them, and their jobs' routes."""

    def collect(self) -> list[tuple[GroupJob, Group]]:
        return [
            (job, replace(group, rollouts=(rollout_of(job.id, tokens=3),), scores=group.scores[:1], route=job.route))
            for job, group in super().collect()
        ]


def session_of(recipe: Recipe, folder: Path, service: Service) -> Session:
    run = RunDir(folder)
    session = Session(recipe=recipe, run=run, metrics=MetricsLog(run), progress=Progress())
    session.rollouts = service
    return session


def taken(groups: Sequence[Group]) -> list[tuple[str, Route]]:
    return [(group.rollouts[0].id, group.route) for group in groups]


@pytest.mark.parametrize("staleness", [0, 1])
def test_a_stage_that_goes_on_asks_for_what_was_left_with_the_routes_it_had(changing, tmp_path, staleness) -> None:
    recipe, config = changing
    config = config.replace(max_staleness=staleness)
    planned = list(planned_tasks(recipe, config))
    assert [len(step) for step in planned] == [8] * 5

    def start(name: str, position: Position):
        session = session_of(recipe, tmp_path / name, Routing(order=lambda waiting: waiting[-1]))
        return open_groups(session, session.run.stage("distill"), config, position, {})

    whole = start("whole", Position(step=0))
    steps = [taken(whole.take()) for _ in range(5)]
    assert whole.take() == []
    assert sorted(id for step in steps for id, _ in step) == sorted(f"distill/{n // 8}/{n % 8}" for n in range(40))
    for id, route in itertools.chain(*steps):
        step, index = map(int, id.split("/")[1:])
        assert route == planned[step][index][1]

    broken_off = start("whole-again", Position(step=0))
    for step in range(2):
        assert taken(broken_off.take()) == steps[step]
    goes_on = start("resumed", Position(step=2, pending=tuple(broken_off.pending())))
    rest = list(itertools.chain(*(taken(goes_on.take()) for _ in range(3))))
    assert sorted(rest, key=lambda pair: pair[0]) == sorted(itertools.chain(*steps[2:]), key=lambda pair: pair[0])


def test_samples_of_both_mixtures_share_a_step_while_rollouts_run_ahead(changing, tmp_path) -> None:
    recipe, config = changing
    rng = np.random.default_rng(0)
    session = session_of(recipe, tmp_path / "run", Routing(order=lambda waiting: waiting[rng.integers(len(waiting))]))
    stream = open_groups(session, session.run.stage("distill"), config.replace(max_staleness=2), Position(step=0), {})
    found = []
    for _ in range(5):
        groups = stream.take()
        samples = distill_samples(groups)
        assert [(s.teacher, s.weight) for s in samples] == [(g.route.teacher, g.route.weight) for g in groups]
        found.append({(s.teacher, s.weight) for s in samples if s.teacher != "vowels"})
    assert any(len(routes) == 2 for routes in found), found
    assert set.union(*found) == {("digits", 1.0), ("digits@2", 0.5)}


def sample_of_domain(name: str, num_loss_tokens: int) -> Sample:
    arrays = TokenArrays.unsampled(np.zeros(num_loss_tokens + 1, np.int32))
    return Sample(id=name, task_id=name, domain=name, tokens=Tokens.of(arrays))


def test_domains_are_scaled_by_the_spread_of_what_their_teachers_say() -> None:
    rng = np.random.default_rng(1)
    spoken = {"wide": rng.normal(0.3, 4.0, 500), "narrow": rng.normal(-0.2, 1.0, 1500), "silent": np.zeros(10)}
    metrics = {"loss": 1.0}
    for name, values in spoken.items():
        metrics |= {f"log_ratio/{name}": values.mean(), f"log_ratio_sq/{name}": (values**2).mean()}
    scales = DomainScales()
    assert scales.factors() == {}
    reported = scales.take(metrics, [sample_of_domain(name, len(values)) for name, values in spoken.items()])
    assert metrics == {"loss": 1.0}
    assert reported == pytest.approx({f"log_ratio_std/{name}": values.std() for name, values in spoken.items()})
    whole = np.concatenate(list(spoken.values())).std()
    expected = {"wide": whole / spoken["wide"].std(), "narrow": whole / spoken["narrow"].std(), "silent": 1.0}
    assert scales.factors() == pytest.approx(expected)
    restored = DomainScales.restore(json.loads(json.dumps(scales.state())))
    for each in (scales, restored):
        each.take({"log_ratio/wide": 0.0, "log_ratio_sq/wide": 1e6}, [sample_of_domain("wide", 500)])
    assert restored.factors() == scales.factors()
    assert scales.factors()["wide"] >= 0.25
    assert scales.factors()["narrow"] == 4.0
    assert math.isclose(scales.moments["wide"][0], 500)
