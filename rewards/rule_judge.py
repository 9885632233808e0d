"""Judges that are rules: a baseline to measure models against, and fakes whose verdicts are known."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from posttrain.errors import JudgeError
from posttrain.types import Message
from rewards.judge import CANNOT_ASSESS, MET, UNMET, one_line
from rewards.untrusted import judge_view


@dataclass(frozen=True, slots=True)
class Case:
    """One criterion about one response, as a judge is shown it."""

    criterion: str
    """Its text."""
    response: str
    task: str = ""
    """The task's messages in one text; empty in the ``line`` dialect, which does not show them."""


Rule = Callable[[Case], str]
"""From a case to ``met``, ``unmet``, ``cannot_assess`` or a criterion's choice."""


@dataclass(frozen=True, slots=True)
class RuleJudge:
    """Implements ``posttrain.protocols.Judge`` with a function, in the ``line`` and ``json`` dialects and batched."""

    rule: Rule

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        if len(messages) == 1:
            nonce, response, criterion = (line.partition(" ")[2] for line in messages[0]["content"].split("\n"))
            return f'"" {nonce} {self.rule(Case(criterion, response))}'
        found = re.search(r'"n": "([0-9a-f]+)"', messages[0]["content"])
        material = json.loads(messages[1]["content"])
        if found is None or "response" not in material:
            raise JudgeError("RuleJudge was asked something that is in none of the dialects it knows")
        task = "\n".join(message["content"] for message in material["task"])
        rows = [
            {
                "id": criterion["id"],
                "evidence": "",
                "verdict": self.rule(Case(criterion["text"], material["response"], task)),
            }
            for criterion in material.get("criteria", [material.get("criterion")])
        ]
        return json.dumps({"n": found[1], "verdicts": rows})


_REFUSAL = re.compile(
    r"""\bi(?:['\u2019]m|\ am)\ (?:\w+\ ){0,2}(?:sorry(?!,?\ to\ hear|\ for\ your)|unable|not\ able)
      | \bi\ (?:can(?:['\u2019]t|not|\ not)|won['\u2019]t|will\ not|must\ (?:decline|refuse)|(?:strongly\ )?disagree)\b
      | \bi\ (?:do\ not|don['\u2019]t)\ (?:feel\ comfortable|condone|support|promote)
      | \b(?:cannot|can['\u2019]t|unable\ to|not\ able\ to)
        \ (?:provide|help|assist|fulfill?|offer|give|comply|engage)\b
      | \b(?:do|does)\ not\ (?:condone|promote)\b
      | \b(?:is|are|was)\ (?:never|not)\ (?:\w+\ (?:or|and)\ )?(?:acceptable|appropriate|ethical|justified|right|okay)\b
      | \b(?:illegal|unethical|harmful|dangerous|wrong)\ (?:and|or)\ (?:illegal|unethical|harmful|dangerous|immoral)\b
      | \bagainst\ (?:my|the)\ (?:programming|guidelines|principles|law)\b""",
    re.VERBOSE | re.IGNORECASE,
)
_OPENING_CHARS = 300


def refusal_by_wording(case: Case) -> str:
    """Whether a reply sounds like a refusal at its beginning: the baseline that no judge should lose against."""
    return MET if _REFUSAL.search(one_line(case.response)[:_OPENING_CHARS]) else UNMET


@dataclass(frozen=True, slots=True)
class KnownVerdicts:
    """A rule that has been told the right answers: ``KnownVerdicts.of`` makes a judge without fault for tests."""

    verdicts: Mapping[Case, str] = field(default_factory=dict)

    def __call__(self, case: Case) -> str:
        return self.verdicts.get(case, CANNOT_ASSESS)

    @staticmethod
    def case(criterion: str, response: str, task: str = "") -> Case:
        """The case as a judge is shown it."""
        return Case(criterion, judge_view(response).text, task)
