from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import SandboxError, SandboxLost
from posttrain.protocols import Sandbox
from posttrain.types import ExecResult, ExecStatus, SandboxSpec
from sandbox.local import LocalUnsafe
from sandbox.log import Fenced, RecordKind, TrajectoryLog
from sandbox.process import Process
from sandbox.recorded import (
    Diverged,
    RecordedSandbox,
    Recorder,
    Unknown,
    creation,
    fork_at,
    normalise,
    remembers,
    replay,
    spec_of,
)
from tests.boxes import require

LOCAL = LocalUnsafe(i_accept_that_model_written_code_runs_unisolated=True)
SPEC = SandboxSpec(files={"seed": b"7\n"})
Died = type("Died", (BaseException,), {})
"""Stands for the end of the client: nothing catches it."""


def begin(folder: Path) -> TrajectoryLog:
    return TrajectoryLog.create(folder, creation(LOCAL, SPEC))


class Box:
    """A box in memory that counts what it is asked for; ``exec`` appends its command to a file."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls: list[str] = []
        self.lost = False

    async def exec(self, command: str | Sequence[str], **_: Any) -> ExecResult:
        self._called("exec")
        self.files["counter"] = self.files.get("counter", b"") + str(command).encode()
        return ExecResult(status=ExecStatus.EXITED, exit_code=0, stdout=self.files["counter"], wall_s=0.5)

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        self._called("read")
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return self.files[path]

    async def write(self, path: str, data: bytes, **_: Any) -> None:
        self._called("write")
        self.files[path] = self.files.get(path, b"") + data

    async def list(self, path: str = ".") -> list[str]:
        self._called("list")
        return sorted(self.files)

    def _called(self, kind: str) -> None:
        if self.lost:
            raise SandboxLost("the agent is gone")
        self.calls.append(kind)


async def program(box: Sandbox) -> list[Any]:
    """What a rollout does, the same in every life of its client."""
    seen: list[Any] = [await box.exec("x"), await box.write("a", b"\0" * 40_000), await box.list()]
    for path in ("a", "absent"):
        try:
            seen.append(await box.read(path))
        except FileNotFoundError as error:
            seen.append((type(error), error.errno))
    return seen


def test_a_second_client_gets_the_same_bytes_and_the_box_is_not_touched(tmp_path: Path) -> None:
    box, log = Box(), begin(tmp_path)
    first = asyncio.run(program(RecordedSandbox(Recorder(box, log))))
    calls = list(box.calls)
    log.close()

    async def second_life() -> list[Any]:
        again = RecordedSandbox(Recorder(box, TrajectoryLog.open(tmp_path)))
        seen = await program(again)
        assert box.calls == calls
        await again.exec("y")
        assert box.calls == [*calls, "exec"]
        return seen

    assert asyncio.run(second_life()) == first
    assert first[4] == (FileNotFoundError, errno.ENOENT)


def test_what_is_recorded_can_be_had_without_a_box(tmp_path: Path) -> None:
    first = asyncio.run(program(RecordedSandbox(Recorder(Box(), begin(tmp_path)))))

    async def look() -> None:
        recorded = RecordedSandbox(Recorder(None, TrajectoryLog.open(tmp_path)))
        assert await program(recorded) == first
        with pytest.raises(SandboxLost, match="nobody has opened it"):
            await recorded.list()

    asyncio.run(look())


def test_another_request_diverges_and_the_right_one_still_goes_on(tmp_path: Path) -> None:
    log = begin(tmp_path)

    async def play() -> None:
        box = Box()
        first = RecordedSandbox(Recorder(box, log))
        await first.exec("x", stdin=b"1")
        await first.exec("y")
        for wrong in ({"stdin": b"2"}, {"timeout_s": 1.0}, {"env": {"A": "b"}}, {"max_output": 5}):
            again = RecordedSandbox(Recorder(box, log))
            with pytest.raises(Diverged, match=r"operation 1: the log holds exec\('x'\)") as caught:
                await again.exec("x", **{"stdin": b"1", **wrong})  # type: ignore[arg-type]
            assert caught.value.seq == 1
            assert (await again.exec("x", stdin=b"1")).stdout == b"x"
            with pytest.raises(Diverged, match="operation 3"):
                await again.read("y")
        assert box.calls == ["exec", "exec"]

    asyncio.run(play())


@pytest.mark.parametrize("point", ["intent", "effect", "result"])
@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("exec", lambda box: box.exec("x")),
        ("write", lambda box: box.write("counter", b"x")),
        ("read", lambda box: box.read("seed")),
        ("list", lambda box: box.list()),
        ("exec", lambda box: box.exec("x", idempotent=True)),
    ],
    ids=["exec", "write", "read", "list", "exec-idempotent"],
)
def test_a_client_that_dies_never_makes_an_operation_happen_twice(
    tmp_path: Path, point: str, kind: str, call: Callable[[RecordedSandbox], Any], request: pytest.FixtureRequest
) -> None:
    harmless = request.node.callspec.id.startswith(("read", "list", "exec-idempotent"))
    box = Box()
    box.files["seed"] = b"7"

    def crash_at(reached: str, what: str) -> None:
        if (reached, what) == (point, kind):
            raise Died

    async def first_life() -> None:
        await call(RecordedSandbox(Recorder(box, begin(tmp_path), crash_at=crash_at)))

    with contextlib.suppress(Died):
        asyncio.run(first_life())
    happened = box.calls.count(kind)
    assert happened == (0 if point == "intent" else 1)

    async def second_life() -> None:
        recorded = RecordedSandbox(Recorder(box, TrajectoryLog.open(tmp_path)))
        if point != "result" and not harmless:
            with pytest.raises(Unknown, match=rf"operation 1 \({kind}, id 1\.0\)"):
                await call(recorded)
            assert box.calls.count(kind) == happened
        else:
            await call(recorded)
            assert box.calls.count(kind) == (happened if point == "result" else happened + 1)
        # The box is still there, and so is the rest of the rollout.
        assert await recorded.list() == sorted(box.files)

    asyncio.run(second_life())


class RememberingBox(Box):
    """A box that outlives its client and knows its operations by their ids."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, ExecResult | None] = {}

    async def exec(self, command: str | Sequence[str], *, op_id: str = "", **_: Any) -> ExecResult:
        result = self.results[op_id] = await super().exec(command)
        return result

    async def write(self, path: str, data: bytes, *, op_id: str = "", **_: Any) -> None:
        await super().write(path, data)
        self.results[op_id] = None

    async def result_of(self, op_id: str) -> ExecResult | None:
        return self.results[op_id]

    async def acknowledge(self, op_id: str) -> None:
        self.results.pop(op_id, None)


@pytest.mark.parametrize("kind", ["exec", "write"])
def test_a_box_that_remembers_is_asked_for_what_the_client_did_not_hear(tmp_path: Path, kind: str) -> None:
    box = RememberingBox()
    assert remembers(box)

    async def life(crash: str | None, log: TrajectoryLog) -> Any:
        def crash_at(point: str, what: str) -> None:
            if point == crash:
                raise Died

        recorded = RecordedSandbox(Recorder(box, log, crash_at=crash_at))
        return await (recorded.exec("x") if kind == "exec" else recorded.write("counter", b"x"))

    with contextlib.suppress(Died):
        asyncio.run(life("effect", begin(tmp_path)))
    assert list(box.results) == ["1.0"]
    result = asyncio.run(life(None, TrajectoryLog.open(tmp_path)))
    assert box.files["counter"] == b"x"
    assert box.results == {}, "an operation on disk is acknowledged"
    assert asyncio.run(life(None, TrajectoryLog.open(tmp_path))) == result
    assert box.calls == [kind]


def test_an_operation_the_box_never_heard_of_is_unknown(tmp_path: Path) -> None:
    log = begin(tmp_path)
    intent = {"op_id": "1.0", "kind": "exec", "idempotent": False, "request": {}}

    async def play() -> None:
        first = RecordedSandbox(Recorder(RememberingBox(), log))
        await first.exec("x")
        log.append(RecordKind.INTENT, {**intent, "request": log.record(1).data["request"]})
        again = RecordedSandbox(Recorder(RememberingBox(), log))
        await again.exec("x")
        with pytest.raises(Unknown, match="operation 3"):
            await again.exec("x")

    asyncio.run(play())


def test_a_lost_box_is_recorded_once_and_never_a_result(tmp_path: Path) -> None:
    log, box = begin(tmp_path), Box()

    async def play() -> None:
        recorded = RecordedSandbox(Recorder(box, log))
        await recorded.exec("x")
        box.lost = True
        for call in (recorded.exec("y"), recorded.read("a"), recorded.list()):
            with pytest.raises(SandboxLost):
                await call
        again = RecordedSandbox(Recorder(box, log))
        assert (await again.exec("x")).stdout == b"x"
        with pytest.raises(Unknown):
            await again.exec("y")
        with pytest.raises(SandboxLost, match="the agent is gone"):
            await again.exec("z")

    asyncio.run(play())
    assert [log.record(seq).kind for seq in range(len(log))] == ["create", "intent", "result", "intent", "lost"]


def test_a_client_whose_place_was_taken_cannot_act(tmp_path: Path) -> None:
    log, box = begin(tmp_path), Box()

    async def play() -> None:
        recorder = Recorder(box, log)
        zombie = RecordedSandbox(recorder)
        await zombie.exec("x")
        log.claim()
        owner = RecordedSandbox(recorder)
        with pytest.raises(Fenced, match="epoch 1 is stale, epoch 2"):
            await zombie.exec("y")
        await owner.exec("x")
        await owner.exec("z")

    asyncio.run(play())
    assert box.files["counter"] == b"xz"


def test_a_result_the_log_could_not_take_is_kept_for_the_next_try(tmp_path: Path) -> None:
    log, box = begin(tmp_path), Box()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(point: str, kind: str) -> None:
        if point == "effect":
            size = len((tmp_path / "records").read_bytes().rstrip(b"\0"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))

    async def play() -> None:
        recorder = Recorder(box, log, crash_at=fill_disk)
        try:
            with pytest.raises(SandboxError, match="could not be written"):
                await RecordedSandbox(recorder).exec("x")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (await RecordedSandbox(recorder).exec("x")).stdout == b"x"

    asyncio.run(play())
    assert (box.calls, log.operations[0].result) == (["exec"], 2)


def test_a_cancelled_command_is_dead_and_recorded_as_cancelled(tmp_path: Path) -> None:
    log = begin(tmp_path)

    async def play() -> None:
        async with LOCAL.open(SPEC) as box:
            recorder = Recorder(box, log)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(RecordedSandbox(recorder).exec("sleep 60; echo late > f", timeout_s=70), 0.2)
            again = RecordedSandbox(recorder)
            result = await again.exec("sleep 60; echo late > f", timeout_s=70)
            assert result.status is ExecStatus.CANCELLED
            assert await again.list() == ["seed"]

    asyncio.run(play())


def test_calls_at_the_same_time_are_told_apart_by_their_order(tmp_path: Path) -> None:
    log = begin(tmp_path)

    async def play(recorded: RecordedSandbox) -> list[bytes]:
        scripts = ["sleep 0.2; echo slow", "echo quick", "sleep 0.1; echo middle"]
        return [result.stdout for result in await asyncio.gather(*(recorded.exec(script) for script in scripts))]

    async def lives() -> None:
        async with LOCAL.open(SPEC) as box:
            first = await play(RecordedSandbox(Recorder(box, log)))
            assert first == [b"slow\n", b"quick\n", b"middle\n"]
            assert await play(RecordedSandbox(Recorder(box, log))) == first

    asyncio.run(lives())
    assert [operation.seq for operation in log.operations] == [1, 2, 3]
    assert {log.record(seq).kind for seq in (4, 5, 6)} == {RecordKind.RESULT}


async def long_program(box: Sandbox) -> None:
    await box.exec("cp seed counter; echo $$; date +%H:%M:%S; echo took 0.$(date +%N | cut -c1-3)s")
    await box.write("dir/b", bytes(50_000))
    await box.exec("echo x >> counter; cat counter")
    await box.exec("cat /no/such; exit 3")
    with contextlib.suppress(FileNotFoundError):
        await box.read("absent")
    await box.list()


def test_replaying_gives_the_same_and_says_what_did_not(tmp_path: Path) -> None:
    log = begin(tmp_path)
    hidden = "echo pid $$; echo $(mktemp -u) $RANDOM; date +%s%N"

    async def play() -> None:
        async with LOCAL.open(SPEC) as box:
            recorded = RecordedSandbox(Recorder(box, log))
            await long_program(recorded)
            await recorded.exec(hidden)
        report = await replay(log, LOCAL)
        assert (report.num_replayed, report.left_out, report.ok) == (7, [], False)
        # The shell's pid stands alone on its line, and a time in nanoseconds looks like any number.
        assert [(d.seq, d.part) for d in report.differences] == [(1, "stdout"), (13, "stdout")]
        assert (await replay(log, LOCAL, upto=3)).num_replayed == 2
        bare = await replay(log, LOCAL, upto=11, normalisers=())
        assert [(d.seq, d.part) for d in bare.differences] == [(1, "stdout")]

    asyncio.run(play())


def test_a_replay_leaves_out_what_may_not_have_happened(tmp_path: Path) -> None:
    log = begin(tmp_path)

    async def play() -> None:
        box = Box()
        recorded = RecordedSandbox(Recorder(box, log))
        await recorded.exec("x")
        box.lost = True
        with pytest.raises(SandboxLost):
            await recorded.exec("y")

    asyncio.run(play())
    report = asyncio.run(replay(log, InMemory()))
    assert (report.num_replayed, report.left_out, report.ok, report.image_differs) == (1, [3], False, True)


@dataclass(frozen=True)
class InMemory:
    name: str = "memory"
    image: str = "another"
    made: list[Box] = field(default_factory=list)

    def capabilities(self) -> Mapping[str, Any]:
        return {"isolation": "none", "image": self.image}

    def check(self) -> None: ...

    @contextlib.asynccontextmanager
    async def open(self, spec: SandboxSpec) -> AsyncIterator[Box]:
        self.made.append(Box())
        yield self.made[-1]


def test_a_fork_goes_on_from_the_operation_it_was_made_at(tmp_path: Path) -> None:
    log = begin(tmp_path / "one")

    async def play() -> None:
        async with LOCAL.open(SPEC) as box:
            recorded = RecordedSandbox(Recorder(box, log))
            for letter in "abc":
                await recorded.exec(f"echo {letter} >> counter; cat counter")
        with pytest.raises(ValueError, match="seq = 9: expected the number of a record"):
            async with fork_at(log, 9, substrate=LOCAL, folder=tmp_path / "two"):
                pass
        async with fork_at(log, 3, substrate=LOCAL, folder=tmp_path / "two") as (fork, report):
            assert report.ok, report
            assert (await fork.exec("echo d >> counter; cat counter")).stdout == b"a\nb\nd\n"

    asyncio.run(play())
    forked = TrajectoryLog.read(tmp_path / "two")
    assert (len(forked.operations), forked.record(0).data["forked_from"]) == (3, ["one", 3])
    assert spec_of(forked) == SPEC
    assert forked.ended
    assert forked.ended.kind is RecordKind.CLOSE


def test_a_users_commands_are_repeated_as_that_users(tmp_path: Path) -> None:
    process = require(Process())
    log = TrajectoryLog.create(tmp_path / "one", creation(process, SPEC))
    adds = "umask 077; echo x >> own; cat own; id -u"

    async def play() -> None:
        async with process.open(SPEC) as box:
            recorded = RecordedSandbox(Recorder(box, log))
            await recorded.exec("true", user="zoe")
            first = await recorded.exec(adds, user="alice")
            await recorded.exec("id -u")
            again = RecordedSandbox(Recorder(box, log))
            await again.exec("true", user="zoe")
            with pytest.raises(Diverged):
                await again.exec(adds, user="zoe")
            assert await again.exec(adds, user="alice") == first
        assert (await replay(log, process)).ok
        async with fork_at(log, len(log) - 1, substrate=process, folder=tmp_path / "two") as (fork, report):
            assert report.ok, report
            assert (await fork.exec("cat own; id -u", user="alice")).stdout == first.stdout
            assert not (await fork.exec("cat own")).ok

    asyncio.run(play())
    requests = [log.record(operation.seq).data["request"] for operation in log.operations]
    assert [request.get("user") for request in requests] == ["zoe", "alice", None]
    assert "user" not in requests[2], "a log from before there were users reads the same"


def test_normalising_hides_what_varies_and_nothing_else() -> None:
    varies = (
        b"12:34:56.7 2026-01-02T03:04:05Z took 0.123s pid=42 /proc/77/x /tmp/tmpab12_xyz tmp.Ab12Cd34 0x7ffdeadbeef0"
    )
    named = b"<time> <time> took <duration> pid=<pid> /proc/<pid>/x /tmp/<temporary> <temporary> <address>"
    assert normalise(varies) == named
    kept = b"answer 42, 3 passed, 10 seconds, /tmp/result.txt, 0x1f, x = 1.5"
    assert normalise(kept) == kept
