"""Math answers: extraction order, exact comparison, formulas in processes that are killed when they take too long."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import RecipeError
from posttrain.types import Score, ScoreStatus, Task
from rewards.answers import extract_answer, parse_number, same_answer, visible
from rewards.controls import Case
from rewards.math import MathReward, bomb, is_formula
from rewards.worker_pool import Limits, Verdict, WorkerPool

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl"
LIMITS = Limits(workers=1, cpu_s=1.0)


def grade(text: str, answer: str | None = None, limits: Limits = LIMITS) -> Score:
    task = Task(id="t", domain="math", prompt=({"role": "user", "content": "?"},), answer=answer)
    return asyncio.run(MathReward(limits=limits).score(Case(task=task, reference="").rollout(text)))


def value(text: str, answer: str | None = None) -> float | None:
    return grade(text, answer).value


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"5 so \boxed{6}, or \boxed{\frac{1}{2}} and 9", r"\frac{1}{2}"),
        ("Answer: 3\nno wait\nanswer: 4\n5 is not it", "4"),
        ("17 - 5 = 12\n#### 1,234", "1,234"),
        ("The answer is 12.", "12"),
        ("between 1 and -2.5", "-2.5"),
        ("it is 7/8 of it", "7/8"),
        ("2024-01-05", "05"),
        ("1e99999", None),
        ("no number", None),
        ("", None),
        (r"\boxed{12", "12"),
        (r"\boxed{1} and \fbox{2}", "2"),
        ("41 or 42", None),
        ("it is 41, 42 or 43", None),
        ("1 2 3", None),
        ("from 41 we get 42", "42"),
        ("41\n42", "42"),
        ("41, so 42", "42"),
    ],
)
def test_extraction_order(text: str, found: str | None) -> None:
    assert extract_answer(text) == found


def test_text_answers_are_taken_whole() -> None:
    assert (
        extract_answer("So:\nAnswer: Zoe is a knave,\nRex a knight", numeric=False) == "Zoe is a knave,\nRex a knight"
    )
    assert extract_answer(" gnidnib 3 ", numeric=False) == "gnidnib 3"


@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6), st.integers(1, 50))
def test_equal_fractions_are_one_answer(top: int, bottom: int, factor: int) -> None:
    assert parse_number(f"{top * factor}/{bottom * factor}") == Fraction(top, bottom)
    assert same_answer(rf"\frac{{{top}}}{{{bottom}}}", f"{top}/{bottom}")
    assert parse_number(f"{top:,}.") == top
    assert not same_answer(f"{top + 1}/{bottom}", f"{top}/{bottom}")


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("0.5", "1/2", True),
        ("$0.50$", "1/2", True),
        ("1e3", "1000", True),
        ("1,000", "1000", True),
        ("10,00", "1000", False),
        ("0.3333", "1/3", False),
        ("1/0", "0", False),
        ("9" * 200, "9", False),
        ("1e9999999", "1", False),
        ("nan", "0", False),
        ("True", "1", False),
        ("Paris.", " paris ", True),
        ("Paris or Rome", "Paris", False),
    ],
)
def test_exact_comparison(found: str, expected: str, same: bool) -> None:
    assert same_answer(found, expected) is same


def test_reward_with_reference_answer() -> None:
    assert value("First 41. The answer is 42.", "42") == 1.0
    assert value("It is 42 or 43.", "42") == 0.0
    assert value("", "42") == 0.0
    with pytest.raises(RecipeError, match="reference answer"):
        value("42")


@pytest.mark.parametrize(
    ("text", "seen"),
    [("<think>a</think>b", "b"), ("a</think>b", "b"), ("<think>a", ""), ("a", "a"), ("<think>a</think><think>b", "")],
)
def test_only_what_follows_the_thinking_counts(text: str, seen: str) -> None:
    assert visible(text) == seen


@pytest.mark.parametrize(
    ("found", "expected", "right"),
    [
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"1 + 2x + x^2", "(x+1)^2", True),
        (r"\{2, 1\}", r"\{1, 2\}", True),
        (r"\pi/3", r"\frac{\pi}{3}", True),
        (r"50\%", "0.5", True),
        (r"12\text{ cm}", "12", True),
        (r"x = 5", "5", True),
        (r"x = 2 + 3 = 5", "5", True),
        (r"f(x) = \sqrt{8} = 2\sqrt{2}", r"\sqrt{8}", True),
        (r"y = 2x + 1", "y = 1 + 2x", True),
        (r"x = 1 = 2 = 3 = 4 = 5", "5", False),
        # The reference goes first: the other way round this is not equal to math-verify.
        (r"(5, \infty)", "x > 5", True),
        (r"1, 2", "1 < x < 2", False),
        (r"\{1, 2\}", "1 < x < 2", False),
        (r"\{1, 2\}", "(1, 2)", False),
        (r"(1, 2)", r"\{1, 2\}", False),
        (r"1, 2", r"\{1, 2\}", True),
        (r"=", "5", False),
        (r"(0, 1)", "(0,1)", True),
        (r"[0, 1]", "(0,1)", False),
        (r"\sqrt{2}", r"2\sqrt{2}", False),
        (r"x^2+1", "(x+1)^2", False),
        (r"0.333", r"\frac{1}{3}", False),
        (r"1, 2, 3", "2", False),
        (r"\{1, 2, 3\}", "2", False),
        (r"41 = 42", "42", False),
        (r"42 = 41", "42", False),
        (r"x = 41 = 42", "42", False),
        (r"41 \text{ or } 42", "42", False),
        (r"42 \pm 1", "42", False),
        (r"41 \approx 42", "42", False),
        (r"\neq 42", "42", False),
        (r"x \le 42", "42", False),
        (r"[41, 42]", "42", False),
        (r"41 \quad 42", "42", False),
        ("tac", "cat", False),
        (r"\text{tac}", r"\text{cat}", False),
        ("", "x", False),
        ("@#!", "x+1", False),
    ],
)
def test_formulas_are_compared_by_meaning(found: str, expected: str, right: bool) -> None:
    score = grade(rf"So \boxed{{{found}}}.", expected)
    assert score.value == float(right), score.explanation


def test_words_are_no_formulas() -> None:
    assert [is_formula(text) for text in ("cat", r"\text{cat}", "x", "2ab", r"\pi", "x+y", "42")] == [
        False, False, True, True, True, True, True
    ]  # fmt: skip


@pytest.mark.parametrize(
    "formula",
    [
        r"9^{9^{9^{9}}}",
        "9**9**9**9",
        r"10^{999999999}",
        "1" * 100,
        r"(10^{9})!!!",
        r"((99!)!)!",
        "99999!",
        "x" * 600,
    ],
)
def test_bombs_are_known_by_their_looks(formula: str) -> None:
    assert bomb(formula) is not None
    assert value(rf"\boxed{{{formula}}}", "x+1") == 0.0


def test_honest_formulas_are_no_bombs() -> None:
    for formula in (r"2^{2016}", r"\frac{1}{x^{10}}", r"e^{i\pi}", "10!", r"x^{2} + y^{2}", "1,000,000"):
        assert bomb(formula) is None


def test_what_takes_too_much_cpu_time_is_killed_and_wrong_and_the_next_check_works() -> None:
    pool = WorkerPool("math", LIMITS)
    began = time.monotonic()
    verdict = pool.check({"gold": "42", "answer": "9^{9^{9^{9}}}"})
    assert verdict.value == 0.0
    assert verdict.killed
    assert "CPU time" in verdict.reason
    assert pool.num_killed == 1
    assert time.monotonic() - began < 30
    assert pool.check({"gold": r"\sqrt{8}", "answer": r"2\sqrt{2}"}).value == 1.0
    pool.close()


def test_a_lost_process_is_replaced_and_a_machine_that_loses_them_all_gives_no_verdict() -> None:
    pool = WorkerPool("math", LIMITS)
    assert pool.check({"gold": "x+1", "answer": "1+x"}).value == 1.0
    (worker,) = pool._idle
    worker.process.send_signal(signal.SIGKILL)
    worker.process.wait()
    assert pool.check({"gold": "x+2", "answer": "2+x"}).value == 1.0
    assert pool.num_killed == 1
    pool.close()
    # Importing sympy takes long enough to be killed meanwhile.
    lost = WorkerPool("math", LIMITS)
    stop = threading.Event()

    def kill_all() -> None:
        while not stop.wait(0.01):
            for busy in list(lost._busy):
                busy.process.kill()

    killer = threading.Thread(target=kill_all)
    killer.start()
    verdict = lost.check({"gold": "x+3", "answer": "3+x"})
    stop.set()
    killer.join()
    assert verdict == Verdict(None, "the checking process ended with -9")
    assert lost.num_killed == 2
    assert lost.check({"gold": "x+3", "answer": "3+x"}).value == 1.0
    lost.close()


def test_no_verdict_leaves_the_rollout_unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    score = grade(r"\boxed{1+x}", "x+1", Limits(workers=1, cpu_s=1.0, wall_s=5.0))
    assert (score.value, score.status) == (None, ScoreStatus.REWARD_ERROR)
    assert score.error is not None
    assert "not checked" in score.error
    assert value(r"\boxed{x+1}", "x+1") == 1.0


def test_a_machine_too_busy_for_the_check_gives_no_verdict() -> None:
    pool = WorkerPool("math", Limits(workers=1, cpu_s=60.0, wall_s=0.05))
    assert pool.check({"gold": "x+1", "answer": "1+x"}).value is None
    pool.close()


def test_a_reference_that_cannot_be_compared_is_the_tasks_fault() -> None:
    with pytest.raises(RecipeError, match="cannot be compared even with 1"):
        value(r"\boxed{x+1}", "7^{7^{7^{7}}}")


def test_it_works_in_threads_and_gives_the_same_answer_to_all() -> None:
    verdicts: list[float | None] = []
    threads = [
        threading.Thread(target=lambda n=n: verdicts.append(value(rf"\boxed{{{n} + x}}", f"x+{n}"))) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [1.0] * 4


def test_processes_end_with_their_parent() -> None:
    program = (
        "import os\nfrom rewards.worker_pool import Limits, WorkerPool\npool = WorkerPool('math', Limits(workers=1))\n"
        "assert pool.check({'gold': 'x+1', 'answer': '1+x'}).value == 1.0\n"
        "print(pool._idle[0].process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "the process outlived its parent"
        time.sleep(0.05)


@pytest.mark.skipif(not GSM8K.is_file(), reason="shared/data/gsm8k_test.jsonl is not beside the checkout")
def test_worked_solutions_of_gsm8k_are_right_for_their_own_answer_and_wrong_for_the_next() -> None:
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").split("\n") if line]
    golds = [row["answer"].rpartition("#### ")[2] for row in rows]
    assert len(rows) == 600
    for row, gold, other in zip(rows, golds, [*golds[1:], golds[0]], strict=True):
        assert value(row["answer"], gold) == 1.0
        assert value(row["answer"], other) == float(parse_number(gold) == parse_number(other))
        assert value(f"First {other}, then {gold}.", gold) == 1.0


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("So x is \u22125.", "5", False),
        ("So x is \u22125.", "-5", True),
        ("**Answer:** 42", "42", True),
        ("**Answer: 42**", "42", True),
        ("**Answer**: **42**.", "42", True),
        ("**Final answer:** $\\frac{2}{4}$", "\\frac{1}{2}", True),
        (r"\boxed{\text{yes}}", "yes", True),
        (r"\boxed{Evelyn}", r"\text{Evelyn}", True),
        (r"\boxed{12_7}", "12_8", False),
        (r"\boxed{12_{8}}", "12_8", True),
        (r"\boxed{12}", "12_8", True),
        (r"\boxed{42_{41}}", "42", False),
        (r"\boxed{42_{10}}", "42", True),
        (r"\boxed{41 == 42}", "42", False),
        (r"\boxed{40 + 2 == 42}", "42", True),
    ],
)
def test_how_an_answer_is_written(text: str, answer: str, right: bool) -> None:
    assert value(text, answer) == float(right)
