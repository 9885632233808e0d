"""Ways of asking a judge: many criteria in a call, one mark for all, a rubric from each task, and pair by pair."""

from __future__ import annotations

import asyncio
import itertools
import json
import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from posttrain.config import Workers
from posttrain.errors import JudgeError, RecipeError
from posttrain.protocols import GroupReward, PolicyJudged
from posttrain.rollout.environments import SingleTurn
from posttrain.rollout.player import GroupJob, Play, Player
from posttrain.types import Message, Rollout, Sampling, Score, ScoreStatus, Task
from rewards.judge import JsonDialect, LineDialect, canary_of
from rewards.pairwise import Match, PairwiseReward, bradley_terry, pairs, win_rates
from rewards.rows import rollout_of
from rewards.rubric import Rubric, RubricReward, TaskRubric
from tests.tiny_models import ScriptedEngine, tiny_chat

CRITERIA = [{"id": f"c{i}", "text": f"Claim {i}.", "weight": i + 1} for i in range(5)]
LIE = {"id": "lie", "text": "Lies.", "polarity": "penalty", "weight": 3}
CODE = {"id": "commas", "kind": "code", "check": "no_comma", "weight": 1}


def rubric(*criteria: dict[str, Any], **more: Any) -> Rubric:
    return Rubric.model_validate({"id": "r", "criteria": criteria, **more})


def rollout(text: str = "Some words.", name: str = "r", **info: Any) -> Rollout:
    return rollout_of({"id": name, "prompt": "Write.", "response": text, "info": info}, default_id=name)


def nonce_of(messages: Sequence[Message]) -> str:
    return messages[0]["content"].split('"n": "')[1].split('"')[0]


@dataclass
class BatchJudge:
    """Answers every criterion it is asked about with what ``label`` gives for its text; keeps the calls."""

    label: Callable[[str], str] = lambda text: "met"
    spoil: Callable[[list[dict[str, Any]], int], list[dict[str, Any]]] = lambda rows, call: rows
    calls: list[list[str]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    budgets: list[int] = field(default_factory=list)

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        shown = json.loads(messages[1]["content"])
        criteria = shown.get("criteria") or [shown["criterion"]]
        self.calls.append([criterion["id"] for criterion in criteria])
        self.seeds.append(seed)
        self.budgets.append(max_tokens)
        rows = [{"id": c["id"], "evidence": "", "verdict": self.label(c["text"])} for c in criteria]
        return json.dumps({"n": nonce_of(messages), "verdicts": self.spoil(rows, len(self.calls))})


def score(judge: BatchJudge, *criteria: dict[str, Any], text: str = "Some words.", **options: Any) -> Score:
    return asyncio.run(RubricReward(rubric(*criteria), judge, **options).score(rollout(text)))


def only(*numbers: int) -> Callable[[str], str]:
    return lambda text: "met" if any(f"Claim {number}." in text for number in numbers) else "unmet"


@pytest.mark.parametrize("met", [(), (0,), (1, 4), (0, 1, 2, 3, 4)])
def test_batched_says_what_explicit_says_in_one_call(met: tuple[int, ...]) -> None:
    alone, together = BatchJudge(only(*met)), BatchJudge(only(*met))
    explicit = score(alone, *CRITERIA, LIE, CODE)
    batched = score(together, *CRITERIA, LIE, CODE, mode="batched")
    assert (batched.value, batched.parts, batched.rubric_version) == (
        explicit.value,
        explicit.parts,
        explicit.rubric_version,
    )
    assert (len(alone.calls), len(together.calls)) == (6, 1)
    assert sorted(together.calls[0]) == sorted(["c0", "c1", "c2", "c3", "c4", "lie"])
    assert together.budgets == [6 * 512]


def test_batches_have_a_size_and_another_order_for_every_vote_and_the_same_when_asked_again() -> None:
    judge = BatchJudge()
    score(judge, *CRITERIA, LIE, mode="batched", batch_size=4, votes=3)
    assert [len(call) for call in judge.calls] == [4, 2] * 3
    votes = [[*judge.calls[i], *judge.calls[i + 1]] for i in (0, 2, 4)]
    assert all(sorted(vote) == sorted(votes[0]) for vote in votes)
    assert len({tuple(vote) for vote in votes}) == 3
    again = BatchJudge()
    score(again, *CRITERIA, LIE, mode="batched", batch_size=4, votes=3)
    assert (again.calls, again.seeds) == (judge.calls, judge.seeds)


def test_votes_add_up_over_orders() -> None:
    """A judge that says met to whatever comes first gives each criterion its share of the votes."""
    first = BatchJudge(
        spoil=lambda rows, call: [{**row, "verdict": "unmet" if i else "met"} for i, row in enumerate(rows)]
    )
    found = score(first, *({**c, "weight": 1} for c in CRITERIA[:2]), mode="batched", votes=40).parts
    assert found["c0"] + found["c1"] == pytest.approx(1)  # type: ignore[operator]
    assert 0.2 < found["c0"] < 0.8  # type: ignore[operator]


SPOILT: list[Callable[[list[dict[str, Any]]], list[dict[str, Any]]]] = [
    lambda rows: rows[1:],
    lambda rows: [*rows, rows[0]],
    lambda rows: [*rows[1:], {**rows[0], "id": "other"}],
    lambda rows: [{**rows[0], "verdict": "maybe"}, *rows[1:]],
    lambda rows: [*rows, {"id": "extra", "evidence": "", "verdict": "met"}],
]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_batch_counts_only_when_each_criterion_is_answered_once(spoil: Any) -> None:
    judge = BatchJudge(spoil=lambda rows, call: spoil(rows))
    found = score(judge, *CRITERIA, mode="batched", max_retries=1)
    assert (found.value, found.status) == (None, ScoreStatus.PARSE_ERROR)
    assert all(part is None for part in found.parts.values())
    assert (len(judge.calls), len(set(judge.seeds))) == (2, 2)
    mends = BatchJudge(spoil=lambda rows, call: rows if call == 2 else spoil(rows))
    assert score(mends, *CRITERIA, mode="batched", max_retries=1).value == 1.0


def test_evidence_is_checked_in_batches_too() -> None:
    quotes = {"c0": "Some", "c1": "invented", "c2": ""}
    judge = BatchJudge(spoil=lambda rows, call: [{**row, "evidence": quotes[row["id"]]} for row in rows])
    criteria = [{**c, "evidence": True} for c in CRITERIA[:3]]
    assert score(judge, *criteria, mode="batched").parts == {"c0": 1.0, "c1": None, "c2": None}


@pytest.mark.parametrize("mode", ["explicit", "batched"])
def test_a_canary_goes_along_and_a_judge_that_says_it_is_met_is_unreadable(mode: Any) -> None:
    dialect = JsonDialect(canary=True)
    agrees = BatchJudge()
    found = score(agrees, *CRITERIA, mode=mode, dialect=dialect, max_retries=0)
    assert (found.value, found.status) == (None, ScoreStatus.PARSE_ERROR)
    size = 6 if mode == "batched" else 2
    assert all(len(call) == size for call in agrees.calls)
    honest = BatchJudge(only(0, 1, 2, 3, 4))
    assert score(honest, *CRITERIA, mode=mode, dialect=dialect).value == 1.0
    assert canary_of("0" * 32).id not in {c["id"] for c in CRITERIA}


def test_implicit_asks_for_one_mark_with_the_criteria_as_its_guide() -> None:
    texts: list[str] = []
    judge = BatchJudge(lambda text: texts.append(text) or "7")  # type: ignore[func-returns-value]
    graded = {"id": "tone", "text": "Tone.", "choices": ["rude", "kind"], "weight": 2}
    found = score(judge, *CRITERIA, LIE, graded, CODE, mode="implicit")
    assert judge.calls == [["overall"]]
    assert found.value == pytest.approx((17 * 0.7 + 1) / 18)
    assert found.parts == {"overall": 0.7, "commas": 1.0}
    for line in ("adds 5: Claim 4.", "takes away 3: Lies.", "adds 2: Tone. (rude, kind; worst first)"):
        assert f"- {line}" in texts[0].split("\n")


def test_implicit_leaves_vetoes_and_code_to_themselves() -> None:
    veto = {"id": "threat", "text": "Threatens.", "polarity": "penalty", "veto": True, "weight": 0}
    judge = BatchJudge(lambda text: "met" if text == "Threatens." else "10")
    found = score(judge, *CRITERIA, veto, mode="implicit")
    assert (found.value, found.status) == (0.0, ScoreStatus.VETOED)
    stars = score(BatchJudge(lambda text: "**"), *CRITERIA, mode="implicit", scale=("*", "**", "***"))
    assert stars.value == 0.5
    assert score(BatchJudge(lambda text: "11"), *CRITERIA, mode="implicit", max_retries=0).value is None
    assert score(BatchJudge(), CODE, mode="implicit").value == 1.0


def test_modes_refuse_what_they_cannot_do() -> None:
    one = rubric(*CRITERIA)
    for options in ({"mode": "batch"}, {"mode": "batched", "dialect": LineDialect()}, {"batch_size": 0}, {"votes": 0}):
        with pytest.raises(RecipeError, match=r"RubricReward: .*expected|RubricReward: .*needs dialect"):
            RubricReward(one, **options)  # type: ignore[arg-type]


def test_a_task_brings_its_rubric() -> None:
    reward = RubricReward(TaskRubric("own"), BatchJudge(only(0)))
    assert pickle.loads(pickle.dumps(RubricReward(TaskRubric("own")))) == RubricReward(TaskRubric("own"))
    padded = {"id": "a", "criteria": [{**CRITERIA[0], "check": None, "choices": None}, {**CRITERIA[1], "check": None}]}
    scores = [
        asyncio.run(reward.score(rollout(own=own)))
        for own in (padded, json.dumps({"id": "b", "criteria": [CRITERIA[0]]}))
    ]
    assert [found.value for found in scores] == [pytest.approx(1 / 3), 1.0]
    assert scores[0].rubric_version == rubric(*CRITERIA[:2], id="a").version != scores[1].rubric_version
    for own, message in (
        ({"id": "a"}, "criteria: Field required"),
        ("{", "no JSON"),
        ({"id": "a", "criteria": [{"id": "x", "text": "y", "weight": -1}]}, r"criteria\.0\.weight"),
    ):
        with pytest.raises(RecipeError, match=rf"task 'r', info\['own'\]: .*{message}"):
            asyncio.run(reward.score(rollout(own=own)))
    with pytest.raises(RecipeError, match=r"info has no 'own'.*it has other"):
        asyncio.run(reward.score(rollout(other=1)))


@dataclass
class PairJudge:
    """Decides between two texts; keeps what it was shown."""

    decide: Callable[[str, str], str]
    shown: list[tuple[str, str]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        material = json.loads(messages[1]["content"])
        self.shown.append((material["first"], material["second"]))
        self.seeds.append(seed)
        label = self.decide(material["first"], material["second"])
        if label == "outage":
            raise JudgeError("the judge cannot be reached")
        row = {"id": "better", "evidence": "", "verdict": label}
        return json.dumps({"n": nonce_of(messages), "verdicts": [row]}) if label != "garbage" else "the first"


def longer(first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


def compare(judge: PairJudge, *texts: str, **options: Any) -> list[Score]:
    reward = PairwiseReward(rubric=rubric(*CRITERIA), judge=judge, **options)
    assert isinstance(reward, GroupReward)
    return list(asyncio.run(reward.score_group([rollout(text, f"g/{i}") for i, text in enumerate(texts)])))


def test_every_pair_is_shown_in_both_orders() -> None:
    judge = PairJudge(longer)
    scores = compare(judge, "a", "bb", "ccc")
    assert [found.value for found in scores] == [0.0, 0.5, 1.0]
    assert sorted(judge.shown) == sorted(itertools.permutations(["a", "bb", "ccc"], 2))
    assert len(set(judge.seeds)) == 6
    assert scores[1].parts == {"wins": 1.0, "ties": 0.0, "losses": 1.0, "unread": 0.0, "inconsistent": 0.0}
    again = PairJudge(longer)
    compare(again, "a", "bb", "ccc")
    assert sorted(zip(again.shown, again.seeds, strict=True)) == sorted(zip(judge.shown, judge.seeds, strict=True))


@pytest.mark.parametrize("value", ["win_rate", "bradley_terry"])
@pytest.mark.parametrize("place", ["first", "second"])
def test_a_judge_that_goes_by_position_decides_nothing(value: Any, place: str) -> None:
    scores = compare(PairJudge(lambda first, second: place), "a", "bb", "ccc", value=value)
    assert [found.value for found in scores] == pytest.approx([0.5] * 3)
    assert scores[0].parts["inconsistent"] == 2.0


def test_ties_are_half_a_win() -> None:
    assert [found.value for found in compare(PairJudge(longer), "aa", "bb", "c")] == [0.75, 0.75, 0.0]


def test_a_pair_of_which_an_order_was_not_read_is_left_out() -> None:
    def decide(first: str, second: str) -> str:
        return "garbage" if (first, second) == ("a", "bb") else longer(first, second)

    scores = compare(PairJudge(decide), "a", "bb", "ccc", max_retries=0)
    assert [found.value for found in scores] == [0.0, 0.0, 1.0]
    assert [found.parts["unread"] for found in scores] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(("label", "status"), [("garbage", "parse_error"), ("cannot_assess", "judge_error")])
def test_nothing_readable_is_none_even_beside_an_empty_response(label: str, status: str) -> None:
    scores = compare(PairJudge(lambda first, second: label), "a", "bb", "", max_retries=1)
    assert [found.value for found in scores] == [None, None, 0.0]
    assert [found.status.value for found in scores] == [status, status, "ok"]
    assert scores[0].error


def test_an_outage_is_raised_and_one_response_alone_is_unscored() -> None:
    with pytest.raises(JudgeError, match="cannot be reached"):
        compare(PairJudge(lambda first, second: "outage"), "a", "bb")
    alone = compare(PairJudge(longer), "a")
    assert (alone[0].value, alone[0].error) == (None, "there is no other response to compare with")
    assert compare(PairJudge(longer)) == []


def test_empty_responses_lose_without_a_judge() -> None:
    judge = PairJudge(longer)
    scores = compare(judge, "a", "", "<think>x", "bb")
    assert [found.value for found in scores] == pytest.approx([2 / 3, 1 / 6, 1 / 6, 1.0])
    assert len(judge.shown) == 2


def test_an_invented_quote_is_no_verdict() -> None:
    class Quotes(PairJudge):
        async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
            reply = await super().ask(messages, max_tokens=max_tokens, seed=seed)
            return reply.replace('"evidence": ""', '"evidence": "never said"')

    assert [found.value for found in compare(Quotes(longer), "a", "bb")] == [None, None]


def test_who_meets_whom() -> None:
    assert pairs(4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert pairs(5, 1) == [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]
    assert pairs(3, 9) == pairs(3)
    assert pairs(2, 1) == [(0, 1)]
    assert pairs(1) == pairs(0) == []


def test_bradley_terry_maximises_the_likelihood() -> None:
    """Against a slow climb on the same penalised likelihood; and what always wins stays below 1."""
    import math

    rng = random.Random(0)
    matches = [Match(i, j, rng.choice([0.0, 0.5, 1.0])) for i, j in pairs(5) for _ in range(3)]

    def likelihood(logits: Sequence[float]) -> float:
        prior = sum(0.5 * (x - 2 * math.log1p(math.exp(x))) for x in logits)
        return prior + sum(
            m.share * logits[m.first]
            + (1 - m.share) * logits[m.second]
            - math.log(math.exp(logits[m.first]) + math.exp(logits[m.second]))
            for m in matches
        )

    logits, step = [0.0] * 5, 0.5
    while step > 1e-6:
        moves = [[x + s * (k == i) for k, x in enumerate(logits)] for i in range(5) for s in (step, -step)]
        best = max(moves, key=likelihood)
        logits, step = (best, step) if likelihood(best) > likelihood(logits) else (logits, step / 2)
    chance = lambda i, j: 1 / (1 + math.exp(logits[j] - logits[i]))  # noqa: E731
    slow = [sum(chance(i, j) for j in range(5) if j != i) / 4 for i in range(5)]
    assert bradley_terry(5, matches) == pytest.approx(slow, abs=1e-4)
    champion = bradley_terry(3, [Match(0, 1, 1.0), Match(0, 2, 1.0), Match(1, 2, 1.0)])
    assert 1 > champion[0] > champion[1] > champion[2] > 0  # type: ignore[operator]
    assert win_rates(3, []) == bradley_terry(3, []) == [None] * 3


def player(engine: ScriptedEngine, judge: ScriptedEngine | None) -> Player:
    return Player(engine=engine, judge_engine=judge, chat=tiny_chat(), substrate=None, workers=Workers(max_retries=0))


def test_the_policy_may_compare_its_own_group() -> None:
    reward = PairwiseReward(rubric=rubric(*CRITERIA), max_retries=0)
    assert isinstance(reward, PolicyJudged)
    play = Play(environment=SingleTurn(), reward=reward, sampling=Sampling(max_tokens=8), max_sequence_tokens=2048)
    task = Task(id="t", domain="d", prompt=({"role": "user", "content": "q"},))
    job = GroupJob(id="j", task=task, num_rollouts=2, play=play, seed=0)
    says, judges = ScriptedEngine(lambda request: "said"), ScriptedEngine(lambda request: "no verdict")
    scores = asyncio.run(player(says, judges).play([job]))[0].scores
    assert [(found.value, found.status) for found in scores] == [(None, ScoreStatus.PARSE_ERROR)] * 2
    assert {judgment.reply for found in scores for judgment in found.judgments} == {"no verdict"}
    scores = asyncio.run(player(says, None).play([job]))[0].scores
    assert [found.status for found in scores] == [ScoreStatus.JUDGE_ERROR] * 2
