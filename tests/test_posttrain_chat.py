"""The chat format over a tokenizer built here."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from posttrain.conversation.chat import ChatFormat
from posttrain.errors import RecipeError
from posttrain.types import Message

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}"
    "<|im_end|>{% endfor %}"
)
ASK: list[Message] = [{"role": "user", "content": "2 + 2?"}]
SHOWN: list[Message] = [{"role": "tool", "content": "four\n"}, {"role": "user", "content": "so?"}]


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = template
    return fast


def test_prompt_answer_and_observations_make_the_whole_conversation():
    tokenizer = make_tokenizer()
    chat = ChatFormat(tokenizer)
    answer = tokenizer("four<|im_end|>", add_special_tokens=False)["input_ids"]
    ids = [*chat.encode_prompt(ASK), *answer, *chat.encode_observations(SHOWN)]
    whole: list[Message] = [*ASK, {"role": "assistant", "content": "four"}, *SHOWN]
    assert ids == chat.encode_prompt(whole).tolist()
    assert chat.decode(answer) == "four"


def test_stop_ids_are_the_template_end_and_the_end_of_text():
    tokenizer = make_tokenizer()
    assert ChatFormat(tokenizer).stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    expected = {tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id}
    assert set(ChatFormat(tokenizer).stop_ids) == expected


def test_decode_keeps_text_exactly():
    tokenizer = make_tokenizer()
    text = "  a , b\n\n\u00e9 'x' .\n"
    assert ChatFormat(tokenizer).decode(tokenizer(text)["input_ids"]) == text


def test_fingerprint_follows_vocabulary_and_template():
    base = ChatFormat(make_tokenizer()).fingerprint
    assert ChatFormat(make_tokenizer()).fingerprint == base
    assert ChatFormat(make_tokenizer(CHATML + " ")).fingerprint != base
    bigger = make_tokenizer()
    bigger.add_tokens(["<new>"])
    assert ChatFormat(bigger).fingerprint != base


def test_unusable_templates_are_refused():
    with pytest.raises(RecipeError, match="has no chat template"):
        ChatFormat(make_tokenizer(None))
    with pytest.raises(RecipeError, match="special token that ends it"):
        ChatFormat(make_tokenizer("{% for m in messages %}{{ m['content'] }}\n{% endfor %}"))
    with pytest.raises(RecipeError, match="only appends"):
        ChatFormat(make_tokenizer(FORGETFUL)).encode_observations(SHOWN)
