"""The teachers of a recipe's merge: loaded on demand one after another, checked before the first step."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from posttrain.protocols import StateStore, Teacher
from posttrain.types import IntArray, Sample
from teachers.cache import open_store
from teachers.checks import check_teachers
from teachers.pool import TeacherPool
from teachers.sources import HFTeacher


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapOnDemand:
    """Keeps teachers on disk and loads each when its samples come up.

    ``memory_mb`` (MiB) is the most that teachers' weights take at any time, or a GPU's memory for them: a larger
    teacher is run layer by layer, and what fits stays for the next step.
    """

    memory_mb: int = 4096
    device: str | None = None
    """Where teachers compute; None is the first GPU if there is one, else the CPU."""
    states: str = "files"
    """Where hidden states wait for the learner: ``files`` of the stage's folder, mapped into memory; ``memory``;
    ``ray``, the object store; or a folder or fsspec URL. What is written to files or a URL is found again by a run
    that goes on after it was killed in a step, whose samples no teacher then reads twice. States are freed with the
    step's update: steps made after the last checkpoint are made again with all their teachers."""

    def from_checkpoint(self, path: str) -> Teacher:
        return HFTeacher(path)

    @contextlib.contextmanager
    def open(
        self,
        teachers: Mapping[str, Teacher],
        *,
        student_path: str,
        probes: Mapping[str, Sequence[IntArray]] | None,
        folder: Path | None = None,
    ) -> Iterator[PooledTeachers]:
        """See ``posttrain.protocols.TeacherLibrary.open``."""
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if probes is not None:
            student = HFTeacher(student_path)
            check_teachers(teachers, student=student, probes=probes, memory_mb=self.memory_mb, device=device)
        with TeacherPool(teachers, memory_mb=self.memory_mb, device=device) as pool:
            yield PooledTeachers(pool, open_store(self.states, folder))


class PooledTeachers:
    """A pool and the store its states go to."""

    def __init__(self, pool: TeacherPool, store: StateStore) -> None:
        self._pool, self.store = pool, store
        self._reported = pool.stats

    def cache_states(self, samples: Sequence[Sample]) -> None:
        self._pool.cache_states(samples, self.store)

    def head(self, name: str) -> torch.Tensor:
        return self._pool.head(name)

    def logit_cap(self, name: str) -> float | None:
        return self._pool.logit_cap(name)

    def costs(self) -> Mapping[str, float]:
        now = self._pool.stats
        spent, self._reported = now.since(self._reported), now
        return {f"teacher/{name}": float(value) for name, value in dataclasses.asdict(spent).items()}
