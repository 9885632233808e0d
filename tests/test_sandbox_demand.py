"""How many boxes wait started, and whose they are."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from posttrain.errors import SandboxError
from posttrain.types import SandboxSpec
from sandbox.demand import LEAD_S, MEMORY_S, Demand, WarmBoxes
from sandbox.process import Process
from tests.boxes import require
from tests.test_sandbox_edge import Clock, Memory


def test_a_steady_rate_is_measured_and_forgotten() -> None:
    demand = Demand()
    demand.arrived(0.0)
    assert demand.wanted(0.0) == 0, "one arrival is no demand"
    for second in range(1, 300):
        demand.arrived(float(second))
    assert demand.wanted(299.0) == pytest.approx(LEAD_S, abs=1), "one a second: ten in ten seconds"
    assert demand.wanted(299.0 + MEMORY_S) == pytest.approx(LEAD_S / 2.7, abs=1)
    assert demand.wanted(299.0 + 10 * MEMORY_S) == 0


def test_boxes_wait_for_their_kind_within_cap_and_room_and_go_when_demand_stops() -> None:
    memory, clock = Memory(), Clock()
    warm = WarmBoxes(3, clock=clock)

    def waiting() -> int:
        return sum(not box.removed for box in memory.made)

    async def ask(spec: SandboxSpec, times: int) -> None:
        for _ in range(times):
            async with warm.open(memory, spec):
                pass

    async def resize(free: int) -> int:
        await warm.resize(free)
        await asyncio.sleep(0.01)
        return waiting()

    async def play() -> None:
        small, large = SandboxSpec(), SandboxSpec(memory_mb=512)
        await ask(small, 1)
        assert await resize(100) == 0
        await ask(small, 20)
        assert await resize(100) == 3, "the cap"
        await ask(large, 6)
        assert await resize(4) == 4, "the room"
        assert await resize(1) == 1
        made = len(memory.made)
        async with warm.open(memory, SandboxSpec(files={"a": b"1"})) as box:
            assert box in memory.made[:made], "files make no other kind"
        clock.now = 20 * MEMORY_S
        assert await resize(100) == 0
        await ask(small, 20)
        assert await resize(100) == 3
        await warm.close()
        assert waiting() == 0

    asyncio.run(play())


def test_a_substrate_with_a_pool_of_its_own_is_left_to_it() -> None:
    class Pooled(Memory):
        warm = 1

    memory, warm = Pooled(), WarmBoxes(3, clock=Clock())

    async def play() -> None:
        for _ in range(20):
            async with warm.open(memory, SandboxSpec()):
                pass
        await warm.resize(100)
        assert all(box.removed for box in memory.made)

    asyncio.run(play())


def test_a_waiting_box_that_died_is_not_handed_out_and_a_taken_one_is_like_new() -> None:
    require(Process())

    async def play() -> None:
        warm = WarmBoxes(2, clock=Clock())
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(warm.close)
            for _ in range(6):
                async with warm.open(Process(), SandboxSpec()):
                    pass
            await warm.resize(100)
            ((_, pool),) = warm._kinds.values()
            await asyncio.gather(*pool._starting)
            dead, ready = pool._ready
            dead.kill()
            async with warm.open(Process(), SandboxSpec(files={"a": b"1"})) as box:
                assert box is ready
                assert await box.list() == ["a"]
                assert (await box.exec("cat a")).stdout == b"1"

    asyncio.run(play())


def test_a_box_that_cannot_be_started_says_so() -> None:
    async def play() -> None:
        warm = WarmBoxes(2, clock=Clock())
        memory = Memory(problem="no daemon")
        for _ in range(3):
            with pytest.raises(SandboxError, match="no daemon"):
                async with warm.open(memory, SandboxSpec()):
                    pass
        await warm.resize(100)
        await asyncio.sleep(0.01)
        await warm.close()

    asyncio.run(play())
