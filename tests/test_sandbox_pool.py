from __future__ import annotations

import asyncio

import pytest

from posttrain.types import SandboxSpec
from sandbox.container import Container
from sandbox.pool import close_pools
from tests.boxes import require


@pytest.mark.docker
def test_pooled_boxes_are_fresh_distinct_and_replaced_when_dead() -> None:
    substrate = require(Container(warm=2))

    async def use(name: str) -> None:
        async with substrate.open(SandboxSpec(files={name: b"x"})) as box:
            assert await box.list() == [name]
            await box.exec("touch left-behind")

    async def play() -> None:
        await asyncio.gather(*(use(f"f{i}") for i in range(4)))
        await use("again")
        await close_pools()

    asyncio.run(play())
