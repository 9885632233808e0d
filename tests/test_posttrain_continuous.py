"""Continuous batching step by step: shared prefixes, chunked prefill, weights in flight, resumption, preemption."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.engine.decode_batch import DecodeBatch, Generation
from posttrain.engine.journal import Progress
from posttrain.engine.stopping import StopRule
from posttrain.engine.transformers_engine import TransformersEngine
from posttrain.types import Completion, FinishReason, Request, Sampling

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 100, count).tolist()


def request(name: str, prompt: Sequence[int], *, continued: bool = False, **sampling: object) -> Request:
    return Request(
        id=name, prompt_ids=np.array(prompt, np.int32), sampling=Sampling(**sampling), seed=1, continued=continued
    )


def generation(name: str, prompt: Sequence[int], room: int, arrival: int = 0, **options: object) -> Generation:
    return Generation(Progress(request(name, prompt, max_tokens=room, **options)), room, arrival)


def make_batch(model: LlamaForCausalLM, *, max_tokens: int = 1 << 16, max_parked_tokens: int = 1 << 12) -> DecodeBatch:
    return DecodeBatch(model, stop=StopRule([], None), max_tokens=max_tokens, max_parked_tokens=max_parked_tokens)


def finish(batch: DecodeBatch, rows: Sequence[Generation], *, chunk: int = 1 << 13) -> None:
    """Run a batch until these rows are finished."""
    with torch.inference_mode():
        while any(row.progress.finish is None for row in rows):
            batch.step(chunk)


def check_logprobs(model: LlamaForCausalLM, prompt: Sequence[int], progress: Progress | Completion, *, since: int = 0):
    """Log-probabilities are those of a plain forward pass over the whole sequence."""
    completion = list(progress.token_ids)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
    np.testing.assert_allclose(list(progress.logprobs)[since:], expected[since:], atol=1e-5, rtol=1e-5)


def run(engine: TransformersEngine, requests: Sequence[Request]) -> list[Completion]:
    async def gather() -> list[Completion]:
        return await asyncio.wait_for(asyncio.gather(*[engine.generate(r) for r in requests]), 60)

    return asyncio.run(gather())


def test_a_prompt_computed_in_chunks_gives_the_same_states_and_holds_nobody_up():
    model, long, short = tiny_llama(), tokens(300), tokens(5, seed=1)
    batch = make_batch(tiny_llama())
    early, late = generation("early", short, 30), generation("late", long, 10, arrival=1)
    with torch.inference_mode():
        batch.admit([early])
        batch.step(64)
        batch.admit([late])
        while late.missing:
            before = batch.counters.prefill_tokens
            batch.step(64)
            assert batch.counters.prefill_tokens - before <= 64
        assert len(early.progress.token_ids) >= 5, "the row that was there goes on meanwhile"
    finish(batch, [early, late])
    check_logprobs(model, short, early.progress)
    check_logprobs(model, long, late.progress)


def test_a_group_computes_its_prompt_once():
    model, prompt = tiny_llama(), tokens(200)
    batch = make_batch(tiny_llama())
    rows = [generation(f"r{i}", prompt, 12, arrival=i) for i in range(8)]
    with torch.inference_mode():
        batch.admit(rows)
    finish(batch, rows, chunk=50)
    assert batch.counters.prefill_tokens == 199
    assert batch.counters.reused_tokens == 7 * 199
    assert len({tuple(row.progress.token_ids) for row in rows}) == 8
    for row in rows:
        check_logprobs(model, prompt, row.progress)


def test_prompts_that_begin_alike_share_what_they_have_in_common():
    model, shared = tiny_llama(), tokens(100)
    prompts = [[*shared, *tokens(20, seed=i)] for i in range(1, 4)]
    batch = make_batch(tiny_llama())
    rows = [generation(f"r{i}", prompt, 5, arrival=i) for i, prompt in enumerate(prompts)]
    with torch.inference_mode():
        batch.admit(rows)
    finish(batch, rows, chunk=30)
    assert batch.counters.prefill_tokens < 119 + 2 * 20
    for row, prompt in zip(rows, prompts, strict=True):
        check_logprobs(model, prompt, row.progress)


def test_the_turns_of_an_episode_never_compute_their_past_again():
    model, engine = tiny_llama(), TransformersEngine(tiny_llama(), stop_ids=[])
    conversation = tokens(50)
    for turn in range(6):
        completion = run(engine, [request(f"episode/{turn}", conversation, continued=True, max_tokens=20)])[0]
        check_logprobs(model, conversation, completion)
        conversation = [*conversation, *completion.token_ids.tolist(), *tokens(7, seed=turn)]
    counters = engine.counters()
    engine.close()
    # The first prompt but its last token; then each turn the last token of its past, and what the world said but one.
    assert counters["prefill_tokens"] == 49 + 5 * 7
    assert counters["reused_tokens"] == sum(50 + 27 * turn - 8 for turn in range(1, 6))


def test_parked_states_are_bounded_and_the_longest_unused_go_first():
    engine = TransformersEngine(tiny_llama(), stop_ids=[], max_parked_tokens=100)
    first, second = tokens(40, seed=1), tokens(40, seed=2)
    for name, prompt in (("a", first), ("b", second)):
        run(engine, [request(name, prompt, continued=True, max_tokens=20)])
    before = engine.counters()["reused_tokens"]
    run(engine, [request("a/1", first, max_tokens=1)])
    assert engine.counters()["reused_tokens"] == before, "59 + 59 states are more than 100: the first had to go"
    run(engine, [request("b/1", second, max_tokens=1)])
    assert engine.counters()["reused_tokens"] == before + 39
    engine.forget("b")
    run(engine, [request("b/2", second, max_tokens=1)])
    assert engine.counters()["reused_tokens"] == before + 39
    engine.close()


def test_new_weights_in_mid_generation_keep_the_tokens_and_leave_no_old_state_in_use():
    old, new, prompt = tiny_llama(), tiny_llama(seed=1), tokens(20)
    batch = make_batch(tiny_llama())
    early, late = generation("early", prompt, 10), generation("late", prompt, 6, arrival=1)
    filling = generation("filling", tokens(90, seed=3), 6, arrival=2)
    with torch.inference_mode():
        batch.admit([early])
        for _ in range(3):
            batch.step(100)
        batch.admit([filling])
        batch.step(30)
        before = list(early.progress.token_ids)
        batch.load_weights(dict(new.named_parameters()), 1)
        batch.admit([late])
    finish(batch, [early, late, filling])
    assert early.progress.token_ids[:4] == before
    assert early.progress.versions == [0] * 4 + [1] * 6
    head = Progress(early.request, token_ids=before, logprobs=early.progress.logprobs[:4])
    check_logprobs(old, prompt, head)
    check_logprobs(new, prompt, early.progress, since=4)
    check_logprobs(new, prompt, late.progress)
    check_logprobs(new, tokens(90, seed=3), filling.progress)


def test_a_request_goes_on_from_what_its_journal_holds_with_what_is_left_of_its_budget():
    model, prompt = tiny_llama(), tokens(20)
    batch = make_batch(tiny_llama())
    whole = generation("r", prompt, 30)
    with torch.inference_mode():
        batch.admit([whole])
    finish(batch, [whole])
    known = Progress(
        whole.request, token_ids=whole.progress.token_ids[:11], logprobs=whole.progress.logprobs[:11], versions=[0] * 11
    )
    known.kept += [None] * 11
    again = Generation(known, 30)
    with torch.inference_mode():
        batch.admit([again])
    before = batch.counters.decode_tokens
    finish(batch, [again])
    assert again.progress.token_ids == whole.progress.token_ids
    assert batch.counters.decode_tokens - before == 19
    check_logprobs(model, prompt, again.progress)


def test_rows_over_the_budget_go_back_to_the_queue_and_lose_nothing():
    model = tiny_llama()
    engine = TransformersEngine(tiny_llama(), stop_ids=[], max_batch_tokens=200)
    roomy = TransformersEngine(tiny_llama(), stop_ids=[])
    requests = [request(f"r{i}", tokens(10, seed=i), max_tokens=60) for i in range(8)]
    completions, expected = run(engine, requests), run(roomy, requests)
    assert engine.counters()["evictions"] > 0
    assert roomy.counters()["evictions"] == 0
    for r, completion, other in zip(requests, completions, expected, strict=True):
        assert completion.token_ids.tolist() == other.token_ids.tolist()
        check_logprobs(model, r.prompt_ids.tolist(), completion)
    engine.close()
    roomy.close()


def test_a_request_too_big_for_the_budget_runs_alone():
    engine = TransformersEngine(tiny_llama(), stop_ids=[], max_batch_tokens=50)
    completions = run(engine, [request(f"r{i}", tokens(40, seed=i), max_tokens=30) for i in range(3)])
    engine.close()
    assert [len(completion.token_ids) for completion in completions] == [30, 30, 30]


def test_a_preempted_engine_hands_its_states_to_the_next(tmp_path: Path):
    path, prompts = tmp_path / "states", [tokens(200, seed=i) for i in range(3)]
    requests = [request(f"r{i}", prompt, max_tokens=1000) for i, prompt in enumerate(prompts)]
    first = TransformersEngine(tiny_llama(), stop_ids=[])
    interrupted: list[Progress] = []

    async def interrupt() -> None:
        tasks = [asyncio.create_task(first.generate(r)) for r in requests]
        while first.counters()["decode_steps"] < 10:
            await asyncio.sleep(0.001)
        interrupted.extend(row.progress for row in first._running)
        await asyncio.to_thread(first.preempt, path)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all("preempted" in str(outcome) for outcome in outcomes)

    asyncio.run(interrupt())
    held = {progress.request.id: progress for progress in interrupted}
    assert all(len(progress.token_ids) >= 10 for progress in interrupted)

    class Held:
        """A journal that knows what the first engine had drawn."""

        def begin(self, asked: Request) -> Progress:
            return held[asked.id]

        def append(self, rows: Sequence[Progress]) -> None: ...

        def when_durable(self, callback: Callable[[], None], failed: object) -> None:
            callback()

        def forget(self, prefix: str) -> None: ...

        def close(self) -> None: ...

    second = TransformersEngine(tiny_llama(), stop_ids=[], journal=Held())
    assert second.restore(path) == 3
    model = tiny_llama()
    for prompt, completion in zip(prompts, run(second, requests), strict=True):
        assert len(completion.token_ids) == 1000
        check_logprobs(model, prompt, completion)
    assert second.counters()["prefill_tokens"] == 0
    second.close()
    other = TransformersEngine(tiny_llama(seed=1), stop_ids=[])
    assert other.restore(path) == 0, "other weights computed these states"
    other.close()


def test_a_request_asked_for_twice_is_answered_once():
    engine = TransformersEngine(tiny_llama(), stop_ids=[])
    same = request("r", tokens(5), max_tokens=40)
    first, second = run(engine, [same, same])
    assert first.token_ids.tolist() == second.token_ids.tolist()
    assert engine.counters()["decode_tokens"] == 40
    engine.close()


def test_one_of_two_askers_may_leave():
    engine = TransformersEngine(tiny_llama(), stop_ids=[])
    same = request("r", tokens(5), max_tokens=200)

    async def leave() -> Completion:
        staying, leaving = asyncio.create_task(engine.generate(same)), asyncio.create_task(engine.generate(same))
        while engine.counters()["decode_steps"] < 5:
            await asyncio.sleep(0.001)
        leaving.cancel()
        return await asyncio.wait_for(staying, 60)

    assert len(asyncio.run(leave()).token_ids) == 200
    engine.close()


@pytest.mark.parametrize("count", [1, 7, 64])
def test_rows_that_come_and_go_in_any_order_stay_apart(count: int):
    model = tiny_llama()
    engine = TransformersEngine(tiny_llama(), stop_ids=[7], max_batch_size=6, max_batch_tokens=600)
    rng = np.random.default_rng(count)
    requests = [
        request(f"r{i}", tokens(int(rng.integers(1, 60)), seed=i % 9), max_tokens=int(rng.integers(1, 50)))
        for i in range(count)
    ]
    for r, completion in zip(requests, run(engine, requests), strict=True):
        check_logprobs(model, r.prompt_ids.tolist(), completion)
        assert completion.finish is (FinishReason.STOP if completion.token_ids[-1] == 7 else FinishReason.LENGTH)
    engine.close()


@pytest.fixture
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler for the attention that is invariant")
@pytest.mark.parametrize(("key_heads", "num_threads"), [(1, 1), (2, 2), (4, 2)], indirect=["num_threads"])
def test_no_bit_of_a_rollout_depends_on_what_shares_its_batch_or_on_interruptions(key_heads: int, num_threads: int):
    torch.manual_seed(0)
    shape = {**SHAPE, "hidden_size": 64, "num_key_value_heads": key_heads, "vocab_size": 1000}
    model = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    settings = ({}, {"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.05}, {"temperature": 0.0})
    rng = np.random.default_rng(key_heads)
    prompts = [tokens(int(rng.integers(1, 300)), seed=i) for i in range(5)]

    def some_rows() -> list[Generation]:
        draw = np.random.default_rng(0)
        return [
            generation(f"r{i}", prompts[i % 5][: int(draw.integers(1, 300))], int(draw.integers(1, 150)), i, **fields)
            for i, fields in enumerate(settings * 4)
        ]

    alone, together, batch = some_rows(), some_rows(), make_batch(model)
    for row in alone:
        single = make_batch(model)
        with torch.inference_mode():
            single.admit([row])
        finish(single, [row], chunk=10_000)
    waiting, interruptions = list(rng.permutation(len(together))), 0
    with torch.inference_mode():
        while waiting or batch.rows:
            if waiting and rng.random() < 0.3:
                count = int(rng.integers(1, 8))
                batch.admit([together[i] for i in waiting[:count]])
                del waiting[:count]
            batch.step(int(rng.choice([5, 30, 512])))
            gone = [row for row in batch.rows if rng.random() < 0.01]
            batch.remove(gone.__contains__)
            waiting += [together.index(row) for row in gone]
            interruptions += len(gone)
    assert interruptions > 5
    for one, other in zip(alone, together, strict=True):
        assert one.progress.token_ids == other.progress.token_ids
        assert one.progress.logprobs == other.progress.logprobs
