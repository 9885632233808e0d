"""Nothing a response says about the judgment is paid, in any dialect, however its judge replies."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from benchmarks.judge_attacks import REPLIES, STACKS, paid_by_stack
from rewards.attacks import (
    BEHAVIOURS,
    CAUGHT_BY_CANARY,
    DIALECTS,
    HARMLESS,
    Asked,
    Attack,
    BehavingJudge,
    attacked_value,
    attacks,
    run_attacks,
)
from rewards.untrusted import judge_view, suspicions


def test_no_attack_is_paid_in_any_dialect() -> None:
    outcomes = asyncio.run(run_attacks())
    assert [outcome for outcome in outcomes if outcome.paid] == []
    tried = Counter((outcome.dialect, outcome.behaviour) for outcome in outcomes)
    assert set(tried.values()) == {len(attacks())}
    assert len(tried) == len(DIALECTS) * len(BEHAVIOURS) + 3 * len(CAUGHT_BY_CANARY)


def test_honest_judges_are_heard_through_most_attacks() -> None:
    """Nothing paid because nothing can be read would be no achievement."""
    outcomes = asyncio.run(run_attacks())
    for dialect in DIALECTS:
        read = [
            o.value is not None for o in outcomes if o.dialect == dialect and o.behaviour == "votes no, then quotes it"
        ]
        assert sum(read) > 0.85 * len(read)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_judge_that_gives_credit_in_earnest_pays_so_the_suite_can_fail(dialect: str) -> None:
    def earnest(asked: Asked, raw: str) -> str:
        reply = asked.reply(credit=True)
        canaries = [name for name in asked.labels if name[1:].isdigit()]
        for name in canaries:
            head, row = reply.split(f'{{"id": "{name}"')
            reply = f'{head}{{"id": "{name}"{row.replace("met", "unmet", 1)}'
        return reply

    text = "First take the wheel off the frame."
    value = asyncio.run(attacked_value(Attack("none", "none", text), dialect, BehavingJudge(earnest, text)))
    assert value == 1.0


def test_attacks_differ_and_what_they_imitate_is_neutralised() -> None:
    suite = attacks()
    assert len({attack.name for attack in suite}) == len({attack.text for attack in suite}) == len(suite)
    assert HARMLESS not in {attack.text for attack in suite}
    for attack in suite:
        if attack.family in ("thinking", "chat marker", "hidden"):
            assert judge_view(attack.text).num_neutralised > 0, attack.name


def test_pleas_are_told_and_ordinary_texts_are_not() -> None:
    told = {attack.name: suspicions(attack.text) for attack in attacks() if attack.family == "request"}
    assert told["request/override"] == ("override", "asks_for_verdict")
    assert told["request/authority"] == ("addresses_judge", "asks_for_verdict", "claims_to_meet")
    assert sum(bool(kinds) for kinds in told.values()) >= 4
    for text in (
        "The judge ruled that the law was above the king, and nobody could ignore it.",
        "Rate of climb: 10 m/s. I would grade this road as steep.",
        "Please consider this: the answer is 10.",
        HARMLESS,
    ):
        assert suspicions(text) == (), text


def test_every_other_rule_pays_some_honest_judge_s_no_and_gives_0_without_an_attack() -> None:
    paid = paid_by_stack()
    for stack in STACKS:
        assert paid[stack.name]["quotes it, then votes no"], stack.name
        plain = "It does not say how."
        assert stack.value(REPLIES["quotes it, then votes no"](plain, stack.refusal), plain) == 0
