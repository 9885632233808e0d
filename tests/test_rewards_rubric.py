"""Rubrics: the file format, the arithmetic against a slow version, and judges that fail."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import JudgeError, RecipeError, UnreadableReply
from posttrain.protocols import PolicyJudged, Reward
from posttrain.types import Completion, FinishReason, Message, Rollout, Score, ScoreStatus, StopReason, Task, Turn
from rewards.checks import CHECKS
from rewards.criteria import Criterion, aggregate
from rewards.judge import JsonDialect, LineDialect
from rewards.rubric import Rubric, RubricReward, fill, judged_text

HEAD = 'schema = "rubric/1"\nid = "r"\n'
Vote = Callable[[str, int], str]


def rollout(text: str, **info: Any) -> Rollout:
    completion = Completion(
        request_id="r",
        token_ids=np.zeros(1, np.int32),
        logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
        finish=FinishReason.STOP,
    )
    turn = Turn(context_ids=np.zeros(1, np.int32), completion=completion, text=text)
    task = Task(id="t", domain="writing", prompt=({"role": "user", "content": "Write."},), info=info)
    return Rollout(id="r", task=task, turns=(turn,), stop=StopReason.FINISHED)


@dataclass
class ScriptedJudge:
    """Answers in the JSON dialect with the label ``vote`` gives for a criterion and call number."""

    vote: Vote
    calls: list[tuple[str, int]] = field(default_factory=list)

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        criterion = json.loads(messages[1]["content"])["criterion"]["id"]
        nonce = messages[0]["content"].split('"n": "')[1].split('"')[0]
        label = self.vote(criterion, sum(name == criterion for name, _ in self.calls))
        self.calls.append((criterion, seed))
        if label == "outage":
            raise JudgeError("the judge cannot be reached")
        row = {"id": criterion, "evidence": "", "verdict": label}
        return json.dumps({"n": nonce, "verdicts": [row]}) if label != "garbage" else "I would say met!"


def rubric(*criteria: dict[str, Any], **aggregation: Any) -> Rubric:
    return Rubric.model_validate({"schema": "rubric/1", "id": "r", "aggregation": aggregation, "criteria": criteria})


def grade(vote: Vote | dict[str, str], *criteria: dict[str, Any], text: str = "Some words.", **options: Any) -> Score:
    judge = ScriptedJudge(vote if callable(vote) else lambda criterion, call: vote[criterion])
    na = options.pop("na", "skip")
    return asyncio.run(RubricReward(rubric(*criteria, na=na), judge, **options).score(rollout(text)))


def judged(name: str, weight: float = 1.0, polarity: str = "reward", **more: Any) -> dict[str, Any]:
    return {"id": name, "text": f"Claim {name}.", "weight": weight, "polarity": polarity, **more}


def slow_score(rows: Sequence[tuple[float, str, float | None]]) -> float | None:
    """The formula of the format, spelled out."""
    positive = [(w, s) for w, p, s in rows if p == "reward" and s is not None]
    negative = [(w, s) for w, p, s in rows if p == "penalty" and s is not None]
    if sum(w for w, p, _ in rows if p == "reward") > 0:
        total = sum(w for w, _ in positive)
        value = (sum(w * s for w, s in positive) - sum(w * s for w, s in negative)) / total if total else None
    else:
        total = sum(w for w, _ in negative)
        value = 1 - sum(w * s for w, s in negative) / total if total else None
    return None if value is None else max(0.0, min(1.0, value))


rows_of = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        st.sampled_from(["reward", "penalty"]),
        st.sampled_from([None, 0.0, 0.25, 1.0]),
    ),
    min_size=1,
    max_size=6,
)


@given(rows_of)
def test_arithmetic_agrees_with_the_formula(rows: list[tuple[float, str, float | None]]) -> None:
    criteria = [Criterion.model_validate(judged(f"c{i}", w, p)) for i, (w, p, _) in enumerate(rows)]
    value = aggregate(criteria, {f"c{i}": s for i, (_, _, s) in enumerate(rows)}).value
    assert value == pytest.approx(slow_score(rows))


@given(rows_of, st.integers(0, 5))
def test_meeting_more_never_hurts_and_a_penalty_never_helps(
    rows: list[tuple[float, str, float | None]], which: int
) -> None:
    criteria = [Criterion.model_validate(judged(f"c{i}", w, p)) for i, (w, p, _) in enumerate(rows)]
    chosen = which % len(rows)
    scores = {f"c{i}": s for i, (_, _, s) in enumerate(rows)}
    low = aggregate(criteria, {**scores, f"c{chosen}": 0.0}).value
    high = aggregate(criteria, {**scores, f"c{chosen}": 1.0}).value
    if low is None or high is None:
        assert low == high
    else:
        assert low <= high if rows[chosen][1] == "reward" else low >= high


def test_verdicts_add_up() -> None:
    criteria = (judged("a", 3), judged("b", 1), judged("c", 2, "penalty"), judged("t", choices=["bad", "ok", "good"]))
    score = grade({"a": "met", "b": "unmet", "c": "unmet", "t": "ok"}, *criteria)
    assert score.value == pytest.approx(3.5 / 5)
    assert score.parts == {"a": 1.0, "b": 0.0, "c": 0.0, "t": 0.5}
    assert (score.status, len(score.judgments)) == (ScoreStatus.OK, 4)
    assert grade({"a": "met", "b": "unmet", "c": "met", "t": "ok"}, *criteria).value == pytest.approx(1.5 / 5)


def test_rubric_of_penalties_only() -> None:
    criteria = (judged("a", 3, "penalty"), judged("b", 1, "penalty"))
    assert grade({"a": "unmet", "b": "unmet"}, *criteria).value == 1.0
    assert grade({"a": "met", "b": "unmet"}, *criteria).value == 0.25


def test_veto_sends_the_score_to_the_floor() -> None:
    criteria = (judged("a"), judged("harm", 0, "penalty", veto=True), judged("must", 1, veto=True))
    assert grade({"a": "met", "harm": "unmet", "must": "met"}, *criteria).value == 1.0
    for verdicts in ({"a": "met", "harm": "met", "must": "met"}, {"a": "met", "harm": "unmet", "must": "unmet"}):
        score = grade(verdicts, *criteria)
        assert (score.value, score.status) == (0.0, ScoreStatus.VETOED)


def test_unreadable_judge_is_none_and_not_zero() -> None:
    score = grade({"a": "garbage"}, judged("a"), {"id": "n", "kind": "code", "check": "no_comma"})
    assert score.value is None
    assert score.status is ScoreStatus.PARSE_ERROR
    assert score.error is not None
    assert score.parts == {"a": None, "n": 1.0}


@pytest.mark.parametrize("unread", [judged("a"), judged("a", polarity="penalty"), judged("a", 0, "penalty", veto=True)])
@pytest.mark.parametrize("na", ["skip", "zero", "fail"])
def test_an_unreadable_criterion_that_matters_leaves_the_rollout_unscored(unread: dict[str, Any], na: str) -> None:
    score = grade({"a": "garbage", "b": "met"}, unread, judged("b"), na=na)
    assert (score.value, score.status) == (None, ScoreStatus.PARSE_ERROR)
    assert "criterion a could not be read" in str(score.error)


def test_an_unreadable_criterion_that_is_only_reported_is_left_out() -> None:
    score = grade({"a": "garbage", "b": "met"}, judged("a", 0), judged("b"))
    assert (score.value, score.status) == (1.0, ScoreStatus.OK)


@pytest.mark.parametrize("labels", [["cannot_assess", "garbage"], ["garbage", "cannot_assess"]])
@pytest.mark.parametrize("veto", [False, True])
def test_one_readable_abstention_among_the_votes_is_an_abstention(labels: list[str], veto: bool) -> None:
    def vote(criterion: str, call: int) -> str:
        return "met" if criterion == "b" else labels[call]

    assert grade(vote, judged("a", veto=veto), judged("b"), votes=2, max_retries=0).value == 1.0


def test_retries_use_new_seeds_and_stop() -> None:
    judge = ScriptedJudge(lambda criterion, call: "met" if call == 2 else "garbage")
    reward = RubricReward(rubric(judged("a")), judge, max_retries=2)
    assert asyncio.run(reward.score(rollout("Some words."))).value == 1.0
    assert len({seed for _, seed in judge.calls}) == len(judge.calls) == 3
    judge = ScriptedJudge(lambda criterion, call: "garbage")
    assert asyncio.run(RubricReward(rubric(judged("a")), judge, max_retries=1).score(rollout("x y"))).value is None
    assert len(judge.calls) == 2


def test_a_reply_that_was_cut_off_is_asked_for_again() -> None:
    class CutsOff(ScriptedJudge):
        async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
            reply = await super().ask(messages, max_tokens=max_tokens, seed=seed)
            if len(self.calls) <= 2:
                raise UnreadableReply("cut off", reply)
            return reply

    for retries, value in ((2, 1.0), (1, None)):
        reward = RubricReward(rubric(judged("a")), CutsOff(lambda criterion, call: "met"), max_retries=retries)
        score = asyncio.run(reward.score(rollout("Some words.")))
        assert score.value == value
        assert '"verdict": "met"' in score.judgments[0].reply
    assert score.status is ScoreStatus.PARSE_ERROR


def test_outage_is_raised() -> None:
    with pytest.raises(JudgeError, match="cannot be reached"):
        grade({"a": "outage", "b": "met"}, judged("a"), judged("b"))


def test_an_outage_stops_the_other_questions() -> None:
    ended: list[str] = []

    class Hangs(ScriptedJudge):
        async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
            try:
                if '"id": "b"' in messages[1]["content"]:
                    await asyncio.sleep(30)
                return await super().ask(messages, max_tokens=max_tokens, seed=seed)
            except asyncio.CancelledError:
                ended.append("b")
                raise

    async def score() -> None:
        reward = RubricReward(rubric(judged("b"), judged("a")), Hangs(lambda criterion, call: "outage"))
        with pytest.raises(JudgeError, match="cannot be reached"):
            await reward.score(rollout("Some words."))
        assert ended == ["b"]

    asyncio.run(score())


@pytest.mark.parametrize(("na", "value"), [("skip", 1.0), ("zero", 0.25), ("fail", None)])
def test_abstention_follows_the_rubric(na: str, value: float | None) -> None:
    assert grade({"a": "cannot_assess", "b": "met"}, judged("a", 3), judged("b"), na=na).value == value


def test_abstaining_on_everything_is_none_unless_it_counts_as_unmet() -> None:
    code = {"id": "n", "kind": "code", "check": "no_comma"}
    score = grade({"a": "cannot_assess"}, judged("a"), code)
    assert (score.value, score.status) == (None, ScoreStatus.JUDGE_ERROR)
    assert grade({"a": "cannot_assess"}, judged("a"), code, na="zero").value == 0.5


def test_votes_are_averaged_over_those_that_could_be_read() -> None:
    labels = ["met", "unmet", "garbage", "met"]
    score = grade(lambda criterion, call: labels[call], judged("a"), votes=4, max_retries=0)
    assert score.value == pytest.approx(2 / 3)
    assert [j.verdict for j in score.judgments] == ["met", "unmet", "unreadable", "met"]


def test_credit_needs_a_quote_when_the_criterion_says_so() -> None:
    assert grade({"a": "met", "b": "met"}, judged("a", evidence=True), judged("b")).parts == {"a": None, "b": 1.0}


@pytest.mark.parametrize("text", ["", "  ", ":", "...", "<think>The answer", "<think>x</think> "])
def test_empty_responses_are_settled_without_a_judge(text: str) -> None:
    score = grade({}, judged("a", 1, "penalty"), text=text)
    assert (score.value, score.flags) == (0.0, ("empty",))


def test_thinking_is_not_judged() -> None:
    assert judged_text("<think>plan</think>\nAnswer.") == "Answer."
    assert judged_text("plan</think>Answer.") == "Answer."


def line_policy(label: str, quote: str = "") -> Any:
    async def ask(messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int) -> str:
        assert temperature > 0
        nonce = messages[0]["content"].split("\n")[0].removeprefix("Judge ")
        return f'"{quote}" {nonce} {label}'

    return ask


@pytest.mark.parametrize(
    ("label", "quote", "value"), [("met", "sea", 1.0), ("unmet", "", 4 / 6), ("met", "ocean", None), ("met", "", None)]
)
def test_policy_judges_the_one_line_rubric(label: str, quote: str, value: float | None) -> None:
    reward = RubricReward(Rubric.load("one_line"), dialect=LineDialect())
    assert isinstance(reward, Reward)
    assert isinstance(reward, PolicyJudged)
    lent = reward.with_policy(line_policy(label, quote))
    score = asyncio.run(lent.score(rollout("The sea is blue and wide.", topic="the sea", word="blue")))
    assert score.value == (None if value is None else pytest.approx(value))
    assert score.rubric_version == reward.rubric.version


def test_without_a_judge_the_reward_says_what_to_do_and_a_judge_of_its_own_stays() -> None:
    reward = RubricReward(rubric(judged("a")))
    with pytest.raises(RecipeError, match="with_policy"):
        asyncio.run(reward.score(rollout("Some words.")))
    own = RubricReward(rubric(judged("a")), ScriptedJudge(lambda criterion, call: "met"))
    assert own.with_policy(line_policy("unmet")) is own


def test_placeholders_are_filled_once() -> None:
    info = {"topic": "{word}", "word": "sea", "count": 3}
    assert fill("About {topic} and {word}: {{x}} \\d{2}", info, "here") == "About {word} and sea: {x} \\d{2}"
    assert fill("{count}", info, "here") == 3
    with pytest.raises(RecipeError, match=r"here: .*'colour'.*count, topic, word"):
        fill("In {colour}", info, "here")


@pytest.mark.parametrize("name", ["one_line", "support_reply"])
def test_packaged_rubrics_load_and_pickle(name: str) -> None:
    reward = RubricReward(Rubric.load(name), dialect=JsonDialect())
    assert pickle.loads(pickle.dumps(reward)) == reward
    assert reward.rubric.id == name


BAD = [
    ('[[criteria]]\nid = "a"\ntext = "x"\nweigth = 2', 6, "weigth: unknown key"),
    ('colour = 1\n[[criteria]]\nid = "a"\ntext = "x"', 3, "colour: unknown key"),
    ('[[criteria]]\nid = "a"\ntext = "x"\n\n[[criteria]]\nid = "b"', 7, "text is empty"),
    ('[[criteria]]\nid = "a"\ntext = "x"\n[[criteria]]\nid = "a"\ntext = "y"', 1, "a occur twice"),
    ('[[criteria]]\nid = "a"\ntext = "x"\nweight = 0', 1, "positive weight"),
    ('[[criteria]]\nid = "a"\ntext = "x"\nweight = -2', 6, "criteria.0.weight"),
    ('[[criteria]]\nid = "a"\nkind = "code"\ncheck = "nope"', 3, "expected one of contains_word"),
    ('[[criteria]]\nid = "a"\nkind = "code"\ncheck = "ends_with"\nargs = {x = 1}', 3, "do not fit"),
    ('[[criteria]]\nid = "a"\ntext = "x"\nchoices = ["one"]', 3, "two or more"),
    ('[[criteria]]\nid = "a"\ntext = "x"\npolarity = "penalty"\nchoices = ["p", "q"]', 3, "worst to best"),
    ('[aggregation]\nna = "maybe"\n[[criteria]]\nid = "a"\ntext = "x"', 4, "aggregation.na"),
    ('[aggregation]\nclip = [1, 0]\n[[criteria]]\nid = "a"\ntext = "x"', 3, "low < high"),
    ("criteria = []", 1, "positive weight"),
]


@pytest.mark.parametrize(("body", "line", "message"), BAD)
def test_mistakes_name_line_and_field(tmp_path: Path, body: str, line: int, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(HEAD + body)
    with pytest.raises(RecipeError) as caught:
        Rubric.load(path)
    assert f"bad.toml:{line}: " in str(caught.value)
    assert message in str(caught.value)


def test_missing_files_and_broken_toml(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one_line"):
        Rubric.load("no_such_rubric")
    with pytest.raises(RecipeError, match="cannot be read"):
        Rubric.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("id = \n")
    with pytest.raises(RecipeError, match="line 1"):
        Rubric.load(tmp_path / "bad.toml")


def test_line_dialect_refuses_choices() -> None:
    with pytest.raises(RecipeError, match="choices"):
        RubricReward(Rubric.load("support_reply"), dialect=LineDialect())


@pytest.mark.parametrize(
    ("check", "args", "good", "bad"),
    [
        ("contains_word", {"word": "Sea"}, "the sea.", "the season"),
        ("contains_word", {"word": "blue sea"}, "A blue sea", "sea blue"),
        ("lacks_word", {"word": "sea"}, "season", "Sea!"),
        ("min_words", {"count": 3}, "it's a well-known", "one two"),
        ("max_words", {"count": 2}, "one two", "one two three"),
        ("words_between", {"low": 2, "high": 3}, "one two", "one"),
        ("max_chars", {"count": 3}, "abc", "abcd"),
        ("single_line", {}, "a b\n", "a\nb"),
        ("starts_with_capital", {}, " Ab", "ab"),
        ("ends_with", {"suffix": "."}, "End. ", "End"),
        ("no_comma", {}, "a b", "a, b"),
        ("no_repeated_words", {}, "The sea and the sand.", "Waves on waves"),
        ("no_stutter", {"times": 3}, "so so good", "so so so good"),
        ("regex", {"pattern": r"^\d{2}$"}, "12", "123"),
    ],
)
def test_checks(check: str, args: dict[str, Any], good: str, bad: str) -> None:
    assert CHECKS[check](good, **args) is True
    assert CHECKS[check](bad, **args) is False


@pytest.mark.parametrize("na", ["skip", "fail"])
@pytest.mark.parametrize("label", ["cannot_assess", "garbage"])
def test_a_criterion_that_is_only_reported_never_leaves_a_rollout_unscored(label: str, na: str) -> None:
    code = {"id": "code", "kind": "code", "check": "no_comma"}
    score = grade({"told": label}, judged("told", 0.0), code, na=na)
    assert (score.value, score.status, score.parts["told"]) == (1.0, ScoreStatus.OK, None)
    score = grade({"told": label, "counts": "unmet"}, judged("told", 0.0), judged("counts"), code, na=na)
    assert score.value == 0.5
    assert grade({"told": label}, judged("told", 0.0, veto=True), code, na="fail").value is None
