"""The learner: one step of one mini-batch, whatever the packing, and checkpoints that continue bit for bit."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from posttrain.config import GRPO, Distill, Lora, Optim
from posttrain.errors import RecipeError
from posttrain.learner.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from posttrain.learner.distillation import DistillObjective
from posttrain.learner.learner import Learner
from posttrain.learner.objectives import GrpoObjective
from posttrain.learner.packing import PackedBatch
from posttrain.learner.policy import Policy
from posttrain.protocols import OpenTeachers, Teacher
from posttrain.stages.grpo import learn
from posttrain.types import Sample, TokenArrays, Tokens

VOCABULARY = 60


def tiny_llama(*, seed: int = 0, width: int = 32, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def token_ids(sample: Sample, model: PreTrainedModel) -> torch.Tensor:
    """[1, T], where the model is: a learner takes its model to the GPU if there is one."""
    return torch.tensor(sample.load().token_ids[None].astype(np.int64), device=model.device)


def token_logprobs(model: PreTrainedModel, sample: Sample) -> torch.Tensor:
    """The obvious way: all logits of one unpadded sequence."""
    ids = token_ids(sample, model)
    logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu()
    return logprobs[torch.tensor(sample.load().loss_mask[1:])]


def make_samples(
    model: PreTrainedModel, count: int = 12, *, teachers: tuple[str | None, ...] = (None,)
) -> list[Sample]:
    """Random sequences of ragged length with the model's own log-probabilities, and alternating advantages."""
    rng = np.random.default_rng(7)
    samples = []
    for index in range(count):
        length = int(rng.integers(6, 24))
        mask = np.arange(length) >= 3
        arrays = TokenArrays(
            token_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
            loss_mask=mask,
            logprobs=np.full(length, np.nan, np.float32),
            versions=np.where(mask, 0, -1).astype(np.int32),
        )
        sample = Sample(
            id=f"sample-{index}",
            task_id=f"task-{index}",
            domain=("math", "code")[index % 2],
            tokens=Tokens.of(arrays),
            advantage=(1.0, -0.5)[index % 2],
            teacher=teachers[index % len(teachers)],
        )
        with torch.no_grad():
            arrays.logprobs[mask] = token_logprobs(model, sample).numpy()
        samples.append(sample)
    return samples


def make_learner(
    model: PreTrainedModel,
    *,
    budget: int = 64,
    lr: float = 1e-2,
    dtype: torch.dtype = torch.float32,
    lora: Lora | None = None,
    keep_reference: bool = False,
) -> Learner:
    optim = Optim(learning_rate=lr, lr_scheduler_type="linear", warmup_steps=2, weight_decay=0.01)
    return Learner(
        model,
        optim=optim,
        num_steps=40,
        tokens_per_micro_batch=budget,
        dtype=dtype,
        lora=lora,
        keep_reference=keep_reference,
    )


def grpo(**changes: object) -> GrpoObjective:
    return GrpoObjective(config=GRPO(**changes), max_completion_tokens=24)


class DictStore:
    """A state store in a dictionary."""

    def __init__(self) -> None:
        self.states: dict[str, torch.Tensor] = {}

    def put(self, key: str, states: torch.Tensor) -> None:
        self.states[key] = states.to(torch.bfloat16)

    def get(self, key: str) -> torch.Tensor:
        return self.states[key]

    def free(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.states.pop(key, None)


class NoLibrary:
    """Satisfies a recipe's field; the objective is handed states and heads directly."""

    def from_checkpoint(self, path: str) -> Teacher:
        raise NotImplementedError

    def open(self, teachers: Mapping[str, Teacher], *, student_path: str) -> AbstractContextManager[OpenTeachers]:
        raise NotImplementedError


@torch.no_grad()
def distill_objective(samples: list[Sample], teachers: dict[str, PreTrainedModel]) -> DistillObjective:
    store = DictStore()
    for sample in samples:
        assert sample.teacher is not None
        ids = token_ids(sample, teachers[sample.teacher])
        hidden_TD = teachers[sample.teacher].get_decoder()(ids).last_hidden_state[0]
        store.put(sample.id, hidden_TD[:-1][torch.tensor(sample.load().loss_mask[1:])])
    heads = {name: teacher.lm_head.weight.detach() for name, teacher in teachers.items()}
    config = Distill(teachers=NoLibrary(), loss_chunk_tokens=16)
    return DistillObjective(config=config, states=store, head_of=heads.__getitem__)


@pytest.mark.parametrize("tied", [True, False])
def test_one_step_equals_full_logits_on_unpadded_samples(tied: bool) -> None:
    plain = tiny_llama(tied=tied)
    samples = make_samples(plain)
    learner = make_learner(tiny_llama(tied=tied), budget=50)
    metrics = learner.update(samples, grpo())

    num_tokens = sum(sample.num_loss_tokens for sample in samples)
    # On policy the ratio is 1, so the gradient is that of the advantage-weighted log-probability.
    for sample in samples:
        (-sample.advantage * token_logprobs(plain, sample).sum() / num_tokens).backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0).item()
    assert metrics["grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert metrics["loss"] == pytest.approx(
        -sum(sample.advantage * sample.num_loss_tokens for sample in samples) / num_tokens, rel=1e-4
    )
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert (metrics["loss_tokens"], metrics["tokens"]) == (num_tokens, sum(map(len, samples)))


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_a_step_does_not_depend_on_the_token_budget(loss_type: str) -> None:
    samples = make_samples(tiny_llama(seed=1))
    results = []
    for budget in (10, 48, 4096):
        learner = make_learner(tiny_llama(), budget=budget)
        first = learner.update(samples, grpo(loss_type=loss_type))
        second = learner.update(samples, grpo(loss_type=loss_type))
        results.append((first, second))
    assert [first["micro_batches"] for first, _ in results] == sorted(
        {first["micro_batches"] for first, _ in results}, reverse=True
    )
    for first, second in results[1:]:
        for name in ("loss", "grad_norm", "ratio", "kl_behaviour", "entropy"):
            assert first[name] == pytest.approx(results[0][0][name], rel=1e-4, abs=1e-6)
            assert second[name] == pytest.approx(results[0][1][name], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_activations_of_a_sample_beyond_the_budget_are_computed_twice_not_kept(lora: Lora | None) -> None:
    samples = make_samples(tiny_llama(), count=1)
    size = len(samples[0])
    plain = make_learner(tiny_llama(), budget=size, lora=lora)
    twice = make_learner(tiny_llama(), budget=size - 1, lora=lora)
    batch = PackedBatch.collate(samples).to(plain.device)
    assert numbers_kept(twice._policy, batch, recompute=True) < numbers_kept(plain._policy, batch, recompute=False) / 3
    for _ in range(2):
        expected, found = (learner.update(samples, grpo()) for learner in (plain, twice))
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    assert numbers_kept(twice._policy, batch, recompute=False) == numbers_kept(plain._policy, batch, recompute=False)


def numbers_kept(policy: Policy, batch: PackedBatch, *, recompute: bool) -> int:
    """Elements of all tensors that a forward pass keeps for the backward pass."""
    kept: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        policy.forward(batch, recompute=recompute)
    return sum(kept)


def test_grpo_raises_the_good_and_lowers_the_bad() -> None:
    model = tiny_llama()
    samples = make_samples(model)
    learner = make_learner(model)
    for _ in range(3):  # the first step of the warm-up has learning rate 0
        learner.update(samples, grpo())
    after = make_samples(model)
    sums_before, sums_after = ([np.nansum(sample.load().logprobs) for sample in each] for each in (samples, after))
    change = np.subtract(sums_after, sums_before)
    assert min(change[0::2]) > 0
    assert np.mean(change[1::2]) < 0


def test_distillation_approaches_teachers_of_another_width() -> None:
    model = tiny_llama()
    samples = make_samples(model, teachers=("b", "a"))
    teachers = {"a": tiny_llama(seed=3, width=40), "b": tiny_llama(seed=4, width=24)}
    objective = distill_objective(samples, teachers)
    visited: list[str] = []

    def head_of(name: str) -> torch.Tensor:
        visited.append(name)
        return teachers[name].lm_head.weight.detach()

    learner = make_learner(model, budget=40)
    with torch.no_grad():
        kls = [slow_kl(model, teachers[str(sample.teacher)], sample) for sample in samples]
    first = learner.update(samples, replace(objective, head_of=head_of))
    assert visited == sorted(visited)
    # The store holds bfloat16, hence the tolerance.
    assert first["loss"] == pytest.approx(torch.cat(kls).mean().item(), rel=2e-2)
    assert first["kl/math"] == pytest.approx(torch.cat(kls[0::2]).mean().item(), rel=2e-2)
    assert first["kl/code"] == pytest.approx(torch.cat(kls[1::2]).mean().item(), rel=2e-2)
    for _ in range(20):
        last = learner.update(samples, objective)
    assert last["kl"] < 0.5 * first["kl"]


def slow_kl(student: PreTrainedModel, teacher: PreTrainedModel, sample: Sample) -> torch.Tensor:
    p, q = (model(token_ids(sample, model)).logits[0, :-1].log_softmax(-1).cpu() for model in (student, teacher))
    return (p.exp() * (p - q)).sum(-1)[torch.tensor(sample.load().loss_mask[1:])]


def test_distillation_weighs_each_sample_by_its_teacher() -> None:
    samples = make_samples(tiny_llama(), teachers=("a",))
    objective = distill_objective(samples, {"a": tiny_llama(seed=3)})
    plain = make_learner(tiny_llama()).update(samples, objective)
    heavy = make_learner(tiny_llama()).update([replace(sample, weight=3.0) for sample in samples], objective)
    assert heavy["loss"] == pytest.approx(3 * plain["loss"])
    assert heavy["kl"] == pytest.approx(plain["kl"])


def test_distillation_names_samples_with_bad_states() -> None:
    samples = make_samples(tiny_llama(), teachers=("a",))
    objective = distill_objective(samples, {"a": tiny_llama(seed=3)})
    learner = make_learner(tiny_llama())
    objective.states.put("sample-3", torch.full_like(objective.states.get("sample-3"), torch.nan))
    with pytest.raises(FloatingPointError, match=r"\['sample-3'\]"):
        learner.update(samples, objective)
    objective.states.put("sample-3", objective.states.get("sample-3")[:-1])
    with pytest.raises(ValueError, match=r"sample-3.*expected one per loss token"):
        learner.update(samples, objective)
    with pytest.raises(ValueError, match="name no teacher"):
        learner.update([replace(sample, teacher=None) for sample in samples], objective)


def test_master_weights_stay_float32_and_small_updates_land() -> None:
    model = tiny_llama()
    samples = make_samples(model)
    learner = make_learner(model, lr=1e-6, dtype=torch.bfloat16)
    before = learner.weights(torch.float32)
    for _ in range(2):
        metrics = learner.update(samples, grpo())
    assert metrics["ratio"] == pytest.approx(1.0, abs=0.02)
    after = learner.weights(torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    assert moved > 0.9 * sum(tensor.numel() for tensor in before.values())
    assert {tensor.dtype for tensor in learner.weights(torch.bfloat16).values()} == {torch.bfloat16}


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = tiny_llama()
    samples = make_samples(model)
    learner = make_learner(model, budget=30)
    learner.update(samples, grpo())
    before = learner.weights(torch.float32)
    poisoned = [replace(sample, advantage=float("nan")) if sample.id == "sample-5" else sample for sample in samples]
    with pytest.raises(FloatingPointError, match="sample-5"):
        learner.update(poisoned, grpo())
    huge = [replace(sample, advantage=3e38) for sample in samples]
    with pytest.raises(FloatingPointError, match="sample-"):
        learner.update(huge, grpo())
    assert learner.step == 1
    for name, tensor in learner.weights(torch.float32).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert np.isfinite(learner.update(samples, grpo())["loss"])
    silent = [replace(sample, silent=True) for sample in samples]
    with pytest.raises(ValueError, match="none of the 12 samples"):
        learner.update(silent, grpo())


@pytest.mark.parametrize("lora", [None, Lora(rank=4)])
def test_the_reference_is_the_model_at_the_start(lora: Lora | None) -> None:
    samples = make_samples(tiny_llama())
    learner = make_learner(tiny_llama(), lora=lora, keep_reference=True)
    batch = PackedBatch.collate(samples).to(learner.device)
    at_start = learner.reference(batch).hidden_ND
    objective = GrpoObjective(config=GRPO(beta=0.1), max_completion_tokens=24, reference=learner.reference)
    kls = [learner.update(samples, objective)["kl_ref"] for _ in range(4)]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert kls[-1] > 1e-4
    torch.testing.assert_close(learner.reference(batch).hidden_ND, at_start, rtol=0, atol=0)


@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_the_reference_moves_when_it_is_due_and_is_resumed_bit_for_bit(tmp_path: Path, alpha: float) -> None:
    model = tiny_llama()
    samples = make_samples(model)
    config = GRPO(beta=0.1, sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=alpha, num_iterations=3)

    def steps(learner: Learner, count: int) -> list[float]:
        objective = GrpoObjective(config=config, max_completion_tokens=24, reference=learner.reference)
        return [learn(learner, objective, samples, config, seed=str(learner.step))["kl_ref"] for _ in range(count)]

    learner = make_learner(model, keep_reference=True)
    batch = PackedBatch.collate(samples).to(learner.device)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # Three optimizer steps, and the reference moved after the second.
    weights = []
    objective = GrpoObjective(config=config, max_completion_tokens=24, reference=learner.reference)
    for _ in range(2):
        learner.update(samples, objective)
        weights.append(learner.weights(torch.float32))
    again = make_learner(tiny_llama(), keep_reference=True)
    steps(again, 1)
    moved = tiny_llama()
    moved.load_state_dict({n: alpha * weights[1][n] + (1 - alpha) * start[n] for n in weights[1]}, strict=False)
    expected = Policy(moved, dtype=torch.float32, lora=None, keep_reference=False, seed=0)
    with torch.no_grad():
        torch.testing.assert_close(again.reference(batch).hidden_ND, expected.forward(batch).hidden_ND)

    path = again.save_checkpoint(tmp_path)
    whole = steps(again, 3)
    resumed = make_learner(tiny_llama(), keep_reference=True)
    resumed.load_checkpoint(path)
    assert steps(resumed, 3) == whole
    with pytest.raises(RecipeError, match="sync_ref_model with"):
        make_learner(tiny_llama(), lora=Lora(rank=2)).sync_reference(0.5)


def test_a_missing_reference_is_an_error() -> None:
    with pytest.raises(RecipeError, match="keep_reference=True"):
        grpo(beta=0.1)
    samples = make_samples(tiny_llama())
    with pytest.raises(ValueError, match="kept no reference"):
        make_learner(tiny_llama()).reference(PackedBatch.collate(samples))


def test_adapters_train_alone_and_merge_into_plain_weights() -> None:
    model = tiny_llama()
    samples = make_samples(model)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    learner = make_learner(model, lora=Lora(rank=4))
    for _ in range(4):
        learner.update(samples, grpo())
    weights = {name: tensor.cpu() for name, tensor in learner.weights(torch.float32).items()}
    assert set(weights) == set(start)
    changed = {name for name in start if not torch.equal(weights[name], start[name])}
    assert changed == {name for name in start if "proj" in name}
    merged = tiny_llama()
    merged.load_state_dict(weights, strict=False)
    model.eval()
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, model(ids.to(model.device)).logits.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [None, Lora(rank=4, dropout=0.2)])
def test_resuming_gives_the_same_metrics_bit_for_bit(tmp_path: Path, lora: Lora | None) -> None:
    samples = make_samples(tiny_llama())

    def run(learner: Learner, steps: int) -> list[dict[str, float]]:
        history = [learner.update(samples, grpo()) for _ in range(steps)]
        return [{name: value for name, value in m.items() if name != "tokens_per_s"} for m in history]

    torch.manual_seed(5)
    whole = make_learner(tiny_llama(), lora=lora)
    run(whole, 3)
    path = whole.save_checkpoint(tmp_path, caller={"cursor": 17})
    expected = run(whole, 3)
    assert path.name == "step-000003"

    torch.manual_seed(99)
    resumed = make_learner(tiny_llama(), lora=lora)
    assert resumed.load_checkpoint(path) == {"cursor": 17}
    assert resumed.step == 3
    assert run(resumed, 3) == expected
    for name, tensor in whole.weights(torch.float32).items():
        torch.testing.assert_close(resumed.weights(torch.float32)[name], tensor, rtol=0, atol=0)
    if lora is not None:
        names = load_checkpoint(path).state["model"]
        assert names
        assert all("lora_" in name for name in names)
        with pytest.raises(RecipeError, match="lora settings"):
            make_learner(tiny_llama()).load_checkpoint(path)


def test_the_final_checkpoint_is_what_the_engine_saw(tmp_path: Path) -> None:
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")))
    model = tiny_llama()
    learner = make_learner(model, dtype=torch.bfloat16, lora=Lora(rank=2))
    for _ in range(3):
        learner.update(make_samples(tiny_llama()), grpo())
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        learner.save_final(tmp_path / "final", tokenizer, dtype=dtype)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
        assert loaded.dtype == expected
        assert loaded.config._attn_implementation == "sdpa"
        weights = learner.weights(expected)
        assert set(weights) == {name for name, _ in loaded.named_parameters()}
        for name, parameter in loaded.named_parameters():
            torch.testing.assert_close(parameter.detach(), weights[name].cpu(), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "final").vocab_size == VOCABULARY
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_models_with_other_logits_are_refused() -> None:
    torch.manual_seed(0)
    scaled = GraniteForCausalLM(
        GraniteConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            logits_scaling=4.0,
            initializer_range=0.2,
        )
    )
    with pytest.raises(RecipeError, match="not its head times"):
        make_learner(scaled)
    with pytest.raises(RecipeError, match="float32 master weights"):
        make_learner(tiny_llama().to(torch.bfloat16))
    with pytest.raises(RecipeError, match="leave lm_head out"):
        make_learner(tiny_llama(tied=False), lora=Lora(target_modules=("lm_head",)))


def test_checkpoints_are_pruned_and_incomplete_ones_ignored(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step=step, state={"x": torch.full((3,), float(step))}, caller=step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    (tmp_path / "partial-step-000004").mkdir()
    (tmp_path / "step-000009").mkdir()
    newest = latest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-000003"
    assert load_checkpoint(newest).caller == 3
    with (newest / "state.pt").open("ab") as file:
        file.write(b"torn")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000002"
    with pytest.raises(ValueError, match="complete checkpoint"):
        load_checkpoint(newest)


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from posttrain.learner.checkpoint import save_checkpoint
root = Path(sys.argv[1])
save_checkpoint(root, step=1, state={"x": torch.ones(1000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    save_checkpoint(root, step=2, state={"x": torch.ones(1_000_000)})
except OSError as error:
    print(error.errno, error)
"""


def test_a_full_disk_is_named_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    number, _, message = done.stdout.partition(" ")
    assert int(number) == errno.EFBIG
    assert "bytes needed" in message
    assert "step-000002" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert load_checkpoint(newest).state["x"].sum() == 1000
