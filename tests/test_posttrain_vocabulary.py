"""Tokens of the V4 format for tokenizers and models that lack them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from posttrain import models
from posttrain.config import Model
from posttrain.conversation.chat import ChatFormat
from posttrain.conversation.formats import open_format
from posttrain.conversation.v4 import V4Format
from posttrain.conversation.v4_tokens import ALL, BOS, END_THINK, EOS
from posttrain.conversation.vocabulary import NOISE, prepare_model, prepare_tokenizer
from tests.tiny_models import save_tiny_model, tiny_tokenizer


def make_model(*, rows: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("rows", "expected"), [(263, 278), (264, 280), (320, 320), (512, 512), (272, 288)])
def test_new_rows_begin_as_the_mean_of_their_texts_pieces(tied, rows, expected):
    tokenizer, model = tiny_tokenizer(), make_model(rows=rows, tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([tokenizer("abab ab?")["input_ids"]])
    logits = model(ids).logits[..., :263]
    added = prepare_tokenizer(tokenizer)
    prepare_model(model, tokenizer, added)
    assert added == ALL
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, new = before[name], model.state_dict()[name]
        assert new.shape == (expected, 32)
        assert torch.equal(new[:263], old[:263])
        for token in ("</think>", EOS):
            # A byte-level vocabulary: the pieces are the bytes.
            pieces = [i for part in (token[0], token[1:]) for i in tokenizer(part)["input_ids"]]
            away = new[tokenizer.get_vocab()[token]] - old[pieces].mean(0)
            assert 0 < away.norm() < 3 * NOISE * old.std() * 32**0.5
        assert len({tuple(row.tolist()) for row in new[263:278]}) == 15
    assert torch.allclose(model(ids).logits[..., :263], logits, atol=1e-5)
    assert (model.config.vocab_size, model.config.eos_token_id) == (expected, tokenizer.get_vocab()[EOS])


def test_new_tokens_drown_no_others_and_are_not_drowned():
    tokenizer, model = tiny_tokenizer(), make_model(rows=263, tied=False)
    prepare_model(model, tokenizer, prepare_tokenizer(tokenizer))
    ids = torch.tensor([tokenizer("What is 2 + 2?")["input_ids"]])
    share = model(ids).logits[0].softmax(-1)[:, 263:].sum(-1)
    assert torch.all(share < 0.25)
    assert torch.all(share > 1e-4)


def test_a_tokenizer_keeps_what_it_has_and_remembers_the_format(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([END_THINK])
    place = tokenizer.get_vocab()[END_THINK]
    assert END_THINK not in prepare_tokenizer(tokenizer)
    assert prepare_tokenizer(tokenizer) == ()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab()[END_THINK] == place
    assert (loaded.bos_token, loaded.eos_token) == (BOS, EOS)
    form = open_format(loaded)
    assert isinstance(form, V4Format)
    assert form.fingerprint == open_format(tokenizer).fingerprint
    assert isinstance(open_format(tiny_tokenizer()), ChatFormat)


def test_a_base_is_prepared_once_and_starts_a_run_under_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    base = save_tiny_model(tmp_path / "base")
    assert models.base_path(Model(path=base, chat="template")) == str(tmp_path / "base")
    prepared = models.base_path(Model(path=base, chat="v4"))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert (
        models.base_path(Model(path=base, chat="v4")) == models.base_path(Model(path=prepared, chat="v4")) == prepared
    )
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == stamps
    form = open_format(models.load_tokenizer(prepared))
    model = AutoModelForCausalLM.from_pretrained(prepared)
    assert isinstance(form, V4Format)
    assert len(model.get_input_embeddings().weight) == len(form.tokenizer)
    ids = form.encode_prompt([{"role": "user", "content": "?"}])
    assert np.isfinite(model(torch.as_tensor(ids[None].astype(np.int64))).logits.detach().numpy()).all()
    # Another content under the same name is another base.
    save_tiny_model(tmp_path / "base", seed=1)
    assert models.base_path(Model(path=base, chat="v4")) != prepared
