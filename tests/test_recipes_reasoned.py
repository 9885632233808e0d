"""Tasks with demonstrations in effort modes: the thoughts lead to the answer, and the longer mode finds its slips."""

from __future__ import annotations

import pytest

from posttrain.conversation.effort import HIGH, MAX, MODES, NON_THINK
from posttrain.errors import RecipeError
from recipes.tasks.reasoned import ReasonedSums, ReasonedWalks, signed_terms

SOURCES = {"sums": ReasonedSums, "walks": ReasonedWalks}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_demonstrations_think_as_their_mode_says(source) -> None:
    lengths: dict[str, list[int]] = {mode: [] for mode in MODES}
    slipped = 0
    for index, (asked, said) in enumerate(source().demonstrations(count=300, seed=0)):
        assert asked["effort"] == MODES[index % 3]
        lines = said["reasoning"].split("\n") if "reasoning" in said else []
        lengths[asked["effort"]].append(len(lines))
        if asked["effort"] == NON_THINK:
            assert "reasoning" not in said
            continue
        attempts = [attempt.split("\n") for attempt in said["reasoning"].split("\nagain\n")]
        ends = [int(attempt[-1].replace(">", "=").rpartition("=")[2]) for attempt in attempts]
        assert len(attempts) == (1 if asked["effort"] == HIGH else 3 if ends[0] != ends[1] else 2)
        assert ends[-1] == int(said["content"])
        slipped += ends[0] != int(said["content"])
        for attempt in attempts[1:] if len(attempts) == 3 else attempts:
            for line in attempt:
                left, equals, right = line.partition(" = ")
                assert not equals or sum(signed_terms(left)) == int(right)
    assert lengths[NON_THINK] == [0] * 100
    assert max(lengths[HIGH]) < min(lengths[MAX])
    assert 5 <= slipped <= 30


def test_walks_end_where_the_arrows_lead() -> None:
    for task in ReasonedWalks().heldout(count=50):
        arrows, _, request = task.prompt[0]["content"].partition(" From ")
        links = dict(arrow.split(">") for arrow in arrows.split())
        place, steps = request.removesuffix(" steps.").split(" go ")
        for _ in range(int(steps)):
            place = links[place]
        assert place == task.answer


def test_modes_without_a_way_to_reason_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"ReasonedSums\.efforts = \('high', '90'\): expected some of non-think"):
        ReasonedSums(efforts=(HIGH, "90"))
