"""Engines and rollout workers as Ray actors.

An engine actor holds the model and the journal; a rollout worker runs episodes, sandboxes and rewards, and asks its
engine for every turn. They die apart: a worker whose engine is gone waits for the next one under the same name and asks
again, and a worker that died leaves its requests running, to be found by their ids. Weights travel as NumPy arrays
through Ray's object store: one copy a node, mapped by every actor on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from posttrain.config import Workers
from posttrain.engine.file_journal import FileJournal
from posttrain.engine.journal import Journal
from posttrain.errors import EngineStopped
from posttrain.protocols import Reloadable, Substrate
from posttrain.rollout.arrays import split
from posttrain.rollout.outcomes import Outcomes
from posttrain.rollout.player import GroupJob
from posttrain.tally import TALLY
from posttrain.types import Completion, Request

logger = logging.getLogger(__name__)

Weights = Mapping[str, np.ndarray]

SMALL_BYTES = 64 << 10
"""Arrays of a rollout up to this size travel with it."""

RETRY_S = 0.2
"""Pause between two attempts to reach an engine that is being replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """What actors are built from."""

    model_path: str
    """Gives architecture and tokenizer; the weights that count are sent by the driver."""
    dtype: str
    max_length: int
    """Window of the engine: prompt and completion together."""
    workers: Workers
    substrate: Substrate | None
    truncates: bool = False
    """Whether any sampling is truncated, so that engines which have to be told keep what it chose from."""
    keep_routing: bool = False
    """Whether engines say which experts tokens go to, where the model has experts."""
    folder: Path | None = None
    """Where journals and finished rollouts are kept; None keeps nothing. Actors on several nodes must all see it."""

    @property
    def outcomes(self) -> Path | None:
        return None if self.folder is None else self.folder / "outcomes"


class EngineActor:
    """One engine for the policy, and a second one for judging once a judge snapshot was sent.

    One that takes another's place draws nothing before it was sent the weights that the other had.
    """

    def __init__(self, spec: WorkerSpec, index: int, *, awaits_weights: bool) -> None:
        import torch

        from posttrain.conversation.formats import open_format
        from posttrain.models import load_tokenizer

        torch.set_num_threads(spec.workers.threads_per_actor or os.cpu_count() or 1)
        self._spec, self._index = spec, index
        self._chat = open_format(load_tokenizer(spec.model_path))
        self._engines: dict[bool, Any] = {False: self._new_engine(judge=False)}
        self._loaded = {False: asyncio.Event(), True: asyncio.Event()}
        if not awaits_weights:
            self._loaded[False].set()
        self._loading = asyncio.Lock()
        self._number = {False: 0, True: 0}
        self._restored = 0
        self._answering: dict[str, asyncio.Task[Any]] = {}

    async def load_weights(self, weights: Weights, version: int, judge: bool, number: int) -> None:
        """Replace the weights of the policy's or the judge's engine; requests wait until there were some.

        ``number`` counts what was sent to all engines. Calls may arrive in any order, such as those that wait for an
        engine to start: weights with a lower number than those in place are left out.
        """
        from posttrain.engine.weights import import_weights

        async with self._loading:
            if number <= self._number[judge]:
                return
            if judge not in self._engines:
                self._engines[judge] = await asyncio.to_thread(self._new_engine, judge=judge)
            engine = self._engines[judge]
            await asyncio.to_thread(engine.load_weights, import_weights(weights), version)
            self._number[judge] = number
            if not judge and self._states is not None and self._states.exists():
                self._restored += await asyncio.to_thread(engine.restore, self._states)
                self._states.unlink()
            self._loaded[judge].set()

    async def generate(self, requests: Sequence[Request], judge: bool = False) -> AsyncIterator[list[tuple[str, Any]]]:
        """The requests' completions, or the errors they ended with, by id; those that finish together in one list."""
        await self._loaded[judge].wait()
        tasks = [asyncio.create_task(self._answer(request, judge)) for request in requests]
        self._answering.update({request.id: task for request, task in zip(requests, tasks, strict=True)})
        while tasks:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finished = [task for task in tasks if task.done()]
            tasks = [task for task in tasks if not task.done()]
            yield [task.result() for task in finished]

    async def cancel(self, request_ids: Sequence[str]) -> None:
        """Nobody waits for these any more."""
        for request_id in request_ids:
            task = self._answering.get(request_id)
            if task is not None:
                task.cancel()

    async def forget(self, prefixes: Sequence[str]) -> None:
        """See ``Engine.forget``."""
        for prefix in prefixes:
            self._engines[False].forget(prefix)

    async def preempt(self) -> None:
        """Stop, and leave the states of unfinished requests to the next engine under this name."""
        if self._states is not None and self._loaded[False].is_set():
            await asyncio.to_thread(self._engines[False].preempt, self._states)

    async def counters(self) -> dict[str, float]:
        """What the policy's engine has done since it was made. Answered at once by an engine that lives."""
        return self._engines[False].counters() | {"restored_sequences": self._restored}

    async def _answer(self, request: Request, judge: bool) -> tuple[str, Completion | Exception]:
        try:
            return request.id, await self._engines[judge].generate(request)
        except asyncio.CancelledError:
            return request.id, RuntimeError("the request was cancelled")
        except Exception as error:  # noqa: BLE001 - an error belongs to its request alone, not to those that came along
            return request.id, error
        finally:
            self._answering.pop(request.id, None)

    def _text_of(self, token_ids: Sequence[int]) -> str:
        # With special tokens, so that a stop string may name one.
        return str(self._chat.tokenizer.decode(list(token_ids)))

    @property
    def _states(self) -> Path | None:
        return None if self._spec.folder is None else self._spec.folder / f"states-{self._index}"

    def _new_engine(self, *, judge: bool) -> Any:
        import torch

        from posttrain.engine.transformers_engine import TransformersEngine
        from posttrain.models import load_model

        journal = None
        if self._spec.folder is not None and not judge:
            journal = FileJournal(self._spec.folder / "tokens", writer=f"engine-{self._index}")
        if self._spec.workers.engine == "vllm":
            return self._new_vllm_engine(journal, judge=judge)
        model = load_model(self._spec.model_path, getattr(torch, self._spec.dtype))
        if torch.cuda.is_available():
            model = torch.nn.Module.cuda(model)
        return TransformersEngine(
            model,
            stop_ids=self._chat.stop_ids,
            decode=self._text_of,
            max_batch_size=self._spec.workers.max_batch_size,
            max_batch_tokens=self._spec.workers.max_batch_tokens,
            max_length=self._spec.max_length,
            keep_routing=self._spec.keep_routing and not judge,
            journal=journal,
        )

    def _new_vllm_engine(self, journal: Journal | None, *, judge: bool) -> Any:
        from posttrain.engine.vllm_engine import VllmEngine

        workers = self._spec.workers
        return VllmEngine(
            self._spec.model_path,
            stop_ids=self._chat.stop_ids,
            dtype=self._spec.dtype,
            decode=self._text_of,
            max_batch_size=workers.max_batch_size,
            max_length=self._spec.max_length,
            kept_tokens=self._spec.truncates and not judge,
            tensor_parallel_size=max(1, int(workers.gpus_per_actor)),
            options=workers.engine_options,
            journal=journal,
        )


class RemoteEngine:
    """An engine in another actor, found by name, so that it may be replaced while requests wait for it.

    Implements ``posttrain.protocols.Completer``. Requests of one tick of the event loop travel together and
    join the engine's batch together. One that is asked for again while it is being answered is answered once, to all:
    a judge's questions about equal responses are equal.
    """

    def __init__(self, name: str, *, judge: bool = False) -> None:
        self._name, self._judge = name, judge
        self._outgoing: list[tuple[Request, asyncio.Future[Completion]]] = []
        self._asked: dict[str, asyncio.Future[Completion]] = {}
        self._askers: Counter[str] = Counter()
        self._forgotten: list[str] = []
        self._sending: set[asyncio.Task[None]] = set()
        self.lost = 0
        """How often an engine was gone before it had answered."""

    async def generate(self, request: Request) -> Completion:
        future = self._asked.get(request.id)
        if future is None:
            future = self._asked[request.id] = self._ask_for(request)
        self._askers[request.id] += 1
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if self._askers[request.id] == 1 and not future.done():
                future.cancel()
                with contextlib.suppress(RayError, ValueError):
                    self._actor().cancel.remote([request.id])
            raise
        finally:
            self._askers[request.id] -= 1
            if not self._askers[request.id]:
                del self._askers[request.id], self._asked[request.id]

    def _ask_for(self, request: Request) -> asyncio.Future[Completion]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Completion] = loop.create_future()
        if not self._outgoing:
            loop.call_soon(self._send)
        self._outgoing.append((request, future))
        return future

    def forget(self, prefix: str) -> None:
        if not self._forgotten:
            asyncio.get_running_loop().call_soon(self._send_forgotten)
        self._forgotten.append(prefix)

    def _actor(self) -> Any:
        return ray.get_actor(self._name)

    def _send(self) -> None:
        batch, self._outgoing = self._outgoing, []
        task = asyncio.get_running_loop().create_task(self._deliver(batch))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    def _send_forgotten(self) -> None:
        prefixes, self._forgotten = self._forgotten, []
        # An engine that is gone has nothing in memory; what its journal holds is outdated and harmless.
        with contextlib.suppress(RayError, ValueError):
            self._actor().forget.remote(prefixes)

    async def _deliver(self, batch: Sequence[tuple[Request, asyncio.Future[Completion]]]) -> None:
        waiting = {request.id: (request, future) for request, future in batch}
        while waiting := {name: pair for name, pair in waiting.items() if not pair[1].done()}:
            # A name that is not there is free until the next engine takes it.
            with contextlib.suppress(RayError, ValueError):
                await self._ask(waiting)
            if not all(future.done() for _, future in waiting.values()):
                self.lost += 1
                logger.warning("engine %s is gone; its requests are asked again", self._name)
                await asyncio.sleep(RETRY_S)

    async def _ask(self, waiting: Mapping[str, tuple[Request, asyncio.Future[Completion]]]) -> None:
        stream = (
            self._actor()
            .generate.options(num_returns="streaming")
            .remote([request for request, _ in waiting.values()], self._judge)
        )
        async for reference in stream:
            for name, answer in await reference:
                future = waiting[name][1]
                if future.done() or isinstance(answer, EngineStopped):
                    # An engine that stopped is replaced by the driver; its journal has what was drawn.
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)


class RolloutWorker:
    """Plays jobs with an engine in another actor."""

    def __init__(self, spec: WorkerSpec, engine: str) -> None:
        from posttrain.conversation.formats import open_format
        from posttrain.models import load_tokenizer
        from posttrain.rollout.player import Player

        self._engine = RemoteEngine(engine)
        self._player = Player(
            engine=self._engine,
            judge_engine=RemoteEngine(engine, judge=True),
            chat=open_format(load_tokenizer(spec.model_path)),
            substrate=spec.substrate,
            workers=spec.workers,
            outcomes=None if spec.outcomes is None else Outcomes(spec.outcomes),
        )

    async def play(self, jobs: Sequence[GroupJob]) -> AsyncIterator[Any]:
        """The groups of all jobs as they become complete, light: each as the index of its job, the group, and how many
        objects follow, which are the arrays of those of its rollouts that have none.

        They are returned and not put into the object store, where they would die with this worker
        (``posttrain.rollout.ray_store``). Small arrays, which would not lie in shared memory, come with their group.
        """
        async for index, group in self._player.play_each(jobs):
            light, arrays = split(group, small=SMALL_BYTES)
            yield index, light, len(arrays)
            for each in arrays:
                yield each

    async def score_anchors(self, reward: Reloadable) -> Mapping[str, tuple[float | None, ...]]:
        """See ``Player.score_anchors``."""
        return await self._player.score_anchors(reward)

    async def counters(self) -> dict[str, float]:
        """What went wrong around the policy since the worker was made. Answered at once by a worker that lives."""
        counts = {name: float(count) for name, count in asdict(self._player.counters).items()}
        counts |= {"engine_losses": float(self._engine.lost), "left_behind": float(self._player.left_behind)}
        return counts | TALLY.sums()
