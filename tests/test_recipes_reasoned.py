"""Tasks with demonstrations in effort modes: the thoughts lead to the answer, in steps as small as the mode says."""

from __future__ import annotations

import pytest

from posttrain.conversation.effort import HIGH, MAX, MODES, NON_THINK
from posttrain.errors import RecipeError
from recipes.tasks.reasoned import ReasonedSums, bills, rests


@pytest.mark.parametrize("source", [bills(), rests()], ids=["bills", "rests"])
def test_demonstrations_think_as_their_mode_says(source: ReasonedSums) -> None:
    steps: dict[str, list[int]] = {mode: [] for mode in MODES}
    for index, (asked, said) in enumerate(source.demonstrations(count=300, seed=0)):
        mode = asked["effort"]
        assert mode == source.modes[index % len(source.modes)]
        items = asked["content"].splitlines()[1:]
        counted = [f"{item[0]}{left}" for item in items for left in range(int(item[1:]), 0, -1)]
        noted = {NON_THINK: [], HIGH: items, MAX: counted}[mode]
        lines = said["reasoning"].splitlines() if noted else []
        steps[mode].append(len(lines))
        total = source.start
        for line, expected in zip(lines, noted, strict=True):
            total += source.sign * (1 if mode == MAX else int(expected[1]))
            assert line == f"{expected} {'+' if source.sign > 0 else '-'} {total}"
        assert int(said["content"]) == source.start + source.sign * sum(int(item[1:]) for item in items)
        assert mode == NON_THINK or total == int(said["content"])
    assert (steps[NON_THINK], steps[HIGH]) == ([0] * 75, [4] * 150)
    assert sum(steps[MAX]) > 10 * 75


def test_modes_without_a_way_to_reason_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"ReasonedSums\.modes = \('high', '90'\): expected some of non-think"):
        ReasonedSums(domain="sum", request="Add up:", modes=(HIGH, "90"))
