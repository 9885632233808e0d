"""One rollout, from prompt to reward, with its failures kept apart from the policy's.

Two boundaries catch ``Exception`` on purpose: whatever breaks around the policy becomes a recorded, unscored
rollout, so that one broken box or reward never ends a group or a run.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from posttrain.errors import JudgeError, SandboxError
from posttrain.protocols import (
    ClearsContext,
    Completer,
    ConversationFormat,
    Environment,
    Episode,
    KeepsBoxes,
    Reward,
    Sandbox,
    Substrate,
)
from posttrain.rollout.clearing import ContextClearing
from posttrain.tally import TALLY
from posttrain.types import (
    FinishReason,
    IntArray,
    Message,
    Request,
    Rollout,
    Sampling,
    SandboxSpec,
    Score,
    ScoreStatus,
    StopReason,
    Task,
    Turn,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What a rollout needs to let a model speak."""

    engine: Completer
    chat: ConversationFormat
    sampling: Sampling
    max_sequence_tokens: int
    seed: int
    player: str = ""
    """Whose rollout it is, where several models play under the same rollout ids."""

    def owner(self, rollout_id: str) -> str:
        """Prefix of the ids of a rollout's requests."""
        return f"{rollout_id}~{self.player}/" if self.player else f"{rollout_id}/"


DATA_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
)
"""What a task's data or an environment's code raises, and would raise again; anything else is the machinery's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """Opens sandboxes, never more at once than the machine is meant to bear."""

    substrate: Substrate | None
    limit: asyncio.Semaphore

    @contextlib.asynccontextmanager
    async def open(self, spec: SandboxSpec, *, attempt: str | None = None) -> AsyncIterator[Sandbox]:
        """A fresh box; for a named attempt at a rollout, the one it already has where the substrate keeps boxes."""
        if self.substrate is None:
            raise SandboxError("a sandbox is needed but the recipe has no substrate; set Recipe.substrate")
        async with self.limit:
            if attempt is not None and isinstance(self.substrate, KeepsBoxes):
                opening = self.substrate.open_for(attempt, spec)
            else:
                opening = self.substrate.open(spec)
            async with opening as box:
                yield box


class EpisodeClock:
    """The time an episode takes, which does not run while the model speaks: a deadline that long answers can pass would
    let the short ones through. An engine that does not answer is for those to notice who look after engines.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._timeout: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Cancel what is inside when the limit is passed; ``TimeoutError`` then."""
        async with asyncio.timeout(self.limit_s) as self._timeout:
            yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock."""
        loop = asyncio.get_running_loop()
        assert self._timeout is not None
        ends = self._timeout.when()
        left_s = self.limit_s if ends is None else ends - loop.time()
        self._timeout.reschedule(None)
        try:
            yield
        finally:
            if not self._timeout.expired():
                self._timeout.reschedule(loop.time() + left_s)

    @property
    def expired(self) -> bool:
        return self._timeout is not None and self._timeout.expired()

    def overdue_s(self) -> float:
        """Seconds since the limit was passed; negative before."""
        ends = None if self._timeout is None else self._timeout.when()
        return -math.inf if ends is None else asyncio.get_running_loop().time() - ends


@dataclass(slots=True)
class _Transcript:
    """What is known of a rollout so far; survives a failure in the middle."""

    prompt: tuple[Message, ...]
    turns: list[Turn] = field(default_factory=list)
    context_ids: IntArray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Tokens the next turn adds before the policy speaks."""
    restarts: bool = False
    """Whether they are a new prompt in place of what came before."""
    cleared: int = 0
    """Turns, the oldest, that a clearing has taken something of."""
    stop: StopReason = StopReason.FINISHED

    def sequence(self) -> IntArray:
        """What the policy sees next."""
        said: list[IntArray] = []
        for turn in self.turns if not self.restarts else ():
            said = [*([] if turn.restarts else said), turn.context_ids, turn.completion.token_ids]
        return np.concatenate([*said, self.context_ids]).astype(np.int32)

    def observe(self, observations: Sequence[Message], chat: ConversationFormat) -> None:
        """Make the next turn's context of what the world answered."""
        after = self.messages()
        self.context_ids, self.restarts = np.zeros(0, np.int32), False
        remembered = chat.forget(self.sequence(), observations, after=after)
        self.context_ids = chat.encode_observations(observations, after=after)
        if remembered is not None:
            self.context_ids, self.restarts = np.concatenate([remembered, self.context_ids]), True

    def clear(self, clearing: ContextClearing, chat: ConversationFormat, *, window: int) -> None:
        """Go on in a new sequence without the oldest of the conversation, if the window is nearly full."""
        for oldest in clearing.steps(len(self.turns)):
            size = len(self.sequence())
            if size < clearing.at * window or oldest <= self.cleared:
                continue
            context = clearing.context(self.prompt, self.turns, oldest, chat)
            if len(context) < size:
                TALLY.add("context/clearings")
                self.context_ids, self.restarts, self.cleared = context, True, oldest

    def messages(self) -> list[Message]:
        """The conversation up to what the policy said last."""
        said: list[Message] = []
        for turn in self.turns:
            said += [{"role": "assistant", "content": turn.text}, *turn.observations]
        return [*self.prompt, *said[: len(said) - len(self.turns[-1].observations)]]


async def run_rollout(
    rollout_id: str,
    task: Task,
    *,
    attempt: str,
    policy: Policy,
    environment: Environment,
    boxes: Boxes,
    clock: EpisodeClock,
) -> Rollout:
    """Play one task to its end. Never raises for what goes wrong inside; the rollout says so instead.

    ``attempt`` names this try at it: played again under the same name, after the process that played it died, it goes
    on in the box it had.
    """
    started = time.monotonic()
    transcript = _Transcript(prompt=task.prompt)
    artifacts: dict[str, bytes] = {}
    error: str | None = None
    try:
        async with clock.running(), contextlib.AsyncExitStack() as stack:
            box = None
            if task.sandbox is not None:
                box = await stack.enter_async_context(boxes.open(task.sandbox, attempt=attempt))
            starting = environment.start(task, box)
            episode = await starting if inspect.isawaitable(starting) else starting
            policy = replace(policy, chat=policy.chat.at(task.effort))
            transcript.context_ids = policy.chat.encode_prompt(task.prompt)
            clearing = environment.clearing if isinstance(environment, ClearsContext) else None
            while await _play_turn(rollout_id, transcript, policy, episode, clock, max_turns=environment.max_turns):
                if len(transcript.turns) == environment.max_turns:
                    transcript.stop = StopReason.TURNS
                    break
                if clearing is not None:
                    transcript.clear(clearing, policy.chat, window=policy.max_sequence_tokens)
            artifacts = dict(await episode.artifacts())
    except Exception as failure:  # noqa: BLE001 - the boundary named in the module's docstring
        if clock.expired:
            transcript.stop, error = StopReason.DEADLINE, f"episode passed its deadline of {clock.limit_s:g} s"
        else:
            transcript.stop = StopReason.INVALID if isinstance(failure, DATA_ERRORS) else StopReason.ERROR
            error = f"{type(failure).__name__}: {failure}"
    return Rollout(
        id=rollout_id,
        task=task,
        turns=tuple(transcript.turns),
        stop=transcript.stop,
        error=error,
        artifacts=artifacts,
        wall_s=time.monotonic() - started,
    )


async def _play_turn(
    rollout_id: str, transcript: _Transcript, policy: Policy, episode: Episode, clock: EpisodeClock, *, max_turns: int
) -> bool:
    """One policy call and the world's answer; False when the episode is over."""
    turn = len(transcript.turns)
    sequence = transcript.sequence()
    room = policy.max_sequence_tokens - len(sequence)
    if room < 1:
        if not transcript.turns:
            raise ValueError(
                f"the prompt has {len(sequence)} tokens but max_sequence_tokens is {policy.max_sequence_tokens}; "
                "raise Domain.max_sequence_tokens or shorten the prompt"
            )
        transcript.stop = StopReason.LENGTH
        return False
    request = Request(
        id=f"{policy.owner(rollout_id)}{turn}",
        prompt_ids=sequence,
        sampling=replace(policy.sampling, max_tokens=min(policy.sampling.max_tokens, room)),
        seed=policy.seed,
        stream=f"{rollout_id}/{turn}",
        continued=turn + 1 < max_turns,
    )
    with clock.paused():
        completion = await policy.engine.generate(request)
    text = policy.chat.decode(completion.token_ids)
    cut_off = completion.finish is FinishReason.LENGTH
    observations = None if cut_off else await episode.respond(text)
    transcript.turns.append(
        Turn(
            context_ids=transcript.context_ids,
            completion=completion.after(len(transcript.context_ids)),
            text=text,
            observations=observations or (),
            restarts=transcript.restarts,
        )
    )
    if cut_off:
        transcript.stop = StopReason.LENGTH
    if observations is None:
        return False
    transcript.observe(observations, policy.chat)
    return True


async def score_rollout(rollout: Rollout, *, reward: Reward, boxes: Boxes, deadline_s: float) -> Score:
    """The reward's verdict, or an unscored ``Score`` that says what failed. Never raises."""
    if rollout.failed:
        return Score(value=None, status=ScoreStatus.ROLLOUT_ERROR, error=rollout.error)
    clock = asyncio.timeout(deadline_s)
    try:
        async with clock, contextlib.AsyncExitStack() as stack:
            spec: SandboxSpec | None = getattr(reward, "sandbox", None)
            box = await stack.enter_async_context(boxes.open(spec)) if spec is not None else None
            return checked(await reward.score(rollout, box), reward)
    except SandboxError as failure:
        return unscored(ScoreStatus.SANDBOX_ERROR, f"{type(failure).__name__}: {failure}")
    except JudgeError as failure:
        return unscored(ScoreStatus.JUDGE_ERROR, str(failure))
    except Exception as failure:  # noqa: BLE001 - the boundary named in the module's docstring
        if clock.expired():
            return unscored(ScoreStatus.TIMEOUT, f"reward passed its deadline of {deadline_s:g} s")
        return unscored(ScoreStatus.REWARD_ERROR, f"{type(failure).__name__}: {failure}")


def checked(score: object, reward: object) -> Score:
    """A reward's answer with its value as a float, or unscored when it is not one that a step can compute with."""
    if isinstance(score, Score):
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            parts = {name: None if part is None else float(part) for name, part in score.parts.items()}
            if score.value is None or math.isfinite(score.value):
                return replace(score, value=None if score.value is None else float(score.value), parts=parts)
        found = f"Score.value = {score.value!r:.200}, parts = {score.parts!r:.200}"
    else:
        found = f"{score!r:.200}"
    return unscored(
        ScoreStatus.REWARD_ERROR,
        f"{type(reward).__name__} gave {found}: expected a Score whose value is a finite number, or None for a rollout "
        "that could not be scored, and whose parts are numbers or None; fix the reward",
    )


def unscored(status: ScoreStatus, error: str | None) -> Score:
    return Score(value=None, status=status, error=error)
