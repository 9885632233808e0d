"""The lines of a rubric and the arithmetic over them.

Adding up is done here and never by a judge: judges asked to sum points drop the negative ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from posttrain.config import Value
from rewards.checks import CHECKS
from rewards.judge import CANNOT_ASSESS, MET, UNMET


class Criterion(Value):
    """One line of a rubric."""

    id: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    text: str = ""
    """What the judge is asked; a claim that is met or not. ``{field}`` is filled from ``task.info``."""
    weight: float = Field(default=1.0, ge=0)
    polarity: Literal["reward", "penalty"] = "reward"
    """Whether meeting it earns or costs. Never inferred from a sign or a wording."""
    kind: Literal["judge", "code"] = "judge"
    check: str | None = None
    """For ``kind = "code"``: a name in ``rewards.checks.CHECKS``."""
    args: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of the check; strings may hold ``{field}``."""
    choices: tuple[str, ...] = ()
    """Instead of met and unmet: answers from worst to best, worth evenly spaced values from 0 to 1."""
    descriptions: tuple[str, ...] = ()
    """What each of the choices means, where its label does not say it."""
    veto: bool = False
    """A penalty that is met, or a reward that is not, sends the whole score to the floor."""
    evidence: bool = False
    """A judge must quote the text to answer anything but ``unmet``."""
    tier: Literal["essential", "important", "optional", "pitfall"] | None = None
    title: str = ""
    """A name for people; judges do not see it."""
    tags: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        (self._check_judge if self.kind == "judge" else self._check_code)()
        return self

    def _check_judge(self) -> None:
        if not self.text.strip():
            raise ValueError("text is empty; expected the claim the judge is to decide")
        if self.check is not None or self.args:
            raise ValueError('check and args are for kind = "code"; remove them or change the kind')
        if self.choices:
            self._check_choices()
        if self.descriptions and len(self.descriptions) != len(self.choices):
            raise ValueError(
                f"{len(self.descriptions)} descriptions for {len(self.choices)} choices; expected one for each, or none"
            )

    def _check_choices(self) -> None:
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices) or CANNOT_ASSESS in self.choices:
            raise ValueError(f"choices = {list(self.choices)}; expected two or more different labels, worst first")
        if self.polarity == "penalty":
            raise ValueError('choices run from worst to best and always earn; use polarity = "reward"')

    def _check_code(self) -> None:
        if self.check is None or self.check not in CHECKS:
            raise ValueError(f"check = {self.check!r}; expected one of {', '.join(sorted(CHECKS))}")
        if self.choices or self.descriptions or self.evidence:
            raise ValueError('choices, descriptions and evidence are for kind = "judge"; remove them')
        try:
            inspect.signature(CHECKS[self.check]).bind("", **self.args)
        except TypeError as error:
            raise ValueError(f"args = {dict(self.args)} do not fit check {self.check!r}: {error}") from error

    @property
    def labels(self) -> tuple[str, ...]:
        """What a judge may answer, besides ``cannot_assess``."""
        return self.choices or (UNMET, MET)

    @property
    def claim(self) -> str:
        """What a judge is asked: the text and, where there are descriptions, what each choice means."""
        meanings = [f"{label}: {text}" for label, text in zip(self.choices, self.descriptions, strict=False)]
        return "\n".join([self.text, *meanings])

    def label_score(self, label: str) -> float:
        """What one of ``labels`` is worth, in [0, 1]; for a penalty 1 means that it applies."""
        return self.labels.index(label) / (len(self.labels) - 1)

    def vetoes(self, score: float | None) -> bool:
        """Whether this score is a veto; a criterion without a score never is."""
        if not self.veto or score is None:
            return False
        return score >= 0.5 if self.polarity == "penalty" else score < 0.5


class Aggregation(Value):
    """How criterion scores become one value."""

    mode: Literal["weighted"] = "weighted"
    normalize: Literal["positive"] = "positive"
    clip: tuple[float, float] = (0.0, 1.0)
    """Range of the value; its lower end is the floor a veto sends the score to."""
    na: Literal["skip", "zero", "fail"] = "skip"
    """A criterion the judge cannot assess is left out, counts as not met, or leaves the rollout unscored."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip = {list(self.clip)}; expected [low, high] with low < high")
        return self


@dataclass(frozen=True, slots=True)
class Total:
    """The value of a rubric, None when nothing could be scored, and the criteria that vetoed it."""

    value: float | None
    vetoes: tuple[str, ...] = ()


def aggregate(
    criteria: Sequence[Criterion], scores: Mapping[str, float | None], clip: tuple[float, float] = (0.0, 1.0)
) -> Total:
    """``(sum w s [reward] - sum w s [penalty]) / sum w [reward]``, clipped.

    A rubric of penalties only gives ``1 - sum(w s) / sum(w)``. Criteria whose score s is None are left out of every
    sum; when that leaves no weight to divide by, the value is None and not 0. A veto gives the floor.
    """
    vetoes = tuple(c.id for c in criteria if c.vetoes(scores[c.id]))
    if vetoes:
        return Total(clip[0], vetoes)
    earned = lost = reward_weight = penalty_weight = 0.0
    for criterion in criteria:
        score = scores[criterion.id]
        if score is None:
            continue
        if criterion.polarity == "reward":
            earned += criterion.weight * score
            reward_weight += criterion.weight
        else:
            lost += criterion.weight * score
            penalty_weight += criterion.weight
    # Which formula applies follows from the rubric, not from what happened to be scorable.
    if any(c.polarity == "reward" and c.weight > 0 for c in criteria):
        value = (earned - lost) / reward_weight if reward_weight > 0 else None
    else:
        value = 1 - lost / penalty_weight if penalty_weight > 0 else None
    return Total(None if value is None else min(max(value, clip[0]), clip[1]))
