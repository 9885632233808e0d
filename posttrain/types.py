"""The data that flows: tasks become rollouts, rollouts are scored in groups, samples reach the learner.

Everything here is a frozen value that pickles. Provenance rides on the object: a rollout carries its task,
a task its domain, a sample its teacher. Per-token data are NumPy arrays; torch appears only where it is
computed with, so that importing this module stays light.

Light and heavy: what the driver keeps of a rollout (``LightRollout``) and of a sample (``Sample``) has no per-token
arrays, only a ``Tokens``, which says what shuffling, packing, metrics and logs ask of them and where they are.

Shape letters: ``T`` tokens of one rollout or sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from posttrain import network

if TYPE_CHECKING:
    from posttrain.protocols import ArrayRef, ArrayStore

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
RouteArray = npt.NDArray[np.int16]

EMPTY: Mapping[str, Any] = MappingProxyType({})


class Message(TypedDict):
    """One message of a conversation, as plain JSON data in the form Hugging Face chat templates take.

    Roles: ``system``, ``user``, ``assistant`` and ``tool``; the V4 format also knows ``developer`` and
    ``latest_reminder``.
    """

    role: str
    content: str
    reasoning: NotRequired[str]
    tool_calls: NotRequired[Sequence[Mapping[str, Any]]]
    """What an assistant calls: ``{"id", "type": "function", "function": {"name", "arguments"}}``, the id optional."""
    tool_call_id: NotRequired[str]
    """Which call a ``tool`` message answers."""
    tools: NotRequired[Sequence[Mapping[str, Any]]]
    """What may be called, on the system or developer message: ``{"type": "function", "function": {"name",
    "description", "parameters"}}``."""
    response_format: NotRequired[Mapping[str, Any]]
    """JSON schema of the answers, on the system or developer message."""
    task: NotRequired[str]
    """A quick instruction that follows the message (``posttrain.conversation.v4_tokens.TASKS``)."""
    url: NotRequired[str]
    """The address that the quick instruction ``read_url`` asks about."""
    wo_eos: NotRequired[bool]
    """True: the assistant's message is not ended, and what is generated continues it."""
    mask: NotRequired[bool]
    """True: the assistant's message is context only, without loss in a demonstration."""
    effort: NotRequired[str]
    """On a demonstration's first message: the effort mode it is written in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSpec:
    """The box a task or a reward asks for. Limits are enforced by the substrate, not by the payload."""

    image: str = "default"
    workdir: str = "/work"
    cpus: float = 1.0
    memory_mb: int = 256
    disk_mb: int = 64
    """Size of the writable part; the root file system is read-only."""
    max_processes: int = 32
    timeout_s: float = 10.0
    """Wall-clock limit of one command unless the command names its own."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Files written below ``workdir`` before the first command: relative path -> content."""
    network: tuple[str, ...] = ()
    """What the box may reach, through an HTTP proxy on the host; empty: nothing. An entry is a ``host``, ``*.host`` or
    a block of addresses, with ``:port`` or for 80 and 443; see ``posttrain.network``."""

    def __post_init__(self) -> None:
        if not isinstance(self.network, str):
            # A log gives back lists.
            object.__setattr__(self, "network", tuple(self.network))
        network.parse(self.network, field="SandboxSpec.network")


class ExecStatus(StrEnum):
    """How a command ended. All of these are the payload's doing; a lost box raises ``SandboxLost``."""

    EXITED = "exited"
    SIGNALED = "signaled"
    TIMEOUT = "timeout"
    OUTPUT_LIMIT = "output_limit"
    OOM = "oom"
    PIDS_LIMIT = "pids_limit"
    DISK_FULL = "disk_full"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """What one command did. Partial output is always kept."""

    status: ExecStatus
    exit_code: int | None
    """Return code when ``status`` is EXITED; None otherwise."""
    signal: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    truncated_bytes: int = 0
    """Bytes of output beyond the cap that were thrown away, both streams together."""
    wall_s: float = 0.0
    cpu_s: float | None = None
    """User and system time of all its processes; None where it is not measured."""
    max_rss_bytes: int | None = None
    """Memory of its largest process, at least that of the forked agent (about 10 MB); None where not measured."""

    @property
    def ok(self) -> bool:
        return self.status is ExecStatus.EXITED and self.exit_code == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """What a model is told of one tool."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments, an object."""
    concurrent: bool = False
    """Whether calls of it may run at once: it changes nothing that another call could notice."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What a model asks for. Nothing about the arguments has been checked."""

    name: str
    arguments: Any
    id: str = ""
    """By which its result is matched to it, where the wire format or a data set names calls."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a model is told after a tool call."""

    text: str
    submitted: Mapping[str, bytes] | None = None
    """Files handed in for grading, by path, which ends the episode; None while it goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One problem with what is needed to grade it."""

    id: str
    domain: str
    prompt: tuple[Message, ...]
    answer: str | None = None
    sandbox: SandboxSpec | None = None
    """The box the rollout works in; None for tasks without tools."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """Grading data that only the domain's own reward reads, such as unit tests."""
    effort: str | None = None
    """How long to think: a mode of ``posttrain.conversation.effort``; None leaves it to the chat format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeTask:
    """A judge prompt whose right answer is known. Plain JSON data all through, so that it can wait in a checkpoint."""

    variants: tuple[Task, ...]
    """The prompt in each of its presentation orders; only one for a text that is judged by itself."""
    label: str | None
    """The right answer, by which prompts are balanced; None where the orders balance themselves."""
    labels: tuple[str, ...] = ()
    """All possible answers."""
    source: str = "golden"
    """Where the answer comes from: ``verified`` (the rollout's own score), ``golden`` or ``pair``."""

    @property
    def id(self) -> str:
        return self.variants[0].id


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn. ``temperature=0`` is greedy decoding."""

    temperature: float = 1.0
    top_p: float = 1.0
    """Keeps the smallest set of tokens whose mass reaches this."""
    top_k: int = 0
    min_p: float = 0.0
    """Keeps the tokens at least this share as likely as the likeliest (arXiv 2407.01082); 0 turns it off."""
    max_tokens: int = 256
    """Budget of one turn; a resumed request gets what was left, not the whole."""
    stop: tuple[str, ...] = ()
    """Strings that end a turn, besides the model's own end-of-turn tokens; the completion includes them."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a turn, besides the model's own."""

    def __post_init__(self) -> None:
        for name, value, valid, expected in (
            ("temperature", self.temperature, self.temperature >= 0, "a number >= 0 (0 is greedy)"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "a number in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "an integer >= 0 (0 turns it off)"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "a number in [0, 1] (0 turns it off)"),
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "an integer >= 1"),
            ("stop", self.stop, not isinstance(self.stop, str) and all(self.stop), "a tuple of strings, none empty"),
        ):
            if not valid:
                raise ValueError(f"Sampling.{name} = {value!r}: expected {expected}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens cannot be drawn although the model gives them mass."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0 or self.min_p > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptTokens:
    """What truncated sampling left to choose from, position by position: V3.2's sampling mask.

    The learner normalises over the same tokens, so that both sides have one action space. A position without entries
    was not truncated.
    """

    ids: IntArray
    """Token ids, position after position, shape [K]."""
    offsets: npt.NDArray[np.int64]
    """Where each position's ids begin, then K; shape [positions + 1]."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def at(self, position: int) -> IntArray:
        return self.ids[self.offsets[position] : self.offsets[position + 1]]

    @classmethod
    def of(cls, rows: Sequence[IntArray | None]) -> KeptTokens | None:
        """From one array (or None) per position; None when none was truncated."""
        if all(row is None for row in rows):
            return None
        parts = [np.zeros(0, np.int32) if row is None else row for row in rows]
        offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)
        return cls(ids=np.concatenate(parts).astype(np.int32), offsets=offsets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion wanted from an engine."""

    id: str
    """Unique within a run: the name under which its tokens are recorded."""
    prompt_ids: IntArray
    sampling: Sampling
    seed: int = 0
    stream: str = ""
    """With ``seed`` and the position it keys every random number drawn; empty: ``id``. Where several models are to
    draw the same numbers, their requests share it."""
    continued: bool = False
    """Whether another request is likely to begin with this one's prompt and completion; a hint to keep their states."""

    @property
    def numbers(self) -> str:
        """Names the random numbers drawn for it."""
        return self.stream or self.id


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine generated for one request. The three arrays have one entry per generated token."""

    request_id: str
    token_ids: IntArray
    """Includes the end-of-turn token when ``finish`` is STOP."""
    logprobs: FloatArray
    """Natural log-probability of each token under the distribution it was really drawn from (after
    temperature and truncation)."""
    versions: IntArray
    """Weight version that produced each token."""
    finish: FinishReason
    kept: KeptTokens | None = None
    """Where sampling was truncated, the tokens it chose from, one position per generated token."""
    routes: RouteArray | None = None
    """Where the engine records them, the experts [S, layers, experts per token] of the last S tokens of prompt and
    completion but for the very last: of the states that its tokens were drawn from. -1: unknown."""

    def after(self, size: int) -> Completion:
        """The same with routes only of its own tokens and the ``size`` before them, but for the last."""
        return self if self.routes is None else replace(self, routes=self.routes[-(size + len(self.token_ids)) :])


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One policy call and what the world answered.

    ``context_ids`` are the tokens added since the previous turn (the whole prompt on the first turn,
    the encoded observations and the generation prompt later), so concatenating context and completion
    over the turns gives exactly the sequence the policy saw, or several where a turn ``restarts``. Text is never
    re-tokenised.
    """

    context_ids: IntArray
    completion: Completion
    text: str
    """The decoded completion without its end-of-turn token."""
    observations: tuple[Message, ...] = ()
    restarts: bool = False
    """Whether ``context_ids`` is a whole new prompt in place of all that came before, such as one without the reasoning
    of earlier turns: then the policy saw nothing but it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenArrays:
    """The heavy half of a rollout or a sample: what is known of each of its T tokens. All arrays have shape [T]."""

    token_ids: IntArray
    loss_mask: BoolArray
    """True on the tokens that carry loss; a token at position 0 has no predecessor and cannot."""
    logprobs: FloatArray
    """Behaviour log-probabilities; read only where ``loss_mask`` is True."""
    versions: IntArray
    """Weight version of each generated token; read only where ``loss_mask`` is True."""
    kept: KeptTokens | None = None
    """Where sampling was truncated, the tokens it chose from, one position per token."""
    starts: IntArray | None = None
    """Of a rollout that began anew (``Turn.restarts``), where each of its sequences begins, 0 first, shape [sequences];
    tokens attend within their own. None: it is one sequence."""
    routes: RouteArray | None = None
    """[T, layers, experts per token]: the experts each token went to in a mixture of experts; -1: unknown."""

    def __post_init__(self) -> None:
        size = len(self.token_ids)
        for name in ("loss_mask", "logprobs", "versions", "kept", "routes"):
            value = getattr(self, name)
            if value is not None and len(value) != size:
                raise ValueError(
                    f"TokenArrays.{name} has {len(value)} entries for {size} tokens. A mask or log-probability "
                    "of the wrong length is never padded, since a shifted one trains on the wrong tokens; "
                    "fix the environment or engine that produced it"
                )
        starts = np.zeros(1, np.int32) if self.starts is None else self.starts
        if size and (starts[0] != 0 or np.any(np.diff(starts) < 1) or starts[-1] >= size):
            raise ValueError(f"TokenArrays.starts = {starts.tolist()} of {size} tokens: expected 0, rising, below that")
        if size and np.any(self.loss_mask[starts]):
            raise ValueError(
                "TokenArrays.loss_mask is True at position 0, but the first token has no context to be predicted "
                "from; give the prompt at least one token"
            )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        ends = [] if self.starts is None else self.starts[1:].tolist()
        return np.diff([0, *ends, len(self)]).tolist()

    @classmethod
    def unsampled(cls, token_ids: IntArray) -> TokenArrays:
        """Those of a text that no policy wrote: every token but the first carries loss, with log-probability 0."""
        size = len(token_ids)
        return cls(
            token_ids=np.asarray(token_ids, np.int32),
            loss_mask=np.arange(size) > 0,
            logprobs=np.zeros(size, np.float32),
            versions=np.zeros(size, np.int32),
        )

    def parts(self) -> dict[str, npt.NDArray[Any]]:
        """Plain arrays by name, for a store; ``of_parts`` is the inverse."""
        parts = {name: getattr(self, name) for name in ("token_ids", "loss_mask", "logprobs", "versions")}
        if self.kept is not None:
            parts |= {"kept_ids": self.kept.ids, "kept_offsets": self.kept.offsets}
        if self.starts is not None:
            parts["starts"] = self.starts
        if self.routes is not None:
            parts["routes"] = self.routes
        return parts

    @classmethod
    def of_parts(cls, parts: Mapping[str, npt.NDArray[Any]]) -> TokenArrays:
        plain = dict(parts)
        ids, offsets = plain.pop("kept_ids", None), plain.pop("kept_offsets", None)
        kept = None if ids is None or offsets is None else KeptTokens(ids=ids, offsets=offsets)
        return cls(**plain, kept=kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The light half: what is known of a sequence's tokens without reading them, and where they are."""

    num_tokens: int
    num_loss_tokens: int
    version_range: tuple[int, int] | None
    """Oldest and newest weight version of the tokens that carry loss; None where none does."""
    source: TokenArrays | ArrayRef | None
    """The arrays, or the way to them; None only while both travel apart (``posttrain.rollout.arrays``)."""

    @classmethod
    def of(cls, arrays: TokenArrays) -> Tokens:
        versions = arrays.versions[arrays.loss_mask]
        return cls(
            num_tokens=len(arrays),
            num_loss_tokens=len(versions),
            version_range=(int(versions.min()), int(versions.max())) if len(versions) else None,
            source=arrays,
        )

    def load(self) -> TokenArrays:
        """The arrays, read-only where they come out of a store. ``KeyError`` when they were freed."""
        if self.source is None:
            raise KeyError(f"the arrays of these {self.num_tokens} tokens are elsewhere; attach their references first")
        return self.source if isinstance(self.source, TokenArrays) else TokenArrays.of_parts(self.source.load())

    def put_in(self, store: ArrayStore) -> Tokens:
        """The same with its arrays in ``store``."""
        return replace(self, source=store.put(self.load().parts()))

    def free(self) -> None:
        """Let a store forget the arrays, for all who hold this reference; arrays held directly stay."""
        if self.source is not None and not isinstance(self.source, TokenArrays):
            self.source.free()


class StopReason(StrEnum):
    FINISHED = "finished"
    """The policy ended the episode."""
    LENGTH = "length"
    """A turn, or the conversation, ran out of tokens."""
    TURNS = "turns"
    """The turn limit of the environment was reached."""
    DEADLINE = "deadline"
    """The episode's wall-clock deadline passed: a machinery failure, never scored."""
    ERROR = "error"
    """Something other than the policy failed: a machinery failure, never scored."""
    INVALID = "invalid"
    """The task's data or its environment's code is at fault: never scored, and not tried again."""


FAILURES = (StopReason.ERROR, StopReason.DEADLINE, StopReason.INVALID)


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One attempt at a task, as its environment and its reward see it. ``light`` is what others need of it."""

    id: str
    task: Task
    turns: tuple[Turn, ...]
    stop: StopReason
    error: str | None = None
    artifacts: Mapping[str, bytes] = field(default_factory=dict)
    """Files the environment took out of the sandbox at the end, by path, for grading elsewhere."""
    wall_s: float = 0.0
    failures: tuple[str, ...] = ()
    """Why earlier attempts at it were given up, oldest first: what the machinery did, never the policy."""

    def __getstate__(self) -> dict[str, Any]:
        # Without what was computed from the turns: a pickled rollout has each token once.
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def text(self) -> str:
        """The last thing the policy said."""
        return self.turns[-1].text if self.turns else ""

    @property
    def failed(self) -> bool:
        """True when something other than the policy failed, so that no reward may be given."""
        return self.stop in FAILURES

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation after the prompt: what the policy said and what the world answered."""
        said: list[Message] = []
        for turn in self.turns:
            said += [{"role": "assistant", "content": turn.text}, *turn.observations]
        return tuple(said)

    @cached_property
    def token_ids(self) -> IntArray:
        """All tokens in the order the policy saw them, shape [T]."""
        return self._join([(t.context_ids, t.completion.token_ids) for t in self.turns], np.int32)

    @cached_property
    def loss_mask(self) -> BoolArray:
        """True on the tokens the policy generated, shape [T]."""
        return self._join(
            [(np.zeros(len(t.context_ids)), np.ones(len(t.completion.token_ids))) for t in self.turns], np.bool_
        )

    @cached_property
    def logprobs(self) -> FloatArray:
        """Behaviour log-probabilities, NaN where ``loss_mask`` is False, shape [T]."""
        return self._join(
            [(np.full(len(t.context_ids), np.nan), t.completion.logprobs) for t in self.turns], np.float32
        )

    @cached_property
    def versions(self) -> IntArray:
        """Weight version of each generated token, -1 where ``loss_mask`` is False, shape [T]."""
        return self._join([(np.full(len(t.context_ids), -1), t.completion.versions) for t in self.turns], np.int32)

    @cached_property
    def kept(self) -> KeptTokens | None:
        """What truncated sampling chose from, one position per token, empty where ``loss_mask`` is False or nothing was
        truncated; None where that is everywhere."""
        if all(turn.completion.kept is None for turn in self.turns):
            return None
        rows: list[IntArray | None] = []
        for turn in self.turns:
            rows += [None] * len(turn.context_ids)
            kept = turn.completion.kept
            rows += [None if kept is None else kept.at(i) for i in range(len(turn.completion.token_ids))]
        return KeptTokens.of(rows)

    @cached_property
    def routes(self) -> RouteArray | None:
        """The experts each token went to, [T, layers, experts per token], -1 where that is not known; None where it is
        known of no token."""
        known = [turn.completion.routes for turn in self.turns]
        like = next((each for each in known if each is not None), None)
        if like is None:
            return None
        routes = np.full((len(self.token_ids), *like.shape[1:]), -1, np.int16)
        stop = -1
        for turn, found in zip(self.turns, known, strict=True):
            stop += len(turn.context_ids) + len(turn.completion.token_ids)
            if found is not None:
                routes[stop - len(found) : stop] = found
        return routes

    @property
    def starts(self) -> IntArray | None:
        """Where the sequences of a rollout begin that began anew; None where it is one."""
        if not any(turn.restarts for turn in self.turns):
            return None
        ends = np.cumsum([0, *(len(t.context_ids) + len(t.completion.token_ids) for t in self.turns)])
        return np.array([0, *(end for end, t in zip(ends, self.turns, strict=False) if t.restarts)], np.int32)

    @property
    def num_generated(self) -> int:
        return sum(len(t.completion.token_ids) for t in self.turns)

    @property
    def num_turns(self) -> int:
        return len(self.turns)

    @cached_property
    def tokens(self) -> Tokens:
        """The per-token arrays, held directly. ``ValueError`` when an engine's arrays do not fit together."""
        try:
            arrays = TokenArrays(
                token_ids=self.token_ids,
                loss_mask=self.loss_mask,
                logprobs=self.logprobs,
                versions=self.versions,
                kept=self.kept,
                starts=self.starts,
                routes=self.routes,
            )
        except ValueError as error:
            raise ValueError(f"Rollout {self.id!r}: {error}") from error
        return Tokens.of(arrays)

    def light(self) -> LightRollout:
        """This rollout without its arrays, which travel apart: the ``source`` of its tokens is None."""
        return LightRollout(
            id=self.id,
            task=self.task,
            messages=self.messages,
            num_turns=self.num_turns,
            stop=self.stop,
            error=self.error,
            wall_s=self.wall_s,
            failures=self.failures,
            tokens=replace(self.tokens, source=None),
        )

    @staticmethod
    def _join(pairs: list[tuple[npt.NDArray[Any], npt.NDArray[Any]]], dtype: Any) -> npt.NDArray[Any]:
        parts = [part for pair in pairs for part in pair]
        return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class LightRollout:
    """What the driver keeps of a rollout: samples, metrics and the log are made of it. Fields as in ``Rollout``."""

    id: str
    task: Task
    messages: tuple[Message, ...]
    """The conversation after the prompt."""
    num_turns: int
    stop: StopReason
    tokens: Tokens
    error: str | None = None
    wall_s: float = 0.0
    failures: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The last thing the policy said."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "assistant"), "")

    @property
    def failed(self) -> bool:
        """True when something other than the policy failed, so that no reward may be given."""
        return self.stop in FAILURES

    @property
    def num_generated(self) -> int:
        return self.tokens.num_loss_tokens


AnyRollout = Rollout | LightRollout


class ScoreStatus(StrEnum):
    """Why a score is what it is. Everything but OK and VETOED comes with ``value=None``."""

    OK = "ok"
    VETOED = "vetoed"
    ROLLOUT_ERROR = "rollout_error"
    REWARD_ERROR = "reward_error"
    SANDBOX_ERROR = "sandbox_error"
    JUDGE_ERROR = "judge_error"
    PARSE_ERROR = "parse_error"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgment:
    """One answer of a judge about one criterion."""

    criterion: str
    verdict: str
    """``met``, ``unmet``, ``cannot_assess``, or one of the criterion's choices."""
    score: float | None
    evidence: str = ""
    reply: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A reward's verdict on a rollout. ``value=None`` means it could not be scored, which is not zero."""

    value: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    status: ScoreStatus = ScoreStatus.OK
    error: str | None = None
    judgments: tuple[Judgment, ...] = ()
    rubric_version: str | None = None
    flags: tuple[str, ...] = ()
    explanation: str = ""
    """One sentence for the person who reads the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Whom a rollout is distilled from; decided when it is asked for, since both may change while it is played."""

    teacher: str
    """Name of the teacher."""
    weight: float = 1.0
    """Its weight w_i in the OPD objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one task with their scores, index by index."""

    task: Task
    rollouts: tuple[AnyRollout, ...]
    """Whole where they were played, light where their group has gone to."""
    scores: tuple[Score, ...]
    route: Route | None = None
    """Of a distillation."""

    def __post_init__(self) -> None:
        if len(self.rollouts) != len(self.scores):
            raise ValueError(
                f"Group of task {self.task.id!r}: {len(self.rollouts)} rollouts but {len(self.scores)} scores; "
                "every rollout needs exactly one score"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStart:
    """What the policy at the start of a step says of a sample's loss tokens, in order."""

    logprobs: FloatArray
    """[L], as the learner computes them."""
    high_entropy: BoolArray
    """[L]: where the policy loss acts (``GRPO.top_entropy_quantile``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One token sequence for the learner, light: only ``load`` touches its arrays."""

    id: str
    task_id: str
    domain: str
    tokens: Tokens
    advantage: float = 0.0
    teacher: str | None = None
    """Name of the teacher this sample is distilled from (OPD)."""
    weight: float = 1.0
    """The teacher's weight w_i in the OPD objective."""
    truncated: bool = False
    silent: bool = False
    """Counts as a sample of its mini-batch although none of its tokens carries loss."""
    start: StepStart | None = None
    """Where a term of the loss compares with the policy at the start of the step."""

    def __len__(self) -> int:
        return self.tokens.num_tokens

    @property
    def num_loss_tokens(self) -> int:
        return 0 if self.silent else self.tokens.num_loss_tokens

    def load(self) -> TokenArrays:
        """Its arrays. ``KeyError`` when they were freed."""
        arrays = self.tokens.load()
        return replace(arrays, loss_mask=np.zeros_like(arrays.loss_mask)) if self.silent else arrays
