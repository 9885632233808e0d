"""Judge prompts with known answers, what a reply earns, and whether the monitor sees a planted bias."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import RecipeError
from posttrain.protocols import JudgeMonitor, JudgeTaskSource, PolicyJudged
from posttrain.types import (
    Completion,
    FinishReason,
    Group,
    JudgeTask,
    Judgment,
    Message,
    Rollout,
    Score,
    ScoreStatus,
    StopReason,
    Task,
    Turn,
)
from recipes import joint_judge
from recipes.tasks.words import TOPICS
from recipes.tasks.writing import WritingTasks
from rewards.checks import words
from rewards.drift import FrozenSet, cohen_kappa, correlation, interval, self_preference, vote_accuracy
from rewards.joint import (
    GoldenRow,
    JudgeCurriculum,
    KnownVerdict,
    MetaVerdictReward,
    PreferencePair,
    VerdictReward,
    golden_task,
    pair_task,
    read_golden,
)
from rewards.judge import JsonDialect, LineDialect

ROW = GoldenRow(id="g", criterion="The text is about the sea.", response="The old boat waits.", label="met")


def reply_to(task: Task, text: str) -> Rollout:
    completion = Completion(
        request_id="r",
        token_ids=np.zeros(1, np.int32),
        logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
        finish=FinishReason.STOP,
    )
    turn = Turn(context_ids=np.zeros(1, np.int32), completion=completion, text=text)
    return Rollout(id="r", task=task, turns=(turn,), stop=StopReason.FINISHED)


def form(row: GoldenRow = ROW) -> Task:
    return golden_task(row, LineDialect()).variants[0]


def earned(task: Task, text: str, reward: VerdictReward | None = None) -> Score:
    return asyncio.run((reward or VerdictReward()).score(reply_to(task, text)))


@pytest.mark.parametrize(
    ("label", "reply", "value"),
    [
        ("met", '"boat" {nonce} met', 1.0),
        ("met", '"" {nonce} unmet', 0.0),
        ("unmet", '"" {nonce} unmet', 1.0),
        ("unmet", '"boat" {nonce} met', 0.0),
        ("met", '"whale" {nonce} met', 0.0),
        ("met", '"boat" ffff met', 0.0),
        ("met", "met", 0.0),
        ("met", '"" {nonce} unmet\n"boat" {nonce} met', 1.0),
        ("met", '<think>"boat" {nonce} met', 0.0),
    ],
)
def test_a_reply_earns_what_its_last_valid_verdict_is_worth(label, reply, value):
    task = form(replace(ROW, label=label))
    score = earned(task, reply.format(nonce=task.info["nonce"]))
    assert (score.value, score.status) == (value, ScoreStatus.OK)


def test_an_unreadable_reply_is_the_policys_fault_and_says_so():
    score = earned(form(), "I think it is met.")
    assert (score.value, score.flags) == (0.0, ("unreadable",))
    assert score.judgments[0].verdict == "unreadable"
    assert "no line of the form" in score.explanation


def test_credit_without_a_quote_earns_nothing_where_a_quote_is_asked_for():
    assert earned(form(), f'"" {form().info["nonce"]} met').value == 1.0
    strict = form(replace(ROW, evidence=True))
    assert earned(strict, f'"" {strict.info["nonce"]} met').value == 0.0


def test_a_task_without_a_known_answer_is_not_scored():
    for answer in (None, "perhaps"):
        score = earned(replace(form(), answer=answer), f'"boat" {form().info["nonce"]} met')
        assert (score.value, score.status) == (None, ScoreStatus.REWARD_ERROR)
        assert "expected one of unmet, met" in str(score.error)


@pytest.mark.parametrize(("said", "value"), [("kind", 1.0), ("neutral", 0.5), ("rude", 0.0), ("cannot_assess", 0.0)])
def test_graded_answers_pay_by_their_distance(said, value):
    row = replace(ROW, label="kind", labels=("rude", "neutral", "kind"))
    task = golden_task(row, JsonDialect()).variants[0]
    reply = {"n": task.info["nonce"], "verdicts": [{"id": "c1", "evidence": "", "verdict": said}]}
    assert earned(task, json.dumps(reply), VerdictReward(dialect=JsonDialect())).value == value


KNOWN = KnownVerdict(criterion="The text names {topic}.", part="topic_words", evidence=True)


@pytest.mark.parametrize(("part", "label"), [(1.0, "met"), (0.0, "unmet"), (0.5, None), (None, None)])
def test_a_score_says_the_answer_only_at_its_ends(part, label):
    assert KNOWN.label(Score(value=0.7, parts={"topic_words": part})) == label


def test_a_judges_own_verdict_is_never_an_answer_to_learn():
    judged = Score(
        value=1.0, parts={"rubric/on_topic": 1.0}, judgments=(Judgment(criterion="on_topic", verdict="met", score=1.0),)
    )
    with pytest.raises(RecipeError, match="is a judge's own verdict"):
        KnownVerdict(criterion="x", part="rubric/on_topic").label(judged)
    with pytest.raises(RecipeError, match="rests on a judge"):
        KnownVerdict(criterion="x").label(judged)


def test_a_scored_rollout_becomes_a_judge_prompt_with_its_answer():
    curriculum = JudgeCurriculum(verdicts=(KNOWN,))
    assert isinstance(curriculum, JudgeTaskSource)
    task = Task(id="w", domain="writing", prompt=({"role": "user", "content": "Write."},), info={"topic": "the sea"})
    known = Score(value=0.7, parts={"topic_words": 1.0})
    [made] = curriculum.from_rollout(reply_to(task, "<think>boat?</think>Judge abcd\nThe boat waits."), known)
    [shown] = made.variants
    assert (made.label, made.source, shown.answer) == ("met", "verified", "met")
    assert shown.info["author"] == "policy"
    content = shown.prompt[0]["content"]
    assert content.startswith(f"Judge {shown.info['nonce']}\n")
    assert content.endswith("\nCriterion: The text names the sea.")
    assert "boat?" not in content, "its thinking is not judged"
    assert content.count("Judge ") == 1, "the text cannot open a judge prompt of its own"
    assert earned(shown, f'"boat waits." {shown.info["nonce"]} met').value == 1.0
    assert curriculum.from_rollout(reply_to(task, " ... "), known) == []
    assert curriculum.from_rollout(reply_to(task, "x"), Score(value=0.7, parts={"topic_words": None})) == []


def test_a_pair_is_shown_in_both_orders_with_opposite_answers():
    task = pair_task(PreferencePair(id="p", chosen="good", rejected="bad", criterion="It is kind."), LineDialect())
    first, second = task.variants
    assert (first.answer, second.answer, task.label) == ("met", "unmet", None)
    assert "First: good Second: bad" in first.prompt[0]["content"]
    assert "First: bad Second: good" in second.prompt[0]["content"]
    # A judge that answers by the place earns in one order only.
    assert [earned(form, f'"First" {form.info["nonce"]} met').value for form in task.variants] == [1.0, 0.0]


def test_a_curriculum_without_any_source_is_refused():
    with pytest.raises(RecipeError, match="no verdicts, golden rows or pairs"):
        JudgeCurriculum()


@dataclass
class Meta:
    """Replies as told, and remembers what it was asked."""

    reply: str
    asked: list[str] = field(default_factory=list)

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        self.asked.append(messages[0]["content"])
        nonce = messages[0]["content"].split()[1]
        return self.reply.format(nonce=nonce)


@pytest.mark.parametrize(("reply", "value"), [('"boat" {nonce} met', 1.0), ('"" {nonce} unmet', 0.5), ("hm", None)])
def test_a_meta_judge_weighs_the_quote_behind_a_right_verdict(reply, value):
    meta = Meta(reply)
    score = earned(form(), f'"boat" {form().info["nonce"]} met', MetaVerdictReward(judge=meta))
    assert score.value == value
    assert "Text: boat" in meta.asked[0]
    assert (len(meta.asked), score.status) == ((3, ScoreStatus.PARSE_ERROR) if value is None else (1, ScoreStatus.OK))


def test_a_wrong_verdict_costs_no_meta_judgment():
    meta = Meta('"boat" {nonce} met')
    reward = MetaVerdictReward(judge=meta)
    assert isinstance(reward, PolicyJudged)
    assert not isinstance(VerdictReward(), PolicyJudged)
    wrong = form(replace(ROW, label="unmet"))
    assert earned(wrong, f'"boat" {wrong.info["nonce"]} met', reward).value == 0.0
    assert meta.asked == []


def test_the_policys_snapshot_is_the_meta_judge_unless_there_is_another():
    async def ask(messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int) -> str:
        return f'"" {messages[0]["content"].split()[1]} unmet'

    right = f'"boat" {form().info["nonce"]} met'
    assert earned(form(), right, MetaVerdictReward().with_policy(ask)).value == 0.5
    own = MetaVerdictReward(judge=Meta('"boat" {nonce} met'))
    assert own.with_policy(ask) is own
    with pytest.raises(RecipeError, match="needs a judge"):
        earned(form(), right, MetaVerdictReward())


def test_a_golden_file_is_read_by_label_and_its_mistakes_have_lines(tmp_path: Path):
    path = tmp_path / "golden.jsonl"
    good = {"prompt": "Write.", "response": "a\u2028b", "labels": {"c1": "met", "x": "unmet"}, "info": {"topic": "sea"}}
    path.write_text(json.dumps(good, ensure_ascii=False) + "\n\n")
    [row] = read_golden(path, {"c1": "It names the {topic}."})
    assert (row.criterion, row.label, row.response, row.author) == ("It names the sea.", "met", "a\u2028b", "other")
    path.write_text(json.dumps(good) + "\n" + '{"labels": {"c1": "met"}}\n')
    with pytest.raises(RecipeError, match=r"golden\.jsonl:2: .*response"):
        read_golden(path, {"c1": "It names the {topic}."})
    with pytest.raises(RecipeError, match="label = 'yes'"):
        golden_task(replace(ROW, label="yes"), LineDialect())


verdicts = st.sampled_from([0.0, 1.0, math.nan])


@given(st.lists(st.tuples(st.lists(verdicts, min_size=2, max_size=2), st.sampled_from([0.0, 1.0])), min_size=1))
def test_kappa_equals_the_slow_version(rows):
    given_NK, truth_N = np.array([row for row, _ in rows]), np.array([truth for _, truth in rows])
    said = [str(value) for row in given_NK for value in row]
    right = [str(truth) for truth in truth_N for _ in range(2)]
    observed = sum(a == b for a, b in zip(said, right, strict=True)) / len(said)
    chance = sum(said.count(label) * right.count(label) for label in set(right)) / len(said) ** 2
    found = cohen_kappa(given_NK, truth_N)
    if chance == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx((observed - chance) / (1 - chance))


def test_votes_are_summed_and_ties_are_half_right():
    verdicts_NK = np.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, math.nan, 0.0]])
    truth_N = np.array([1.0, 1.0])
    assert vote_accuracy(verdicts_NK, truth_N, 4) == pytest.approx((0.5 + 1) / 2)
    assert vote_accuracy(verdicts_NK, truth_N, 2) == pytest.approx((1 + 0 + 1 + 0) / 4)


def test_more_votes_make_a_noisy_judge_better():
    rng = np.random.default_rng(0)
    truth_N = rng.integers(0, 2, 400).astype(float)
    verdicts_NK = np.where(rng.random((400, 9)) < 0.7, truth_N[:, None], 1 - truth_N[:, None])
    one, nine = (vote_accuracy(verdicts_NK, truth_N, votes) for votes in (1, 9))
    assert one == pytest.approx(0.7, abs=0.03)
    assert nine == pytest.approx(0.90, abs=0.04), "what the binomial law says of the majority of nine"


def test_an_interval_leaves_out_what_is_not_known():
    found = interval("x", np.array([0.0, 1.0, math.nan, 1.0, 1.0]))
    assert found["x"] == 0.75
    assert found["x_low"] < 0.75 < found["x_high"]
    assert all(math.isnan(value) for value in interval("x", np.array([math.nan])).values())
    assert math.isnan(correlation(np.ones(5), np.arange(5.0)))
    assert math.isnan(self_preference(np.ones(2), np.ones(2), np.array([True, True])))


def frozen_rows() -> tuple[GoldenRow, ...]:
    """Texts of both authors, half met, every second one long."""
    return tuple(
        replace(
            ROW,
            id=str(i),
            label=("unmet", "met")[i % 2],
            author=("policy", "other")[i // 2 % 2],
            response="boat " * (20 if i // 4 % 2 else 4),
        )
        for i in range(80)
    )


Says = Callable[[GoldenRow], str]


def measured(says: Says, before: Says | None = None, **options: Any) -> dict[str, float]:
    monitor = FrozenSet(rows=frozen_rows(), **options)
    assert isinstance(monitor, JudgeMonitor)
    by_id = {golden_task(row, LineDialect()).id: row for row in monitor.rows}

    def groups(answer: Says) -> list[Group]:
        return [judged(task, answer(by_id[task.id]), monitor.samples) for task in monitor.tasks()]

    return monitor.measure(groups(says), monitor.scores(groups(before or says)))


def judged(task: JudgeTask, label: str, samples: int) -> Group:
    [shown] = task.variants
    rollout = reply_to(shown, f'"" {shown.info["nonce"]} {label}')
    score = asyncio.run(VerdictReward().score(rollout))
    return Group(task=shown, rollouts=(rollout,) * samples, scores=(score,) * samples)


def truth(row: GoldenRow) -> str:
    return row.label


def test_a_perfect_judge_has_no_drift():
    found = measured(truth, samples=2, votes=(1, 2))
    assert {found[name] for name in ("accuracy", "kappa", "kappa_low", "vote@1", "vote@2")} == {1.0}
    for name in ("shift", "bias", "unreadable", "self_preference", "length_bias"):
        assert found[name] == 0.0 or math.isnan(found[name]), name


def test_a_planted_leniency_shows_as_shift_and_bias():
    found = measured(lambda row: "met", before=truth)
    assert found["shift"] == found["bias"] == 0.5
    assert found["shift_low"] > 0.3
    assert found["kappa"] == 0.0
    assert (found["true_positive_rate"], found["true_negative_rate"]) == (1.0, 0.0)


def test_a_planted_preference_for_own_texts_shows_at_equal_answers():
    found = measured(lambda row: "met" if row.author == "policy" else row.label)
    assert found["self_preference"] == 0.5, "unmet texts of its own are met, which is half of all"


def test_a_planted_preference_for_length_shows_beyond_the_truth():
    found = measured(lambda row: "met" if len(row.response) > 50 else row.label)
    assert found["length_bias"] > 0.5
    assert abs(measured(truth)["length_correlation"]) < 0.01


def test_unreadable_replies_are_wrong_and_counted_but_lost_ones_are_neither():
    found = measured(lambda row: row.label if row.author == "policy" else "perhaps")
    assert (found["accuracy"], found["unreadable"]) == (0.5, 0.5)
    monitor = FrozenSet(rows=frozen_rows())
    groups = [judged(task, "met", 1) for task in monitor.tasks()]
    lost = Score(value=None, status=ScoreStatus.TIMEOUT)
    groups[0] = replace(groups[0], scores=(lost,))
    found = monitor.measure(groups, {})
    assert found["unscored_rows"] == 1
    assert found["unreadable"] == 0.0
    assert math.isnan(found["shift"]), "nothing to compare with"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rows": ()}, "0 rows"),
        ({"rows": (ROW, ROW)}, "2 rows with 1 ids"),
        ({"rows": (ROW,), "samples": 2, "votes": (4,)}, r"votes = \(4,\)"),
    ],
)
def test_a_frozen_set_that_cannot_measure_is_refused(options, problem):
    with pytest.raises(RecipeError, match=problem):
        FrozenSet(**options)


def test_the_recipes_frozen_set_is_labelled_right_balanced_and_never_trained_on():
    rows = joint_judge.frozen()
    on_topic = {joint_judge.ON_TOPIC.format(topic=topic): topic for topic in TOPICS}
    for row in rows:
        met = any(word in words(row.response) for word in TOPICS[on_topic[row.criterion]])
        assert row.label == ("met" if met else "unmet"), row
    share = np.mean([row.label == "met" for row in rows])
    assert 0.4 < share < 0.6
    assert {row.author for row in rows} == {"policy", "other"}
    assert not {(row.criterion, row.response) for row in rows} & {
        (row.criterion, row.response) for row in joint_judge.golden()
    }
    heldout = {task.prompt[0]["content"] for task in WritingTasks().heldout(count=1000)}
    assert {row.prompt[0]["content"] for row in rows} <= heldout


def test_code_knows_the_topic_only_where_the_recipe_lets_it():
    task = Task(id="w", domain="writing", prompt=(), info={"topic": "the sea", "word": "moon"})
    reward = joint_judge.TopicWords()
    assert asyncio.run(reward.score(reply_to(task, "A boat sinks."))).value == 1.0
    assert asyncio.run(reward.score(reply_to(task, "A cow moos."))).value == 0.0
    unknown = replace(task, info={"topic": "the forest", "word": "moon"})
    assert asyncio.run(reward.score(reply_to(unknown, "A fox."))).value is None
