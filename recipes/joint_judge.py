"""One model that writes and judges: judge prompts with known answers in the writing specialist's own GRPO run.

The rubric words its question as the base never saw it, so the judge errs often at the start. Answers come from checks
in code on the run's own texts (for nine of the thirteen topics the words that belong to it are known), and from a
golden set. ``--set domains.writing.judge_training=none`` is the control that trains generation only.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from importlib import resources

from posttrain.config import Domain, JudgeTraining, Recipe
from posttrain.protocols import Sandbox
from posttrain.types import Rollout, Score
from recipes import quickstart
from recipes.tasks.words import TOPICS
from recipes.tasks.writing import line
from rewards.checks import words
from rewards.compose import WeightedSum
from rewards.criteria import Criterion
from rewards.drift import FrozenSet
from rewards.joint import GoldenRow, JudgeCurriculum, KnownVerdict, VerdictReward, read_golden
from rewards.judge import LineDialect
from rewards.rubric import Rubric, RubricReward

ON_TOPIC = "The text names {topic}."
CHECKED_TOPICS = tuple(TOPICS)[:9]
"""Topics whose texts code can check; on the others there is only the judge."""


@dataclass(frozen=True, slots=True)
class TopicWords:
    """1 when a word of the task's topic occurs, else 0; no value for a topic that is not among ``topics``."""

    topics: tuple[str, ...] = CHECKED_TOPICS

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        if rollout.task.info["topic"] not in self.topics:
            return Score(value=None)
        return Score(value=float(on_topic(rollout.text, rollout.task.info["topic"])))


def on_topic(text: str, topic: str) -> bool:
    """Whether a word that belongs to the topic occurs."""
    return not set(TOPICS[topic]).isdisjoint(words(text))


def rubric() -> Rubric:
    """The quickstart's rubric for one line, its question to the judge in other words."""
    given = Rubric.load("one_line")
    return given.model_copy(update={"criteria": tuple(map(_reworded, given.criteria))})


def _reworded(criterion: Criterion) -> Criterion:
    return criterion.replace(text=ON_TOPIC) if criterion.id == "on_topic" else criterion


def golden(count: int = 40, *, seed: int = 0) -> tuple[GoldenRow, ...]:
    """Correct lines about the checked topics, half of them on the topic asked about."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        about, elsewhere, asked_instead = rng.sample(CHECKED_TOPICS, 3)
        text = line(rng, rng.choice(TOPICS[about]), rng.choice(TOPICS[elsewhere]))
        met = index % 2 == 0
        criterion = ON_TOPIC.format(topic=about if met else asked_instead)
        label = "met" if met else "unmet"
        rows.append(GoldenRow(id=f"golden-{index}", criterion=criterion, response=text, label=label))
    return tuple(rows)


def frozen() -> tuple[GoldenRow, ...]:
    """Held-out texts of the base model and correct lines, on tasks never trained on; checked in code."""
    with resources.as_file(resources.files("recipes") / "joint_judge.jsonl") as path:
        return read_golden(path, {"on_topic": ON_TOPIC})


def judge_training() -> JudgeTraining:
    return JudgeTraining(
        tasks=JudgeCurriculum(
            verdicts=(KnownVerdict(criterion=ON_TOPIC, part="topic_words", evidence=True),),
            golden=golden(),
        ),
        reward=VerdictReward(),
        groups_per_step=3,
        max_tokens=32,
        # A weak judge's gradients are several times those of the texts, and would fill Adam's second moments.
        weight=0.25,
        monitor=FrozenSet(rows=frozen()),
        monitor_steps=10,
    )


def writing() -> Domain:
    judged = RubricReward(rubric=rubric(), dialect=LineDialect(), max_tokens=32)
    reward = WeightedSum(
        rewards={"rubric": judged, "topic_words": TopicWords()}, weights={"rubric": 1.0, "topic_words": 0.0}
    )
    return quickstart.writing().replace(reward=reward, grpo=quickstart.grpo(50), judge_training=judge_training())


def recipe() -> Recipe:
    return quickstart.recipe().replace(
        name="joint-judge", domains={"writing": writing()}, distill=None, judge_lag_steps=5, substrate=None
    )
