"""Which tasks the steps of a stage play: of one domain, or of several in a mixture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from posttrain.config import Domain
from posttrain.types import Task


def shares(domains: Mapping[str, Domain], total: int) -> dict[str, int]:
    """Tasks per domain and step; every domain gets at least one."""
    return split({name: domain.share for name, domain in domains.items()}, total)


def split(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """``total`` tasks by largest remainder; every domain with a share gets at least one, and none without."""
    whole = sum(shares.values())
    exact = {name: total * share / whole for name, share in shares.items()}
    given = {name: max(1, int(value)) if value else 0 for name, value in exact.items()}
    by_remainder = sorted((name for name in exact if given[name]), key=lambda name: given[name] - exact[name])
    for name in itertools.islice(itertools.cycle(by_remainder), max(0, total - sum(given.values()))):
        given[name] += 1
    while sum(given.values()) > max(total, len(by_remainder)):
        given[max((name for name in given if given[name] > 1), key=lambda name: given[name] - exact[name])] -= 1
    return given


def interleave(
    domains: Mapping[str, Domain], per_step: Mapping[str, int], seed: int, *, skip_steps: int
) -> Iterator[list[Task]]:
    """Per step, tasks of all domains in turn, so that no stretch of a batch belongs to one domain."""
    sources = {name: take_tasks(domains[name], seed, skip=skip_steps * count) for name, count in per_step.items()}
    while True:
        yield in_turn(sources, per_step)


def in_turn(sources: Mapping[str, Iterator[Task]], counts: Mapping[str, int]) -> list[Task]:
    """The next tasks of every source, in turn."""
    drawn = [list(itertools.islice(sources[name], count)) for name, count in counts.items()]
    return [task for row in itertools.zip_longest(*drawn) for task in row if task is not None]


def take_tasks(domain: Domain, seed: int, *, skip: int) -> Iterator[Task]:
    """Training tasks from where the last checkpoint left off; a finite source is gone through again."""

    def endless() -> Iterator[Task]:
        for epoch in itertools.count():
            empty = True
            for task in domain.tasks.train(seed=seed + epoch):
                empty = False
                yield task
            if empty:
                raise ValueError("the task source has no training tasks")

    return itertools.islice(endless(), skip, None)
