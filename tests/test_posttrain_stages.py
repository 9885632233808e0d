"""What the stages decide by themselves, without a run around them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posttrain.config import SFT, Distill, Optim
from posttrain.errors import RecipeError
from posttrain.learner.distillation import DistillObjective
from posttrain.learner.learner import Learner
from posttrain.loader import load_recipe
from posttrain.models import load_model
from posttrain.pipeline import Stage, _run_stage
from posttrain.rollout.player import GroupJob
from posttrain.runs.metrics import MetricsLog
from posttrain.runs.progress import Progress
from posttrain.runs.rundir import EventKind, RunDir
from posttrain.stages.distill import ITSELF, check_self_distillation
from posttrain.stages.evaluate import Contestant, contestants, evaluate
from posttrain.stages.grpo import merge_updates
from posttrain.stages.merge_weights import sft_mean
from posttrain.stages.session import Session
from posttrain.types import SandboxSpec, Task
from teachers.library import SwapOnDemand
from tests.tiny_models import save_tiny_model, tiny_chat

RECIPE = str(Path(__file__).parent / "mini_recipe.py")


@pytest.fixture
def session(tiny_model: str, tmp_path: Path) -> Session:
    run = RunDir(tmp_path / "run")
    recipe = load_recipe(RECIPE, [f"model.path={tiny_model}"])
    return Session(recipe=recipe, run=run, metrics=MetricsLog(run), progress=Progress())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(tiny_model, tmp_path, dtype):
    library = SwapOnDemand()
    probes = [tiny_chat().encode_prompt([{"role": "user", "content": text}]) for text in ("a", "what is 2 + 2?")]
    teachers = {ITSELF: library.from_checkpoint(tiny_model)}
    config = Distill(teachers=library, max_steps=1)
    with library.open(teachers, student_path=tiny_model, probes={ITSELF: probes}) as opened:
        objective = DistillObjective(config=config, states=opened.store, head_of=opened.head, teachers=opened)
        for start, is_itself in ((tiny_model, True), (save_tiny_model(tmp_path / "other", seed=1), False)):
            learner = Learner(
                load_model(start, torch.float32), optim=Optim(), num_steps=1, tokens_per_micro_batch=64, dtype=dtype
            )
            before = learner.weights(torch.float32)
            if is_itself:
                check_self_distillation(learner, objective, probes)
            else:
                with pytest.raises(RecipeError, match=r"the student as its own teacher: KL.* = [1-9]\.\d+ nats"):
                    check_self_distillation(learner, objective, probes)
            assert all(torch.equal(tensor, before[name]) for name, tensor in learner.weights(torch.float32).items())
        with pytest.raises(KeyError):
            opened.store.get(f"{ITSELF}-0")


def test_a_student_may_start_at_the_mean_of_the_sft_models(session, tmp_path):
    recipe = session.recipe
    weights = {"vowels": 1.0, "digits": 3.0}
    domains = {name: domain.replace(weight=weights[name], sft=SFT()) for name, domain in recipe.domains.items()}
    session.recipe = recipe.replace(domains=domains, distill=recipe.distill.replace(start="sft_mean"))
    session.base_path = session.recipe.model.path
    paths = {
        name: save_tiny_model(session.run.stage(f"sft-{name}").final, seed=seed) for seed, name in enumerate(weights, 1)
    }
    for name in weights:
        session.run.stage(f"sft-{name}").mark_done({})
    stage = session.run.stage("distill")
    found = load_model(sft_mean(session, stage), torch.float32).state_dict()
    first, second = (load_model(path, torch.float32).state_dict() for path in paths.values())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.25 * first[name] + 0.75 * second[name], rtol=1e-2, atol=1e-3)
    written = (stage.start / "model.safetensors").stat().st_mtime_ns
    sft_mean(session, stage)
    assert (stage.start / "model.safetensors").stat().st_mtime_ns == written

    without = {name: domain.replace(sft=None) for name, domain in domains.items()}
    with pytest.raises(ValueError, match=r"distill\.start = 'sft_mean' and no domain has sft"):
        session.recipe.replace(domains=without)


def test_a_stage_killed_right_after_its_end_is_tidied_up_when_the_run_goes_on(session):
    directory = session.run.stage("sft-vowels")
    for folder in (directory.checkpoints, directory.judges):
        folder.mkdir(parents=True)
    directory.mark_done({"seconds": 1.0})
    for _ in range(2):
        _run_stage(session, Stage(kind="sft", subject="vowels"))
    assert not directory.checkpoints.exists()
    assert not directory.judges.exists()
    assert [event["kind"] for event in session.run.read_events()] == [EventKind.STAGE_FINISHED]


def test_a_specialist_without_reinforcement_is_measured_once(session):
    sft = {"vowels": "v/sft", "digits": "d/sft"}
    found = list(contestants(session, sft, {"vowels": "v/sft", "digits": "d/grpo"}, "student"))
    assert [(c.model, c.path) for c in found if c.domain == "vowels"][1:] == [
        ("specialist", "v/sft"),
        ("student", "student"),
    ]
    assert [c.path for c in found if c.domain == "digits"][1:] == ["d/sft", "d/grpo", "student"]


def test_contestants_draw_the_same_numbers_in_boxes_of_their_own(session):
    asked: dict[str, list[GroupJob]] = {}

    class Stops:
        """Takes the jobs and plays none."""

        def play(self, jobs: list[GroupJob]) -> None:
            asked[jobs[0].player] = jobs
            raise InterruptedError

    session.rollouts = Stops()
    for model in ("base", "student"):
        with pytest.raises(InterruptedError):
            evaluate(session, Contestant(model=model, path="", domain="digits"))
    assert [job.id for job in asked["base"]] == [job.id for job in asked["student"]]
    assert {job.player for job in asked["student"]} == {"student"}


def test_no_episode_is_longer_than_the_models_window(session):
    task = Task(id="t", domain="vowels", prompt=({"role": "user", "content": "a"},), sandbox=SandboxSpec())
    assert session.job("j", task, num_rollouts=1).play.max_sequence_tokens == 64
    vowels = session.recipe.domains["vowels"].replace(max_sequence_tokens=100_000)
    session.recipe = session.recipe.replace(domains={"vowels": vowels})
    assert session.job("j", task, num_rollouts=1).play.max_sequence_tokens == session.window == 256


def test_metrics_of_several_optimizer_steps_are_counted_or_averaged():
    assert merge_updates([]) == {}
    updates = [{"loss": 1.0, "tokens": 3.0}, {"loss": 2.0, "tokens": 5.0, "kl": 4.0}]
    assert merge_updates(updates) == {"loss": 1.5, "tokens": 8.0, "kl": 4.0}
