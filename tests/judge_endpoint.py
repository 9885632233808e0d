"""An endpoint with OpenAI's chat completions on this machine, whose replies a test writes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from posttrain.types import Message

Body = Mapping[str, Any]


def verdict(messages: Sequence[Message], label: str = "met", *, nonce: str | None = None) -> str:
    """A well-formed reply in the JSON dialect to its question."""
    asked = str(messages[0]["content"])
    given = re.search(r'"n": "([0-9a-f]+)"', asked)
    names = re.findall(r'\{"id": ("(?:[^"\\]|\\.)*"), "evidence"', asked)
    assert given
    rows = [{"id": json.loads(name), "evidence": "", "verdict": label} for name in names]
    return json.dumps({"n": nonce or given[1], "verdicts": rows})


def completion(text: str | None, *, finish: str = "stop", prompt_tokens: int = 50, tokens: int = 10) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    return {"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage}


def honest(body: Body) -> web.Response:
    return web.json_response(completion(verdict(body["messages"])))


@dataclass
class Endpoint:
    """A server that answers request number i, counted from 0, with ``answer(i, request, body)``."""

    answer: Callable[[int, web.Request, Body], Awaitable[web.StreamResponse]]
    requests: list[Body] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    url: str = ""
    port: int = 0
    _runner: web.AppRunner | None = None

    async def start(self) -> None:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", self._handle)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.requests)
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        self.times.append(asyncio.get_running_loop().time())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.answer(number, request, body)
        finally:
            self.in_flight -= 1


@contextlib.asynccontextmanager
async def serving(answer: Callable[[int, web.Request, Body], Awaitable[web.StreamResponse]]) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(answer)
    await endpoint.start()
    try:
        yield endpoint
    finally:
        await endpoint.stop()
