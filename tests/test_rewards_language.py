"""Languages are told apart, and staying in one is rewarded letter by letter."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from posttrain.errors import RecipeError
from posttrain.types import Score, Task
from rewards.controls import Case
from rewards.language import LanguageReward, detect_language, in_language, prose_of, share_in_language

SENTENCES = {
    "en": "In the evening the boats return to the harbour and the fishermen sell their catch.",
    "de": "Am Abend kehren die Boote in den Hafen zur\u00fcck und die Fischer verkaufen ihren Fang.",
    "fr": "Le soir, les bateaux rentrent au port et les p\u00eacheurs vendent leurs poissons.",
    "es": "Por la noche los barcos regresan al puerto y los pescadores venden su pescado.",
    "vi": "H\u00f4m nay tr\u1eddi \u0111\u1eb9p qu\u00e1, ch\u00fang t\u00f4i \u0111i ra b\u1ebfn c\u1ea3ng.",
    "sw": "Jioni mashua hurudi bandarini na wavuvi huuza samaki wao sokoni.",
    "ru": "\u0412\u0435\u0447\u0435\u0440\u043e\u043c \u043b\u043e\u0434\u043a\u0438 "
    "\u0432\u043e\u0437\u0432\u0440\u0430\u0449\u0430\u044e\u0442\u0441\u044f \u0432 "
    "\u0433\u0430\u0432\u0430\u043d\u044c.",
    "hi": "\u092f\u0939 \u0935\u093e\u0915\u094d\u092f \u0939\u093f\u0902\u0926\u0940 \u092e\u0947\u0902 "
    "\u0932\u093f\u0916\u093e \u0917\u092f\u093e \u0939\u0948 \u0914\u0930 \u092c\u0939\u0941\u0924 "
    "\u0938\u0930\u0932 \u0939\u0948, \u0909\u0938\u092e\u0947\u0902 \u0915\u0941\u091b \u0928\u0939\u0940\u0902",
    "mr": "\u0939\u0947 \u0935\u093e\u0915\u094d\u092f \u092e\u0930\u093e\u0920\u0940\u0924 "
    "\u0932\u093f\u0939\u093f\u0932\u0947 \u0906\u0939\u0947 \u0906\u0923\u093f \u0924\u0947 "
    "\u0916\u0942\u092a \u0938\u094b\u092a\u0947 \u0906\u0939\u0947, "
    "\u0924\u094d\u092f\u093e\u0924 \u0915\u093e\u0939\u0940 \u0928\u093e\u0939\u0940",
    "fa": "\u0627\u06cc\u0646 \u06cc\u06a9 \u0645\u062a\u0646 \u0641\u0627\u0631\u0633\u06cc "
    "\u0627\u0633\u062a \u06a9\u0647 \u0646\u0648\u0634\u062a\u0647 \u0634\u062f\u0647 \u0627\u0633\u062a",
    "zh": "\u6e2f\u53e3\u4f4d\u4e8e\u57ce\u5e02\u7684\u5c3d\u5934"
    "\u665a\u4e0a\u8239\u53ea\u90fd\u8fd4\u56de\u6e2f\u53e3\u6e14\u6c11\u56de\u5bb6",
    "ja": "\u3053\u308c\u306f\u65e5\u672c\u8a9e\u306e\u6587\u3067\u3059",
    "ko": "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4",
    "kn": "\u0c87\u0ca6\u0cc1 \u0c95\u0ca8\u0ccd\u0ca8\u0ca1",
    "pa": "\u0a07\u0a39 \u0a2a\u0a70\u0a1c\u0a3e\u0a2c\u0a40 \u0a39\u0a48",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_in_its_language_and_in_no_other(language: str) -> None:
    sentence = SENTENCES[language]
    assert detect_language(sentence) == language
    assert [other for other in SENTENCES if in_language(sentence, other)] == [language]


def test_capitals_change_no_language() -> None:
    for language in ("en", "de", "fr"):
        assert in_language(SENTENCES[language].upper(), language)


def test_a_text_without_letters_is_in_no_language() -> None:
    for text in ("", "42", "!?", "\U000e0041\U000e0042"):
        assert detect_language(text) is None
        assert not in_language(text, "en")
        assert share_in_language(text, "en") is None


def test_every_letter_of_another_writing_system_counts() -> None:
    mixed = SENTENCES["en"] + " " + SENTENCES["zh"]
    share = share_in_language(mixed, "en")
    english = sum(map(str.isalpha, SENTENCES["en"]))
    assert share == pytest.approx(english / (english + len(SENTENCES["zh"])))


def test_sentences_of_another_language_with_the_same_letters_count() -> None:
    mixed = f"{SENTENCES['en']}\n{SENTENCES['de']}"
    share = share_in_language(mixed, "en")
    assert share is not None
    assert 0.4 < share < 0.6


def test_code_formulas_and_addresses_do_not_count() -> None:
    text = (
        f"{SENTENCES['de']}\n```python\nfor boat in harbour: print('the boat')\n```\n$x^2$ https://example.org/the-boat"
    )
    assert share_in_language(prose_of(text), "de") == 1.0


def grade(text: str, reward: LanguageReward, **info: Any) -> Score:
    task = Task(id="t", domain="d", prompt=(), info=info)
    return asyncio.run(reward.score(Case(task=task, reference="").rollout(text)))


def test_reward_takes_the_tasks_language_before_its_own() -> None:
    reward = LanguageReward(language="en")
    assert grade(SENTENCES["de"], reward).value == 0.0
    assert grade(SENTENCES["de"], reward, language="de").value == 1.0
    assert grade("42", reward).value == 0.0
    assert grade("A boat.", reward).value == 0.0
    assert grade("A boat.", LanguageReward(language="en", min_letters=5)).value == 1.0
    assert grade(f"{SENTENCES['en']}\n{SENTENCES['de']}", LanguageReward(language="en", threshold=0.9)).value == 0.0
    assert grade(f"<think>{SENTENCES['zh']}</think>{SENTENCES['en']}", reward).value < 1.0
    seen = LanguageReward(language="en", visible_only=True)
    assert grade(f"<think>{SENTENCES['zh']}</think>{SENTENCES['en']}", seen).value == 1.0


@pytest.mark.parametrize("language", [None, "xx", "english", 3])
def test_an_unknown_language_is_a_recipe_error(language: Any) -> None:
    with pytest.raises(RecipeError, match="language"):
        grade("The boats return.", LanguageReward(), language=language)
