"""The agent specialist of the quickstart on its own: SFT, then GRPO."""

from posttrain.config import Recipe
from recipes import quickstart


def recipe() -> Recipe:
    return quickstart.recipe().replace(name="agent-grpo", domains={"agent": quickstart.agent()}, distill=None)
