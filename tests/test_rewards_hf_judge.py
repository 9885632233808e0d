"""Judges that are models: in this process, behind a real server, and with their replies kept."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from posttrain.errors import JudgeError, RecipeError, UnreadableReply
from posttrain.models import load_model, load_tokenizer
from posttrain.protocols import Judge
from posttrain.tally import TALLY
from posttrain.types import Message, ScoreStatus
from rewards.hf_judge import HFJudge
from rewards.judge import LineDialect, parse_line_reply, render_line_prompt
from rewards.judge_cache import CachedJudge
from rewards.rows import rollout_of
from rewards.rubric import Rubric, RubricReward
from tests.tiny_models import save_tiny_model

ASK: tuple[Message, ...] = ({"role": "user", "content": "Is it met?"},)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("judge"))


async def replies(judge: Judge, seeds: Sequence[int], max_tokens: int = 40) -> list[str]:
    async def one(seed: int) -> str:
        try:
            return await judge.ask(ASK, max_tokens=max_tokens, seed=seed)
        except UnreadableReply as cut:
            return f"cut off: {cut.reply}"

    return list(await asyncio.gather(*map(one, seeds)))


def test_a_model_in_this_process_answers_by_seed_whatever_else_is_asked(model: str) -> None:
    judge = HFJudge(path=model, dtype="float32")
    assert isinstance(judge, Judge)
    together = asyncio.run(replies(judge, range(6)))
    assert asyncio.run(replies(pickle.loads(pickle.dumps(judge)), [3])) == [together[3]]
    assert len(set(together)) > 1
    # A random model hardly ever ends a turn: what it says is cut off, and nobody reads it.
    assert any(reply.startswith("cut off") for reply in together)


def test_a_question_longer_than_the_window_is_a_failure_of_the_judge(model: str) -> None:
    with pytest.raises(JudgeError, match="cannot be asked"):
        asyncio.run(HFJudge(path=model).ask(({"role": "user", "content": "x" * 600},), max_tokens=5, seed=0))


def test_a_forced_reply_is_the_likelier_of_two(model: str) -> None:
    judge = HFJudge(path=model, forced=True, dtype="float32")
    question = render_line_prompt("Is short.", "No.", "12ab")
    reply = asyncio.run(judge.ask(question, max_tokens=1, seed=0))
    network, tokenizer = load_model(model, torch.float32), load_tokenizer(model)
    asked = tokenizer.apply_chat_template(list(question), tokenize=False, add_generation_prompt=True)
    likelihoods = {}
    for option in ('"" 12ab unmet', '"" 12ab met'):
        ids = tokenizer(asked + option + "<|end|>", add_special_tokens=False, return_tensors="pt").input_ids
        given = tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids.shape[1]
        with torch.no_grad():
            chances = network(ids).logits.softmax(-1)[0]
        steps = range(given - 1, ids.shape[1] - 1)
        likelihoods[option] = math.prod(float(chances[i, ids[0, i + 1]]) for i in steps)
    assert reply == max(likelihoods, key=likelihoods.__getitem__)
    assert parse_line_reply(reply, "12ab").label in ("met", "unmet")
    with pytest.raises(JudgeError, match="LineDialect"):
        asyncio.run(judge.ask(ASK, max_tokens=1, seed=0))


def test_a_random_model_scores_nothing(model: str) -> None:
    reward = RubricReward(Rubric.load("refusal"), HFJudge(path=model), LineDialect(), max_retries=1, max_tokens=20)
    score = asyncio.run(reward.score(rollout_of({"prompt": "Hi", "response": "No."}, default_id="r")))
    assert (score.value, score.status) == (None, ScoreStatus.PARSE_ERROR)


@dataclass
class Counting:
    """Numbers its replies; fails when ``down``."""

    identity: str = "counting"
    calls: list[int] = field(default_factory=list)
    down: bool = False

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        self.calls.append(seed)
        if self.down:
            raise JudgeError("down")
        return f"reply {len(self.calls)}"


def test_a_kept_reply_is_that_of_the_same_question_and_no_other(tmp_path: Path) -> None:
    async def run() -> None:
        judge, path = Counting(), str(tmp_path / "new" / "replies.sqlite")
        cached = CachedJudge(judge, path)
        before = TALLY.sums()
        first = await cached.ask(ASK, max_tokens=5, seed=1)
        assert await cached.ask(ASK, max_tokens=5, seed=1) == first == "reply 1"
        hits = TALLY.sums()["judge/cache_hits"] - before.get("judge/cache_hits", 0)
        assert (hits, TALLY.sums()["judge/cache_misses"] - before.get("judge/cache_misses", 0)) == (1, 1)
        other = ({"role": "user", "content": "Is it met!"},)
        different = [
            await cached.ask(ASK, max_tokens=5, seed=2),
            await cached.ask(ASK, max_tokens=6, seed=1),
            await cached.ask(other, max_tokens=5, seed=1),
            await CachedJudge(Counting("another", judge.calls), path).ask(ASK, max_tokens=5, seed=1),
        ]
        assert different == ["reply 2", "reply 3", "reply 4", "reply 5"]
        judge.down = True
        for _ in range(2):
            with pytest.raises(JudgeError):
                await cached.ask(ASK, max_tokens=5, seed=9)
        judge.down = False
        assert await cached.ask(ASK, max_tokens=5, seed=9) == "reply 8"
        assert await CachedJudge(Counting(), path).ask(ASK, max_tokens=5, seed=1) == first

    asyncio.run(run())


def test_equal_responses_to_a_task_are_one_question_and_another_vote_or_rubric_is_another(tmp_path: Path) -> None:
    async def run() -> None:
        judge = Counting()
        cached = CachedJudge(judge, str(tmp_path / "replies.sqlite"))
        rubric = Rubric.load("refusal")
        row = {"id": "t", "prompt": "Hi", "response": "No."}

        async def calls(reward: RubricReward, row: dict[str, str]) -> int:
            before = len(judge.calls)
            await reward.score(rollout_of(row, default_id="r"))
            return len(judge.calls) - before

        once = RubricReward(rubric, cached, max_retries=0)
        assert await calls(once, row) == 1
        assert await calls(once, row) == 0
        assert await calls(RubricReward(rubric, cached, max_retries=0, votes=3), row) == 2
        assert await calls(once, {**row, "response": "No!"}) == 1
        assert await calls(once, {**row, "prompt": "Hello"}) == 1
        criterion = rubric.criteria[0].model_copy(update={"text": "Is a refusal."})
        assert (
            await calls(RubricReward(rubric.model_copy(update={"criteria": (criterion,)}), cached, max_retries=0), row)
            == 1
        )

    asyncio.run(run())


def test_a_judge_without_an_identity_is_not_cached(tmp_path: Path) -> None:
    class Nameless:
        async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
            return ""

    with pytest.raises(RecipeError, match="identity"):
        CachedJudge(Nameless(), str(tmp_path / "x"))


SERVING = [name for name in ("aiohttp", "fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def served(model: str) -> Iterator[str]:
    """``transformers serve`` with the tiny model."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = Path(sys.executable).with_name("transformers")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(command), "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", model],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(url, timeout=2) as response:
                assert json.load(response)["status"] == "ok"
                return
        except OSError:
            assert process.poll() is None, "transformers serve ended before it answered"
            time.sleep(0.1)
    raise AssertionError("transformers serve did not answer within 30 s")


@pytest.mark.skipif(bool(SERVING), reason=f"needs {', '.join(SERVING)}: pip install 'posttrain[dev]'")
def test_a_real_endpoint_is_asked_counted_and_not_believed(model: str, served: str) -> None:
    from rewards.endpoint import EndpointJudge, Limits

    async def run() -> tuple[list[str], ScoreStatus, dict[str, float]]:
        judge = EndpointJudge(base_url=served, model=model, limits=Limits(max_concurrent=2, attempt_timeout_s=20))
        said = await replies(judge, range(4), max_tokens=12)
        reward = RubricReward(Rubric.load("refusal"), judge, LineDialect(), max_retries=1, max_tokens=12)
        score = await reward.score(rollout_of({"prompt": "Hi", "response": "No."}, default_id="r"))
        assert score.value is None
        return said, score.status, await judge.counters()

    said, status, counts = asyncio.run(run())
    assert len(said) == 4
    assert status is ScoreStatus.PARSE_ERROR
    assert counts["replies"] == counts["calls"] == 6
    assert counts["prompt_tokens"] > 6 * 10
    assert 6 <= counts["completion_tokens"] <= 6 * 12
    assert counts.get("cut_off", 0) > 0
    assert "malformed" not in counts


@pytest.mark.skipif(bool(SERVING), reason=f"needs {', '.join(SERVING)}: pip install 'posttrain[dev]'")
def test_a_real_endpoint_that_refuses_is_not_asked_again(served: str) -> None:
    from rewards.endpoint import EndpointJudge

    async def run() -> dict[str, float]:
        judge = EndpointJudge(base_url=served.removesuffix("/v1") + "/v2", model="m")
        with pytest.raises(JudgeError, match="404"):
            await judge.ask(ASK, max_tokens=5, seed=0)
        return await judge.counters()

    counts = asyncio.run(run())
    assert (counts["refused"], counts["calls"]) == (1, 1)
