"""Plays many rollouts at once with one engine: the work of a rollout worker, without Ray.

All episodes of a call start in one tick of the event loop, in order, so that the engine admits them in order
and a single-turn step replays identically after a restart.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

from posttrain.config import Workers
from posttrain.errors import JudgeError, UnreadableReply
from posttrain.protocols import (
    Completer,
    ConversationFormat,
    Environment,
    GroupReward,
    PolicyJudged,
    Reloadable,
    Reward,
    Substrate,
    asks_policy,
)
from posttrain.rollout.episode import Boxes, EpisodeClock, Policy, checked, run_rollout, score_rollout, unscored
from posttrain.rollout.outcomes import Outcomes
from posttrain.types import (
    FinishReason,
    Group,
    Message,
    Request,
    Rollout,
    Route,
    Sampling,
    Score,
    ScoreStatus,
    StopReason,
    Task,
)

R = TypeVar("R", Reward, GroupReward, Reloadable)

GRACE_S = 5.0
"""How long an episode past its deadline may take to end; after that it is left behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """How the rollouts of one domain are played and scored."""

    environment: Environment
    reward: Reward | GroupReward | None
    """None plays without scoring (distillation needs no reward)."""
    sampling: Sampling
    max_sequence_tokens: int
    length_penalty: Reward | None = None
    """Added to what the reward gives; a rollout without the one is not given the other."""
    modes: Mapping[str | None, Play] = field(default_factory=dict)
    """By the task's effort, where that makes a difference."""

    def at(self, effort: str | None) -> Play:
        return self.modes.get(effort, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupJob:
    """One group wanted: ``num_rollouts`` attempts at one task."""

    id: str
    """Prefix of the rollout ids, unique within the run."""
    task: Task
    num_rollouts: int
    """0 gives a group without rollouts: a place in a step that nobody takes."""
    play: Play
    seed: int
    player: str = ""
    """Who plays, where several play under the same rollout ids so as to draw the same random numbers."""
    variants: tuple[Task, ...] = ()
    """Forms of the task that its rollouts play in turn; none: the task itself."""
    route: Route | None = None
    """Handed on to the group."""

    def form(self, rollout: int) -> Task:
        """What the rollout of this index plays."""
        return self.variants[rollout % len(self.variants)] if self.variants else self.task


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAsk:
    """Lets an engine answer judge prompts (``posttrain.protocols.Ask``); one cut off by its budget is unreadable."""

    engine: Completer
    chat: ConversationFormat

    async def __call__(self, messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int) -> str:
        prompt_ids = self.chat.encode_prompt(messages)
        name = hashlib.blake2b(prompt_ids.tobytes(), digest_size=8).hexdigest()
        request = Request(
            id=f"judge/{name}/{seed}",
            prompt_ids=prompt_ids,
            sampling=Sampling(temperature=temperature, max_tokens=max_tokens),
            seed=seed,
        )
        completion = await self.engine.generate(request)
        reply = self.chat.decode(completion.token_ids)
        if completion.finish is FinishReason.LENGTH:
            # The verdict that counts is the last one, and it may have been about to come.
            raise UnreadableReply(f"the judge's reply was cut off after {max_tokens} tokens", reply)
        return reply


@dataclass(slots=True)
class PlayCounters:
    """What went wrong around the policy, rollout by rollout."""

    retried_attempts: int = 0
    """Attempts given up for a reason that is not the policy's, and made again."""
    invalid_rollouts: int = 0
    """Rollouts whose task or environment is at fault: not tried again."""
    abandoned_episodes: int = 0
    """Episodes that did not end when they were told to, and were left behind."""
    resumed_rollouts: int = 0
    """Rollouts found finished in what an earlier process left."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the rollouts of one call share."""

    boxes: Boxes
    places: asyncio.Semaphore


class Player:
    """Turns jobs into groups. One failing rollout never ends its group, one failing reward never its run.

    With ``outcomes`` every finished rollout is recorded with its score before its tokens leave the engine's journal,
    and one that is found there is not played again.
    """

    def __init__(
        self,
        *,
        engine: Completer,
        judge_engine: Completer | None,
        chat: ConversationFormat,
        substrate: Substrate | None,
        workers: Workers,
        outcomes: Outcomes | None = None,
    ) -> None:
        self._engine = engine
        self._chat = chat
        self._ask = EngineAsk(engine=judge_engine, chat=chat) if judge_engine is not None else None
        self._workers = workers
        self._substrate = substrate
        self._outcomes = outcomes
        self._unkept: dict[str, tuple[Rollout, Score]] = {}
        self._disk = asyncio.Lock()
        self._left_behind: set[asyncio.Task[Any]] = set()
        self.counters = PlayCounters()

    async def play(self, jobs: Sequence[GroupJob]) -> list[Group]:
        """The groups of all jobs, in order."""
        groups = {index: group async for index, group in self.play_each(jobs)}
        return [groups[index] for index in range(len(jobs))]

    async def play_each(self, jobs: Sequence[GroupJob]) -> AsyncIterator[tuple[int, Group]]:
        """The groups of all jobs as they become complete, each with the index of its job."""
        stage = _Stage(
            boxes=Boxes(substrate=self._substrate, limit=asyncio.Semaphore(self._workers.max_concurrent_sandboxes)),
            places=asyncio.Semaphore(self._workers.max_concurrent_episodes),
        )
        tasks = [asyncio.create_task(self._play_group(index, job, stage)) for index, job in enumerate(jobs)]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def _play_group(self, index: int, job: GroupJob, stage: _Stage) -> tuple[int, Group]:
        scored = await asyncio.gather(*(self._rollout(job, i, stage) for i in range(job.num_rollouts)))
        rollouts = tuple(rollout for rollout, _ in scored)
        if isinstance(job.play.reward, GroupReward):
            given = await self._score_group(job.play.reward, rollouts)
            penalised = (self._penalised(job.play, r, s, stage.boxes) for r, s in zip(rollouts, given, strict=True))
            scores = tuple(await asyncio.gather(*penalised))
        else:
            scores = tuple(score for _, score in scored)
        return index, Group(task=job.task, rollouts=rollouts, scores=scores, route=job.route)

    async def _rollout(self, job: GroupJob, index: int, stage: _Stage) -> tuple[Rollout, Score]:
        """One rollout and its score, from the record if it is there."""
        rollout_id, task = f"{job.id}/{index}", job.form(index)
        play = job.play.at(task.effort)
        policy = Policy(
            engine=self._engine,
            chat=self._chat,
            sampling=play.sampling,
            max_sequence_tokens=play.max_sequence_tokens,
            seed=job.seed,
            player=job.player,
        )
        name = f"{rollout_id}~{job.player}" if job.player else rollout_id
        if self._outcomes is not None and (found := self._outcomes.get(name)) is not None:
            self.counters.resumed_rollouts += 1
            return found
        async with stage.places:
            rollout = await self._attempts(replace(job, task=task), rollout_id, policy, stage)
            score = await self._score(job.play.reward, rollout, stage.boxes)
            score = await self._penalised(play, rollout, score, stage.boxes)
        # What the machinery failed at is left out: it deserves another try when the run is resumed.
        worked = not rollout.failed and score.status in (ScoreStatus.OK, ScoreStatus.VETOED)
        if self._outcomes is not None and worked:
            await self._keep(self._outcomes, name, (rollout, score))
            self._engine.forget(policy.owner(rollout_id))
        return rollout, score

    async def _keep(self, outcomes: Outcomes, name: str, value: tuple[Rollout, Score]) -> None:
        """Return when it is on the disk, where all that finish in one tick, or while the disk is busy, go together."""
        self._unkept[name] = value
        await asyncio.sleep(0)
        async with self._disk:
            if name not in self._unkept:
                # Whoever had the disk before has taken it along.
                return
            batch, self._unkept = self._unkept, {}
            try:
                await asyncio.to_thread(outcomes.put, batch)
            except BaseException:
                # Each of them is to fail, or to be written by another.
                self._unkept = batch | self._unkept
                raise

    async def _attempts(self, job: GroupJob, rollout_id: str, policy: Policy, stage: _Stage) -> Rollout:
        """Play a rollout; machinery failures are tried again with the same random numbers, in a new box."""
        failures: tuple[str, ...] = ()
        for attempt in range(1 + self._workers.max_retries):
            clock = EpisodeClock(self._workers.episode_deadline_s)
            playing = run_rollout(
                rollout_id,
                job.task,
                attempt=f"{job.player}/{rollout_id}@{attempt}",
                policy=policy,
                environment=job.play.environment,
                boxes=stage.boxes,
                clock=clock,
            )
            rollout = await self._or_abandon(playing, clock, rollout_id, job.task)
            rollout = replace(rollout, failures=failures)
            if not rollout.failed:
                break
            if rollout.stop is StopReason.INVALID:
                self.counters.invalid_rollouts += 1
                break
            if attempt < self._workers.max_retries:
                self.counters.retried_attempts += 1
            failures = (*failures, str(rollout.error))
        return rollout

    async def _or_abandon(
        self, playing: Coroutine[Any, Any, Rollout], clock: EpisodeClock, rollout_id: str, task: Task
    ) -> Rollout:
        """The rollout, or a failed one in its place when an environment will not end even after its deadline."""
        episode = asyncio.create_task(playing)
        while not episode.done() and clock.overdue_s() < GRACE_S:
            try:
                await asyncio.wait({episode}, timeout=clock.limit_s + GRACE_S)
            except asyncio.CancelledError:
                episode.cancel()
                raise
        if episode.done():
            return episode.result()
        self.counters.abandoned_episodes += 1
        self._left_behind.add(episode)
        episode.add_done_callback(self._left_behind.discard)
        error = (
            f"the environment did not end {GRACE_S:g} s after its deadline of {clock.limit_s:g} s; it was left behind"
        )
        return Rollout(id=rollout_id, task=task, turns=(), stop=StopReason.DEADLINE, error=error)

    async def score_anchors(self, reward: Reloadable) -> Mapping[str, tuple[float | None, ...]]:
        """See ``Reloadable``; a reward that is judged by the policy is lent the snapshot."""
        async with asyncio.timeout(self._workers.reward_deadline_s):
            return await self._with_judge(reward).score_anchors()

    @property
    def left_behind(self) -> int:
        """Episodes that were given up and still hold their places and boxes."""
        return len(self._left_behind)

    async def _score(self, reward: Reward | GroupReward | None, rollout: Rollout, boxes: Boxes) -> Score:
        if reward is None or isinstance(reward, GroupReward):
            return unscored(ScoreStatus.ROLLOUT_ERROR, rollout.error) if rollout.failed else Score(value=None)
        try:
            reward = self._with_judge(reward)
        except JudgeError as failure:
            return unscored(ScoreStatus.JUDGE_ERROR, str(failure))
        return await score_rollout(rollout, reward=reward, boxes=boxes, deadline_s=self._workers.reward_deadline_s)

    async def _penalised(self, play: Play, rollout: Rollout, score: Score, boxes: Boxes) -> Score:
        """A score with the length penalty added."""
        if play.length_penalty is None or score.value is None:
            return score
        penalty = await self._score(play.length_penalty, rollout, boxes)
        if penalty.value is None:
            return penalty
        parts = {**score.parts, "length_penalty": penalty.value}
        explanation = f"{score.explanation} {penalty.explanation}".strip()
        return replace(score, value=score.value + penalty.value, parts=parts, explanation=explanation)

    def _with_judge(self, reward: R) -> R:
        """The same reward; one that is judged by the policy with the snapshot. ``JudgeError`` when there is none."""
        if not (isinstance(reward, PolicyJudged) and asks_policy(reward)):
            return reward
        if self._ask is None:
            raise JudgeError("the reward wants the policy as judge; none was loaded")
        return cast(R, reward.with_policy(self._ask))

    async def _score_group(self, reward: GroupReward, rollouts: Sequence[Rollout]) -> tuple[Score, ...]:
        """Scores for the rollouts that happened; the failed ones stay unscored and are not shown to the reward."""
        whole = [rollout for rollout in rollouts if not rollout.failed]
        try:
            reward = self._with_judge(reward)
            async with asyncio.timeout(self._workers.reward_deadline_s):
                given = [checked(score, reward) for score in await reward.score_group(whole)] if whole else []
            if len(given) != len(whole):
                raise ValueError(f"reward gave {len(given)} scores for {len(whole)} rollouts")
        except JudgeError as failure:
            given = [unscored(ScoreStatus.JUDGE_ERROR, str(failure))] * len(whole)
        except Exception as failure:  # noqa: BLE001 - a broken reward leaves the group unscored, not the run dead
            given = [unscored(ScoreStatus.REWARD_ERROR, f"{type(failure).__name__}: {failure}")] * len(whole)
        scores = iter(given)
        return tuple(
            unscored(ScoreStatus.ROLLOUT_ERROR, rollout.error) if rollout.failed else next(scores)
            for rollout in rollouts
        )
