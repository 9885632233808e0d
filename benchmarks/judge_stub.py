"""A stand-in for a judge endpoint, in a process of its own: answers every question after a fixed latency.

    python -m benchmarks.judge_stub LATENCY_S

prints its address, and serves until its standard input ends. ``GET /stats`` tells what it has seen.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time

from aiohttp import web

_NONCE = re.compile(r'"n": "([0-9a-f]+)"')
_ID = re.compile(r'\{"id": ("(?:[^"\\]|\\.)*"), "evidence"')


class Stub:
    """Counts requests, and adds up for how long each number of them was in flight."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._requests = self._in_flight = self._most = 0
        self._request_s = 0.0
        self._first = self._last = 0.0

    async def complete(self, request: web.Request) -> web.Response:
        started = time.monotonic()
        self._first = self._first or started
        self._in_flight += 1
        self._most = max(self._most, self._in_flight)
        try:
            body = await request.json()
            await asyncio.sleep(self._latency_s)
            asked = body["messages"][0]["content"]
            found = _NONCE.search(asked)
            nonce = found[1] if found else ""
            rows = [{"id": json.loads(name), "evidence": "", "verdict": "met"} for name in _ID.findall(asked)]
            text = json.dumps({"n": nonce, "verdicts": rows})
            return web.json_response(
                {
                    "choices": [
                        {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                    ],
                    "usage": {"prompt_tokens": len(asked) // 4, "completion_tokens": len(text) // 4},
                }
            )
        finally:
            self._in_flight -= 1
            self._last = time.monotonic()
            self._requests += 1
            self._request_s += self._last - started

    async def stats(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "requests": self._requests,
                "most_in_flight": self._most,
                "mean_in_flight": self._request_s / max(self._last - self._first, 1e-9),
                "wall_s": self._last - self._first,
            }
        )


async def serve(latency_s: float) -> None:
    stub = Stub(latency_s)
    application = web.Application()
    application.router.add_post("/v1/chat/completions", stub.complete)
    application.router.add_get("/stats", stub.stats)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    # Ends with whoever started it.
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(serve(float(sys.argv[1])))
