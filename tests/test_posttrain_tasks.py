import json
import pickle

import pytest

from posttrain.errors import RecipeError
from posttrain.tasks import DatasetTasks

ROWS = [{"question": f"What is {i} + 1?", "gold": str(i + 1), "level": i % 3} for i in range(200)]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def source(path, **settings) -> DatasetTasks:
    settings = {"prompt": "question", "answer": "gold", "demonstration": "gold", **settings}
    return DatasetTasks(domain="math", path=str(path), **settings)


def test_every_row_is_in_exactly_one_split(file):
    tasks = source(file, heldout_fraction=0.3)
    train, heldout = list(tasks.train(seed=0)), tasks.heldout(count=1000)
    assert len(train) + len(heldout) == len(ROWS)
    assert not {t.id for t in train} & {t.id for t in heldout}
    assert 30 <= len(heldout) <= 90


def test_columns_become_tasks_and_demonstrations(file):
    tasks = source(file, info={"level": "level"}, template="Q: {prompt}", system="Be brief.")
    task = tasks.heldout(count=1)[0]
    assert [m["role"] for m in task.prompt] == ["system", "user"]
    number = int(task.prompt[1]["content"].removeprefix("Q: What is ").removesuffix(" + 1?"))
    assert task.answer == str(number + 1)
    assert task.info["level"] == number % 3
    assert [m["role"] for m in tasks.demonstrations(count=3, seed=0)[0]] == ["system", "user", "assistant"]


def test_order_is_seeded_and_the_source_pickles(file):
    tasks = source(file)
    again = pickle.loads(pickle.dumps(tasks))
    assert [t.id for t in tasks.train(seed=1)] == [t.id for t in again.train(seed=1)]
    assert [t.id for t in tasks.train(seed=1)] != [t.id for t in tasks.train(seed=2)]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_other_files_are_read_too(tmp_path, monkeypatch, suffix):
    import datasets

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    path = tmp_path / f"rows.{suffix}"
    getattr(datasets.Dataset.from_list(ROWS), f"to_{suffix}")(str(path))
    assert len(list(source(path).train(seed=0))) > 100


def test_a_wrong_column_lists_the_columns(file):
    with pytest.raises(RecipeError, match=r"'missing'.*question, gold, level"):
        source(file, answer="missing").heldout(count=1)


def test_an_empty_or_absent_file_says_so(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(RecipeError, match="empty"):
        source(empty).heldout(count=1)
    with pytest.raises(RecipeError, match="does not exist"):
        source(tmp_path / "absent.jsonl").heldout(count=1)


GOOD = {"question": "1 + 1?", "gold": "2"}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"question": "x"', r"""line 2 is '{"question": "x"', expected one JSON object"""),
        ("42", "line 2 is '42', expected one JSON object"),
        ('{"question": null, "gold": "2"}', r"row 2 .*prompt = 'question' is None; expected a text"),
        ('{"question": "x", "gold": null}', r"row 2 .*answer = 'gold' is None; expected an answer"),
        ('{"question": "x"}', r"row 2 .*answer = 'gold' is None; .*correct the row or leave it out"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(file, second, message):
    file.write_text(f"{json.dumps(GOOD)}\n{second}\n{json.dumps(GOOD)}\n")
    with pytest.raises(RecipeError, match=f"{file.name}.*'train'.*{message}"):
        source(file).heldout(count=1)


def test_a_missing_demonstration_or_message_content_is_named(file):
    file.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD | {'gold': None})}\n")
    with pytest.raises(RecipeError, match=r"row 2 .*demonstration = 'gold' is None; expected an answer to imitate"):
        source(file, answer=None).demonstrations(count=1, seed=0)
    file.write_text(json.dumps({"question": [{"role": "user", "content": None}]}))
    with pytest.raises(RecipeError, match=r"row 1 .*prompt = 'question' is \[.*chat messages that all have a role"):
        source(file, answer=None, demonstration=None).heldout(count=1)


@pytest.mark.parametrize("setting", ["split", "config_name"])
def test_an_unknown_split_or_configuration_lists_what_exists(file, setting):
    exists = {"split": r"\['train', 'test'\]", "config_name": r"\['default'\]"}[setting]
    file.rename(file.with_name("train.jsonl"))
    file.with_name("test.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(RecipeError, match=f"{setting}='tset'.*{exists}; correct that setting"):
        source(file.parent, **{setting: "tset"}).heldout(count=1)


def test_a_file_has_one_split(file):
    with pytest.raises(RecipeError, match=r"split='test'.*\['train'\]"):
        source(file, split="test").heldout(count=1)
