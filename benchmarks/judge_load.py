"""How well a judge's endpoint is used: 1,000 rollouts of 10 criteria each, scored as they end.

The endpoint is a stub with 50 ms of latency in a process of its own, which itself counts how many requests it has at
once; the criterion is how much of the concurrency limit is in use on average, and that memory stays flat.

    python -m benchmarks.judge_load [--quick] [--json FILE]
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.measure import MIB, Metric, arguments, report
from posttrain.rollout.episode import Boxes, score_rollout
from posttrain.types import Completion, FinishReason, Rollout, Score, StopReason, Task, Turn
from rewards.endpoint import EndpointJudge, Limits
from rewards.rubric import Rubric, RubricReward

LATENCY_S = 0.05
CONCURRENCY = 32
CRITERIA = 10
ROLLOUTS_AT_ONCE = 64
"""What a rollout worker plays at once by default; each that ends is scored and makes room for the next."""


def rollout(number: int) -> Rollout:
    text = f"Rollout {number}: " + "the sea is blue, and the harbour sleeps under a thin moon. " * 12
    completion = Completion(
        request_id=str(number),
        token_ids=np.zeros(256, np.int32),
        logprobs=np.zeros(256, np.float32),
        versions=np.zeros(256, np.int32),
        finish=FinishReason.STOP,
    )
    turn = Turn(context_ids=np.zeros(64, np.int32), completion=completion, text=text)
    task = Task(id=f"t{number}", domain="writing", prompt=({"role": "user", "content": "Write about the sea."},))
    return Rollout(id=str(number), task=task, turns=(turn,), stop=StopReason.FINISHED)


def rubric() -> Rubric:
    criteria = [{"id": f"c{i}", "text": f"The text has quality number {i}, said in full."} for i in range(CRITERIA)]
    return Rubric.model_validate({"schema": "rubric/1", "id": "load", "criteria": criteria})


@contextlib.contextmanager
def stub() -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.judge_stub", str(LATENCY_S)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10)


class Memory:
    """Resident memory of this process, sampled as rollouts are scored."""

    def __init__(self) -> None:
        self.samples: list[float] = []

    def sample(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.samples.append(pages * 4096 / MIB)

    def growth_mib(self) -> float:
        """From the second quarter, when everything is warm, to the last."""
        quarter = len(self.samples) // 4
        return float(np.mean(self.samples[-quarter:]) - np.mean(self.samples[quarter : 2 * quarter]))


async def score_all(url: str, count: int, memory: Memory) -> tuple[float, int, dict[str, float]]:
    """Seconds, how many got the score they should have, and the judge's counters."""
    judge = EndpointJudge(base_url=f"{url}/v1", model="stub", limits=Limits(max_concurrent=CONCURRENCY))
    reward = RubricReward(rubric(), judge)
    boxes, places = Boxes(substrate=None, limit=asyncio.Semaphore(1)), asyncio.Semaphore(ROLLOUTS_AT_ONCE)
    right = 0

    def note(score: Score) -> None:
        nonlocal right
        right += score.value == 1.0 and len(score.judgments) == CRITERIA
        memory.sample()

    async def one(number: int) -> None:
        async with places:
            note(await score_rollout(rollout(number), reward=reward, boxes=boxes, deadline_s=300.0))

    await judge.counters()
    started = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(count)))
    return time.perf_counter() - started, right, await judge.counters()


def main() -> None:
    options = arguments(__doc__).parse_args()
    count = 200 if options.quick else 1000
    memory = Memory()
    gc.collect()
    with stub() as url:
        wall_s, right, counts = asyncio.run(score_all(url, count, memory))
        with urllib.request.urlopen(f"{url}/stats") as response:
            seen = json.load(response)
    calls = count * CRITERIA
    metrics = [
        Metric("concurrency in use, seen by the endpoint", seen["mean_in_flight"] / CONCURRENCY, "of limit", ">= 0.9"),
        Metric("latency spent of slots times time", calls * LATENCY_S / (wall_s * CONCURRENCY), "of ideal", ""),
        Metric("most requests at once", seen["most_in_flight"], "requests", f"<= {CONCURRENCY}"),
        Metric("memory growth, second to last quarter", memory.growth_mib(), "MiB", "<= 8"),
        Metric("rollouts scored as they should", right / count, "of all", ">= 1"),
        Metric("calls", counts["calls"], "requests", f"<= {calls}"),
        Metric("throughput", calls / wall_s, "judgments/s", ""),
        Metric("latency of a call, median", counts["p50_s"], "s", ""),
        Metric("latency of a call, 95th percentile", counts["p95_s"], "s", ""),
        Metric("wall time", wall_s, "s", ""),
    ]
    facts = {"rollouts": count, "criteria": CRITERIA, "latency_s": LATENCY_S, "max_concurrent": CONCURRENCY}
    report(f"{count} rollouts of {CRITERIA} criteria, endpoint with {LATENCY_S:g} s", metrics, options.json, **facts)


if __name__ == "__main__":
    main()
