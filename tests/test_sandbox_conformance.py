"""Every check of the conformance suite, on every kind of box this machine can open."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from posttrain.errors import RecipeError, SandboxLost
from posttrain.protocols import Substrate
from posttrain.types import SandboxSpec
from sandbox.conformance import (
    ATTACKS,
    ATTACKS_WHOLE,
    CHECKS,
    WHOLE,
    Check,
    a_lost_box_is_not_a_result,
    check_box,
    find_substrate,
    main,
)
from sandbox.conformance_agent import AGENT_CHECKS, AGENT_WHOLE
from sandbox.conformance_users import USER_CHECKS, USER_WHOLE
from sandbox.container import Container
from sandbox.function import Function
from sandbox.gvisor import Gvisor
from sandbox.pool import close_pools
from sandbox.process import Process
from sandbox.qemu import MicroVM
from tests import boxes
from tests.boxes import require

KINDS = [Process(), pytest.param(Container(), marks=pytest.mark.docker), Function(warm=1), Gvisor(), MicroVM()]
IDS = ["process", "container", "function", "gvisor", "microvm"]
ATTACKED = [KINDS[0], KINDS[1], KINDS[3]]
"""Boxes of a function are those of a process; a machine takes minutes, and keeps its own kernel between."""
ATTACKED_IDS = [IDS[0], IDS[1], IDS[3]]


@pytest.fixture
def substrate(request: pytest.FixtureRequest) -> Substrate:
    return require(request.param)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("substrate", KINDS, indirect=True, ids=IDS)
def test_box(substrate: Substrate, check: Check) -> None:
    asyncio.run(_closing_pools(check_box(substrate, check)))


@pytest.mark.parametrize("check", WHOLE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("substrate", KINDS, indirect=True, ids=IDS)
def test_substrate(substrate: Substrate, check: Callable[[Substrate], Awaitable[None]]) -> None:
    asyncio.run(_closing_pools(check(substrate)))


@pytest.mark.parametrize("check", ATTACKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("substrate", ATTACKED, indirect=True, ids=ATTACKED_IDS)
def test_attacked_box(substrate: Substrate, check: Check) -> None:
    asyncio.run(_closing_pools(check_box(substrate, check)))


@pytest.mark.parametrize("check", ATTACKS_WHOLE, ids=lambda check: check.__name__)
@pytest.mark.parametrize("substrate", ATTACKED, indirect=True, ids=ATTACKED_IDS)
def test_attacked_substrate(substrate: Substrate, check: Callable[[Substrate], Awaitable[None]]) -> None:
    asyncio.run(_closing_pools(check(substrate)))


async def _closing_pools(check: Awaitable[None]) -> None:
    try:
        await check
    finally:
        await close_pools()


class LostBox:
    """A box of a stranger's: it has what the protocol asks for and no ``kill``."""

    async def _lose(self, *_: object, **__: object) -> None:
        raise SandboxLost("never there")

    exec = read = write = list = _lose


@dataclass(frozen=True)
class LostBoxes:
    name: str = "lost"
    isolation: str = "a wall"

    def capabilities(self) -> dict[str, str]:
        return {"isolation": self.isolation}

    def check(self) -> None: ...

    @contextlib.asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[LostBox]:
        yield LostBox()


UNISOLATED = LostBoxes(isolation="none")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> str:
    """A name under which this file can be imported."""
    monkeypatch.setitem(sys.modules, "my_box", sys.modules[__name__])
    return "my_box"


def test_a_substrate_is_found_by_name_class_or_value(here: str) -> None:
    assert find_substrate("process") == Process()
    assert find_substrate(f"{here}:LostBoxes") == LostBoxes()
    assert find_substrate(f"{here}:UNISOLATED") is UNISOLATED


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("proces", "expected process, container, function, gvisor, microvm, fullvm or module:attribute"),
        ("no_such_module:X", "No module named 'no_such_module'"),
        ("my_box:Missing", "no attribute 'Missing'; expected process, container, function"),
        ("my_box:KINDS", r"without name, capabilities\(\), check\(\) or open\(\)"),
    ],
)
def test_what_is_no_substrate_is_refused(here: str, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        find_substrate(name)


def test_any_substrate_is_checked_and_killing_a_box_is_skipped_where_it_cannot_be(
    here: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["conformance", f"{here}:LostBoxes"])
    assert main() == 1
    table = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()}
    named = {check.__name__ for check in (*CHECKS, *WHOLE, *ATTACKS, *ATTACKS_WHOLE)}
    assert set(table) == {*named, "nothing_is_left"}
    assert table.pop("nothing_is_left").startswith("pass")
    skipped = (a_lost_box_is_not_a_result, *AGENT_CHECKS, *AGENT_WHOLE, *USER_CHECKS, *USER_WHOLE)
    for name in (check.__name__ for check in skipped):
        assert table.pop(name).startswith("skip")
    basic = {check.__name__ for check in (*CHECKS, *WHOLE)}
    assert all(line.startswith("FAIL") for name, line in table.items() if name in basic)
    # Some attacks are on what only a box with an agent has.
    assert not any(line.startswith("pass") for line in table.values())


def test_a_box_without_isolation_is_not_attacked(
    here: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["conformance", f"{here}:UNISOLATED"])
    assert main() == 2
    assert "no isolation" in capsys.readouterr().err


def test_a_suite_of_which_everything_was_skipped_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def skip_all(substrate: Substrate) -> dict[str, tuple[str, str]]:
        return {"no_network": ("skip", "a reason"), "nothing_is_left": ("pass", "")}

    monkeypatch.setattr("sandbox.conformance.run", skip_all)
    monkeypatch.setattr(sys, "argv", ["conformance", "process"])
    assert main() == 1
    assert "every check was skipped" in capsys.readouterr().err


def test_a_session_in_which_no_box_could_be_opened_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "possible", set())
    monkeypatch.setattr(boxes, "skipped", {})
    assert boxes.all_were_skipped() == ""
    with pytest.raises(pytest.skip.Exception, match="no-such-bwrap"):
        boxes.require(Process(binary="no-such-bwrap"))
    assert "process: " in boxes.all_were_skipped()
    boxes.require(Process())
    assert boxes.all_were_skipped() == ""
