"""Rubrics of other projects: every row comes back as it was, means the same here, or is refused with its line."""

from __future__ import annotations

import asyncio
import copy
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from posttrain.types import Message
from rewards.cli import main
from rewards.formats import FORMATS
from rewards.rows import rollout_of
from rewards.rubric import Rubric, RubricReward, TaskRubric, dump_rubric
from rewards.rubric_file import dump_toml

HEALTHBENCH = [
    {
        "example_tags": ["theme:hedging", "physician_agreed_category:enough-context"],
        "ideal_completions_data": {
            "ideal_completion": "Cool the burn under running water for 20 minutes.",
            "ideal_completions_group": 2,
            "ideal_completions_ref_completions": ["Use butter.", "Run it under water."],
        },
        "prompt": [
            {"role": "user", "content": "I burnt my hand on a pan, what now?"},
            {"role": "assistant", "content": "How large is it?"},
            {"role": "user", "content": "A coin, maybe \u2028 two."},
        ],
        "prompt_id": "6c3a7ab0-77f1-4b6b-9cb0-1d6f3e1f6a11",
        "rubrics": [
            {
                "criterion": "Tells the user to cool the burn under running water for 20 minutes.",
                "points": 9,
                "tags": ["level:example", "axis:accuracy"],
            },
            {
                "criterion": "Recommends butter, toothpaste or another home remedy on the burn.",
                "points": -8,
                "tags": ["level:example", "axis:accuracy"],
            },
            {
                "criterion": "Says when a burn needs a doctor {size}.",
                "points": 5,
                "tags": ["level:cluster", "axis:completeness"],
            },
        ],
        "canary": "healthbench:0000",
    },
    {
        "example_tags": [],
        "ideal_completions_data": None,
        "prompt": [{"role": "user", "content": "Can I take two aspirin?"}],
        "prompt_id": "b",
        "rubrics": [{"criterion": "Asks about other medication.", "points": 2.5, "tags": []}],
        "canary": "healthbench:0000",
    },
]
RAR = [
    {
        "question": "Which scan shows a ureteral stone best?",
        "reference_answer": "A non-contrast helical CT scan.",
        "question_source": "made-up",
        "rubric": [
            {
                "title": "Names The Scan",
                "description": "Essential Criteria: Names a non-contrast helical CT as the best scan.",
                "weight": 5,
            },
            {
                "title": "Says Why",
                "description": "Important: Explains that stones show up without contrast.",
                "weight": 3,
            },
            {
                "title": "Names Ultrasound",
                "description": "Optional Criteria: Mentions ultrasound in pregnancy.",
                "weight": 1,
            },
            {"title": "Wrong Scan", "description": "Pitfall Criteria: Recommends an X-ray first.", "weight": -2},
            {"title": "No Prefix", "description": "essential: keeps to the question", "weight": 2},
        ],
        "rubric_count": 5,
    }
]
NEGATED = {
    "question": "q",
    "rubric": [
        {"title": "Stone", "description": "Essential: Names the stone.", "weight": 5},
        {"title": "Contrast", "description": "Pitfall: Does not mention that contrast is not needed.", "weight": -1},
    ],
}
SCORES = {
    f"score{i}_description": f"The reply is {word}."
    for i, word in enumerate(("rude", "cold", "flat", "warm", "kind"), 1)
}
PROMETHEUS = [
    {
        "instruction": "Comfort a friend.",
        "response": "I am here.",
        "reference_answer": "I am so sorry, tell me more.",
        "criteria": "Does the reply show empathy?",
        **SCORES,
    },
    {
        "orig_instruction": "Comfort a friend.",
        "orig_response": "Fine.",
        "orig_reference_answer": "I am so sorry.",
        "orig_criteria": "Does the reply show empathy?",
        **{f"orig_{key}": text for key, text in SCORES.items()},
        "orig_feedback": "It is cold.",
        "orig_score": "2",
        "instruction": "###Task Description: ...",
        "output": "It is cold. [RESULT] 2",
    },
    {"criteria": "Is it kind?", **SCORES},
]
VERIFIERS = [
    {
        "criteria": [
            {"name": "evidence", "text": "Does every claim cite a source?"},
            {"name": "tone of voice", "text": "How is the tone?", "choices": ["rude", "neutral", "kind"], "weight": 2},
            {"name": "brief", "text": "Is it to the point?", "weight": 1, "choices": ["no", "yes"]},
            {"name": "extra", "text": "Is it fun?", "weight": 0},
        ]
    }
]
ROWS = [
    (name, row)
    for name, rows in (("healthbench", HEALTHBENCH), ("rar", RAR), ("prometheus", PROMETHEUS), ("verifiers", VERIFIERS))
    for row in rows
]


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_every_row_comes_back_as_it_was(name: str, row: dict[str, Any]) -> None:
    original = copy.deepcopy(row)
    ours = json.loads(json.dumps(FORMATS[name].read(row)))
    assert FORMATS[name].write(ours) == original == row


class Says:
    """A judge that gives each criterion the label its text is mapped to."""

    def __init__(self, **labels: str) -> None:
        self.labels = labels

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        criterion = json.loads(messages[1]["content"])["criterion"]
        nonce = messages[0]["content"].split('"n": "')[1].split('"')[0]
        row = {"id": criterion["id"], "evidence": "", "verdict": self.labels[criterion["id"]]}
        return json.dumps({"n": nonce, "verdicts": [row]})


def value(ours: dict[str, Any], **labels: str) -> float | None:
    row = {"prompt": ours.get("prompt", ""), "response": "Some words.", "info": {"rubric": ours["rubric"]}}
    reward = RubricReward(TaskRubric(), Says(**labels))
    return asyncio.run(reward.score(rollout_of(row, default_id="r"))).value


@pytest.mark.parametrize(
    ("met", "expected"), [("1", 9 / 14), ("12", 1 / 14), ("2", -8 / 14), ("13", 1.0), ("123", 6 / 14), ("", 0.0)]
)
def test_healthbench_scores_are_points_met_over_positive_points(met: str, expected: float) -> None:
    ours = FORMATS["healthbench"].read(HEALTHBENCH[0])
    verdicts = {f"c{i}": "met" if str(i) in met else "unmet" for i in (1, 2, 3)}
    assert value(ours, **verdicts) == pytest.approx(expected)


def test_rar_keeps_tiers_signs_and_titles() -> None:
    criteria = Rubric.of_data(FORMATS["rar"].read(RAR[0])["rubric"], "here").criteria
    assert [c.tier for c in criteria] == ["essential", "important", "optional", "pitfall", None]
    assert [(c.polarity, c.weight) for c in criteria[2:4]] == [("reward", 1.0), ("penalty", 2.0)]
    assert criteria[0].text == "Names a non-contrast helical CT as the best scan."
    assert criteria[0].title == "Names The Scan"


def test_a_negated_pitfall_is_for_a_person_to_decide() -> None:
    rar = FORMATS["rar"]
    with pytest.raises(ValueError, match=r"rubric\[1\] has weight -1 and is worded as a negation.*--pitfalls"):
        rar.read(NEGATED)
    avoidance, penalty = rar.read(NEGATED, "avoidance"), rar.read(NEGATED, "penalty")
    assert value(avoidance, c1="met", c2="met") == 1.0
    assert value(avoidance, c1="met", c2="unmet") == pytest.approx(5 / 6)
    assert value(penalty, c1="met", c2="met") == pytest.approx(4 / 5)
    assert rar.write(avoidance) == rar.write(penalty) == NEGATED


def test_prometheus_is_a_scale_of_five_with_descriptions() -> None:
    ours = FORMATS["prometheus"].read(PROMETHEUS[0])
    criterion = Rubric.of_data(ours["rubric"], "here").criteria[0]
    assert criterion.claim.split("\n")[:2] == ["Does the reply show empathy?", "1: The reply is rude."]
    assert [value(ours, c1=score) for score in "135"] == [0.0, 0.5, 1.0]


def test_verifiers_choices_and_weights() -> None:
    ours = FORMATS["verifiers"].read(VERIFIERS[0])
    got = value(ours, evidence="met", c2="neutral", brief="no", extra="met")
    assert got == pytest.approx((1 + 2 * 0.5 + 0) / 4)


def changed(row: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**row, **changes}


REFUSED = [
    ("healthbench", changed(HEALTHBENCH[0], rubrics=[]), "not empty"),
    (
        "healthbench",
        changed(HEALTHBENCH[0], rubrics=[{"criterion": "x", "points": -3, "tags": []}]),
        "no item has positive",
    ),
    ("healthbench", changed(HEALTHBENCH[0], rubrics=[{"criterion": "x", "points": "5", "tags": []}]), "finite number"),
    ("healthbench", changed(HEALTHBENCH[0], rubrics=[{"criterion": " ", "points": 5, "tags": []}]), "expected a text"),
    ("healthbench", changed(HEALTHBENCH[0], rubrics=[{"criterion": "x", "points": 5}]), "expected exactly"),
    ("healthbench", changed(HEALTHBENCH[0], rubrics=[{"criterion": "x", "points": True, "tags": []}]), "finite number"),
    ("rar", changed(RAR[0], rubric_count=4), "rubric_count is 4"),
    (
        "rar",
        {"question": "q", "rubric": [{"title": "t", "description": "Pitfall: Names a fee.", "weight": 2}]},
        "pitfall that earns",
    ),
    (
        "rar",
        {"question": "q", "rubric": [{"title": None, "description": "Names a fee.", "weight": 2}]},
        "come back changed",
    ),
    ("prometheus", {"criteria": "Kind?", "score1_description": "no"}, "score2_description"),
    ("verifiers", {"criteria": [{"name": "a", "text": "A?", "weight": -1}]}, "greater than or equal to 0"),
    ("verifiers", {"criteria": [{"name": "a", "text": "A?", "hint": "x"}]}, "expected name, text, weight, choices"),
]


@pytest.mark.parametrize(("name", "row", "message"), REFUSED)
def test_what_does_not_fit_is_refused(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        FORMATS[name].read(row)


def test_what_another_format_cannot_say_is_refused() -> None:
    rubric = dump_rubric(Rubric.load("support_reply"))
    for name in FORMATS:
        with pytest.raises(ValueError, match=r"place|Prometheus|no fields"):
            FORMATS[name].write({"prompt": "q", "rubric": rubric})
    evidence = {"id": "r", "criteria": [{"id": "a", "text": "Names a price.", "evidence": True}]}
    with pytest.raises(ValueError, match="no place for all that criterion a says"):
        FORMATS["healthbench"].write({"prompt": [], "rubric": evidence})


@pytest.mark.parametrize("name", ["one_line", "support_reply"])
def test_a_rubric_written_as_toml_is_the_same(name: str) -> None:
    rubric = Rubric.load(name)
    assert Rubric.parse("again.toml", dump_toml(dump_rubric(rubric))) == rubric


@pytest.mark.parametrize("text", ['a "b" \\ c', "tab\tand\nline", "\x00\x1f\x7f\u2028\U0001f600", "'''"])
def test_any_text_survives_toml(text: str) -> None:
    data = {"a": text, "b": [text], "odd key": 1, "t": {text: text}, "l": [{"x": {"y": text}}, {"x": True}]}
    assert tomllib.loads(dump_toml(data)) == data


def test_the_command_line_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, ours, back = (tmp_path / name for name in ("in.jsonl", "ours.jsonl", "back.jsonl"))
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in HEALTHBENCH), encoding="utf-8")
    assert main(["convert", "--from", "healthbench", str(source), str(ours)]) == 0
    assert main(["convert", "--to", "healthbench", str(ours), str(back)]) == 0
    assert [json.loads(line) for line in back.read_text(encoding="utf-8").split("\n") if line] == HEALTHBENCH
    assert main(["lint", str(ours)]) == 0
    capsys.readouterr()


def test_the_command_line_names_the_lines_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, ours = tmp_path / "in.jsonl", tmp_path / "ours.jsonl"
    source.write_text(f"{json.dumps(RAR[0])}\n{json.dumps(NEGATED)}\n")
    command = ["convert", "--from", "rar", str(source), str(ours)]
    assert main(command) == 1
    assert f"{source}:2: rubric[1] has weight -1" in capsys.readouterr().err
    assert not ours.exists()
    assert main([*command, "--skip"]) == 0
    assert len(ours.read_text().splitlines()) == 1
    assert main([*command, "--pitfalls", "avoidance"]) == 0
    assert len(ours.read_text().splitlines()) == 2


def test_what_cannot_be_written_is_refused_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, ours = tmp_path / "in.jsonl", tmp_path / "ours.jsonl"
    half = json.dumps(RAR[0] | {"question": "\ud800"})
    source.write_text(f"{json.dumps(RAR[0])}\n{half}\n")
    assert main(["convert", "--from", "rar", str(source), str(ours)]) == 1
    assert f"{source}:2: 'utf-8' codec can't encode" in capsys.readouterr().err
    assert not ours.exists()


def test_a_verifiers_file_there_and_back(tmp_path: Path) -> None:
    source, ours, back = (tmp_path / name for name in ("in.toml", "ours.toml", "back.json"))
    source.write_text(dump_toml(VERIFIERS[0]))
    assert main(["convert", "--from", "verifiers", str(source), str(ours)]) == 0
    assert Rubric.load(ours).criteria[1].title == "tone of voice"
    assert main(["convert", "--to", "verifiers", str(ours), str(back)]) == 0
    assert json.loads(back.read_text()) == VERIFIERS[0]
    assert main(["convert", "--from", "verifiers", str(tmp_path / "none.toml"), str(ours)]) == 2
