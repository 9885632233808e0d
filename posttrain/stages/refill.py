"""Dynamic sampling (DAPO, arXiv 2503.14476, Section 3.2): groups that teach nothing are replaced within their step.

A group whose rollouts all earn the same has no gradient. While a step lacks informative groups it asks for others, of
the same domain, until it has as many as it was to learn from or ``GRPO.max_refills`` rounds were made.

What is learned from is not biased towards what is short or fast: a group is judged when it is complete, a round is
waited for to its last rollout, and which tasks come next depends on how many are missing alone. They are those behind
the last task that the stage would have come to, so the stage's own order stays. A group that the machinery failed, in
whole or in part, is not known to teach nothing and is not replaced.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from posttrain.config import Domain
from posttrain.rollout.player import GroupJob
from posttrain.rollout.samples import modes_of
from posttrain.rollout.stream import More
from posttrain.stages.mixture import take_tasks
from posttrain.types import Group, Task


def teaches_nothing(group: Group) -> bool:
    """Whether every rollout was scored, and those of each effort mode all alike."""
    values = [score.value for score in group.scores]
    if not values or None in values:
        return False
    return all(len({values[index] for index in mode}) == 1 for mode in modes_of(group))


def without_useless(groups: Sequence[Group], rows: Sequence[list[float]]) -> list[list[float]]:
    """Advantages, NaN for groups that teach nothing: they leave the update, also what KL and normaliser see of it."""
    return [[math.nan] * len(row) if teaches_nothing(group) else row for group, row in zip(groups, rows, strict=True)]


class Refills:
    """The groups that a stage plays in place of others.

    ``behind`` counts each domain's tasks that are not to be drawn: those of the stage and those drawn before it was
    interrupted. ``job`` makes the job of an id and a task.
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        *,
        seed: int,
        behind: Mapping[str, int],
        job: Callable[[str, Task], GroupJob],
        max_refills: int,
    ) -> None:
        self._job, self._max_refills = job, max_refills
        self._tasks: dict[str, Iterator[Task]] = {
            name: take_tasks(domain, seed, skip=behind.get(name, 0)) for name, domain in domains.items()
        }

    def of_step(self, prefix: str) -> More:
        """For ``GroupStream.take``: the jobs of the next round, given all groups so far; none when that is it.

        Their ids begin with ``prefix``, and the same step asks for the same jobs after an interruption.
        """
        rounds = itertools.count()
        wanted: Counter[str] = Counter()

        def more(groups: Sequence[Group]) -> list[GroupJob]:
            number = next(rounds)
            if number == 0:
                wanted.update(group.task.domain for group in groups if group.task.domain in self._tasks)
            if number >= self._max_refills:
                return []
            useful = Counter(group.task.domain for group in groups if not teaches_nothing(group))
            missing = [name for name, count in wanted.items() for _ in range(count - useful[name])]
            return [
                self._job(f"{prefix}/more-{number}-{index}", next(self._tasks[name]))
                for index, name in enumerate(missing)
            ]

        return more


def refill_metrics(groups: Sequence[Group], *, refilled: int) -> dict[str, float]:
    """Of a step's generate groups, of which the last ``refilled`` were played in place of others."""
    useless = sum(map(teaches_nothing, groups))
    return {
        "refilled_groups": float(refilled),
        "zero_variance_groups": float(useless),
        "missing_groups": float(max(0, useless - refilled)),
    }
