"""Whole machines: what a clone shares with the next, what a killed host leaves, which machine a box gets."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.errors import SandboxError, SandboxUnavailable
from posttrain.types import SandboxSpec
from sandbox import cgroups, qemu
from sandbox.images import vm
from sandbox.qemu import FullVM, Machine, MicroVM, accelerator, machine_for, save
from tests.boxes import require

SPEC = SandboxSpec(cpus=1.0, memory_mb=64, disk_mb=8, max_processes=16, timeout_s=20.0)


@pytest.fixture(autouse=True)
def _available() -> None:
    require(MicroVM())


async def identity() -> list[bytes]:
    async with MicroVM().open(SPEC) as box:
        shown = await box.exec("date +%s; cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1")
        assert shown.ok, shown
        return shown.stdout.splitlines()


def test_two_clones_share_neither_randomness_nor_a_name_and_know_the_time() -> None:
    async def both() -> list[list[bytes]]:
        return list(await asyncio.gather(identity(), identity()))

    first, second = asyncio.run(both())
    assert all(abs(int(shown[0]) - time.time()) < 15 for shown in (first, second))
    assert first[1] != second[1]
    assert first[2] != second[2]


def test_a_full_machine_can_be_changed_everywhere_and_the_next_one_knows_nothing_of_it() -> None:
    async def change() -> None:
        async with FullVM().open(SPEC) as box:
            changed = await box.exec(
                "id -u; echo 'print(42)' > /usr/local/bin/mine; echo changed >> /etc/hostname; rm /bin/cat"
            )
            assert changed.ok, changed
            assert (await box.exec("python3 /usr/local/bin/mine")).stdout == b"42\n"
            assert changed.stdout != b"0\n"
        async with FullVM().open(SPEC) as box:
            again = await box.exec("ls /usr/local/bin; cat /etc/hostname")
            assert again.ok, again
            assert b"mine" not in again.stdout
            assert b"changed" not in again.stdout

    asyncio.run(change())


def running_machines() -> set[int]:
    """Pids of every QEMU on this machine."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/comm"):
        try:
            if entry.read_text().startswith("qemu-system"):
                found.add(int(entry.parent.name))
        except FileNotFoundError:
            continue
    return found


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 10
    while pids & running_machines():
        assert time.monotonic() < deadline, f"still there: {pids & running_machines()}"
        time.sleep(0.05)


def test_a_machine_is_gone_with_its_box() -> None:
    async def opened() -> tuple[set[int], list[Path]]:
        before = running_machines()
        async with FullVM().open(SPEC) as box:
            assert (await box.exec("true")).ok
            made = running_machines() - before
            ours = {pid for pid in made if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(os.getpid())}
            group = cgroups.of(next(iter(ours)))
            assert group is not None
            assert Path(f"/proc/{next(iter(ours))}/status").read_text().split("Uid:\t")[1].startswith("65534")
            return ours, group.paths

    machines, groups = asyncio.run(opened())
    wait_until_gone(machines)
    assert not any(path.exists() for path in groups)


def test_a_killed_host_leaves_no_machine() -> None:
    program = (
        "import asyncio, sys\nfrom sandbox.qemu import MicroVM\nfrom posttrain.types import SandboxSpec\n"
        "async def main():\n"
        f"    async with MicroVM().open({SPEC!r}) as box:\n"
        "        print('open', flush=True)\n        await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    host = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert host.stdout is not None
    assert host.stdout.readline() == b"open\n"
    machines = {pid for pid in running_machines() if Path(f"/proc/{pid}/stat").read_text().split()[3] == str(host.pid)}
    assert len(machines) == 1
    group = cgroups.of(next(iter(machines)))
    assert group is not None
    host.send_signal(signal.SIGKILL)
    host.wait()
    host.stdout.close()
    wait_until_gone(machines)
    # Nobody was there to remove its empty groups: the next process that opens a machine does.
    subprocess.run([sys.executable, "-c", program.replace("sleep(60)", "sleep(0)")], check=True, timeout=60)
    assert not any(path.exists() for path in group.paths)


def test_a_box_gets_the_smallest_machine_it_has_room_in() -> None:
    small, same, larger = (machine_for(MicroVM(), SandboxSpec(memory_mb=mb, disk_mb=8)) for mb in (64, 63, 128))
    assert small.memory_mb % qemu.SIZE_STEP_MB == 0
    assert small == same
    assert small.saved == same.saved
    assert larger.memory_mb > small.memory_mb
    assert larger.saved != small.saved
    assert machine_for(FullVM(), SPEC).saved != machine_for(MicroVM(), SPEC).saved


def test_kvm_is_not_used_where_it_only_runs_guests_of_its_own_kind() -> None:
    if not Path("/sys/module/kvm_pvm").exists():
        pytest.skip("this host has no kvm_pvm")
    assert accelerator(MicroVM().binary) == "tcg"
    # By trying, too: the device is there and can be opened, yet no guest of ours starts.
    before, begun = running_machines(), time.monotonic()
    assert not qemu.starts_with_kvm(MicroVM().binary)
    assert time.monotonic() - begun < qemu.PROBE_DEADLINE_S + 5
    wait_until_gone(running_machines() - before)


def test_qemu_may_open_kvm_without_being_root() -> None:
    if not os.access(qemu.KVM, os.R_OK | os.W_OK):
        pytest.skip("this host has no /dev/kvm")
    if not qemu.KVM.stat().st_mode & stat.S_IWGRP:
        pytest.skip("/dev/kvm is for root alone on this host")
    opens = ["/bin/sh", "-c", f"exec 3<> {qemu.KVM}; id -u"]
    done = subprocess.run(qemu.confined(opens, "kvm"), capture_output=True, check=False, timeout=20)
    assert done.stdout == b"65534\n", done.stderr


def test_a_guest_that_does_not_start_is_an_error_and_leaves_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "BOOT_DEADLINE_S", 0.05)
    ready = machine_for(MicroVM(), SPEC)
    machine = Machine(binary=ready.binary, accelerator="tcg", image=ready.image, memory_mb=ready.memory_mb + 1, cpus=1)
    before = running_machines()
    with pytest.raises(SandboxError, match="did not start within"):
        save(machine)
    assert not [path for path in vm.folder().glob(f"*{machine.saved.name}*") if path.suffix != ".lock"]
    wait_until_gone(running_machines() - before)


def test_a_qemu_that_ends_at_once_is_told_from_a_guest_that_is_slow() -> None:
    ready = machine_for(MicroVM(), SPEC)
    machine = Machine(binary="/bin/false", accelerator="tcg", image=ready.image, memory_mb=64, cpus=1)
    ended = qemu.Qemu(machine, disk=vm.disk(ready.image))
    try:
        with pytest.raises(SandboxError, match=r"QEMU ended before the guest started \(exit code 1"):
            ended.wait_for_guest(20)
    finally:
        ended.kill()


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SandboxUnavailable, match="no-such-qemu is missing; as root: apt-get install"):
        MicroVM(binary="no-such-qemu").check()
    monkeypatch.setattr(vm, "folder", lambda: tmp_path)
    with pytest.raises(SandboxUnavailable, match=r"fetch it once with python -m sandbox\.images\.vm"):
        vm.require_kernel()


def test_two_processes_make_one_thing_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make(partial: Path) -> None:
        made.append(1)
        partial.write_text("whole")

    assert vm.once(tmp_path / "thing", make).read_text() == "whole"
    assert vm.once(tmp_path / "thing", make).read_text() == "whole"
    assert made == [1]

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        vm.once(tmp_path / "other", fail)
    assert {path.name for path in tmp_path.glob("*other*")} == {".other.lock"}
    assert vm.once(tmp_path / "other", make).read_text() == "whole"


def test_what_qemu_opens_is_readable_under_any_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        made = vm.once(tmp_path / "thing", Path.touch)
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o644
