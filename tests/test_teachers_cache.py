"""Stores of hidden states: bit-exact, resumable, and never wrong in silence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from posttrain.errors import RecipeError
from posttrain.protocols import StateStore
from posttrain.rollout.local_store import LocalStore
from teachers.cache import ArrayStates, FileStore, MemoryStore, RemoteStore, open_store

MakeStore = Callable[[Path], StateStore]


def file_store(directory: Path) -> FileStore:
    return FileStore(directory)


def memory_store(directory: Path) -> MemoryStore:
    return MemoryStore()


def object_store(directory: Path) -> ArrayStates:
    return ArrayStates(LocalStore())


def remote_store(directory: Path) -> RemoteStore:
    return RemoteStore(f"memory://{directory}")


STORES = [file_store, memory_store, object_store, remote_store]
DURABLE = [file_store, remote_store]


def states(seed: int = 0, rows: int = 5, width: int = 7) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("make", STORES)
def test_stores_return_what_was_put_until_freed(make: MakeStore, tmp_path: Path) -> None:
    store = make(tmp_path)
    special = torch.tensor([[float("nan"), float("inf"), -0.0, 1e-40]]).bfloat16()
    store.put("a/b c", states())
    store.put("special", special)
    store.put("empty", states(rows=0))
    assert torch.equal(store.get("a/b c"), states())
    assert torch.equal(store.get("special").view(torch.int16), special.view(torch.int16))
    assert store.get("empty").shape == (0, 7)

    kept = store.get("a/b c")
    store.put("a/b c", states(seed=1, rows=2))
    assert torch.equal(store.get("a/b c"), states(seed=1, rows=2))
    store.free(["a/b c", "never there"])
    assert torch.equal(kept, states())
    with pytest.raises(KeyError, match="a/b c"):
        store.get("a/b c")


@pytest.mark.parametrize("make", STORES)
def test_what_is_put_is_a_copy(make: MakeStore, tmp_path: Path) -> None:
    store, tensor = make(tmp_path), states()
    store.put("a", tensor)
    tensor.zero_()
    assert torch.equal(store.get("a"), states())


@pytest.mark.parametrize("make", STORES)
@pytest.mark.parametrize("wrong", [states().float(), states()[0]])
def test_stores_refuse_other_than_bfloat16_matrices(make: MakeStore, wrong: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        make(tmp_path).put("a", wrong)


@pytest.mark.parametrize("make", STORES)
def test_what_was_computed_from_something_else_counts_as_absent(make: MakeStore, tmp_path: Path) -> None:
    store = make(tmp_path)
    store.put("a", states(), origin="math teacher")
    store.put("b", states(1), origin="code teacher")
    assert store.holds("a", origin="math teacher")
    assert not store.holds("a", origin="math teacher, trained on")
    assert store.holds("b", origin="code teacher")
    assert not store.holds("never there", origin="")
    store.put("a", states(2), origin="math teacher, trained on")
    assert store.holds("a", origin="math teacher, trained on")
    assert torch.equal(store.get("a"), states(2))


@pytest.mark.parametrize("make", DURABLE)
def test_another_process_finds_what_was_put(make: MakeStore, tmp_path: Path) -> None:
    make(tmp_path).put("a", states(), origin="teacher")
    assert make(tmp_path).holds("a", origin="teacher")
    assert torch.equal(make(tmp_path).get("a"), states())


def test_file_store_does_not_share_changes_made_to_what_it_gave(tmp_path: Path) -> None:
    store = file_store(tmp_path)
    store.put("a", states())
    store.get("a").zero_()
    assert torch.equal(store.get("a"), states())


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_file_store_reports_truncated_files(keep: int, tmp_path: Path) -> None:
    store = file_store(tmp_path)
    store.put("a", states())
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:keep])
    assert not store.holds("a")
    with pytest.raises(ValueError, match="damaged"):
        store.get("a")


def test_file_store_reports_flipped_bits(tmp_path: Path) -> None:
    store = file_store(tmp_path)
    store.put("a", states())
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        store.get("a")


def test_file_store_leaves_no_scratch_files(tmp_path: Path) -> None:
    store = file_store(tmp_path)
    for index in range(3):
        store.put(f"sample-{index}", states(seed=index))
    store.free(["sample-0"])
    abandoned = tmp_path / "killed-while-writing.1234.tmp"
    abandoned.write_bytes(b"part")
    os.utime(abandoned, (0, 0))
    store = file_store(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".states"}
    assert len(list(tmp_path.iterdir())) == 2


def test_the_setting_chooses_the_store(tmp_path: Path) -> None:
    assert isinstance(open_store("memory", tmp_path), MemoryStore)
    assert isinstance(open_store("files", None), MemoryStore)
    assert isinstance(open_store("memory://bucket/states", None), RemoteStore)
    open_store(f"file://{tmp_path}/elsewhere", None).put("a", states())
    assert torch.equal(open_store("files", tmp_path / "elsewhere").get("a"), states())
    with pytest.raises(RecipeError, match="nosuch"):
        open_store("nosuch://bucket/states", None)
