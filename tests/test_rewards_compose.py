"""Sums, products, gates, caps and sums over groups: None stays None, sandboxes and judges reach the parts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.config import GRPO
from posttrain.errors import JudgeError, RecipeError
from posttrain.learner.advantages import group_advantages
from posttrain.protocols import Ask, GroupReward, Sandbox, asks_policy
from posttrain.rollout.samples import group_advantage_rows, grpo_samples, reward_metrics
from posttrain.types import Group, Rollout, SandboxSpec, Score, ScoreStatus, StopReason, Task
from rewards.adapters import from_trl
from rewards.compose import Cap, Gate, GroupSum, Product, WeightedSum
from rewards.controls import Case
from rewards.functions import from_function, from_verifiers, from_verl
from rewards.length import CosineLength
from rewards.rubric import Rubric, RubricReward

ROLLOUT = Rollout(id="r", task=Task(id="t", domain="d", prompt=()), turns=(), stop=StopReason.FINISHED)
BOX: Any = object()


@dataclass(frozen=True)
class Fixed:
    value: float | None
    status: ScoreStatus = ScoreStatus.OK

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        return Score(value=self.value, parts={"inner": self.value}, status=self.status, explanation="fixed")


@dataclass(frozen=True)
class Boxed:
    sandbox: SandboxSpec | None = field(default_factory=SandboxSpec)

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        return Score(value=float(sandbox is BOX))


@dataclass(frozen=True)
class Unboxed:
    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        return Score(value=float(sandbox is None))


@dataclass(frozen=True)
class Judged:
    judge: Ask | None = None

    def with_policy(self, ask: Ask) -> Judged:
        return replace(self, judge=ask)

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        if self.judge is None:
            raise JudgeError("no judge")
        return Score(value=float(await self.judge([], max_tokens=1, temperature=1.0, seed=0)))


async def half(messages: Any, *, max_tokens: int, temperature: float, seed: int) -> str:
    return "0.5"


def run(reward: Any, box: Any = None) -> Score:
    return asyncio.run(reward.score(ROLLOUT, box))


@given(st.lists(st.tuples(st.floats(-2, 2), st.none() | st.floats(-1, 1)), min_size=1, max_size=5))
def test_sum_is_none_exactly_when_a_part_that_counts_is(rows: list[tuple[float, float | None]]) -> None:
    names = [f"r{i}" for i in range(len(rows))]
    reward = WeightedSum(
        {name: Fixed(value) for name, (_, value) in zip(names, rows, strict=True)},
        {name: weight for name, (weight, _) in zip(names, rows, strict=True)},
    )
    value = run(reward).value
    if any(weight != 0 and part is None for weight, part in rows):
        assert value is None
    else:
        assert value == pytest.approx(sum(weight * (part or 0.0) for weight, part in rows))


def test_sum_keeps_parts_and_says_which_one_is_missing() -> None:
    reward = WeightedSum({"a": Fixed(1.0), "b": Fixed(None, ScoreStatus.JUDGE_ERROR)}, {"a": 2.0, "b": 1.0})
    score = run(reward)
    assert (score.value, score.status) == (None, ScoreStatus.JUDGE_ERROR)
    assert score.parts == {"a": 1.0, "a/inner": 1.0, "b": None, "b/inner": None}
    assert score.error is not None
    assert score.error.startswith("b: ")
    reported = run(replace(reward, weights={"a": 2.0, "b": 0.0}))
    assert (reported.value, reported.status, reported.parts["b"]) == (2.0, ScoreStatus.OK, None)


def test_gate_closes_opens_and_stays_unscored() -> None:
    closed = run(Gate(condition=Fixed(0.0), reward=Judged()))
    assert (closed.value, closed.status) == (0.0, ScoreStatus.VETOED)
    opened = run(Gate(condition=Fixed(1.0), reward=Fixed(0.25)))
    assert (opened.value, opened.status) == (0.25, ScoreStatus.OK)
    unknown = run(Gate(condition=Fixed(None), reward=Fixed(1.0)))
    assert (unknown.value, unknown.status) == (None, ScoreStatus.REWARD_ERROR)
    behind = run(Gate(condition=Fixed(1.0), reward=Fixed(None, ScoreStatus.PARSE_ERROR)))
    assert (behind.value, behind.status) == (None, ScoreStatus.PARSE_ERROR)


def test_failures_propagate() -> None:
    with pytest.raises(JudgeError):
        run(WeightedSum({"a": Fixed(1.0), "j": Judged()}, {"a": 1.0, "j": 1.0}))
    with pytest.raises(JudgeError):
        run(Gate(condition=Fixed(1.0), reward=Judged()))


def test_policy_and_sandbox_reach_the_parts() -> None:
    total = WeightedSum({"j": Judged(), "b": Boxed(), "u": Unboxed()}, {"j": 1.0, "b": 1.0, "u": 1.0})
    gate = Gate(condition=Boxed(), reward=WeightedSum({"j": Judged()}, {"j": 1.0}))
    assert total.sandbox == gate.sandbox == SandboxSpec()
    assert run(total.with_policy(half), BOX).value == 2.5
    assert run(gate.with_policy(half), BOX).value == 0.5
    assert WeightedSum({"u": Unboxed()}, {"u": 1.0}).sandbox is None


def test_wrong_combinations_are_refused() -> None:
    with pytest.raises(RecipeError, match="at most one"):
        WeightedSum({"a": Boxed(), "b": Boxed()}, {"a": 1.0, "b": 1.0})
    with pytest.raises(RecipeError, match="at most one"):
        Gate(condition=Boxed(), reward=Boxed())
    with pytest.raises(RecipeError, match="one weight"):
        WeightedSum({"a": Fixed(1.0)}, {"b": 1.0})
    with pytest.raises(RecipeError, match="at least one"):
        WeightedSum({}, {})


@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=4))
def test_product_is_none_exactly_when_a_part_before_the_first_zero_is(values: list[float | None]) -> None:
    found = run(Product({f"r{i}": Fixed(value) for i, value in enumerate(values)})).value
    expected: float | None = 1.0
    for value in values:
        if value is None:
            expected = None
            break
        expected = (expected or 0.0) * value
        if expected == 0:
            break
    assert found == (None if expected is None else pytest.approx(expected))


def test_product_stops_at_zero_so_that_no_judge_is_asked() -> None:
    score = run(Product({"tests": Fixed(0.0), "style": Judged()}))
    assert (score.value, score.parts) == (0.0, {"tests": 0.0, "tests/inner": 0.0})
    with pytest.raises(JudgeError):
        run(Product({"tests": Fixed(1.0), "style": Judged()}))
    unread = run(Product({"tests": Fixed(1.0), "style": Fixed(None, ScoreStatus.PARSE_ERROR)}))
    assert (unread.value, unread.status) == (None, ScoreStatus.PARSE_ERROR)


def test_product_of_losses_is_refused() -> None:
    with pytest.raises(RecipeError, match="gave -1"):
        run(Product({"a": Fixed(-1.0), "b": Fixed(-1.0)}))
    with pytest.raises(RecipeError, match="no rewards"):
        Product({})


@pytest.mark.parametrize(("value", "expected"), [(5.0, 1.0), (-5.0, -0.5), (0.25, 0.25), (None, None)])
def test_cap_holds_a_value_within_its_ends(value: float | None, expected: float | None) -> None:
    score = run(Cap(reward=Fixed(value), low=-0.5, high=1.0))
    assert score.value == expected
    assert score.parts.get("uncapped") == value


def test_caps_and_products_lend_boxes_and_policies() -> None:
    product = Product({"b": Boxed(), "j": Judged()})
    capped = Cap(reward=product, high=0.25)
    assert capped.sandbox == product.sandbox == SandboxSpec()
    assert run(capped.with_policy(half), BOX).value == 0.25
    assert run(product.with_policy(half), BOX).value == 0.5
    with pytest.raises(RecipeError, match="low"):
        Cap(reward=product, low=1.0, high=1.0)


@dataclass(frozen=True)
class Listed:
    """A group reward that gives these values in order."""

    values: tuple[float | None, ...]

    async def score_group(self, rollouts: Sequence[Rollout]) -> Sequence[Score]:
        return [
            Score(value=v, status=ScoreStatus.OK if v is not None else ScoreStatus.TIMEOUT) for v in self.values
        ]  # fmt: skip


def group(reward: GroupSum, size: int) -> Sequence[Score]:
    assert isinstance(reward, GroupReward)
    return asyncio.run(reward.score_group([ROLLOUT] * size))


def test_group_sum_adds_rewards_of_both_kinds() -> None:
    reward = GroupSum(rewards={"g": Listed((1.0, 0.0)), "r": Fixed(0.5)}, weights={"g": 2.0, "r": 1.0})
    first, second = group(reward, 2)
    assert (first.value, second.value) == (2.5, 0.5)
    assert first.parts == {"g": 1.0, "r": 0.5, "r/inner": 0.5}


def test_normalising_first_makes_parts_of_other_sizes_count_alike() -> None:
    parts = {"big": Listed((0.0, 100.0, 100.0, 0.0)), "small": Listed((0.0, 0.0, 0.01, 0.01)), "same": Fixed(7.0)}
    weights = dict.fromkeys(parts, 1.0)
    plain = [s.value for s in group(GroupSum(rewards=parts, weights=weights), 4)]
    assert plain == pytest.approx([7.0, 107.0, 107.01, 7.01])
    normalised = GroupSum(rewards=parts, weights=weights, aggregation="normalize_then_sum")
    assert [s.value for s in group(normalised, 4)] == pytest.approx([-2.0, 0.0, 2.0, 0.0])


def test_an_unscored_rollout_changes_no_mean_and_no_advantage_of_the_others() -> None:
    full = GroupSum(rewards={"g": Listed((1.0, 3.0))}, weights={"g": 1.0}, aggregation="normalize_then_sum")
    torn = GroupSum(rewards={"g": Listed((1.0, None, 3.0))}, weights={"g": 1.0}, aggregation="normalize_then_sum")
    values = [score.value for score in group(torn, 3)]
    assert values == [group(full, 2)[0].value, None, group(full, 2)[1].value]
    assert group(torn, 3)[1].status is ScoreStatus.TIMEOUT
    (advantages,) = group_advantages([values], "none")
    assert advantages == [-1.0, None, 1.0]
    reported = GroupSum(rewards={"g": Listed((1.0, None)), "r": Fixed(1.0)}, weights={"g": 0.0, "r": 1.0})
    assert [score.value for score in group(reported, 2)] == [1.0, 1.0]


def test_group_sums_lend_the_policy() -> None:
    judged = GroupSum(rewards={"j": Judged(), "r": Fixed(1.0)}, weights={"j": 1.0, "r": 1.0})
    assert [score.value for score in group(judged.with_policy(half), 2)] == [1.5, 1.5]


def test_group_sums_refuse_what_they_cannot_lend() -> None:
    with pytest.raises(RecipeError, match="needs a sandbox"):
        GroupSum(rewards={"b": Boxed()}, weights={"b": 1.0})
    with pytest.raises(RecipeError, match="one weight"):
        GroupSum(rewards={"r": Fixed(1.0)}, weights={})


@pytest.mark.parametrize("kind", ["own", "verl", "trl", "verifiers"])
@pytest.mark.parametrize("wrapped", ["bare", "sum", "gate", "cap", "product"])
def test_none_leaves_baseline_loss_and_logs_as_if_the_rollout_had_not_been(kind: str, wrapped: str) -> None:
    """The function cannot tell about "?": everything after it sees the other three rollouts and a count."""
    if kind in ("trl", "verifiers") and wrapped != "bare":
        pytest.skip("these reward groups, which single rewards are not made of")
    task = Task(id="t", domain="d", prompt=({"role": "user", "content": "1"},), answer="1")
    rollouts = tuple(Case(task=task, reference="").rollout(text) for text in ("1", "0", "?", "0"))

    def group_of(chosen: tuple[Rollout, ...]) -> Group:
        reward = wrap(wrapped, {"own": own, "verl": verl, "trl": trl, "verifiers": verifiers}[kind])
        if isinstance(reward, GroupReward):
            scores = asyncio.run(reward.score_group(chosen))  # type: ignore[arg-type, var-annotated]
        else:
            scores = [asyncio.run(reward.score(rollout)) for rollout in chosen]
        return Group(task=task, rollouts=chosen, scores=tuple(scores))

    config = GRPO(max_steps=1)
    full, without = group_of(rollouts), group_of((rollouts[0], rollouts[1], rollouts[3]))
    (row,), (rest,) = (group_advantage_rows([g], config, min_group_size=2) for g in (full, without))
    assert [row[0], row[1], row[3]] == rest
    assert row[2] != row[2]
    assert len(grpo_samples([full], [row], config)) == 3
    logged, unlogged = reward_metrics([full]), reward_metrics([without])
    assert (logged.pop("unscored"), unlogged.pop("unscored")) == (1.0, 0.0)
    assert logged["reward"] == unlogged["reward"]
    assert logged["reward_std"] == unlogged["reward_std"]
    assert full.scores[2].error is not None


def unknown(text: str) -> float | None:
    return None if text == "?" else float(text)


own = from_function(lambda text: unknown(text))
verl = from_verl(lambda solution_str, ground_truth: {"score": unknown(solution_str)})
trl = from_trl(lambda completions, **columns: [unknown(c[0]["content"]) for c in completions])
verifiers = from_verifiers(lambda completion: unknown(completion[0]["content"]))


def wrap(kind: str, reward: Any) -> Any:
    wrapped = {
        "bare": lambda: reward,
        "sum": lambda: WeightedSum({"r": reward, "s": Fixed(1.0)}, {"r": 1.0, "s": 0.5}),
        "gate": lambda: Gate(condition=reward, reward=Fixed(1.0)),
        "cap": lambda: Cap(reward=reward, high=0.5),
        "product": lambda: Product({"s": Fixed(0.5), "r": reward}),
    }
    return wrapped[kind]()


def test_a_group_nobody_could_score_is_no_group_without_deviation() -> None:
    task = Task(id="t", domain="d", prompt=())
    silent = Score(value=None, status=ScoreStatus.JUDGE_ERROR)
    scored = tuple(Score(value=value) for value in (0.0, 1.0))
    groups = [Group(task=task, rollouts=(ROLLOUT,) * 2, scores=scores) for scores in ((silent, silent), scored)]
    assert reward_metrics(groups)["frac_reward_zero_std"] == 0.0
    assert reward_metrics(groups)["unscored"] == 2.0


def test_only_what_asks_the_policy_is_lent_it():
    own = WeightedSum({"own": RubricReward(Rubric.load("one_line"), judge=cast(Any, object()))}, {"own": 1.0})
    assert not asks_policy(WeightedSum({"fixed": Fixed(1.0)}, {"fixed": 1.0}))
    assert not asks_policy(own)
    assert asks_policy(Gate(condition=Fixed(1.0), reward=Cap(reward=RubricReward(Rubric.load("one_line")), high=1.0)))
    assert asks_policy(Judged())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_passes_no_gate_and_spoils_no_sum(value: float) -> None:
    bad, one = Fixed(value), Fixed(1.0)
    made = [
        Gate(condition=bad, reward=one),
        Gate(condition=one, reward=bad),
        Product({"a": bad, "b": one}),
        WeightedSum({"a": bad, "b": one}, {"a": 1.0, "b": 1.0}),
        Cap(reward=bad, low=0.0, high=1.0),
        CosineLength(reward=bad, max_tokens=10),
    ]
    for reward in made:
        score = asyncio.run(reward.score(ROLLOUT))
        assert (score.value, score.status) == (None, ScoreStatus.REWARD_ERROR)
    group = GroupSum(rewards={"a": bad, "b": one}, weights={"a": 1.0, "b": 1.0}, aggregation="normalize_then_sum")
    assert [score.value for score in asyncio.run(group.score_group([ROLLOUT]))] == [None]
    told = WeightedSum({"a": bad, "b": one}, {"a": 0.0, "b": 1.0})
    assert asyncio.run(told.score(ROLLOUT)).parts["a"] is None
