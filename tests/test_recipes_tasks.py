"""The task sources: reproducible, split by problem, and right."""

import ast
import operator
import pickle
import re
import subprocess
from itertools import islice

import pytest

from posttrain.protocols import TaskSource
from posttrain.rollout.environments import _SHELL_BLOCK
from recipes.tasks.agent import EXPLANATION, SILENT, AgentTasks
from recipes.tasks.code import CodeTasks, unit_tests
from recipes.tasks.math import MathTasks, worked_sum
from recipes.tasks.splits import is_heldout, problem_id, training
from recipes.tasks.words import TOPICS, WORDS
from recipes.tasks.workspace import WorkspaceTasks
from recipes.tasks.writing import WritingTasks

TINY = [MathTasks(), CodeTasks(), AgentTasks(), WritingTasks(), WorkspaceTasks()]
HARDER = [
    MathTasks(config={"min_terms": 3, "max_terms": 5, "min_digits": 2, "max_digits": 3}),
    CodeTasks(
        min_steps=2, max_steps=3, max_number=99, fenced=True, template="Write a Python function f(x): take x, {steps}."
    ),
    AgentTasks(max_words=9, system=EXPLANATION),
    WritingTasks(template="Please write a single line about {topic} that uses the word {word}."),
    WorkspaceTasks(difficulty=5, form="fence"),
]

everywhere = pytest.mark.parametrize("source", TINY + HARDER, ids=lambda s: type(s).__name__)


@everywhere
def test_sources_are_values_that_satisfy_the_protocol(source):
    assert isinstance(source, TaskSource)
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    assert copy.heldout(count=5) == source.heldout(count=5)


@everywhere
def test_training_order_is_fixed_by_the_seed(source):
    first, again, other = (list(islice(source.train(seed=seed), 30)) for seed in (4, 4, 5))
    assert first == again
    assert [t.id for t in first] != [t.id for t in other]
    pickle.loads(pickle.dumps(first))


@everywhere
def test_no_problem_is_in_both_splits(source):
    heldout = source.heldout(count=100)
    prompts = {(t.prompt[-1]["content"], str(t.sandbox)) for t in heldout}
    assert len({t.id for t in heldout}) == len(heldout) == len(prompts) == 100
    trained = list(islice(source.train(seed=0), 1500))
    assert not {t.id for t in heldout} & {t.id for t in trained}
    assert not prompts & {(t.prompt[-1]["content"], str(t.sandbox)) for t in trained}
    assert {t.id for t in trained} >= {t.id for t in islice(source.train(seed=0), 100)}


@pytest.mark.parametrize("source", TINY, ids=lambda s: type(s).__name__)
def test_enough_is_held_out_and_a_shorter_list_is_a_prefix(source):
    heldout = source.heldout(count=200)
    assert len(heldout) == 200
    assert source.heldout(count=20) == heldout[:20]


def test_a_split_depends_on_the_problem_and_holds_out_a_fifth():
    ids = [problem_id("math", "chain_sum", i) for i in range(5000)]
    assert len(set(ids)) == 5000
    assert 0.17 < sum(map(is_heldout, ids)) / 5000 < 0.23


@everywhere
def test_demonstrations_start_with_a_training_prompt_and_end_with_the_assistant(source):
    shown = source.demonstrations(count=40, seed=2)
    prompts = [t.prompt for t in islice(source.train(seed=2), 40)]
    assert [d[: len(p)] for d, p in zip(shown, prompts, strict=True)] == prompts
    assert all(d[-1]["role"] == "assistant" for d in shown)


@pytest.mark.parametrize("source", [TINY[0], HARDER[0]])
def test_sums_add_up(source):
    for task in source.heldout(count=200):
        expression = re.search(r"problem: (.*) =", task.prompt[0]["content"])[1]
        signed = re.findall(r"([+-]?) ?(\d+)", expression)
        assert sum(int(sign + number) for sign, number in signed) == int(task.answer)
        assert task.info["entry"]["answer"] == task.answer


def apply_in_words(steps, value):
    """The description carried out step by step, without the program."""
    word_steps = {
        "the sum": sum, "the largest": max, "the smallest": min, "the length": len, "the count": len,
        "sorted": sorted, "the first": lambda v: v[0], "the last": lambda v: v[len(v) - 1],
        "reversed": lambda v: v[::-1], "in reverse order": lambda v: v[::-1],
        "in upper case": str.upper, "in lower case": str.lower,
    }  # fmt: skip
    with_number = {"plus": operator.add, "minus": operator.sub, "times": operator.mul, "repeated": operator.mul}
    for step in steps:
        if step in word_steps:
            value = word_steps[step](value)
        else:
            word, number = re.fullmatch(r"(plus|minus|times|repeated) (\d+)(?: times)?", step).groups()
            value = with_number[word](value, int(number))
    return value


@pytest.mark.parametrize("source", [TINY[1], HARDER[1]])
def test_programs_do_what_the_words_say(source):
    for task in source.heldout(count=200):
        steps = re.search(r"x, (.*)\.$", task.prompt[0]["content"])[1].split(", then ")
        for test in task.info["tests"]:
            argument = ast.literal_eval(test["call"].removeprefix("f(").removesuffix(")"))
            assert ast.literal_eval(test["expected"]) == apply_in_words(steps, argument), steps


@pytest.mark.parametrize("source", [TINY[1], HARDER[1]])
def test_demonstrated_programs_pass_their_tests(source):
    tasks = islice(source.train(seed=6), 100)
    for task, shown in zip(tasks, source.demonstrations(count=100, seed=6), strict=True):
        text = shown[-1]["content"]
        fenced = re.search(r"```python\n(.*)\n```", text, re.DOTALL)
        assert bool(fenced) is source.fenced
        inputs = tuple(ast.literal_eval(test["call"][2:-1]) for test in task.info["tests"])
        assert unit_tests(fenced[1] if fenced else text, inputs) == task.info["tests"]


@pytest.mark.parametrize("source", [TINY[2], HARDER[2]])
def test_demonstrated_errands_work_in_a_real_shell(source, tmp_path):
    tasks = islice(source.train(seed=1), 24)
    for number, (task, shown) in enumerate(zip(tasks, source.demonstrations(count=24, seed=1), strict=True)):
        box = tmp_path / str(number)
        box.mkdir()
        for path, content in task.sandbox.files.items():
            (box / path).write_bytes(content)
        turns = shown[len(task.prompt) :]
        for said, observed in zip(turns[:-1:2], turns[1::2], strict=True):
            command = _SHELL_BLOCK.search(said["content"])[1]
            ran = subprocess.run(["sh", "-c", command], cwd=box, capture_output=True, text=True, check=True)
            assert (ran.stdout.removesuffix("\n") or SILENT) == observed["content"]
        assert _SHELL_BLOCK.search(turns[-1]["content"]) is None
        for path, text in task.info["expected_files"].items():
            assert (box / path).read_text() == text


def test_an_errand_cannot_be_done_without_looking():
    for task in AgentTasks().heldout(count=200):
        (result,) = task.info["expected_files"].values()
        said = task.prompt[-1]["content"]
        assert not set(result.split()) & set(re.findall(r"\w+", said))
        assert not set(task.info["expected_files"]) & set(task.sandbox.files)


def test_topics_share_no_word():
    assert len(set(WORDS)) == len(WORDS) == sum(map(len, TOPICS.values()))


def test_demonstrated_lines_keep_every_rule():
    source = WritingTasks()
    tasks = islice(source.train(seed=3), 300)
    for task, shown in zip(tasks, source.demonstrations(count=300, seed=3), strict=True):
        text, info = shown[-1]["content"], task.info
        words = re.findall(r"[a-z]+", text.lower())
        assert text.endswith(".")
        assert text[0].isupper()
        assert 4 <= len(words) <= 10
        assert len(set(words)) == len(words)
        assert info["word"] in words
        assert info["word"] not in info["topic_words"]
        assert set(info["topic_words"]) & set(words)


def test_a_sum_is_worked_place_by_place():
    assert worked_sum("42 - 25") == "40 - 20 = 20, 2 - 5 = -3, so 20 - 3 = 17."
    assert worked_sum("7 + 8") == "7 + 8 = 15."
    assert worked_sum("120 + 34 - 5") == (
        "100 + 0 - 0 = 100, 20 + 30 - 0 = 50, 0 + 4 - 5 = -1, 100 + 50 = 150, so 150 - 1 = 149."
    )


def test_worked_sums_end_with_the_answer():
    for solved in islice(training(MathTasks(worked=True).draw, seed=0), 200):
        assert solved.solution[0]["content"].rpartition(" = ")[2] == f"{solved.task.answer}."
