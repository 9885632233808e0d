"""Effort modes: a specialist for each mode of two domains, merged into one student that thinks as long as it is told.

The tiny model answers at once (``non-think``), number by number (``high``), or counting by ones (``max``). One SFT a
domain shows it the three forms; then each mode has its own GRPO, with its own budget and price of length.
"""

from posttrain.config import GRPO, SFT, Distill, Domain, Effort, Evaluation, Model, Optim, Recipe
from posttrain.conversation.effort import HIGH, MAX, NON_THINK
from posttrain.rollout.environments import SingleTurn
from posttrain.types import Sampling
from recipes.tasks.reasoned import ReasonedSums, bills, rests
from rewards.length import OverlongPenalty
from rewards.math import MathReward
from teachers.library import SwapOnDemand


def efforts() -> dict[str, Effort]:
    return {
        NON_THINK: Effort(sampling=Sampling(max_tokens=8), max_sequence_tokens=128, grpo=grpo()),
        HIGH: Effort(
            sampling=Sampling(max_tokens=48),
            max_sequence_tokens=160,
            length_penalty=OverlongPenalty(max_tokens=48, cache_tokens=12),
            grpo=grpo(),
        ),
        MAX: Effort(
            sampling=Sampling(max_tokens=176),
            max_sequence_tokens=512,
            length_penalty=OverlongPenalty(max_tokens=176, cache_tokens=16),
            grpo=grpo(),
        ),
    }


def grpo(steps: int = 30) -> GRPO:
    return GRPO(max_steps=steps, groups_per_step=8, num_generations=8, optim=Optim(learning_rate=1e-4))


def domain(tasks: ReasonedSums) -> Domain:
    return Domain(
        tasks=tasks,
        reward=MathReward(),
        environment=SingleTurn(),
        sft=SFT(
            num_demonstrations=8400,
            max_steps=700,
            batch_size=12,
            optim=Optim(learning_rate=1.5e-3, lr_scheduler_type="cosine", warmup_steps=20),
        ),
        efforts=efforts(),
    )


def recipe() -> Recipe:
    return Recipe(
        name="efforts",
        model=Model(path="package:recipes/tiny", dtype="float32", chat="v4"),
        domains={"bill": domain(bills()), "rest": domain(rests())},
        distill=Distill(
            teachers=SwapOnDemand(),
            # From the base the student would never draw a thought, and a reverse KL would not teach it to.
            start="sft_mean",
            max_steps=400,
            rollouts_per_step=48,
            optim=Optim(learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=5),
        ),
        evaluation=Evaluation(num_tasks=100, num_samples=2, greedy=False),
    )
