from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import cgroups, leaks, owners
from tests import left_over
from tests.left_over import Witness

OWNER = """
import os, signal, subprocess, tempfile
from sandbox import cgroups, owners
tempfile.mkdtemp(prefix=owners.name("local"))
if cgroups.is_available():
    group = cgroups.create(cgroups.Limits(memory_bytes=64 << 20, max_processes=4, cpus=1))
    group.add(subprocess.Popen(["sleep", "60"], stdout=-3, stderr=-3).pid)
    if cgroups.can_freeze():
        group.freeze(True)
print(owners.own(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def dead_owner() -> str:
    """One that has left a folder, and a frozen process in control groups."""
    done = subprocess.run([sys.executable, "-c", OWNER], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == -9, done.stderr
    return done.stdout.strip()


def test_what_a_dead_owner_left_is_named_and_removed(dead_owner: str) -> None:
    found = leaks.find(lambda owner: owner == dead_owner)
    kinds = {"folder", *(["process", "control group"] if cgroups.is_available() else [])}
    assert {thing.kind for thing in found} == kinds
    assert any("sleep 60" in str(thing) for thing in found) or not cgroups.is_available()
    command = [sys.executable, "-m", "sandbox.leaks"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert listed.returncode == 1
    assert all(f"{thing}  (of {dead_owner})" in listed.stdout for thing in found)
    subprocess.run([*command, "--remove"], capture_output=True, timeout=60, check=False)
    assert leaks.find(lambda owner: owner == dead_owner) == []


def test_the_living_are_left_alone() -> None:
    with tempfile.TemporaryDirectory(prefix=owners.name("local")) as folder:
        own = leaks.find(lambda owner: owner == owners.own())
        assert [thing.name for thing in own] == [folder]
        assert own[0] not in leaks.find()


def test_a_tag_is_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(owners.TAG, "job7")
    assert owners.own().endswith(":job7")
    assert owners.owner_in(f"/tmp/{owners.name('local')}x1_/state") == owners.own()
    assert owners.owner_in("/tmp/posttrain-local-x1_") is None
    monkeypatch.setenv(owners.TAG, "a/b")
    with pytest.raises(ValueError, match="POSTTRAIN_OWNER_TAG = 'a/b': expected letters"):
        owners.own()


STRAY = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        os.closerange(0, 3)
        time.sleep(60)
    os._exit(0)
os.wait()
"""


@pytest.fixture
def witness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Witness]:
    monkeypatch.setenv(owners.TAG, owners.tag())
    monkeypatch.setattr(left_over, "PATIENCE_S", 0.0)
    found = Witness(tmp_path)
    yield found
    assert found.left_over() == []


def test_a_process_that_lost_its_parent_fails_the_session(witness: Witness) -> None:
    done = subprocess.run([sys.executable, "-c", STRAY], capture_output=True, text=True, timeout=60, check=True)
    (stray,) = witness.left_over()
    assert stray.startswith(f"process {done.stdout.strip()} ")
    os.kill(int(done.stdout), 9)


def test_a_mount_and_a_loop_device_fail_the_session(witness: Witness, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    (tmp_path / "mounted").mkdir()
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path / "mounted"], check=True)
    loop = subprocess.run(
        ["losetup", "--find", "--show", tmp_path / "disk"], capture_output=True, text=True, check=False
    )
    try:
        left = witness.left_over()
        assert f"mount {tmp_path / 'mounted'}" in left
        assert loop.returncode != 0 or f"loop device {loop.stdout.strip()} {tmp_path / 'disk'}" in left
    finally:
        subprocess.run(["umount", tmp_path / "mounted"], check=True)
        if loop.returncode == 0:
            subprocess.run(["losetup", "--detach", loop.stdout.strip()], check=True)


def test_a_process_in_namespaces_of_its_own_fails_the_session(witness: Witness) -> None:
    command = ["bwrap", "--unshare-pid", "--dev-bind", "/", "/", "--", "sleep", "60"]
    if subprocess.run([*command[:-2], "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("bubblewrap cannot make namespaces here")
    with subprocess.Popen(command, env={}, executable="/usr/bin/bwrap") as box:
        while not (left := witness.left_over()):
            assert box.poll() is None
        assert any("bwrap --unshare-pid" in line for line in left)
        box.kill()
