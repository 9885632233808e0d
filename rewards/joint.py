"""Judge prompts with known answers, and what a reply to one earns: the actor trained as its own judge.

DeepSeek-V4 trains its generative reward model inside the policy and says nothing of how. Here an answer is known from
one of three sources: the score that code gave a rollout of the run itself (as Kimi K2 and DeepSeekMath-V2 keep a judge
anchored), a golden set that people labelled, or a preference pair, shown in both orders. A reply earns 1 less the
distance of its verdict from the answer (DeepSeekMath-V2), and nothing when it cannot be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.config import Value
from posttrain.errors import JudgeError, RecipeError
from posttrain.protocols import Ask, Judge, Sandbox
from posttrain.types import AnyRollout, JudgeTask, Judgment, Message, Rollout, Score, ScoreStatus, Task
from rewards.checks import words
from rewards.judge import (
    CANNOT_ASSESS,
    MET,
    UNMET,
    Dialect,
    LineDialect,
    PolicyJudge,
    Question,
    Verdict,
    check_evidence,
    derive_nonce,
)
from rewards.rubric import UNREADABLE, fill, judged_text

BINARY = (UNMET, MET)


class KnownVerdict(Value):
    """How the score of a rollout tells whether its text meets a criterion."""

    criterion: str
    """What the judge is asked; ``{field}`` is filled from ``task.info``."""
    part: str = ""
    """A part of the score that code computed; empty: the score's value."""
    met_at: float = 1.0
    """The criterion is met from here on."""
    unmet_at: float = 0.0
    """The criterion is not met up to here; between the two nothing is known."""
    evidence: bool = False
    """A reply must quote the text to answer ``met``."""

    def label(self, score: Score) -> str | None:
        """The right answer; None when the score does not say. Raises ``RecipeError`` for a part a judge decided."""
        if any(judgment.criterion == self.part.rpartition("/")[2] for judgment in score.judgments):
            raise RecipeError(
                f"KnownVerdict.part = {self.part!r} is a judge's own verdict, not a known one; expected a part that "
                "code computed; choose another part or check the criterion in code"
            )
        if not self.part and score.judgments:
            raise RecipeError(
                "KnownVerdict.part is empty and the score's value rests on a judge; expected a value that code "
                "computed; name a part that did"
            )
        found = score.parts.get(self.part) if self.part else score.value
        if found is None:
            return None
        return MET if found >= self.met_at else UNMET if found <= self.unmet_at else None


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldenRow:
    """One text whose verdict on one criterion is known beforehand."""

    id: str
    criterion: str
    response: str
    label: str
    """The right answer: ``met`` or ``unmet``, or one of ``labels``."""
    labels: tuple[str, ...] = BINARY
    """Possible answers, worst first."""
    prompt: tuple[Message, ...] = ()
    """The task the response answers."""
    author: str = "other"
    """Who wrote the response. ``policy``: the model under training, whose own texts it may come to prefer."""
    evidence: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two responses to one task, of which people or code prefer the first."""

    id: str
    chosen: str
    rejected: str
    criterion: str = "It is the better answer."
    """What the chosen one is better at."""
    prompt: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCurriculum:
    """Judge prompts from known verdicts, golden sets and preference pairs (``posttrain.protocols.JudgeTaskSource``)."""

    verdicts: tuple[KnownVerdict, ...] = ()
    golden: tuple[GoldenRow, ...] = ()
    pairs: tuple[PreferencePair, ...] = ()
    dialect: Dialect = field(default_factory=LineDialect)

    def __post_init__(self) -> None:
        if not (self.verdicts or self.golden or self.pairs):
            raise RecipeError("JudgeCurriculum has no verdicts, golden rows or pairs; expected at least one of them")

    def from_rollout(self, rollout: AnyRollout, score: Score) -> list[JudgeTask]:
        """One prompt for each criterion on which the score says the answer; none about a text without words."""
        response = judged_text(rollout.text)
        if not words(response):
            return []
        found = []
        for verdict in self.verdicts:
            label = verdict.label(score)
            if label is not None:
                where = f"KnownVerdict on task {rollout.task.id!r}"
                row = GoldenRow(
                    id=_digest(rollout.task.id, response, verdict.criterion),
                    criterion=str(fill(verdict.criterion, rollout.task.info, where)),
                    response=response,
                    label=label,
                    prompt=rollout.task.prompt,
                    author="policy",
                    evidence=verdict.evidence,
                )
                found.append(golden_task(row, self.dialect, source="verified"))
        return found

    def anchors(self) -> list[JudgeTask]:
        golden = [golden_task(row, self.dialect) for row in self.golden]
        return golden + [pair_task(pair, self.dialect) for pair in self.pairs]


def golden_task(row: GoldenRow, dialect: Dialect, *, source: str = "golden") -> JudgeTask:
    """The prompt about one text."""
    if row.label not in row.labels:
        raise RecipeError(f"golden row {row.id!r}: label = {row.label!r}; expected one of {', '.join(row.labels)}")
    question = Question(id="c1", criterion=row.criterion, labels=row.labels, prompt=row.prompt, response=row.response)
    extra = {"source": source, "author": row.author, "evidence": row.evidence}
    form = _prompt(f"judge-{row.id}", question, row.label, dialect, extra)
    return JudgeTask(variants=(form,), label=row.label, labels=row.labels, source=source)


def pair_task(pair: PreferencePair, dialect: Dialect) -> JudgeTask:
    """The prompt about two texts in both orders: in one the claim that the first is better holds, in the other not."""
    forms = []
    for order, (first, second) in {
        "ab": (pair.chosen, pair.rejected),
        "ba": (pair.rejected, pair.chosen),
    }.items():
        question = Question(
            id="c1",
            criterion=f"The first is better than the second. {pair.criterion}",
            labels=BINARY,
            prompt=pair.prompt,
            response=f"First: {first}\nSecond: {second}",
        )
        extra = {"source": "pair", "author": "other", "evidence": False}
        answer = MET if order == "ab" else UNMET
        forms.append(_prompt(f"judge-{pair.id}-{order}", question, answer, dialect, extra))
    return JudgeTask(variants=tuple(forms), label=None, labels=BINARY, source="pair")


def _prompt(task_id: str, question: Question, answer: str, dialect: Dialect, extra: Mapping[str, Any]) -> Task:
    nonce = derive_nonce(task_id, response=question.response, num_chars=dialect.nonce_chars)
    info = {
        "criterion": question.criterion,
        "labels": list(question.labels),
        "response": question.response,
        "nonce": nonce,
        **extra,
    }
    return Task(id=task_id, domain="judge", prompt=dialect.render(question, nonce), answer=answer, info=info)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictReward:
    """``1 - |s' - s|`` of a judge reply: s' is the value of its verdict, s that of the known answer, both in [0, 1].

    With two labels that is 1 for the right one and 0 for the other. A reply that cannot be read, abstains or quotes
    what is not in the text earns 0: here it is the policy's own work. A task without an answer is not scored.
    """

    dialect: Dialect = field(default_factory=LineDialect)

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        return self._read(rollout)[0]

    def _read(self, rollout: Rollout) -> tuple[Score, Verdict | None]:
        """The score, and the verdict when the reply had one that counts."""
        info, answer = rollout.task.info, rollout.task.answer
        labels = tuple(info.get("labels", BINARY))
        if answer is None or answer not in labels:
            error = f"judge task {rollout.task.id!r} has answer {answer!r}; expected one of {', '.join(labels)}"
            return Score(value=None, status=ScoreStatus.REWARD_ERROR, error=error), None
        question = Question(id="c1", criterion=info["criterion"], labels=labels, response=info["response"])
        reply = rollout.text
        try:
            verdict = self.dialect.parse(reply, question, info["nonce"])
        except JudgeError as error:
            judgment = Judgment(criterion=info["criterion"], verdict=UNREADABLE, score=None, reply=reply)
            return Score(value=0.0, judgments=(judgment,), flags=("unreadable",), explanation=str(error)), None
        verdict = check_evidence(verdict, info["response"], required=bool(info.get("evidence")))
        given = None if verdict.label == CANNOT_ASSESS else _value(verdict.label, labels)
        judgment = Judgment(
            criterion=info["criterion"], verdict=verdict.label, score=given, evidence=verdict.evidence, reply=reply
        )
        value = 0.0 if given is None else 1.0 - abs(given - _value(answer, labels))
        explanation = f"The reply says {verdict.label}, the known answer is {answer}."
        score = Score(value=value, judgments=(judgment,), explanation=explanation)
        return score, verdict if given is not None else None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetaVerdictReward(VerdictReward):
    """``VerdictReward`` times what a second judge says of the quote (meta-verification, DeepSeekMath-V2).

    Only right verdicts with a quote are put to it, so that a right guess with a wrong reason does not pay in full.
    A meta-judge that cannot be read leaves the reply unscored.
    """

    judge: Judge | None = None
    """None means the policy's lagged snapshot."""
    unsupported: float = 0.5
    """Factor for a quote that the meta-judge does not find to show what the verdict says."""
    max_tokens: int = 64
    max_retries: int = 2
    temperature: float = 0.5

    @property
    def asks_policy(self) -> bool:
        return self.judge is None

    def with_policy(self, ask: Ask) -> MetaVerdictReward:
        return self if self.judge is not None else replace(self, judge=PolicyJudge(ask, self.temperature))

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        score, verdict = self._read(rollout)
        if verdict is None or not score.value or not verdict.evidence:
            return score
        if self.judge is None:
            raise RecipeError("MetaVerdictReward needs a judge; set judge, or call with_policy to let the policy judge")
        criterion = str(rollout.task.info["criterion"])
        question = Question(id="meta", criterion=criterion, labels=BINARY, response=verdict.evidence)
        for attempt in range(self.max_retries + 1):
            key = (rollout.id, "meta", attempt)
            nonce = derive_nonce(*key, response=verdict.evidence, num_chars=self.dialect.nonce_chars)
            messages = self.dialect.render(question, nonce)
            seed = int(_digest(*map(str, key))[:7], 16)
            reply = await self.judge.ask(messages, max_tokens=self.max_tokens, seed=seed)
            try:
                meta = self.dialect.parse(reply, question, nonce)
            except JudgeError:
                continue
            agrees = meta.label == MET
            parts = {"verdict": score.value, "meta": float(agrees)}
            return replace(score, value=score.value * (1.0 if agrees else self.unsupported), parts=parts)
        error = f"the meta-judge could not be read, last reply {reply[-200:]!r}"
        return replace(score, value=None, status=ScoreStatus.PARSE_ERROR, error=error)


def read_golden(path: str | Path, criteria: Mapping[str, str]) -> tuple[GoldenRow, ...]:
    """Rows of a JSON Lines file ``{"prompt", "response", "labels": {"c1": "met"}, "author"}``, one per label.

    ``criteria`` gives the text of each criterion id; labels of others are left out. Raises ``RecipeError``, naming the
    line.
    """
    rows = []
    # Not splitlines: texts may hold line separators that JSON does not escape.
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            for name, label in data["labels"].items():
                if name in criteria:
                    rows.append(_golden_row(data, number, name, str(label), criteria[name]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f'{path}:{number}: {error!r}; expected {{"response": "...", "labels": {{"ID": "met"}}}}; mend the line'
            ) from error
    return tuple(rows)


def _golden_row(data: Mapping[str, Any], number: int, name: str, label: str, criterion: str) -> GoldenRow:
    prompt = data.get("prompt", "")
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    where = f"golden row {number}"
    return GoldenRow(
        id=f"{number}-{name}",
        criterion=str(fill(criterion, data.get("info", {}), where)),
        response=data["response"],
        label=label,
        prompt=tuple(messages),
        author=data.get("author", "other"),
    )


def _value(label: str, labels: Sequence[str]) -> float:
    return labels.index(label) / (len(labels) - 1)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()[:16]
