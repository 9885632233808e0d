"""The mini recipe's first domain with judge prompts in its GRPO: a text said "a" or not, and a reply has to say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from posttrain.config import JudgeTraining, Recipe
from posttrain.protocols import Sandbox
from posttrain.types import AnyRollout, Group, JudgeTask, Rollout, Score, Task
from tests import mini_recipe


@dataclass(frozen=True, slots=True)
class LetterVerdicts:
    """Asks whether a text holds the letter; the answer is the letter to say."""

    anchors_of: tuple[str, ...] = ("xa", "xx")

    def from_rollout(self, rollout: AnyRollout, score: Score) -> Sequence[JudgeTask]:
        return [] if score.value is None else [self._ask(rollout.text[:4], source="verified")]

    def anchors(self) -> Sequence[JudgeTask]:
        return [self._ask(text, source="golden") for text in self.anchors_of] + [pair("p")]

    def _ask(self, text: str, *, source: str) -> JudgeTask:
        label = "a" if "a" in text else "b"
        form = Task(
            id=f"judge-{text}",
            domain="judge",
            prompt=({"role": "user", "content": f"j{text}"},),
            answer=label,
            info={"source": source},
        )
        return JudgeTask(variants=(form,), label=label, labels=("a", "b"), source=source)


def pair(name: str) -> JudgeTask:
    """Two orders of one prompt, with answers of their own."""
    forms = tuple(
        Task(
            id=f"{name}-{order}",
            domain="judge",
            prompt=({"role": "user", "content": order},),
            answer=letter,
            info={"source": "pair"},
        )
        for order, letter in (("xy", "a"), ("yx", "b"))
    )
    return JudgeTask(variants=forms, label=None, labels=("a", "b"), source="pair")


@dataclass(frozen=True, slots=True)
class SaysAnswer:
    """1 when the reply holds the answer, else 0."""

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        return Score(value=float(str(rollout.task.answer) in rollout.text))


@dataclass(frozen=True, slots=True)
class Frozen:
    """Two texts that are judged again and again."""

    samples: int = 2
    temperature: float = 1.0

    def tasks(self) -> Sequence[JudgeTask]:
        return LetterVerdicts(anchors_of=("za", "zz")).anchors()[:2]

    def scores(self, groups: Sequence[Group]) -> Mapping[str, float]:
        return {group.task.id: sum(score.value or 0.0 for score in group.scores) for group in groups}

    def measure(self, groups: Sequence[Group], start: Mapping[str, float]) -> Mapping[str, float]:
        return {"shift": sum(self.scores(groups).values()) - sum(start.values())}


def recipe() -> Recipe:
    given = mini_recipe.recipe()
    vowels = given.domains["vowels"]
    assert vowels.grpo is not None
    judging = JudgeTraining(
        tasks=LetterVerdicts(),
        reward=SaysAnswer(),
        groups_per_step=2,
        num_generations=4,
        max_tokens=4,
        anchor_share=0.3,
        monitor=Frozen(),
        monitor_steps=2,
    )
    joint = vowels.replace(sft=None, grpo=vowels.grpo.replace(max_steps=6), judge_training=judging)
    return given.replace(name="mini-joint", domains={"vowels": joint}, distill=None)
