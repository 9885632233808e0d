"""What the stages of one run share: the recipe, the run directory, the rollout workers, the learner."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from posttrain.config import GRPO, Distill, Domain, Recipe
from posttrain.conversation.formats import open_format
from posttrain.engine.weights import export_weights
from posttrain.errors import Preempted, RecipeError
from posttrain.learner.checkpoint import latest_checkpoint
from posttrain.learner.group import AnyLearner, LearnerSpec, open_learner
from posttrain.models import base_path, compute_dtype, context_window, load_model, load_tokenizer
from posttrain.preemption import PREEMPTION
from posttrain.protocols import ConversationFormat, GroupReward, KeepsBoxes, Reward, asks_policy
from posttrain.rollout.player import GroupJob, Play
from posttrain.rollout.stream import Groups, GroupStream
from posttrain.runs.metrics import MetricsLog
from posttrain.runs.progress import Progress
from posttrain.runs.rollout_log import RolloutLog
from posttrain.runs.rundir import EventKind, RunDir, StageDir
from posttrain.types import AnyRollout, Group, Route, Sampling, ScoreStatus, Task

if TYPE_CHECKING:
    import torch

    from posttrain.rollout.service import RolloutService


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a stage goes on."""

    step: int
    pending: tuple[int, ...] = ()
    """Numbers of the jobs that were started before and not learned from."""
    kept: Mapping[str, Any] | None = None
    """What else the stage kept, such as the judge prompts that are trained on."""
    refilled: Mapping[str, int] = field(default_factory=dict)
    """``GroupStream.refilled``."""


StateOf = Callable[[Sequence[int]], Mapping[str, Any]]
"""What else a checkpoint keeps, as JSON, given the numbers of the jobs under way."""


@dataclass(kw_only=True)
class Session:
    """Live things of a run. The rollout workers start with the first stage that plays."""

    recipe: Recipe
    run: RunDir
    metrics: MetricsLog
    progress: Progress
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _warned: set[str] = field(default_factory=set)
    _rewards: dict[str, Reward | GroupReward] = field(default_factory=dict)
    """By domain, where it is no longer the recipe's own."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    @cached_property
    def base_path(self) -> str:
        return base_path(self.recipe.model)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Compute type of every forward pass of the run, engine and learner alike."""
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        num_parameters = load_model(self.base_path, torch.bfloat16).num_parameters()
        return compute_dtype(self.recipe.model.dtype, num_parameters, device)

    @cached_property
    def window(self) -> int:
        """Tokens the model itself can attend to."""
        return context_window(self.base_path)

    @cached_property
    def rollouts(self) -> RolloutService:
        from posttrain.rollout.actors import WorkerSpec
        from posttrain.rollout.service import RolloutService, ray_session

        self._stack.enter_context(ray_session(self.recipe.workers))
        substrate = self.recipe.substrate
        if isinstance(substrate, KeepsBoxes):
            # Entered before the workers, so that these are gone when their boxes are removed.
            substrate = self._stack.enter_context(substrate.for_run(self.run.boxes))
        spec = WorkerSpec(
            model_path=self.base_path,
            dtype=str(self.dtype).removeprefix("torch."),
            max_length=max(
                domain.window_at(effort)
                for domain in self.recipe.domains.values()
                for effort in (None, *domain.efforts)
            ),
            workers=self.recipe.workers,
            substrate=substrate,
            truncates=any(
                domain.sampling_at(effort).truncates
                for domain in self.recipe.domains.values()
                for effort in (None, *domain.efforts)
            ),
            keep_routing=any(grpo.keep_routing for grpo in self.recipe.grpo_settings()),
            folder=self.run.rollouts,
        )
        return self._stack.enter_context(RolloutService(spec))

    def send_checkpoint(self, path: str | Path, *, version: int = 0, judge: bool = False) -> None:
        """Load a checkpoint's weights into every rollout worker, as policy or as judge."""
        weights = export_weights(load_model(str(path), self.dtype).named_parameters(), self.dtype)
        send = self.rollouts.load_judge_weights if judge else self.rollouts.load_weights
        send(weights, version)

    def send_policy(self, learner: AnyLearner, *, version: int) -> None:
        """Give the workers the learner's weights of this moment."""
        self.rollouts.load_weights(export_weights(learner.weights(self.dtype).items(), self.dtype), version)

    def job(
        self,
        job_id: str,
        task: Task,
        *,
        num_rollouts: int,
        scored: bool = True,
        greedy: bool = False,
        player: str = "",
        route: Route | None = None,
    ) -> GroupJob:
        """A group of rollouts of a task, played and scored as its domain says."""
        domain = self.recipe.domains[task.domain]
        plays = {mode: self._play(domain, task, mode, scored=scored, greedy=greedy) for mode in domain.modes_of(task)}
        if len(plays) > num_rollouts > 0:
            chosen = domain.draw_mode(task, random.Random(f"{self.recipe.seed}/{job_id}"))
            plays = {chosen: plays[chosen]}
        forms = tuple(replace(task, effort=mode) for mode in plays)
        return GroupJob(
            id=job_id,
            task=forms[0] if len(forms) == 1 else task,
            num_rollouts=num_rollouts,
            play=replace(next(iter(plays.values())), modes=plays if len(plays) > 1 else {}),
            variants=forms if len(forms) > 1 else (),
            seed=self.recipe.seed,
            player=player,
            route=route,
        )

    def _play(self, domain: Domain, task: Task, mode: str | None, *, scored: bool, greedy: bool) -> Play:
        effort, sampling = domain.efforts.get(mode or ""), domain.sampling_at(mode)
        return Play(
            environment=domain.environment,
            reward=self.reward(task.domain) if scored else None,
            sampling=_greedy(sampling) if greedy else sampling,
            max_sequence_tokens=min(domain.window_at(mode), self.window),
            length_penalty=None if effort is None or not scored else effort.length_penalty,
        )

    def thinking_tokens(self, group: Group) -> list[float]:
        """How many tokens of reasoning each rollout of a group generated; NaN for a failed one."""
        return [math.nan if rollout.failed else float(self._thinking_tokens(rollout)) for rollout in group.rollouts]

    def _thinking_tokens(self, rollout: AnyRollout) -> int:
        arrays, chat = rollout.tokens.load(), self._chat.at(rollout.task.effort)
        edges = np.flatnonzero(np.diff(arrays.loss_mask)) + 1
        parts = zip(np.split(arrays.token_ids, edges), np.split(arrays.loss_mask, edges), strict=True)
        return sum(chat.num_reasoning(ids) for ids, generated in parts if len(ids) and generated[0])

    @cached_property
    def _chat(self) -> ConversationFormat:
        return open_format(load_tokenizer(self.base_path))

    def reward(self, domain: str) -> Reward | GroupReward:
        """The domain's reward, with its files as they were last taken up."""
        return self._rewards.get(domain, self.recipe.domains[domain].reward)

    def use_reward(self, domain: str, reward: Reward | GroupReward) -> None:
        """Score the rollouts of all jobs made from now on with another version of the domain's reward."""
        self._rewards[domain] = reward

    def warn(self, message: str) -> None:
        """Put something the reader of the report should know into the report."""
        self.run.log_event(EventKind.WARNING, message=message)

    def check_scored(self, stage: StageDir, groups: Sequence[Group]) -> None:
        """Warn, once a stage, of rollouts that the machinery failed.

        Raises ``RecipeError`` when it failed all of them: what breaks every rollout is the recipe's or the machine's
        fault, and a stage that went on would end untrained or unmeasured, with nothing to show it.
        """
        scores = [score for group in groups for score in group.scores]
        # An OK without a value was not asked for one.
        failures = [score for score in scores if score.value is None and score.status is not ScoreStatus.OK]
        if not failures:
            return
        first = failures[0].error or failures[0].status.value
        found = f"{stage.name}: {len(failures)} of {len(scores)} rollouts failed or could not be scored, first: {first}"
        if len(failures) == len(scores):
            raise RecipeError(f"{found}; mend that and go on with --resume, nothing before this step is lost")
        if stage.name not in self._warned:
            self._warned.add(stage.name)
            self.warn(f"{found[:500]}. More in the stage's rollouts.jsonl.")

    def judged_by_policy(self, domain: str) -> bool:
        """Whether this domain's reward asks the policy itself."""
        return asks_policy(self.recipe.domains[domain].reward)

    def open_stream(
        self, jobs: Iterator[tuple[int, GroupJob]], groups_per_step: int, max_staleness: int
    ) -> GroupStream:
        """The groups of a stage's jobs, step by step."""
        return GroupStream(
            service=self.rollouts,
            jobs=jobs,
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            workers=self.recipe.workers,
            on_pause=self.warn,
        )

    def save_checkpoint(
        self, learner: AnyLearner, stage: StageDir, next_step: int, stream: Groups, state: StateOf | None = None
    ) -> None:
        """Save a learner and its position in the data; records of rollouts it will not need again go."""
        pending = stream.pending()
        place: dict[str, Any] = {"next_step": next_step, "pending": pending}
        if state is not None:
            place["kept"] = state(pending)
        if isinstance(stream, GroupStream):
            place["refilled"] = dict(stream.refilled)
        learner.save_checkpoint(stage.checkpoints, place)
        oldest = pending[0] // stream.groups_per_step if pending else next_step
        self.rollouts.forget(stage.name, before_step=oldest)

    @contextlib.contextmanager
    def waiting(
        self, learner: AnyLearner, stage: StageDir, step: int, stream: Groups, state: StateOf | None = None
    ) -> Iterator[None]:
        """Where SIGTERM ends the run: between two updates, before ``step``, with a checkpoint of that place."""
        try:
            PREEMPTION.check()
            yield
        except Preempted:
            self.save_checkpoint(learner, stage, step, stream, state)
            raise

    def open_learner(self, stage: StageDir, start: str, config: GRPO | Distill) -> tuple[AnyLearner, Position]:
        """A learner at ``start`` and step 0, or as the stage's newest checkpoint left it and where it goes on.

        What was logged after that checkpoint is forgotten, so that the record equals an uninterrupted run's.
        """
        import torch

        updates = config.num_iterations * config.minibatches_per_step if isinstance(config, GRPO) else 1
        spec = LearnerSpec(
            load_model=partial(load_model, start, torch.float32),
            optim=config.optim,
            num_steps=config.max_steps * updates,
            tokens_per_micro_batch=config.tokens_per_micro_batch,
            dtype=self.dtype,
            lora=self.recipe.model.lora,
            keep_reference=config.beta > 0,
            keep_routing=isinstance(config, GRPO) and config.keep_routing,
            seed=self.recipe.seed,
        )
        learner = open_learner(spec, self.recipe.workers.num_learners)
        self._stack.callback(learner.close)
        checkpoint = latest_checkpoint(stage.checkpoints)
        saved: dict[str, Any] = learner.load_checkpoint(checkpoint) if checkpoint else {"next_step": 0, "pending": []}
        position = Position(
            step=saved["next_step"],
            pending=tuple(saved["pending"]),
            kept=saved.get("kept"),
            refilled=saved.get("refilled", {}),
        )
        RolloutLog(stage).rewind(position.step - 1)
        self.begin(stage, position.step)
        return learner, position

    def begin(self, stage: StageDir, step: int) -> None:
        """Record that a stage starts, or goes on after ``step`` steps; later metrics are forgotten."""
        kinds = {event["kind"] for event in self.run.read_events() if event.get("stage") == stage.name}
        if EventKind.STAGE_STARTED in kinds:
            self.run.log_event(EventKind.RESUMED, stage=stage.name, step=step)
            self.metrics.rewind(stage.name, step)
        else:
            self.run.log_event(EventKind.STAGE_STARTED, stage=stage.name)

    def save_final(self, learner: AnyLearner, directory: Path) -> Path:
        """A plain checkpoint of the learner's weights, in the compute type."""
        learner.save_final(directory, load_tokenizer(self.base_path))
        return directory


def _greedy(sampling: Sampling) -> Sampling:
    return replace(sampling, temperature=0.0)


def finals(session: Session, kind: str) -> Mapping[str, str]:
    """Final checkpoint of every finished stage of one kind: domain -> ``sft``, or specialist -> ``grpo``."""
    names = {**session.recipe.domains, **session.recipe.specialties()}
    stages = {name: session.run.stage(f"{kind}-{name}") for name in names}
    return {name: str(stage.final) for name, stage in stages.items() if stage.done is not None}
