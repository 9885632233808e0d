"""SFT: which tokens carry loss, that it learns, that a killed run continues to the same weights."""

import copy
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import trl.trainer.base_trainer
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.config import SFT, Lora, Optim
from posttrain.conversation.chat import ChatFormat
from posttrain.learner.sft import encode_demonstration, encode_demonstrations, newest_checkpoint, run_sft
from posttrain.types import Message

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }} \n {{ m.content }}<|im_end|> \n {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant \n {% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }} \n {% if m.role == 'assistant' and loop.last %}thought {% endif %}"
    "{{ m.content }}<|im_end|> \n {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant \n {% endif %}"
)
WORDS = [
    "user",
    "assistant",
    "system",
    "thought",
    "be",
    "brief",
    "what",
    "is",
    "red",
    "blue",
    "a",
    "colour",
    "sky",
    "?",
]
IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, "\n", *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="module")
def model_path(tokenizer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def say(role: str, content: str) -> Message:
    return {"role": role, "content": content}


CONVERSATION = (
    say("system", "be brief"),
    say("user", "what is red ?"),
    say("assistant", "a colour"),
    say("user", "what is blue ?"),
    say("assistant", "sky"),
)
QUESTIONS = [(say("user", f"what is {word} ?"), say("assistant", "a blue sky")) for word in ("red", "blue", "a")]


def config(**changes) -> SFT:
    optim = Optim(learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=1)
    return SFT(**{"max_steps": 30, "batch_size": 2, "max_length": 64, "optim": optim, "save_steps": 4, **changes})


def train(
    model_path: Path, output_dir: Path, settings: SFT, on_log=lambda step, metrics: None, lora=None, dtype=torch.float32
) -> Path:
    return run_sft(
        model_path=model_path,
        demonstrations=QUESTIONS,
        config=settings,
        lora=lora,
        seed=3,
        output_dir=output_dir,
        on_log=on_log,
        dtype=dtype,
    )


def weights(path: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def test_loss_covers_exactly_the_assistant_turns(tokenizer):
    (sequence,) = encode_demonstration(CONVERSATION, ChatFormat(tokenizer))
    whole = tokenizer.apply_chat_template(list(CONVERSATION), tokenize=False)
    assert (
        sequence["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"][:-1]
    )  # all but the last newline
    trained = [label for label in sequence["labels"] if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(trained) == ["a", "colour", "<|im_end|>", "sky", "<|im_end|>"]
    for token, label in zip(sequence["input_ids"], sequence["labels"], strict=True):
        assert label in (IGNORED, token)
    assert sequence["labels"][-1] == tokenizer.eos_token_id


def test_messages_after_the_last_assistant_turn_are_left_out(tokenizer):
    longer = (*CONVERSATION, say("user", "red ?"))
    assert encode_demonstration(longer, ChatFormat(tokenizer)) == encode_demonstration(
        CONVERSATION, ChatFormat(tokenizer)
    )


def test_a_template_that_rewrites_history_gives_each_turn_its_real_context(tokenizer):
    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = FORGETFUL
    first, second = encode_demonstration(CONVERSATION, ChatFormat(forgetful))
    words = [
        forgetful.convert_ids_to_tokens([label for label in row["labels"] if label != IGNORED])
        for row in (first, second)
    ]
    assert words == [["thought", "a", "colour", "<|im_end|>"], ["thought", "sky", "<|im_end|>"]]
    context = forgetful.convert_ids_to_tokens(second["input_ids"])
    assert context.count("thought") == 1
    assert context.count("colour") == 1


def test_tokens_are_those_of_a_rollout(tokenizer):
    """What a rollout feeds and what it would generate, put together from ChatFormat's own encoders."""
    chat = ChatFormat(tokenizer)
    (sequence,) = encode_demonstration(CONVERSATION, chat)
    end = [tokenizer.eos_token_id]
    expected = [
        *chat.encode_prompt(CONVERSATION[:2]),
        *tokenizer("a colour", add_special_tokens=False)["input_ids"],
        *end,
        *chat.encode_observations(CONVERSATION[3:4]),
        *tokenizer("sky", add_special_tokens=False)["input_ids"],
        *end,
    ]
    assert sequence["input_ids"] == expected


def test_reasoning_is_imitated_where_the_template_shows_it(tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = CHATML.replace("{{ m.content }}", "{{ m.reasoning_content or '' }} {{ m.content }}")
    demonstration = (say("user", "what is red ?"), {**say("assistant", "a colour"), "reasoning": "thought"})
    (sequence,) = encode_demonstration(demonstration, ChatFormat(thinking))
    trained = [label for label in sequence["labels"] if label != IGNORED]
    assert tokenizer.convert_ids_to_tokens(trained) == ["thought", "a", "colour", "<|im_end|>"]


def test_bad_demonstrations_are_named(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        encode_demonstrations([], ChatFormat(tokenizer), 64)
    with pytest.raises(ValueError, match="demonstration 1 has 37 tokens but max_length = 20"):
        encode_demonstrations([QUESTIONS[0], CONVERSATION], ChatFormat(tokenizer), 20)
    with pytest.raises(ValueError, match="demonstration 0: it has no assistant message"):
        encode_demonstrations([CONVERSATION[:2]], ChatFormat(tokenizer), 64)


def test_a_model_learns_to_repeat_the_answer(model_path, tmp_path, monkeypatch, capfd):
    def refuse(*args, **kwargs):
        raise AssertionError("telemetry was sent")

    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", refuse)
    monkeypatch.delenv("CI", raising=False)
    logged: dict[int, dict[str, float]] = {}
    final = train(model_path, tmp_path, config(), on_log=logged.__setitem__)
    output = capfd.readouterr()
    assert "it/s" not in output.err
    assert "loss" not in output.out
    assert sorted(logged) == list(range(1, 31))
    assert logged[30]["loss"] < 0.1 < logged[1]["loss"]
    tokenizer, model = AutoTokenizer.from_pretrained(final), AutoModelForCausalLM.from_pretrained(final)
    prompt = tokenizer.apply_chat_template(
        [say("user", "what is red ?")], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.convert_ids_to_tokens(written) == ["a", "blue", "sky", "<|im_end|>"]


def test_the_trained_loss_is_that_of_the_assistant_tokens(model_path, tmp_path, tokenizer):
    """The first logged loss against plain torch on the untrained model."""
    logged: dict[int, dict[str, float]] = {}
    train(model_path, tmp_path, config(max_steps=1, batch_size=3), on_log=logged.__setitem__)
    model, losses = AutoModelForCausalLM.from_pretrained(model_path), []
    for demonstration in QUESTIONS:
        (row,) = encode_demonstration(demonstration, ChatFormat(tokenizer))
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none"))
    expected = torch.cat(losses).sum() / (4 * len(QUESTIONS))
    assert logged[1]["loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_bfloat16_computes_but_float32_is_stored(model_path, tmp_path):
    paths = [
        train(model_path, tmp_path / name, config(max_steps=2), dtype=dtype)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    ]
    half, full = (weights(path)["model.embed_tokens.weight"] for path in paths)
    assert half.dtype == torch.float32
    assert not torch.equal(half, half.bfloat16().float())
    assert not torch.equal(half, full)


class Killed(Exception):
    pass


@pytest.mark.parametrize("lora", [None, Lora(rank=2, dropout=0.1)])
def test_a_killed_run_continues_to_the_same_weights(model_path, tmp_path, lora):
    settings, steps = config(max_steps=9), []

    def kill_at_six(step, metrics):
        if step == 6:
            raise Killed

    with pytest.raises(Killed):
        train(model_path, tmp_path / "killed", settings, on_log=kill_at_six, lora=lora)
    # A checkpoint that was being written when the machine went down.
    torn = tmp_path / "killed/checkpoints/checkpoint-6"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_step": 6, "log')
    resumed = train(
        model_path, tmp_path / "killed", settings, on_log=lambda step, metrics: steps.append(step), lora=lora
    )
    whole = train(model_path, tmp_path / "whole", settings, lora=lora)
    assert steps == [5, 6, 7, 8, 9]
    found, expected, base = weights(resumed), weights(whole), weights(model_path)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(base[name], expected[name]) for name in base)


def test_newest_checkpoint_is_by_step_not_by_name(tmp_path):
    assert newest_checkpoint(tmp_path / "none") is None
    for step in (8, 12, 100):
        path = tmp_path / f"checkpoint-{step}"
        path.mkdir()
        if step != 100:
            (path / "trainer_state.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
