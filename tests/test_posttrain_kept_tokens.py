"""Truncated sampling from the engine to the learner, which sees the probabilities that the tokens were drawn with."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.config import GRPO, Optim
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.learner.learner import Learner
from posttrain.learner.objectives import GrpoObjective
from posttrain.learner.packing import PackedBatch
from posttrain.learner.policy import Policy
from posttrain.rollout.samples import sample_of
from posttrain.types import (
    Completion,
    FinishReason,
    KeptTokens,
    Request,
    Rollout,
    Sample,
    Sampling,
    StopReason,
    Task,
    TokenArrays,
    Tokens,
    Turn,
)
from tests.tiny_models import tiny_tokenizer

GRID = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.1},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.3, "top_p": 0.99},
    {"top_k": 1},
]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,
        )
    )


def rollout_of(completions: list[Completion], contexts: list[np.ndarray]) -> Rollout:
    turns = tuple(
        Turn(context_ids=context, completion=completion, text="")
        for completion, context in zip(completions, contexts, strict=True)
    )
    return Rollout(id="r", task=Task(id="t", domain="d", prompt=()), turns=turns, stop=StopReason.FINISHED)


def play_turns(engine: TransformersEngine, sampling: Sampling, *, turns: int = 3) -> Rollout:
    """An append-only conversation: what the policy says and a few tokens of the world's in turn."""
    rng = np.random.default_rng(1)
    sequence, completions, contexts = np.zeros(0, np.int32), [], []
    for turn in range(turns):
        contexts.append(rng.integers(0, 100, 11).astype(np.int32))
        sequence = np.concatenate([sequence, contexts[-1]])
        asked = Request(id=f"r/{turn}", prompt_ids=sequence, sampling=sampling, seed=4, continued=True)
        completion = asyncio.run(asyncio.wait_for(engine.generate(asked), 60))
        completions.append(completion)
        sequence = np.concatenate([sequence, completion.token_ids])
    return rollout_of(completions, contexts)


@pytest.mark.parametrize("fields", GRID)
def test_the_learner_computes_the_log_probabilities_the_engine_sampled_with(fields: dict[str, float]):
    sampling = Sampling(**fields, max_tokens=20)
    engine = TransformersEngine(tiny_llama(), stop_ids=[])
    rollout = play_turns(engine, sampling)
    assert engine.counters()["reused_tokens"] > 0
    engine.close()
    batch = PackedBatch.collate([sample_of(rollout)])
    policy = Policy(tiny_llama(), dtype=torch.float32, lora=None, keep_reference=False, seed=0)
    objective = GrpoObjective(config=GRPO(), max_completion_tokens=60, temperature=sampling.temperature)
    with torch.no_grad():
        logprobs, _ = objective._logprobs(policy.forward(batch), batch)
    assert len(logprobs) == 60
    torch.testing.assert_close(logprobs, batch.behaviour_logprobs, atol=1e-5, rtol=1e-5)


def test_rounding_in_the_engine_does_not_reach_the_weights():
    engine = TransformersEngine(tiny_llama(), stop_ids=[])
    rollout = play_turns(engine, Sampling(max_tokens=20))
    engine.close()
    sample = dataclasses.replace(sample_of(rollout), advantage=1.0)
    arrays = sample.load()
    noise = np.random.default_rng(0).uniform(-2e-6, 2e-6, len(arrays)).astype(np.float32)
    noisy = dataclasses.replace(sample, tokens=Tokens.of(dataclasses.replace(arrays, logprobs=arrays.logprobs + noise)))
    stale = dataclasses.replace(sample, tokens=Tokens.of(dataclasses.replace(arrays, logprobs=arrays.logprobs - 0.1)))
    weights = []
    for trained in (sample, noisy, stale):
        learner = Learner(
            tiny_llama(), optim=Optim(learning_rate=1e-2), num_steps=1, tokens_per_micro_batch=500, dtype=torch.float32
        )
        learner.update([trained], GrpoObjective(config=GRPO(epsilon=0.9), max_completion_tokens=60))
        weights.append(learner.weights(torch.float32)["lm_head.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("fields", [{"top_k": 3}, {"top_p": 0.6}])
def test_without_the_mask_truncated_and_whole_distributions_are_compared(fields: dict[str, float]):
    engine = TransformersEngine(tiny_llama(), stop_ids=[])
    rollout = play_turns(engine, Sampling(**fields, max_tokens=20))
    engine.close()
    ratios, losses = {}, {}
    for keep in (True, False):
        learner = Learner(
            tiny_llama(), optim=Optim(learning_rate=1e-9), num_steps=1, tokens_per_micro_batch=500, dtype=torch.float32
        )
        config = GRPO(keep_sampling_mask=keep, loss_type="grpo")
        objective = GrpoObjective(config=config, max_completion_tokens=60)
        sample = dataclasses.replace(sample_of(rollout), advantage=1.0)
        found = learner.evaluate([sample], objective)
        ratios[keep], losses[keep] = found["ratio"], found["loss"]
    # At equal weights every ratio is 1 and the loss minus the advantage; the whole vocabulary makes ratios smaller.
    assert ratios[True] == pytest.approx(1, abs=1e-5)
    assert losses[True] == pytest.approx(-1, abs=1e-5)
    assert ratios[False] < 0.9
    assert losses[False] > -0.99


def test_a_mini_batch_may_mix_truncated_and_whole_samples():
    def sample(kept: KeptTokens | None) -> Sample:
        arrays = TokenArrays(
            token_ids=np.array([4, 5, 6], np.int32),
            loss_mask=np.array([False, True, True]),
            logprobs=np.zeros(3, np.float32),
            versions=np.zeros(3, np.int32),
            kept=kept,
        )
        return Sample(id="s", task_id="t", domain="d", tokens=Tokens.of(arrays))

    kept = KeptTokens.of([None, np.array([5, 9], np.int32), None])
    batch = PackedBatch.collate([sample(None), sample(kept)])
    assert batch.kept_offsets is not None
    assert batch.kept_offsets.tolist() == [0, 0, 0, 2, 2]
    assert batch.kept_ids is not None
    assert batch.kept_ids.tolist() == [5, 9]
    assert PackedBatch.collate([sample(None)]).kept_ids is None
    wrong = KeptTokens.of([None, np.array([9], np.int32), None])
    with pytest.raises(ValueError, match="Sample 's': token 5 is not among the 1"):
        PackedBatch.collate([sample(wrong)])


def test_the_engine_stops_at_strings_and_at_a_requests_own_tokens():
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )
    engine = TransformersEngine(model, stop_ids=[], decode=tokenizer.decode)

    def ask(name: str, **fields: object) -> Completion:
        asked = Request(
            id=name, prompt_ids=np.array([1, 2], np.int32), sampling=Sampling(max_tokens=200, **fields), stream="same"
        )
        return asyncio.run(asyncio.wait_for(engine.generate(asked), 60))

    whole = ask("whole")
    token = int(whole.token_ids[50])
    first = whole.token_ids.tolist().index(token)
    stopped = ask("token", stop_token_ids=(token,))
    assert stopped.finish is FinishReason.STOP
    assert stopped.token_ids.tolist() == whole.token_ids[: first + 1].tolist()
    letter = next(c for c in tokenizer.decode(whole.token_ids) if c.isalnum())
    stopped = ask("string", stop=(letter,))
    assert stopped.finish is FinishReason.STOP
    assert letter in tokenizer.decode(stopped.token_ids)
    assert letter not in tokenizer.decode(stopped.token_ids[:-1])
    engine.close()
    silent = TransformersEngine(model, stop_ids=[])
    with pytest.raises(ValueError, match=r"Sampling.stop = \('x',\)"):
        asyncio.run(silent.generate(Request(id="r", prompt_ids=np.array([1]), sampling=Sampling(stop=("x",)))))
    silent.close()
