"""Where model paths lead."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.errors import RecipeError
from posttrain.models import cache_dir, compute_dtype, has_native_bf16, load_model, load_tokenizer, resolve_path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "weights_pkg"
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(root / "small")
    (root / "__init__.py").write_text("raise AssertionError('finding weights must not import the package')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield root
    sys.modules.pop("weights_pkg", None)


def test_local_and_package_paths(package):
    assert resolve_path(str(package / "small")) == str(package / "small")
    assert resolve_path("package:weights_pkg/small") == str(package / "small")
    model = load_model("package:weights_pkg/small", torch.bfloat16, attn_implementation="eager")
    assert model.dtype is torch.bfloat16
    assert model.config._attn_implementation == "eager"


def test_hub_names_pass_through():
    assert resolve_path("org/name") == "org/name"


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("./nowhere", "nothing at"),
        ("/nowhere/model.gguf", "nothing at"),
        ("package:no_such_package/x", "no Python package 'no_such_package'"),
        ("package:weights_pkg/large", "has no 'large'"),
        ("package:weights_pkg", "no config.json"),
    ],
)
def test_missing_paths_say_what_was_looked_for(package, path, found):
    with pytest.raises(RecipeError, match=found):
        resolve_path(path)


def test_gguf_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    weights = write_gguf(tmp_path / "tiny.gguf")
    folder = Path(resolve_path(str(tmp_path / "tiny.gguf")))
    assert folder.parent.parent == cache_dir() == tmp_path / "cache"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert Path(resolve_path(str(tmp_path / "tiny.gguf"))) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    model = load_model(str(folder), torch.float32)
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach(), weights)
    assert load_tokenizer(str(folder)).eos_token == "<end>"


def write_gguf(path: Path) -> np.ndarray:
    """A one-layer Llama with random float32 weights; returns its embedding."""
    gguf = pytest.importorskip("gguf")
    hidden, inner, tokens = 32, 64, ["<unk>", "<begin>", "<end>", "a", "b", "ab"]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (
        ("context_length", 64),
        ("embedding_length", hidden),
        ("block_count", 1),
        ("feed_forward_length", inner),
        ("head_count", 2),
        ("head_count_kv", 2),
    ):
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), hidden), "output": (len(tokens), hidden), "output_norm": (hidden,)}
    shapes |= {f"blk.0.attn_{n}": (hidden, hidden) for n in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.{n}_norm": (hidden,) for n in ("attn", "ffn")}
    shapes |= {"blk.0.ffn_gate": (inner, hidden), "blk.0.ffn_up": (inner, hidden), "blk.0.ffn_down": (hidden, inner)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors["token_embd"]


def test_compute_dtype():
    assert compute_dtype("float32", 10**9) is torch.float32
    assert compute_dtype("bfloat16", 10) is torch.bfloat16
    assert compute_dtype("auto", 3_000_000) is torch.float32
    assert compute_dtype("auto", 10**9) is (torch.bfloat16 if has_native_bf16() else torch.float32)
