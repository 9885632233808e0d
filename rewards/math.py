"""Math with one right answer: the last answer in the text, compared exactly, then as a formula.

Numbers and equal texts are settled here. Formulas go to math-verify (https://github.com/huggingface/Math-Verify) in a
process that can be killed, after a look at how large they could become. Tasks drawn from reasoning-gym are scored by
reasoning-gym's own scorer (``rewards.puzzles``).
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

from posttrain.errors import RecipeError
from posttrain.protocols import Sandbox
from posttrain.types import Rollout, Score, ScoreStatus
from rewards.answers import bare, extract_answer, parse_number, same_answer, visible
from rewards.puzzles import score_puzzle
from rewards.worker_pool import Limits, Verdict, shared_pool

MAX_FORMULA_CHARS = 512
"""A longer answer is wrong: the longest reference of the MATH test set has under 200 characters."""
_MAX_DIGITS = 64
_MAX_EXPONENT_DIGITS = 4
_DIGIT_RUN = re.compile(r"[0-9][0-9,_ ]*")
_POWER = re.compile(r"(?:\^|\*\*)\s*\{*\s*[({]*\s*[+-]?\s*([0-9]+)")
_LEVEL = r"(?:\^|\*\*)[\s{(+-]*[0-9]+[\s)}]*"
_TOWER = re.compile(_LEVEL * 3)
_FACTORIAL = re.compile(r"[0-9]{4,}[\s)}]*!|![\s)}]*!")
_EQUALS = re.compile(r"(?<![<>!:=~\\])={1,2}(?!=)")
_NAME = re.compile(r"(?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?")
_MAX_SIDES = 4
_RELATION = re.compile(r"[<>\u2264\u2265]|\\(?:[lg]eq?|[lg]t|[lg]eqslant)(?![A-Za-z])")
_SET = re.compile(r"\s*(?:\\left)?\\\{")
_INTERVAL = re.compile(r"\s*(?:\\left)?[(\[].*,.*[)\]]\s*", re.DOTALL)
_BASE = re.compile(r"(?<=[0-9])_\{?\s*([0-9]+)")
_COMMAND = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}|\\[A-Za-z]+")
_WORD_RUN = re.compile(r"[^\W\d_]{2,}")
_MATH = re.compile(r"[0-9=+*/^_<>|()\[\]-]|\\[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class MathReward:
    """1.0 for the right final answer, else 0.0.

    Compares with ``task.answer``, or, when ``task.info`` holds ``dataset`` and ``entry``, asks that reasoning-gym
    dataset's scorer. A formula that takes too long or too much to check is a wrong answer; a check whose process was
    lost gives value None. Raises ``RecipeError`` for a task that cannot be graded this way.
    """

    formulas: bool = True
    """Ask math-verify about what is not settled by comparing numbers and texts."""
    limits: Limits = field(default_factory=Limits)

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        task = rollout.task
        text = visible(rollout.text)
        if "dataset" in task.info:
            return await asyncio.to_thread(score_puzzle, text, task.info, task.id, self.limits)
        if task.answer is None:
            raise RecipeError(
                f"task {task.id!r}: answer is None; MathReward needs a reference answer, or info with the "
                "reasoning-gym fields 'dataset' and 'entry'"
            )
        found = extract_answer(text, numeric=parse_number(task.answer) is not None)
        if found is None:
            return Score(value=0.0, explanation="The text holds no answer.")
        if same_answer(found, task.answer):
            return _verdict(1.0, found, task.answer, "matches")
        if not self.formulas or not is_formula(task.answer):
            return _verdict(0.0, found, task.answer, "differs from")
        fault = bomb(found)
        if fault is not None:
            return Score(value=0.0, explanation=f"The answer {found[:80]!r} is not evaluated: {fault}.")
        if not is_formula(found):
            return _verdict(0.0, found, task.answer, "differs from")
        return await asyncio.to_thread(self._compare_sides, found, task.answer, task.id)

    def _compare_sides(self, found: str, expected: str, task_id: str) -> Score:
        """Every side of an equation must be right: math-verify would take the last one of ``41 = 42``."""
        score = Score(value=0.0, explanation=f"The answer {found[:80]!r} has no sides to compare.")
        for side in sides(found, expected):
            right = same_answer(side, expected)
            score = _verdict(1.0, side, expected, "matches") if right else self._compare(side, expected, task_id)
            if score.value != 1.0:
                break
        return score

    def _compare(self, found: str, expected: str, task_id: str) -> Score:
        if not may_be_same(expected, found):
            return Score(value=0.0, explanation=f"The answer {found[:80]!r} is another kind of thing.")
        pool = shared_pool("math", self.limits)
        verdict = pool.check({"gold": bare(expected), "answer": bare(found)})
        # Whose fault is it? A reference that cannot be told from 1 in time can be told from nothing.
        if verdict.killed and (own := pool.check({"gold": bare(expected), "answer": "1"})).killed:
            raise RecipeError(
                f"task {task_id!r}: answer = {expected[:80]!r} cannot be compared even with 1 ({own.reason}); simplify "
                "the reference, or use MathReward(formulas=False)"
            )
        return _of(verdict, found, expected)


def is_formula(text: str) -> bool:
    """Whether a text may mean something by the rules of algebra, in which letters of a word could be exchanged."""
    plain = bare(text)
    rest = _COMMAND.sub(" ", plain)
    if _WORD_RUN.search(_COMMAND.sub(lambda command: command[1] or "", plain)) and not _MATH.search(rest):
        return False
    return bool(_MATH.search(plain)) or len(rest.strip()) == 1


def may_be_same(expected: str, found: str) -> bool:
    """Whether two formulas are of kinds that can be equal. Math-verify takes the set {1, 2} for the point (1, 2), a
    list of the ends for an inequality, and a number in one base for the same digits in another."""
    gold, answer = bare(expected), bare(found)
    if not set(_BASE.findall(answer)) <= {"10", *_BASE.findall(gold)}:
        return False
    if _RELATION.search(gold):
        return bool(_RELATION.search(answer) or _INTERVAL.fullmatch(answer))
    pair = (gold, answer) if _SET.match(gold) else (answer, gold)
    return not (_SET.match(pair[0]) and _INTERVAL.fullmatch(pair[1]))


def sides(found: str, expected: str) -> list[str]:
    """What has to equal the reference: the sides of ``x = 2 + 3 = 5`` without the name in front; all of it when the
    reference is an equation itself. None when there are too many."""
    if _EQUALS.search(expected):
        return [found]
    name, *rest = parts = [part.strip() for part in _EQUALS.split(bare(found))]
    if rest and _NAME.fullmatch(name):
        parts = rest
    return parts if len(parts) <= _MAX_SIDES else []


def bomb(text: str) -> str | None:
    """Why a formula must not be evaluated, by its looks alone; None when it may. The CPU limit catches the rest."""
    if len(text) > MAX_FORMULA_CHARS:
        return f"it has more than {MAX_FORMULA_CHARS} characters"
    if any(sum(map(str.isdigit, run)) > _MAX_DIGITS for run in _DIGIT_RUN.findall(text)):
        return f"a number has more than {_MAX_DIGITS} digits"
    if any(len(digits) > _MAX_EXPONENT_DIGITS for digits in _POWER.findall(text)):
        return f"an exponent has more than {_MAX_EXPONENT_DIGITS} digits"
    if _TOWER.search(text):
        return "it is a tower of powers"
    if _FACTORIAL.search(text):
        return "a factorial is too large"
    return None


def _of(verdict: Verdict, found: str, expected: str) -> Score:
    if verdict.value is None:
        return Score(value=None, status=ScoreStatus.REWARD_ERROR, error=f"the answer was not checked: {verdict.reason}")
    return Score(
        value=verdict.value,
        explanation=f"The answer {found[:80]!r} was compared with {expected[:80]!r}: {verdict.reason}.",
    )


def _verdict(value: float, found: str, expected: str, relation: str) -> Score:
    return Score(value=value, explanation=f"The answer {found[:80]!r} {relation} {expected[:80]!r}.")
