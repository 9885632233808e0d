"""Stop rules on the tokens of real tokenizers: strings over many tokens, characters in pieces, bounded work."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoTokenizer

from posttrain.engine.stopping import StopRule
from posttrain.types import FinishReason, Sampling
from tests.tiny_models import END, spell, tiny_tokenizer

TINY_BASE = AutoTokenizer.from_pretrained(str(files("recipes") / "tiny"))
TEXT = "Café 東京: 12 + 30 = 42 😀\nSo the answer is 42.\n\nObservation: none"


def stopped_after(rule: StopRule, sampling: Sampling, token_ids: list[int]) -> int | None:
    """Tokens of the completion when it was over."""
    for count in range(1, len(token_ids) + 1):
        if rule.finish(sampling, token_ids[:count]) is FinishReason.STOP:
            return count
    return None


@pytest.mark.parametrize("stop", ["42", "é 東", "京", "😀", "\n\nObs", "answer is 42.\n\nObservation:", "none", "Caf"])
@pytest.mark.parametrize("spelled", [True, False])
def test_a_stop_string_ends_the_completion_with_the_token_that_completes_it(stop: str, spelled: bool) -> None:
    decode = tiny_tokenizer().decode if spelled else TINY_BASE.decode
    token_ids = spell(TEXT) if spelled else TINY_BASE.encode(TEXT, add_special_tokens=False)
    assert decode(token_ids) == TEXT
    expected = next(n for n in range(1, len(token_ids) + 1) if stop in decode(token_ids[:n]))
    rule = StopRule([END], decode)
    assert stopped_after(rule, Sampling(stop=("never", stop)), token_ids) == expected
    assert stopped_after(rule, Sampling(stop=("never",)), token_ids) is None


def test_a_run_of_byte_tokens_that_is_cut_inside_a_character() -> None:
    """Byte fallback, as in Llama 2: one byte too few and the whole run decodes to replacement characters."""
    core = Tokenizer(BPE(vocab={f"<0x{byte:02X}>": byte for byte in range(256)}, merges=[], byte_fallback=True))
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    token_ids = list(("東京" * 20 + "大").encode())
    assert "京" not in core.decode(list("東京".encode())[1:])
    for stop, text in (("大", "東京" * 20 + "大"), ("京東", "東京東"), ("京東京東京", "東京東京東京")):
        assert stopped_after(StopRule([], core.decode), Sampling(stop=(stop,)), token_ids) == len(text.encode())


def test_stop_tokens_of_the_model_and_of_the_request() -> None:
    rule = StopRule([END])
    assert rule.finish(Sampling(), []) is None
    assert stopped_after(rule, Sampling(), [9, 8, END]) == 3
    assert stopped_after(rule, Sampling(stop_token_ids=(8, 11)), [9, 8, END]) == 2
    assert stopped_after(rule, Sampling(), [9, 8]) is None


def test_work_per_token_does_not_grow_with_the_completion() -> None:
    decoded: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        decoded.append(len(token_ids))
        return str(TINY_BASE.decode(token_ids))

    token_ids = TINY_BASE.encode("water and stone " * 300, add_special_tokens=False)
    assert stopped_after(StopRule([], decode), Sampling(stop=("\n\nUser:",)), token_ids) is None
    assert max(decoded) < 20
    assert len(decoded) == len(token_ids)


def test_stop_strings_need_a_decoder() -> None:
    sampling = Sampling(stop=("END",))
    with pytest.raises(ValueError, match=r"Sampling.stop = \('END',\), but this engine was given no tokenizer"):
        StopRule([END]).check(sampling)
    with pytest.raises(ValueError, match="stop_token_ids"):
        StopRule([END]).finish(sampling, [9])
