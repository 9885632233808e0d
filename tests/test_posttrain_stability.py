"""Each stability option does what it says: clamps, 4-bit weights, Muon, and experts chosen by older weights."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from posttrain.config import GRPO, SFT, AnticipatoryRouting, Model, Optim
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.errors import RecipeError
from posttrain.learner.learner import Learner
from posttrain.learner.objectives import GrpoObjective
from posttrain.learner.packing import PackedBatch
from posttrain.learner.policy import Policy
from posttrain.models import base_path, load_model, load_tokenizer
from posttrain.routing import Routers
from posttrain.stability.anticipatory import SpikeGuard
from posttrain.stability.layers import QUANTISATION, SWIGLU_LIMIT, use_stable_layers
from posttrain.stability.mxfp4 import BLOCK, fake_quantise, quantise
from posttrain.types import Request, Sample, Sampling, TokenArrays, Tokens

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
COMMON = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}


def dense(**entries: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**COMMON, **entries))
    use_stable_layers(model)
    return model


def mixture(**entries: object) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**COMMON, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, **entries)
    model = Qwen3MoeForCausalLM(config)
    for module in model.modules():
        if hasattr(module, "top_k") and hasattr(module, "weight"):
            torch.nn.init.normal_(module.weight, std=0.3)
    use_stable_layers(model)
    return model


MODELS = {"dense": dense, "mixture": mixture}


def samples(count: int = 6) -> list[Sample]:
    rng = np.random.default_rng(7)
    made = []
    for index in range(count):
        length = int(rng.integers(6, 24))
        mask = np.arange(length) >= 3
        arrays = TokenArrays(
            token_ids=rng.integers(0, 60, length).astype(np.int32),
            loss_mask=mask,
            logprobs=np.where(mask, -4.0, np.nan).astype(np.float32),
            versions=np.where(mask, 0, -1).astype(np.int32),
        )
        advantage = (1.0, -0.5)[index % 2]
        made.append(Sample(id=f"s{index}", task_id="t", domain="d", tokens=Tokens.of(arrays), advantage=advantage))
    return made


def learner_of(model: PreTrainedModel, **optim: object) -> Learner:
    settings = Optim(**{"learning_rate": 1e-2, "weight_decay": 0.1, **optim})
    return Learner(model, optim=settings, num_steps=40, tokens_per_micro_batch=100)


OBJECTIVE = GrpoObjective(config=GRPO(epsilon=10.0), max_completion_tokens=24)


def engine_logprobs(model: PreTrainedModel, weights: dict[str, torch.Tensor] | None = None) -> np.ndarray:
    """A few tokens that an engine draws, and their log-probabilities; new weights come to it between two requests."""
    engine = TransformersEngine(model, stop_ids=[])
    asked = Request(id="r", prompt_ids=np.arange(5, dtype=np.int32), sampling=Sampling(max_tokens=20), seed=3)
    if weights is not None:
        asyncio.run(asyncio.wait_for(engine.generate(asked), 60))
        engine.load_weights(weights, 1)
    completion = asyncio.run(asyncio.wait_for(engine.generate(asked), 60))
    engine.close()
    return np.concatenate([completion.token_ids.astype(np.float64), completion.logprobs])


# MXFP4


def test_quantised_values_are_on_the_grid_times_a_power_of_two_per_block():
    torch.manual_seed(0)
    weights = torch.randn(5, 3 * BLOCK + 7) * torch.logspace(-3, 3, 5)[:, None]
    found = quantise(weights)
    padded, values = (torch.nn.functional.pad(x, (0, 25)).double().unflatten(-1, (4, BLOCK)) for x in (weights, found))
    scale = torch.exp2(torch.floor(torch.log2(padded.abs().amax(-1, keepdim=True))) - 2)
    elements = (values / scale).abs()
    assert torch.isin(elements, GRID).all()
    assert elements.amax(-1).unique().tolist() == [4, 6]
    # The nearest of all values of the block's grid, written the slow way.
    signed = torch.cat([-GRID.flip(0), GRID])
    distance = (padded / scale).clamp(-6, 6)[..., None] - signed
    nearest = distance.abs().amin(-1)
    torch.testing.assert_close(((padded / scale).clamp(-6, 6) - values / scale).abs(), nearest, rtol=0, atol=1e-12)
    assert torch.equal(quantise(found), found), "quantising twice is quantising once"
    assert torch.equal(found.bfloat16().float(), found), "and bfloat16 holds it exactly"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0), (7.9, 6.0), (-2.5, -2.0)],
)
def test_ties_go_to_even_and_large_elements_to_six(value, expected):
    block = torch.zeros(BLOCK)
    block[0], block[1] = value, 4.0
    assert float(quantise(block)[0]) == expected


@pytest.mark.parametrize("weights", [torch.zeros(2, BLOCK), torch.full((2, BLOCK), 1e-38), torch.full((1, 3), -3e38)])
def test_blocks_at_the_ends_of_the_range(weights):
    found = quantise(weights)
    assert found.isfinite().all()
    torch.testing.assert_close(found, weights, rtol=0.34, atol=1e-38)


@pytest.mark.parametrize("kind", MODELS)
def test_training_with_mxfp4_gives_masters_the_gradient_of_the_rounded_weights(kind):
    quantised, plain = MODELS[kind](**{QUANTISATION: "mxfp4"}), MODELS[kind]()
    wanted = {
        name: quantise(each.detach())
        for name, each in plain.named_parameters()
        if any(part in name for part in ("gate_proj", "up_proj", "down_proj"))
    }
    assert len(wanted) == (6 if kind == "dense" else 4)
    plain.load_state_dict(wanted, strict=False)
    ids = torch.arange(12)[None]
    for model in (quantised, plain):
        model(ids).logits.log_softmax(-1)[..., 3].sum().backward()
    masters = dict(quantised.named_parameters())
    assert masters.keys() == dict(plain.named_parameters()).keys()
    for name, each in plain.named_parameters():
        torch.testing.assert_close(masters[name].grad, each.grad, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(masters[name], wanted[name]) for name in wanted)


def test_the_straight_through_gradient_is_the_unquantised_ones():
    weights = torch.randn(4, 40, requires_grad=True)
    gradient = torch.randn(4, 40)
    fake_quantise(weights).backward(gradient)
    assert torch.equal(weights.grad, gradient)


@pytest.mark.parametrize("kind", MODELS)
def test_masters_gather_small_updates_and_engines_get_what_the_learner_computes_with(kind):
    learner = learner_of(MODELS[kind](**{QUANTISATION: "mxfp4"}), learning_rate=1e-4)
    before = learner.weights(torch.float32)
    for _ in range(3):
        learner.update(samples(), OBJECTIVE)
    masters, after = learner._policy.trained(), learner.weights(torch.float32)
    name = next(name for name in masters if "down_proj" in name)
    assert torch.equal(after[name], quantise(masters[name].detach()))
    assert not torch.equal(after[name], masters[name])
    assert (after[name] == before[name]).float().mean() > 0.8, "most stay on their grid point"
    moved = engine_logprobs(MODELS[kind](**{QUANTISATION: "mxfp4"}), after)
    deployed = MODELS[kind]()
    deployed.load_state_dict(after, strict=False)
    np.testing.assert_array_equal(moved, engine_logprobs(deployed))
    # New masters are rounded anew, also where rounded weights are kept between passes.
    other = engine_logprobs(MODELS[kind](**{QUANTISATION: "mxfp4"}), {n: 1.7 * t for n, t in after.items()})
    assert not np.array_equal(other, moved)


# SwiGLU clamping


@pytest.mark.parametrize("kind", MODELS)
def test_gate_and_linear_part_reach_their_bounds_and_no_more(kind):
    limit = 0.5
    clamped, ids = MODELS[kind](**{SWIGLU_LIMIT: limit}), torch.arange(12)[None]
    seen: list[torch.Tensor] = []
    for module in clamped.modules():
        if hasattr(module, "swiglu_limit"):
            module.act_fn = torch.nn.Sequential(module.act_fn)
            module.act_fn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    clamped(ids)
    gates = torch.cat([gate.flatten() for gate in seen])
    assert gates.max() == limit
    assert gates.min() < -limit, "only from above"
    layer = next(module for module in clamped.modules() if hasattr(module, "swiglu_limit"))
    assert type(layer).__mro__[1].__name__ in ("DenseLayer", "ExpertLayers")
    far = MODELS[kind](**{SWIGLU_LIMIT: 1e6})
    torch.testing.assert_close(far(ids).logits, MODELS[kind]()(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(clamped(ids).logits, MODELS[kind]()(ids).logits, atol=1e-2)


def test_the_linear_part_is_clamped_on_both_sides():
    model = dense(**{SWIGLU_LIMIT: 0.25})
    mlp, hidden = model.model.layers[0].mlp, torch.randn(9, 32) * 3
    gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
    expected = mlp.down_proj(torch.nn.functional.silu(gate.clamp(max=0.25)) * up.clamp(-0.25, 0.25))
    assert up.max() > 0.25 > -0.25 > up.min()
    torch.testing.assert_close(mlp(hidden), expected)


@pytest.mark.parametrize("entry", [{"swiglu_limit": 0.5}, {"fake_quantization": "mxfp4"}])
def test_a_recipes_option_is_in_every_checkpoint_and_learner_and_engine_agree(
    entry: dict, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    base = base_path(Model(path=tiny_model, **entry))
    assert base != tiny_model
    assert base_path(Model(path=tiny_model, **entry)) == base
    assert base_path(Model(path=tiny_model)) == tiny_model
    loaded = load_model(base, torch.float32)
    plain = load_model(tiny_model, torch.float32)
    ids = torch.arange(6, 18)[None]
    assert not torch.allclose(loaded(ids).logits, plain(ids).logits, atol=1e-3)
    learner = learner_of(loaded)
    learner.update(samples(), OBJECTIVE)
    learner.save_final(tmp_path / "final", load_tokenizer(tiny_model))
    final = load_model(str(tmp_path / "final"), torch.float32)
    batch = PackedBatch.collate(samples())
    with torch.no_grad():
        found = Policy(final, dtype=torch.float32, lora=None, keep_reference=False, seed=0).forward(batch)
        expected = learner._policy.forward(batch)
    torch.testing.assert_close(found.hidden_ND, expected.hidden_ND)


def test_an_architecture_without_a_known_swiglu_is_refused():
    model = dense()
    for layer in model.model.layers:
        del layer.mlp.act_fn
    setattr(model.config, SWIGLU_LIMIT, 10.0)
    with pytest.raises(RecipeError, match="no feed-forward layer of LlamaForCausalLM"):
        use_stable_layers(model)


# Muon


def test_muon_takes_the_matrices_and_adamw_the_rest():
    model = dense(tie_word_embeddings=False)
    start, twin = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    learner = learner_of(model, optimizer="muon", max_grad_norm=1e6)
    learner.update(samples(), OBJECTIVE)

    plain = learner_of(twin, learning_rate=1e-9, weight_decay=0.0, max_grad_norm=1e6)
    plain.accumulate(samples(), OBJECTIVE, _totals())
    gradients = {name: each.grad for name, each in plain._policy.trained().items()}
    after = learner.weights(torch.float32)
    for name, gradient in gradients.items():
        alone = torch.nn.Parameter(start[name].clone())
        alone.grad = gradient
        is_matrix = "proj" in name
        decay = 0.1 if alone.ndim == 2 else 0.0
        optimizer = (
            torch.optim.Muon([alone], lr=1e-2, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            if is_matrix
            else torch.optim.AdamW([alone], lr=1e-2, weight_decay=decay, betas=(0.9, 0.99))
        )
        optimizer.step()
        torch.testing.assert_close(after[name], alone.detach(), rtol=1e-4, atol=1e-5)
        if is_matrix:
            update = (start[name] * (1 - 1e-2 * decay) - after[name]) / (0.2 * max(gradient.shape) ** 0.5 * 1e-2)
            singular = torch.linalg.svdvals(update)
            assert 0.6 < singular.median() < singular.max() < 1.3, "an orthogonal matrix, about"


def _totals():
    from posttrain.learner.packing import Totals

    return Totals.of(samples())


def test_muon_resumes_bit_for_bit_and_follows_the_schedule(tmp_path: Path):
    settings = {"optimizer": "muon", "lr_scheduler_type": "linear", "warmup_steps": 2}

    def run(learner: Learner, steps: int) -> list[tuple[float, float]]:
        found = [learner.update(samples(), OBJECTIVE) for _ in range(steps)]
        return [(each["loss"], each["learning_rate"]) for each in found]

    whole = learner_of(dense(), **settings)
    assert [rate for _, rate in run(whole, 3)] == pytest.approx([0, 5e-3, 1e-2])
    path = whole.save_checkpoint(tmp_path)
    resumed = learner_of(dense(), **settings)
    resumed.load_checkpoint(path)
    assert run(resumed, 3) == run(whole, 3)
    with pytest.raises(ValueError, match="SFT runs in TRL's trainer"):
        SFT(optim=Optim(optimizer="muon"))


# Anticipatory routing


def test_a_spike_is_far_above_what_came_before_and_does_not_become_normal():
    guard = SpikeGuard(AnticipatoryRouting(window=4, threshold=3.0, hold_steps=2))
    active = []
    for value in (50.0, 1.0, 1.1, 0.9, 1.0, 1.2, 9.0, 1.0, 9.0, 1.0, 1.0, 1.0):
        guard.observe(value)
        active.append(guard.steps_left)
    # Nothing is a spike before there is a window to compare with, and the large value first in it has to leave it.
    assert active == [0, 0, 0, 0, 0, 0, 2, 1, 2, 1, 0, 0]


def test_after_a_spike_experts_are_chosen_by_the_older_weights(tmp_path: Path):
    config = AnticipatoryRouting(lag_steps=2, hold_steps=3, window=2, threshold=1e9)
    learner = learner_of(mixture(), learning_rate=5e-2, anticipatory_routing=config)
    batch = PackedBatch.collate(samples())
    history = []
    for _ in range(3):
        history.append(learner.weights(torch.float32))
        learner.update(samples(), OBJECTIVE)

    def chosen(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        model = mixture()
        model.load_state_dict(weights, strict=False)
        policy = Policy(model, dtype=torch.float32, lora=None, keep_reference=False, seed=0, keep_routing=True)
        policy.forward(batch)
        return Routers(model).chosen()

    def of(policy: Policy) -> torch.Tensor:
        policy.forward(batch)
        return Routers(policy.model).chosen()

    now = learner.weights(torch.float32)
    assert torch.equal(of(learner._policy), chosen(now)), "off without a spike"
    learner._policy._older.guard.steps_left = 3
    older = chosen(history[1])
    assert torch.equal(of(learner._policy), older), "three steps were made, and two before was the second"
    assert not torch.equal(older, chosen(now))
    known = torch.full((len(batch.token_ids), 2, 2), -1, dtype=torch.int16)
    known[0] = torch.tensor([3, 5])
    policy = learner._policy
    policy._keep_routing = True
    policy.forward(replace(batch, routes=known))
    replayed = Routers(policy.model).chosen()
    assert replayed[0].tolist() == [[3, 5], [3, 5]]
    policy._keep_routing = False

    path = learner.save_checkpoint(tmp_path)
    resumed = learner_of(mixture(), learning_rate=5e-2, anticipatory_routing=config)
    resumed.load_checkpoint(path)
    assert torch.equal(of(resumed._policy), older)
    for _ in range(4):
        assert learner.update(samples(), OBJECTIVE)["loss"] == resumed.update(samples(), OBJECTIVE)["loss"]
    assert not learner._policy._older.active
    with pytest.raises(RecipeError, match="has no experts to choose"):
        learner_of(dense(), anticipatory_routing=config)
