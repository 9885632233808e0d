"""Judges behind an endpoint: whatever that does, no score is invented, and the run pauses and goes on."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="judges behind an endpoint need posttrain[judge]")

from aiohttp import web

from posttrain.errors import JudgeError, RecipeError, UnreadableReply
from posttrain.rollout.episode import Boxes, score_rollout
from posttrain.tally import TALLY
from posttrain.types import Completion, FinishReason, Rollout, Score, ScoreStatus, StopReason, Task, Turn
from rewards.endpoint import Budget, EndpointJudge, Limits, _retry_after
from rewards.judge import JsonDialect
from rewards.limits import BudgetExceeded, Ledger, Prices, Rate, Usage
from rewards.rubric import Rubric, RubricReward
from tests.judge_endpoint import Body, Endpoint, completion, honest, serving, verdict

QUICK = Limits(
    max_concurrent=8, attempt_timeout_s=0.4, deadline_s=3.0, max_retries=2, cooldown_s=0.05, max_cooldown_s=0.2
)
ASK = ({"role": "user", "content": "Is it kind?"},)
Answer = Callable[[int, web.Request, Body], Awaitable[web.StreamResponse]]


def rollout(text: str, name: str = "r") -> Rollout:
    completion = Completion(
        request_id=name,
        token_ids=np.zeros(1, np.int32),
        logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
        finish=FinishReason.STOP,
    )
    turn = Turn(context_ids=np.zeros(1, np.int32), completion=completion, text=text)
    task = Task(id="t", domain="writing", prompt=({"role": "user", "content": "Write."},))
    return Rollout(id=name, task=task, turns=(turn,), stop=StopReason.FINISHED)


def rubric(count: int = 1) -> Rubric:
    criteria = [{"id": f"k{i}", "text": f"Claim {i}."} for i in range(count)]
    return Rubric.model_validate({"schema": "rubric/1", "id": "r", "criteria": criteria})


def judge(endpoint: Endpoint, limits: Limits = QUICK, **more: Any) -> EndpointJudge:
    return EndpointJudge(base_url=endpoint.url, model="m", limits=limits, **more)


async def score(reward: RubricReward, text: str = "Some words.", deadline_s: float = 30.0) -> Score:
    boxes = Boxes(substrate=None, limit=asyncio.Semaphore(1))
    return await score_rollout(rollout(text), reward=reward, boxes=boxes, deadline_s=deadline_s)


def scored(answer: Answer, limits: Limits = QUICK, **options: Any) -> tuple[Score, dict[str, float], Endpoint]:
    """One rollout scored at the boundary where a run scores it, and what the counters say."""

    async def run() -> tuple[Score, dict[str, float], Endpoint]:
        async with serving(answer) as endpoint:
            asked = judge(endpoint, limits)
            given = await score(RubricReward(rubric(), asked, **options))
            return given, await asked.counters(), endpoint

    return asyncio.run(run())


async def kill(_: int, request: web.Request, __: Body) -> web.StreamResponse:
    """Half of the headers' promise, and then the connection is gone."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"choices": [{"message": {"content": "')
    assert request.transport is not None
    request.transport.close()
    return response


async def hang(*_: Any) -> web.StreamResponse:
    await asyncio.sleep(30)
    raise AssertionError("nobody waits that long")


async def drip(_: int, request: web.Request, __: Body) -> web.StreamResponse:
    """A byte now and then, for ever: no time-out between two bytes would notice."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b" ")
        await asyncio.sleep(0.02)


async def flood(_: int, request: web.Request, __: Body) -> web.StreamResponse:
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"x" * (1 << 20))


def fixed(status: int = 200, text: str = "", **headers: str) -> Answer:
    async def answer(*_: Any) -> web.StreamResponse:
        return web.Response(
            status=status, text=text, headers={name.replace("_", "-"): v for name, v in headers.items()}
        )

    return answer


def says(reply: Callable[[Body], Any]) -> Answer:
    async def answer(_: int, __: web.Request, body: Body) -> web.StreamResponse:
        return web.json_response(reply(body))

    return answer


def then_honest(first: Answer, times: int) -> Answer:
    async def answer(number: int, request: web.Request, body: Body) -> web.StreamResponse:
        return await first(number, request, body) if number < times else honest(body)

    return answer


MET = says(lambda body: completion(verdict(body["messages"])))
FAILURES = {
    "killed": (kill, "connection_errors"),
    "hanging": (hang, "timeouts"),
    "dripping": (drip, "timeouts"),
    "flooding": (flood, "malformed"),
    "500": (fixed(500, "oops"), "server_errors"),
    "503": (fixed(503, "oops", Retry_After="0"), "server_errors"),
    "no json": (fixed(200, "<html>met</html>"), "malformed"),
    "truncated json": (fixed(200, json.dumps(completion("met"))[:-9]), "malformed"),
    "no choices": (fixed(200, '{"choices": []}'), "malformed"),
    "an error as 200": (fixed(200, '{"error": {"message": "overloaded"}}'), "malformed"),
    "a list": (fixed(200, "[1]"), "malformed"),
    "content is a number": (fixed(200, '{"choices": [{"message": {"content": 1}}]}'), "malformed"),
    "deep": (fixed(200, "[" * 100_000), "malformed"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_endpoint_gives_no_score_and_its_counter_tells(name: str) -> None:
    answer, counter = FAILURES[name]
    limits = Limits(**{**_fields(QUICK), "max_retries": 1})
    given, counts, endpoint = scored(answer, limits)
    assert (given.value, given.status) == (None, ScoreStatus.JUDGE_ERROR)
    assert "no reply after 2 failures" in str(given.error)
    assert (counts[counter], counts["retries"], counts.get("replies", 0)) == (2, 1, 0)
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_that_passes_costs_nothing_but_time(name: str) -> None:
    answer, counter = FAILURES[name]
    given, counts, _ = scored(then_honest(answer, 1))
    assert (given.value, given.status) == (1.0, ScoreStatus.OK)
    assert (counts[counter], counts["replies"]) == (1, 1)


def _fields(limits: Limits) -> dict[str, Any]:
    return {name: getattr(limits, name) for name in Limits.__dataclass_fields__}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302])
def test_a_refusal_is_not_repeated(status: int) -> None:
    given, counts, endpoint = scored(fixed(status, "no such model"))
    assert given.value is None
    assert "no such model" in str(given.error)
    assert (len(endpoint.requests), counts["refused"]) == (1, 1)
    assert "retries" not in counts


UNREADABLE = {
    "another request's nonce": says(lambda body: completion(verdict(body["messages"], nonce="f" * 32))),
    "prose": says(lambda body: completion("I would say that it is met. Score: 1.0")),
    "empty": says(lambda body: completion("")),
    "null": says(lambda body: completion(None)),
    "cut off": says(lambda body: completion(verdict(body["messages"]), finish="length")),
    "filtered": says(lambda body: completion(verdict(body["messages"]), finish="content_filter")),
    "cut off in the middle": says(lambda body: completion(verdict(body["messages"])[:-4])),
    "the prompt": says(lambda body: completion(body["messages"][0]["content"] + body["messages"][1]["content"])),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_reply_without_a_verdict_of_its_own_is_none_after_the_retries(name: str) -> None:
    given, counts, endpoint = scored(UNREADABLE[name], max_retries=2)
    assert (given.value, given.status) == (None, ScoreStatus.PARSE_ERROR)
    assert len({json.dumps(body) for body in endpoint.requests}) == len(endpoint.requests) == 3
    assert counts["replies"] == 3


def test_replies_that_belong_to_each_other_s_questions_score_nothing() -> None:
    """Two questions whose replies are swapped on the way: each carries the nonce of the other."""

    async def run() -> list[Score]:
        waiting: list[tuple[Body, asyncio.Future[str]]] = []

        async def swap(_: int, __: web.Request, body: Body) -> web.StreamResponse:
            mine: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            waiting.append((body, mine))
            if len(waiting) == 2:
                (a, first), (b, second) = waiting
                first.set_result(verdict(b["messages"]))
                second.set_result(verdict(a["messages"]))
                waiting.clear()
            return web.json_response(completion(await mine))

        async with serving(swap) as endpoint:
            reward = RubricReward(rubric(), judge(endpoint), max_retries=1)
            return list(await asyncio.gather(score(reward, "A good text."), score(reward, "A bad text.")))

    assert [given.value for given in asyncio.run(run())] == [None, None]


def test_rate_limits_of_the_server_are_waited_for_by_all() -> None:
    async def run() -> tuple[list[Score], dict[str, float], Endpoint]:
        async def limited(number: int, _: web.Request, body: Body) -> web.StreamResponse:
            if number == 3:
                return web.Response(status=429, headers={"Retry-After": "1"}, text="slow down")
            return honest(body)

        async with serving(limited) as endpoint:
            asked = judge(endpoint, Limits(max_concurrent=1))
            reward = RubricReward(rubric(4), asked)
            given = await asyncio.gather(*(score(reward, f"Text {i}.") for i in range(3)))
            return list(given), await asked.counters(), endpoint

    given, counts, endpoint = asyncio.run(run())
    assert [each.value for each in given] == [1.0] * 3
    assert (counts["rate_limited"], counts["replies"], counts["calls"]) == (1, 12, 13)
    assert endpoint.times[4] - endpoint.times[3] >= 0.99
    assert counts["paused_s"] == pytest.approx(1.0, abs=0.1)
    assert counts["opened"] == 0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("-3", 0.0), ("9999999", 3600.0), ("soon", None), ("", None), ("nan", None)],
)
def test_retry_after_is_read_or_ignored(header: str, seconds: float | None) -> None:
    assert _retry_after({"Retry-After": header}) == seconds


def test_retry_after_may_be_a_date() -> None:
    at = email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30), usegmt=True)
    assert _retry_after({"Retry-After": at}) == pytest.approx(30, abs=2)


def test_waiting_for_a_rate_is_not_held_against_a_question() -> None:
    async def run() -> list[float]:
        limits = Limits(**{**_fields(QUICK), "requests_per_minute": 120, "deadline_s": 1.0})
        async with serving(then_honest(fixed(500), 1)) as endpoint:
            reward = RubricReward(rubric(), judge(endpoint, limits))
            given = await asyncio.gather(*(score(reward, f"Text {i}.") for i in range(5)))
            return [each.value or 0.0 for each in given]

    assert asyncio.run(run()) == [1.0] * 5


def test_a_server_that_says_429_for_ever_gives_no_score() -> None:
    limits = Limits(**{**_fields(QUICK), "max_pause_s": 0.5})
    given, counts, _ = scored(fixed(429, "no", Retry_After="0"), limits)
    assert (given.value, given.status) == (None, ScoreStatus.JUDGE_ERROR)
    assert 2 <= counts["rate_limited"] <= 6


def test_an_endpoint_that_dies_pauses_the_run_which_goes_on_when_it_is_back() -> None:
    async def run() -> tuple[list[Score], dict[str, float], int]:
        async with serving(MET) as endpoint:
            asked = judge(endpoint, Limits(**{**_fields(QUICK), "breaker_failures": 4, "max_concurrent": 4}))
            reward = RubricReward(rubric(3), asked)
            assert (await score(reward, "Before.")).value == 1.0
            await endpoint.stop()
            scoring = [asyncio.create_task(score(reward, f"Text {i}.")) for i in range(8)]
            await asyncio.sleep(1.2)
            assert not any(task.done() for task in scoring)
            paused = len(endpoint.requests)
            counts = await asked.counters()
            # While it is down there is one probe now and then, however many questions wait.
            assert counts["connection_errors"] < 24
            await endpoint.start()
            return list(await asyncio.gather(*scoring)), await asked.counters(), paused

    given, counts, paused = asyncio.run(run())
    assert [each.value for each in given] == [1.0] * 8
    assert (counts["opened"], paused, counts["replies"]) == (1, 3, 27)
    assert counts["paused_s"] > 0.8


def test_an_endpoint_that_stays_dead_leaves_rollouts_unscored_after_the_longest_pause() -> None:
    async def run() -> tuple[list[Score], float]:
        async with serving(MET) as endpoint:
            limits = Limits(**{**_fields(QUICK), "breaker_failures": 2, "max_pause_s": 0.6, "max_concurrent": 2})
            reward = RubricReward(rubric(), judge(endpoint, limits))
            await endpoint.stop()
            started = asyncio.get_running_loop().time()
            given = await asyncio.gather(*(score(reward, f"Text {i}.") for i in range(20)))
            return list(given), asyncio.get_running_loop().time() - started

    given, took = asyncio.run(run())
    assert {(each.value, each.status) for each in given} == {(None, ScoreStatus.JUDGE_ERROR)}
    # Not one pause after another.
    assert took < 4


def test_a_slow_endpoint_is_used_up_to_the_limit_and_no_further() -> None:
    async def run() -> tuple[list[Score], Endpoint, float]:
        async def slow(_: int, __: web.Request, body: Body) -> web.StreamResponse:
            await asyncio.sleep(0.1)
            return honest(body)

        async with serving(slow) as endpoint:
            reward = RubricReward(rubric(4), judge(endpoint))
            started = asyncio.get_running_loop().time()
            given = await asyncio.gather(*(score(reward, f"Text {i}.") for i in range(10)))
            return list(given), endpoint, asyncio.get_running_loop().time() - started

    given, endpoint, took = asyncio.run(run())
    assert [each.value for each in given] == [1.0] * 10
    assert endpoint.most_in_flight == 8
    # One after the other they would take 4 s.
    assert took < 2.5


def test_rollouts_are_scored_as_they_end_and_a_cancelled_one_frees_its_place() -> None:
    async def run() -> None:
        async def some(number: int, request: web.Request, body: Body) -> web.StreamResponse:
            return await hang() if "slow" in body["messages"][1]["content"] else honest(body)

        async with serving(some) as endpoint:
            reward = RubricReward(rubric(), judge(endpoint, Limits(max_concurrent=2)))
            stuck = asyncio.create_task(score(reward, "A slow one."))
            assert (await score(reward, "A quick one.")).value == 1.0
            assert not stuck.done()
            late = await score(reward, "Another slow one.", deadline_s=0.2)
            assert (late.value, late.status) == (None, ScoreStatus.TIMEOUT)
            assert (await score(reward, "A quick one again.")).value == 1.0
            stuck.cancel()
            counts = await reward.judge.counters()  # type: ignore[union-attr]
            assert counts["in_flight"] <= 1

    asyncio.run(run())


def test_request_and_token_rates_are_kept() -> None:
    def run_it(**rates: float) -> list[float]:
        async def reply(_: int, __: web.Request, body: Body) -> web.StreamResponse:
            return web.json_response(completion("yes", prompt_tokens=27, tokens=83))

        async def go() -> list[float]:
            async with serving(reply) as endpoint:
                asked = judge(endpoint, Limits(**{**_fields(QUICK), **rates}))
                await asyncio.gather(*(asked.ask(ASK, max_tokens=83, seed=i) for i in range(8)))
                return [time - endpoint.times[0] for time in endpoint.times]

        return asyncio.run(go())

    # Four a second: four at once, then one every quarter of a second.
    by_requests = run_it(requests_per_minute=240)
    assert 0.9 < by_requests[-1] < 3
    # 440 tokens a second at 110 each.
    by_tokens = run_it(tokens_per_minute=440 * 60)
    assert 0.9 < by_tokens[-1] < 3
    assert run_it()[-1] < 0.8


def test_a_rate_gives_back_what_was_not_used_and_lets_big_ones_through() -> None:
    async def run() -> float:
        rate = Rate(6000)
        loop = asyncio.get_running_loop()
        started = loop.time()
        await rate.take(250)
        rate.correct(250)
        await rate.take(50)
        return loop.time() - started

    assert asyncio.run(run()) < 0.1


def test_a_budget_is_never_passed_and_says_so() -> None:
    async def run() -> tuple[list[Any], EndpointJudge, dict[str, float], Endpoint]:
        async def reply(_: int, __: web.Request, body: Body) -> web.StreamResponse:
            await asyncio.sleep(0.02)
            return web.json_response(completion("yes", prompt_tokens=20, tokens=30))

        async with serving(reply) as endpoint:
            # A question takes at most 27 bytes and template tokens, and 73: 100 tokens, of which 50 are used.
            asked = judge(endpoint, budget=Budget(max_tokens=1000))
            calls = [asked.ask(ASK, max_tokens=73, seed=i) for i in range(40)]
            return await asyncio.gather(*calls, return_exceptions=True), asked, await asked.counters(), endpoint

    results, _, counts, endpoint = asyncio.run(run())
    answered = [result for result in results if result == "yes"]
    refused = [result for result in results if isinstance(result, BudgetExceeded)]
    assert len(answered) + len(refused) == 40
    # The last 100 tokens are not enough for a call that may take 100 only when 50 of them are gone.
    assert len(answered) == len(endpoint.requests) == 19
    assert counts["prompt_tokens"] + counts["completion_tokens"] == 950 <= 1000
    assert "raise the budget" in str(refused[0])


def test_money_is_counted_with_cached_tokens_and_a_budget_in_money_is_kept() -> None:
    prices = Prices(input=2.0, output=10.0, cached_input=0.5)
    assert prices.cost(Usage(1_000_000, 100_000, 400_000)) == pytest.approx(1.2 + 0.2 + 1.0)

    async def run() -> tuple[list[Any], dict[str, float]]:
        async def reply(_: int, __: web.Request, body: Body) -> web.StreamResponse:
            given = completion("yes", prompt_tokens=27, tokens=73)
            given["usage"]["prompt_tokens_details"] = {"cached_tokens": 7}
            return web.json_response(given)

        async with serving(reply) as endpoint:
            # At most 27 * 2 + 73 * 10 = 784 millionths a call.
            asked = judge(endpoint, prices=prices, budget=Budget(max_cost=784e-6 * 3))
            calls = [await _outcome(asked.ask(ASK, max_tokens=73, seed=i)) for i in range(5)]
            return calls, await asked.counters()

    calls, counts = asyncio.run(run())
    assert [call == "yes" for call in calls] == [True, True, True, False, False]
    assert counts["cost"] == pytest.approx(3 * (20 * 2 + 7 * 0.5 + 730) / 1e6)
    assert counts["cached_tokens"] == 21


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 1, "completion_tokens": float("inf")},
        {"prompt_tokens": 1, "completion_tokens": 10**400},
        {"prompt_tokens": 1, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 1000}},
    ],
)
def test_a_usage_that_cannot_be_is_none_and_the_most_is_taken(usage: dict[str, Any]) -> None:
    async def run() -> tuple[str, dict[str, float]]:
        async def reply(_: int, __: web.Request, body: Body) -> web.StreamResponse:
            return web.json_response(completion("yes") | {"usage": usage})

        async with serving(reply) as endpoint:
            asked = judge(endpoint, prices=Prices(input=2.0, output=10.0, cached_input=0.5))
            return await asked.ask(ASK, max_tokens=5, seed=0), await asked.counters()

    text, counts = asyncio.run(run())
    assert text == "yes"
    assert counts["replies_without_usage"] == 1
    assert "cost" not in counts


def test_half_a_surrogate_pair_in_what_is_judged_is_no_obstacle() -> None:
    async def run() -> Score:
        async with serving(says(lambda body: completion(verdict(body["messages"])))) as endpoint:
            return await score(RubricReward(rubric(), judge(endpoint)), "Some \ud800 words.")

    assert asyncio.run(run()).value == 1.0


async def _outcome(call: Awaitable[str]) -> Any:
    try:
        return await call
    except JudgeError as error:
        return error


def test_what_may_have_been_charged_counts_as_spent() -> None:
    async def run(answer: Answer) -> list[bool]:
        async with serving(answer) as endpoint:
            asked = judge(endpoint, Limits(**{**_fields(QUICK), "max_retries": 0}), budget=Budget(max_tokens=250))
            outcomes = [await _outcome(asked.ask(ASK, max_tokens=73, seed=i)) for i in range(4)]
            return [isinstance(outcome, BudgetExceeded) for outcome in outcomes]

    assert asyncio.run(run(hang)) == [False, False, True, True]
    assert asyncio.run(run(fixed(500))) == [False, False, False, False]


def test_a_ledger_on_disk_is_shared_and_survives(tmp_path: Any) -> None:
    path = str(tmp_path / "a" / "spent.sqlite")

    async def run() -> None:
        first, second = Ledger(max_tokens=100, path=path), Ledger(max_tokens=100, path=path, patience_s=0.1)
        await first.put_aside(60, 0)
        with pytest.raises(BudgetExceeded):
            await second.put_aside(50, 0)
        first.settle((60, 0), (30, 0))
        await second.put_aside(70, 0)
        second.settle((70, 0), (70, 0))
        assert Ledger(path=path).spent == (100, 0)

    asyncio.run(run())


def test_the_key_comes_from_the_environment_and_is_not_in_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    async def plain(_: int, __: web.Request, body: Body) -> web.StreamResponse:
        return web.json_response(completion(""))

    async def go() -> Endpoint:
        async with serving(plain) as endpoint:
            asked = judge(endpoint, api_key_env="SOME_JUDGE_KEY")
            with pytest.raises(RecipeError, match="SOME_JUDGE_KEY"):
                await asked.ask(ASK, max_tokens=5, seed=0)
            monkeypatch.setenv("SOME_JUDGE_KEY", "sk-secret")
            with pytest.raises(UnreadableReply):
                await asked.ask(ASK, max_tokens=5, seed=0)
            assert "sk-secret" not in repr(asked) + str(pickle.dumps(asked))
            return endpoint

    endpoint = asyncio.run(go())
    assert endpoint.headers[0]["Authorization"] == "Bearer sk-secret"
    assert endpoint.requests[0]["seed"] == 0


def test_the_judge_pickles_and_equal_values_share_their_limits_and_counts() -> None:
    async def run() -> None:
        async with serving(MET) as endpoint:
            reward = RubricReward(rubric(), judge(endpoint), dialect=JsonDialect(canary=True))
            again = pickle.loads(pickle.dumps(reward))
            assert again == reward
            before = TALLY.sums().get("judge/replies", 0)
            # This endpoint says met to everything, the canary too.
            assert (await score(again)).value is None
            assert (await reward.judge.counters())["replies"] == 3  # type: ignore[union-attr]
            assert TALLY.sums()["judge/replies"] - before == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EndpointJudge(base_url="localhost:1", model="m"), "base_url"),
        (lambda: EndpointJudge(base_url="http://x/v1", model="m", budget=Budget(max_cost=1.0)), "prices"),
        (lambda: Limits(max_concurrent=0), "max_concurrent"),
        (lambda: Limits(requests_per_minute=0), "requests_per_minute"),
        (lambda: Limits(max_retries=-1), "max_retries"),
    ],
)
def test_values_that_make_no_sense_say_so(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()
