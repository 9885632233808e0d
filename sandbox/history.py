"""What an edge's folder, or any folder of trajectory logs, holds: for people to look at. Nothing is changed."""

from __future__ import annotations

import base64
import contextlib
import shlex
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from sandbox.log import Blob, LogDamaged, Operation, Record, RecordKind, TrajectoryLog


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedBox:
    """One box, open or gone, whose log is in ``folder``."""

    box_id: str
    rollout_id: str
    state: str
    cause: str
    created_s: float
    """Seconds since 1970."""
    folder: Path


def boxes(folder: Path) -> list[LoggedBox]:
    """Those of an edge's folder, of a folder of logs, or the one of a log's folder, oldest first. ``RecipeError``."""
    if (folder / "state.db").exists():
        return list(_boxes_of_edge(folder))
    logs = [folder] if (folder / "records").exists() else [path.parent for path in folder.glob("*/records")]
    if not logs:
        raise RecipeError(f"--dir = {folder}: expected the --dir of an edge, a folder of logs or the folder of a log")
    return sorted(map(_box_of_log, logs), key=lambda box: box.created_s)


def find(folder: Path, name: str | None) -> LoggedBox:
    """The newest box with this id, the beginning of this id, or this rollout. ``RecipeError`` when it is not there."""
    found = boxes(folder)
    if name is None and len(found) == 1:
        return found[0]
    matching = [box for box in found if name and (box.rollout_id == name or box.box_id.startswith(name))]
    if not matching:
        what = f"no box or rollout {name!r}" if name else f"{len(found)} boxes; name one"
        raise RecipeError(f"{folder}: {what}; posttrain sandbox ps --dir {shlex.quote(str(folder))} lists them")
    return matching[-1]


def _boxes_of_edge(folder: Path) -> Iterator[LoggedBox]:
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'state.db'}?mode=ro", uri=True)) as database:
        rows = database.execute(
            "SELECT box_id, rollout_id, state, cause, created_s FROM boxes ORDER BY rowid"
        ).fetchall()
    for box_id, rollout_id, state, cause, created_s in rows:
        yield LoggedBox(
            box_id=box_id,
            rollout_id=rollout_id,
            state=state,
            cause=cause,
            created_s=created_s,
            folder=folder / "boxes" / box_id,
        )


def _box_of_log(folder: Path) -> LoggedBox:
    with contextlib.closing(TrajectoryLog.read(folder)) as log:
        first, ended = log.record(0), log.ended
    return LoggedBox(
        box_id=folder.absolute().name,
        rollout_id=first.data.get("rollout_id", ""),
        state={RecordKind.CLOSE: "closed", RecordKind.LOST: "lost"}[ended.kind] if ended else "recorded",
        cause=ended.data["cause"] if ended else "",
        created_s=first.time_s,
        folder=folder,
    )


def list_rows(folder: Path) -> Iterator[Sequence[str]]:
    """A table of the boxes: its heading, then a row for each."""
    yield "box", "rollout", "state", "substrate", "calls", "unknown", "age", "cause"
    for box in boxes(folder):
        try:
            with contextlib.closing(TrajectoryLog.read(box.folder)) as log:
                substrate = log.record(0).data["substrate"]
                unknown = sum(operation.result is None for operation in log.operations)
                counts = (str(len(log.operations)), str(unknown))
        except FileNotFoundError:
            substrate, counts = "?", ("no log", "?")
        except LogDamaged:
            substrate, counts = "?", ("damaged", "?")
        age = _duration(time.time() - box.created_s)
        yield box.box_id, box.rollout_id or "-", box.state, substrate, *counts, age, box.cause


def heading(box: LoggedBox, log: TrajectoryLog) -> str:
    """What box a log is about."""
    data = log.record(0).data
    spec = data["spec"]
    state = f"{box.state} ({box.cause})" if box.cause else box.state
    limits = f"{spec['cpus']:g} CPUs, {spec['memory_mb']} MB memory, {spec['disk_mb']} MB disk"
    forked = f", forked from {data['forked_from'][0]} at {data['forked_from'][1]}" if "forked_from" in data else ""
    return (
        f"box {box.box_id}, rollout {box.rollout_id or '-'}: {state}\n"
        f"{data['substrate']}, image {data['image'] or '-'}, {limits}{forked}"
    )


def log_rows(log: TrajectoryLog) -> Iterator[tuple[Sequence[str], Operation | None]]:
    """A table of what happened after CREATE: its heading, then a row for each call, with it, and each other record."""
    yield ("seq", "time", "kind", "request", "outcome", "took", "out", "err"), None
    by_seq = {operation.seq: operation for operation in log.operations}
    for seq in range(1, len(log)):
        record = log.record(seq)
        if record.kind is RecordKind.INTENT:
            yield _call_row(log, record, by_seq[seq]), by_seq[seq]
        elif record.kind is not RecordKind.RESULT:
            about = ", ".join(f"{key} {value}" for key, value in record.data.items())
            yield (str(seq), _clock(record), record.kind.value, about, "", "", "", ""), None


def _call_row(log: TrajectoryLog, intent: Record, operation: Operation) -> Sequence[str]:
    start = (str(operation.seq), _clock(intent), operation.kind, _request(intent.data["request"]))
    if operation.result is None:
        return (*start, "unknown: no result", "", "", "")
    result = log.record(operation.result)
    outcome = result.data["outcome"]
    took = f"{result.time_s - intent.time_s:.3f} s"
    if "exec" in outcome:
        took = f"{outcome['exec']['wall_s']:.3f} s"
    streams = _streams(outcome)
    return (*start, _comes_to(outcome), took, _size(streams.get("out")), _size(streams.get("err")))


def _comes_to(outcome: Mapping[str, Any]) -> str:
    if "error" in outcome:
        return f"error: {outcome['error']['message']}"
    if "exec" in outcome:
        done = outcome["exec"]
        detail = {"exited": done["exit_code"], "signaled": done["signal"]}.get(done["status"])
        return done["status"] if detail is None else f"{done['status']} {detail}"
    if "snapshot" in outcome:
        return f"ok, {outcome['snapshot']['image']}"
    found = outcome.get("entries", outcome.get("value"))
    return f"ok, files: {len(found)}" if isinstance(found, list | Mapping) else "ok"


def _streams(outcome: Mapping[str, Any]) -> dict[str, bytes | Blob]:
    """What there is of output and content."""
    found = outcome.get("exec", outcome.get("output", {}))
    named = {"out": found.get("stdout", outcome.get("value")), "err": found.get("stderr")}
    return {name: data for name, data in named.items() if isinstance(data, bytes | Blob) and data}


def outputs(log: TrajectoryLog, operation: Operation) -> Iterator[tuple[str, bytes]]:
    """What a call gave, by the name of the stream, as far as there is anything."""
    if operation.result is None:
        return
    outcome = log.record(operation.result).data["outcome"]
    for name, data in _streams(outcome).items():
        yield name, log.content(data)
    if isinstance(outcome.get("value"), list):
        yield "out", "\n".join(outcome["value"]).encode("utf-8", "surrogateescape")


def as_json(log: TrajectoryLog, seq: int) -> dict[str, Any]:
    """A record in what JSON knows; bytes that are text as text, others as ``{"base64": ...}``."""
    record = log.record(seq)
    data = _plain(log.resolve(record.data))
    return {"seq": seq, "kind": record.kind, "epoch": record.epoch, "time_s": record.time_s, "data": data}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _request(request: Mapping[str, Any]) -> str:
    """Its first argument, which says most, and how much it brought along."""
    first = next((request[name] for name in ("command", "path", "source") if name in request), "")
    text = shlex.join(first) if isinstance(first, list) else str(first)
    brought = next((request[name] for name in ("stdin", "data") if request.get(name)), None)
    parts = (request.get("handle"), text, f"< {_size(brought)}" if brought else "")
    return "  ".join(part for part in parts if part)


def _size(data: bytes | Blob | None) -> str:
    size = data.size if isinstance(data, Blob) else len(data) if isinstance(data, bytes) else 0
    if size < 1 << 10:
        return f"{size} B" if size else ""
    return f"{size / (1 << 10):.1f} KiB" if size < 1 << 20 else f"{size / (1 << 20):.1f} MiB"


def _clock(record: Record) -> str:
    return time.strftime("%H:%M:%S", time.localtime(record.time_s))


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
