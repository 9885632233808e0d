"""The linter: every trap is found on its line, and sound rubrics are left in peace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rewards.cli import main
from rewards.lint import lint_file, lint_rubric, lint_scores, lint_text
from rewards.rubric import Rubric

HEAD = 'schema = "rubric/1"\nid = "r"\n'
SOUND = '[[criteria]]\nid = "sound"\ntext = "States the refund window."\n'


def criterion(*lines: str) -> str:
    return "[[criteria]]\n" + "".join(f"{line}\n" for line in lines)


def rules(body: str, **options: object) -> list[tuple[str, int]]:
    return [(found.rule, found.line) for found in lint_text("r.toml", HEAD + body, **options)]  # type: ignore[arg-type]


TRAPS = [
    (criterion('id = "a"', 'text = "Does not name a price."', 'polarity = "penalty"'), "negated-penalty", 9),
    (criterion('id = "a"', 'text = "Avoids naming a price."', 'polarity = "penalty"'), "negated-penalty", 9),
    (criterion('id = "a"', 'text = "Invents a policy."'), "polarity", 8),
    (criterion('id = "a"', 'text = "Names a price."', 'tier = "pitfall"'), "polarity", 9),
    (criterion('id = "a"', 'text = "Is polite and answers the question."'), "compound", 8),
    (criterion('id = "a"', 'text = "Names a price. It also names a date."'), "compound", 8),
    (criterion('id = "a"', 'text = "You should give it 5 points."'), "about-the-judge", 8),
    (criterion('id = "a"', 'text = "Has at most 50 words."'), "countable", 8),
    (criterion('id = "a"', 'text = "Names TODO."'), "placeholder", 8),
    (criterion('id = "a"', 'text = "Names <the price>."'), "placeholder", 8),
    (criterion('id = "a"', 'text = "Names {{price}}."'), "placeholder", 8),
    (criterion('id = "a"', 'text = "Names {the price}."'), "placeholder", 8),
    (criterion('id = "a"', 'text = "Tone."', 'choices = ["Kind", "kind "]'), "unreachable-choice", 9),
    (criterion('id = "a"', 'text = "Tone."', 'choices = ["n/a", "rude", "kind"]'), "unreachable-choice", 9),
    (criterion('id = "a"', 'text = "Tone."', 'choices = ["kind", "rude"]'), "choices-order", 9),
    (criterion('id = "a"', 'text = "Mark."', 'choices = ["3", "2", "1"]'), "choices-order", 9),
    (criterion('id = "a"', 'text = "Threatens."', 'polarity = "penalty"', "veto = true"), "veto-weight", 10),
    (criterion('id = "a"', 'text = "Greets."', "weight = 2", "veto = true"), "veto-weight", 10),
    (criterion('id = "a"', 'text = "Does not swear."', "evidence = true"), "evidence-of-absence", 9),
    (criterion('id = "a"', 'text = "States the refund window!"'), "duplicate", 8),
    (criterion('id = "a"', 'kind = "code"', 'check = "regex"', 'args = { pattern = "(" }'), "check-fails", 10),
    (criterion('id = "a"', 'kind = "code"', 'check = "regex"', "args = { pattern = 3 }"), "check-fails", 10),
    (criterion('id = "a"', 'kind = "code"', 'check = "min_words"', 'args = { count = "3" }'), "check-fails", 10),
    (
        criterion(
            'id = "a"',
            'kind = "code"',
            'check = "ifeval:language:response_language"',
            'args = { language = "english" }',
        ),
        "check-fails",
        10,
    ),
    (
        criterion('id = "a"', 'kind = "code"', 'check = "words_between"', "args = { low = 3, high = 2 }"),
        "never-met",
        10,
    ),
    (
        criterion('id = "a"', 'kind = "code"', 'check = "max_chars"', "args = { count = 99999 }", "weight = 0.5"),
        "constant-answer",
        9,
    ),
]


@pytest.mark.parametrize(("body", "rule", "line"), TRAPS)
def test_each_trap_is_found_on_its_line_and_alone(body: str, rule: str, line: int) -> None:
    assert rules(SOUND + body) == [(rule, line)]


SOUND_CRITERIA = [
    ('text = "States a rule that is not in this policy: {policy}"', 'polarity = "penalty"'),
    ('text = "Fails to answer the question."', 'polarity = "penalty"'),
    ('text = "Gives a date between May and June."',),
    ("text = \"Uses the phrase 'search and rescue'.\"",),
    ('text = "Names no more than one cause."',),
    ('text = "Mood."', 'choices = ["sad", "neutral", "happy"]'),
    ('text = "Threatens somebody."', 'polarity = "penalty"', "veto = true", "weight = 0"),
    ('kind = "code"', 'check = "max_words"', "args = { count = 50 }", "weight = 0.2"),
]


@pytest.mark.parametrize("lines", SOUND_CRITERIA)
def test_sound_criteria_are_left_in_peace(lines: tuple[str, ...]) -> None:
    assert rules(SOUND + criterion('id = "a"', *lines)) == []


@pytest.mark.parametrize("name", ["one_line", "support_reply"])
def test_packaged_rubrics_are_sound(name: str) -> None:
    assert lint_file(name) == []


def test_traps_of_the_whole_rubric() -> None:
    short = criterion('id = "short"', 'kind = "code"', 'check = "max_words"', "args = { count = 10 }", "weight = 3")
    assert rules(SOUND + short) == [("constant-answer", 3), ("length-only", 3)]
    penalty = criterion('id = "lie"', 'text = "States a falsehood."', 'polarity = "penalty"')
    assert rules(penalty) == [("constant-answer", 3)]
    assert rules('[aggregation]\nna = "zero"\n' + SOUND + penalty) == [("unsure-penalty", 3)]


def test_mistakes_are_findings_with_their_lines() -> None:
    assert rules('[[criteria]]\nid = "a"\ntext = "x"\nweigth = 2\n') == [("invalid", 6)]
    assert rules('[[criteria]]\nid = "a"\ntext = "x"\nweight = 0\n') == [("invalid", 1)]
    assert rules("[[criteria]\n") == [("invalid", 3)]
    assert rules('[[criteria]]\nid = "a"\nargs = [') == [("invalid", 5)]


def test_lines_are_right_behind_a_string_that_looks_like_a_table() -> None:
    decoy = criterion('id = "a"', 'text = """', "Names", "[[criteria]]", 'text = "x"', '"""')
    assert rules(decoy + criterion('id = "b"', 'text = "Is kind and honest."')) == [("compound", 12)]


def test_fields_are_checked_where_they_are_known() -> None:
    body = criterion('id = "a"', 'text = "Is about {topic}."') + criterion(
        'id = "b"', 'kind = "code"', 'check = "contains_word"', 'args = { word = "{word}" }'
    )
    assert rules(body) == []
    assert rules(body, fields=["topic", "word"]) == []
    assert rules(body, fields=["topic"]) == [("placeholder", 10)]


def test_a_comment_silences_a_rule_in_its_table_or_everywhere() -> None:
    double = 'text = "Is polite and honest."'
    assert rules(criterion('id = "a"', f"{double} # lint: ignore[compound]") + criterion('id = "b"', double)) == [
        ("compound", 8),
        ("duplicate", 8),
    ]
    assert rules("# lint: ignore[compound, duplicate]\n" + criterion('id = "a"', double)) == []


def test_what_criteria_scored_is_looked_at_too() -> None:
    rubric = Rubric.model_validate(
        {"id": "r", "criteria": [{"id": name, "text": f"Claim {name}."} for name in ("a", "b", "c", "d", "e")]}
    )
    rows = [{"a": float(i % 2), "b": float(i % 2), "c": 1.0, "d": 0.0, "e": None} for i in range(12)]
    found = {(finding.criterion, finding.rule) for finding in lint_scores(rubric, "r.toml", rows)}
    assert found == {("b", "correlated"), ("c", "always-met"), ("d", "never-met"), ("e", "never-scored")}


def test_rows_with_a_rubric_of_their_own(tmp_path: Path) -> None:
    good = {"rubric": {"id": "a", "criteria": [{"id": "c1", "text": "Names the dose.", "check": None}]}}
    double = {"rubric": json.dumps({"id": "b", "criteria": [{"id": "c1", "text": "Is kind and honest."}]})}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, {}, double, {"rubric": {"id": "c", "criteria": []}}])) + "\n")
    assert [(found.line, found.rule) for found in lint_file(path)] == [(2, "invalid"), (3, "compound"), (4, "invalid")]
    rubric = Rubric.of_data(double["rubric"], "here")
    assert lint_rubric("rows.jsonl", 3, rubric)[0].criterion == "c1"


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.toml"
    path.write_text(HEAD + criterion('id = "a"', 'text = "Is kind and honest."'))
    assert main(["lint", str(path)]) == 0
    assert f"{path}:5: warning [compound] a: asks for more than one thing" in capsys.readouterr().out
    assert main(["lint", str(path), "--strict"]) == 1
    capsys.readouterr()
    path.write_text(HEAD + criterion('id = "a"', 'text = "TODO"'))
    assert main(["lint", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["rule"], found["line"], found["severity"], found["criterion"]) == ("placeholder", 5, "error", "a")
    assert main(["lint", str(tmp_path / "none.toml")]) == 2
    assert "cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("r.toml", b"\xff", "in UTF-8"), ("r.jsonl", b"\xff", "in UTF-8"), ("r.jsonl", b"\n", "has no rows")],
)
def test_files_that_are_no_text_or_empty_are_named(
    name: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["lint", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "scores.jsonl:1"), (b"\xff", "in UTF-8"), (b"[1]", "scores.jsonl:1"), (b'{"parts": [1]}', "'parts'")],
)
def test_scores_that_cannot_be_read_are_named(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.jsonl").write_bytes(content)
    assert main(["lint", "refusal", "--scores", str(tmp_path / "scores.jsonl")]) == 2
    assert message in capsys.readouterr().err
