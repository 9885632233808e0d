"""The ports: what an engine, an environment, a sandbox, a reward, a judge and a teacher must do.

A part that satisfies one of these protocols plugs in without registration or base class. A noun in a recipe
(``Environment``, ``Substrate``, ``Reward``, ``Teacher``) is a frozen value that pickles; its verb makes the live
thing where it is used.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy.typing as npt

from posttrain.types import (
    AnyRollout,
    BoolArray,
    Completion,
    ExecResult,
    Group,
    IntArray,
    JudgeTask,
    Message,
    Observation,
    Request,
    Rollout,
    Sample,
    SandboxSpec,
    Score,
    Task,
    Tool,
    ToolCall,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from posttrain.rollout.clearing import ContextClearing


class ConversationFormat(Protocol):
    """Messages as token ids, and what was generated as text. A conversation grows as tokens: the encoded prompt, what
    the policy generated, the encoded observations, and so on; what was generated is never tokenised again."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an assistant turn."""
        ...

    @property
    def fingerprint(self) -> str:
        """Models with equal fingerprints read each other's tokens."""
        ...

    def at(self, effort: str | None) -> ConversationFormat:
        """The same format in an effort mode (``posttrain.conversation.effort``); None: in its default."""
        ...

    def encode_prompt(self, messages: Sequence[Message]) -> IntArray:
        """Tokens of a conversation with the generation prompt at its end, shape [T]. ``RecipeError`` for messages that
        the format has no place for."""
        ...

    def encode_observations(self, messages: Sequence[Message], *, after: Sequence[Message] = ()) -> IntArray:
        """Tokens between an assistant's end-of-turn token and its next turn, shape [T]; ``after`` is the conversation
        before them. ``RecipeError`` where nothing can be appended."""
        ...

    def forget(self, token_ids: IntArray, messages: Sequence[Message], *, after: Sequence[Message]) -> IntArray | None:
        """The tokens of the conversation ``after`` without what the format drops of it when these messages follow it;
        None where it drops nothing. A rollout goes on from them as from a new prompt."""
        ...

    def encode_demonstration(self, messages: Sequence[Message]) -> list[tuple[IntArray, BoolArray]]:
        """Token sequences to imitate, each with a mask that is True on what the assistant says, both [T]."""
        ...

    def decode(self, token_ids: IntArray | Sequence[int]) -> str:
        """Text of generated tokens, without the end of the turn."""
        ...

    def num_reasoning(self, token_ids: IntArray) -> int:
        """How many tokens of a generated turn are reasoning: those before the one that ends it, all where it is cut off
        before, none where the turn begins without."""
        ...


class Completer(Protocol):
    """Completes requests: an engine, or the way to one in another process."""

    async def generate(self, request: Request) -> Completion:
        """Complete one request. Many calls run concurrently and share forward passes.

        An engine with a journal goes on from what that holds of the request. Raises ``ValueError`` when the prompt
        leaves no room in the model's window. Cancelling the awaiting task frees the request's place.
        """
        ...

    def forget(self, prefix: str) -> None:
        """Requests with ids that start so are over and recorded elsewhere: what is kept of them may go."""
        ...


class Engine(Completer, Protocol):
    """Generates tokens for many requests at once."""

    @property
    def version(self) -> int:
        """Version of the weights that produce the next token."""
        ...

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Replace the weights between two decode steps. Tokens already generated keep their version.

        Requests in flight go on under the new weights, whose log-probabilities are those of a plain forward pass.
        """
        ...

    def close(self) -> None:
        """Stop generating and free the model. Pending requests fail with ``EngineStopped``."""
        ...


@runtime_checkable
class Sandbox(Protocol):
    """One box. Paths are relative to the workdir; absolute paths and ``..`` raise ``ValueError``."""

    async def exec(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        timeout_s: float | None = None,
        max_output: int = 1 << 20,
        env: Mapping[str, str] | None = None,
        cwd: str = ".",
        user: str | None = None,
    ) -> ExecResult:
        """Run argv, or a string through ``sh -c``. On return every process the command started is dead.

        ``cwd`` is relative to the workdir and reached without following links; ``FileNotFoundError`` and
        ``NotADirectoryError`` as for a file. A named ``user`` keeps its files from command to command, out of reach of
        every other user and of commands without one (``ValueError`` for ``root``, ``Unsupported`` where there are no
        users). Whatever the payload does is a result; a box that is gone raises ``SandboxLost``.
        """
        ...

    async def read(self, path: str, *, max_bytes: int = 1 << 20) -> bytes:
        """Content of a regular file. ``FileNotFoundError``, ``IsADirectoryError``; ``ValueError`` above the cap."""
        ...

    async def write(self, path: str, data: bytes) -> None:
        """Create or replace a file, atomically, with its parent directories."""
        ...

    async def list(self, path: str = ".") -> list[str]:
        """Names of the regular files below a directory, recursively, relative to the workdir, sorted."""
        ...


@runtime_checkable
class Substrate(Protocol):
    """A kind of box."""

    @property
    def name(self) -> str: ...

    def capabilities(self) -> Mapping[str, Any]:
        """What this kind guarantees: ``isolation``, ``network``, ``limits``, ``image`` and more."""
        ...

    def check(self) -> None:
        """Raise ``SandboxUnavailable``, saying what to install, if boxes cannot be opened here."""
        ...

    def open(self, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """A fresh box; leaving the context kills everything in it and removes it."""
        ...


@runtime_checkable
class KeepsBoxes(Substrate, Protocol):
    """A substrate whose boxes outlive the process that works in them, so that an interrupted rollout goes on."""

    def for_run(self, folder: Path) -> AbstractContextManager[KeepsBoxes]:
        """The same substrate for one run, which may keep its records in ``folder``; leaving removes all its boxes."""
        ...

    def open_for(self, attempt: str, spec: SandboxSpec) -> AbstractAsyncContextManager[Sandbox]:
        """The box of one attempt at a rollout: fresh, or the one it had when the process that played it died.

        In the latter the calls of the first player are repeated in their order and answered with what they gave then;
        the first call it did not make is the first that runs. ``SandboxError`` when a repeated call is another one, or
        when it cannot be known whether it happened. Leaving the context removes the box, the death of the process
        does not.
        """
        ...


class ToolSession(Protocol):
    """The tools of one episode, with what they remember from call to call."""

    async def call(self, call: ToolCall) -> Observation:
        """Run a tool. Whatever the model did wrong is an observation; what the machinery fails at raises."""
        ...


@runtime_checkable
class Tools(Protocol):
    """Tools that work in a box."""

    @property
    def definitions(self) -> Sequence[Tool]:
        """What the model may call."""
        ...

    def start(self, sandbox: Sandbox) -> ToolSession:
        """Tools in an open box, which belongs to the caller; what they leave running ends with it."""
        ...


class Episode(Protocol):
    """One rollout's live side of an environment."""

    async def respond(self, text: str) -> tuple[Message, ...] | None:
        """What the world answers to the policy's turn; None ends the episode."""
        ...

    async def artifacts(self) -> Mapping[str, bytes]:
        """Files to keep for grading, read when the episode is over."""
        ...


@runtime_checkable
class Environment(Protocol):
    """How a task is played."""

    @property
    def max_turns(self) -> int: ...

    def start(self, task: Task, sandbox: Sandbox | None) -> Episode | Awaitable[Episode]:
        """Begin an episode; a coroutine where that takes time. ``sandbox`` is open when the task asks for one, and
        closed by the caller.

        ``ValueError``, ``KeyError`` and the like say that the task or the environment is wrong: it is not tried again.
        """
        ...


@runtime_checkable
class ClearsContext(Environment, Protocol):
    """An environment whose episodes may forget a part of the conversation and go on."""

    @property
    def clearing(self) -> ContextClearing | None:
        """When and what; None: never."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Scores one rollout. Anything with this method is a reward."""

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        """Score a rollout. Raise when the machinery fails; the caller records it as unscored.

        ``sandbox`` is fresh and belongs to this rollout's grading alone. It is opened when the reward has a
        ``sandbox: SandboxSpec`` attribute that is not None.
        """
        ...


@runtime_checkable
class GroupReward(Protocol):
    """Scores all rollouts of a task together, for rewards that compare."""

    async def score_group(self, rollouts: Sequence[Rollout]) -> Sequence[Score]:
        """One score per rollout, in order."""
        ...


@runtime_checkable
class Ask(Protocol):
    """Puts one conversation to a model and returns its reply as text. ``UnreadableReply`` for one that was cut off."""

    async def __call__(self, messages: Sequence[Message], *, max_tokens: int, temperature: float, seed: int) -> str: ...


@runtime_checkable
class PolicyJudged(Protocol):
    """A reward, of one rollout or of a group, whose judge is the policy itself; the rollout worker lends it a lagged
    snapshot."""

    def with_policy(self, ask: Ask) -> Any:
        """The same reward, asking this policy snapshot."""
        ...


def asks_policy(reward: object) -> bool:
    """Whether a policy snapshot is to be lent to a reward: it takes one, and does not say, by an attribute
    ``asks_policy``, that it has no use for it."""
    return isinstance(reward, PolicyJudged) and bool(getattr(reward, "asks_policy", True))


@runtime_checkable
class Reloadable(Protocol):
    """A reward made from files that may be edited while a run uses it: an edit takes effect between two steps.

    A reward made of others has the files of all its parts; one without any is not reloadable in effect.
    """

    @property
    def files(self) -> Mapping[str, str]:
        """The texts in effect, by path."""
        ...

    def read_files(self) -> Mapping[str, str]:
        """The texts that the files hold now, by path. ``OSError`` for one that cannot be read."""
        ...

    def with_files(self, texts: Mapping[str, str]) -> Any:
        """The same reward with these texts in effect; files that are not named stay as they are.

        Raises ``RecipeError`` for a text that must not be used.
        """
        ...

    def check_task(self, task: Task) -> None:
        """Raise ``RecipeError`` when the texts in effect need something that this task does not have."""
        ...

    async def score_anchors(self) -> Mapping[str, tuple[float | None, ...]]:
        """By path, the values of fixed responses that are there to compare versions of the file with, in order."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Answers judge prompts."""

    async def ask(self, messages: Sequence[Message], *, max_tokens: int, seed: int) -> str:
        """The reply as text. Raises ``JudgeError`` when no reply can be had, ``UnreadableReply`` (one of its kinds)
        when there was one that must not be read, such as one cut off by its budget."""
        ...


@runtime_checkable
class JudgeTaskSource(Protocol):
    """Where judge prompts with known answers come from, for a policy that is trained as its own judge."""

    def from_rollout(self, rollout: AnyRollout, score: Score) -> Sequence[JudgeTask]:
        """Judge prompts about a rollout whose own score says what the right answers are; often none."""
        ...

    def anchors(self) -> Sequence[JudgeTask]:
        """Prompts whose answers people or code gave beforehand; the same ones every time."""
        ...


@runtime_checkable
class JudgeMonitor(Protocol):
    """Watches the judging of a policy that is trained as its own judge, on prompts that never change."""

    @property
    def samples(self) -> int:
        """Replies drawn for each form of each prompt."""
        ...

    @property
    def temperature(self) -> float:
        """That of the judge in use."""
        ...

    def tasks(self) -> Sequence[JudgeTask]:
        """The frozen prompts; never trained on."""
        ...

    def scores(self, groups: Sequence[Group]) -> Mapping[str, float]:
        """What each prompt's text got, by id; the first call's are kept to compare later ones with."""
        ...

    def measure(self, groups: Sequence[Group], start: Mapping[str, float]) -> Mapping[str, float]:
        """Metrics of the replies, one group per prompt. ``start``: the scores before training."""
        ...


@runtime_checkable
class TaskSource(Protocol):
    """Where tasks come from. Two splits that never share a task."""

    def train(self, *, seed: int) -> Iterable[Task]:
        """Tasks to learn from, in a seeded order; may be endless."""
        ...

    def heldout(self, *, count: int) -> Sequence[Task]:
        """Up to ``count`` tasks never trained on, the same ones every time."""
        ...

    def demonstrations(self, *, count: int, seed: int) -> Sequence[Demonstration]:
        """Conversations to imitate in SFT, on training tasks only. Empty where the domain has none."""
        ...


Demonstration = tuple[Message, ...]
"""A full conversation, prompt included; the loss is on the assistant's messages."""


class TeacherModel(Protocol):
    """A loaded teacher. It owns whatever lies between its last layer and its logits."""

    @property
    def head(self) -> torch.Tensor:
        """Output projection, [V, D_teacher], in the dtype the teacher computes with."""
        ...

    def hidden_states(self, sequences: Sequence[IntArray]) -> Sequence[torch.Tensor]:
        """The states that enter the head, one [T, D_teacher] tensor per sequence: after the final norm, and times the
        teacher's logit scale if it has one."""
        ...

    def close(self) -> None:
        """Free the weights."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """A frozen model to learn from."""

    @property
    def fingerprint(self) -> str:
        """Content hash: equal fingerprints mean equal logits."""
        ...

    def load(self, device: str) -> TeacherModel: ...


@runtime_checkable
class Playable(Protocol):
    """A teacher that is a checkpoint of its own, so that it can be measured beside its student."""

    @property
    def checkpoint(self) -> str: ...


class ArrayRef(Protocol):
    """The way to arrays that lie in a store; small, and may be pickled to other processes."""

    def load(self) -> Mapping[str, npt.NDArray[Any]]:
        """The arrays by name, read-only, without a copy where the store can. ``KeyError`` when they were freed."""
        ...

    def free(self) -> None:
        """Give their memory back, when nobody reads them any more. Freeing twice does nothing."""
        ...


class ArrayStore(Protocol):
    """Holds per-token arrays outside of what is shuffled and sent around.

    What is put into it lives until it is freed or the process that owns it has ended, however it ended.
    """

    def put(self, arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRef:
        """Keep a copy of the arrays. ``OSError`` (ENOSPC) when there is no room."""
        ...


class StateStore(Protocol):
    """Keeps hidden states between the teacher's forward pass and the learner's use of them."""

    def put(self, key: str, states: torch.Tensor, *, origin: str = "") -> None:
        """Keep one [L, D] bf16 tensor (loss positions only). A second put of a key replaces the first.

        ``origin`` says what they were computed from: equal texts mean equal states.
        """
        ...

    def holds(self, key: str, *, origin: str = "") -> bool:
        """Whether whole states of this origin are there, perhaps left by an earlier process."""
        ...

    def get(self, key: str) -> torch.Tensor:
        """The tensor, bit for bit. ``KeyError`` names a key that is not there."""
        ...

    def free(self, keys: Iterable[str]) -> None:
        """Forget what has been consumed; unknown keys are ignored."""
        ...


class OpenTeachers(Protocol):
    """All teachers of a merge, of which few are in memory at any time."""

    @property
    def store(self) -> StateStore:
        """Where the states of this step's samples are, by sample id."""
        ...

    def cache_states(self, samples: Sequence[Sample]) -> None:
        """Run each sample's teacher over it and store the states that predict its loss tokens.

        Teachers are visited one after another. A sample whose states are in the store already, from the same teacher
        and the same tokens, is not run again.
        """
        ...

    def costs(self) -> Mapping[str, float]:
        """What was spent since the last call: teacher and head loads, seconds waited, bytes cached."""
        ...

    def head(self, name: str) -> torch.Tensor:
        """The output projection of a teacher, [V, D_teacher]; at most one is on the device.

        Ask in the order of names, and the next one is read meanwhile.
        """
        ...

    def logit_cap(self, name: str) -> float | None:
        """c where a teacher's logits are ``c tanh(head @ state / c)``; None where they are head @ state."""
        ...


@runtime_checkable
class TeacherLibrary(Protocol):
    """Where teachers come from and how they are kept; a value in a recipe."""

    def from_checkpoint(self, path: str) -> Teacher:
        """A teacher from a checkpoint a stage has written."""
        ...

    def open(
        self,
        teachers: Mapping[str, Teacher],
        *,
        student_path: str,
        probes: Mapping[str, Sequence[IntArray]] | None,
        folder: Path | None = None,
    ) -> AbstractContextManager[OpenTeachers]:
        """Check every teacher against the student, then open them. Raises ``RecipeError``.

        ``probes`` are, by teacher, a few token sequences of its domain to check it on; None where another process has
        checked them. ``folder`` is where states may lie, for a later process that goes on from here.
        """
        ...
