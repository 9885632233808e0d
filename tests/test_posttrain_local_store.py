"""The store of one machine: exact in every process, freed to the page, gone with its owner."""

from __future__ import annotations

import base64
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rollout.local_store import LocalRef, LocalStore

PAGE = 4096


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalStore]:
    store = LocalStore(tmp_path if request.param == "folder" else None, segment_bytes=1 << 20)
    yield store
    store.close()


def test_arrays_are_read_without_a_copy_and_cannot_be_changed(store: LocalStore) -> None:
    ref = store.put({"a": np.arange(1000)})
    first, second = ref.load()["a"], ref.load()["a"]
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    with pytest.raises(ValueError, match=r"\['b'\] hold Python objects"):
        store.put({"b": np.array(["x", None], dtype=object)})


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 30, 700, 5000, 70_000])), min_size=1, max_size=60))
def test_whatever_is_freed_in_whatever_order_the_rest_stays_and_pages_go_back(steps: list[tuple[int, int]]) -> None:
    store = LocalStore(segment_bytes=1 << 16)
    held: list[tuple[LocalRef, npt.NDArray[Any]]] = []
    for step, (choice, size) in enumerate(steps):
        if choice or not held:
            array = np.full(size, step, np.int32)
            held.append((store.put({"a": array}), array))
        else:
            ref, _ = held.pop(size % len(held))
            ref.free()
            ref.free()
            with pytest.raises(KeyError, match="gone"):
                ref.load()
    for ref, array in held:
        np.testing.assert_array_equal(ref.load()["a"], array)
    # A block may share its first and its last page with its neighbours.
    assert store.num_bytes <= sum(array.nbytes + 2 * PAGE for _, array in held)
    for ref, _ in held:
        ref.free()
    assert store.num_bytes == 0
    store.close()


def test_threads_share_a_store(store: LocalStore) -> None:
    def work(seed: int) -> None:
        for size in range(1, 400, 7):
            array = np.full(size, seed * 1000 + size)
            ref = store.put({"a": array})
            np.testing.assert_array_equal(ref.load()["a"], array)
            ref.free()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert store.num_bytes == 0


READER = """
import base64, pickle, sys
import numpy as np
ref = pickle.loads(base64.b64decode(sys.stdin.readline()))
arrays = ref.load()
print(int(arrays["a"].sum()), flush=True)
try:
    ref.free()
except ValueError as error:
    print(error, flush=True)
sys.stdin.readline()
print(int(arrays["a"].sum()), flush=True)
try:
    ref.load()
except KeyError:
    print("freed", flush=True)
"""


def test_another_process_reads_the_same_memory_and_cannot_free_it(store: LocalStore) -> None:
    ref = store.put({"a": np.arange(10_000)})
    reader = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert reader.stdin is not None
    reader.stdin.write(base64.b64encode(pickle.dumps(ref)).decode() + "\n")
    reader.stdin.flush()
    assert reader.stdout is not None
    assert int(reader.stdout.readline()) == 49_995_000
    assert f"put by process {os.getpid()} can be freed only there" in reader.stdout.readline()
    ref.free()
    rest, _ = reader.communicate("go on\n", timeout=60)
    # Still mapped there, so no crash; all but the edges, which other arrays may share, reads as zeros.
    after, freed = rest.split()
    assert int(after) < 1_000_000
    assert freed == "freed"


OWNER = """
import base64, pickle, sys, time
from pathlib import Path
import numpy as np
from posttrain.rollout.local_store import LocalStore
store = LocalStore(Path(sys.argv[1]) if sys.argv[1] else None)
ref = store.put({"a": np.arange(3_000_000)})
print(base64.b64encode(pickle.dumps(ref)).decode(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_nothing_stays_behind_an_owner_that_was_killed(tmp_path: Path, place: str) -> None:
    folder = str(tmp_path) if place == "folder" else ""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, folder], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None
        ref: LocalRef = pickle.loads(base64.b64decode(owner.stdout.readline()))
        seen = ref.load()["a"]
        assert int(seen[-1]) == 2_999_999
    finally:
        owner.kill()
        owner.wait()
    assert int(seen[-1]) == 2_999_999, "what is being read stays"
    assert list(tmp_path.iterdir()) == []
    del seen
    with pytest.raises(KeyError, match=f"process {owner.pid} are gone"):
        ref.load()


def test_a_forked_child_may_read_but_not_write(store: LocalStore) -> None:
    ref = store.put({"a": np.arange(100)})

    def child(sender: Any) -> None:
        try:
            store.put({"b": np.arange(3)})
        except ValueError as error:
            sender.send((int(ref.load()["a"].sum()), str(error)))

    context = get_context("fork")
    receiver, sender = context.Pipe()
    process = context.Process(target=child, args=(sender,))
    process.start()
    total, message = receiver.recv()
    process.join()
    assert total == 4950
    assert f"belongs to process {os.getpid()}" in message


def test_a_store_without_room_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, segment_bytes=1 << 20)
    ref = store.put({"a": np.arange(1000)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            store.put({"a": np.zeros(1 << 21, np.uint8)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert int(ref.load()["a"][-1]) == 999
    assert int(store.put({"a": np.arange(5)}).load()["a"][-1]) == 4
