from __future__ import annotations

import asyncio
import contextlib
import pickle
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import SandboxError, SandboxLost
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox import edge as edge_module
from sandbox.edge import Edge, EdgeBusy, Hold, Limits, serve_boxes
from sandbox.log import Fenced, TrajectoryLog
from sandbox.operations import Request
from sandbox.process import Process
from sandbox.recorded import Diverged, Unknown
from sandbox.wire import pack_error, unpack_error
from tests.boxes import require

SPEC = SandboxSpec(files={"seed": b"7\n"})
PEEK = Request("list", {"path": "."})


def append(text: str) -> Request:
    return Request("exec", {"command": text})


class Box:
    """A box in memory: ``exec`` waits for ``gate``, then appends its command to a file."""

    def __init__(self) -> None:
        self.counter = ""
        self.gate = asyncio.Event()
        self.gate.set()
        self.lost = self.removed = False

    async def exec(self, command: str, **_: Any) -> ExecResult:
        await self.gate.wait()
        await self.list()
        self.counter += command
        return ExecResult(status=ExecStatus.EXITED, exit_code=0, stdout=self.counter.encode())

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        await self.list()
        raise FileNotFoundError(2, "No such file or directory")

    async def write(self, path: str, data: bytes) -> None:
        await self.list()

    async def list(self, path: str = ".") -> list[str]:
        if self.lost or self.removed:
            raise SandboxLost("the agent is gone")
        return [self.counter]


class FreezingBox(Box):
    frozen = False

    async def pause(self) -> None:
        await asyncio.sleep(0.01)
        self.frozen = True

    async def resume(self) -> None:
        await asyncio.sleep(0.01)
        self.frozen = False

    async def list(self, path: str = ".") -> list[str]:
        assert not self.frozen, "a frozen box cannot answer"
        return await super().list(path)


@dataclass(frozen=True)
class Memory:
    """Boxes in memory, all that were ever made."""

    kind: Callable[[], Box] = Box
    problem: str = ""
    made: list[Box] = field(default_factory=list)
    name: str = "memory"

    def capabilities(self) -> Mapping[str, Any]:
        return {"isolation": "none"}

    def check(self) -> None: ...

    @contextlib.asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[Box]:
        if self.problem:
            raise SandboxError(self.problem)
        box = self.kind()
        self.made.append(box)
        try:
            yield box
        finally:
            box.removed = True


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def kinds_of(folder: Path, hold: Hold) -> list[str]:
    log = TrajectoryLog.read(folder / "boxes" / hold.box_id)
    return [log.record(seq).kind for seq in range(len(log))]


def state_of(edge: Edge, hold: Hold) -> tuple[str, str]:
    (row,) = [row for row in edge.list() if row["box_id"] == hold.box_id]
    return row["state"], row["cause"]


def test_a_second_client_takes_over_and_the_first_is_fenced_off(tmp_path: Path) -> None:
    memory = Memory()

    async def play() -> None:
        async with serve_boxes(tmp_path, memory) as edge:
            first = await edge.create("r", SPEC, token="a")
            assert (await edge.call(first.box_id, first.epoch, 0, append("x"))).stdout == b"x"
            second = await edge.attach("r")
            assert (second.box_id, second.epoch, second.num_recorded) == (first.box_id, first.epoch + 1, 1)
            assert (await edge.call(second.box_id, second.epoch, 0, append("x"))).stdout == b"x"
            with pytest.raises(Diverged):
                await edge.call(second.box_id, second.epoch, 0, append("z"))
            assert (await edge.call(second.box_id, second.epoch, 1, append("y"))).stdout == b"xy"
            for attempt in (
                edge.call(first.box_id, first.epoch, 1, append("y")),
                edge.renew(first.box_id, first.epoch),
                edge.close(first.box_id, first.epoch),
            ):
                with pytest.raises(Fenced, match="epoch 1 is stale, epoch 2"):
                    await attempt
            with pytest.raises(KeyError, match="has no box on this edge; create one"):
                await edge.attach("another")
            await edge.close(second.box_id, second.epoch)
            assert memory.made[0].removed
            # What a closed box did can still be asked; what it did not, cannot.
            assert (await edge.call(second.box_id, second.epoch, 1, append("y"))).stdout == b"xy"
            with pytest.raises(SandboxLost, match="closed by its client"):
                await edge.call(second.box_id, second.epoch, 2, append("y"))
        assert memory.made[0].counter == "xy"

    asyncio.run(play())


def test_a_call_that_comes_twice_runs_once_and_one_that_comes_early_does_not_run(tmp_path: Path) -> None:
    memory = Memory()

    async def play() -> None:
        async with serve_boxes(tmp_path, memory) as edge:
            hold = await edge.create("r", SPEC, token="a")
            memory.made[0].gate.clear()
            twice = [asyncio.create_task(edge.call(hold.box_id, hold.epoch, 0, append("x"))) for _ in range(2)]
            await asyncio.sleep(0.01)
            with pytest.raises(SandboxError, match=r"call 2 of box .* expected 1 or less"):
                await edge.call(hold.box_id, hold.epoch, 2, append("z"))
            memory.made[0].gate.set()
            first, second = await asyncio.gather(*twice)
            assert first == second
            assert memory.made[0].counter == "x"

    asyncio.run(play())


def test_creating_is_asked_again_by_token_and_otherwise_refused(tmp_path: Path) -> None:
    memory = Memory()

    async def play() -> None:
        async with serve_boxes(tmp_path, memory) as edge:
            first, again = await asyncio.gather(*(edge.create("r", SPEC, token="a") for _ in range(2)))
            assert first.box_id == again.box_id
            with pytest.raises(ValueError, match=r"rollout 'r' has box \w+ already \(open\); attach to it"):
                await edge.create("r", SPEC, token="b")
            for name, value in (("ttl_max_s", 1e9), ("ttl_idle_s", 0.0)):
                with pytest.raises(ValueError, match=rf"{name} = {value}: expected a time > 0 and at most"):
                    await edge.create("s", SPEC, token="c", **{name: value})  # type: ignore[arg-type]
            await edge.close(first.box_id, 2)
            assert (await edge.create("r", SPEC, token="b")).box_id != first.box_id
        assert len(memory.made) == 2

    asyncio.run(play())


def test_a_box_that_cannot_be_made_says_why_and_takes_no_room(tmp_path: Path) -> None:
    async def play() -> None:
        async with serve_boxes(tmp_path, Memory(problem="no daemon"), Limits(max_boxes=1)) as edge:
            for token in "ab":
                with pytest.raises(SandboxError, match="no daemon"):
                    await edge.create("r", SPEC, token=token)
            with pytest.raises(SandboxLost, match=r"box \w+ is gone: could not be opened: no daemon; create another"):
                await edge.create("r", SPEC, token="b")
            assert [(row["state"], row["cause"]) for row in edge.list()] == [
                ("lost", "could not be opened: no daemon")
            ] * 2

    asyncio.run(play())


def test_room_is_limited_and_so_is_the_queue_for_it(tmp_path: Path) -> None:
    memory = Memory()

    async def play() -> None:
        limits = Limits(max_boxes=2, max_waiting=1, wait_s=0.2)
        async with serve_boxes(tmp_path, memory, limits) as edge:
            holds = [await edge.create(name, SPEC, token=name) for name in "ab"]
            waiting = asyncio.create_task(edge.create("c", SPEC, token="c"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            with pytest.raises(EdgeBusy, match="2 boxes are open on this edge and 1 wait; close some, or raise"):
                await edge.create("d", SPEC, token="d")
            await edge.close(holds[0].box_id, holds[0].epoch)
            await waiting
            with pytest.raises(EdgeBusy, match="none was closed within 0 s"):
                await edge.create("e", SPEC, token="e")
        assert len(memory.made) == 3
        assert all(box.removed for box in memory.made)

    asyncio.run(play())


def test_a_preempted_clients_box_is_kept_until_its_absolute_limit(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()

    async def play() -> None:
        limits = Limits(lease_s=10, ttl_idle_s=20, ttl_max_s=1000)
        async with serve_boxes(tmp_path, memory, limits, clock=clock) as edge:
            hold = await edge.create("r", SPEC, token="a")
            clock.now = 9
            await edge.sweep()
            assert state_of(edge, hold)[0] == "open"
            clock.now = 11
            await edge.sweep()
            assert state_of(edge, hold) == ("unattended", "the client's lease ran out")
            clock.now = 900
            await edge.sweep()
            hold = await edge.attach("r")
            assert state_of(edge, hold)[0] == "open"
            await edge.call(hold.box_id, hold.epoch, 0, append("x"))
            clock.now = 1001
            await edge.sweep()
            assert state_of(edge, hold) == ("closed", "ttl_max_s is over")
            await asyncio.sleep(0.01)
            assert memory.made[0].removed
        assert kinds_of(tmp_path, hold) == ["create", "intent", "result", "close"]

    asyncio.run(play())


def test_a_dead_clients_box_is_not_idle_however_short_its_idle_limit(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()

    async def play() -> None:
        limits = Limits(lease_s=30, ttl_max_s=1000)
        async with serve_boxes(tmp_path, memory, limits, clock=clock) as edge:
            hold = await edge.create("r", SPEC, token="a", ttl_idle_s=5)
            for now, state in ((4, "open"), (29, "open"), (31, "unattended"), (999, "unattended")):
                clock.now = now
                await edge.sweep()
                assert state_of(edge, hold)[0] == state
                await asyncio.sleep(0.01)  # for the heartbeat
            # It comes back: from here on it holds the box, and idles.
            hold = await edge.attach("r")
            clock.now = 999.5
            await edge.sweep()
            assert state_of(edge, hold)[0] == "open"

    asyncio.run(play())


def test_one_edge_serves_several_substrates_and_says_whose_boxes_they_are(tmp_path: Path) -> None:
    first, second = Memory(), Memory(FreezingBox, name="freezing")

    async def play() -> None:
        async with serve_boxes(tmp_path, [first, second]) as edge:
            await edge.create("a", SPEC, token="a")
            hold = await edge.create("b", SPEC, token="b", box_id="e7-1", substrate="freezing", labels={"owner": "ann"})
            assert (hold.box_id, hold.substrate) == ("e7-1", "freezing")
            with pytest.raises(ValueError, match=r"substrate = 'none': expected one .* memory, freezing"):
                await edge.create("c", SPEC, token="c", substrate="none")
            rows = edge.list()
            assert [(row["substrate"], row["labels"]) for row in rows] == [
                ("memory", {}),
                ("freezing", {"owner": "ann"}),
            ]
            assert rows[1]["deadline_s"] - rows[1]["created_s"] == pytest.approx(edge.limits.ttl_max_s, abs=1)
            await edge.close(hold.box_id, hold.epoch)
            assert [row["box_id"] for row in edge.census()] == [rows[0]["box_id"]]
            assert len(edge.census(["e7-1", "unheard-of"])) == 2
            assert (await edge.create("b", SPEC, token="b")).box_id == "e7-1", "its log still answers"
        assert [(len(memory.made), type(memory.made[0])) for memory in (first, second)] == [(1, Box), (1, FreezingBox)]

    asyncio.run(play())


def test_logs_of_boxes_that_are_long_gone_are_deleted_with_their_payloads(tmp_path: Path) -> None:
    async def play() -> None:
        async with serve_boxes(tmp_path, Memory(), Limits(keep_logs_s=0.3)) as edge:
            gone = await edge.create("gone", SPEC, token="a")
            kept = await edge.create("kept", SPEC, token="b")
            for hold in (gone, kept):
                await edge.call(hold.box_id, hold.epoch, 0, Request("write", {"path": "a", "data": b"x" * 100_000}))
            assert len(list(tmp_path.glob("boxes/*/blobs/*"))) == 2
            await edge.close(gone.box_id, gone.epoch)
            await edge.sweep()
            assert len(edge.list()) == 2, "not yet"
            await asyncio.sleep(0.4)
            await edge.sweep()
            assert [row["box_id"] for row in edge.list()] == [kept.box_id]
            assert [path.name for path in (tmp_path / "boxes").iterdir()] == [kept.box_id]
            with pytest.raises(KeyError):
                await edge.attach("gone")

    asyncio.run(play())


def test_a_preempted_clients_processes_stand_still_until_it_is_back(tmp_path: Path) -> None:
    require(Process())
    if not Process().capabilities().get("pause"):
        pytest.skip("boxes of substrate 'process' cannot be paused here: no freezer control group")
    clock = Clock()

    async def play() -> None:
        async with serve_boxes(tmp_path, Process(), Limits(lease_s=10), clock=clock) as edge:
            hold = await edge.create("r", SandboxSpec(), token="a")
            assert (await edge.call(hold.box_id, hold.epoch, 0, append("echo x > f; cat f"))).stdout == b"x\n"
            clock.now = 11
            await edge.sweep()
            assert state_of(edge, hold) == ("paused", "the client's lease ran out")
            clock.now = 11 + 2 * edge_module.HEARTBEAT_S
            await edge.sweep()
            await asyncio.sleep(0.1)
            assert state_of(edge, hold)[0] == "paused", "a frozen box that does not answer is not dead"
            hold = await edge.attach("r")
            await edge.call(hold.box_id, hold.epoch, 0, append("echo x > f; cat f"))
            assert (await edge.call(hold.box_id, hold.epoch, 1, append("cat f"))).stdout == b"x\n"
        assert kinds_of(tmp_path, hold)[:5] == ["create", "intent", "result", "pause", "resume"]

    asyncio.run(play())


def test_a_client_that_holds_a_box_and_asks_nothing_loses_it(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()

    async def play() -> None:
        limits = Limits(lease_s=10, ttl_idle_s=25)
        async with serve_boxes(tmp_path, memory, limits, clock=clock) as edge:
            hold = await edge.create("r", SPEC, token="a")
            memory.made[0].gate.clear()
            running = asyncio.create_task(edge.call(hold.box_id, hold.epoch, 0, append("x")))
            for _ in range(10):
                clock.now += 8
                await asyncio.sleep(0)
                await edge.renew(hold.box_id, hold.epoch)
                await edge.sweep()
            assert state_of(edge, hold)[0] == "open", "a box with a running command is not idle"
            memory.made[0].gate.set()
            await running
            for _ in range(4):
                assert state_of(edge, hold)[0] == "open"
                clock.now += 8
                await edge.renew(hold.box_id, hold.epoch)
                await edge.sweep()
            assert state_of(edge, hold) == ("closed", "idle for ttl_idle_s")

    asyncio.run(play())


def test_a_box_that_can_be_frozen_is_and_wakes_for_the_next_call(tmp_path: Path) -> None:
    memory, clock = Memory(FreezingBox), Clock()

    async def play() -> None:
        async with serve_boxes(tmp_path, memory, Limits(lease_s=10), clock=clock) as edge:
            hold = await edge.create("r", SPEC, token="a")
            clock.now = 11
            await edge.sweep()
            assert state_of(edge, hold)[0] == "paused"
            clock.now = 60
            await edge.sweep()
            letters = "abcd"
            calls = [edge.call(hold.box_id, hold.epoch, i, append(letter)) for i, letter in enumerate(letters)]
            waiting = asyncio.gather(*calls)
            while state_of(edge, hold)[0] == "paused":
                await asyncio.sleep(0)
            # One that comes when the box is awake does not overtake those that woke it.
            await edge.call(hold.box_id, hold.epoch, 4, append("e"))
            await waiting
            assert (memory.made[0].counter, state_of(edge, hold)[0]) == (letters + "e", "open")
        assert kinds_of(tmp_path, hold)[:3] == ["create", "pause", "resume"]

    asyncio.run(play())


class StuckBox(FreezingBox):
    async def resume(self) -> None:
        await asyncio.sleep(60)


def test_a_frozen_box_that_does_not_wake_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_module, "PAUSE_DEADLINE_S", 0.1)
    memory, clock = Memory(StuckBox), Clock()

    async def play() -> None:
        async with serve_boxes(tmp_path, memory, Limits(lease_s=10), clock=clock) as edge:
            hold = await edge.create("r", SPEC, token="a")
            clock.now = 11
            await edge.sweep()
            calls = [edge.call(hold.box_id, hold.epoch, i, append("x")) for i in range(2)]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert "could not be paused or resumed" in str(outcome)
            await edge.attach("r")
            assert state_of(edge, hold) == ("lost", "it could not be paused or resumed: no answer")
            assert memory.made[0].removed
        assert kinds_of(tmp_path, hold) == ["create", "pause", "lost"]

    asyncio.run(play())


def test_the_logs_of_many_past_boxes_do_not_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_module, "MAX_PAST", 3)

    async def play() -> None:
        async with serve_boxes(tmp_path, Memory()) as edge:
            holds = []
            for number in range(8):
                hold = await edge.create(f"r{number}", SPEC, token="a")
                await edge.call(hold.box_id, hold.epoch, 0, append("x"))
                await edge.close(hold.box_id, hold.epoch)
                holds.append(hold)
            opened = [path.resolve() for path in Path("/proc/self/fd").iterdir() if path.exists()]
            assert sum(path.name == "records" and tmp_path in path.parents for path in opened) == 3
            for hold in holds:
                assert (await edge.call(hold.box_id, hold.epoch, 0, append("x"))).stdout == b"x"

    asyncio.run(play())


def test_a_dead_box_is_found_before_anyone_asks(tmp_path: Path) -> None:
    memory, clock = Memory(), Clock()

    async def play() -> None:
        async with serve_boxes(tmp_path, memory, clock=clock) as edge:
            hold = await edge.create("r", SPEC, token="a")
            for now, state in ((edge_module.HEARTBEAT_S, "open"), (2 * edge_module.HEARTBEAT_S, "lost")):
                clock.now = now
                await edge.renew(hold.box_id, hold.epoch)
                await edge.sweep()
                await asyncio.sleep(0.01)
                assert state_of(edge, hold)[0] == state
                memory.made[0].lost = True
            with pytest.raises(SandboxLost, match="the agent is gone"):
                await edge.call(hold.box_id, hold.epoch, 0, PEEK)
        assert kinds_of(tmp_path, hold) == ["create", "lost"]

    asyncio.run(play())


def test_a_box_lost_in_a_call_gives_its_room_back(tmp_path: Path) -> None:
    memory = Memory()

    async def play() -> None:
        async with serve_boxes(tmp_path, memory, Limits(max_boxes=1, max_waiting=1, wait_s=5)) as edge:
            hold = await edge.create("r", SPEC, token="a")
            memory.made[0].lost = True
            with pytest.raises(SandboxLost):
                await edge.call(hold.box_id, hold.epoch, 0, append("x"))
            assert state_of(edge, hold) == ("lost", "the agent is gone")
            with pytest.raises(Unknown):
                await edge.call(hold.box_id, hold.epoch, 0, append("x"))
            await edge.create("s", SPEC, token="b")

    asyncio.run(play())


def test_a_restarted_edge_knows_what_it_held_and_what_was_done_there(tmp_path: Path) -> None:
    memory = Memory()

    async def first_life() -> tuple[Hold, Hold]:
        async with serve_boxes(tmp_path, memory) as edge:
            hold, other = [await edge.create(name, SPEC, token=name) for name in "rs"]
            await edge.call(hold.box_id, hold.epoch, 0, append("x"))
            return hold, other

    hold, other = asyncio.run(first_life())
    # As after kill -9: the state says that the boxes are there.
    with contextlib.closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as state:
        state.execute("UPDATE boxes SET state = 'open', ended_s = NULL")
    (tmp_path / "boxes" / other.box_id / "records").unlink()

    async def second_life() -> None:
        async with serve_boxes(tmp_path, memory) as edge:
            assert state_of(edge, hold) == ("lost", "the edge that held it ended")
            assert "its log cannot be read" in state_of(edge, other)[1]
            # The same client goes on, without attaching.
            assert (await edge.call(hold.box_id, hold.epoch, 0, append("x"))).stdout == b"x"
            with pytest.raises(SandboxLost, match="the edge was stopped"):
                await edge.call(hold.box_id, hold.epoch, 1, append("y"))
            again = await edge.attach("r")
            assert (again.epoch, again.num_recorded) == (hold.epoch + 1, 1)
            with pytest.raises(SandboxLost, match="was never made"):
                await edge.attach("s")

    asyncio.run(second_life())
    assert [box.counter for box in memory.made] == ["x", ""]


def test_one_folder_has_one_edge(tmp_path: Path) -> None:
    async def play() -> None:
        async with serve_boxes(tmp_path, Memory()):
            with pytest.raises(SandboxError, match="another edge serves this folder"):
                async with serve_boxes(tmp_path, Memory()):
                    pass
        async with serve_boxes(tmp_path, Memory()):
            pass

    asyncio.run(play())


@pytest.mark.parametrize("name", ["max_boxes", "lease_s", "wait_s", "ttl_max_s"])
def test_limits_that_make_no_sense_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Limits.{name} = 0: expected a number > 0"):
        Limits(**{name: 0})


ERRORS = [
    Fenced("box b", 1, 2),
    Diverged(3, "exec('a')", "exec('b')"),
    Unknown(5, "1.2", "exec"),
    SandboxLost("gone"),
    EdgeBusy("full"),
    ValueError("wrong"),
    KeyError("r"),
    FileNotFoundError(2, "No such file or directory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling_and_the_wire(error: Exception) -> None:
    for copy in (pickle.loads(pickle.dumps(error)), unpack_error(pack_error(error))):
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_an_error_the_wire_does_not_know_is_a_machinery_failure() -> None:
    assert isinstance(unpack_error(pack_error(ZeroDivisionError("oops"))), SandboxError)
    assert isinstance(unpack_error(pack_error(TimeoutError())), SandboxError)
