"""The math specialist of the quickstart on its own: SFT, then GRPO."""

from posttrain.config import Recipe
from recipes import quickstart


def recipe() -> Recipe:
    return quickstart.recipe().replace(name="math-grpo", domains={"math": quickstart.math()}, distill=None)
