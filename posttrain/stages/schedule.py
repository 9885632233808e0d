"""What a distillation learns from, step by step: each domain's teachers, weight and share."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from posttrain.config import Distill, Recipe
from posttrain.protocols import Teacher
from posttrain.stages.mixture import in_turn, split, take_tasks
from posttrain.types import Route, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What holds from one step until the next change."""

    first_step: int
    routes: Mapping[str, Route]
    """By specialist."""
    num_tasks: Mapping[str, int]
    """Of one step, by domain."""


def phases(recipe: Recipe, config: Distill) -> list[Phase]:
    """From the start and from each change of ``config.schedule`` on. Teachers are named by ``teacher_name``."""
    shares = {name: domain.share for name, domain in recipe.domains.items()}
    specialties = recipe.specialties()
    routes = {
        name: Route(teacher=teacher_name(name, 0), weight=specialty.domain.weight)
        for name, specialty in specialties.items()
    }
    total = config.rollouts_per_step // config.num_generations
    found = [Phase(first_step=0, routes=dict(routes), num_tasks=split(shares, total))]
    for step, change in sorted(config.schedule.items()):
        shares |= change.shares
        for name, route in routes.items():
            routes[name] = Route(
                teacher=teacher_name(name, step) if name in change.teachers else route.teacher,
                weight=change.weights.get(specialties[name].domain_name, route.weight),
            )
        found.append(Phase(first_step=step, routes=dict(routes), num_tasks=split(shares, total)))
    return found


def teacher_name(specialist: str, since: int) -> str:
    """A teacher among those of a run; the one that a run starts with has the specialist's own name."""
    return f"{specialist}@{since}" if since else specialist


def scheduled_teachers(config: Distill) -> dict[str, tuple[str, Teacher]]:
    """Every teacher that comes in later, by its name, with the specialist it takes the place of."""
    return {
        teacher_name(name, step): (name, teacher)
        for step, change in config.schedule.items()
        for name, teacher in change.teachers.items()
    }


def planned_tasks(recipe: Recipe, config: Distill) -> Iterator[list[tuple[Task, Route]]]:
    """The tasks of each step of the stage, from all domains in turn, and whom their rollouts are distilled from.

    A task is in one effort mode of its domain, drawn by the modes' shares.
    """
    rng = random.Random(f"{recipe.seed}/modes")
    # Another seed than the specialists' stages: the student need not see the very tasks they were trained on.
    sources = {name: take_tasks(domain, recipe.seed + 1, skip=0) for name, domain in recipe.domains.items()}
    plan = phases(recipe, config)
    for phase, end in zip(plan, [*(later.first_step for later in plan[1:]), config.max_steps], strict=True):
        for _ in range(phase.first_step, end):
            tasks = in_turn(sources, phase.num_tasks)
            forms = [replace(task, effort=recipe.domains[task.domain].draw_mode(task, rng)) for task in tasks]
            yield [(form, phase.routes[recipe.specialist_of(form)]) for form in forms]
