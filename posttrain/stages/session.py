"""What the stages of one run share: the recipe, the run directory and the rollout workers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from posttrain.config import Domain, Recipe
from posttrain.rollout.player import GroupJob, Play
from posttrain.runs.metrics import MetricsLog
from posttrain.runs.progress import Progress
from posttrain.runs.rundir import RunDir
from posttrain.types import Sampling, Task

if TYPE_CHECKING:
    import torch

    from posttrain.rollout.actors import RolloutService


@dataclass(slots=True)
class Session:
    """Live things of a run. The rollout workers start with the first stage that plays."""

    recipe: Recipe
    run: RunDir
    metrics: MetricsLog
    progress: Progress
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _service: RolloutService | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def base_path(self) -> str:
        from posttrain.models import resolve_path

        return resolve_path(self.recipe.model.path)

    @property
    def dtype(self) -> torch.dtype:
        """Compute type of every forward pass of the run, engine and learner alike."""
        from posttrain.models import compute_dtype_of

        return compute_dtype_of(self.base_path, self.recipe.model.dtype)

    @property
    def rollouts(self) -> RolloutService:
        if self._service is None:
            from posttrain.rollout.actors import RolloutService, WorkerSpec, ray_session

            self._stack.enter_context(ray_session(self.recipe.workers))
            spec = WorkerSpec(
                model_path=self.base_path,
                dtype=str(self.dtype).removeprefix("torch."),
                max_sequence_tokens=max(d.max_sequence_tokens for d in self.recipe.domains.values()),
                workers=self.recipe.workers,
                substrate=self.recipe.substrate,
            )
            self._service = self._stack.enter_context(RolloutService(spec))
        return self._service

    def send_checkpoint(self, path: str | Path, *, version: int = 0, judge: bool = False) -> None:
        """Load a checkpoint's weights into every rollout worker, as policy or as judge."""
        from posttrain.engine.weights import export_weights
        from posttrain.models import load_model

        model = load_model(str(path), self.dtype)
        weights = export_weights(dict(model.named_parameters()), self.dtype)
        send = self.rollouts.load_judge_weights if judge else self.rollouts.load_weights
        send(weights, version)

    def job(
        self, job_id: str, task: Task, *, num_rollouts: int, scored: bool = True, sampling: Sampling | None = None
    ) -> GroupJob:
        """A group of rollouts of a task, played and scored as its domain says."""
        domain = self.recipe.domains[task.domain]
        play = Play(
            environment=domain.environment,
            reward=domain.reward if scored else None,
            sampling=sampling or domain.sampling,
            max_sequence_tokens=domain.max_sequence_tokens,
        )
        return GroupJob(id=job_id, task=task, num_rollouts=num_rollouts, play=play, seed=self.recipe.seed)


def judged_by_policy(domains: Mapping[str, Domain]) -> bool:
    """Whether any of these domains' rewards asks the policy itself."""
    from posttrain.protocols import PolicyJudged

    return any(isinstance(domain.reward, PolicyJudged) for domain in domains.values())
