"""What our side of a foreign engine does: journal, resumption, pauses, failures; and vLLM's names, where it lies here.

``ModelSource`` stands for vLLM. It draws from a real tiny model, one forward pass a token, but has no scheduler and no
second process, so these tests say nothing about vLLM itself.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.engine.journal import Progress
from posttrain.engine.streamed_engine import StreamedEngine
from posttrain.engine.token_source import Delta
from posttrain.errors import EngineStopped
from posttrain.types import Completion, FinishReason, Request, Sampling

ROOT = Path(__file__).parent.parent


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class ModelSource:
    """Greedy tokens of a tiny model, none before ``begin_with`` were asked for; ``on_token`` may raise."""

    vocabulary, max_length = 100, 64

    def __init__(
        self, *, stop: int = -1, on_token: Callable[[int], None] = lambda count: None, begin_with: int = 1
    ) -> None:
        self.model, self.stop, self.on_token = tiny_llama(), stop, on_token
        self.awaited, self.begun = begin_with, asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()
        self.drawn, self.closed, self.left, self.log = 0, False, 0, []

    def check(self, request):
        if request.sampling.temperature > 0:
            raise ValueError("Sampling.temperature: greedy only here")

    async def stream(self, request, so_far, room):
        ids = [*request.prompt_ids.tolist(), *so_far]
        self.awaited -= 1
        if self.awaited <= 0:
            self.begun.set()
        try:
            await self.begun.wait()
            for i in range(room):
                await asyncio.sleep(0)
                await self.open.wait()
                self.drawn += 1
                self.on_token(self.drawn)
                with torch.inference_mode():
                    logits = self.model(torch.tensor([ids])).logits[0, -1]
                ids.append(int(logits.argmax()))
                last = FinishReason.STOP if ids[-1] == self.stop else FinishReason.LENGTH if i + 1 == room else None
                yield Delta(token_ids=ids[-1:], logprobs=[logits.sum().item() * 0], kept=[None], finish=last)
                if last:
                    return
        finally:
            self.left += 1

    def stage(self, weights, version):
        if "extra" in weights:
            raise ValueError("1 unknown tensors")
        return weights

    async def pause(self):
        self.open.clear()
        self.log.append("pause")

    async def load(self, staged, version):
        if "broken" in staged:
            raise OSError("half way")
        self.model.load_state_dict(staged)
        await asyncio.sleep(0.02)
        self.log.append("load")

    async def resume(self):
        self.log.append("resume")
        self.open.set()

    def close(self):
        self.closed = True


class ListJournal:
    """Keeps tokens in memory as a file would, and says when a write came; ``fail`` breaks the writes."""

    def __init__(self) -> None:
        self.known: dict[str, Progress] = {}
        self.writes: list[int] = []
        self.fail = self.closed = False

    def begin(self, request):
        old = self.known.get(request.id)
        if old is None:
            return Progress(request)
        return Progress(
            request, list(old.token_ids), list(old.logprobs), list(old.versions), list(old.kept), old.finish
        )

    def append(self, rows):
        if self.fail:
            raise OSError("disk full")
        self.writes.append(len(rows))
        for row in rows:
            self.known[row.request.id] = row

    def when_durable(self, callback, failed=None):
        callback()

    def forget(self, prefix):
        raise AssertionError("only who has the answers knows what may be forgotten")

    def close(self):
        self.closed = True


def engine_over(source_of, **options) -> tuple[StreamedEngine, list[ModelSource]]:
    sources: list[ModelSource] = []

    async def open_source():
        sources.append(source_of())
        return sources[0]

    return StreamedEngine(open_source, **options), sources


def request(name: str, prompt: list[int], **sampling) -> Request:
    return Request(id=name, prompt_ids=np.array(prompt, np.int32), sampling=Sampling(temperature=0, **sampling))


def run(engine: StreamedEngine, *requests: Request) -> list[Completion]:
    async def gather():
        return await asyncio.wait_for(asyncio.gather(*map(engine.generate, requests)), 30)

    return asyncio.run(gather())


def test_streams_share_writes_and_match_the_model():
    journal = ListJournal()
    engine, _ = engine_over(lambda: ModelSource(begin_with=2), journal=journal, version=3)
    first, second = run(engine, request("a", [1, 2], max_tokens=6), request("b", [3], max_tokens=6))
    engine.close()
    expected = tiny_llama().generate(torch.tensor([[1, 2]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert first.token_ids.tolist() == expected[0, 2:].tolist()
    assert first.versions.tolist() == [3] * 6
    assert first.finish is second.finish is FinishReason.LENGTH
    assert sum(journal.writes) == 12
    assert max(journal.writes) == 2


def test_resumes_after_the_last_recorded_token():
    journal = ListJournal()
    engine, _ = engine_over(ModelSource, journal=journal)
    whole = run(engine, request("a", [1, 2], max_tokens=8))[0]
    engine.close()
    row = journal.known["a"]
    for rows in (row.token_ids, row.logprobs, row.versions, row.kept):
        del rows[5:]
    row.finish = None
    engine, sources = engine_over(ModelSource, journal=journal, version=1)
    resumed = run(engine, request("a", [1, 2], max_tokens=8))[0]
    assert resumed.token_ids.tolist() == whole.token_ids.tolist()
    assert resumed.versions.tolist() == [0] * 5 + [1] * 3
    assert sources[0].drawn == 3
    again = run(engine, request("a", [1, 2], max_tokens=8))[0]
    assert again.token_ids.tolist() == whole.token_ids.tolist()
    assert sources[0].drawn == 3
    engine.close()


def test_stop_string_across_a_resumption_and_its_stream_is_left():
    plain, _ = engine_over(ModelSource)
    tokens = run(plain, request("a", [1, 2], max_tokens=8))[0].token_ids.tolist()
    plain.close()
    stop = f"<{tokens[3]}><{tokens[4]}>"
    journal = ListJournal()
    wanted = request("a", [1, 2], max_tokens=8, stop=(stop,))
    journal.known["a"] = Progress(wanted, tokens[:4], [0.0] * 4, [0] * 4, [None] * 4)
    engine, sources = engine_over(ModelSource, journal=journal, decode=lambda ids: "".join(f"<{i}>" for i in ids))
    done = run(engine, wanted)[0]
    engine.close()
    assert done.token_ids.tolist() == tokens[:5]
    assert done.finish is FinishReason.STOP
    assert sources[0].left == 1


def test_weights_arrive_in_a_pause_and_tokens_keep_their_version():
    engine, sources = engine_over(ModelSource)
    other = tiny_llama(1).state_dict()

    async def update_underway():
        task = asyncio.create_task(engine.generate(request("a", [1], max_tokens=60)))
        while sources[0].drawn < 5:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.load_weights, other, 7)
        return await asyncio.wait_for(task, 30)

    done = asyncio.run(update_underway())
    engine.close()
    assert sources[0].log == ["pause", "load", "resume"]
    switch = done.versions.tolist().index(7)
    assert switch >= 5
    assert done.versions.tolist() == [0] * switch + [7] * (60 - switch)
    ids = torch.tensor([[1, *done.token_ids.tolist()]])
    for seed, part in ((0, slice(0, switch)), (1, slice(switch, 60))):
        best = tiny_llama(seed)(ids).logits[0, :-1].argmax(-1)
        assert best[part].tolist() == done.token_ids[part].tolist()


def test_refused_weights_change_nothing_and_half_loaded_ones_stop_the_engine():
    engine, sources = engine_over(ModelSource)
    with pytest.raises(ValueError, match="unknown"):
        engine.load_weights({"extra": torch.zeros(1)}, 1)
    assert (engine.version, sources[0].log) == (0, [])
    with pytest.raises(OSError, match="half way"):
        engine.load_weights({"broken": torch.zeros(1)}, 1)
    with pytest.raises(RuntimeError, match="half way"):
        run(engine, request("a", [1]))
    engine.close()
    assert sources[0].closed


def fail_at_third(count: int) -> None:
    if count == 3:
        raise ConnectionError("the core died")


@pytest.mark.parametrize("broken", ["source", "journal"])
def test_a_failure_reaches_every_waiter(broken):
    journal = ListJournal()
    journal.fail = broken == "journal"
    engine, _ = engine_over(lambda: ModelSource(on_token=fail_at_third if broken == "source" else int), journal=journal)

    async def both():
        calls = [engine.generate(request(name, [1], max_tokens=9)) for name in "ab"]
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 30)

    text = "the core died" if broken == "source" else "disk full"
    assert all(isinstance(error, RuntimeError) and text in str(error) for error in asyncio.run(both()))
    with pytest.raises(RuntimeError, match=text):
        engine.load_weights({}, 1)
    engine.close()


def test_cancelling_leaves_the_stream_and_closing_fails_the_rest():
    engine, sources = engine_over(ModelSource)

    async def cancel_then_close():
        first = asyncio.create_task(engine.generate(request("a", [1], max_tokens=60)))
        second = asyncio.create_task(engine.generate(request("b", [1], max_tokens=60)))
        while sources[0].drawn < 4:
            await asyncio.sleep(0.001)
        first.cancel()
        while not sources[0].left:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)
        with pytest.raises(RuntimeError, match="closed"):
            await asyncio.wait_for(second, 30)
        assert first.cancelled()

    asyncio.run(cancel_then_close())
    engine.close()


def test_a_request_asked_for_twice_is_answered_once_and_one_asker_may_leave():
    journal = ListJournal()
    engine, sources = engine_over(ModelSource, journal=journal)

    async def ask():
        staying, leaving = (asyncio.create_task(engine.generate(request("a", [1], max_tokens=40))) for _ in range(2))
        while sources[0].drawn < 4:
            await asyncio.sleep(0.001)
        leaving.cancel()
        return await asyncio.wait_for(staying, 30)

    assert len(asyncio.run(ask()).token_ids) == sources[0].drawn == 40
    assert engine.counters() == {"decode_tokens": 40, "resumed_tokens": 0, "waiting": 0}
    engine.close()
    assert journal.closed
    with pytest.raises(EngineStopped):
        engine.counters()


def test_bad_input_is_named():
    engine, _ = engine_over(ModelSource)
    for wrong, text in (
        (request("a", [1] * 64), "64 tokens in a window of 64"),
        (request("a", [100]), "expected 0 to 99"),
        (request("a", [1], stop=("x",)), "Sampling.stop"),
        (Request(id="a", prompt_ids=np.array([1], np.int32), sampling=Sampling()), "greedy only"),
    ):
        with pytest.raises(ValueError, match=text):
            run(engine, wrong)
    engine.close()


def test_vllm_names_are_those_of_the_pinned_release():
    source = os.environ.get("POSTTRAIN_VLLM_SOURCE")
    if not source:
        pytest.skip("POSTTRAIN_VLLM_SOURCE names no wheel or folder of vLLM")
    done = subprocess.run([sys.executable, ROOT / "scripts" / "check-vllm", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
