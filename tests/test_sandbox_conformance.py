"""Every check of the conformance suite, on every kind of box this machine can open."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import pytest

from posttrain.errors import SandboxUnavailable
from posttrain.protocols import Substrate
from sandbox import dockerd
from sandbox.conformance import CHECKS, WHOLE, Check, check_box
from sandbox.container import Container
from sandbox.process import Process

KINDS = [Process(), pytest.param(Container(), marks=pytest.mark.docker)]


@pytest.fixture
def substrate(request: pytest.FixtureRequest) -> Substrate:
    kind: Substrate = request.param
    try:
        if isinstance(kind, Container) and os.geteuid() == 0:
            dockerd.start()
        kind.check()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    return kind


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("substrate", KINDS, indirect=True, ids=["process", "container"])
def test_box(substrate: Substrate, check: Check) -> None:
    asyncio.run(check_box(substrate, check))


@pytest.mark.parametrize("check", WHOLE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("substrate", KINDS, indirect=True, ids=["process", "container"])
def test_substrate(substrate: Substrate, check: Callable[[Substrate], Awaitable[None]]) -> None:
    asyncio.run(check(substrate))
