"""How well the turns of a rollout keep to DSML, V4's form of tool calls."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from posttrain.conversation.dsml_parser import MalformedTurn, Repair, parse_shown
from posttrain.errors import RecipeError
from posttrain.protocols import Sandbox
from posttrain.types import FinishReason, Rollout, Score, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class DsmlFormat:
    """The mean over the turns: 1.0 for one that V4's strict parser reads, ``repaired`` for one that can be mended in
    one way only, 0.0 for one that cannot be read. A turn that was cut off by its budget may lack its end.

    Parts: the shares of turns that are ``strict``, ``repaired`` and ``malformed``. The explanation counts the reasons.
    A look-alike block, which the strict parser would take for content, counts as repaired.
    """

    repaired: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.repaired <= 1:
            raise RecipeError(f"DsmlFormat: repaired = {self.repaired}; expected a number from 0 to 1; correct it")

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        verdicts = [_verdict(turn) for turn in rollout.turns]
        kinds = Counter(kind for kind, _ in verdicts)
        count = max(len(verdicts), 1)
        parts = {kind: kinds[kind] / count for kind in ("strict", "repaired", "malformed")}
        reasons = Counter(reason for _, found in verdicts for reason in found)
        said = ["as they should be", *(f"{reason} ({times})" for reason, times in reasons.most_common())]
        return Score(
            value=parts["strict"] + self.repaired * parts["repaired"],
            parts=parts,
            explanation=f"{kinds['strict']} of {len(verdicts)} turns are {'; '.join(said)}.",
        )


def _verdict(turn: Turn) -> tuple[str, list[str]]:
    cut_off = turn.completion.finish is FinishReason.LENGTH
    try:
        read = parse_shown(turn.text, ended=not cut_off, strict=False)
    except MalformedTurn as error:
        return "malformed", [error.rule]
    repairs = [repair.value for repair in read.repairs if not (cut_off and repair is Repair.NO_EOS)]
    return ("repaired", repairs) if repairs else ("strict", [])
