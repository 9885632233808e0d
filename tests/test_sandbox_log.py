from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from posttrain.errors import SandboxError
from sandbox.log import INLINE_BYTES, Blob, Fenced, LogDamaged, RecordKind, TrajectoryLog, decode, encode

REQUEST = {"kind": "exec", "idempotent": False, "request": {"command": "true", "stdin": b"\0\xff"}}


def write_log(folder: Path, num_operations: int = 3) -> TrajectoryLog:
    log = TrajectoryLog.create(folder, {"spec": {"image": "default"}})
    for number in range(num_operations):
        intent = log.append(RecordKind.INTENT, {"op_id": f"op-{number}", **REQUEST})
        log.append(RecordKind.RESULT, {"intent": intent.seq, "stdout": b"x" * 10})
    return log


def records_in(folder: Path) -> bytes:
    """What is written, without the reserve behind it."""
    return (folder / "records").read_bytes().rstrip(b"\0")


def test_what_was_appended_is_read_back_after_opening_again(tmp_path: Path) -> None:
    write_log(tmp_path).close()
    log = TrajectoryLog.open(tmp_path)
    assert [(op.seq, op.op_id, op.result) for op in log.operations] == [(1, "op-0", 2), (3, "op-1", 4), (5, "op-2", 6)]
    assert log.record(0).data == {"spec": {"image": "default"}}
    assert log.record(1).data["request"] == REQUEST["request"]
    assert log.append(RecordKind.CLOSE, {"cause": "test"}).seq == 7
    assert TrajectoryLog.read(tmp_path).ended == log.record(7)


@pytest.mark.parametrize("tail", [b"\0" * 40, b"0", b'12345678 {"seq":7', None], ids=["zeros", "byte", "start", "most"])
def test_a_torn_tail_is_cut_off_and_the_next_record_takes_its_place(tmp_path: Path, tail: bytes | None) -> None:
    write_log(tmp_path).close()
    records = tmp_path / "records"
    whole = records.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    records.write_bytes(whole + tail if tail is not None else whole[:-1])
    log = TrajectoryLog.open(tmp_path)
    assert records.read_bytes() == (whole if tail is not None else whole.removesuffix(last))
    assert log.append(RecordKind.PAUSE, {}).seq == (7 if tail is not None else 6)
    assert len(TrajectoryLog.read(tmp_path)) == len(log)


@pytest.mark.parametrize("reserve", [0, 100])
@pytest.mark.parametrize("lost", ["end", "beginning"])
def test_a_tail_can_be_torn_at_any_byte(tmp_path: Path, reserve: int, lost: str) -> None:
    write_log(tmp_path, 1).close()
    records = tmp_path / "records"
    whole = records.read_bytes()
    start = len(whole) - len(whole.splitlines(keepends=True)[-1])
    for size in range(start + (lost == "beginning"), len(whole), 1 if reserve else 7):
        torn = whole[:size] if lost == "end" else whole[:start] + bytes(size - start) + whole[size:]
        records.write_bytes(torn + bytes(reserve))
        log = TrajectoryLog.open(tmp_path)
        assert (len(log), log.operations[0].result) == (2, None), size
        log.close()


def flip(lines: list[bytes]) -> None:
    lines[2] = lines[2].replace(b"intent", b"indent", 1)


def drop(lines: list[bytes]) -> None:
    del lines[2]


def forge(lines: list[bytes]) -> None:
    """A record with a right CRC, as an editor who knows the format would write it."""
    import zlib

    fields = json.loads(lines[2].partition(b" ")[2])
    fields["data"]["stdout"] = encode(b"forged")
    text = json.dumps(fields, separators=(",", ":")).encode()
    lines[2] = b"%08x %s\n" % (zlib.crc32(text), text)


def flip_last(lines: list[bytes]) -> None:
    lines[-1] = lines[-1].replace(b"result", b"resolt")


def zero(lines: list[bytes]) -> None:
    lines[2] = bytes(len(lines[2]) - 1) + b"\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "record 2 at byte .*CRC"),
        (drop, "record 2 at byte .*seq = 3, expected 2"),
        (forge, "record 3 at byte .*prev = .*a record before it changed"),
        (flip_last, "record 6 at byte .*CRC"),
        (zero, "record 2 at byte .*CRC"),
    ],
)
def test_damage_is_an_error_that_says_where(
    tmp_path: Path, damage: Callable[[list[bytes]], None], message: str
) -> None:
    write_log(tmp_path).close()
    lines = (tmp_path / "records").read_bytes().splitlines(keepends=True)
    damage(lines)
    (tmp_path / "records").write_bytes(b"".join(lines))
    with pytest.raises(LogDamaged, match=message):
        TrajectoryLog.open(tmp_path)
    assert (tmp_path / "records").read_bytes() == b"".join(lines), "a damaged log is left as it is"


def test_a_log_without_its_first_record_was_never_begun(tmp_path: Path) -> None:
    write_log(tmp_path, 0).close()
    (tmp_path / "records").write_bytes(b"")
    with pytest.raises(LogDamaged, match="no CREATE record"):
        TrajectoryLog.open(tmp_path)
    with pytest.raises(FileExistsError):
        TrajectoryLog.create(tmp_path, {})


def test_large_payloads_lie_beside_the_log_once_each(tmp_path: Path) -> None:
    log = write_log(tmp_path, 0)
    large, small = b"a" * (INLINE_BYTES + 1), b"b" * INLINE_BYTES
    for _ in range(2):
        log.append(RecordKind.SNAPSHOT, {"large": large, "small": small})
    (blob,) = (tmp_path / "blobs").iterdir()
    data = TrajectoryLog.read(tmp_path).record(2).data
    assert data == {"large": Blob(blob.name, len(large)), "small": small}
    assert log.resolve(data) == {"large": large, "small": small}
    blob.write_bytes(b"a" * INLINE_BYTES + b"z")
    with pytest.raises(LogDamaged, match="not those it is named for"):
        log.resolve(data)
    blob.unlink()
    with pytest.raises(LogDamaged, match="the file is gone"):
        log.resolve(data)


def test_payloads_of_records_that_were_never_written_are_deleted(tmp_path: Path) -> None:
    log = write_log(tmp_path, 0)
    for byte in (b"a", b"b"):
        log.append(RecordKind.SNAPSHOT, {"nested": [{"large": byte * (INLINE_BYTES + 1)}]})
    (tmp_path / "blobs" / ".tmp-left").write_bytes(b"half")
    log.close()
    with (tmp_path / "records").open("rb+") as file:
        file.truncate((tmp_path / "records").stat().st_size - 1)
    (kept,) = TrajectoryLog.open(tmp_path).record(1).data["nested"]
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [kept["large"].digest]


@pytest.mark.parametrize(
    "value", [b"", {"$bytes": "no"}, {"a": [b"x", None, 1.5, {"$blob": b"y"}]}, "\udcff", {"bytes": "x"}]
)
def test_any_value_survives_the_encoding(value: object) -> None:
    assert decode(json.loads(json.dumps(encode(value)))) == value


def test_whoever_opened_the_log_last_is_the_only_one_who_writes(tmp_path: Path) -> None:
    zombie = write_log(tmp_path, 1)
    owner = TrajectoryLog.open(tmp_path)
    assert (zombie.epoch, owner.epoch) == (1, 2)
    with pytest.raises(Fenced, match="epoch 1 is stale, epoch 2 holds it now"):
        zombie.append(RecordKind.PAUSE, {})
    assert owner.append(RecordKind.PAUSE, {}).epoch == 2
    for stale in (0, 1, 2):
        with pytest.raises(Fenced, match=f"epoch {stale} is stale"):
            TrajectoryLog.open(tmp_path, epoch=stale)
    assert TrajectoryLog.open(tmp_path, epoch=9).append(RecordKind.RESUME, {}).seq == 4
    with pytest.raises(SandboxError, match="opened to be read"):
        TrajectoryLog.read(tmp_path).append(RecordKind.PAUSE, {})


def test_a_full_disk_adds_nothing_and_is_not_the_payloads_fault(tmp_path: Path) -> None:
    log = write_log(tmp_path, 1)
    before = records_in(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(SandboxError, match="record 3 could not be written"):
            log.append(RecordKind.PAUSE, {"cause": "c" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert records_in(tmp_path) == before
    assert log.append(RecordKind.PAUSE, {"cause": "room again"}).seq == 3
    assert len(TrajectoryLog.read(tmp_path)) == 4


def test_a_record_that_did_not_reach_the_disk_is_not_reported_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_log(tmp_path, 1)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(SandboxError, match="record 3 could not be written"):
            log.append(RecordKind.PAUSE, {})
    with pytest.raises(SandboxError, match=r"the disk failed .* open the log again"):
        log.append(RecordKind.PAUSE, {})
    assert TrajectoryLog.open(tmp_path).append(RecordKind.RESUME, {}).seq in (3, 4)


def test_records_of_a_killed_writer_are_all_there(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from sandbox.log import RecordKind, TrajectoryLog
log = TrajectoryLog.create(Path({str(tmp_path)!r}), {{}})
for number in range(20):
    log.append(RecordKind.PAUSE, {{"number": number}}, sync=number % 2 == 0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == -9
    log = TrajectoryLog.open(tmp_path)
    assert [log.record(seq).data["number"] for seq in range(1, 21)] == list(range(20))
