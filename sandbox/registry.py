"""What the service knows of its edges and boxes: one SQLite file, which its gateway and its watcher share.

The truth about a box is its edge's; what stands here was true when the edge was last asked. Of an edge that is lost,
this is all there is.
"""

from __future__ import annotations

import json
import math
import random
import sqlite3
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import SandboxError, SandboxUnavailable
from sandbox.edge import Limits

OWNER = "owner"
"""The label every box has."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS edges (
    name TEXT PRIMARY KEY,
    host TEXT NOT NULL,
    node_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('starting', 'up', 'lost')),
    cause TEXT NOT NULL DEFAULT '',
    pid INTEGER NOT NULL DEFAULT 0,
    substrates TEXT NOT NULL DEFAULT '{}'
);
CREATE TABLE IF NOT EXISTS boxes (
    box_id TEXT PRIMARY KEY,
    rollout_id TEXT NOT NULL,
    token TEXT NOT NULL,
    edge TEXT NOT NULL,
    substrate TEXT NOT NULL,
    labels TEXT NOT NULL,
    state TEXT NOT NULL,
    cause TEXT NOT NULL DEFAULT '',
    created_s REAL NOT NULL,
    deadline_s REAL NOT NULL,
    ended_s REAL
);
CREATE INDEX IF NOT EXISTS by_rollout ON boxes (rollout_id);
CREATE INDEX IF NOT EXISTS live ON boxes (edge) WHERE ended_s IS NULL;
CREATE INDEX IF NOT EXISTS by_end ON boxes (ended_s);
"""


class QuotaExceeded(SandboxError):
    """Whoever asks has as many boxes as they may have at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLimits:
    """How much the service takes on, and how soon it gives up what does not answer."""

    edge: Limits = field(default_factory=Limits)
    quotas: Mapping[str, int] = field(default_factory=dict)
    """Boxes at a time: ``{"owner": 20}`` for each value of a label, ``{"job=sweep": 5}`` for one value."""
    max_waiting: int = 256
    """Creations that wait for room anywhere; more are refused at once."""
    wait_s: float = 60.0
    heartbeat_s: float = 1.0
    """How often each edge is asked how it is."""
    edge_deadline_s: float = 10.0
    """An edge that has not answered for this long is lost, with its boxes."""

    def __post_init__(self) -> None:
        for name in ("wait_s", "heartbeat_s", "edge_deadline_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"ServiceLimits.{name} = {getattr(self, name)!r}: expected a time > 0, in seconds")
        for name, limit in {"max_waiting": self.max_waiting, **self.quotas}.items():
            if limit < 0:
                raise ValueError(f"ServiceLimits: {name} = {limit!r}: expected a number of boxes >= 0")


class Registry:
    """The state of one service. Several processes of a host may have it open."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._db = sqlite3.connect(folder / "service.db", isolation_level=None, timeout=30)
        self._db.row_factory = sqlite3.Row
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(SCHEMA)

    def close(self) -> None:
        self._db.close()

    def edges(self) -> list[dict[str, Any]]:
        """Every edge there ever was, with the number of its boxes that are not gone."""
        query = """SELECT edges.*, COUNT(box_id) AS num_boxes FROM edges
            LEFT JOIN boxes ON edge = name AND ended_s IS NULL GROUP BY name ORDER BY edges.rowid"""
        return [_described(row) for row in self._db.execute(query)]

    def edge(self, name: str) -> dict[str, Any]:
        """One edge. ``KeyError`` when there is none of that name."""
        row = self._db.execute("SELECT * FROM edges WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise KeyError(f"edge {name!r} is not one of this service")
        return _described(row)

    def add_edge(self, node_id: str, host: str, *, alive: Collection[str]) -> str:
        """A name for a node's edge: that of a lost one of the same host, where its boxes' logs lie, or a new one."""
        for edge in self.edges():
            is_lost = edge["state"] == "lost" or edge["node_id"] not in alive
            if is_lost and edge["host"] == host:
                self._db.execute("UPDATE edges SET node_id = ? WHERE name = ?", (node_id, edge["name"]))
                return str(edge["name"])
        name = f"e{len(self.edges())}"
        self._db.execute(
            "INSERT INTO edges (name, host, node_id, state) VALUES (?, ?, ?, 'starting')", (name, host, node_id)
        )
        return name

    def edge_starts(self, name: str, cause: str) -> None:
        """The edge's process has ended and another one is being started."""
        self._db.execute("UPDATE edges SET state = 'starting', cause = ? WHERE name = ?", (cause, name))

    def edge_is_up(self, name: str, *, pid: int, substrates: Mapping[str, str]) -> None:
        """The edge has answered. ``substrates`` says why it cannot serve those that it cannot."""
        served = json.dumps(dict(substrates))
        self._db.execute(
            "UPDATE edges SET state = 'up', cause = '', pid = ?, substrates = ? "
            "WHERE name = ? AND (state, pid, substrates) IS NOT ('up', ?, ?)",
            (pid, served, name, pid, served),
        )

    def lose_edge(self, name: str, cause: str) -> None:
        """The edge is gone, and all its boxes with it."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("UPDATE edges SET state = 'lost', cause = ? WHERE name = ?", (cause, name))
            self._db.execute(
                "UPDATE boxes SET state = 'lost', cause = ?, ended_s = ? WHERE edge = ? AND ended_s IS NULL",
                (f"edge {name} is lost: {cause}", time.time(), name),
            )

    def boxes(self) -> list[dict[str, Any]]:
        """Every box whose log is kept, oldest first: ids, edge, labels, state, cause, times in seconds since 1970."""
        columns = "box_id, rollout_id, edge, substrate, labels, state, cause, created_s, deadline_s, ended_s"
        return [_described(row) for row in self._db.execute(f"SELECT {columns} FROM boxes ORDER BY rowid")]

    def box(self, box_id: str) -> dict[str, Any]:
        """One box. ``KeyError`` when it is not known."""
        row = self._db.execute("SELECT * FROM boxes WHERE box_id = ?", (box_id,)).fetchone()
        if row is None:
            raise KeyError(f"box {box_id!r} is not one of this service's")
        return _described(row)

    def newest(self, rollout_id: str) -> dict[str, Any] | None:
        """The latest box of a rollout."""
        query = "SELECT * FROM boxes WHERE rollout_id = ? ORDER BY rowid DESC LIMIT 1"
        row = self._db.execute(query, (rollout_id,)).fetchone()
        return _described(row) if row else None

    def live(self, edge: str) -> list[str]:
        """The boxes of an edge that are not known to be gone."""
        rows = self._db.execute("SELECT box_id FROM boxes WHERE edge = ? AND ended_s IS NULL", (edge,))
        return [str(row["box_id"]) for row in rows]

    def place(
        self,
        rollout_id: str,
        token: str,
        *,
        substrate: str,
        labels: Mapping[str, str],
        deadline_s: float,
        max_boxes: int,
        edge: str | None = None,
    ) -> dict[str, Any] | None:
        """An opening box on an edge with room, or on the one named, which takes that room; None when there is none.

        Raises ``SandboxUnavailable`` when no edge serves the substrate.
        """
        room = {found["name"]: max_boxes - found["num_boxes"] for found in self._serving(substrate)}
        edge = choose({name: room[name] for name in room if edge in (name, None)})
        if edge is None:
            return None
        box_id = f"{edge}-{uuid.uuid4().hex[:16]}"
        self._db.execute(
            "INSERT INTO boxes (box_id, rollout_id, token, edge, substrate, labels, state, created_s, deadline_s) "
            "VALUES (?, ?, ?, ?, ?, ?, 'opening', ?, ?)",
            (box_id, rollout_id, token, edge, substrate, json.dumps(dict(labels)), time.time(), deadline_s),
        )
        return self.newest(rollout_id)

    def check_quotas(self, labels: Mapping[str, str], quotas: Mapping[str, int]) -> None:
        """Raise ``QuotaExceeded`` when one more box with these labels is too many."""
        for quota, limit in quotas.items():
            name, _, value = quota.partition("=")
            if name not in labels or (value and labels[name] != value):
                continue
            query = "SELECT COUNT(*) FROM boxes, json_each(labels) WHERE ended_s IS NULL AND key = ? AND value = ?"
            (num_boxes,) = self._db.execute(query, (name, labels[name])).fetchone()
            if num_boxes >= limit:
                raise QuotaExceeded(
                    f"{name}={labels[name]} has {num_boxes} boxes and quota {quota!r} allows {limit} at a time; "
                    "close some, or raise ServiceLimits.quotas"
                )

    def note(self, edge: str, census: Iterable[Mapping[str, Any]]) -> list[str]:
        """Take over what an edge says of its boxes. Returns those it has and must not have, to be removed there.

        What is gone stays gone: of a box declared lost its client may have been told.
        """
        unwanted = []
        rows = self._db.execute("SELECT box_id, state, cause FROM boxes WHERE edge = ? AND ended_s IS NULL", (edge,))
        known = {row["box_id"]: (row["state"], row["cause"]) for row in rows}
        for box in census:
            if box["box_id"] not in known:
                unwanted += [str(box["box_id"])] if box["ended_s"] is None else []
            elif known[box["box_id"]] != (box["state"], box["cause"]):
                self._db.execute(
                    "UPDATE boxes SET state = ?, cause = ?, deadline_s = ?, ended_s = ? "
                    "WHERE box_id = ? AND ended_s IS NULL",
                    (box["state"], box["cause"], box["deadline_s"], box["ended_s"], box["box_id"]),
                )
        return unwanted

    def lose(self, box_ids: Sequence[str], cause: str, *, created_before_s: float = math.inf) -> None:
        """Boxes are gone, if they were not already."""
        self._db.execute(
            "UPDATE boxes SET state = 'lost', cause = ?, ended_s = ? "
            "WHERE ended_s IS NULL AND created_s < ? AND box_id IN (SELECT value FROM json_each(?))",
            (cause, time.time(), created_before_s, json.dumps(list(box_ids))),
        )

    def forget(self, ended_before_s: float) -> None:
        """Drop what is known of boxes that ended before then."""
        self._db.execute("DELETE FROM boxes WHERE ended_s < ?", (ended_before_s,))

    def _serving(self, substrate: str) -> list[dict[str, Any]]:
        up = [edge for edge in self.edges() if edge["state"] == "up"]
        if not up:
            raise SandboxUnavailable("no edge of this service is up; are there nodes in the Ray cluster?")
        serving = [edge for edge in up if edge["substrates"].get(substrate) == ""]
        if not serving:
            problems = "; ".join(f"{edge['name']}: {_problem(edge, substrate)}" for edge in up)
            raise SandboxUnavailable(f"substrate = {substrate!r}: no edge serves it ({problems})")
        return serving


def choose(room: Mapping[str, int]) -> str | None:
    """The roomier of two edges drawn at random from those with room; None when there are none."""
    free = [name for name in room if room[name] > 0]
    drawn = random.sample(free, min(2, len(free)))
    return max(drawn, key=lambda name: room[name], default=None)


def _problem(edge: Mapping[str, Any], substrate: str) -> str:
    served = edge["substrates"]
    return str(served.get(substrate, f"expected one of {', '.join(name for name in served if not served[name])}"))


def _described(row: sqlite3.Row) -> dict[str, Any]:
    return {name: json.loads(row[name]) if name in ("labels", "substrates") else row[name] for name in row.keys()}  # noqa: SIM118 (a row iterates over its values)
