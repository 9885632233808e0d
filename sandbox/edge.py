"""The keeper of one host's boxes: they live here, so that a client may die and another one take its place.

``python -m sandbox.edge --dir DIR`` serves it on the socket ``DIR/edge.sock``, to which ``EdgeClient`` connects. What
the edge must know after its own death lies in ``DIR``: which boxes there are in ``state.db`` (SQLite), what was done in
each in ``boxes/ID`` (its trajectory log). A box whose channel died with the edge is LOST, not forgotten.

A client holds a box by a lease that every call renews. When the lease runs out the client is taken to be preempted:
its box is paused where the substrate can, and kept. A box goes away when it is closed, when it is as old as
``ttl_max_s``, or when a client that is heard of has asked nothing of it for ``ttl_idle_s``. Its log stays for
``keep_logs_s`` more.

Kinds of box that are asked for again and again are started ahead of their use, as many as lately came.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from posttrain.errors import SandboxError, SandboxLost
from posttrain.protocols import Sandbox, Substrate
from posttrain.types import SandboxSpec
from sandbox import cgroups
from sandbox.demand import WarmBoxes
from sandbox.log import Fenced, LogDamaged, Operation, RecordKind, TrajectoryLog
from sandbox.operations import Request
from sandbox.recorded import CrashAt, Recorder, creation, never, spec_of

SWEEP_S = 1.0
HEARTBEAT_S = 10.0
BEAT_DEADLINE_S = 20.0
PAUSE_DEADLINE_S = 10.0
DAY_S = 24 * 3600.0
MAX_PAST = 64
"""Logs of boxes that are gone which stay open, for clients that ask once more."""
GONE = ("lost", "closed")
SCHEMA = """
CREATE TABLE IF NOT EXISTS boxes (
    box_id TEXT PRIMARY KEY,
    rollout_id TEXT NOT NULL,
    token TEXT NOT NULL,
    substrate TEXT NOT NULL,
    labels TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('opening', 'open', 'unattended', 'paused', 'lost', 'closed')),
    cause TEXT NOT NULL DEFAULT '',
    epoch INTEGER NOT NULL DEFAULT 0,
    created_s REAL NOT NULL,
    deadline_s REAL NOT NULL,
    ended_s REAL
);
CREATE INDEX IF NOT EXISTS by_rollout ON boxes (rollout_id);
CREATE INDEX IF NOT EXISTS by_end ON boxes (ended_s);
"""
COLUMNS = "box_id, rollout_id, substrate, labels, state, cause, epoch, created_s, deadline_s, ended_s"


class EdgeBusy(SandboxError):
    """The host has no room for another box, now or within the time one may wait for it."""


@runtime_checkable
class Pausable(Protocol):
    """A box that can be frozen and thawed."""

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one edge takes on, and how long it keeps what nobody asks for."""

    max_boxes: int = 64
    max_waiting: int = 256
    """Creations that wait for room; more are refused at once."""
    wait_s: float = 60.0
    lease_s: float = 30.0
    ttl_idle_s: float = 900.0
    ttl_max_s: float = 4 * 3600.0
    max_warm: int = 8
    """Boxes of one kind that wait started, at most; 0 starts none ahead."""
    keep_logs_s: float = 7 * DAY_S
    """How long a box that is gone can still be asked what it did."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0 or (value == 0 and name not in ("max_waiting", "max_warm")):
                raise ValueError(f"Limits.{name} = {value!r}: expected a number > 0 (max_waiting, max_warm: >= 0)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """What a client needs to speak about a box it has made or attached to."""

    box_id: str
    epoch: int
    lease_s: float
    num_recorded: int
    """Operations that the log already holds, which the client's first calls must repeat."""
    spec: SandboxSpec
    """What the box was made from, without files."""
    substrate: str


class LiveBox:
    """A box as the edge keeps it."""

    def __init__(
        self, box_id: str, kind: Substrate, recorder: Recorder, keeper: asyncio.Task[None], closing: asyncio.Event
    ) -> None:
        self.box_id = box_id
        self.kind = kind
        self.recorder = recorder
        self.ttl_idle_s = self.removed_at = self.used_at = self.beat_at = self.heard_at = 0.0
        self.attended = True
        self.paused = self.beating = False
        self.changing = asyncio.Lock()
        """Held while it is paused or resumed."""
        self.num_arriving = 0
        """Calls that wait for that, in order; a later one waits behind them."""
        self.closing = closing
        self.keeper = keeper

    @property
    def is_frozen(self) -> bool:
        """Paused by the edge, or by its client: a box that is asked anything wakes."""
        return self.paused or getattr(self.recorder.box, "paused", False)


class Edge:
    """All boxes of one host. Made by ``serve_boxes``, which also ends it."""

    def __init__(
        self,
        folder: Path,
        substrates: Sequence[Substrate],
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        crash_at: CrashAt = never,
    ) -> None:
        self.folder = folder
        self.substrates = {substrate.name: substrate for substrate in substrates}
        self.limits = limits
        self._clock = clock
        self._warm = WarmBoxes(limits.max_warm, clock=clock)
        self._crash_at = crash_at
        self._live: dict[str, LiveBox] = {}
        self._past: dict[str, Recorder] = {}
        """The logs of boxes that are gone, the latest of them."""
        self._opening: dict[str, asyncio.Task[None]] = {}
        self._keepers: set[asyncio.Task[None]] = set()
        self._beats: set[asyncio.Task[None]] = set()
        self._room = asyncio.Semaphore(limits.max_boxes)
        self._num_waiting = 0
        self._lock_fd = _lock(folder)
        try:
            self._db = sqlite3.connect(folder / "state.db", isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(SCHEMA)
            self._reconcile()
        except BaseException:
            os.close(self._lock_fd)
            raise

    async def create(
        self,
        rollout_id: str,
        spec: SandboxSpec,
        *,
        token: str,
        box_id: str | None = None,
        substrate: str | None = None,
        labels: Mapping[str, str] | None = None,
        ttl_idle_s: float | None = None,
        ttl_max_s: float | None = None,
    ) -> Hold:
        """A fresh box for a rollout, of the edge's first substrate unless another is named.

        Asking again with the same ``token`` gives the same box, or ``SandboxLost`` when it never came to be. Raises
        ``EdgeBusy``, ``ValueError`` when the rollout has a box (attach to it), a lifetime is above the edge's limit or
        there is no such substrate, and what the substrate raises.
        """
        row = self._newest(rollout_id)
        if row and row["state"] not in GONE and row["token"] != token:
            raise ValueError(
                f"rollout {rollout_id!r} has box {row['box_id']} already ({row['state']}); attach to it or close it"
            )
        if row and row["token"] == token:
            box_id = str(row["box_id"])
            if row["state"] in GONE and not row["epoch"]:
                # Nobody has had it. One that was handed out still answers from its log.
                raise SandboxLost(f"box {box_id} is gone: {row['cause']}; create another")
        else:
            kind = self._substrate(substrate)
            idle_s = self._lifetime("ttl_idle_s", ttl_idle_s)
            max_s = self._lifetime("ttl_max_s", ttl_max_s)
            box_id = box_id or uuid.uuid4().hex[:16]
            self._db.execute(
                "INSERT INTO boxes (box_id, rollout_id, token, substrate, labels, state, created_s, deadline_s) "
                "VALUES (?, ?, ?, ?, ?, 'opening', ?, ?)",
                (box_id, rollout_id, token, kind.name, json.dumps(labels or {}), time.time(), time.time() + max_s),
            )
            opening = self._open(box_id, rollout_id, kind, spec, ttl_idle_s=idle_s, ttl_max_s=max_s)
            self._opening[box_id] = asyncio.create_task(opening)
            self._opening[box_id].add_done_callback(lambda done: done.cancelled() or done.exception())
        if box_id in self._opening:
            # Shielded: the creation of a client that died meanwhile goes on, for the one that attaches.
            await asyncio.shield(self._opening[box_id])
        return await self.attach(rollout_id)

    async def attach(self, rollout_id: str) -> Hold:
        """Take over a rollout's newest box, even one that is gone: its log still answers.

        Whoever held it before is fenced off. Raises ``KeyError`` when the rollout never had one.
        """
        row = self._newest(rollout_id)
        if row is None:
            raise KeyError(f"rollout {rollout_id!r} has no box on this edge; create one")
        box_id = str(row["box_id"])
        if box_id in self._opening and not self._opening[box_id].done():
            await asyncio.shield(self._opening[box_id])
        epoch = self._epoch(box_id) + 1
        self._db.execute("UPDATE boxes SET epoch = ? WHERE box_id = ?", (epoch, box_id))
        recorder = self._recorder(box_id)
        if box_id in self._live:
            self._live[box_id].used_at = self._clock()
            await self._attend(self._live[box_id])
        return Hold(
            box_id=box_id,
            epoch=epoch,
            lease_s=self.limits.lease_s,
            num_recorded=len(recorder.log.operations),
            spec=replace(spec_of(recorder.log), files={}),
            substrate=row["substrate"],
        )

    async def begin(
        self, box_id: str, epoch: int, position: int, request: Request, *, idempotent: bool = False
    ) -> tuple[Recorder, Operation]:
        """Take a client's ``position``-th call on a box; ``outcome`` of the first gives what the second comes to.

        Raises ``Fenced``, ``Diverged`` and ``SandboxLost``, in which case nothing has happened.
        """
        await self.renew(box_id, epoch)
        recorder = self._recorder(box_id)
        op_id = f"{epoch}.{position}"
        return recorder, recorder.begin(position, request, op_id=op_id, idempotent=idempotent)

    async def call(self, box_id: str, epoch: int, position: int, request: Request, *, idempotent: bool = False) -> Any:
        """What a client's ``position``-th call gives: run once, however often it is asked for."""
        recorder, operation = await self.begin(box_id, epoch, position, request, idempotent=idempotent)
        return await self.outcome(recorder, operation)

    async def outcome(self, recorder: Recorder, operation: Operation) -> Any:
        """What an operation comes to."""
        try:
            return await recorder.outcome(operation)
        finally:
            box = self._live.get(recorder.log.folder.name)
            if box:
                box.used_at = self._clock()
                if recorder.log.ended:
                    self._forget(box, "lost", recorder.log.ended.data["cause"])
            self._crash_at("reply", operation.kind)

    async def renew(self, box_id: str, epoch: int) -> None:
        """Say that the client is alive. Raises ``Fenced`` when it does not hold the box any more."""
        current = self._epoch(box_id)
        if epoch != current:
            raise Fenced(f"box {box_id}", epoch, current)
        if box_id in self._live:
            await self._attend(self._live[box_id])

    async def close(self, box_id: str, epoch: int, cause: str = "closed by its client") -> None:
        """Kill and remove a box. Its log stays. Nothing happens when it is gone already."""
        current = self._epoch(box_id)
        if epoch != current:
            raise Fenced(f"box {box_id}", epoch, current)
        await self.remove(box_id, cause)

    async def remove(self, box_id: str, cause: str) -> None:
        """Close a box, whoever holds it. Nothing happens when it is gone already."""
        if box_id in self._live:
            box = self._live[box_id]
            self._remove(box, cause)
            await asyncio.wait({box.keeper})

    def census(self, also: Collection[str] = ()) -> list[dict[str, Any]]:
        """What ``list`` says of the boxes that are not gone, and of those named."""
        query = f"SELECT {COLUMNS} FROM boxes WHERE ended_s IS NULL OR box_id IN (SELECT value FROM json_each(?))"
        return [_described(row) for row in self._db.execute(query, (json.dumps(list(also)),))]

    @property
    def num_attended(self) -> int:
        """Boxes that a client holds or waits for."""
        return len(self._opening) + sum(box.attended for box in self._live.values())

    def list(self) -> list[dict[str, Any]]:
        """Every box whose log is kept, oldest first: ids, labels, state, cause, times in seconds since 1970."""
        return [_described(row) for row in self._db.execute(f"SELECT {COLUMNS} FROM boxes ORDER BY rowid")]

    async def sweep(self) -> None:
        """Look after every box once: end what is too old or idle, pause what nobody attends, find what is dead."""
        now = self._clock()
        lease_s = self.limits.lease_s
        for box in list(self._live.values()):
            busy = box.recorder.num_running > 0
            if busy:
                box.used_at = now
            if now >= box.removed_at:
                self._remove(box, "ttl_max_s is over")
            elif box.attended and not busy and not box.beating and now - box.heard_at >= lease_s:
                await self._leave(box)
            elif box.attended and box.heard_at - box.used_at >= box.ttl_idle_s:
                # Counted to when the client was last heard of: one that died is preempted, not idle.
                self._remove(box, "idle for ttl_idle_s")
            elif not (box.is_frozen or busy or box.beating) and now - box.beat_at >= HEARTBEAT_S:
                box.beat_at, box.beating = now, True
                beat = asyncio.create_task(self._beat(box))
                self._beats.add(beat)
                beat.add_done_callback(self._beats.discard)
        await self._warm.resize(self.limits.max_boxes - len(self._keepers))
        self._delete_old_logs()
        cgroups.remove_orphans()

    async def stop(self) -> None:
        """Let go of everything. The boxes cannot outlive the edge, so they are LOST."""
        for task in self._opening.values():
            task.cancel()
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        for box in list(self._live.values()):
            box.recorder.lose("the edge was stopped")
            self._forget(box, "lost", "the edge was stopped")
        # The substrates have deadlines of their own for removing a box.
        await asyncio.gather(*self._keepers, *self._beats, return_exceptions=True)
        await self._warm.close()
        for recorder in self._past.values():
            recorder.log.close()
        self._db.close()
        os.close(self._lock_fd)

    def _reconcile(self) -> None:
        """Boxes that an earlier edge held went with it."""
        cause = "the edge that held it ended"
        for row in self._db.execute("SELECT box_id FROM boxes WHERE ended_s IS NULL").fetchall():
            box_id, reason = str(row["box_id"]), cause
            try:
                with contextlib.closing(TrajectoryLog.open(self.folder / "boxes" / box_id)) as log:
                    Recorder(None, log).lose(cause)
            except (FileNotFoundError, LogDamaged) as error:
                reason = f"{cause}; its log cannot be read: {error}"
            self._set_state(box_id, "lost", reason)
        cgroups.remove_orphans()

    def _delete_old_logs(self) -> None:
        query = "SELECT box_id FROM boxes WHERE ended_s < ?"
        for row in self._db.execute(query, (time.time() - self.limits.keep_logs_s,)).fetchall():
            box_id = str(row["box_id"])
            if box_id in self._past:
                self._past.pop(box_id).log.close()
            shutil.rmtree(self.folder / "boxes" / box_id, ignore_errors=True)
            self._db.execute("DELETE FROM boxes WHERE box_id = ?", (box_id,))

    async def _open(
        self, box_id: str, rollout_id: str, kind: Substrate, spec: SandboxSpec, *, ttl_idle_s: float, ttl_max_s: float
    ) -> None:
        removed_at = self._clock() + ttl_max_s
        try:
            await self._admit()
            box = await self._start(box_id, rollout_id, kind, spec)
        except BaseException as error:
            self._set_state(box_id, "lost", f"could not be opened: {str(error) or type(error).__name__}")
            raise
        finally:
            self._opening.pop(box_id, None)
        box.used_at = box.beat_at = box.heard_at = self._clock()
        box.ttl_idle_s, box.removed_at = ttl_idle_s, removed_at
        self._live[box_id] = box
        self._set_state(box_id, "open")

    async def _start(self, box_id: str, rollout_id: str, kind: Substrate, spec: SandboxSpec) -> LiveBox:
        """A box in the room that was just taken; its keeper gives the room back."""
        opened: asyncio.Future[Sandbox] = asyncio.get_running_loop().create_future()
        closing = asyncio.Event()
        keeper = asyncio.create_task(self._keep(kind, spec, opened, closing))
        self._keepers.add(keeper)
        keeper.add_done_callback(self._keepers.discard)
        try:
            data = creation(kind, spec, rollout_id=rollout_id)
            log = TrajectoryLog.create(self.folder / "boxes" / box_id, data)
            recorder = Recorder(None, log, crash_at=self._crash_at)
            try:
                recorder.box = await opened
            except BaseException as error:
                recorder.lose(f"could not be opened: {str(error) or type(error).__name__}")
                log.close()
                raise
        except BaseException:
            closing.set()
            raise
        return LiveBox(box_id, kind, recorder, keeper, closing)

    async def _admit(self) -> None:
        room = f"{self.limits.max_boxes} boxes are open on this edge"
        if not self._room.locked():
            # Taken at once, so that of many who come together none finds room that another one is about to take.
            await self._room.acquire()
            return
        if self._num_waiting >= self.limits.max_waiting:
            raise EdgeBusy(f"{room} and {self._num_waiting} wait; close some, or raise Limits.max_boxes or max_waiting")
        self._num_waiting += 1
        try:
            await asyncio.wait_for(self._room.acquire(), self.limits.wait_s)
        except TimeoutError as error:
            raise EdgeBusy(
                f"{room} and none was closed within {self.limits.wait_s:.0f} s; close some, or raise Limits.max_boxes"
            ) from error
        finally:
            self._num_waiting -= 1

    async def _keep(
        self, kind: Substrate, spec: SandboxSpec, opened: asyncio.Future[Sandbox], closing: asyncio.Event
    ) -> None:
        """Hold a box open until it is to be closed."""
        try:
            async with self._warm.open(kind, spec) as sandbox:
                if not opened.done():
                    opened.set_result(sandbox)
                    await closing.wait()
        except Exception as error:  # noqa: BLE001 (whatever the substrate raises goes to whoever asked for the box)
            if opened.done():
                sys.stderr.write(f"sandbox.edge: a box could not be removed: {error!r}\n")
            else:
                opened.set_exception(error)
        finally:
            self._room.release()

    async def _attend(self, box: LiveBox) -> None:
        """The client has been heard of: renew its lease, and wake its box."""
        box.heard_at = now = self._clock()
        if box.attended and not box.num_arriving:
            return
        box.num_arriving += 1
        try:
            await self._wake(box, now)
        finally:
            box.num_arriving -= 1

    async def _wake(self, box: LiveBox, now: float) -> None:
        async with box.changing:
            if box.attended or box.box_id not in self._live:
                return
            if box.paused and isinstance(box.recorder.box, Pausable):
                if not await self._changes(box, box.recorder.box.resume()):
                    return
                box.recorder.log.append(RecordKind.RESUME, {})
            box.attended, box.paused, box.used_at = True, False, now
            self._set_state(box.box_id, "open")

    async def _leave(self, box: LiveBox) -> None:
        """The lease has run out: pause the box if that can be done, and keep it."""
        cause = "the client's lease ran out"
        async with box.changing:
            box.attended = False
            if isinstance(box.recorder.box, Pausable) and box.kind.capabilities().get("pause", True):
                if not await self._changes(box, box.recorder.box.pause()):
                    return
                box.paused = True
                box.recorder.log.append(RecordKind.PAUSE, {"cause": cause})
            self._set_state(box.box_id, "paused" if box.paused else "unattended", cause)

    async def _changes(self, box: LiveBox, change: Coroutine[Any, Any, None]) -> bool:
        """Pause or resume. A box that cannot is of no use to anyone: it is LOST, and this is False."""
        try:
            await asyncio.wait_for(change, PAUSE_DEADLINE_S)
        except (SandboxError, TimeoutError) as error:
            cause = f"it could not be paused or resumed: {str(error) or 'no answer'}"
            box.recorder.lose(cause)
            self._forget(box, "lost", cause)
            return False
        return True

    async def _beat(self, box: LiveBox) -> None:
        """Find out whether the agent answers."""
        assert box.recorder.box is not None
        try:
            async with asyncio.timeout(BEAT_DEADLINE_S):
                await box.recorder.box.read(".heartbeat", max_bytes=0)
        except (SandboxLost, TimeoutError) as error:
            cause = str(error) or f"the agent gave no sign of life within {BEAT_DEADLINE_S:.0f} s"
            box.recorder.lose(cause)
            self._forget(box, "lost", cause)
        except (OSError, ValueError):
            # There is no such file, and somebody said so.
            return
        finally:
            box.beating = False

    def _remove(self, box: LiveBox, cause: str) -> None:
        if box.recorder.log.ended is None:
            box.recorder.log.append(RecordKind.CLOSE, {"cause": cause})
        self._forget(box, "closed", cause)

    def _forget(self, box: LiveBox, state: str, cause: str) -> None:
        """Let the keeper kill and remove a box that is over."""
        if self._live.pop(box.box_id, None) is None:
            return
        box.recorder.box = None
        box.closing.set()
        self._keep_past(box.box_id, box.recorder)
        self._set_state(box.box_id, state, cause)

    def _keep_past(self, box_id: str, recorder: Recorder) -> None:
        self._past[box_id] = recorder
        for old in list(self._past)[:-MAX_PAST]:
            if not self._past[old].num_running:
                self._past.pop(old).log.close()

    def _recorder(self, box_id: str) -> Recorder:
        if box_id in self._live:
            return self._live[box_id].recorder
        if box_id not in self._past:
            try:
                log = TrajectoryLog.open(self.folder / "boxes" / box_id)
            except FileNotFoundError as error:
                raise SandboxLost(f"box {box_id} was never made; create another") from error
            self._keep_past(box_id, Recorder(None, log))
        return self._past[box_id]

    def _substrate(self, name: str | None) -> Substrate:
        if name is not None and name not in self.substrates:
            raise ValueError(f"substrate = {name!r}: expected one that this edge serves, {', '.join(self.substrates)}")
        return self.substrates[name] if name else next(iter(self.substrates.values()))

    def _lifetime(self, name: str, wanted: float | None) -> float:
        limit: float = getattr(self.limits, name)
        if wanted is not None and not 0 < wanted <= limit:
            raise ValueError(f"{name} = {wanted!r}: expected a time > 0 and at most Limits.{name} = {limit:.0f} s")
        return limit if wanted is None else wanted

    def _newest(self, rollout_id: str) -> sqlite3.Row | None:
        query = "SELECT * FROM boxes WHERE rollout_id = ? ORDER BY rowid DESC LIMIT 1"
        row: sqlite3.Row | None = self._db.execute(query, (rollout_id,)).fetchone()
        return row

    def _epoch(self, box_id: str) -> int:
        row = self._db.execute("SELECT epoch FROM boxes WHERE box_id = ?", (box_id,)).fetchone()
        if row is None:
            raise KeyError(f"box {box_id!r} is not on this edge; attach by rollout id")
        return int(row["epoch"])

    def _set_state(self, box_id: str, state: str, cause: str = "") -> None:
        ended_s = time.time() if state in GONE else None
        values = (state, cause, ended_s, box_id)
        self._db.execute("UPDATE boxes SET state = ?, cause = ?, ended_s = ? WHERE box_id = ?", values)


def _described(row: sqlite3.Row) -> dict[str, Any]:
    return {**dict(row), "labels": json.loads(row["labels"])}


def _lock(folder: Path) -> int:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "boxes").mkdir(mode=0o700, exist_ok=True)
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise SandboxError(f"{folder}: another edge serves this folder; stop it, or give this one a folder") from error
    return fd


@contextlib.asynccontextmanager
async def serve_boxes(
    folder: Path,
    substrates: Substrate | Sequence[Substrate],
    limits: Limits | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    crash_at: CrashAt = never,
) -> AsyncIterator[Edge]:
    """A running edge that looks after its boxes; leaving the context ends them all."""
    offered = substrates if isinstance(substrates, Sequence) else (substrates,)
    edge = Edge(folder, offered, limits or Limits(), clock=clock, crash_at=crash_at)
    sweeper = asyncio.create_task(_sweep_forever(edge))
    try:
        yield edge
    finally:
        sweeper.cancel()
        await asyncio.wait({sweeper})
        await edge.stop()


async def _sweep_forever(edge: Edge) -> None:
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            await edge.sweep()
        except (SandboxError, OSError, sqlite3.Error) as error:
            sys.stderr.write(f"sandbox.edge: {error}\n")


if __name__ == "__main__":
    from sandbox.edge_server import main

    sys.exit(main())
