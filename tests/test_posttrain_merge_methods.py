"""Other ways to make one student of several specialists: the formulas, and whole runs of each way."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config import Distill, MixedRL, Ties, WeightAverage
from posttrain.errors import RecipeError
from posttrain.learner.weight_merging import Checkpoint, WeightMerge, magnitude_threshold, ties_vector
from posttrain.loader import load_recipe
from posttrain.models import load_tokenizer
from posttrain.overrides import apply_overrides
from posttrain.preflight import check_recipe
from posttrain.runs.metrics import MetricsLog, read_metrics
from posttrain.runs.progress import Progress
from posttrain.runs.rundir import RunDir
from posttrain.stages.merge_weights import run_merge_weights_stage
from posttrain.stages.session import Session
from teachers.sources import AdapterTeacher, HFTeacher
from tests.test_posttrain_resume import kill_at, metrics_of, rollouts_of
from tests.tiny_models import save_tiny_model

RECIPE = str(Path(__file__).parent / "mini_merge_recipe.py")


def test_ties_trims_elects_a_sign_and_averages_those_that_agree():
    vectors = [torch.tensor([3.0, -2.0, 0.5, 1.0, -4.0]), torch.tensor([1.0, 3.0, -0.4, -1.0, -2.0])]
    merged = ties_vector(vectors, thresholds=[1.0, 1.0], weights=[1.0, 1.0])
    # Agree; the larger wins; both trimmed; a draw moves nothing; agree.
    assert merged.tolist() == [2.0, 3.0, 0.0, 0.0, -3.0]
    # The first weighs three times: 3 * -2 + 3 < 0, 3 * 1 - 1 > 0; means are weighted, too.
    weighted = ties_vector(vectors, thresholds=[1.0, 1.0], weights=[3.0, 1.0])
    assert weighted.tolist() == [2.5, -2.0, 0.0, 1.0, -3.5]


@pytest.mark.parametrize("density", [1e-9, 0.2, 0.37, 1.0])
def test_the_threshold_is_the_magnitude_that_sorting_finds(density):
    torch.manual_seed(0)
    pieces = [torch.randn(40, 7) * 1e-3, torch.zeros(50), torch.randn(101) * 30]
    everything = torch.cat([piece.flatten() for piece in pieces]).abs().sort(descending=True).values
    kept = math.ceil(density * len(everything))
    assert magnitude_threshold(lambda: iter(pieces), density) == everything[kept - 1].item()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base in several files, as large models are, and two specialists."""
    root = tmp_path_factory.mktemp("merge")
    paths = [save_tiny_model(root / name, seed=seed) for seed, name in enumerate(("base", "vowels", "digits"))]
    model = AutoModelForCausalLM.from_pretrained(paths[0])
    (root / "base" / "model.safetensors").unlink()
    model.save_pretrained(paths[0], max_shard_size="20KB")
    assert len(list((root / "base").glob("model-*.safetensors"))) > 1
    return paths


def flat(path: str | Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return torch.cat([tensor.detach().flatten() for _, tensor in sorted(model.named_parameters())])


def merged(
    models: Sequence[str], config: WeightAverage | Ties, weights: tuple[float, float], out: Path
) -> torch.Tensor:
    base, vowels, digits = models
    with Checkpoint(base) as start, Checkpoint(vowels) as first, Checkpoint(digits) as second:
        merge = WeightMerge(
            base=start,
            specialists={"vowels": first, "digits": second},
            weights={"vowels": weights[0], "digits": weights[1]},
        )
        measured = merge.write(out, config, load_tokenizer(base), torch.float32)
    assert 0 < measured["moved"] <= 1
    return flat(out)


def test_an_average_is_the_weighted_mean_of_the_specialists(models, tmp_path):
    base, vowels, digits = map(flat, models)
    whole = merged(models, WeightAverage(), (3.0, 1.0), tmp_path / "out")
    torch.testing.assert_close(whole, 0.75 * vowels + 0.25 * digits, atol=1e-6, rtol=0)
    half = merged(models, WeightAverage(scale=0.5), (1.0, 1.0), tmp_path / "out")
    torch.testing.assert_close(half, base + 0.5 * ((vowels + digits) / 2 - base), atol=1e-6, rtol=0)
    assert not list(tmp_path.glob("partial-*"))


def test_ties_follows_the_paper_on_whole_task_vectors(models, tmp_path):
    base, *specialists = map(flat, models)
    expected = torch.zeros_like(base)
    trimmed = []
    for specialist in specialists:
        vector = specialist - base
        kept = vector.abs().topk(math.ceil(0.3 * len(vector))).indices
        trimmed.append(torch.zeros_like(vector).index_copy(0, kept, vector[kept]))
    for entry in (trimmed[0] + trimmed[1]).nonzero().flatten().tolist():
        values = [vector[entry].item() for vector in trimmed]
        agreeing = [value for value in values if value * sum(values) > 0]
        expected[entry] = sum(agreeing) / len(agreeing)
    got = merged(models, Ties(density=0.3, scale=0.8), (1.0, 1.0), tmp_path / "out")
    torch.testing.assert_close(got, base + 0.8 * expected, atol=1e-6, rtol=0)


def test_the_rounding_of_a_specialists_file_is_no_task_vector(models, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.float32)
    specialist = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.bfloat16)
    with torch.no_grad():
        specialist.model.norm.weight[3] += 1
    specialist.save_pretrained(tmp_path / "rounded")
    with Checkpoint(models[0]) as start, Checkpoint(str(tmp_path / "rounded")) as only:
        merge = WeightMerge(base=start, specialists={"one": only}, weights={"one": 1.0})
        measured = merge.write(tmp_path / "out", Ties(), load_tokenizer(models[0]), torch.float32)
    assert measured["moved"] == 1 / base.num_parameters()
    assert measured["relative_norm"] == 1


def test_models_that_do_not_fit_together_are_refused(models, tmp_path):
    wide = save_tiny_model(tmp_path / "wide", hidden_size=64)
    stranger = r"specialist 'wide'.*model\.embed_tokens\.weight: \(\d+, 64\) / "
    with Checkpoint(models[0]) as start, Checkpoint(wide) as other, pytest.raises(RecipeError, match=stranger):
        WeightMerge(base=start, specialists={"wide": other}, weights={"wide": 1.0})
    (tmp_path / "wide" / "model.safetensors").rename(tmp_path / "wide" / "model.bin")
    with pytest.raises(RecipeError, match=r"no model\.safetensors"):
        Checkpoint(wide)


def test_what_a_way_of_merging_needs_is_checked_before_the_run(models):
    paths = [f"model.path={models[0]}", *(f"domains.{name}.teacher.path={models[1]}" for name in ("vowels", "digits"))]
    for way in ("weight_average", "off_policy"):
        recipe = load_recipe(f"{RECIPE}:{way}", paths)
        check_recipe(recipe)
        adapter = AdapterTeacher(base=HFTeacher(models[0]), adapter=models[1])
        vowels = recipe.domains["vowels"].replace(teacher=adapter)
        with pytest.raises(RecipeError, match=r"domains\.vowels\.teacher = .*a checkpoint by itself"):
            check_recipe(recipe.replace(domains={**recipe.domains, "vowels": vowels}))
    recipe = load_recipe(f"{RECIPE}:mixed_rl", paths)
    with pytest.raises(RecipeError, match=r"sampling\.temperature = \{'vowels': 0\.5, 'digits': 1\.0\}"):
        check_recipe(apply_overrides(recipe, ["domains.vowels.sampling.temperature=0.5"]))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"scale": 0.5}', WeightAverage),
        ('{"density": 0.5}', Ties),
        ('{"grpo": {"max_steps": 3}}', MixedRL),
    ],
)
def test_a_way_of_merging_can_be_chosen_on_the_command_line(text, kind):
    recipe = load_recipe(str(Path(__file__).parent / "mini_recipe.py"), [f"distill={text}"])
    assert type(recipe.distill) is kind
    assert isinstance(load_recipe(f"{RECIPE}:off_policy", ["distill.max_steps=3"]).distill, Distill)


@pytest.fixture(scope="session")
def start_merge(tiny_model: str, mini_run: tuple[Path, str]):
    """Starts a run of one way of merging, from the specialists of the mini run."""
    stages = mini_run[0] / "stages"
    paths = {"model": tiny_model, "domains.vowels.teacher": stages / "grpo-vowels/final"}
    paths["domains.digits.teacher"] = stages / "grpo-digits/final"

    def start(way: str, run_dir: Path, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "posttrain.cli", "run", f"{RECIPE}:{way}", "--run-dir", str(run_dir)]
        for name, path in paths.items():
            command += ["--set", f"{name}.path={path}"]
        return subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return start


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


def test_the_stage_leaves_a_checkpoint_in_the_compute_type_and_what_it_measured(models, tmp_path):
    run = RunDir(tmp_path / "run")
    recipe = load_recipe(f"{RECIPE}:ties", [f"model.path={models[0]}", "model.dtype=bfloat16"])
    stage = run.stage("distill")
    with MetricsLog(run) as metrics, Session(recipe=recipe, run=run, metrics=metrics, progress=Progress()) as session:
        assert isinstance(recipe.distill, Ties)
        run_merge_weights_stage(session, stage, recipe.distill, {"vowels": models[1], "digits": models[2]})
    assert AutoModelForCausalLM.from_pretrained(stage.final, dtype="auto").dtype == torch.bfloat16
    exact = merged(models, recipe.distill, (1.0, 1.0), tmp_path / "exact")
    assert torch.equal(flat(stage.final), exact.bfloat16().float())
    (line,) = read_metrics(run.metrics)
    assert (line["stage"], line["step"], 0 < line["moved"] < 1) == ("distill", 1, True)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_run_averages_weights_and_measures_the_student(start_merge, mini_run, tmp_path):
    finish(start_merge("weight_average", tmp_path / "run", "--set", "evaluation.greedy=false"))
    specialists = [flat(mini_run[0] / f"stages/grpo-{name}/final") for name in ("vowels", "digits")]
    student = flat(tmp_path / "run/stages/distill/final")
    torch.testing.assert_close(student, (specialists[0] + specialists[1]) / 2, atol=1e-6, rtol=0)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [entry["domain"] for entry in report["domains"]] == ["digits", "vowels"]
    for entry in report["domains"]:
        assert None not in [entry[model] for model in ("base", "specialist", "student")]
        assert (entry["n"], entry["greedy"]["n"], entry["greedy"]["student"]) == (2, 0, None)
    assert "greedy decoding" not in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "distillation" not in report["costs"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_off_policy_the_specialists_play_and_a_killed_run_goes_on(start_merge, tmp_path):
    run_dir = tmp_path / "run"
    process = start_merge("off_policy", run_dir)
    kill_at(process, run_dir / "stages/distill", "checkpoints/step-000002")
    finish(start_merge("off_policy", run_dir, "--resume"))
    lines = [line for line in metrics_of(run_dir) if line["stage"] == "distill"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["kl"] < lines[0]["kl"]
    played = [json.loads(line) for line in (run_dir / "stages/distill/rollouts.jsonl").read_text().splitlines()]
    assert len(played) == 5 * 8
    said = {name: [r for r in played if r["domain"] == name] for name in ("vowels", "digits")}
    for name, letter in (("vowels", "a"), ("digits", "7")):
        right = [letter in rollout["conversation"][-1]["content"] for rollout in said[name]]
        other = [letter in rollout["conversation"][-1]["content"] for n in said if n != name for rollout in said[n]]
        assert sum(right) / len(right) > sum(other) / len(other) + 0.1, (name, right, other)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_mixed_rl_learns_from_every_domain_and_a_killed_run_ends_the_same(start_merge, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start_merge("mixed_rl", undisturbed))
    kill_at(start_merge("mixed_rl", killed), killed / "stages/distill", "checkpoints/step-00000[1-9]")
    finish(start_merge("mixed_rl", killed, "--resume"))
    for line in metrics_of(undisturbed):
        assert line["reward"] == pytest.approx((2 * line["reward/vowels"] + line["reward/digits"]) / 3)
    assert metrics_of(killed) == metrics_of(undisturbed)
    rollouts = rollouts_of(undisturbed / "stages/distill")
    assert len(rollouts) == 4 * 3 * 4
    assert rollouts_of(killed / "stages/distill") == rollouts
    weights = Path("stages/distill/final/model.safetensors")
    assert (killed / weights).read_bytes() == (undisturbed / weights).read_bytes()
