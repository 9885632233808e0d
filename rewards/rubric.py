"""Rubrics: what is asked of a response, as data, and the reward that has a judge answer it.

A rubric is a TOML file (schema ``rubric/1``) with one table per criterion, or comes with each task. Judge criteria go
to a judge one by one, many at a time, or as one question; code criteria call a check. The verdicts are added up in
``rewards.criteria``. Rewards that compare responses are in ``rewards.pairwise``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

from pydantic import Field, ValidationError, model_validator

from posttrain.config import Value
from posttrain.errors import RecipeError, UnreadableReply
from posttrain.protocols import Ask, Judge, Sandbox
from posttrain.types import Judgment, Message, Rollout, Score, ScoreStatus, Task
from rewards.batched import parse_batch, render_batch, split
from rewards.checks import CHECKS, words
from rewards.criteria import Aggregation, Criterion, Total, aggregate
from rewards.holistic import SCALE, merge_judged
from rewards.judge import (
    CANNOT_ASSESS,
    Dialect,
    JsonDialect,
    LineDialect,
    PolicyJudge,
    Question,
    Verdict,
    check_evidence,
    derive_nonce,
)
from rewards.rubric_file import explain_errors, parse_toml, rubric_source
from rewards.untrusted import judge_view, suspicions

T = TypeVar("T")

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
        return cls.parse(*rubric_source(path_or_name))

    @classmethod
    def parse(cls, source: str, text: str) -> Self:
        """From the text of a TOML file; ``source`` is its name in messages. Raises ``RecipeError``, naming lines."""
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

    def for_task(self, task: Task) -> Self:
        """Itself: the same for all tasks."""
        return self

    @property
    def version(self) -> str:
        """Content hash: equal versions ask and add up the same."""
        return "sha256:" + hashlib.sha256(self.model_dump_json(by_alias=True).encode()).hexdigest()[:16]


@runtime_checkable
class RubricSource(Protocol):
    """Where the rubric for a response comes from: a ``Rubric``, a file that may be edited, the task itself."""

    def for_task(self, task: Task) -> Rubric:
        """The rubric for responses to this task. Raises ``RecipeError`` when there is none, or not a valid one."""
        ...


@runtime_checkable
class EditableRubric(RubricSource, Protocol):
    """A rubric that may change while a run uses it (``rewards.reload.RubricFile``)."""

    @property
    def path(self) -> str: ...

    @property
    def text(self) -> str:
        """The version in effect."""
        ...

    @property
    def rubric(self) -> Rubric:
        """What the text says."""
        ...

    @property
    def anchors(self) -> tuple[Rollout, ...]:
        """Fixed responses, scored under the old and the new version before the new one takes effect."""
        ...

    def read(self) -> str:
        """What the file holds now. Raises ``OSError``."""
        ...

    def with_text(self, text: str) -> EditableRubric:
        """The same source with this version in effect. Raises ``RecipeError`` for one that must not be used."""
        ...


def texts_in_effect(source: RubricSource) -> Mapping[str, str]:
    """The text a rubric was made from by its path, where it may be edited."""
    return {source.path: source.text} if isinstance(source, EditableRubric) else {}


def texts_on_disk(source: RubricSource) -> Mapping[str, str]:
    """What the file of a rubric holds now, by its path, where it may be edited. Raises ``OSError``."""
    return {source.path: source.read()} if isinstance(source, EditableRubric) else {}


def check_fields(source: RubricSource, task: Task) -> None:
    """Raise ``RecipeError`` when the rubric needs a field that ``task.info`` lacks, or that does not suit a check."""
    rubric = source.for_task(task)
    for criterion in rubric.criteria:
        filled = fill_criterion(criterion, rubric, task)
        if filled.kind == "code":
            _checked(filled, "A text.")


def with_text_of(source: RubricSource, texts: Mapping[str, str]) -> RubricSource:
    """The source with the text of its path in effect, if there is one. Raises ``RecipeError``."""
    if isinstance(source, EditableRubric) and source.path in texts:
        return source.with_text(texts[source.path])
    return source


@dataclass(frozen=True, slots=True)
class TaskRubric:
    """The rubric that each task carries in ``task.info``: a mapping, or JSON text, of schema ``rubric/1``."""

    field: str = "rubric"

    def for_task(self, task: Task) -> Rubric:
        if self.field not in task.info:
            raise RecipeError(
                f"task {task.id!r}: info has no {self.field!r}, but its reward takes the rubric from there; it has "
                f"{', '.join(sorted(task.info)) or 'nothing'}; map the column with DatasetTasks(info=...)"
            )
        return Rubric.of_data(task.info[self.field], f"task {task.id!r}, info[{self.field!r}]")


def _without_none(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _without_none(value) for key, value in data.items() if value is not None}
    return [_without_none(item) for item in data] if isinstance(data, list | tuple) else data


def dump_rubric(rubric: Rubric) -> dict[str, Any]:
    """The rubric as JSON data, without what is as by default; ``Rubric.of_data`` is the inverse."""
    return {"schema": "rubric/1", **rubric.model_dump(mode="json", by_alias=True, exclude_defaults=True)}


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
class _Case:
    """What is judged."""

    task: Task
    response: str
    version: str
    """Of the rubric."""

    @property
    def key(self) -> tuple[str, str]:
        """What nonces and seeds are derived from, besides the response."""
        return self.version, self.task.id

    def question(self, criterion: Criterion) -> Question:
        return Question(
            id=criterion.id,
            criterion=criterion.claim,
            labels=criterion.labels,
            prompt=self.task.prompt,
            response=self.response,
        )


class JudgedByRubric:
    """What rewards share whose judge goes by a rubric: they are ``PolicyJudged`` and ``Reloadable``."""

    __slots__ = ()
    rubric: RubricSource
    judge: Judge | None
    temperature: float

    @property
    def asks_policy(self) -> bool:
        return self.judge is None

    def with_policy(self, ask: Ask) -> Self:
        """The same reward with this policy as its judge; unchanged when it has a judge of its own."""
        return replace(self, judge=PolicyJudge(ask, self.temperature)) if self.asks_policy else self  # type: ignore[type-var]

    @property
    def files(self) -> Mapping[str, str]:
        return texts_in_effect(self.rubric)

    def read_files(self) -> Mapping[str, str]:
        return texts_on_disk(self.rubric)

    def with_files(self, texts: Mapping[str, str]) -> Self:
        return replace(self, rubric=with_text_of(self.rubric, texts))  # type: ignore[type-var]

    def check_task(self, task: Task) -> None:
        check_fields(self.rubric, task)


@dataclass(frozen=True, slots=True)
class RubricReward(JudgedByRubric):
    """Scores a response by a rubric, with a judge asked in one of three ways, all questions and votes at once.

    A vote that stays unreadable after the retries is left out. A criterion that matters (a weight above 0, or a veto)
    and got no readable vote makes ``value=None``: leaving it out would let a judge's failure raise the score. So does
    a rubric none of whose judge criteria has a score. ``JudgeError`` from the judge itself propagates.
    """

    rubric: RubricSource
    judge: Judge | None = None
    """None means the policy: the rollout worker lends a snapshot through ``with_policy``."""
    dialect: Dialect = field(default_factory=JsonDialect)
    votes: int = 1
    """Judge calls per criterion; those that could be read are averaged."""
    max_retries: int = 2
    """Extra calls with new seeds for a reply that cannot be read."""
    max_tokens: int = 512
    """Budget of a reply about one criterion; one about several has as many times that."""
    temperature: float = 0.5
    """Of the policy as judge; a judge of your own has its own."""
    mode: Literal["explicit", "batched", "implicit"] = "explicit"
    """One call per criterion; one for many; or one for all with a single mark, the criteria being its guide, besides
    those for vetoes (RaR, arXiv 2507.17746, has the first and the last)."""
    batch_size: int | None = None
    """Criteria per call in ``batched``, all when None. They come in another order for each vote."""
    scale: tuple[str, ...] = SCALE
    """Marks in ``implicit``, worst first."""

    def __post_init__(self) -> None:
        if self.votes < 1 or self.max_retries < 0 or (self.batch_size is not None and self.batch_size < 1):
            raise RecipeError(
                f"RubricReward: votes = {self.votes}, max_retries = {self.max_retries}, batch_size = "
                f"{self.batch_size}; expected votes >= 1, max_retries >= 0, and batch_size >= 1 or None"
            )
        if self.mode not in ("explicit", "batched", "implicit"):
            raise RecipeError(f"RubricReward: mode = {self.mode!r}; expected explicit, batched or implicit")
        if self.mode != "explicit" and not isinstance(self.dialect, JsonDialect):
            raise RecipeError(f"RubricReward: mode = {self.mode!r} needs dialect = JsonDialect(), not {self.dialect!r}")
        rubric = self.rubric.rubric if isinstance(self.rubric, EditableRubric) else self.rubric
        if isinstance(rubric, Rubric):
            self._check_dialect(rubric)

    def _check_dialect(self, rubric: Rubric) -> None:
        graded = [c.id for c in rubric.criteria if c.choices]
        if graded and isinstance(self.dialect, LineDialect):
            raise RecipeError(
                f"rubric {rubric.id!r}: criteria {', '.join(graded)} have choices, which the line dialect cannot "
                "express; use JsonDialect() or drop the choices"
            )

    async def score_anchors(self) -> Mapping[str, tuple[float | None, ...]]:
        if not isinstance(self.rubric, EditableRubric):
            return {}
        scores = [await self.score(rollout) for rollout in self.rubric.anchors]
        return {self.rubric.path: tuple(score.value for score in scores)}

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        rubric = self.rubric.for_task(rollout.task)
        self._check_dialect(rubric)
        response = judged_text(rollout.text)
        criteria = tuple(fill_criterion(criterion, rubric, rollout.task) for criterion in rubric.criteria)
        if self.mode == "implicit":
            criteria = merge_judged(criteria, self.scale)
        if not words(response):
            # A judge asked about nothing tends to answer met: settled before anyone is asked.
            low, high = rubric.aggregation.clip
            return Score(
                value=min(max(0.0, low), high),
                rubric_version=rubric.version,
                flags=("empty",),
                explanation="The response has no words.",
            )
        case = _Case(rollout.task, response, rubric.version)
        judgments = await self._judge_all([c for c in criteria if c.kind == "judge"], case)
        checked = {c.id: _checked(c, response) for c in criteria if c.kind == "code"}
        return self._combine(rubric, criteria, checked, judgments, response)

    async def _judge_all(self, criteria: Sequence[Criterion], case: _Case) -> Mapping[str, tuple[Judgment, ...]]:
        size = (self.batch_size or len(criteria)) if self.mode == "batched" else 1
        try:
            # A task group, since gather would leave the other calls running, and paid for, after one has failed.
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._batch_vote(batch, case, vote))
                    if self.mode == "batched"
                    else group.create_task(self._vote(batch[0], case, vote))
                    for vote in range(self.votes)
                    for batch in split(criteria, size, key=(*case.key, vote))
                ]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        given: dict[str, list[Judgment]] = {c.id: [] for c in criteria}
        for task in tasks:
            for judgment in task.result():
                given[judgment.criterion].append(judgment)
        return {name: tuple(votes) for name, votes in given.items()}

    async def _vote(self, criterion: Criterion, case: _Case, vote: int) -> tuple[Judgment, ...]:
        """One readable verdict; ``unreadable`` when there is none."""
        question = case.question(criterion)
        verdict, reply = await self._read(
            lambda nonce: self.dialect.render(question, nonce),
            lambda reply, nonce: self.dialect.parse(reply, question, nonce),
            case,
            asked=(criterion.id, vote),
        )
        return (_judgment(criterion, verdict, case.response, reply),)

    async def _batch_vote(self, criteria: Sequence[Criterion], case: _Case, vote: int) -> tuple[Judgment, ...]:
        """One readable reply about several criteria; all ``unreadable`` when there is none."""
        questions = [case.question(criterion) for criterion in criteria]
        canary = isinstance(self.dialect, JsonDialect) and self.dialect.canary
        verdicts, reply = await self._read(
            lambda nonce: render_batch(questions, nonce, canary=canary),
            lambda reply, nonce: parse_batch(reply, questions, nonce, canary=canary),
            case,
            asked=(tuple(criterion.id for criterion in criteria), vote),
        )
        read: Sequence[Verdict | None] = verdicts if verdicts is not None else [None] * len(criteria)
        pairs = zip(criteria, read, strict=True)
        return tuple(_judgment(criterion, verdict, case.response, reply) for criterion, verdict in pairs)

    async def _read(
        self,
        render: Callable[[str], Sequence[Message]],
        parse: Callable[[str, str], T],
        case: _Case,
        *,
        asked: tuple[Any, int],
    ) -> tuple[T | None, str]:
        """What a reply says, asking again with new seeds, and the reply; None when none could be read."""
        name, vote = asked
        if self.judge is None:
            raise RecipeError(
                f"rubric criterion {name!r} needs a judge; set RubricReward.judge, or call with_policy to let the "
                "policy judge"
            )
        budget = self.max_tokens * (len(name) if isinstance(name, tuple) else 1)
        reply = ""
        for attempt in range(self.max_retries + 1):
            # Nothing of the rollout but its text: equal responses to a task are asked about once where calls are kept.
            key = (*case.key, name, vote, attempt, case.response)
            nonce = derive_nonce(*key, response=case.response, num_chars=self.dialect.nonce_chars)
            try:
                reply = await self.judge.ask(render(nonce), max_tokens=budget, seed=_seed(key))
                return parse(reply, nonce), reply
            except UnreadableReply as failure:
                reply = failure.reply
        return None, reply

    def _combine(
        self,
        rubric: Rubric,
        criteria: Sequence[Criterion],
        checked: Mapping[str, float],
        judgments: Mapping[str, tuple[Judgment, ...]],
        response: str,
    ) -> Score:
        na = rubric.aggregation.na
        judged = {name: _mean_vote(votes, na) for name, votes in judgments.items()}
        parts = {**{c.id: None for c in criteria}, **checked, **judged}
        error = _unscorable(criteria, judged, judgments, na)
        total = Total(None) if error else aggregate(criteria, parts, rubric.aggregation.clip)
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
            rubric_version=rubric.version,
            flags=(
                *((f"reserved_markers:{hidden}",) if hidden else ()),
                *(f"plea:{kind}" for kind in suspicions(response)),
            ),
            explanation=error or _explain(parts, total),
        )


def fill_criterion(criterion: Criterion, rubric: Rubric, task: Task) -> Criterion:
    where = f"rubric {rubric.id!r}, criterion {criterion.id!r}, task {task.id!r}"
    args = {name: fill(value, task.info, where) for name, value in criterion.args.items()}
    return criterion.model_copy(update={"text": str(fill(criterion.text, task.info, where)), "args": args})


def _judgment(criterion: Criterion, verdict: Verdict | None, response: str, reply: str) -> Judgment:
    """A verdict as a judgment, once its quote was found in the response; ``unreadable`` for None."""
    if verdict is None:
        return Judgment(criterion=criterion.id, verdict=UNREADABLE, score=None, reply=reply)
    verdict = check_evidence(verdict, response, required=criterion.evidence)
    score = None if verdict.label == CANNOT_ASSESS else criterion.label_score(verdict.label)
    return Judgment(criterion=criterion.id, verdict=verdict.label, score=score, evidence=verdict.evidence, reply=reply)


def _checked(criterion: Criterion, response: str) -> float:
    assert criterion.check is not None
    try:
        return float(CHECKS[criterion.check](response, **criterion.args))
    except RecipeError:
        raise
    except (TypeError, ValueError, AttributeError, re.error) as error:
        args = dict(criterion.args)
        raise RecipeError(
            f"criterion {criterion.id!r}: check {criterion.check!r} cannot use args = {args!r:.200}: {error}"
        ) from error


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
    # Those that are only reported may stay open.
    counting = [c.id for c in criteria if (c.weight > 0 or c.veto) and c.id in judged]
    missing = [name for name in counting if judged[name] is None]
    if missing and len(missing) == len(counting):
        last = judgments[missing[0]][-1]
        return f"no judge criterion could be scored; {missing[0]} is {last.verdict}, last reply {last.reply[-200:]!r}"
    if missing and na == "fail":
        return f"criterion {missing[0]} could not be assessed, and the rubric says na = fail"
    return None


def _explain(parts: Mapping[str, float | None], total: Total) -> str:
    if total.vetoes:
        return f"Vetoed by {', '.join(total.vetoes)}."
    return ", ".join(f"{name} {'not scored' if score is None else f'{score:g}'}" for name, score in parts.items()) + "."
