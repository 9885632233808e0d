"""What differs between architectures stays behind the teacher: logits are made of states, head and cap, in any form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from posttrain.errors import RecipeError
from teachers.batching import pack
from teachers.logits import LogitTransform
from teachers.sources import AdapterTeacher, HFTeacher

VOCAB = 96
MIB = 2**20
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"]}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**GEMMA, final_logit_softcapping=4.0),
    "gemma3": Gemma3TextConfig(**GEMMA, final_logit_softcapping=None),
    "cohere": CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.3),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0, embedding_multiplier=2.0, residual_multiplier=0.5),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=5, n_head=4, n_positions=128, initializer_range=0.3),
}


def saved(config: PretrainedConfig, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder, **options)
    return folder


def sequences() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, VOCAB, size).astype(np.int32) for size in (9, 1, 30, 2, 17)]


def weight_bytes(folder: Path) -> int:
    return HFTeacher(str(folder), "float32").num_bytes("cpu") or 0


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_made_of_states_head_and_cap(name: str, tmp_path: Path) -> None:
    folder = saved(CONFIGS[name], tmp_path / name, max_shard_size="20KB")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = HFTeacher(str(folder), "float32")
    teacher, head = source.load("cpu"), source.load_head("cpu")
    assert teacher.num_bytes == source.num_bytes("cpu")
    assert torch.equal(head.weight_VE, teacher.head)
    assert head.logit_cap == teacher.logit_cap
    last = LogitTransform(cap=teacher.logit_cap)
    for ids, states in zip(sequences(), teacher.hidden_states(sequences()), strict=True):
        with torch.no_grad():
            logits = model(torch.as_tensor(ids, dtype=torch.long)[None]).logits[0]
        torch.testing.assert_close(last.logits(states, teacher.head), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_layer_by_layer_gives_the_same_states(
    name: str, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.sources.pack", lambda model: False)  # both pad, and round alike
    source = HFTeacher(str(saved(CONFIGS[name], tmp_path / name)), dtype)
    whole = source.load("cpu")
    streamed = source.stream("cpu", memory_bytes=whole.num_bytes // 2)
    assert streamed.num_bytes <= whole.num_bytes // 2
    assert torch.equal(streamed.head, whole.head)
    assert streamed.logit_cap == whole.logit_cap
    for _ in range(2):
        for expected, states in zip(whole.hidden_states(sequences()), streamed.hidden_states(sequences()), strict=True):
            assert torch.equal(expected, states)
    streamed.close()


def test_states_that_do_not_fit_wait_on_disk(tmp_path: Path) -> None:
    source = HFTeacher(str(saved(CONFIGS["llama"], tmp_path / "llama")), "float32")
    probing = source.stream("cpu", memory_bytes=MIB)
    streamed = source.stream("cpu", memory_bytes=probing.num_bytes)
    many = sequences() * 4
    for expected, states in zip(probing.hidden_states(many), streamed.hidden_states(many), strict=True):
        assert torch.equal(expected, states)


def test_an_adapter_runs_on_a_streamed_base(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = saved(CONFIGS["llama"], tmp_path / "base")
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    source = AdapterTeacher(HFTeacher(str(base), "float32"), str(tmp_path / "adapter"))
    whole, plain = source.load("cpu"), source.base.load("cpu")
    streamed = source.stream("cpu", memory_bytes=weight_bytes(base) // 2)
    assert torch.equal(source.load_head("cpu").weight_VE, whole.head)
    for expected, states, unadapted in zip(
        whole.hidden_states(sequences()),
        streamed.hidden_states(sequences()),
        plain.hidden_states(sequences()),
        strict=True,
    ):
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(states, unadapted, atol=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_sequences_are_packed_where_attention_is_plain(name: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    assert pack(model) == (name not in ("gemma2", "gemma3"))
    assert pack(model) == (name not in ("gemma2", "gemma3"))  # as remembered


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "linear"])
def test_positions_that_depend_on_the_longest_of_a_row_are_not_packed(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    assert pack(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()) == (kind == "linear")


def test_a_model_whose_sequences_see_each_other_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_shift(self: LlamaModel, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        output = plain(self, *args, **kwargs)
        before = output.last_hidden_state.roll(1, dims=1)
        before[:, 0] = 0
        output.last_hidden_state = output.last_hidden_state + 0.01 * before
        return output

    plain = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", with_shift)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, rms_norm_eps=2e-6), dtype=torch.float32).eval()
    assert not pack(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_cannot_be_divided_is_told(tmp_path: Path) -> None:
    folder = saved(LlamaConfig(**{**SIZES, "vocab_size": 4096}), tmp_path / "wide")
    with pytest.raises(RecipeError, match=r"its output head has 0\.5 MiB .* allows 0\.4"):
        HFTeacher(str(folder), "float32").stream("cpu", memory_bytes=400 * 1024)
    folder = saved(CONFIGS["llama"], tmp_path / "llama")
    with pytest.raises(RecipeError, match="one of its layers"):
        HFTeacher(str(folder), "float32").stream("cpu", memory_bytes=VOCAB * 32 * 4)
    pickled = saved(CONFIGS["llama"], tmp_path / "pickled", safe_serialization=False)
    for file in pickled.glob("*.safetensors"):
        torch.save(AutoModelForCausalLM.from_pretrained(pickled).state_dict(), pickled / "pytorch_model.bin")
        file.unlink()
    with pytest.raises(RecipeError, match="no safetensors"):
        HFTeacher(str(pickled)).stream("cpu", memory_bytes=MIB)


def test_layers_that_share_more_than_a_state_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_shortcuts(self: LlamaModel, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        first = hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            hidden = layer(hidden + 0.1 * first, attention_mask=None, position_embeddings=positions)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    source = HFTeacher(str(saved(CONFIGS["llama"], tmp_path / "llama")), "float32")
    monkeypatch.setattr(LlamaModel, "forward", with_shortcuts)
    with pytest.raises(RecipeError, match="cannot be run layer by layer: its states differ"):
        source.stream("cpu", memory_bytes=MIB)


@pytest.mark.parametrize("field", ["cap", "scale"])
def test_a_transform_that_the_config_hides_is_found(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = {"cap": "gemma2", "scale": "cohere"}[field]
    folder = saved(CONFIGS[name], tmp_path / name)
    monkeypatch.setattr(LogitTransform, "of", classmethod(lambda cls, config: cls()))
    with pytest.raises(RecipeError, match="differ by"):
        HFTeacher(str(folder), "float32").load("cpu")
