"""The engine against plain forward passes, the sampler against the distribution it should draw from."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from posttrain.engine.sampler import draw, stream_key, uniforms
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.engine.weights import export_weights, import_weights
from posttrain.types import Completion, FinishReason, Request, Sampling

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}


def tiny_llama(seed: int = 0, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied)).eval()


def tiny_qwen() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()


def request(name: str, prompt: list[int], **sampling: float) -> Request:
    return Request(id=name, prompt_ids=np.array(prompt, np.int32), sampling=Sampling(**sampling))


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 100, rng.integers(1, 40)).tolist() for _ in range(count)]


def run(engine: TransformersEngine, requests: list[Request]) -> list[Completion]:
    async def gather() -> list[Completion]:
        return await asyncio.wait_for(asyncio.gather(*[engine.generate(r) for r in requests]), 60)

    return asyncio.run(gather())


def plain_logprobs(model: torch.nn.Module, prompt: list[int], completion: Completion) -> torch.Tensor:
    ids = torch.tensor([prompt + completion.token_ids.tolist()])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]


@pytest.fixture
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(tiny_llama(), stop_ids=[7], max_batch_size=5)
    yield engine
    engine.close()


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen])
def test_greedy_equals_generate(make):
    model, reference = make(), make()
    engine = TransformersEngine(model, stop_ids=[7], max_batch_size=5)
    requests = [request(f"r{i}", p, temperature=0, max_tokens=5 + 8 * i) for i, p in enumerate(prompts(8))]
    completions = run(engine, requests)
    engine.close()
    for r, completion in zip(requests, completions, strict=True):
        expected = reference.generate(
            torch.tensor(r.prompt_ids)[None].long(),
            attention_mask=torch.ones(1, len(r.prompt_ids)),
            max_new_tokens=r.sampling.max_tokens,
            do_sample=False,
            eos_token_id=7,
            pad_token_id=0,
        )[0, len(r.prompt_ids) :]
        assert completion.token_ids.tolist() == expected.tolist()
        assert completion.finish is (FinishReason.STOP if expected[-1] == 7 else FinishReason.LENGTH)


def test_logprobs_equal_plain_forward_with_shared_prompts_and_late_joiners(engine):
    # 20 rows through 5 places, 4 per prompt: some rows of a prompt join long after the first was prefilled.
    asked = [p for p in prompts(5) for _ in range(4)]
    lengths = np.random.default_rng(1).integers(1, 60, len(asked))
    requests = [request(f"r{i}", p, max_tokens=int(n)) for i, (p, n) in enumerate(zip(asked, lengths, strict=True))]
    reference = tiny_llama()
    for prompt, completion in zip(asked, run(engine, requests), strict=True):
        expected = plain_logprobs(reference, prompt, completion)
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
        assert completion.versions.tolist() == [0] * len(completion.token_ids)


def test_completions_repeat_and_do_not_depend_on_batch_size(engine):
    requests = [request(f"r{i}", p, max_tokens=20) for i, p in enumerate(prompts(8))]
    first, second = run(engine, requests), run(engine, requests)
    alone = TransformersEngine(tiny_llama(), stop_ids=[7], max_batch_size=1)
    third = run(alone, requests[::-1])[::-1]
    alone.close()
    for a, b, c in zip(first, second, third, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() == c.token_ids.tolist()
        assert a.logprobs.tobytes() == b.logprobs.tobytes()
    assert len({c.token_ids.tobytes() for c in first}) > 1


def test_resumed_request_draws_the_same_tokens(engine):
    prompt = [1, 2, 3]
    whole = run(engine, [request("r", prompt, max_tokens=30, top_k=50)])[0].token_ids.tolist()
    rest = run(engine, [request("r", prompt + whole[:5], max_tokens=25, top_k=50)])[0].token_ids.tolist()
    assert whole[5:] == rest


def test_prompt_too_long_and_budget_cut_to_window(engine):
    with pytest.raises(ValueError, match="512 tokens in a window of 512"):
        run(engine, [request("r", [1] * 512)])
    with pytest.raises(ValueError, match="expected 0 to 99"):
        run(engine, [request("r", [100])])
    completion = run(engine, [request("r", [1] * 509, max_tokens=50)])[0]
    assert len(completion.token_ids) <= 3


def test_load_weights_changes_version_and_logprobs(engine):
    other = tiny_llama(seed=1)
    engine.load_weights(import_weights(export_weights(other.named_parameters(), torch.float32)), 3)
    assert engine.version == 3
    completion = run(engine, [request("r", [1, 2, 3], max_tokens=10)])[0]
    np.testing.assert_allclose(completion.logprobs, plain_logprobs(other, [1, 2, 3], completion), atol=1e-4)
    assert set(completion.versions.tolist()) == {3}


def test_load_weights_refuses_what_does_not_fit_and_goes_on(engine):
    weights = dict(tiny_llama(seed=1).named_parameters())
    cases = {
        "unknown": {**weights, "model.extra": torch.zeros(1)},
        "missing": {k: v for k, v in weights.items() if k != "model.norm.weight"},
        "misshapen": {**weights, "model.norm.weight": torch.zeros(3)},
    }
    for problem, wrong in cases.items():
        with pytest.raises(ValueError, match=f"1 {problem}"):
            engine.load_weights(wrong, 1)
    completion = run(engine, [request("r", [1, 2, 3], max_tokens=5)])[0]
    np.testing.assert_allclose(completion.logprobs, plain_logprobs(tiny_llama(), [1, 2, 3], completion), atol=1e-4)
    assert engine.version == 0


def test_cancelling_frees_the_row():
    engine = TransformersEngine(tiny_llama(), stop_ids=[], max_batch_size=1)

    async def cancel_first() -> Completion:
        hog = asyncio.create_task(engine.generate(request("hog", [1], max_tokens=510)))
        await asyncio.sleep(0.02)
        hog.cancel()
        result = await asyncio.wait_for(engine.generate(request("next", [1], max_tokens=2)), 30)
        assert hog.cancelled()
        return result

    assert len(asyncio.run(cancel_first()).token_ids) == 2
    engine.close()


def test_failure_in_the_loop_reaches_every_waiter():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    engine = TransformersEngine(model, stop_ids=[], max_batch_size=2)

    async def all_of_them() -> list[object]:
        calls = [engine.generate(request(f"r{i}", [1, 2])) for i in range(5)]
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)

    errors = asyncio.run(all_of_them())
    assert all(isinstance(e, RuntimeError) and "not finite" in str(e) for e in errors)
    with pytest.raises(RuntimeError, match="not finite"):
        run(engine, [request("late", [1])])
    with pytest.raises(RuntimeError, match="not finite"):
        engine.load_weights({}, 1)
    engine.close()


def test_close_fails_pending_requests():
    engine = TransformersEngine(tiny_llama(), stop_ids=[])

    async def close_underway() -> None:
        pending = asyncio.create_task(engine.generate(request("r", [1], max_tokens=510)))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.close)
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(pending, 30)

    asyncio.run(close_underway())
    with pytest.raises(RuntimeError, match="closed"):
        run(engine, [request("r", [1])])


def test_bfloat16_logprobs_stay_near_float32():
    engine = TransformersEngine(tiny_llama().bfloat16(), stop_ids=[])
    completion = run(engine, [request("r", [1, 2, 3], max_tokens=40)])[0]
    engine.close()
    reference = plain_logprobs(tiny_llama().bfloat16(), [1, 2, 3], completion)
    assert np.abs(completion.logprobs - reference.float().numpy()).mean() < 0.05


def test_weights_round_trip_shares_memory_and_ties():
    model = tiny_llama(tied=True)
    model.bfloat16()
    arrays = export_weights(model.named_parameters(remove_duplicate=False), torch.bfloat16)
    assert "lm_head.weight" not in arrays
    assert all(a.dtype == np.uint16 for a in arrays.values())
    tensors = import_weights(arrays)
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name], parameter)
        assert tensors[name].data_ptr() == parameter.data_ptr()
    engine = TransformersEngine(tiny_llama(seed=1, tied=True), stop_ids=[])
    engine.load_weights(tensors, 1)
    engine.close()


def samplings(count: int, **fields: float) -> list[Sampling]:
    return [Sampling(**fields)] * count


def many_uniforms(count: int) -> np.ndarray:
    return uniforms(np.full(count, stream_key(0, "test")), np.arange(count))


def truncated_softmax(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Slow reference for one row of logits."""
    x = logits.double() / sampling.temperature
    order = x.argsort(descending=True)
    if sampling.top_k:
        order = order[: sampling.top_k]
    p = torch.zeros_like(x)
    p[order] = x[order].softmax(0)
    mass, kept = 0.0, []
    for token in order.tolist():
        if mass >= sampling.top_p and sampling.top_p < 1:
            break
        kept.append(token)
        mass += p[token].item()
    out = torch.zeros_like(x)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize(
    "fields",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9}],
)
@pytest.mark.parametrize("vocabulary", [100, 700])
def test_draws_follow_the_distribution(fields, vocabulary):
    torch.manual_seed(0)
    logits = torch.randn(vocabulary) * 2
    count = 20_000
    draws = draw(logits.expand(count, -1), samplings(count, **fields), many_uniforms(count))
    expected = truncated_softmax(logits, Sampling(**fields))
    np.testing.assert_allclose(draws.logprobs_B, expected[draws.tokens_B].log(), atol=1e-5)
    observed = torch.bincount(draws.tokens_B, minlength=vocabulary).double()
    assert (observed[expected == 0] == 0).all()
    often = expected * count >= 5
    chi2 = ((observed - expected * count) ** 2 / (expected * count))[often].sum().item()
    degrees = int(often.sum()) - 1
    # Mean and standard deviation of chi-square are its degrees of freedom and sqrt(2 * degrees).
    assert abs(chi2 - degrees) < 5 * math.sqrt(2 * degrees) + 1


def test_large_vocabulary_and_impossible_tokens():
    torch.manual_seed(0)
    logits = torch.randn(64, 49152)
    logits[:, ::2] = -math.inf
    draws = draw(logits.bfloat16(), samplings(64), many_uniforms(64))
    assert (draws.tokens_B % 2 == 1).all()
    expected = logits.bfloat16().float().log_softmax(-1).gather(1, draws.tokens_B[:, None])[:, 0]
    torch.testing.assert_close(draws.logprobs_B, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"top_p": 0.99}])
def test_extreme_uniforms_give_possible_tokens(uniform, fields):
    logits = torch.full((1, 1000), -math.inf)
    logits[0, [300, 301, 700]] = torch.tensor([0.0, -30.0, 0.1])
    draws = draw(logits, samplings(1, **fields), np.array([uniform]))
    assert draws.tokens_B.item() in (300, 301, 700)
    assert math.isfinite(draws.logprobs_B.item())


def test_rows_with_different_settings_do_not_influence_each_other():
    torch.manual_seed(0)
    logits = torch.randn(5, 1000)
    mixed = [Sampling(), Sampling(temperature=0), Sampling(top_p=0.5), Sampling(top_k=3), Sampling(temperature=0.5)]
    u = many_uniforms(5)
    together = draw(logits, mixed, u)
    for i, sampling in enumerate(mixed):
        alone = draw(logits[i : i + 1], [sampling], u[i : i + 1])
        assert alone.tokens_B.item() == together.tokens_B[i].item()
        assert alone.logprobs_B.item() == pytest.approx(together.logprobs_B[i].item(), abs=1e-6)
    assert together.tokens_B[1] == logits[1].argmax()
    assert together.logprobs_B[1] == 0


def test_nonfinite_logits_are_reported():
    logits = torch.randn(2, 50)
    logits[1, 3] = math.nan
    for fields in ({}, {"temperature": 0}, {"top_k": 4}):
        with pytest.raises(FloatingPointError, match=r"rows \[1\]"):
            draw(logits, samplings(2, **fields), many_uniforms(2))


def test_uniforms_are_keyed_by_seed_id_and_position():
    keys = np.array([stream_key(0, "a"), stream_key(0, "b"), stream_key(1, "a"), stream_key(0, "a")])
    values = uniforms(keys, np.array([4, 4, 4, 5]))
    assert len(set(values.tolist())) == 4
    assert uniforms(keys[:1], np.array([4]))[0] == values[0]
    many = many_uniforms(50_000)
    assert (many >= 0).all()
    assert (many < 1).all()
    assert abs(many.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.02
