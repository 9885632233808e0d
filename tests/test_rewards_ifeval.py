"""IFEval's checks agree with labels given by hand, several for every kind, and run over the published rows."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import RecipeError
from posttrain.types import Score, Task
from rewards.checks import CHECKS
from rewards.controls import Case
from rewards.ifeval import INSTRUCTIONS, IFEvalReward, count_sentences, follows, follows_loosely, loosened

DATA = Path(__file__).parents[2] / "shared" / "data" / "ifeval.jsonl"

ENGLISH = "the boats come back to the harbour in the evening and the fishermen sell what they have caught"
LABELLED: list[tuple[str, dict[str, Any], str, bool]] = [
    ("keywords:existence", {"keywords": ["harbour", "boat"]}, "A Boat left the harbour.", True),
    ("keywords:existence", {"keywords": ["harbour", "boat"]}, "A ship left the harbour.", False),
    ("keywords:existence", {"keywords": ["c++"]}, "I write C++ at work.", True),
    ("keywords:existence", {"keywords": ["a.c"]}, "abc", False),
    ("keywords:frequency", {"keyword": "boat", "frequency": 2, "relation": "at least"}, "Boat, boat.", True),
    ("keywords:frequency", {"keyword": "boat", "frequency": 2, "relation": "at least"}, "One boat.", False),
    ("keywords:frequency", {"keyword": "boat", "frequency": 2, "relation": "less than"}, "One boat.", True),
    ("keywords:frequency", {"keyword": "boat", "frequency": 2, "relation": "less than"}, "Boat, boat.", False),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "A rocket flies.", True),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "Rock and roll.", False),
    ("keywords:forbidden_words", {"forbidden_words": ["field", "rock"]}, "A stone, a (rock).", False),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "Zigzag", True),
    ("keywords:letter_frequency", {"letter": "z", "let_frequency": 3, "let_relation": "at least"}, "Zigzag", False),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "less than"}, "# one", True),
    ("keywords:letter_frequency", {"letter": "!", "let_frequency": 1, "let_relation": "less than"}, "Oh!", False),
    ("language:response_language", {"language": "de"}, "Am Abend kehren die Boote in den Hafen zur\u00fcck.", True),
    ("language:response_language", {"language": "de"}, "In the evening the boats return to the harbour.", False),
    ("language:response_language", {"language": "kn"}, "\u0c87\u0ca6\u0cc1 \u0c95\u0ca8\u0ccd\u0ca8\u0ca1", True),
    ("language:response_language", {"language": "ko"}, "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4", True),
    ("language:response_language", {"language": "ko"}, "\u3053\u308c\u306f\u65e5\u672c\u8a9e\u3067\u3059", False),
    (
        "language:response_language",
        {"language": "ru"},
        "\u042d\u0442\u043e \u043f\u0440\u0435\u0434\u043b\u043e\u0436\u0435\u043d\u0438\u0435 "
        "\u043d\u0430\u043f\u0438\u0441\u0430\u043d\u043e \u043f\u043e-\u0440\u0443\u0441\u0441\u043a\u0438.",
        True,
    ),
    ("language:response_language", {"language": "sw"}, "Habari ya asubuhi rafiki yangu mpendwa", True),
    ("language:response_language", {"language": "sw"}, "12345", False),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}, "One. Two! Three?", True),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}, "One. Two is it", False),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "I met Dr. No. He left.",
        True,
    ),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "One. Two.", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\nOne.\n***\nTwo.\n***", True),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n\nTwo.", False),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\n***\nTwo.", False),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two three", True),
    ("length_constraints:number_words", {"num_words": 4, "relation": "at least"}, "one two -- three", False),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "one, two", True),
    ("length_constraints:number_words", {"num_words": 2, "relation": "less than"}, "one two", False),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "boats"},
        'It is late.\n\n"Boats, all of them," he said.',
        True,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "boats"},
        "Boats come.\n\nIt is late.",
        False,
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "boats"},
        "Boats come.\n\nIt is late.\n\nThree.",
        False,
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], see [place].", True),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], see (place).", False),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "Nothing: []", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\n\nP.S. Bring tea.", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\n\np. s. bring tea", True),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye. The caps are new.", False),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\n\nP.S.", False),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.S. Tea.\nP.P.S. Milk.", True),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.S. Tea.", False),
    ("detectable_format:constrained_response", {}, "I think so. My answer is yes.", True),
    ("detectable_format:constrained_response", {}, "Yes.", False),
    ("detectable_format:constrained_response", {}, "My answer is yes. My answer is no.", False),
    ("detectable_format:json_format", {}, '```json\n{"boats": [1, 2]}\n```', True),
    ("detectable_format:json_format", {}, "[1, 2]", True),
    ("detectable_format:json_format", {}, "{'boats': 1}", False),
    ("detectable_format:json_format", {}, 'Here: {"boats": 1}', False),
    ("detectable_format:json_format", {}, "7", False),
    ("detectable_format:json_format", {}, "[" * 100_000, False),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\nA\nSECTION 2\nB",
        True,
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\nA\nB",
        False,
    ),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 1}, "Section one", False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* One\n- Two", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* One\n* Two\n* Three", False),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "**Bold**\n---\n- One", True),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "1. One", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", True),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and ** **", False),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "* a bullet\n* another", False),
    ("detectable_format:title", {}, "<<Boats>>\nThey come.", True),
    ("detectable_format:title", {}, "<Boats>\nThey come.", False),
    ("detectable_format:title", {}, "<< >>\nThey come.", False),
    ("combination:two_responses", {}, "One way.\n******\nAnother way.", True),
    ("combination:two_responses", {}, "One way.\n******\nOne way.", False),
    ("combination:two_responses", {}, "One way.", False),
    ("combination:two_responses", {}, "A\n******\nB\n******\nC", False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a boat."}, "name a boat.\n\nThe Argo.", True),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a boat."}, "The Argo.", False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a boat."}, "Sure! Name a boat. The Argo.", False),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Name a boat."}, "Name a boat.", False),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, "That is all. Any questions?", True),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, '"That is all. any questions?"\n', True),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, "Any questions? No.", False),
    ("startend:quotation", {}, '"All of it."', True),
    ("startend:quotation", {}, '"Some" of it.', False),
    ("startend:quotation", {}, '"', False),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA and I went.",
        True,
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "NASA went.",
        False,
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "NASA went.",
        True,
    ),
    ("change_case:capital_word_frequency", {"capital_frequency": 1, "capital_relation": "less than"}, "A-Z", False),
    ("change_case:english_capital", {}, ENGLISH.upper(), True),
    ("change_case:english_capital", {}, ENGLISH, False),
    ("change_case:english_capital", {}, "DIE BOOTE KEHREN AM ABEND IN DEN HAFEN ZUR\u00dcCK", False),
    ("change_case:english_lowercase", {}, ENGLISH, True),
    ("change_case:english_lowercase", {}, ENGLISH.capitalize(), False),
    ("change_case:english_lowercase", {}, "die boote kehren am abend in den hafen zur\u00fcck", False),
    ("punctuation:no_comma", {}, "No pause here.", True),
    ("punctuation:no_comma", {}, "Here, a pause.", False),
    ("punctuation:no_comma", {}, "It costs 1,000 dollars.", False),
]


@pytest.mark.parametrize(("instruction", "arguments", "text", "expected"), LABELLED)
def test_checks_agree_with_labels_given_by_hand(
    instruction: str, arguments: dict[str, Any], text: str, expected: bool
) -> None:
    assert follows(text, instruction, arguments) is expected


def test_every_kind_has_both_outcomes_and_serves_in_rubrics() -> None:
    labels: dict[str, set[bool]] = {}
    for instruction, _, _, expected in LABELLED:
        labels.setdefault(instruction, set()).add(expected)
    assert labels == {name: {True, False} for name in INSTRUCTIONS}
    assert len(INSTRUCTIONS) == 25
    assert all(CHECKS[f"ifeval:{name}"] is check for name, check in INSTRUCTIONS.items())


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("...", 0),
        ("No end", 1),
        ("Dr. Smith met Mr. Jones. They talked.", 2),
        ("It costs 3.50 dollars. Really?! Yes.", 3),
        ('He said "Stop." Then he left.', 2),
        ("We use e.g. boats and cars, etc. and more.", 1),
        ("J. R. Smith came. He saw.", 2),
        ("Wait... what? Yes.", 2),
        ("One.\nTwo.\n\n- Three", 3),
        ("\u4eca\u5929\u5f88\u597d\u3002\u660e\u5929\u89c1\uff01", 2),
    ],
)
def test_sentences_are_counted_by_their_ends(text: str, count: int) -> None:
    assert count_sentences(text) == count


def test_loose_mode_forgives_an_introduction_a_closing_line_and_asterisks() -> None:
    body = '"All of it."'
    assert not follows(f"Sure, here it is:\n{body}\nEnjoy!", "startend:quotation", {})
    assert follows_loosely(f"Sure, here it is:\n{body}\nEnjoy!", "startend:quotation", {})
    assert follows_loosely(f"*{body}*", "startend:quotation", {})
    assert not follows_loosely("Sure.\nAll of it.\nEnjoy!", "startend:quotation", {})
    assert len(list(loosened("a\nb"))) == 8


def grade(text: str, reward: IFEvalReward | None = None, **info: Any) -> Score:
    info = {"instruction_id_list": ["punctuation:no_comma", "detectable_format:title"], "kwargs": [{}, {}], **info}
    task = Task(id="t", domain="writing", prompt=(), info=info)
    return asyncio.run((reward or IFEvalReward()).score(Case(task=task, reference="").rollout(text)))


def test_reward_has_the_four_scores_of_the_benchmark() -> None:
    score = grade("Sure, here:\n<<Boats>>\nThey come.")
    assert score.value == 0.0
    assert score.parts == {
        "0/punctuation:no_comma": 0.0,
        "1/detectable_format:title": 1.0,
        "prompt_strict": 0.0,
        "instruction_strict": 0.5,
        "prompt_loose": 1.0,
        "instruction_loose": 1.0,
    }
    assert "punctuation:no_comma" in score.explanation
    assert grade("Sure, here:\n<<Boats>>\nThey come.", IFEvalReward(mode="loose")).value == 1.0
    assert grade("Sure, here:\n<<Boats>>\nThey come.", IFEvalReward(partial=True)).value == 0.5
    assert grade("<<Boats>>\nThey come.").value == 1.0


def test_thinking_is_not_the_response() -> None:
    assert grade("<think>a, b</think>\n<<Boats>>\nThey come.").value == 1.0
    assert grade("<think>\n<<Boats>>\nThey come.").value == 0.0


@pytest.mark.parametrize(
    "info",
    [
        {"instruction_id_list": ["punctuation:no_comma"]},
        {"instruction_id_list": ["no:such_kind", "detectable_format:title"]},
        {"instruction_id_list": []},
        {"kwargs": [{"count": 3}, {}]},
        {
            "instruction_id_list": ["keywords:frequency"],
            "kwargs": [{"keyword": "a", "frequency": 1, "relation": "some"}],
        },
    ],
)
def test_unusable_tasks_are_a_recipe_error(info: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        grade("<<Boats>>", **info)


def test_arguments_that_are_none_are_left_out() -> None:
    assert follows("No pause.", "punctuation:no_comma", {"num_words": None, "relation": None})


@pytest.mark.skipif(not DATA.is_file(), reason="shared/data/ifeval.jsonl is not beside the checkout")
def test_published_rows_are_graded_and_an_echo_is_worth_what_is_said_of_it() -> None:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == 300
    followed = 0
    for row in rows:
        info = {"instruction_id_list": row["instruction_id_list"], "kwargs": row["kwargs"]}
        for text in ("", row["prompt"], "The boats come back, one by one.\n\nP.S. They do."):
            score = grade(text, **info)
            assert score.value is not None
            assert text or score.value == 0.0
            followed += text == row["prompt"] and score.value == 1.0
    # The module's docstring says so: prompts that happen to do what they ask for.
    assert followed == 64
