"""Boxes that wait, started and with a Python interpreter ready to fork, for programs that run once and return.

What comes out of ``Function.open`` is a box like any other. One that was only used for ``call`` is given back and
serves again: each call has a process, a uid and a directory of its own, and leaves none of them behind. Anything else
(a command, a file, a session), any anomaly and ``max_calls`` end the box. It does not suit work of several steps by a
payload that nobody trusts: what a call leaves is looked for in every place that is known, which is less than a box that
is new.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import RecipeError
from posttrain.protocols import Substrate
from posttrain.types import SandboxSpec
from sandbox.client import AgentSandbox, bare, prepare
from sandbox.pool import shared
from sandbox.process import Process


@dataclass(frozen=True, slots=True)
class Function:
    """A warm pool of boxes of another kind, ``warm`` for each spec that has been asked for."""

    base: Substrate = field(default_factory=Process)
    """What the boxes are made of; its boxes must be driven by the agent, as those of ``Process`` are."""
    warm: int = 2
    max_calls: int = 100
    """Calls a box serves before it is replaced."""
    name: str = "function"

    def __post_init__(self) -> None:
        if self.warm < 1 or self.max_calls < 1:
            raise RecipeError(f"Function.warm = {self.warm}, max_calls = {self.max_calls}: expected numbers >= 1")

    def capabilities(self) -> Mapping[str, Any]:
        """Those of the base, and ``call``."""
        return {**self.base.capabilities(), "call": "python", "reuse": "one uid and directory per call"}

    def check(self) -> None:
        """Raise ``SandboxUnavailable`` unless the base can open boxes here."""
        self.base.check()

    @contextlib.asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[AgentSandbox]:
        """A box from the pool. Leaving the context gives it back when nothing of its use is left in it."""
        kind = bare(spec)
        start = functools.partial(_start, self.base)
        pool = shared(self, kind, self.warm, start=start, stop=_stop, reuse=True)
        box = await pool.take()
        reusable = False
        try:
            box.spec = spec
            await prepare(box)
            yield box
            reusable = not box.spoiled and box.num_calls <= self.max_calls
        finally:
            await (pool.give_back(box) if reusable else pool.discard(box))


_stacks: dict[AgentSandbox, contextlib.AsyncExitStack] = {}
"""What ends a box of the base's."""


async def _start(base: Substrate, kind: SandboxSpec) -> AgentSandbox:
    async with contextlib.AsyncExitStack() as stack:
        box = await stack.enter_async_context(base.open(kind))
        if not isinstance(box, AgentSandbox):
            raise RecipeError(f"Function.base = {base!r}: expected a substrate whose boxes the agent drives")
        await box.warm_up()
        _stacks[box] = stack.pop_all()
    return box


async def _stop(box: AgentSandbox) -> None:
    await _stacks.pop(box).aclose()
