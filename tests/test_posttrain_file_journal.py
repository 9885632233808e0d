"""The token journal on disk: kills at any point, torn tails, damage, several writers, and a model to compare with."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from posttrain.engine import segment_writer
from posttrain.engine.file_journal import FileJournal
from posttrain.engine.journal import Progress
from posttrain.types import FinishReason, Request, Sampling

PROMPT = np.arange(5, dtype=np.int32)


def request(id_: str, *, prompt: Sequence[int] = PROMPT, seed: int = 0, **sampling: float) -> Request:
    return Request(id=id_, prompt_ids=np.asarray(prompt, np.int32), sampling=Sampling(**sampling), seed=seed)


def grow(row: Progress, tokens: int = 1, *, version: int = 0, kept: bool = False) -> None:
    """Add tokens that follow from id and position alone."""
    for position in range(len(row.token_ids), len(row.token_ids) + tokens):
        row.token_ids.append(token(row.request.id, position))
        row.logprobs.append(-0.25 * position)
        row.versions.append(version)
        row.kept.append(np.arange(position, dtype=np.int32) if kept else None)


def token(id_: str, position: int) -> int:
    return sum(id_.encode()) * 1000 + position


def plain(row: Progress) -> tuple[object, ...]:
    kept = [None if ids is None else ids.tolist() for ids in row.kept]
    return row.token_ids, row.logprobs, row.versions, kept, row.finish


def reopened(folder: Path, id_: str, **differs: float) -> Progress:
    journal = FileJournal(folder, writer="reader")
    try:
        return journal.begin(request(id_, **differs))
    finally:
        journal.close()


def durable(journal: FileJournal, *, rounds: int = 1) -> None:
    """Wait until the disk has everything; each round also lets callbacks add callbacks."""
    for _ in range(rounds):
        reached = threading.Event()
        journal.when_durable(reached.set)
        assert reached.wait(20)


def segments(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tokens"))


def in_child(work: Callable[[], None]) -> int:
    """Start ``work`` in a process of its own; the caller waits for it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def test_a_request_goes_on_where_another_process_left_it(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path, writer="a")
    rows = [journal.begin(request(f"g/{i}")) for i in range(3)]
    assert journal.begin(request("g/1")) is rows[1]
    for row, count in zip(rows, (1, 4, 2), strict=True):
        grow(row, count, version=count, kept=row is rows[1])
    journal.append(rows)
    assert [row.recorded for row in rows] == [1, 4, 2]
    grow(rows[0], 2, version=9)
    rows[0].finish, rows[2].finish = FinishReason.STOP, FinishReason.LENGTH
    journal.append(rows)
    expected = [plain(row) for row in rows]
    journal.close()

    for life in range(2):
        journal = FileJournal(tmp_path, writer="b")
        again = [journal.begin(request(f"g/{i}")) for i in range(3)]
        assert [plain(row) for row in again] == expected
        assert journal.duplicates == journal.torn_bytes == 0
        if life == 0:
            grow(again[1], 3, version=4)
            again[1].finish = FinishReason.STOP
            journal.append(again)
            expected = [plain(row) for row in again]
        journal.close()


@pytest.mark.parametrize(
    "other",
    [
        request("g/0", prompt=[1]),
        request("g/0", seed=1),
        request("g/0", temperature=0.5),
        request("g/0", max_tokens=9),
    ],
)
def test_the_same_id_with_another_prompt_sampling_or_seed_starts_empty(tmp_path: Path, other: Request) -> None:
    journal = FileJournal(tmp_path, writer="a")
    row = journal.begin(request("g/0"))
    grow(row)
    journal.append([row])
    started = journal.begin(other)
    assert started.token_ids == []
    grow(started, 2)
    journal.append([started])
    journal.close()
    assert len(reopened(tmp_path, "g/0").token_ids) == 1


def test_rows_that_do_not_fit_are_refused_and_nothing_of_the_group_is_recorded(tmp_path: Path) -> None:
    journal, other = FileJournal(tmp_path / "1", writer="a"), FileJournal(tmp_path / "2", writer="a")
    row, foreign = journal.begin(request("g/0")), other.begin(request("g/0"))
    grow(row, 2)
    grow(foreign)
    with pytest.raises(ValueError, match=r"slot 0 is not of this journal"):
        journal.append([row, foreign])
    row.logprobs.pop()
    with pytest.raises(ValueError, match=r"'g/0': 2 tokens, 2 versions, 1 log-probabilities, 2 kept sets"):
        journal.append([row])
    row.logprobs.append(0.0)
    journal.append([row])
    del row.token_ids[1:], row.logprobs[1:], row.versions[1:], row.kept[1:]
    with pytest.raises(ValueError, match=r"1 tokens.* 2 recorded before.*none taken back"):
        journal.append([row])
    journal.close()
    other.close()
    assert len(reopened(tmp_path / "1", "g/0").token_ids) == 2


def test_a_row_twice_in_a_group_is_recorded_once(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path, writer="a")
    row = journal.begin(request("g/0"))
    grow(row)
    journal.append([row, row])
    journal.append([])
    journal.append([row])
    journal.close()
    journal = FileJournal(tmp_path, writer="a")
    assert journal.begin(request("g/0")).token_ids == [token("g/0", 0)]
    assert journal.duplicates == 0
    journal.close()


def test_names_and_sizes_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"writer = 'a/b': expected letters"):
        FileJournal(tmp_path, writer="a/b")
    with pytest.raises(ValueError, match=r"segment_bytes = 0: expected at least 1"):
        FileJournal(tmp_path, writer="a", segment_bytes=0)
    (tmp_path / "notes.tokens").write_text("")
    with pytest.raises(ValueError, match=r"notes\.tokens: expected a name such as"):
        FileJournal(tmp_path, writer="a")


# Several writers.


def test_a_writer_name_is_taken_while_its_process_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writer, "_LOCK_PATIENCE_S", 0.05)
    journal = FileJournal(tmp_path, writer="a")
    with pytest.raises(RuntimeError, match=r"open for writer 'a' already"):
        FileJournal(tmp_path, writer="a")
    FileJournal(tmp_path, writer="b").close()
    journal.close()
    FileJournal(tmp_path, writer="a").close()


def test_a_request_of_an_engine_that_dies_is_taken_over_without_reopening(tmp_path: Path) -> None:
    survivor = FileJournal(tmp_path, writer="b")

    def work() -> None:
        row = FileJournal(tmp_path, writer="a")
        request_row = row.begin(request("g/0"))
        grow(request_row, 3)
        row.append([request_row])
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(work), 0)
    row = survivor.begin(request("g/0"))
    assert row.token_ids == [token("g/0", i) for i in range(3)]
    grow(row, 2)
    survivor.append([row])
    survivor.close()
    assert len(reopened(tmp_path, "g/0").token_ids) == 5


def test_what_a_living_writer_adds_after_it_was_read_is_there_once_it_is_dead(tmp_path: Path) -> None:
    first = FileJournal(tmp_path, writer="a")
    row = first.begin(request("g/0"))
    grow(row)
    first.append([row])
    second = FileJournal(tmp_path, writer="b")
    grow(row, 2)
    first.append([row])
    first.close()
    assert second.begin(request("g/0")).token_ids == row.token_ids
    second.close()


def test_a_forget_holds_for_what_a_writer_left_that_died_before_it_was_told(tmp_path: Path) -> None:
    survivor, dying = (FileJournal(tmp_path, writer=name, segment_bytes=1) for name in "ba")
    row = dying.begin(request("g/0"))
    grow(row)
    dying.append([row])
    dying.close()
    for prefix in ("g/", "other/", "another/"):
        survivor.forget(prefix)
        durable(survivor, rounds=3)
    assert not (tmp_path / "a-1-1.tokens").exists()
    survivor.close()
    assert reopened(tmp_path, "g/0").token_ids == []


def test_tokens_recorded_twice_are_counted_and_other_ones_refused(tmp_path: Path) -> None:
    first, second = FileJournal(tmp_path, writer="a"), FileJournal(tmp_path, writer="b")
    rows = [journal.begin(request("g/0")) for journal in (first, second)]
    for journal, row, count in zip((first, second), rows, (3, 5), strict=True):
        grow(row, count)
        journal.append([row])
    reader = FileJournal(tmp_path, writer="c")
    assert reader.duplicates == 3
    assert reader.begin(request("g/0")).token_ids == rows[1].token_ids
    reader.close()
    grow(rows[0], 1)
    rows[0].token_ids[-1] = 7
    first.append(rows[:1])
    first.close()
    second.close()
    with pytest.raises(ValueError, match=r"'g/0': tokens .*7.* position 3, in .*a-1-1.*b-1-1.*delete one"):
        FileJournal(tmp_path, writer="c")


# Forgetting.


def test_what_is_forgotten_is_gone_for_good_and_may_be_generated_again(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path, writer="a")
    rows = [journal.begin(request(id_)) for id_ in ("s/1/0", "s/10/0")]
    for row in rows:
        grow(row, 3)
    journal.append(rows)
    journal.forget("s/1/")
    grow(rows[0])
    journal.append(rows)
    again = journal.begin(request("s/1/0"))
    assert again is not rows[0]
    assert again.token_ids == []
    journal.close()
    assert reopened(tmp_path, "s/1/0").token_ids == []
    assert len(reopened(tmp_path, "s/10/0").token_ids) == 3

    journal = FileJournal(tmp_path, writer="a")
    again = journal.begin(request("s/1/0"))
    grow(again, 2)
    journal.append([again])
    journal.close()
    assert len(reopened(tmp_path, "s/1/0").token_ids) == 2


def test_segments_with_nothing_wanted_are_removed_and_sparse_ones_compacted(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path, writer="a", segment_bytes=2000)
    kept = journal.begin(request("keep/0"))
    lost = [journal.begin(request(f"lose/{i}")) for i in range(20)]
    for _ in range(40):
        for row in (kept, *lost):
            grow(row)
        journal.append([kept, *lost])
    assert len(segments(tmp_path)) > 10
    journal.forget("lose/")
    durable(journal, rounds=3)
    assert len(segments(tmp_path)) <= 3
    grow(kept)
    journal.append([kept])
    journal.close()
    journal = FileJournal(tmp_path, writer="a")
    assert journal.duplicates == 0
    assert plain(journal.begin(request("keep/0"))) == plain(kept)
    assert journal.begin(request("lose/3")).token_ids == []
    journal.close()


def test_segments_of_a_living_writer_are_left_alone_and_those_of_a_dead_one_are_not(tmp_path: Path) -> None:
    journals = [FileJournal(tmp_path, writer=name) for name in ("alive", "dead")]
    for journal, id_ in zip(journals, ("s/0", "s/1"), strict=True):
        row = journal.begin(request(id_))
        grow(row)
        journal.append([row])
    journals[1].close()
    cleaner = FileJournal(tmp_path, writer="cleaner")
    cleaner.forget("s/")
    durable(cleaner, rounds=3)
    assert segments(tmp_path) == ["alive-1-1.tokens", "cleaner-1-1.tokens"]
    cleaner.close()
    # The forget is kept for as long as it makes something void.
    for _ in range(3):
        again = FileJournal(tmp_path, writer="cleaner")
        again.forget("other/")
        durable(again, rounds=3)
        assert again.begin(request("s/0")).token_ids == []
        again.close()
    journals[0].close()


# Kills.


@pytest.mark.parametrize("seed", range(10))
def test_nothing_that_append_returned_for_is_lost_or_doubled_by_kills(tmp_path: Path, seed: int) -> None:
    """Ten lives, each killed at a random moment; each goes on where the one before was killed."""
    chance = random.Random(seed)
    acknowledged = [0, 0, 0]
    for _ in range(10):
        reading, writing = os.pipe()
        child = in_child(lambda writing=writing: _append_for_ever(tmp_path, writing))
        os.close(writing)
        started = os.read(reading, 3)
        time.sleep(chance.random() * 0.004)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as pipe:
            told = started + pipe.read()
        for row in told:
            acknowledged[row] += 1
        found = FileJournal(tmp_path, writer="reader")
        for row in range(3):
            ids = found.begin(request(f"g/{row}")).token_ids
            assert ids == [token(f"g/{row}", i) for i in range(len(ids))]
            # A kill between append and the word of it leaves one more; such a life's word is made up for here.
            assert len(ids) - acknowledged[row] in (0, 1)
            acknowledged[row] = len(ids)
        assert found.duplicates == 0
        found.close()
    assert sum(acknowledged) > 100


def _append_for_ever(folder: Path, told: int) -> None:
    journal = FileJournal(folder, writer="a", segment_bytes=1 << 15)
    rows = [journal.begin(request(f"g/{i}")) for i in range(3)]
    while True:
        for row in rows:
            grow(row)
        journal.append(rows)
        os.write(told, bytes(range(3)))


class _Countdown:
    """Kills the process before the system call whose turn it is."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in ("write", "open", "fdatasync", "fsync"):
            return real

        def counted(*args: object, **options: object) -> object:
            self.tick()
            return real(*args, **options)

        return counted

    def tick(self) -> None:
        self._left -= 1
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_between_any_two_system_calls_of_a_compaction_loses_and_doubles_nothing(tmp_path: Path) -> None:
    before = tmp_path / "before"
    journal = FileJournal(before, writer="a", segment_bytes=1500)
    kept = [journal.begin(request(f"keep/{i}")) for i in range(2)]
    lost = [journal.begin(request(f"lose/{i}")) for i in range(12)]
    for step in range(12):
        for row in (*kept, *lost):
            grow(row, kept=step % 3 == 0)
        journal.append([*kept, *lost])
    kept[1].finish = FinishReason.STOP
    journal.append(kept)
    journal.close()
    expected = [plain(row) for row in kept]
    outcomes = set()
    for calls in range(200):
        folder = tmp_path / str(calls)
        shutil.copytree(before, folder)
        child = in_child(lambda calls=calls, folder=folder: _forget_and_die(folder, calls))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = FileJournal(folder, writer="b")
        assert [plain(found.begin(request(f"keep/{i}"))) for i in range(2)] == expected
        assert found.duplicates == 0
        outcomes.add(len(found.begin(request("lose/0")).token_ids))
        found.close()
        shutil.rmtree(folder)
        if code == 0:
            break
    assert code == 0
    assert calls > 10
    assert outcomes == {0, 12}


def _forget_and_die(folder: Path, calls: int) -> None:
    countdown = _Countdown(calls)
    segment_writer.os = countdown  # type: ignore[attr-defined]
    unlink = Path.unlink

    def counted(path: Path, missing_ok: bool = False) -> None:
        countdown.tick()
        unlink(path, missing_ok)

    Path.unlink = counted  # type: ignore[method-assign]
    journal = FileJournal(folder, writer="a", segment_bytes=1500)
    journal.forget("lose/")
    journal.close()
    os._exit(0)


# Tears and damage.


@pytest.fixture
def one_segment(tmp_path: Path) -> tuple[Path, list[int]]:
    """A segment of three records after its BEGIN, and the sizes the file had after each."""
    journal = FileJournal(tmp_path / "j", writer="a")
    row = journal.begin(request("g/0"))
    path, sizes = tmp_path / "j" / "a-1-1.tokens", []
    for count in (1, 2, 3):
        grow(row, count, kept=count == 2)
        journal.append([row])
        sizes.append(path.stat().st_size)
    journal.close()
    return path, sizes


def test_a_tail_torn_at_any_byte_costs_the_last_record_only(one_segment: tuple[Path, list[int]]) -> None:
    path, sizes = one_segment
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        journal = FileJournal(path.parent, writer="a")
        row = journal.begin(request("g/0"))
        expected = [0, 1, 3, 6][sum(size >= edge for edge in sizes)]
        assert row.token_ids == [token("g/0", i) for i in range(expected)]
        last = max((edge for edge in sizes if edge <= size), default=0)
        assert bool(journal.torn_bytes) == (size > last) or last == 0
        grow(row, 6 - expected)
        journal.append([row])
        journal.close()
        assert len(reopened(path.parent, "g/0").token_ids) == 6
        for extra in path.parent.glob("a-2-*.tokens"):
            extra.unlink()


def test_a_flipped_bit_anywhere_is_found(one_segment: tuple[Path, list[int]]) -> None:
    path, sizes = one_segment
    whole = path.read_bytes()
    for offset in range(len(whole)):
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << offset % 8
        path.write_bytes(damaged)
        if offset >= sizes[1]:
            # Nothing whole follows, so it looks like a tear.
            journal = FileJournal(path.parent, writer="b")
            assert len(journal.begin(request("g/0")).token_ids) == 3
            assert journal.torn_bytes == sizes[2] - sizes[1]
            journal.close()
        else:
            with pytest.raises(ValueError, match=r"a-1-1\.tokens, offset \d+: damaged record.*delete the file"):
                FileJournal(path.parent, writer="b")


def test_a_format_of_another_version_is_named(one_segment: tuple[Path, list[int]]) -> None:
    path, _ = one_segment
    path.write_bytes(b"PTTOKENS" + struct.pack("<II", 2, zlib.crc32(b"PTTOKENS" + struct.pack("<I", 2))) + b"new")
    with pytest.raises(ValueError, match=r"format 2; expected 1"):
        FileJournal(path.parent, writer="b")


def test_tokens_behind_a_gap_are_dropped_before_others_take_their_place(tmp_path: Path) -> None:
    """A crash of the machine may lose the end of a segment and keep the next one."""
    journal = FileJournal(tmp_path, writer="a", segment_bytes=1)
    rows = [journal.begin(request(f"g/{i}")) for i in range(2)]
    for step in range(4):
        for row in rows[: 1 if step == 1 else 2]:
            grow(row)
        journal.append(rows)
    journal.close()
    lost = tmp_path / "a-1-2.tokens"
    lost.write_bytes(lost.read_bytes()[:-1])
    for _ in range(2):
        journal = FileJournal(tmp_path, writer="a")
        row, other = (journal.begin(request(f"g/{i}")) for i in range(2))
        assert row.token_ids == [token("g/0", 0)]
        assert other.token_ids == rows[1].token_ids
        assert journal.duplicates == 0
        journal.close()
    journal = FileJournal(tmp_path, writer="a")
    row = journal.begin(request("g/0"))
    grow(row, 4)
    row.token_ids[2:] = [7, 8, 9]
    journal.append([row])
    journal.close()
    assert reopened(tmp_path, "g/0").token_ids == row.token_ids


# The disk.


def test_callbacks_come_from_another_thread_and_many_share_a_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (flushes.append(fd), time.sleep(0.02), real(fd)))
    journal = FileJournal(tmp_path, writer="a")
    row = journal.begin(request("g/0"))
    callers: list[threading.Thread] = []
    for _ in range(50):
        grow(row)
        journal.append([row])
        journal.when_durable(lambda: callers.append(threading.current_thread()))
    journal.close()
    assert len(callers) == 50
    assert threading.current_thread() not in callers
    assert 1 <= len(flushes) < 10
    grow(row)
    with pytest.raises(RuntimeError, match="was closed"):
        journal.append([row])
    with pytest.raises(RuntimeError, match="was closed"):
        journal.when_durable(lambda: None)


def test_a_failed_flush_reaches_those_who_wait_and_those_who_append(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", broken)
    journal = FileJournal(tmp_path, writer="a")
    row = journal.begin(request("g/0"))
    grow(row)
    journal.append([row])
    told, done = [], threading.Event()
    journal.when_durable(lambda: told.append("durable"))
    journal.when_durable(lambda: told.append("durable"), lambda error: (told.append(error), done.set()))
    assert done.wait(20)
    monkeypatch.undo()
    grow(row)
    with pytest.raises(OSError, match=r"failed: Input/output error, with \d+ bytes free.*open the journal again"):
        journal.append([row])
    journal.when_durable(lambda: told.append("durable"))
    journal.close()
    assert [getattr(error, "errno", error) for error in told] == [errno.EIO]


def test_a_full_disk_names_folder_and_bytes_free_and_keeps_what_was_recorded(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the kernel writes a part, then refuses."""
    reading, writing = os.pipe()

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        journal = FileJournal(tmp_path, writer="a")
        row = journal.begin(request("g/0"))
        try:
            while True:
                grow(row, 7)
                journal.append([row])
        except OSError as error:
            os.write(writing, f"{row.recorded} {error}".encode())
        try:
            journal.append([row])
        except OSError:
            journal.close()
            os._exit(0)

    assert os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1]) == 0
    recorded, message = os.read(reading, 4096).decode().split(" ", 1)
    os.close(reading)
    os.close(writing)
    assert str(tmp_path) in message
    assert "bytes free" in message
    assert int(recorded) > 50
    assert len(reopened(tmp_path, "g/0").token_ids) == int(recorded)


# Against a model.


class JournalAgainstModel(RuleBasedStateMachine):
    """Two writers that open, close, append and forget at will, and a dictionary that says what must be there."""

    ids = st.sampled_from([f"s/{step}/{row}" for step in (1, 2) for row in range(3)])
    writers = st.sampled_from(["a", "b"])

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.open: dict[str, FileJournal] = {}
        self.rows: dict[tuple[str, str], Progress] = {}
        self.model: dict[str, tuple[object, ...]] = {}
        self.owner: dict[str, str] = {}
        self.fresh = 0

    @precondition(lambda self: len(self.open) < 2)
    @rule(writer=writers, segment_bytes=st.sampled_from([1, 300, 1500]))
    def open_one(self, writer: str, segment_bytes: int) -> None:
        if writer not in self.open:
            self.open[writer] = FileJournal(self.folder, writer=writer, segment_bytes=segment_bytes)
            assert self.open[writer].duplicates == 0

    @rule(writer=writers)
    def close_one(self, writer: str) -> None:
        if writer in self.open:
            self.open.pop(writer).close()
            self.rows = {key: row for key, row in self.rows.items() if key[0] != writer}
            self.owner = {id_: owner for id_, owner in self.owner.items() if owner != writer}

    @rule(
        writer=writers,
        gains=st.dictionaries(ids, st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=4),
    )
    def append(self, writer: str, gains: dict[str, tuple[int, bool, bool]]) -> None:
        if writer not in self.open:
            return
        rows = []
        for id_, (count, kept, finished) in gains.items():
            if self.owner.setdefault(id_, writer) != writer:
                continue
            row = self.open[writer].begin(request(id_))
            assert plain(row) == self.model.get(id_, ([], [], [], [], None))
            assert self.rows.setdefault((writer, id_), row) is row
            if row.finish is None:
                self.grow(row, count, kept)
                row.finish = FinishReason.LENGTH if finished else None
            rows.append(row)
        self.open[writer].append(rows)
        for row in rows:
            if row.token_ids or row.finish:
                self.model[row.request.id] = tuple(list(x) if isinstance(x, list) else x for x in plain(row))

    def grow(self, row: Progress, count: int, kept: bool) -> None:
        """Tokens that were never seen before, so that none of a forgotten request passes for one of a later."""
        for _ in range(count):
            self.fresh += 1
            row.token_ids.append(self.fresh)
            row.logprobs.append(-float(self.fresh))
            row.versions.append(self.fresh % 5)
            row.kept.append(np.arange(self.fresh % 4, dtype=np.int32) if kept else None)

    @precondition(lambda self: self.open)
    @rule(prefix=st.sampled_from(["s/1/", "s/2/", "s/1/0", "s/"]))
    def forget(self, prefix: str) -> None:
        for journal in self.open.values():
            journal.forget(prefix)
        gone = {id_ for id_ in {*self.model, *self.owner} if id_.startswith(prefix)}
        for id_ in gone:
            self.model.pop(id_, None)
            self.owner.pop(id_, None)
        self.rows = {key: row for key, row in self.rows.items() if key[1] not in gone}

    @precondition(lambda self: self.open)
    @rule()
    def settle(self) -> None:
        for journal in self.open.values():
            durable(journal, rounds=2)

    @invariant()
    def a_reader_finds_what_the_model_says(self) -> None:
        if not hasattr(self, "folder"):
            return
        reader = FileJournal(self.folder, writer="reader")
        for id_ in (f"s/{step}/{row}" for step in (1, 2) for row in range(3)):
            assert plain(reader.begin(request(id_))) == self.model.get(id_, ([], [], [], [], None)), id_
        assert reader.duplicates == 0
        reader.close()

    def teardown(self) -> None:
        for journal in getattr(self, "open", {}).values():
            journal.close()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


TestJournalAgainstModel = JournalAgainstModel.TestCase
# Files go in the background, so a failure is not the same twice, which shrinking needs.
TestJournalAgainstModel.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, phases=[Phase.generate]
)
