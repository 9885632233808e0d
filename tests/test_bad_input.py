"""What goes wrong at the edge: each mistake gets its own message, and none of them a traceback."""

from __future__ import annotations

import asyncio
import errno
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from posttrain.cli import main
from posttrain.config import GRPO, SFT, Lora, Model, Optim, Recipe, Workers
from posttrain.errors import RecipeError, SandboxUnavailable
from posttrain.learner.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from posttrain.learner.learner import Learner
from posttrain.learner.objectives import GrpoObjective
from posttrain.loader import load_recipe
from posttrain.models import context_window, load_model
from posttrain.pipeline import Stage, _run_stage
from posttrain.preflight import check_disk, check_recipe
from posttrain.protocols import Demonstration, Sandbox
from posttrain.rollout.environments import SingleTurn, ToolUse
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.rollout.samples import group_advantage_rows, grpo_samples
from posttrain.runs.history import warnings
from posttrain.runs.metrics import MetricsLog
from posttrain.runs.progress import Progress
from posttrain.runs.rundir import RunDir
from posttrain.stages.session import Session
from posttrain.tasks import DatasetTasks
from posttrain.types import Group, Request, Rollout, Sampling, SandboxSpec, Score, Task, TokenArrays
from sandbox.process import Process
from teachers.sources import HFTeacher
from tests.test_posttrain_chat import FORGETFUL
from tests.tiny_models import END, Reply, ScriptedEngine, save_tiny_model, tiny_chat

RECIPE = str(Path(__file__).parent / "mini_recipe.py")


@pytest.fixture
def recipe(tiny_model: str) -> Recipe:
    return load_recipe(RECIPE, [f"model.path={tiny_model}"])


def with_vowels(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.replace(domains={**recipe.domains, "vowels": recipe.domains["vowels"].replace(**changes)})


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["run", "quikstart"], ["unknown recipe 'quikstart'", "Did you mean 'quickstart'", "Recipes: "]),
        (["run", "./absent.py"], ["recipe file absent.py does not exist"]),
        (
            ["run", RECIPE, "--set", "domains.vowels.grpo.max_stepz=3"],
            ["no field 'max_stepz'", "did you mean 'max_steps'"],
        ),
        (["run", RECIPE, "--set", "domains.vowel.weight=3"], ["no field 'vowel'", "did you mean 'vowels'"]),
        (["run", RECIPE, "--set", "domains.vowels.grpo.max_steps=soon"], ["max_steps=soon", "valid integer"]),
        (["run", RECIPE, "--set", "domains.vowels.grpo.max_steps=0"], ["max_steps=0", "greater than or equal to 1"]),
        (["run", RECIPE, "--set", "seed"], ["expected path=value"]),
        (["run", RECIPE, "--set", "model.path=/no/such/model"], ["/no/such/model", "nothing at", "config.json"]),
        (["report", "/no/such/run"], ["/no/such/run is not a run directory"]),
    ],
)
def test_the_command_line_answers_a_mistake_with_one_line(arguments, parts, capsys, tmp_path):
    extra = ["--run-dir", str(tmp_path / "run")] if arguments[0] == "run" else []
    assert main([*arguments, *extra]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("posttrain: ")
    assert captured.err.count("\n") == 1
    for part in parts:
        assert part in captured.err
    assert not (tmp_path / "run").exists()


def test_a_mistake_leaves_the_process_with_status_2_and_no_traceback():
    command = [sys.executable, "-m", "posttrain.cli", "run", "./absent.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("posttrain: recipe file absent.py does not exist")
    assert len(done.stderr.splitlines()) == 1


def test_a_sound_recipe_passes(recipe):
    check_recipe(recipe)


def test_a_teacher_with_another_vocabulary_is_refused_before_anything_is_trained(recipe, tiny_model, tmp_path):
    shifted = save_tiny_model(tmp_path / "shifted", extra=["<new>"])
    check_recipe(with_vowels(recipe, teacher=HFTeacher(tiny_model), sft=None, grpo=None))
    with pytest.raises(RecipeError, match=r"domains\.vowels\.teacher = .*its vocabulary or chat template differs"):
        check_recipe(with_vowels(recipe, teacher=HFTeacher(shifted), sft=None, grpo=None))


def test_a_missing_teacher_is_found_before_anything_is_trained(recipe, tmp_path):
    with pytest.raises(RecipeError, match="nothing at"):
        check_recipe(with_vowels(recipe, teacher=HFTeacher(str(tmp_path / "gone")), sft=None, grpo=None))


def test_a_domain_that_nothing_teaches_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"domains\.vowels has no teacher for distill"):
        check_recipe(with_vowels(recipe, sft=None, grpo=None))


@dataclass(frozen=True)
class GivenTasks:
    """Exactly these tasks."""

    training: tuple[Task, ...]
    held: tuple[Task, ...]

    def train(self, *, seed: int) -> Iterable[Task]:
        return self.training

    def heldout(self, *, count: int) -> Sequence[Task]:
        return self.held[:count]

    def demonstrations(self, *, count: int, seed: int) -> Sequence[Demonstration]:
        return ()


def task(name: str, *, domain: str = "vowels", prompt: str = "q", sandbox: SandboxSpec | None = None) -> Task:
    return Task(id=name, domain=domain, prompt=({"role": "user", "content": prompt},), sandbox=sandbox)


@pytest.mark.parametrize(
    ("training", "held", "message"),
    [
        ((), (task("b"),), "has no train tasks"),
        ((task("a"),), (), "has no heldout tasks"),
        ((task("a"),), (task("a"),), "task 'a' is in both train and heldout"),
        ((task("a", domain="maths"),), (task("b"),), "yields tasks of domain 'maths'; expected 'vowels'"),
        (
            (task("a", prompt="x" * 70),),
            (task("b"),),
            r"prompt of task 'a' has 73 tokens but max_sequence_tokens is 64",
        ),
    ],
)
def test_tasks_that_cannot_be_used_are_refused(recipe, training, held, message):
    with pytest.raises(RecipeError, match=message):
        check_recipe(with_vowels(recipe, tasks=GivenTasks(training, held)))


def test_a_prompt_beyond_the_models_own_window_is_refused(recipe, tiny_model):
    window = context_window(tiny_model)
    long = GivenTasks((task("a", prompt="x" * window),), (task("b"),))
    with pytest.raises(RecipeError, match=rf"tokens but the model's own window is {window}"):
        check_recipe(with_vowels(recipe, tasks=long, max_sequence_tokens=2 * window))


def test_vllm_is_asked_for_only_where_it_can_do_what_the_recipe_wants(recipe, monkeypatch):
    asked = recipe.replace(workers=Workers(engine="vllm"))
    with pytest.raises(RecipeError, match=r"vLLM is missing; pip install 'posttrain\[vllm\]'"):
        check_recipe(asked)
    monkeypatch.setattr("posttrain.preflight.importlib.util.find_spec", lambda name: object())
    mixed = with_vowels(asked, sampling=Sampling(top_k=5, max_tokens=4))
    with pytest.raises(RecipeError, match=r"domains\.digits\.sampling\.top_k = 0"):
        check_recipe(mixed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": Sampling(temperature=0)}, r"domains\.vowels\.sampling has temperature = 0"),
        (
            {"sampling": Sampling(top_p=0.9), "grpo": GRPO(keep_sampling_mask=False)},
            r"top_p = 0\.9.*keep_sampling_mask is off",
        ),
        ({"sft": SFT(max_length=3)}, r"domains\.vowels\.sft: demonstration 0 has \d+ tokens but max_length = 3"),
        ({"tasks": GivenTasks((task("a"),), (task("b"),))}, r"domains\.vowels\.sft: demonstrations is empty"),
    ],
)
def test_training_that_cannot_work_is_refused_before_the_run(recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        check_recipe(with_vowels(recipe, **changes))


def test_a_template_that_rewrites_history_is_refused_for_several_turns(recipe, tiny_model, tmp_path):
    forgetful = tmp_path / "forgetful"
    shutil.copytree(tiny_model, forgetful)
    tokenizer = AutoTokenizer.from_pretrained(forgetful)
    tokenizer.chat_template = FORGETFUL.replace("<|im_end|>", "<|end|>")
    tokenizer.save_pretrained(forgetful)
    recipe = recipe.replace(model=Model(path=str(forgetful)))
    check_recipe(recipe)
    with pytest.raises(RecipeError, match=r"domains\.vowels takes 2 turns: chat template .* only appends"):
        check_recipe(with_vowels(recipe, environment=ToolUse(max_turns=2)))


def test_adapters_without_peft_are_refused(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'posttrain\[peft\]'"):
        check_recipe(recipe.replace(model=recipe.model.replace(lora=Lora())))


def test_an_empty_data_file_is_refused(recipe, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    tasks = DatasetTasks(domain="vowels", path=str(tmp_path / "rows.jsonl"))
    with pytest.raises(RecipeError, match=r"rows\.jsonl' is empty; expected at least one row"):
        check_recipe(with_vowels(recipe, tasks=tasks))


def test_a_missing_sandbox_is_found_before_the_run(recipe, monkeypatch, tmp_path):
    boxed = GivenTasks((task("a", sandbox=SandboxSpec()),), (task("b"),))
    asking = with_vowels(recipe, tasks=boxed)
    with pytest.raises(SandboxUnavailable, match=r"needs a sandbox but the recipe has no substrate"):
        check_recipe(asking)
    with pytest.raises(SandboxUnavailable, match="absent-bwrap or /usr/bin/python3 is missing; install bubblewrap"):
        check_recipe(asking.replace(substrate=Process(binary="absent-bwrap")))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match="bwrap or /usr/bin/python3 is missing"):
        check_recipe(asking.replace(substrate=Process()))


@dataclass(frozen=True)
class BreaksOnX:
    """Counts letters; raises when one of them is an x."""

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        if "x" in rollout.text:
            raise ZeroDivisionError("no words")
        return Score(value=float(len(rollout.text)))


def play(*replies: Reply) -> Group:
    """A group with one rollout for each reply."""

    def reply(request: Request) -> Reply:
        return replies[int(request.id.split("/")[1])]

    player = Player(
        engine=ScriptedEngine(reply),
        judge_engine=None,
        chat=tiny_chat(),
        substrate=None,
        workers=Workers(max_retries=0),
    )
    how = Play(environment=SingleTurn(), reward=BreaksOnX(), sampling=Sampling(), max_sequence_tokens=64)
    job = GroupJob(id="g", task=task("t"), num_rollouts=len(replies), play=how, seed=0)
    return asyncio.run(player.play([job]))[0]


def test_a_raising_reward_and_an_empty_completion_go_through_a_training_step(tiny_model):
    group = play("x", [END], "ab", RuntimeError("engine"))
    assert [score.value for score in group.scores] == [None, 0.0, 2.0, None]
    assert "ZeroDivisionError: no words" in group.scores[0].error
    assert group.rollouts[1].text == ""
    config = GRPO(optim=Optim(learning_rate=1e-3))
    samples = grpo_samples([group], group_advantage_rows([group], config, min_group_size=2), config)
    assert [(sample.id, sample.num_loss_tokens) for sample in samples] == [("g/1", 1), ("g/2", 3)]
    model = load_model(tiny_model, torch.float32)
    learner = Learner(model, optim=config.optim, num_steps=1, tokens_per_micro_batch=256)
    before = learner.weights(torch.float32)
    metrics = learner.update(samples, GrpoObjective(config=config, max_completion_tokens=16, temperature=1.0))
    assert np.isfinite(metrics["loss"])
    assert metrics["loss_tokens"] == 4
    after = learner.weights(torch.float32)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_stage_in_which_nothing_can_be_scored_stops_and_one_failure_is_reported(recipe, tmp_path):
    run = RunDir(tmp_path)
    session = Session(recipe=recipe, run=run, metrics=MetricsLog(run), progress=Progress())
    session.check_scored(run.stage("grpo-vowels"), [play("a", "b")])
    assert warnings(run.read_events()) == []
    for _ in range(2):
        session.check_scored(run.stage("grpo-vowels"), [play("a", "x")])
    (warning,) = warnings(run.read_events())
    assert warning.startswith("grpo-vowels: 1 of 2 rollouts failed or could not be scored, first: ZeroDivisionError")
    with pytest.raises(RecipeError, match=r"grpo-vowels: 2 of 2 .*: no words; mend that and .*--resume"):
        session.check_scored(run.stage("grpo-vowels"), [play("x", "xx")])


@pytest.mark.parametrize("name", ["loss_mask", "logprobs", "versions"])
def test_a_mask_of_the_wrong_length_is_never_padded(name):
    arrays = {
        "loss_mask": np.array([False, True, True]),
        "logprobs": np.zeros(3, np.float32),
        "versions": np.zeros(3, np.int32),
    }
    arrays[name] = arrays[name][:2]
    with pytest.raises(ValueError, match=f"{name} has 2 entries for 3 tokens"):
        TokenArrays(token_ids=np.arange(3, dtype=np.int32), **arrays)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path):
    state = {"model": {"w": torch.arange(50_000)}}
    first = save_checkpoint(tmp_path, step=1, state=state, caller={"next_step": 1})
    with largest_file(100_000), pytest.raises(OSError, match=r"no room for the checkpoint: .* bytes needed") as problem:
        save_checkpoint(tmp_path, step=2, state=state, caller={"next_step": 2})
    assert problem.value.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    assert "the last complete checkpoint is intact" in str(problem.value)
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert latest_checkpoint(tmp_path) == first
    kept = load_checkpoint(first)
    assert (kept.step, kept.caller) == (1, {"next_step": 1})
    assert torch.equal(kept.state["model"]["w"], state["model"]["w"])


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("I/O error: No space left on device")])
def test_a_full_disk_has_a_remedy_whichever_library_meets_it(recipe, tmp_path, monkeypatch, error):
    def fail(*_: object) -> None:
        raise error

    run = RunDir(tmp_path)
    session = Session(recipe=recipe, run=run, metrics=MetricsLog(run), progress=Progress())
    monkeypatch.setattr("posttrain.stages.sft.run_sft_stage", fail)
    with pytest.raises(OSError, match=r"stage sft-vowels: the disk of .* is full .* --resume"):
        _run_stage(session, Stage(kind="sft", subject="vowels"))


def test_too_small_a_disk_is_refused_beforehand(tmp_path):
    check_disk(tmp_path, needed_bytes=1)
    with pytest.raises(OSError, match="MiB free but this run writes about"):
        check_disk(tmp_path, needed_bytes=1 << 60)


def test_a_prompt_longer_than_the_window_only_loses_its_own_rollouts():
    """Preflight looks at the first tasks of an endless source; a later one may still be too long."""
    how = Play(environment=SingleTurn(), reward=BreaksOnX(), sampling=Sampling(), max_sequence_tokens=16)
    jobs = [
        GroupJob(id=f"g{i}", task=task(f"t{i}", prompt=prompt), num_rollouts=2, play=how, seed=0)
        for i, prompt in enumerate(("q", "q" * 40))
    ]
    player = Player(
        engine=ScriptedEngine(lambda request: "ab"),
        judge_engine=None,
        chat=tiny_chat(),
        substrate=None,
        workers=Workers(max_retries=0),
    )
    groups = asyncio.run(player.play(jobs))
    assert [[score.value for score in group.scores] for group in groups] == [[2.0, 2.0], [None, None]]
    for rollout in groups[1].rollouts:
        assert "raise Domain.max_sequence_tokens or shorten the prompt" in rollout.error


def test_cispo_without_a_cap_of_its_own_is_refused():
    for cap in (None, 0.28):
        with pytest.raises(ValueError, match=r"epsilon_high.*absolute cap"):
            GRPO(loss_type="cispo", epsilon_high=cap)
    assert GRPO(loss_type="cispo", epsilon_high=5.0).epsilon_high == 5.0
