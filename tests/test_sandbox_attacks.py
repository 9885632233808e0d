from __future__ import annotations

import asyncio
import marshal
from importlib.util import MAGIC_NUMBER
from pathlib import Path

import pytest

from sandbox import agent, client, process, seccomp
from sandbox.attempts import reached
from sandbox.checklist import CHECKLIST, ELSEWHERE
from sandbox.conformance import ATTACKS, ATTACKS_WHOLE, CHECKS, WHOLE, Check, check_box
from sandbox.conformance_escape import NAMESPACES, NETWORK, OLD_INTERFACES, SPEC, listening
from sandbox.conformance_files import a_swapped_directory_leads_nowhere, what_is_no_plain_file_is_not_read
from sandbox.process import Process
from tests.boxes import require

NUM_ITEMS = 62


@pytest.fixture
def substrate() -> Process:
    return require(Process())


def test_every_item_of_the_checklist_has_a_check_that_is_run() -> None:
    assert sorted([*CHECKLIST, *ELSEWHERE]) == list(range(1, NUM_ITEMS + 1))
    run = {*CHECKS, *WHOLE, *ATTACKS, *ATTACKS_WHOLE}
    for number, (what, checks) in CHECKLIST.items():
        assert checks, f"{number}, {what}: no check"
        assert run.issuperset(checks), f"{number}, {what}: a check that is not run"
    unlisted = {*ATTACKS, *ATTACKS_WHOLE} - {check for _, checks in CHECKLIST.values() for check in checks}
    assert unlisted == set(), "checks that cover no item"


def reached_in_box(substrate: Process, program: str) -> set[str]:
    async def play() -> set[str]:
        with listening() as addresses:
            async with substrate.open(SPEC) as box:
                return set(await reached(box, program, *addresses))

    return asyncio.run(play())


def test_without_the_filter_the_attempts_succeed(substrate: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "is_supported", lambda: False)
    gained = {"unshare-user", "mount-tmpfs", "bind", "chroot", "clone-net", "clone3-mount", "keyctl", "add_key"}
    assert reached_in_box(substrate, NAMESPACES) >= gained
    assert reached_in_box(substrate, NETWORK) >= {"netlink-route", "netlink-audit"}
    assert reached_in_box(substrate, OLD_INTERFACES) >= {"modify_ldt"}


def test_without_a_network_of_its_own_the_attempts_succeed(substrate: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    isolation = process._isolation
    monkeypatch.setattr(process, "_isolation", lambda *fds: [o for o in isolation(*fds) if o != "--unshare-net"])
    assert reached_in_box(substrate, NETWORK) >= {"host-tcp", "host-abstract"}


@pytest.mark.parametrize("check", [a_swapped_directory_leads_nowhere, what_is_no_plain_file_is_not_read])
def test_an_agent_that_follows_links_is_found_out(
    substrate: Process, monkeypatch: pytest.MonkeyPatch, check: Check
) -> None:
    source = Path(agent.__file__).read_text().replace("os.O_NOFOLLOW | ", "")
    parts = (MAGIC_NUMBER, marshal.dumps(compile(source, "agent", "exec")), b"")
    program = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    monkeypatch.setattr(client, "_program", lambda: program)
    with pytest.raises(AssertionError, match=r"a link was followed|expected"):
        asyncio.run(check_box(substrate, check))
