"""Groups in two halves: what is shuffled and logged, and the per-token arrays that only a micro-batch loads.

A rollout worker calls ``split`` and sends the two halves on different ways; the driver calls ``attach`` and from then
on handles light groups, whose arrays stay in a store (``posttrain.rollout.ray_store``, or
``posttrain.rollout.local_store`` without Ray) until they are freed, mini-batch by mini-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from posttrain.protocols import ArrayRef, ArrayStore
from posttrain.types import Group, LightRollout, Rollout


def split(group: Group, *, small: int = 0) -> tuple[Group, list[Mapping[str, npt.NDArray[Any]]]]:
    """The light half of a played group, and the arrays of its rollouts for ways of their own.

    Rollouts with arrays of up to ``small`` bytes keep them.
    """
    rollouts = [rollout for rollout in group.rollouts if isinstance(rollout, Rollout)]
    if len(rollouts) != len(group.rollouts):
        raise ValueError(f"group of task {group.task.id!r}: some of its rollouts are light; it was split before")
    light: list[LightRollout] = []
    arrays: list[Mapping[str, npt.NDArray[Any]]] = []
    for rollout in rollouts:
        parts = rollout.tokens.load().parts()
        if sum(part.nbytes for part in parts.values()) <= small:
            light.append(replace(rollout.light(), tokens=rollout.tokens))
        else:
            light.append(rollout.light())
            arrays.append(parts)
    return replace(group, rollouts=tuple(light)), arrays


def attach(light: Group, refs: Sequence[ArrayRef]) -> Group:
    """A split group whose rollouts know where their arrays are; one reference per rollout without any, in order."""
    missing = sum(isinstance(r, LightRollout) and r.tokens.source is None for r in light.rollouts)
    if missing != len(refs):
        raise ValueError(
            f"group of task {light.task.id!r}: {len(refs)} references for {missing} rollouts without arrays"
        )
    coming = iter(refs)
    attached = [
        replace(rollout, tokens=replace(rollout.tokens, source=next(coming)))
        if isinstance(rollout, LightRollout) and rollout.tokens.source is None
        else rollout
        for rollout in light.rollouts
    ]
    return replace(light, rollouts=tuple(attached))


def store_group(group: Group, store: ArrayStore) -> Group:
    """The light half of a played group, its arrays in ``store``."""
    light, arrays = split(group)
    return attach(light, [store.put(each) for each in arrays])


def free_groups(groups: Sequence[Group]) -> None:
    """Free the arrays of all light rollouts, also of those no mini-batch was made of."""
    for group in groups:
        for rollout in group.rollouts:
            if isinstance(rollout, LightRollout):
                rollout.tokens.free()
