"""Start-up checks: good teachers pass, each way of being wrong is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.errors import RecipeError
from teachers.checks import (
    check_cached_states,
    check_chat_format,
    check_identical,
    check_not_uniform,
    check_teachers,
    check_vocabulary,
)
from teachers.sources import HFTeacher

SPECIALS = ["<unk>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = [f"w{index}" for index in range(60)]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tokenizer(words: list[str] = WORDS, template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *words])}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>", additional_special_tokens=SPECIALS[1:3]
    )
    made.chat_template = template
    return made


def save_model(
    folder: Path,
    seed: int,
    *,
    spread: float = 0.5,
    vocab_size: int = 64,
    tokens: PreTrainedTokenizerFast | None = None,
) -> str:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=spread,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def student(tmp_path: Path) -> str:
    return save_model(tmp_path / "student", 0)


def probes() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 64, size).astype(np.int32) for size in (12, 25)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_good_teachers_pass_with_figures(student: str, tmp_path: Path, dtype: str) -> None:
    other = save_model(tmp_path / "other", 1)
    teachers = {"math": HFTeacher(other, dtype), "same": HFTeacher(student, dtype)}  # type: ignore[arg-type]
    results = check_teachers(
        teachers,
        student=HFTeacher(student, dtype),  # type: ignore[arg-type]
        probes={name: probes() for name in teachers},
        memory_mb=64,
    )
    assert results.keys() == teachers.keys()
    assert all(result.cached_kl < 1e-4 for result in results.values())
    assert all(0 < result.entropy < 0.9 * np.log(64) for result in results.values())


def test_an_untrained_teacher_is_refused(student: str, tmp_path: Path) -> None:
    uniform = HFTeacher(save_model(tmp_path / "uniform", 1, spread=0.01))
    with pytest.raises(RecipeError, match=r"'code'.*entropy"):
        check_teachers({"code": uniform}, student=HFTeacher(student), probes={"code": probes()}, memory_mb=64)


def test_another_vocabulary_size_is_refused(student: str, tmp_path: Path) -> None:
    bigger = HFTeacher(save_model(tmp_path / "bigger", 1, vocab_size=72))
    with pytest.raises(RecipeError, match="72 rows and the student's 64"):
        check_teachers({"code": bigger}, student=HFTeacher(student), probes={"code": probes()}, memory_mb=64)


def test_a_permuted_tokenizer_is_refused(student: str, tmp_path: Path) -> None:
    swapped = tokenizer(words=[WORDS[1], WORDS[0], *WORDS[2:]])
    teacher = HFTeacher(save_model(tmp_path / "swapped", 1, tokens=swapped))
    with pytest.raises(RecipeError, match=r"2 of 64 tokens.*'w0': 5 / 4"):
        check_teachers({"code": teacher}, student=HFTeacher(student), probes={"code": probes()}, memory_mb=64)


def test_missing_tokens_are_refused() -> None:
    with pytest.raises(RecipeError, match="'w59': None / 63"):
        check_vocabulary("code", tokenizer(words=WORDS[:-1]), tokenizer())


def test_another_chat_template_is_refused() -> None:
    check_chat_format("code", tokenizer(), tokenizer())
    with pytest.raises(RecipeError, match="chat format"):
        check_chat_format("code", tokenizer(template=TEMPLATE.replace("<|end|> ", "<|end|>")), tokenizer())


def test_wrong_heads_and_shifted_states_are_refused(student: str, tmp_path: Path) -> None:
    model = HFTeacher(student, "float32").load("cpu")
    stranger = HFTeacher(save_model(tmp_path / "other", 1), "float32").load("cpu")
    states = model.hidden_states(probes()[1:])[0]
    rounded = states.bfloat16()
    assert check_cached_states("math", states, model.head, rounded, model.head) < 1e-4
    with pytest.raises(RecipeError, match="another checkpoint"):
        check_cached_states("math", states, model.head, rounded, stranger.head)
    with pytest.raises(RecipeError, match="shifted"):
        check_cached_states("math", states[1:], model.head, rounded[:-1], model.head)
    with pytest.raises(RecipeError, match="shapes"):
        check_cached_states("math", states, model.head, rounded[:-1], model.head)


def test_a_student_that_is_not_its_own_teacher_is_noticed(student: str, tmp_path: Path) -> None:
    model = HFTeacher(student, "float32").load("cpu")
    states = model.hidden_states(probes()[1:])[0]
    assert check_identical(states, model.head, states.bfloat16(), model.head) < 1e-4
    with pytest.raises(RecipeError, match="its own teacher"):
        check_identical(states, model.head, states * 0.9, model.head)


def test_entropy_is_measured_in_nats() -> None:
    head = torch.eye(8)
    peaked = check_not_uniform("math", torch.eye(8) * 50, head)
    assert peaked == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(RecipeError, match=r"2\.08 nats"):
        check_not_uniform("math", torch.zeros(3, 8), head)


def test_teachers_without_probes_are_named(student: str) -> None:
    teacher = HFTeacher(student)
    with pytest.raises(RecipeError, match="no probe sequences"):
        check_teachers({"a": teacher, "b": teacher}, student=teacher, probes={"a": probes()}, memory_mb=64)
