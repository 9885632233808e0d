"""Checkpoints at a URL: fetched once, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from posttrain import checkpoint_files
from posttrain.errors import RecipeError
from posttrain.models import resolve_folder, resolve_path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoint_files, "_FETCHED", {})
    return tmp_path / "cache" / "remote"


@pytest.fixture
def bucket(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A remote folder with a checkpoint in two shards."""
    made = tmp_path / "made"
    made.mkdir()
    for shard in ("1", "2"):
        save_file({f"weight.{shard}": torch.arange(6.0)}, made / f"model-{shard}.safetensors")
    shards = {f"weight.{shard}": f"model-{shard}.safetensors" for shard in ("1", "2")}
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (made / "config.json").write_text("{}")
    (made / "pytorch_model.bin").write_bytes(b"the same weights again")
    url = f"memory://{request.node.name}/model"
    fsspec.filesystem("memory").put(f"{made}/", url, recursive=True)
    return url


def forget() -> None:
    """As if another process asked."""
    checkpoint_files._FETCHED.clear()


def test_a_remote_checkpoint_is_fetched_once(bucket: str, cache: Path) -> None:
    folder = Path(resolve_path(bucket))
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"}
    (folder / "mark").touch()
    forget()
    assert (Path(resolve_path(bucket)) / "mark").exists()
    assert Path(resolve_folder(bucket, holding="config.json")) == folder
    assert list(cache.iterdir()) == [folder]


def test_files_that_changed_are_fetched_anew_by_the_next_run_only(bucket: str) -> None:
    before = resolve_path(bucket)
    fsspec.filesystem("memory").pipe_file(f"{bucket}/config.json", b'{"changed": true}')
    assert resolve_path(bucket) == before
    forget()
    assert json.loads((Path(resolve_path(bucket)) / "config.json").read_text()) == {"changed": True}


def test_a_copy_that_is_not_whole_never_appears(bucket: str, cache: Path) -> None:
    remote = fsspec.filesystem("memory")
    shard = f"{bucket}/model-2.safetensors"
    content = remote.cat_file(shard)
    remote.pipe_file(shard, content[:-4])
    with pytest.raises(RecipeError, match=r"model-2\.safetensors has .* bytes and its header tells"):
        resolve_path(bucket)
    remote.rm(shard)
    with pytest.raises(RecipeError, match=r"not there: \['model-2\.safetensors'\]"):
        resolve_path(bucket)
    assert list(cache.iterdir()) == []
    remote.pipe_file(shard, content)
    assert (Path(resolve_path(bucket)) / "model-2.safetensors").read_bytes() == content


def test_local_urls_are_used_where_they_are(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert resolve_path(f"file://{tmp_path}/model") == str(tmp_path / "model")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("memory://nowhere/model", "does not exist or is empty"),
        ("file:///nowhere/model", "holds no config.json"),
        ("nosuch://bucket/model", "nosuch"),
    ],
)
def test_a_url_without_a_checkpoint_is_named(url: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told) as error:
        resolve_path(url)
    assert url in str(error.value)
