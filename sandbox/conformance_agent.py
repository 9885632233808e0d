"""Checks of what a box driven by the agent can do beyond the protocol. Other boxes skip them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from unittest import SkipTest

from posttrain.protocols import Sandbox
from sandbox.client import AgentSandbox
from sandbox.expectations import expect, raises


def agent_box(box: Sandbox) -> AgentSandbox:
    if not isinstance(box, AgentSandbox):
        raise SkipTest(f"{type(box).__name__} is not driven by the agent")
    return box


async def a_named_command_runs_once(sandbox: Sandbox) -> None:
    box = agent_box(sandbox)
    count = "echo x >> log; wc -l < log"
    first = await box.exec(count, op_id="a")
    expect(await box.exec(count, op_id="a") == first == await box.result_of("a"), "a retry ran it again")
    slow = asyncio.create_task(box.exec(f"sleep 0.4; {count}", op_id="b"))
    await asyncio.sleep(0.1)
    late = await asyncio.gather(box.result_of("b"), box.exec(f"sleep 0.4; {count}", op_id="b"))
    expect([result.stdout for result in (await slow, *late)] == [b"2\n"] * 3, late)
    await box.acknowledge("a")
    await raises(KeyError, box.result_of("a"), "acknowledged")
    expect((await box.exec(count, op_id="a")).stdout == b"3\n", "an acknowledged name is free again")


AGENT_CHECKS: tuple[Callable[[Sandbox], Awaitable[None]], ...] = (a_named_command_runs_once,)
