"""Judge prompts among the generate prompts of a GRPO stage: the actor trained as its own judge.

A step plays ``groups_per_step`` judge prompts beside its generate prompts, and one update learns from both. Answers are
known: the score of a verifiable rollout of an earlier step says them, or a golden set, or a preference pair. A lagged
snapshot, never these weights, judges what is generated (``posttrain.stages.grpo.JudgeSnapshots``).

Everything drawn depends on the seed, the number of the job and the pool; the pool and what is under way lie in the
checkpoint, so a resumed run asks what an undisturbed one asks.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from posttrain.config import JudgeTraining
from posttrain.errors import RecipeError
from posttrain.protocols import asks_policy
from posttrain.rollout.arrays import free_groups
from posttrain.rollout.environments import SingleTurn
from posttrain.rollout.player import GroupJob, Play
from posttrain.rollout.samples import group_advantage_rows
from posttrain.rollout.stream import GroupStream
from posttrain.runs.rundir import StageDir
from posttrain.stages.session import Session
from posttrain.types import Group, JudgeTask, Message, Score, Task

SUFFIX = "-judge"
"""Added to a domain's name it names the domain of its judge prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a step learns about judging."""

    groups: Sequence[Group] = ()
    advantages: Sequence[list[float]] = ()
    """Per group and rollout; NaN where a rollout, or a whole group that teaches nothing, is left out."""
    metrics: dict[str, float] = field(default_factory=dict)


NO_JUDGING = Judged()


class Judging:
    """The judge prompts of one stage: draws them, settles what they earn, and measures the judge."""

    def __init__(self, session: Session, stage: StageDir, domain_name: str, saved: Mapping[str, Any] | None) -> None:
        self._session, self._stage = session, stage
        domain = session.recipe.domains[domain_name]
        assert domain.judge_training is not None
        assert domain.grpo is not None
        self._grpo = domain.grpo
        self._config: JudgeTraining = domain.judge_training
        self._domain = domain_name + SUFFIX
        sampling = replace(domain.sampling, max_tokens=self._config.max_tokens)
        window = min(domain.max_sequence_tokens, session.window)
        self._play = Play(
            environment=SingleTurn(), reward=self._config.reward, sampling=sampling, max_sequence_tokens=window
        )
        self._anchors = [self._named(task) for task in self._config.tasks.anchors()]
        self._pool = JudgePool(size=self._config.pool_size)
        self._drawn: dict[int, JudgeTask | None] = {}
        """By place; None where there was no prompt."""
        self._start: Mapping[str, float] | None = None
        self._empty = 0
        self._warned = False
        if saved is not None:
            self._restore(saved)

    @property
    def groups_per_step(self) -> int:
        """Judge prompts of a step."""
        return self._config.groups_per_step

    @property
    def asks_policy(self) -> bool:
        """Whether the reward of a judge reply asks the policy in its turn."""
        return asks_policy(self._config.reward)

    def job(self, number: int, job_id: str) -> GroupJob:
        """The judge prompt of a place in a step; the same one when it was drawn before the run was interrupted."""
        if number not in self._drawn:
            self._drawn[number] = self._draw(job_id)
            self._empty += self._drawn[number] is None
        task = self._drawn[number]
        return self._job(job_id, _NOBODY, num_rollouts=0) if task is None else self._job(job_id, task)

    def state(self, pending: Sequence[int]) -> dict[str, Any]:
        """What a checkpoint needs of this, as JSON; ``pending`` are the numbers of jobs under way."""
        self._drawn = {number: task for number, task in self._drawn.items() if number in pending}
        return {
            "pool": self._pool.state(),
            "drawn": {
                str(number): None if task is None else dataclasses.asdict(task) for number, task in self._drawn.items()
            },
            "empty": self._empty,
            "start": None if self._start is None else dict(self._start),
        }

    def settle(self, groups: Sequence[Group], step: int, stream: GroupStream) -> tuple[list[Group], Judged]:
        """Take a step's groups apart: those that generate, from which judge prompts are made, and those that judge.

        Both orders of a pair are credited together, and prompts that teach nothing are replaced.
        """
        generated = [group for group in groups if group.task.domain != self._domain]
        judged = [group for group in groups if group.task.domain == self._domain and group.rollouts]
        played = [credit_both_orders(group) for group in judged]
        for attempt in range(self._config.max_refills):
            missing = len(judged) - sum(map(is_informative, played))
            jobs = self._refill(f"{self._stage.name}/{step}/refill-{attempt}", missing)
            again = stream.play_aside(jobs) if jobs else {}
            played += [credit_both_orders(again[job.id]) for job in jobs]
        self._observe(generated)
        empty, self._empty = self._empty, 0
        metrics = judge_metrics(played) | {"length_correlation": length_correlation(generated)}
        metrics |= {"judge/empty_places": float(empty), "judge/refilled": float(len(played) - len(judged))}
        metrics |= {f"judge/pool_{label}": float(size) for label, size in self._pool.sizes().items()}
        return generated, Judged(groups=played, advantages=self._advantages(played), metrics=metrics)

    def log_start(self, stream: GroupStream) -> None:
        """Record, as step 0, how the judge does before it is trained."""
        metrics = self.measure(0, stream)
        if metrics:
            # An earlier process may have got as far as this.
            self._session.metrics.rewind(self._stage.name, -1)
            self._session.metrics.log(self._stage.name, 0, metrics)

    def measure(self, step: int, stream: GroupStream) -> dict[str, float]:
        """Metrics of the judge on the frozen set before step ``step``, where it is due; else none."""
        monitor = self._config.monitor
        due = step % self._config.monitor_steps == 0 or step == self._grpo.max_steps
        if monitor is None or not due:
            return {}
        play = replace(self._play, sampling=replace(self._play.sampling, temperature=monitor.temperature))
        jobs = []
        for index, task in enumerate(map(self._named, monitor.tasks())):
            # The same ids at every step, so that all steps draw the same random numbers.
            job = self._job(f"{self._stage.name}/monitor/{index}", task, monitor.samples * len(task.variants))
            jobs.append(replace(job, play=play, player=f"step-{step:06d}"))
        played = stream.play_aside(jobs)
        groups = [credit_both_orders(played[job.id]) for job in jobs]
        self._session.check_scored(self._stage, groups)
        if self._start is None:
            self._start = dict(monitor.scores(groups))
        metrics = monitor.measure(groups, self._start)
        free_groups(groups)
        self._warn_of_leniency(metrics, step)
        return {f"judge/frozen/{name}": value for name, value in metrics.items()}

    def _observe(self, groups: Iterable[Group]) -> None:
        """Make judge prompts of generated rollouts whose own scores give the answers."""
        for group in groups:
            for rollout, score in zip(group.rollouts, group.scores, strict=True):
                if not rollout.failed:
                    self._pool.add(map(self._named, self._config.tasks.from_rollout(rollout, score)))

    def _advantages(self, groups: Sequence[Group]) -> list[list[float]]:
        rows = group_advantage_rows(groups, self._grpo, min_group_size=self._session.recipe.workers.min_group_size)
        return [
            [value * self._config.weight if is_informative(group) else math.nan for value in row]
            for group, row in zip(groups, rows, strict=True)
        ]

    def _warn_of_leniency(self, metrics: Mapping[str, float], step: int) -> None:
        bias = metrics.get("bias", math.nan)
        if bias > self._config.max_bias and not self._warned:
            self._warned = True
            self._session.warn(
                f"{self._stage.name}: after step {step} the judge's mean score on the frozen set is {bias:.3f} above "
                f"the truth (judge_training.max_bias = {self._config.max_bias:g}); rewards it gives are too high."
            )

    def _refill(self, prefix: str, count: int) -> list[GroupJob]:
        drawn = [(job_id, self._draw(job_id)) for job_id in (f"{prefix}-{i}" for i in range(count))]
        return [self._job(job_id, task) for job_id, task in drawn if task is not None]

    def _draw(self, job_id: str) -> JudgeTask | None:
        rng = random.Random(f"{self._session.recipe.seed}/{job_id}")
        return self._pool.draw(
            rng, self._anchors, anchor_share=self._config.anchor_share, max_lead=self._config.groups_per_step
        )

    def _job(self, job_id: str, task: JudgeTask, num_rollouts: int | None = None) -> GroupJob:
        first = replace(task.variants[0], domain=self._domain)
        return GroupJob(
            id=job_id,
            task=first,
            num_rollouts=self._config.num_generations if num_rollouts is None else num_rollouts,
            play=self._play,
            seed=self._session.recipe.seed,
            variants=task.variants,
        )

    def _named(self, task: JudgeTask) -> JudgeTask:
        if self._config.num_generations % len(task.variants):
            raise RecipeError(
                f"judge_training.num_generations = {self._config.num_generations}: judge prompt {task.id!r} has "
                f"{len(task.variants)} presentation orders; expected a multiple of that"
            )
        return replace(task, variants=tuple(replace(form, domain=self._domain) for form in task.variants))

    def _restore(self, saved: Mapping[str, Any]) -> None:
        self._pool.restore(saved["pool"])
        self._drawn = {
            int(number): None if data is None else judge_task(data) for number, data in saved["drawn"].items()
        }
        self._empty = saved.get("empty", 0)
        self._start = saved["start"]


class JudgePool:
    """Judge prompts made of the run's own rollouts, the newest of each answer, and the balance of what was drawn."""

    def __init__(self, *, size: int) -> None:
        self._size = size
        self._waiting: dict[str, deque[JudgeTask]] = {}
        self._counts: Counter[str] = Counter()
        """Prompts drawn so far with each answer."""

    def add(self, tasks: Iterable[JudgeTask]) -> None:
        for task in tasks:
            if task.label is None:
                raise ValueError(f"judge prompt {task.id!r} from a rollout has no label; expected the known answer")
            waiting = self._waiting.setdefault(task.label, deque(maxlen=self._size))
            if all(task.id != other.id for other in waiting):
                waiting.append(task)

    def sizes(self) -> dict[str, int]:
        return {label: len(waiting) for label, waiting in sorted(self._waiting.items())}

    def draw(
        self, rng: random.Random, anchors: Sequence[JudgeTask], *, anchor_share: float, max_lead: int
    ) -> JudgeTask | None:
        """A prompt whose answer was drawn less often than others so far, or a pair, which balances itself.

        None when there is none, or when an answer would come to lead another one by more than ``max_lead`` prompts:
        what is left out is noticed, while a judge that learned the base rate is not.
        """
        pairs = [task for task in anchors if task.label is None]
        wants_anchor = bool(anchors) and rng.random() < anchor_share
        if pairs and wants_anchor and rng.random() < len(pairs) / len(anchors):
            return rng.choice(pairs)
        for label in self._rarest_first(anchors, max_lead):
            waiting = self._waiting.get(label) or deque()
            golden = [task for task in anchors if task.label == label]
            if golden and (wants_anchor or not waiting):
                task = rng.choice(golden)
            elif waiting:
                place = rng.randrange(len(waiting))
                task = waiting[place]
                del waiting[place]
            else:
                continue
            self._counts[label] += 1
            return task
        return rng.choice(pairs) if pairs else None

    def state(self) -> dict[str, Any]:
        tasks = [dataclasses.asdict(task) for waiting in self._waiting.values() for task in waiting]
        return {"tasks": tasks, "labels": list(self._waiting), "counts": dict(self._counts)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        for label in saved["labels"]:
            self._waiting[label] = deque(maxlen=self._size)
        self.add(map(judge_task, saved["tasks"]))
        self._counts = Counter(saved["counts"])

    def _rarest_first(self, anchors: Sequence[JudgeTask], max_lead: int) -> list[str]:
        """Answers that may be drawn now, the one drawn least often first."""
        known = {label for task in anchors for label in task.labels if task.label is not None}
        known |= {label for waiting in self._waiting.values() for task in waiting for label in task.labels}
        known |= self._counts.keys()
        least = min((self._counts[label] for label in known), default=0)
        allowed = [label for label in known if self._counts[label] - least < max_lead]
        return sorted(allowed, key=lambda label: (self._counts[label], label))


def judge_task(data: Mapping[str, Any]) -> JudgeTask:
    """The inverse of ``dataclasses.asdict``, also after a way through JSON."""
    variants = tuple(_task(form) for form in data["variants"])
    return JudgeTask(variants=variants, label=data["label"], labels=tuple(data["labels"]), source=data["source"])


def _task(data: Mapping[str, Any]) -> Task:
    prompt: tuple[Message, ...] = tuple(data["prompt"])
    return Task(
        id=data["id"],
        domain=data["domain"],
        prompt=prompt,
        answer=data["answer"],
        info=data["info"],
        effort=data.get("effort"),
    )


def credit_both_orders(group: Group) -> Group:
    """A reply to one presentation order earns only what its fellows in the other orders earn (J1, 2505.10320).

    Rollouts come order by order in turn; one without a score leaves its fellows unscored. A group with one order stays
    as it is.
    """
    forms = {rollout.task.id for rollout in group.rollouts}
    if len(forms) <= 1:
        return group
    scores: list[Score] = []
    for first in range(0, len(group.scores), len(forms)):
        fellows = group.scores[first : first + len(forms)]
        values = [score.value for score in fellows]
        unscored = next((score for score in fellows if score.value is None), None)
        for score in fellows:
            if unscored is not None and score.value is not None:
                error = f"the same pair in the other order has no score: {unscored.error or unscored.status.value}"
                scores.append(replace(score, value=None, status=unscored.status, error=error))
            elif score.value is None:
                scores.append(score)
            else:
                scores.append(replace(score, value=min(value for value in values if value is not None)))
    return replace(group, scores=tuple(scores))


def is_informative(group: Group) -> bool:
    """Whether the replies earn different rewards; where all are right or all wrong nothing is to be learned."""
    values = {score.value for score in group.scores if score.value is not None}
    return len(values) > 1


def length_correlation(groups: Sequence[Group]) -> float:
    """Pearson's r between reward and generated tokens over all scored rollouts; NaN where one of them is constant."""
    pairs = [
        (score.value, rollout.num_generated)
        for group in groups
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
        if score.value is not None
    ]
    rewards, lengths = np.array(pairs, np.float64).reshape(-1, 2).T
    if len(pairs) < 3 or not rewards.std() or not lengths.std():
        return math.nan
    return float(np.corrcoef(rewards, lengths)[0, 1])


def judge_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """How judge replies did: their reward by source and by right answer, and the groups that teach nothing."""
    values: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    for group in groups:
        earned = [score.value for score in group.scores if score.value is not None]
        counts["too_easy"] += bool(earned) and min(earned) >= 1.0
        counts["all_wrong"] += bool(earned) and max(earned) <= 0.0
        counts["unscored"] += len(group.scores) - len(earned)
        source = group.task.info.get("source", "unknown")
        names = ["reward", f"reward_{source}"]
        if source != "pair":
            # The answer to a pair depends on its order.
            names.append(f"reward_{group.task.answer}")
        for name in names:
            values.setdefault(name, []).extend(earned)
        flags = [float("unreadable" in score.flags) for score in group.scores]
        values.setdefault("unreadable", []).extend(flags)
    means = {f"judge/{name}": float(np.mean(found)) if found else math.nan for name, found in sorted(values.items())}
    totals = {f"judge/{name}": float(counts[name]) for name in ("too_easy", "all_wrong", "unscored")}
    return {"judge/groups": float(len(groups))} | totals | means


_NOBODY = JudgeTask(variants=(Task(id="nobody", domain="", prompt=()),), label=None)
"""Of a place in a step for which there was no prompt."""
