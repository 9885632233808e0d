from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.errors import SandboxError, SandboxUnavailable
from posttrain.types import ExecStatus, SandboxSpec
from sandbox import cgroups, gvisor, owners
from sandbox.gvisor import Gvisor
from sandbox.pool import close_pools
from tests.boxes import require

SPEC = SandboxSpec(memory_mb=64, disk_mb=8, max_processes=16)
OWNER = """
import asyncio
from sandbox.gvisor import Gvisor
from posttrain.types import SandboxSpec

async def main():
    async with Gvisor().open(SandboxSpec(memory_mb=64)) as box:
        asyncio.create_task(box.exec("setsid sleep 99 & sleep 99", timeout_s=99))
        await asyncio.sleep(0.3)
        print(box.folder, flush=True)
        await asyncio.sleep(99)

asyncio.run(main())
"""


@pytest.fixture
def substrate() -> Gvisor:
    return require(Gvisor())


def left_over() -> set[str]:
    """Folders, groups and processes of gVisor boxes on this host."""
    groups = Path("/sys/fs/cgroup").glob(f"*/**/{owners.name(cgroups.KIND)}*")
    folders = list(Path(tempfile.gettempdir()).glob(f"{owners.name(gvisor.KIND)}*"))
    processes = [pid for folder in folders for pid in gvisor.mentioning(folder)]
    return {str(found) for found in (*groups, *folders, *processes)}


def wait_until(claim: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not claim():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SandboxUnavailable, match=r"no-such-runsc is missing; install runsc .*apt-get install runsc"):
        Gvisor(binary="no-such-runsc").check()
    monkeypatch.setattr(cgroups, "is_available", lambda: False)
    runsc = executable(tmp_path, "#!/bin/sh\n")
    with pytest.raises(SandboxUnavailable, match="root and writable control groups"):
        Gvisor(binary=runsc).check()
    monkeypatch.setattr(cgroups, "is_available", lambda: True)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    with pytest.raises(SandboxUnavailable, match=r"python -m sandbox\.images\.build \(apt-get install debootstrap\)"):
        Gvisor(binary=runsc).check()


def test_a_runsc_that_cannot_run_says_why(substrate: Gvisor, tmp_path: Path) -> None:
    broken = Gvisor(binary=executable(tmp_path, "#!/bin/sh\necho ptrace is forbidden >&2\nexit 1\n"))
    with pytest.raises(SandboxUnavailable, match=r"cannot run here \(ptrace is forbidden\)"):
        broken.check()

    async def play() -> None:
        async with broken.open(SPEC):
            raise AssertionError("a box was opened")

    with pytest.raises(SandboxError, match="could not make a box: ptrace is forbidden"):
        asyncio.run(play())
    assert left_over() == set()


def executable(folder: Path, text: str) -> str:
    path = folder / "runsc"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_nothing_is_left_after_close(substrate: Gvisor) -> None:
    async def play() -> None:
        async with substrate.open(SPEC) as box:
            running = asyncio.create_task(box.exec("setsid sleep 99 & sleep 99", timeout_s=99))
            await asyncio.sleep(0.3)
            assert len(left_over()) > 3, "nothing can be seen, so this test proves nothing"
        await asyncio.wait({running})
        assert isinstance(running.exception(), SandboxError)

    asyncio.run(play())
    assert left_over() == set()


def test_a_killed_owner_leaves_no_process_and_its_folders_are_removed_by_the_next(substrate: Gvisor) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        owner.send_signal(signal.SIGKILL)
    # The agent ends with its channel, and everything in the box with the agent.
    wait_until(lambda: not gvisor.mentioning(folder), "a process of the box outlived its owner")
    assert folder.exists()
    gvisor.remove_orphans()
    assert not folder.exists()
    assert list(Path("/sys/fs/cgroup").glob(f"*/**/{owners.PREFIX}-{cgroups.KIND}-*:{owner.pid}:*")) == []


def test_a_sentry_that_does_not_notice_is_killed_by_the_next_owner(substrate: Gvisor) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        stuck = gvisor.mentioning(folder)
        for pid in stuck:
            os.kill(pid, signal.SIGSTOP)
        owner.send_signal(signal.SIGKILL)
    assert sorted(gvisor.mentioning(folder)) == sorted(stuck) != []
    gvisor.remove_orphans()
    wait_until(lambda: not gvisor.mentioning(folder), "a stopped process of the box was left")
    assert not folder.exists()


def test_many_small_processes_are_oom_too_and_the_box_survives(substrate: Gvisor) -> None:
    program = """
import os, time
for child in range(10):
    if os.fork() == 0:
        held = b"x" * (20 << 20)
        time.sleep(60)
time.sleep(60)
"""

    async def play() -> None:
        async with substrate.open(SPEC) as box:
            result = await box.exec(["python3", "-I", "-S", "-c", program], timeout_s=20)
            assert result.status is ExecStatus.OOM
            assert result.exit_code is None
            assert (await box.exec("echo alive")).stdout == b"alive\n"

    asyncio.run(play())


def test_a_refused_fork_is_named(substrate: Gvisor) -> None:
    program = "import os, time\nwhile True:\n    if os.fork() == 0:\n        time.sleep(60)"

    async def play() -> None:
        async with substrate.open(SPEC) as box:
            result = await box.exec(["python3", "-I", "-S", "-c", program])
            assert result.status is ExecStatus.PIDS_LIMIT

    asyncio.run(play())


def test_boxes_can_be_started_ahead(substrate: Gvisor) -> None:
    warm = Gvisor(warm=1)

    async def play() -> None:
        for name in ("first", "second"):
            async with warm.open(SandboxSpec(memory_mb=64, files={name: b"x"}, workdir="/srv/box")) as box:
                assert await box.list() == [name]
        await close_pools()

    asyncio.run(play())
    assert left_over() == set()
