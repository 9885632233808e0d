"""Rubrics: what is asked of a response, as data, and the reward that has a judge answer it.

A rubric is a TOML file (schema ``rubric/1``) with one table per criterion. Judge criteria go to a judge one by one;
code criteria call a check. The verdicts are added up in ``rewards.criteria``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from posttrain.config import Value
from posttrain.errors import JudgeError, RecipeError
from posttrain.protocols import Ask, Judge, Sandbox
from posttrain.types import Judgment, Rollout, Score, ScoreStatus, Task
from rewards.checks import CHECKS, words
from rewards.criteria import Aggregation, Criterion, Total, aggregate
from rewards.judge import (
    CANNOT_ASSESS,
    Dialect,
    JsonDialect,
    LineDialect,
    PolicyJudge,
    Question,
    check_evidence,
    derive_nonce,
)
from rewards.rubric_file import explain_errors, parse_toml, rubric_source
from rewards.untrusted import judge_view

UNREADABLE = "unreadable"
"""Verdict recorded when no reply could be read; it never has a score."""
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}")


class Rubric(Value):
    """What is asked of a response."""

    schema_: Literal["rubric/1"] = Field(default="rubric/1", alias="schema")
    id: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    scope: Literal["task", "item"] = "task"
    """Whether it is for a whole domain or was written for one task."""
    aggregation: Aggregation = Aggregation()
    criteria: tuple[Criterion, ...]

    @classmethod
    def load(cls, path_or_name: str | Path) -> Self:
        """Read a ``.toml`` file, or a rubric of this package by its name. Raises ``RecipeError``, naming lines."""
        source, text = rubric_source(path_or_name)
        data = parse_toml(source, text)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise explain_errors(source, text, error) from None

    @classmethod
    def of_data(cls, data: Any, where: str) -> Self:
        """A rubric that came with a task: a mapping, or JSON text. Raises ``RecipeError`` that begins with ``where``.

        Fields that are None count as not given, since tables of rows with different fields are padded with it.
        """
        try:
            return cls.model_validate(_without_none(json.loads(data) if isinstance(data, str) else data))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "rubric"
            raise RecipeError(f"{where}: {field}: {first['msg'].removeprefix('Value error, ')}") from None
        except json.JSONDecodeError as error:
            raise RecipeError(f"{where}: the rubric is no JSON: {error}") from None

    @model_validator(mode="after")
    def _scorable(self) -> Self:
        ids = [criterion.id for criterion in self.criteria]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"criteria ids {', '.join(twice)} occur twice; expected every id once")
        if not any(criterion.weight > 0 for criterion in self.criteria):
            raise ValueError("no criterion has a positive weight, so nothing could be scored; give one a weight")
        return self

    @property
    def version(self) -> str:
        """Content hash: equal versions ask and add up the same."""
        return "sha256:" + hashlib.sha256(self.model_dump_json(by_alias=True).encode()).hexdigest()[:16]


def _without_none(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _without_none(value) for key, value in data.items() if value is not None}
    return [_without_none(item) for item in data] if isinstance(data, list | tuple) else data


def fill(value: Any, info: Mapping[str, Any], where: str) -> Any:
    """Replace every ``{field}`` of a string by ``info[field]``, in one pass; ``{{`` and ``}}`` are literal braces.

    A string that is one placeholder and nothing else gives the field's own value, so that checks get their numbers;
    values that are no strings come back as they are. Raises ``RecipeError`` for a field that is not there.
    """
    if not isinstance(value, str):
        return value

    def field_of(match: re.Match[str]) -> Any:
        name = match[1]
        if name not in info:
            raise RecipeError(
                f"{where}: {value!r} needs the field {name!r}, but task.info has {', '.join(sorted(info)) or 'none'}; "
                "add the field to the tasks or change the rubric"
            )
        return info[name]

    whole = PLACEHOLDER.fullmatch(value)
    if whole and whole[1]:
        return field_of(whole)
    return PLACEHOLDER.sub(lambda m: str(field_of(m)) if m[1] else m.group()[0], value)


def judged_text(text: str) -> str:
    """What is graded of a policy's turn: everything after its own thinking, nothing when that was never closed."""
    _, _, answer = text.rpartition("</think>")
    return "" if "<think>" in answer else answer.strip()


@dataclass(frozen=True, slots=True)
class RubricReward:
    """Scores a response by a rubric, one judge call per criterion and vote, all at once.

    A vote that stays unreadable after the retries is left out. A criterion that matters (a weight above 0, or a veto)
    and got no readable vote makes ``value=None``: leaving it out would let a judge's failure raise the score. So does
    a rubric none of whose judge criteria has a score. ``JudgeError`` from the judge itself propagates.
    """

    rubric: Rubric
    judge: Judge | None = None
    """None means the policy: the rollout worker lends a snapshot through ``with_policy``."""
    dialect: Dialect = field(default_factory=JsonDialect)
    votes: int = 1
    """Judge calls per criterion; those that could be read are averaged."""
    max_retries: int = 2
    """Extra calls with new seeds for a reply that cannot be read."""
    max_tokens: int = 512
    """Budget of one reply."""
    temperature: float = 0.5
    """Of the policy as judge; a judge of your own has its own."""

    def __post_init__(self) -> None:
        if self.votes < 1 or self.max_retries < 0:
            raise RecipeError(
                f"RubricReward: votes = {self.votes}, max_retries = {self.max_retries}; expected votes >= 1 and "
                "max_retries >= 0"
            )
        graded = [c.id for c in self.rubric.criteria if c.choices]
        if graded and isinstance(self.dialect, LineDialect):
            raise RecipeError(
                f"rubric {self.rubric.id!r}: criteria {', '.join(graded)} have choices, which the line dialect cannot "
                "express; use JsonDialect() or drop the choices"
            )

    def with_policy(self, ask: Ask) -> RubricReward:
        """The same reward with this policy as its judge; unchanged when it has a judge of its own."""
        return self if self.judge is not None else replace(self, judge=PolicyJudge(ask, self.temperature))

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        response = judged_text(rollout.text)
        criteria = tuple(_filled(criterion, self.rubric, rollout.task) for criterion in self.rubric.criteria)
        if not words(response):
            # A judge asked about nothing tends to answer met: settled before anyone is asked.
            return Score(
                value=self.rubric.aggregation.clip[0],
                rubric_version=self.rubric.version,
                flags=("empty",),
                explanation="The response has no words.",
            )
        judgments = await self._judge_all([c for c in criteria if c.kind == "judge"], rollout, response)
        checked = {c.id: _checked(c, response) for c in criteria if c.kind == "code"}
        return self._combine(criteria, checked, judgments, response)

    async def _judge_all(
        self, criteria: Sequence[Criterion], rollout: Rollout, response: str
    ) -> Mapping[str, tuple[Judgment, ...]]:
        try:
            # A task group, since gather would leave the other calls running, and paid for, after one has failed.
            async with asyncio.TaskGroup() as group:
                votes = {
                    c.id: [group.create_task(self._vote(c, rollout, response, vote)) for vote in range(self.votes)]
                    for c in criteria
                }
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return {name: tuple(task.result() for task in tasks) for name, tasks in votes.items()}

    async def _vote(self, criterion: Criterion, rollout: Rollout, response: str, vote: int) -> Judgment:
        """One readable verdict, asking again with new seeds; ``unreadable`` when there is none."""
        if self.judge is None:
            raise RecipeError(
                f"rubric {self.rubric.id!r}: criterion {criterion.id!r} needs a judge; set RubricReward.judge, or call "
                "with_policy to let the policy judge"
            )
        question = Question(
            id=criterion.id,
            criterion=criterion.text,
            labels=criterion.labels,
            prompt=rollout.task.prompt,
            response=response,
        )
        reply = ""
        for attempt in range(self.max_retries + 1):
            key = (rollout.id, criterion.id, vote, attempt)
            nonce = derive_nonce(*key, response=response, num_chars=self.dialect.nonce_chars)
            messages = self.dialect.render(question, nonce)
            reply = await self.judge.ask(messages, max_tokens=self.max_tokens, seed=_seed(key))
            try:
                verdict = self.dialect.parse(reply, question, nonce)
            except JudgeError:
                continue
            verdict = check_evidence(verdict, response, required=criterion.evidence)
            score = None if verdict.label == CANNOT_ASSESS else criterion.label_score(verdict.label)
            return Judgment(
                criterion=criterion.id, verdict=verdict.label, score=score, evidence=verdict.evidence, reply=reply
            )
        return Judgment(criterion=criterion.id, verdict=UNREADABLE, score=None, reply=reply)

    def _combine(
        self,
        criteria: Sequence[Criterion],
        checked: Mapping[str, float],
        judgments: Mapping[str, tuple[Judgment, ...]],
        response: str,
    ) -> Score:
        na = self.rubric.aggregation.na
        judged = {name: _mean_vote(votes, na) for name, votes in judgments.items()}
        parts = {**{c.id: None for c in criteria}, **checked, **judged}
        error = _unscorable(criteria, judged, judgments, na)
        total = Total(None) if error else aggregate(criteria, parts, self.rubric.aggregation.clip)
        error = error or (None if total.value is not None else "no criterion could be scored")
        unread = any(j.verdict == UNREADABLE for votes in judgments.values() for j in votes)
        failure = ScoreStatus.PARSE_ERROR if unread else ScoreStatus.JUDGE_ERROR
        hidden = judge_view(response).num_neutralised
        return Score(
            value=total.value,
            parts=parts,
            status=failure if error else ScoreStatus.VETOED if total.vetoes else ScoreStatus.OK,
            error=error,
            judgments=tuple(judgment for votes in judgments.values() for judgment in votes),
            rubric_version=self.rubric.version,
            flags=(f"reserved_markers:{hidden}",) if hidden else (),
            explanation=error or _explain(parts, total),
        )


def _filled(criterion: Criterion, rubric: Rubric, task: Task) -> Criterion:
    where = f"rubric {rubric.id!r}, criterion {criterion.id!r}, task {task.id!r}"
    args = {name: fill(value, task.info, where) for name, value in criterion.args.items()}
    return criterion.model_copy(update={"text": str(fill(criterion.text, task.info, where)), "args": args})


def _checked(criterion: Criterion, response: str) -> float:
    assert criterion.check is not None
    return float(CHECKS[criterion.check](response, **criterion.args))


def _seed(key: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4]) >> 1


def _mean_vote(votes: Sequence[Judgment], na: str) -> float | None:
    """Mean of the votes that have a score. Under ``na = "zero"`` an abstention is a vote for not met."""
    scores = [vote.score for vote in votes if vote.score is not None]
    if na == "zero":
        scores += [0.0] * sum(vote.verdict == CANNOT_ASSESS for vote in votes)
    return sum(scores) / len(scores) if scores else None


def _unscorable(
    criteria: Sequence[Criterion],
    judged: Mapping[str, float | None],
    judgments: Mapping[str, tuple[Judgment, ...]],
    na: str,
) -> str | None:
    """Why the verdicts allow no value at all; None when they do."""
    unread = [
        c.id
        for c in criteria
        if (c.weight > 0 or c.veto) and c.id in judgments and all(j.verdict == UNREADABLE for j in judgments[c.id])
    ]
    if unread:
        return f"criterion {unread[0]} could not be read, last reply {judgments[unread[0]][-1].reply[-200:]!r}"
    missing = [name for name, score in judged.items() if score is None]
    if missing and len(missing) == len(judged):
        last = judgments[missing[0]][-1]
        return f"no judge criterion could be scored; {missing[0]} is {last.verdict}, last reply {last.reply[-200:]!r}"
    if missing and na == "fail":
        return f"criterion {missing[0]} could not be assessed, and the rubric says na = fail"
    return None


def _explain(parts: Mapping[str, float | None], total: Total) -> str:
    if total.vetoes:
        return f"Vetoed by {', '.join(total.vetoes)}."
    return ", ".join(f"{name} {'not scored' if score is None else f'{score:g}'}" for name, score in parts.items()) + "."
