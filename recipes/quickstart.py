"""Four specialists on a tiny model merged into one student: CPU only, a few minutes."""

from posttrain.config import GRPO, SFT, Distill, Domain, Evaluation, Model, Optim, Recipe
from posttrain.rollout.environments import SingleTurn, ToolUse
from posttrain.types import Sampling
from recipes.tasks.agent import AgentTasks
from recipes.tasks.code import CodeTasks
from recipes.tasks.math import MathTasks
from recipes.tasks.writing import WritingTasks
from rewards.agent import FinalStateReward
from rewards.code import CodeReward
from rewards.judge import LineDialect
from rewards.math import MathReward
from rewards.rubric import Rubric, RubricReward
from sandbox.process import Process
from teachers.library import SwapOnDemand

BASE = Model(path="package:recipes/tiny", dtype="float32")


def sft() -> SFT:
    """Short on purpose: it shows the form and leaves the skill to reinforcement."""
    return SFT(num_demonstrations=160, max_steps=10, batch_size=16, optim=Optim(learning_rate=2e-4))


def grpo(steps: int = 25, *, learning_rate: float = 2e-4) -> GRPO:
    return GRPO(max_steps=steps, groups_per_step=8, num_generations=8, optim=Optim(learning_rate=learning_rate))


def math() -> Domain:
    return Domain(
        tasks=MathTasks(),
        reward=MathReward(),
        environment=SingleTurn(),
        sampling=Sampling(max_tokens=12),
        sft=sft(),
        # Sums are a matter of knowledge, not of form: twice the rate lost accuracy in greedy decoding.
        grpo=grpo(70, learning_rate=1e-4),
        share=1.5,
    )


def code() -> Domain:
    return Domain(
        tasks=CodeTasks(),
        reward=CodeReward(),
        environment=SingleTurn(),
        sampling=Sampling(max_tokens=40),
        sft=sft(),
        grpo=grpo(),
    )


def agent() -> Domain:
    return Domain(
        tasks=AgentTasks(),
        reward=FinalStateReward(),
        environment=ToolUse(max_turns=4),
        sampling=Sampling(max_tokens=40),
        sft=sft(),
        grpo=grpo(),
    )


def writing() -> Domain:
    return Domain(
        tasks=WritingTasks(),
        reward=RubricReward(rubric=Rubric.load("one_line"), dialect=LineDialect(), max_tokens=32),
        environment=SingleTurn(),
        sampling=Sampling(max_tokens=32),
        sft=sft(),
        grpo=grpo(),
    )


def recipe() -> Recipe:
    return Recipe(
        name="quickstart",
        model=BASE,
        domains={"math": math(), "code": code(), "agent": agent(), "writing": writing()},
        distill=Distill(
            teachers=SwapOnDemand(),
            max_steps=60,
            rollouts_per_step=64,
            optim=Optim(learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=5),
        ),
        evaluation=Evaluation(num_tasks=200, num_samples=2),
        substrate=Process(),
    )
