"""Teacher sources on tiny random Llamas: states times head are the logits, content decides the fingerprint."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.errors import RecipeError
from posttrain.models import load_model
from posttrain.stability.layers import QUANTISATION, SWIGLU_LIMIT
from teachers.pool import TeacherPool, content_hash
from teachers.sources import AdapterTeacher, DType, HFTeacher

VOCAB = 64


def tiny_llama(seed: int, *, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_llama(0).save_pretrained(folder)
    return folder


def lora(base: Path, folder: Path, *, seed: int, modules: list[str]) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
    )
    model.save_pretrained(folder)
    return folder


def sequences() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, VOCAB, size).astype(np.int32) for size in (9, 1, 30, 2, 17)]


def test_states_times_head_are_the_logits_for_ragged_sequences(checkpoint: Path) -> None:
    teacher = HFTeacher(str(checkpoint), "float32").load("cpu")
    model = LlamaForCausalLM.from_pretrained(checkpoint).eval()
    for ids, states in zip(sequences(), teacher.hidden_states(sequences()), strict=True):
        with torch.no_grad():
            logits = model(torch.as_tensor(ids, dtype=torch.long)[None]).logits[0]
        torch.testing.assert_close(states @ teacher.head.T, logits, rtol=1e-4, atol=1e-4)


def test_bfloat16_teachers_compute_in_bfloat16_and_leave_the_default_dtype_alone(checkpoint: Path) -> None:
    teacher = HFTeacher(str(checkpoint), "bfloat16").load("cpu")
    assert teacher.head.dtype == torch.bfloat16
    assert teacher.hidden_states(sequences())[0].dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_sources_pickle_and_fingerprints_follow_content(checkpoint: Path, tmp_path: Path) -> None:
    teacher = HFTeacher(str(checkpoint))
    assert pickle.loads(pickle.dumps(teacher)) == teacher
    copied = tmp_path / "copy"
    shutil.copytree(checkpoint, copied)
    assert HFTeacher(str(copied)).fingerprint == teacher.fingerprint
    assert HFTeacher(str(checkpoint), "bfloat16").fingerprint != HFTeacher(str(checkpoint), "float32").fingerprint
    before = teacher.fingerprint
    tiny_llama(1).save_pretrained(checkpoint)
    assert teacher.fingerprint != before


def test_folders_without_weights_are_named(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="no weights"):
        _ = HFTeacher(str(checkpoint)).fingerprint


def test_closed_teachers_free_their_weights_whoever_still_holds_a_module(checkpoint: Path) -> None:
    teacher = HFTeacher(str(checkpoint)).load("cpu")
    module, head = teacher._model.model.layers[0].mlp.up_proj, teacher.head
    before = head.clone()
    teacher.close()
    assert module.weight.untyped_storage().nbytes() == 0
    assert torch.equal(head, before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_read_into_the_memory_of_another_of_its_kind(dtype: DType, tied: bool, tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_llama(seed, tied=tied).save_pretrained(tmp_path / str(seed))
    first, second = (HFTeacher(str(tmp_path / str(seed)), dtype) for seed in (0, 1))
    model, expected = first.load("cpu"), second.load("cpu")
    place = model.head.data_ptr()
    assert second.refill(model, "cpu")
    assert model.head.data_ptr() == place
    assert torch.equal(model.head, expected.head)
    for found, states in zip(model.hidden_states(sequences()), expected.hidden_states(sequences()), strict=True):
        assert torch.equal(found, states)


def test_a_model_of_another_kind_is_left_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    model = HFTeacher(str(checkpoint), "float32").load("cpu")
    head, states = model.head.clone(), model.hidden_states(sequences())
    tiny_llama(1, tied=False).save_pretrained(tmp_path / "untied")
    tiny_llama(1).save_pretrained(tmp_path / "scaled")
    config = tmp_path / "scaled" / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
    tiny_llama(1).save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    others = [HFTeacher(str(tmp_path / name), "float32") for name in ("untied", "scaled", "broken")]
    for other in (*others, HFTeacher(str(checkpoint), "bfloat16")):
        assert not other.refill(model, "cpu")
    assert torch.equal(model.head, head)
    for found, before in zip(model.hidden_states(sequences()), states, strict=True):
        assert torch.equal(found, before)


@pytest.mark.parametrize("change", ["in place", "another tensor"])
def test_a_model_that_changed_its_own_weights_is_not_used_again(change: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_llama(seed).save_pretrained(tmp_path / str(seed))
    first, second = (HFTeacher(str(tmp_path / str(seed)), "float32") for seed in (0, 1))
    model = first.load("cpu")
    assert second.refill(model, "cpu")
    assert first.refill(model, "cpu")
    rotary = model._model.model.rotary_emb
    if change == "in place":
        model._model.model.layers[0].mlp.up_proj.weight.div_(2)
    else:
        rotary.register_buffer("inv_freq", rotary.inv_freq / 2, persistent=False)
    assert not second.refill(model, "cpu")


@pytest.mark.parametrize("entry", [{SWIGLU_LIMIT: 0.05}, {QUANTISATION: "mxfp4"}])
def test_teachers_compute_as_their_config_says(entry: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_llama(0)
    model.save_pretrained(tmp_path / "plain")
    model.config.update(entry)
    model.save_pretrained(tmp_path / "stable")
    teacher = HFTeacher(str(tmp_path / "stable"), "float32")
    states, head = teacher.load("cpu").hidden_states(sequences()), teacher.load_head("cpu").weight_VE
    loaded, plain = (load_model(str(tmp_path / name), torch.float32).eval() for name in ("stable", "plain"))
    for ids, states_TE in zip(sequences(), states, strict=True):
        ids_BT = torch.as_tensor(ids, dtype=torch.long)[None]
        with torch.no_grad():
            logits, unchanged = loaded(ids_BT).logits[0], plain(ids_BT).logits[0]
        torch.testing.assert_close(states_TE @ head.T, logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, unchanged, rtol=1e-2, atol=1e-2)


def test_adapters_change_the_logits_and_share_the_base_head(checkpoint: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    base = HFTeacher(str(checkpoint), "float32")
    folders = [lora(checkpoint, tmp_path / f"lora{s}", seed=s, modules=["q_proj", "up_proj"]) for s in (1, 2)]
    teachers = {folder.name: AdapterTeacher(base, str(folder)) for folder in folders}
    assert len({base.fingerprint, *(teacher.fingerprint for teacher in teachers.values())}) == 3

    loaded = teachers["lora1"].load("cpu")
    ids = sequences()[2]
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(checkpoint), folders[0]).eval()
    with torch.no_grad():
        logits = expected(torch.as_tensor(ids, dtype=torch.long)[None]).logits[0]
    torch.testing.assert_close(loaded.hidden_states([ids])[0] @ loaded.head.T, logits, rtol=1e-4, atol=1e-4)
    assert content_hash(loaded.head) == content_hash(base.load("cpu").head)

    with TeacherPool(teachers, memory_mb=64) as pool:
        pool.head("lora1")
        pool.head("lora2")
        assert pool.stats.head_loads == 1


def test_an_adapted_head_is_refused_rather_than_ignored(checkpoint: Path, tmp_path: Path) -> None:
    untied = tmp_path / "untied"
    tiny_llama(0, tied=False).save_pretrained(untied)
    adapter = lora(untied, tmp_path / "lora", seed=1, modules=["lm_head"])
    with pytest.raises(RecipeError, match="adapted head"):
        AdapterTeacher(HFTeacher(str(untied), "float32"), str(adapter)).load("cpu")
