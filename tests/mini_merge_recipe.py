"""The mini recipe's student made in other ways, from specialists that are there already.

``--set model.path=FOLDER --set domains.vowels.teacher.path=FOLDER --set domains.digits.teacher.path=FOLDER`` give the
models.
"""

from __future__ import annotations

from posttrain.config import GRPO, Distill, Evaluation, MixedRL, Optim, Recipe, Ties, WeightAverage
from teachers.library import SwapOnDemand
from teachers.sources import HFTeacher
from tests import mini_recipe

OPTIM = Optim(learning_rate=1e-3)


def weight_average() -> Recipe:
    return _recipe(WeightAverage())


def ties() -> Recipe:
    return _recipe(Ties(density=0.5))


def mixed_rl() -> Recipe:
    return _recipe(MixedRL(grpo=GRPO(max_steps=4, groups_per_step=3, num_generations=4, optim=OPTIM, save_steps=1)))


def off_policy() -> Recipe:
    return _recipe(
        Distill(
            teachers=SwapOnDemand(),
            max_steps=5,
            rollouts_per_step=8,
            rollouts_from="teachers",
            optim=OPTIM,
            save_steps=2,
        )
    )


def _recipe(distill: Distill | WeightAverage | Ties | MixedRL) -> Recipe:
    whole = mini_recipe.recipe()
    domains = {
        name: domain.replace(sft=None, grpo=None, teacher=HFTeacher("set-teacher-path"))
        for name, domain in whole.domains.items()
    }
    return whole.replace(
        name="mini-merge",
        domains=domains,
        distill=distill,
        evaluation=Evaluation(num_tasks=2, num_samples=1, bootstrap_resamples=50),
    )
