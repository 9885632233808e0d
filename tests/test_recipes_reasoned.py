"""Tasks with demonstrations in effort modes: the thoughts lead to the answer, and the longer mode finds its slips."""

from __future__ import annotations

import re

import pytest

from posttrain.conversation.effort import HIGH, MODES, NON_THINK
from posttrain.errors import RecipeError
from recipes.tasks.reasoned import AGAIN, ReasonedSums, bills, dials


@pytest.mark.parametrize("source", [bills(), dials()], ids=["bills", "dials"])
def test_demonstrations_think_as_their_mode_says(source: ReasonedSums) -> None:
    lengths: dict[str, list[int]] = {mode: [] for mode in MODES}
    slipped = 0
    for index, (asked, said) in enumerate(source.demonstrations(count=300, seed=0)):
        mode = asked["effort"]
        assert mode == MODES[index % 3]
        numbers = [int(line[1:]) for line in asked["content"].splitlines()[1:]]
        answer = sum(numbers) if source.modulus is None else sum(numbers) % source.modulus
        assert int(said["content"]) == answer
        thoughts = said.get("reasoning", "")
        lengths[mode].append(len(thoughts))
        if mode == NON_THINK:
            assert not thoughts
            continue
        goes = [go.splitlines() for go in thoughts.split(f"\n{AGAIN}\n")]
        totals = [int(go[-1].rpartition("= ")[2]) for go in goes]
        assert len(goes) == (1 if mode == HIGH else 2 if totals[0] == totals[1] else 3)
        assert totals[-1] == totals[-2 if len(goes) > 1 else -1] == answer
        slipped += totals[0] != answer
        for go, order in zip(goes, (1, -1, 1), strict=False):
            assert [int(re.findall(r"\d+", line)[0]) for line in go] == numbers[::order]
        for line in [line for go in goes[-2:] for line in go]:
            before, number, total = map(int, re.findall(r"\d+", line)[1:])
            assert (before + number - total) % (source.modulus or 1000) == 0
    assert lengths[NON_THINK] == [0] * 100
    assert max(lengths[HIGH]) < min(lengths["max"])
    assert 10 <= slipped <= 30


def test_modes_without_a_way_to_reason_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"ReasonedSums\.modes = \('high', '90'\): expected some of non-think"):
        ReasonedSums(domain="sum", request="Add up:", modes=(HIGH, "90"))
