from __future__ import annotations

import asyncio
import contextlib
import inspect
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import SandboxLost, Unsupported
from posttrain.protocols import Substrate
from posttrain.types import ExecStatus, SandboxSpec
from sandbox import gvisor, layers
from sandbox.client import AgentSandbox
from sandbox.container import Container
from sandbox.edge import Limits, serve_boxes
from sandbox.edge_client import EdgeClient
from sandbox.edge_server import SOCKET, serving
from sandbox.gvisor import Gvisor
from sandbox.local import LocalUnsafe
from sandbox.log import RecordKind, TrajectoryLog
from sandbox.operations import (
    KINDS,
    HandleLost,
    Operations,
    RemoteJob,
    RemoteSession,
    Request,
    outcome_of,
    remembers,
    unwrap,
)
from sandbox.process import Process
from sandbox.recorded import RecordedSandbox, Recorder, Unknown, creation, replay
from sandbox.streams import Job, Session
from tests.boxes import require

SPEC = SandboxSpec(memory_mb=64, disk_mb=8, max_processes=32, files={"seed": b"7\n"})
COUNT = "echo x >> counter; cat counter"
Died = type("Died", (BaseException,), {})
"""Stands for the end of the client: nothing catches it."""


@pytest.fixture
def substrate(request: pytest.FixtureRequest) -> Substrate:
    return require(getattr(request, "param", Process()))


EVERYWHERE = pytest.mark.parametrize(
    "substrate",
    [Process(), pytest.param(Container(), marks=pytest.mark.docker), Gvisor()],
    indirect=True,
    ids=["process", "container", "gvisor"],
)


@pytest.fixture(autouse=True)
def own_layers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(layers, "_folder", lambda: tmp_path / "layers")


async def run_in_session(box: Operations) -> Any:
    shell = await box.session(env={"A": "b"})
    return [await shell.run(f"cd /tmp; X=1; cd -; {COUNT}"), shell.ended, await shell.run("exit 4"), shell.ended]


async def interrupt(box: Operations) -> Any:
    shell = await box.session()
    running = asyncio.create_task(shell.run("trap 'echo x >> counter' INT; sleep 20; trap - INT"))
    await until_there(box, "sleep")
    await shell.interrupt()
    return (await running).exit_code


async def read_job(box: Operations) -> Any:
    job = await box.spawn("printf 123; sleep 0.2; printf 45; printf 6 >&2")
    return [(chunk.stream, chunk.data) async for chunk in job] and job.offset


async def feed(box: Operations) -> Any:
    job = await box.spawn("while read line; do echo $line >> counter; done; cat counter")
    await job.write_stdin(b"x\n", eof=True)
    return await job.wait()


async def signal_job(box: Operations) -> Any:
    job = await box.spawn(
        "trap 'echo x >> counter; cat counter; exit 3' USR1; echo ready; while :; do sleep 0.05; done"
    )
    await job.read()
    await job.signal(10)
    return await job.wait()


async def terminal(box: Operations) -> Any:
    job = await box.spawn("read x; stty size", tty=(24, 80))
    await job.resize(50, 132)
    await job.write_stdin(b"\n")
    return (await job.wait()).stdout.split()[-2:]


async def set_net(box: Operations) -> Any:
    await box.set_net(["example.org:443"])
    return (await box.exec("echo ${HTTPS_PROXY:+set}")).stdout


async def closed_session(box: Operations) -> Any:
    async with await box.session() as shell:
        return await shell.run("echo $$ > /dev/null; sleep 99 &")


async def until_there(box: Operations, name: str) -> None:
    command = f"until cat /proc/[0-9]*/comm | grep -qx {name}; do sleep 0.02; done"
    assert (await box.exec(command, idempotent=True)).ok


SCENARIOS: Mapping[str, Callable[[Operations], Awaitable[Any]]] = {
    "exec": lambda box: box.exec(f"pwd; {COUNT}", cwd=".", stdin=b"1", env={"A": "b"}),
    "call": lambda box: box.call("import sys; print(sys.argv, sys.stdin.read())", args=["a"], stdin=b"in"),
    "read": lambda box: box.read("seed", offset=1, max_bytes=1),
    "write": lambda box: box.write("counter", b"x\n", mode=0o600),
    "list": lambda box: box.list(),
    "entries": lambda box: box.entries(),
    "upload": lambda box: box.upload({"d/a": b"1", "counter": b"x\n"}),
    "download": lambda box: box.download(),
    "snapshot": lambda box: box.snapshot(),
    "set_net": set_net,
    "pause": lambda box: box.pause(),
    "resume": lambda box: box.resume(),
    "session": run_in_session,
    "session.run": run_in_session,
    "session.interrupt": interrupt,
    "session.close": closed_session,
    "job": read_job,
    "job.read": read_job,
    "job.write_stdin": feed,
    "job.signal": signal_job,
    "job.resize": terminal,
    "job.wait": feed,
}
"""One use of every kind of operation; those that count leave exactly one line in ``counter``."""
COUNTS = {"exec", "write", "upload", "session.run", "session.interrupt", "job.write_stdin", "job.signal"}


def test_every_kind_of_operation_is_tried_here() -> None:
    assert SCENARIOS.keys() == KINDS.keys()


@contextlib.asynccontextmanager
async def recorded_box(
    folder: Path, substrate: Substrate, **options: Any
) -> AsyncIterator[tuple[Recorder, AgentSandbox]]:
    async with substrate.open(SPEC) as box:
        assert isinstance(box, AgentSandbox)
        with contextlib.closing(TrajectoryLog.create(folder, creation(substrate, SPEC))) as log:
            yield Recorder(box, log, **options), box


def test_a_second_client_gets_what_the_first_got_and_nothing_happens(substrate: Substrate, tmp_path: Path) -> None:
    """Each kind in the same box, with one log each."""

    async def play() -> None:
        for kind, scenario in SCENARIOS.items():
            async with recorded_box(tmp_path / kind, substrate) as (recorder, box):
                first = await scenario(RecordedSandbox(recorder))
                assert kind in {operation.kind for operation in recorder.log.operations}
                length, asked = len(recorder.log), next(box._ops)
                assert await scenario(RecordedSandbox(recorder)) == first, kind
                assert (len(recorder.log), next(box._ops)) == (length, asked + 1), f"{kind} touched the box again"
                if kind in COUNTS:
                    assert await box.read("counter") == b"x\n"

    asyncio.run(play())


@pytest.mark.parametrize("point", ["intent", "effect", "result"])
def test_a_client_that_dies_finds_what_came_of_it_and_nothing_happens_twice(
    substrate: Substrate, tmp_path: Path, point: str
) -> None:
    async def die_in(kind: str) -> None:
        alive = [True]

        def crash_at(reached: str, what: str) -> None:
            if alive and (reached, what) == (point, kind):
                alive.clear()
                raise Died

        scenario = SCENARIOS[kind]
        async with recorded_box(tmp_path / kind, substrate, crash_at=crash_at) as (recorder, box):
            with pytest.raises(Died):
                await scenario(RecordedSandbox(recorder))
            assert not alive
            if point == "intent" and not KINDS[kind].idempotent:
                with pytest.raises(Unknown):
                    await asyncio.wait_for(scenario(RecordedSandbox(recorder)), 20)
                assert "counter" not in await box.list()
                return
            first = await scenario(RecordedSandbox(recorder))
            assert await scenario(RecordedSandbox(recorder)) == first
            if kind in COUNTS:
                assert await box.read("counter") == b"x\n", kind

    async def play() -> None:
        # What was waiting beside the call that died goes on by itself.
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        await asyncio.gather(*(die_in(kind) for kind in KINDS))

    asyncio.run(play())


def test_replaying_every_kind_comes_out_the_same(substrate: Substrate, tmp_path: Path) -> None:
    async def play() -> None:
        async with recorded_box(tmp_path, substrate) as (recorder, _):
            box = RecordedSandbox(recorder)
            for kind, scenario in SCENARIOS.items():
                if kind not in ("session.interrupt", "job.signal"):
                    await scenario(box)
            report = await replay(recorder.log, substrate, whole=True)
            assert (report.differences, report.left_out, report.begun_at) == ([], [], 0)
            assert report.num_replayed == len(recorder.log.operations) > 20

    asyncio.run(play())


def test_a_box_at_the_edge_can_do_all_of_it_and_a_second_client_goes_on(
    substrate: Substrate, socket_folder: Path
) -> None:
    async def play() -> None:
        folder = socket_folder
        async with (
            serve_boxes(folder, substrate) as edge,
            serving(edge, folder / SOCKET),
            EdgeClient(folder / SOCKET, retry_s=5) as client,
        ):
            box = await client.create("r", SPEC)
            first = [await scenario(box) for scenario in SCENARIOS.values()]
            shell, job = await box.session(), await box.spawn("read x; echo got $x")
            await shell.run("cd /tmp; X=kept")
            again = await client.attach("r")
            assert [await scenario(again) for scenario in SCENARIOS.values()] == first
            shell, job = await again.session(), await again.spawn("read x; echo got $x")
            await shell.run("cd /tmp; X=kept")
            # From here on it is new, in the same shell and the same program.
            assert (await shell.run("pwd; echo $X")).stdout == b"/tmp\nkept\n"
            await job.write_stdin(b"it\n")
            assert (await job.wait()).stdout == b"got it\n"
            await shell.run("exit 1")
            with pytest.raises(EOFError, match="the shell has ended"):
                await shell.run("true")
            with pytest.raises(HandleLost, match="no such session or job"):
                await RemoteSession(again, "another").run("true")
            forks = await again.fork(2)
            assert [await fork.read("seed") for fork in forks] == [b"7\n"] * 2
            assert [row["rollout_id"] for row in await client.list()][1:] == [fork.rollout_id for fork in forks]

    asyncio.run(play())


def test_what_a_box_cannot_do_is_refused_before_it_is_logged(tmp_path: Path) -> None:
    local = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)

    async def play() -> None:
        async with local.open(SPEC) as box:
            recorder = Recorder(box, TrajectoryLog.create(tmp_path, creation(local, SPEC)))
            recorded = RecordedSandbox(recorder)
            for refused in (recorded.session(), recorded.spawn("true"), recorded.snapshot(), recorded.pause()):
                with pytest.raises(Unsupported, match=r"a LocalSandbox has no \w+\(\); use another substrate"):
                    await refused
            with pytest.raises(ValueError, match=r"Request\.kind = 'nonsense': expected one of exec, call"):
                await recorded.ask(Request("nonsense", {}))
            assert len(recorder.log) == 1
            assert (await recorded.exec("echo on")).stdout == b"on\n"

    asyncio.run(play())


def test_the_methods_are_the_same_with_a_log_and_without() -> None:
    for remote, local in ((Operations, AgentSandbox), (RemoteSession, Session), (RemoteJob, Job)):
        for name, method in vars(remote).items():
            if name.startswith("_") or not inspect.iscoroutinefunction(method) or name == "ask":
                continue
            ours = inspect.signature(getattr(local, name)).parameters
            for parameter in inspect.signature(method).parameters.values():
                if parameter.name not in ("self", "idempotent"):
                    assert ours[parameter.name] == parameter, (local, name)


def test_outcomes_survive() -> None:
    for error in (FileNotFoundError(2, "No such file"), ValueError("no"), EOFError("ended"), Unsupported("cannot")):
        with pytest.raises(type(error), match=str(error.args[-1])):
            unwrap(outcome_of(error))


# The result table of a box.


def test_a_box_knows_what_came_of_a_named_operation_until_it_is_acknowledged(substrate: Substrate) -> None:
    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            assert remembers(box)
            await box.write("a", b"1", op_id="w")
            await box.write("a", b"2")
            await box.write("a", b"1", op_id="w")
            assert await box.read("a") == b"2"
            assert await box.result_of("w") is None
            await box.upload({"a": b"3", "b": b"3"}, op_id="u")
            await box.write("b", b"4")
            await box.upload({"b": b"3"}, op_id="u")
            assert await box.read("b") == b"4"
            assert await box.result_of("u") is None
            called = await box.call("import os; print(os.urandom(8))", op_id="c")
            assert called == await box.result_of("c") == await box.call("print()", op_id="c")
            with pytest.raises(NotADirectoryError):
                await box.write("a/b", b"", op_id="failed")
            with pytest.raises(NotADirectoryError):
                await box.result_of("failed")
            shell = await box.session(op_id="s")
            assert await box.session(op_id="s") is shell is box.handle("s")
            ran = await shell.run(COUNT, op_id="r")
            assert ran == await shell.run(COUNT, op_id="r") == await box.result_of("r")
            assert await box.result_of("s") == "s"
            for name in ("w", "u", "c", "failed", "r"):
                await box.acknowledge(name)
                with pytest.raises(KeyError):
                    await box.result_of(name)
            with pytest.raises(KeyError):
                await box.result_of("never")

    asyncio.run(play())


def test_a_retry_waits_for_the_first_and_cancelling_it_kills(substrate: Substrate) -> None:
    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            first = asyncio.create_task(box.exec("sleep 30", op_id="a"))
            await asyncio.sleep(0.1)
            retry, asked = asyncio.create_task(box.exec("sleep 30", op_id="a")), asyncio.create_task(box.result_of("a"))
            await asyncio.sleep(0.1)
            retry.cancel()
            assert (await first).status is (await asked).status is ExecStatus.CANCELLED

    asyncio.run(play())


@pytest.mark.parametrize("substrate", [Process(), Gvisor()], indirect=True, ids=["process", "gvisor"])
def test_which_limit_was_hit_is_known_later(substrate: Substrate) -> None:
    if not substrate.capabilities()["limits"].startswith("cgroup"):
        pytest.skip("without control groups there are no counters")
    python = ["python3", "-I", "-S", "-c"]
    hog = [*python, "b = []\nwhile True: b.append(bytearray(b'x' * (1 << 20)))"]
    bomb = [*python, "import os, time\nwhile True:\n    if os.fork() == 0:\n        time.sleep(60)"]
    expected = {"killed": ExecStatus.SIGNALED, "hog": ExecStatus.OOM, "bomb": ExecStatus.PIDS_LIMIT}

    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            for name, command in (("killed", ["sh", "-c", "kill -9 $$"]), ("hog", hog), ("bomb", bomb)):
                assert (await box.exec(command, op_id=name)).status is expected[name]
            assert {name: (await box.result_of(name)).status for name in expected} == expected

    asyncio.run(play())


# Jobs.


def test_output_is_read_from_an_offset_and_forgotten_before_it(substrate: Substrate) -> None:
    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            job = await box.spawn("printf abc; printf DEF >&2; sleep 0.3; printf ghi; exit 2")
            first = await job.read(offset=0, max_output=2)
            assert (first.stdout, first.stderr, first.offset, first.ended) == (b"ab", b"", 2, False)
            assert await job.read(offset=0, max_output=2) == first, "asking again gives the same"
            second = await job.read(offset=2, max_output=4, wait_s=0.1)
            while second.offset < 6:
                second = await job.read(offset=2, max_output=4)
            assert (second.stdout, second.stderr) == (b"c", b"DEF")
            for wrong in (0, 99):
                with pytest.raises(ValueError, match=rf"offset = {wrong}: expected 2 to \d"):
                    await job.read(offset=wrong, wait_s=0.1)
            last = await job.wait(offset=6)
            assert (last.exit_code, last.stdout, last.stderr) == (2, b"ghi", b"")
            assert await job.wait(offset=6) == last
            silent = await box.spawn("sleep 5")
            quick = await silent.read(wait_s=0.05)
            assert (quick.stdout, quick.offset, quick.ended) == (b"", 0, False)
            # More than the window: each read makes room for the next.
            much, offset = await box.spawn("head -c 1000000 /dev/zero"), 0
            async with asyncio.timeout(8):
                while not (output := await much.read(offset=offset)).ended:
                    offset = output.offset
            assert output.offset == 1_000_000
            flood = await box.spawn("seq 1 200000; echo last")
            result = await flood.wait(max_output=100)
            assert result.ok
            assert result.stdout.startswith(b"1\n2\n")
            assert result.stdout.endswith(b"last\n")
            assert result.truncated_bytes > 1_000_000

    asyncio.run(play())


# Pausing.


@EVERYWHERE
def test_a_paused_box_stands_still_and_wakes_for_whoever_asks(substrate: Substrate) -> None:
    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            assert substrate.capabilities()["pause"]
            ticking = asyncio.create_task(
                box.exec("for i in $(seq 20); do echo >> ticks; sleep 0.05; done; echo end", timeout_s=3.0)
            )
            await asyncio.sleep(0.3)
            await box.pause()
            await box.pause()
            assert box.paused
            before = time.monotonic()
            await asyncio.sleep(2.9)
            # Asking wakes it; what passed meanwhile counts neither for the command nor against it.
            ticks = len(await box.read("ticks"))
            assert 0 < ticks < 15, ticks
            assert not box.paused
            result = await ticking
            assert (result.status, result.stdout) == (ExecStatus.EXITED, b"end\n")
            assert result.wall_s < time.monotonic() - before
            await box.resume()
            late = asyncio.create_task(box.exec("sleep 30", timeout_s=0.5))
            await asyncio.sleep(0.1)
            await box.pause()
            await asyncio.sleep(0.7)
            assert not late.done()
            await box.resume()
            assert (await late).status is ExecStatus.TIMEOUT
            await box.pause()

    started = time.monotonic()
    asyncio.run(play())
    assert time.monotonic() - started < 30, "a box that is paused is removed like any other"


def test_the_edge_pauses_the_box_of_a_client_that_is_gone_and_wakes_it(substrate: Substrate, tmp_path: Path) -> None:
    now = [0.0]

    async def play() -> None:
        async with serve_boxes(tmp_path, substrate, Limits(lease_s=5), clock=lambda: now[0]) as edge:
            hold = await edge.create("r", SPEC, token="a")
            now[0] += 10
            await edge.sweep()
            assert [row["state"] for row in edge.list()] == ["paused"]
            await edge.sweep()
            result = await edge.call(hold.box_id, hold.epoch, 0, Request("exec", {"command": COUNT}))
            assert result.stdout == b"x\n"
            assert [row["state"] for row in edge.list()] == ["open"]

    asyncio.run(play())


OWNER = """
import asyncio, sys
from posttrain.types import SandboxSpec
from sandbox.conformance import find_substrate

async def main():
    async with find_substrate(sys.argv[1]).open(SandboxSpec(memory_mb=64)) as box:
        asyncio.create_task(box.exec("sleep 99", timeout_s=99))
        await asyncio.sleep(0.2)
        await box.pause()
        print("paused", flush=True)
        await asyncio.sleep(99)

asyncio.run(main())
"""


@pytest.mark.parametrize("substrate", [Process(), Gvisor()], indirect=True, ids=["process", "gvisor"])
def test_a_box_whose_owner_died_while_it_was_paused_is_removed(substrate: Substrate) -> None:
    command = [sys.executable, "-c", OWNER, substrate.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "paused\n"
        owner.kill()
    groups = list(Path("/sys/fs/cgroup").glob(f"*/posttrain-*:{owner.pid}:*"))
    frozen = [pid for group in groups for pid in (group / "cgroup.procs").read_text().split()]
    assert frozen, "nothing is left over, so this proves nothing"
    deadline = time.monotonic() + 20
    while any(Path("/proc", pid).exists() for pid in frozen) or any(group.exists() for group in groups):
        assert time.monotonic() < deadline, (frozen, groups)
        gvisor.remove_orphans()
        time.sleep(0.05)


@EVERYWHERE
def test_a_paused_box_can_be_killed(substrate: Substrate) -> None:
    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            running = asyncio.create_task(box.exec("sleep 30", timeout_s=40))
            await asyncio.sleep(0.1)
            await box.pause()
            await asyncio.to_thread(box.kill)
            with pytest.raises(SandboxLost):
                await asyncio.wait_for(running, 10)
            with pytest.raises(SandboxLost):
                await box.pause()

    asyncio.run(play())


def test_the_hosts_patience_stands_still_too(substrate: Substrate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.client.REPLY_GRACE_S", 0.5)

    async def play() -> None:
        async with substrate.open(SPEC) as box:
            assert isinstance(box, AgentSandbox)
            running = asyncio.create_task(box.exec("sleep 0.5; echo done", timeout_s=1.0))
            await asyncio.sleep(0.1)
            await box.pause()
            await asyncio.sleep(2.0)
            assert not running.done()
            await box.resume()
            assert (await running).stdout == b"done\n"

    asyncio.run(play())


def test_where_nothing_can_be_frozen_that_is_said(substrate: Substrate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.cgroups.is_available", lambda: False)
    monkeypatch.setattr("sandbox.cgroups._bases", lambda: None)
    monkeypatch.setattr("sandbox.process._rlimits", lambda spec, group: {})
    assert substrate.capabilities()["pause"] is False

    async def play() -> None:
        async with substrate.open(SPEC) as box:
            with pytest.raises(Unsupported, match="no freezer"):
                await box.pause()  # type: ignore[attr-defined]
            assert (await box.exec("echo on")).stdout == b"on\n"

    asyncio.run(play())


def test_pausing_is_in_the_log(substrate: Substrate, tmp_path: Path) -> None:
    async def play() -> None:
        async with recorded_box(tmp_path, substrate) as (recorder, box):
            recorded = RecordedSandbox(recorder)
            await recorded.pause()
            assert box.paused
            assert (await recorded.exec("echo on")).stdout == b"on\n"
            assert not box.paused
            snapshot = await recorded.snapshot()
            assert [record.data["digest"] for record in recorder.log.snapshots] == [snapshot.digest]
            kinds = [recorder.log.record(seq).kind for seq in range(len(recorder.log))]
            assert kinds[-3:] == [RecordKind.INTENT, RecordKind.SNAPSHOT, RecordKind.RESULT]

    asyncio.run(play())
