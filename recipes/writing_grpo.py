"""The writing specialist of the quickstart on its own: SFT, then GRPO."""

from posttrain.config import Recipe
from recipes import quickstart


def recipe() -> Recipe:
    return quickstart.recipe().replace(name="writing-grpo", domains={"writing": quickstart.writing()}, distill=None)
