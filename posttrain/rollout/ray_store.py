"""Per-token arrays in Ray's object store, which the processes of a node share and which spills to disk.

In Ray an object dies with its *owner*, the process that made its first reference: the caller of a task for what the
task returns, the caller of ``ray.put`` for what is put. So a worker must not ``put`` the arrays of its rollouts: when
it died, all it had played would be gone although the bytes still lay in the store (``OwnerDiedError``). It returns
them, one object per rollout, and the driver owns them:

    light, *heavy = worker.play_group.options(num_returns=1 + job.num_rollouts).remote(job)
    group = attach(ray.get(light), [RayRef(each) for each in heavy])

The driver's references also are what frees them: an object goes when its last reference and the last array read from
it have gone. (Naming another owner in ``ray.put`` was never possible for the driver, and Ray 2.56 removed it.) Objects
under 100 KiB do not lie in shared memory; Ray hands them to their owner, which keeps them in its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import ray


class RayRef:
    """The way to arrays in the object store. Freeing it drops the reference, for all who hold this very object."""

    def __init__(self, ref: ray.ObjectRef[Mapping[str, npt.NDArray[Any]]]) -> None:
        self._ref: ray.ObjectRef[Mapping[str, npt.NDArray[Any]]] | None = ref

    def load(self) -> Mapping[str, npt.NDArray[Any]]:
        """Views of the store's memory. ``KeyError`` when freed, ``ray.exceptions.RayError`` when node or owner died."""
        if self._ref is None:
            raise KeyError("these arrays were freed")
        return ray.get(self._ref)

    def free(self) -> None:
        self._ref = None


class RayStore:
    """Puts arrays into the object store for as long as the process that puts them lives."""

    def put(self, arrays: Mapping[str, npt.NDArray[Any]]) -> RayRef:
        return RayRef(ray.put(dict(arrays)))
