"""A judge behind an HTTP endpoint with OpenAI's chat completions: vLLM, SGLang, ``transformers serve``, providers.

What the endpoint fails at is never a verdict. It is tried again where that makes sense (connection, 429, 5xx, time-out,
a body that is no completion); while the endpoint is down all questions wait, and go on when it is back.

Needs aiohttp: ``pip install 'posttrain[judge]'``.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import random
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.errors import JudgeError, RecipeError, UnreadableReply
from posttrain.tally import TALLY
from posttrain.types import Message
from rewards.limits import Breaker, BudgetExceeded, Ledger, Passage, Prices, Rate, Usage

if TYPE_CHECKING:
    import aiohttp

_MAX_BODY = 4 << 20
"""Bytes of a reply's body; what goes on after that is no completion."""
_TEMPLATE_TOKENS = 16
"""What a chat template may add to a message."""
_MOST_TOKENS = 1 << 40
"""A reply that says it took more says nothing."""
_OK = 200
_TOO_MANY_REQUESTS = 429
_SERVER_ERROR = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one process asks of an endpoint. Divide a provider's rates among the rollout workers."""

    max_concurrent: int = 32
    """Requests under way at once."""
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    """Prompt and completion. A request takes what it may need, and gives back what it did not."""
    attempt_timeout_s: float = 60.0
    """Of one request; after it the connection is closed."""
    deadline_s: float = 180.0
    """Of one question, with its retries and their pauses, not counting waits for a place, a rate or the circuit."""
    max_retries: int = 4
    """Further requests after failures that may pass."""
    max_pause_s: float = 240.0
    """How long a question waits for an endpoint that is down or asks for patience; longer outages leave rollouts
    unscored. ``Workers.reward_deadline_s``, 300 s, goes on meanwhile: raise both together."""
    breaker_failures: int = 8
    """So many failures in a row, and all questions wait."""
    cooldown_s: float = 1.0
    """Before the first try after that; the pause doubles with every try that fails."""
    max_cooldown_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_concurrent", "attempt_timeout_s", "deadline_s", "max_pause_s", "breaker_failures"):
            if getattr(self, name) <= 0:
                raise RecipeError(f"Limits.{name} = {getattr(self, name)!r}: expected a number > 0")
        for name in ("requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"Limits.{name} = {value!r}: expected a number > 0, or None for no limit")
        if self.max_retries < 0 or not 0 < self.cooldown_s <= self.max_cooldown_s:
            raise RecipeError(
                f"Limits: max_retries = {self.max_retries}, cooldown_s = {self.cooldown_s:g}, max_cooldown_s = "
                f"{self.max_cooldown_s:g}; expected max_retries >= 0 and 0 < cooldown_s <= max_cooldown_s"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What the judge may spend; a call that might pass it is refused with ``BudgetExceeded``."""

    max_tokens: int | None = None
    """Prompt and completion tokens together."""
    max_cost: float | None = None
    """Money, in the currency of the prices."""
    ledger: str | None = None
    """File with what was spent, for all processes of a machine and for a run that is resumed; None counts in this
    process alone, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointJudge:
    """Implements ``posttrain.protocols.Judge``. A value: it pickles, and calls with equal values share their limits.

    Raises ``UnreadableReply`` for a reply cut off by its budget, filtered or empty; ``BudgetExceeded`` for a call that
    is not made; ``JudgeError`` for everything else that leaves no reply.
    """

    base_url: str
    """With the version: ``http://localhost:8000/v1``."""
    model: str
    api_key_env: str | None = None
    """Name of the environment variable that holds the key; the key itself is never kept. None sends no key."""
    temperature: float = 0.5
    """Above 0, so that another seed can give another reply."""
    limits: Limits = field(default_factory=Limits)
    prices: Prices | None = None
    budget: Budget = field(default_factory=Budget)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the request, such as ``{"response_format": {"type": "json_object"}}``."""

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise RecipeError(
                f"EndpointJudge.base_url = {self.base_url!r}: expected http://... or https://... with /v1"
            )
        if self.budget.max_cost is not None and self.prices is None:
            raise RecipeError(
                f"EndpointJudge.budget.max_cost = {self.budget.max_cost:g} but prices is None; give the prices per "
                "million tokens, or set max_tokens instead"
            )

    @property
    def identity(self) -> str:
        """What its replies depend on, besides the question."""
        return json.dumps([self.base_url, self.model, self.temperature, dict(self.extra)], sort_keys=True)

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        return await (await _client(self)).ask(messages, max_tokens=max_tokens, seed=seed)

    async def counters(self) -> dict[str, float]:
        """What the calls of this event loop came to; see ``Client.counters``."""
        return (await _client(self)).counters()


class _Passing(Exception):
    """A failure that may pass."""

    def __init__(self, kind: str, detail: str, *, retry_after_s: float | None = None, billed: bool = False) -> None:
        super().__init__(detail)
        self.kind = kind
        """Name of its counter."""
        self.retry_after_s = retry_after_s
        self.billed = billed
        """Whether the other side may have worked, and charge for it."""


@dataclass(frozen=True, slots=True)
class _Reply:
    text: str
    finish: str
    usage: Usage | None


class Client:
    """The live side of an ``EndpointJudge``: connections, limits and counts of one event loop."""

    def __init__(self, judge: EndpointJudge, session: aiohttp.ClientSession, sessions: AsyncIterator[Any]) -> None:
        limits = judge.limits
        self._judge, self._session, self._limits = judge, session, limits
        # Kept, since a generator that is collected closes what it has opened.
        self._sessions = sessions
        self._url = judge.base_url.rstrip("/") + "/chat/completions"
        self._places = asyncio.Semaphore(limits.max_concurrent)
        self._requests, self._tokens = Rate(limits.requests_per_minute), Rate(limits.tokens_per_minute)
        self._breaker = Breaker(
            threshold=limits.breaker_failures, cooldown_s=limits.cooldown_s, max_cooldown_s=limits.max_cooldown_s
        )
        budget = judge.budget
        self._ledger = Ledger(max_tokens=budget.max_tokens, max_cost=budget.max_cost, path=budget.ledger)
        self._counts: dict[str, float] = {}
        self._latencies: deque[float] = deque(maxlen=2048)
        self._in_flight = 0

    def counters(self) -> dict[str, float]:
        """What the calls of this event loop came to.

        Sums: ``calls``, ``replies``, ``retries``; failures by kind, ``connection_errors``, ``timeouts``,
        ``rate_limited``, ``server_errors`` and ``malformed``; ``refused`` and ``over_budget``; replies that are no
        verdict, ``cut_off``, ``filtered`` and ``empty``; tokens and cost; how often the circuit ``opened``, and for how
        many seconds nobody passed (``paused_s``). No sums: how many are ``in_flight``, and the latency of the latest
        2,048 replies, ``p50_s`` and ``p95_s``.
        """
        ordered = sorted(self._latencies)
        quantiles = {"p50_s": 0.50, "p95_s": 0.95}
        return {
            **self._counts,
            "opened": float(self._breaker.opened),
            "paused_s": self._breaker.paused_s,
            "in_flight": float(self._in_flight),
            **{name: ordered[int(share * (len(ordered) - 1))] if ordered else 0.0 for name, share in quantiles.items()},
        }

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        body = {
            "model": self._judge.model,
            "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
            "max_tokens": max_tokens,
            "temperature": self._judge.temperature,
            "seed": seed,
            **self._judge.extra,
        }
        # No tokenizer makes more tokens of a text than it has bytes.
        size = sum(len(message["content"].encode(errors="replace")) + _TEMPLATE_TOKENS for message in messages)
        reply = await self._try_until_answered(json.dumps(body).encode(), Usage(size, max_tokens))
        if reply.finish == "length":
            self._count("cut_off")
            raise UnreadableReply(f"the judge's reply was cut off after {max_tokens} tokens", reply.text)
        if reply.finish == "content_filter":
            self._count("filtered")
            raise UnreadableReply("the endpoint filtered the judge's reply", reply.text)
        if not reply.text.strip():
            self._count("empty")
            raise UnreadableReply("the judge's reply is empty")
        return reply.text

    async def _try_until_answered(self, body: bytes, most: Usage) -> _Reply:
        """The reply of the first request that has one. Raises ``JudgeError`` when the limits are reached."""
        limits = self._limits
        effort = _Effort(patience_s=limits.max_pause_s)
        while True:
            try:
                async with self._places, self._breaker.passage(effort.patience_s) as passage:
                    effort.patience_s -= passage.waited_s
                    return await self._request(body, most, passage, limits.deadline_s - effort.busy_s)
            except _Passing as failure:
                problem = failure
            effort.busy_s += passage.busy_s
            self._count(problem.kind)
            pause_s = self._pause_after(problem, effort, probe=passage.probe)
            if effort.failures > limits.max_retries or effort.busy_s + pause_s >= limits.deadline_s:
                raise JudgeError(
                    f"judge endpoint {self._url}: no reply after {effort.failures} failures in {effort.busy_s:.1f} s, "
                    f"the last one: {problem}"
                ) from problem
            self._count("retries")
            await asyncio.sleep(pause_s)
            effort.busy_s += pause_s

    def _pause_after(self, problem: _Passing, effort: _Effort, *, probe: bool) -> float:
        """Seconds before the question is tried again."""
        if problem.kind == "rate_limited":
            # Nobody's fault: all wait as long as they are told, and the breaker's patience bounds how often.
            effort.refusals += 1
            asked = problem.retry_after_s
            self._breaker.hold(_backoff(effort.refusals) if asked is None else max(asked, 0.1))
            return 0.0
        if probe:
            # It says that the endpoint is still down, and nothing about this question.
            return 0.0
        effort.failures += 1
        return _backoff(effort.failures)

    async def _request(self, body: bytes, most: Usage, passage: Passage, left_s: float) -> _Reply:
        """One request, within the rates and the budget."""
        aside = (float(most.tokens), self._cost(most))
        try:
            await self._ledger.put_aside(*aside)
        except BudgetExceeded:
            self._count("over_budget")
            raise
        used = (0.0, 0.0)
        try:
            await self._requests.take()
            await self._tokens.take(most.tokens)
            # From here on it may be charged, unless the other side says that it did nothing.
            used = aside
            reply = await self._post(body, passage, min(self._limits.attempt_timeout_s, left_s))
            usage = reply.usage or most
            used = (float(usage.tokens), self._cost(usage))
            self._tokens.correct(most.tokens - usage.tokens)
        except (_Passing, JudgeError) as failure:
            if not getattr(failure, "billed", False):
                used = (0.0, 0.0)
            raise
        finally:
            self._ledger.settle(aside, used)
        self._count_usage(reply)
        return reply

    async def _post(self, body: bytes, passage: Passage, timeout_s: float) -> _Reply:
        """Send it, and read what comes back. Tells the passage whether the endpoint works."""
        import aiohttp

        self._count("calls")
        self._in_flight += 1
        started = time.monotonic()
        try:
            async with self._session.post(
                self._url, data=body, timeout=aiohttp.ClientTimeout(total=timeout_s), allow_redirects=False
            ) as response:
                raw = await _read(response)
                self._check_status(response, raw, passage)
            reply = _parse(raw)
        except aiohttp.InvalidURL as error:
            raise JudgeError(f"judge endpoint: {self._url!r} is not an address") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            passage.worked = False
            raise _passing(error, timeout_s) from error
        finally:
            self._in_flight -= 1
            passage.busy_s = time.monotonic() - started
        self._latencies.append(passage.busy_s)
        return reply

    def _check_status(self, response: aiohttp.ClientResponse, raw: bytes, passage: Passage) -> None:
        """Raises where the status is not 200."""
        status = response.status
        detail = f"status {status}: {raw[:300].decode(errors='replace')}"
        if status == _TOO_MANY_REQUESTS:
            raise _Passing("rate_limited", detail, retry_after_s=_retry_after(response.headers))
        passage.worked = status < _SERVER_ERROR
        if status >= _SERVER_ERROR:
            raise _Passing("server_errors", detail)
        if status != _OK:
            self._count("refused")
            raise JudgeError(
                f"judge endpoint {self._url} refused the request with {detail}; it is not sent again; check model, key "
                "and base_url"
            )

    def _count(self, name: str, amount: float = 1.0) -> None:
        self._counts[name] = self._counts.get(name, 0.0) + amount
        TALLY.add(f"judge/{name}", amount)

    def _count_usage(self, reply: _Reply) -> None:
        self._count("replies")
        if reply.usage is None:
            self._count("replies_without_usage")
            return
        self._count("prompt_tokens", reply.usage.prompt_tokens)
        self._count("completion_tokens", reply.usage.completion_tokens)
        self._count("cached_tokens", reply.usage.cached_tokens)
        if self._judge.prices is not None:
            self._count("cost", self._cost(reply.usage))

    def _cost(self, usage: Usage) -> float:
        return 0.0 if self._judge.prices is None else self._judge.prices.cost(usage)


@dataclass(slots=True)
class _Effort:
    """What was done for one question so far."""

    patience_s: float
    """How long it may still wait for others' sake: an open circuit, a rate limit."""
    failures: int = 0
    refusals: int = 0
    busy_s: float = 0.0


def _backoff(failures: int) -> float:
    """Seconds before the next request: a quarter of one, doubling, 20 at most, with jitter."""
    return float(min(0.25 * 2 ** (failures - 1), 20.0) * (0.5 + random.random()))


def _passing(error: Exception, timeout_s: float) -> _Passing:
    """What kept a request from having a reply."""
    import aiohttp

    if isinstance(error, TimeoutError):
        return _Passing("timeouts", f"no reply within {timeout_s:.1f} s", billed=True)
    if isinstance(error, aiohttp.ClientConnectorError):
        return _Passing("connection_errors", str(error))
    if isinstance(error, aiohttp.ClientError | OSError):
        return _Passing("connection_errors", f"{type(error).__name__}: {error}", billed=True)
    return _Passing("malformed", f"the body is no chat completion: {error}", billed=True)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    raw = bytearray()
    async for chunk in response.content.iter_any():
        raw += chunk
        if len(raw) > _MAX_BODY:
            raise ValueError(f"it is longer than {_MAX_BODY} bytes")
    return bytes(raw)


def _parse(raw: bytes) -> _Reply:
    """Raises ``ValueError``, saying what is missing."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON: {raw[:200]!r}") from None
    try:
        choice = body["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"it has no choices[0].message.content: {raw[:200]!r}") from None
    if not isinstance(text, str | None) or not isinstance(finish, str | None):
        raise ValueError(f"content and finish_reason are to be strings: {raw[:200]!r}")
    return _Reply(text or "", finish or "", _usage(body.get("usage")))


def _usage(found: Any) -> Usage | None:
    """None when the reply does not say what it took."""
    try:
        details = found.get("prompt_tokens_details") or {}
        usage = Usage(
            int(found["prompt_tokens"]), int(found["completion_tokens"]), int(details.get("cached_tokens") or 0)
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    counts = (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
    return usage if min(counts) >= 0 and max(counts) < _MOST_TOKENS and counts[2] <= counts[0] else None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait, from a number or a date; at most an hour."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), 3600.0) if seconds == seconds else None


_CLIENTS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Client]] = weakref.WeakKeyDictionary()


async def _client(judge: EndpointJudge) -> Client:
    """The one client that equal judges have in this event loop."""
    clients = _CLIENTS.setdefault(asyncio.get_running_loop(), {})
    key = repr(judge)
    if key not in clients:
        sessions = _session(judge)
        clients[key] = Client(judge, await anext(sessions), sessions)
    return clients[key]


async def _session(judge: EndpointJudge) -> AsyncIterator[aiohttp.ClientSession]:
    """One session, open until the event loop ends: ``asyncio.run`` closes the generators it has seen."""
    try:
        import aiohttp
    except ImportError:
        raise RecipeError("EndpointJudge needs aiohttp; install posttrain[judge]") from None
    headers = {"Content-Type": "application/json"}
    if judge.api_key_env is not None:
        key = os.environ.get(judge.api_key_env)
        if not key:
            raise RecipeError(
                f"EndpointJudge.api_key_env = {judge.api_key_env!r}: there is no such environment variable here, or it "
                "is empty; set it where the rollout workers run"
            )
        headers["Authorization"] = f"Bearer {key}"
    connector = aiohttp.TCPConnector(limit=judge.limits.max_concurrent)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:
        yield session
