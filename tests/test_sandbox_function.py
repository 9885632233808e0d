from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from posttrain.errors import RecipeError
from posttrain.types import SandboxSpec
from sandbox.client import AgentSandbox
from sandbox.function import Function
from sandbox.local import LocalUnsafe
from sandbox.pool import close_pools
from tests.boxes import require

SPEC = SandboxSpec(timeout_s=5.0)


@pytest.fixture
def substrate() -> Function:
    return require(Function(warm=1, max_calls=4))


def _boxes(substrate: Function, *uses: Callable[[AgentSandbox], Awaitable[object]]) -> list[AgentSandbox]:
    """The box each use had, one after the other."""

    async def play() -> list[AgentSandbox]:
        boxes = []
        for use in uses:
            async with substrate.open(SPEC) as box:
                await use(box)
                boxes.append(box)
        await close_pools()
        return boxes

    return asyncio.run(play())


async def _call(box: AgentSandbox) -> None:
    result = await box.call("import json, os; print(json.dumps(os.listdir('.')))")
    assert result.stdout == b"[]\n"


def test_a_box_that_only_had_calls_serves_again_until_it_has_had_enough(substrate: Function) -> None:
    boxes = _boxes(replace(substrate, warm=1), _call, _call, _call, _call, _call)
    assert len(set(boxes)) == 2
    assert boxes[0].num_calls == substrate.max_calls + 1


@pytest.mark.parametrize(
    "use",
    [
        lambda box: box.exec("true"),
        lambda box: box.write("x", b""),
        lambda box: box.upload({"x": b""}),
        lambda box: box.session(),
        lambda box: box.spawn("true"),
        lambda box: box.call("while True: pass", timeout_s=0.1),
        lambda box: box.call("import ctypes; ctypes.CDLL(None).semget(1, 1, 0o1600)"),
    ],
    ids=["command", "file", "files", "session", "job", "time", "semaphore"],
)
def test_a_box_that_was_used_for_more_is_discarded(
    substrate: Function, use: Callable[[AgentSandbox], Awaitable[object]]
) -> None:
    first, second = _boxes(substrate, use, _call)
    assert first is not second


def test_what_cannot_be_a_function_box_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"Function\.warm = 0"):
        Function(warm=0)

    async def play() -> None:
        async with Function(base=LocalUnsafe(True)).open(SPEC):
            pass

    with pytest.raises(RecipeError, match=r"Function\.base"):
        asyncio.run(play())
