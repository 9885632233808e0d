"""Expert choices from the engine to the learner, which sends tokens where the engine sent them."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from posttrain.config import GRPO
from posttrain.engine.file_journal import FileJournal
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.errors import RecipeError
from posttrain.learner.objectives import GrpoObjective
from posttrain.learner.packing import PackedBatch
from posttrain.learner.policy import Policy
from posttrain.rollout.samples import sample_of
from posttrain.routing import Routers
from posttrain.types import Completion, Request, Rollout, Sampling, StopReason, Task, Turn

EXPERTS, TOP_K, LAYERS = 8, 3, 2
COMMON = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.1,
}
MODELS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**COMMON, num_local_experts=EXPERTS, sliding_window=None)),
    "qwen3": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**COMMON, num_experts=EXPERTS, moe_intermediate_size=24)),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**COMMON, num_experts=EXPERTS)),
}


def moe(kind: str, *, favours: int | None = None) -> PreTrainedModel:
    """Experts 2i and 2i + 1 have one score; with ``favours`` 0 or 1 one of them wins by a hair, as by rounding."""
    torch.manual_seed(0)
    maker, config = MODELS[kind]
    model = maker(copy.deepcopy(config))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), torch.nn.Parameter) and hasattr(module, "num_experts"):
                module.weight.normal_(std=0.3)
                module.weight[1::2] = module.weight[::2]
                if favours is not None:
                    module.weight[favours::2] *= 1 + 4e-7
    return model


def ask(engine: TransformersEngine, requests: list[Request]) -> list[Completion]:
    async def all_of_them() -> list[Completion]:
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return asyncio.run(asyncio.wait_for(all_of_them(), 60))


def request(name: str, prompt: np.ndarray, **fields: int) -> Request:
    sampling = Sampling(max_tokens=fields.pop("max_tokens", 12))
    return Request(id=name, prompt_ids=prompt.astype(np.int32), sampling=sampling, seed=4, continued=True)


def play(engine: TransformersEngine, *, turns: int = 3, beside: int = 2) -> Rollout:
    """An append-only conversation; others share its prompt and its batch."""
    rng = np.random.default_rng(1)
    sequence, played = np.zeros(0, np.int64), []
    for turn in range(turns):
        context = rng.integers(0, 100, 9)
        sequence = np.concatenate([sequence, context])
        asked = [request(f"r{i}/{turn}", sequence) for i in range(1 + beside)]
        completion = ask(engine, asked)[0]
        played.append(Turn(context_ids=context.astype(np.int32), completion=completion.after(len(context)), text=""))
        sequence = np.concatenate([sequence, completion.token_ids])
    return Rollout(id="r", task=Task(id="t", domain="d", prompt=()), turns=tuple(played), stop=StopReason.FINISHED)


def log_ratio(model: PreTrainedModel, rollout: Rollout, *, keep_routing: bool) -> torch.Tensor:
    """Largest of its tokens, between the learner at these weights and the engine, in nats."""
    policy = Policy(model, dtype=torch.float32, lora=None, keep_reference=False, seed=0, keep_routing=keep_routing)
    batch = PackedBatch.collate([sample_of(rollout), sample_of(rollout)])
    objective = GrpoObjective(config=GRPO(), max_completion_tokens=60)
    logprobs = objective.token_stats(policy.forward(batch), batch).logprobs
    return (logprobs - batch.behaviour_logprobs).abs().max()


@pytest.mark.parametrize("kind", MODELS)
def test_replayed_routes_make_the_log_ratio_at_theta_old_zero(kind: str) -> None:
    engine = TransformersEngine(moe(kind, favours=0), stop_ids=[], keep_routing=True)
    rollout = play(engine)
    assert engine.counters()["reused_tokens"] > 0
    engine.close()
    routes = rollout.tokens.load().routes
    assert routes is not None
    assert routes.shape == (63, LAYERS, TOP_K)
    assert (routes[:-1] >= 0).all(), "known of every token but the last, which is not computed"
    assert (routes[-1] == -1).all()
    assert log_ratio(moe(kind, favours=1), rollout, keep_routing=True) < 1e-5
    assert log_ratio(moe(kind, favours=1), rollout, keep_routing=False) > 1e-2


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_replayed_experts_are_the_learners_own_with_their_gradient(kind: str) -> None:
    """Replaying what would have been chosen anyway changes nothing; another choice is weighted by the own scores."""
    model, ids = moe(kind), torch.arange(10)[None]
    routers = Routers(model)
    gate = next(module for module in model.modules() if hasattr(module, "replayed_routes"))

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(ids).logits.log_softmax(-1)[..., 5].sum().backward()
        return gate.weight.grad.clone()

    plain, own = gradient(), routers.chosen()
    routers.replay(own)
    assert torch.equal(gradient(), plain)
    routers.replay((own + 2) % EXPERTS)
    other = gradient()
    assert torch.equal(routers.chosen(), (own + 2) % EXPERTS)
    assert other.abs().sum() > 0
    assert not torch.allclose(other, plain)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_routers_that_choose_groups_first_are_replayed(num_groups: int) -> None:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **{**COMMON, "num_experts_per_tok": 2, "num_key_value_heads": 4},
        n_routed_experts=EXPERTS,
        n_group=num_groups,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=16,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    model, ids = DeepseekV3ForCausalLM(config).eval(), torch.arange(10)[None]
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            torch.nn.init.normal_(module.weight)
    routers = Routers(model)
    plain = model(ids).logits
    own = routers.chosen()
    assert own.shape == (10, 1, 2)
    routers.replay(own)
    assert torch.equal(model(ids).logits, plain)
    routers.replay((own + 1) % EXPERTS)
    assert not torch.allclose(model(ids).logits, plain)
    assert torch.equal(routers.chosen(), (own + 1) % EXPERTS)
    routers.replay(None)
    assert torch.equal(model(ids).logits, plain)


def test_a_finished_request_that_the_journal_knows_says_its_routes_again(tmp_path: Path) -> None:
    asked = [request(f"r{i}", np.arange(5) + i) for i in range(3)]
    engine = TransformersEngine(
        moe("qwen3"), stop_ids=[], keep_routing=True, journal=FileJournal(tmp_path, writer="one")
    )
    expected = ask(engine, asked)
    engine.close()
    engine = TransformersEngine(
        moe("qwen3"), stop_ids=[], keep_routing=True, journal=FileJournal(tmp_path, writer="one")
    )
    unfinished = request("new", np.arange(5), max_tokens=3)
    found = ask(engine, [*asked, unfinished])
    assert engine.counters()["decode_tokens"] == 3, "nothing was drawn twice"
    engine.close()
    for one, other in zip(expected, found, strict=False):
        assert np.array_equal(one.token_ids, other.token_ids)
        assert one.routes is not None
        assert np.array_equal(one.routes, other.routes)


def test_parked_states_bring_their_routes_through_a_preemption(tmp_path: Path) -> None:
    first, second = (TransformersEngine(moe("qwen3"), stop_ids=[], keep_routing=True) for _ in range(2))
    whole = play(second).tokens.load().routes
    half = play(first, turns=2)
    first.preempt(tmp_path / "states")
    second.close()
    third = TransformersEngine(moe("qwen3"), stop_ids=[], keep_routing=True)
    assert third.restore(tmp_path / "states") > 0
    assert whole is not None
    context = np.random.default_rng(1).integers(0, 100, (3, 9))[2]
    sequence = np.concatenate([half.token_ids, context])
    (last,) = ask(third, [request("r0/2", sequence)])
    assert third.counters()["prefill_tokens"] <= 10
    third.close()
    assert last.routes is not None
    assert np.array_equal(last.routes[:40], whole[:40])


def test_models_without_experts_have_no_routes_and_unknown_routers_are_refused() -> None:
    config = GptOssConfig(
        **{**COMMON, "num_hidden_layers": 1}, num_local_experts=EXPERTS, layer_types=["full_attention"]
    )
    model = GptOssForCausalLM(config)
    assert len(Routers(model)) == 1
    del model.model.layers[0].mlp.router.num_experts
    with pytest.raises(RecipeError, match="routers are not recognised"):
        Routers(model)
    routers = Routers(moe("olmoe"))
    with pytest.raises(ValueError, match=r"expected \[tokens, 2, 3\]"):
        routers.replay(torch.zeros(4, 1, 3))
