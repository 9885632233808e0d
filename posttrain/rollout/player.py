"""Plays many rollouts at once with one engine: the work of a rollout worker, without Ray.

All episodes of a call start in one tick of the event loop, in order, so that the engine admits them in order
and a single-turn step replays identically after a restart.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from posttrain.config import Workers
from posttrain.conversation.chat import ChatFormat
from posttrain.protocols import Engine, Environment, GroupReward, PolicyJudged, Reward, Substrate
from posttrain.rollout.episode import Boxes, Policy, checked, run_rollout, score_rollout, unscored
from posttrain.types import Group, Message, Request, Rollout, Sampling, Score, ScoreStatus, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """How the rollouts of one domain are played and scored."""

    environment: Environment
    reward: Reward | GroupReward | None
    """None plays without scoring (distillation needs no reward)."""
    sampling: Sampling
    max_sequence_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupJob:
    """One group wanted: ``num_rollouts`` attempts at one task."""

    id: str
    """Prefix of the rollout ids, unique within the run."""
    task: Task
    num_rollouts: int
    play: Play
    seed: int
    player: str = ""
    """Who plays, where several play under the same rollout ids so as to draw the same random numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAsk:
    """Lets an engine answer judge prompts (``posttrain.protocols.Ask``)."""

    engine: Engine
    chat: ChatFormat

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
        return self.chat.decode(completion.token_ids)


class Player:
    """Turns jobs into groups. One failing rollout never ends its group, one failing reward never its run."""

    def __init__(
        self,
        *,
        engine: Engine,
        judge_engine: Engine | None,
        chat: ChatFormat,
        substrate: Substrate | None,
        workers: Workers,
    ) -> None:
        self._engine = engine
        self._chat = chat
        self._ask = EngineAsk(engine=judge_engine, chat=chat) if judge_engine is not None else None
        self._workers = workers
        self._substrate = substrate

    async def play(self, jobs: Sequence[GroupJob]) -> list[Group]:
        """The groups of all jobs, in order."""
        boxes = Boxes(substrate=self._substrate, limit=asyncio.Semaphore(self._workers.max_concurrent_sandboxes))
        places = asyncio.Semaphore(self._workers.max_concurrent_episodes)
        return list(await asyncio.gather(*(self._play_group(job, boxes, places) for job in jobs)))

    async def _play_group(self, job: GroupJob, boxes: Boxes, places: asyncio.Semaphore) -> Group:
        scored = await asyncio.gather(
            *(self._attempt(job, f"{job.id}/{i}", boxes, places) for i in range(job.num_rollouts))
        )
        rollouts = tuple(rollout for rollout, _ in scored)
        if isinstance(job.play.reward, GroupReward):
            return Group(task=job.task, rollouts=rollouts, scores=await self._score_group(job.play.reward, rollouts))
        return Group(task=job.task, rollouts=rollouts, scores=tuple(score for _, score in scored))

    async def _attempt(
        self, job: GroupJob, rollout_id: str, boxes: Boxes, places: asyncio.Semaphore
    ) -> tuple[Rollout, Score]:
        """One rollout and its score; machinery failures are tried again with the same random numbers, in a new box."""
        policy = Policy(
            engine=self._engine,
            chat=self._chat,
            sampling=job.play.sampling,
            max_sequence_tokens=job.play.max_sequence_tokens,
            seed=job.seed,
        )
        failures: tuple[str, ...] = ()
        async with places:
            for attempt in range(1 + self._workers.max_retries):
                rollout = await run_rollout(
                    rollout_id,
                    job.task,
                    attempt=f"{job.player}/{rollout_id}@{attempt}",
                    policy=policy,
                    environment=job.play.environment,
                    boxes=boxes,
                    deadline_s=self._workers.episode_deadline_s,
                )
                rollout = replace(rollout, failures=failures)
                if not rollout.failed:
                    break
                failures = (*failures, str(rollout.error))
            return rollout, await self._score(job.play.reward, rollout, boxes)

    async def _score(self, reward: Reward | GroupReward | None, rollout: Rollout, boxes: Boxes) -> Score:
        if reward is None or isinstance(reward, GroupReward):
            return unscored(ScoreStatus.ROLLOUT_ERROR, rollout.error) if rollout.failed else Score(value=None)
        if isinstance(reward, PolicyJudged):
            if self._ask is None:
                return unscored(ScoreStatus.JUDGE_ERROR, "the reward wants the policy as judge; none was loaded")
            reward = reward.with_policy(self._ask)
        return await score_rollout(rollout, reward=reward, boxes=boxes, deadline_s=self._workers.reward_deadline_s)

    async def _score_group(self, reward: GroupReward, rollouts: Sequence[Rollout]) -> tuple[Score, ...]:
        """Scores for the rollouts that happened; the failed ones stay unscored and are not shown to the reward."""
        whole = [rollout for rollout in rollouts if not rollout.failed]
        try:
            async with asyncio.timeout(self._workers.reward_deadline_s):
                given = [checked(score, reward) for score in await reward.score_group(whole)] if whole else []
            if len(given) != len(whole):
                raise ValueError(f"reward gave {len(given)} scores for {len(whole)} rollouts")
        except Exception as failure:  # noqa: BLE001 - a broken reward leaves the group unscored, not the run dead
            given = [unscored(ScoreStatus.REWARD_ERROR, f"{type(failure).__name__}: {failure}")] * len(whole)
        scores = iter(given)
        return tuple(
            unscored(ScoreStatus.ROLLOUT_ERROR, rollout.error) if rollout.failed else next(scores)
            for rollout in rollouts
        )
