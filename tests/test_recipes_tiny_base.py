"""The shipped base model and the corpus it was made from."""

import random
import re
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recipes.tasks.words import TOPICS
from recipes.tiny_base import (
    CHAT_TEMPLATE,
    SKILLS,
    SPECIAL_TOKENS,
    TinyBase,
    build,
    build_tokenizer,
    encode,
    model_config,
    schedule,
)
from recipes.tiny_corpus import PAGES, SOURCES, Mix, judging, sample
from rewards.judge import parse_line_reply

CHECKPOINT = files("recipes") / "tiny"

CONVERSATION = (
    {"role": "system", "content": "You work in a folder."},
    {"role": "user", "content": "Write the word named in red.txt to blue.txt."},
    {"role": "assistant", "content": "```bash\ncat red.txt\n```"},
    {"role": "tool", "content": "The word is moon\n(exit code 1)"},
    {"role": "assistant", "content": "Done."},
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def template_ids(tokenizer, messages, *, generate=False):
    return tokenizer.apply_chat_template(
        list(messages), tokenize=True, add_generation_prompt=generate, return_dict=False
    )


def test_checkpoint_is_small_and_of_the_declared_shape(tokenizer):
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir() if path.is_file()) < 8_000_000
    expected, found = model_config(TinyBase(), tokenizer), AutoConfig.from_pretrained(CHECKPOINT)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "max_position_embeddings", "tie_word_embeddings", "eos_token_id", "pad_token_id"):  # fmt: skip
        assert getattr(found, name) == getattr(expected, name), name
    assert len(tokenizer) == found.vocab_size == TinyBase().vocab_size
    assert tokenizer.convert_ids_to_tokens([found.eos_token_id]) == ["<|end|>"]


def test_shipped_tokenizer_is_the_one_the_module_trains(tokenizer):
    base = TinyBase()
    documents = sample(base.phases[0].mix, count=20_000, seed=base.seed)
    texts = [t for d in documents for t in ([d] if isinstance(d, str) else [m["content"] for m in d])]
    rebuilt = build_tokenizer(texts, vocab_size=base.vocab_size, context=base.context)
    assert rebuilt.get_vocab() == tokenizer.get_vocab()
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_tokenizer_gives_back_any_text_and_keeps_digits_apart(tokenizer):
    for text in ("def f(x):\n    return (x - 18) * 2", "caf\u00e9 \u2603  two  spaces\n", "-12 + 340"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("1234 a5f6", add_special_tokens=False))
    assert all(len(re.sub(r"\D", "", token)) <= 1 for token in tokens)
    assert [len(tokenizer.encode(token)) for token in SPECIAL_TOKENS] == [1] * len(SPECIAL_TOKENS)


def test_template_only_appends(tokenizer):
    whole = template_ids(tokenizer, CONVERSATION)
    for count in range(1, len(CONVERSATION)):
        part = template_ids(tokenizer, CONVERSATION[:count])
        assert whole[: len(part)] == part
        if CONVERSATION[count]["role"] == "assistant":
            opened = template_ids(tokenizer, CONVERSATION[:count], generate=True)
            assert whole[: len(opened)] == opened


def test_corpus_encoding_is_the_templates_and_its_loss_is_on_the_assistant(tokenizer):
    ids, labels = encode(tokenizer, CONVERSATION)
    assert ids == template_ids(tokenizer, CONVERSATION)
    masked = tokenizer.apply_chat_template(
        list(CONVERSATION), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert [label != -100 for label in labels] == [bool(bit) for bit in masked["assistant_masks"]]
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))


def test_corpus_is_reproducible_and_holds_every_kind():
    mix = SKILLS.mix
    documents = sample(mix, count=400, seed=7)
    assert documents == sample(mix, count=400, seed=7)
    assert documents != sample(mix, count=400, seed=8)
    assert {isinstance(document, str) for document in documents} == {True, False}
    assert set(PAGES) == set(SOURCES)


def test_corpus_shows_no_held_out_problem():
    heldout = {
        t.prompt[-1]["content"] for name in ("math", "code", "writing") for t in SOURCES[name].heldout(count=200)
    }
    seen = [d[0]["content"] for d in sample(SKILLS.mix, count=3000, seed=0) if not isinstance(d, str)]
    assert not heldout & set(seen)


@pytest.mark.parametrize("right", [0.0, 1.0])
def test_the_share_of_right_answers_is_what_the_mix_says(right):
    documents = sample(Mix(shares={"math": 1.0}, right=right, refused=0.0), count=200, seed=1)
    for question, reply in documents:
        expression = re.search(r"problem: (.*) =", question["content"])[1]
        total = sum(int(sign + number) for sign, number in re.findall(r"([+-]?) ?(\d+)", expression))
        assert (int(reply["content"]) == total) is bool(right)


def test_judge_examples_are_true_and_in_the_line_dialect():

    rng = random.Random(0)
    labels = []
    for _ in range(400):
        question, reply = judging(rng)
        head, text, criterion = question["content"].split("\n")
        verdict = parse_line_reply(reply["content"], head.removeprefix("Judge "))
        (topic,) = re.fullmatch(r"Criterion: The text is about (.*)\.", criterion).groups()
        on_topic = set(TOPICS[topic]) & set(re.findall(r"[a-z]+", text.lower()))
        assert (verdict.label == "met") is bool(on_topic)
        assert verdict.evidence in text
        assert not on_topic or verdict.evidence.lower() in on_topic
        labels.append(verdict.label)
    assert 0.3 < labels.count("met") / len(labels) < 0.6


def test_schedule_warms_up_and_decays():
    phase = replace(SKILLS, num_steps=100, warmup_steps=10)
    values = [schedule(phase, step) for step in range(100)]
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] == 0.03


def test_training_twice_gives_the_same_checkpoint(tmp_path):
    phases = tuple(replace(phase, num_steps=3) for phase in TinyBase().phases)
    base = TinyBase(hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, phases=phases, batch_rows=2)
    for name in ("one", "two"):
        build(base, tmp_path / name)
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert (tmp_path / "one" / "tokenizer.json").read_text() == (tmp_path / "two" / "tokenizer.json").read_text()


def test_shipped_model_judges_reliably(tokenizer):

    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    rng = random.Random(5)
    right = 0
    for _ in range(60):
        question, reply = judging(rng)
        prompt = torch.tensor([template_ids(tokenizer, [question], generate=True)])
        with torch.no_grad():
            out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16,
                                 do_sample=False, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        right += tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True) == reply["content"]
    assert right >= 52
