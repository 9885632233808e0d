"""The embedded engine: continuous batching over a Hugging Face causal language model, in one background thread."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from posttrain.engine.decode_batch import DecodeBatch, Generation
from posttrain.types import Completion, Request


@dataclass(slots=True, eq=False)
class _Job:
    generation: Generation
    loop: asyncio.AbstractEventLoop
    result: asyncio.Future[Completion]
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class _Update:
    weights: Mapping[str, torch.Tensor]
    version: int
    done: Future[None]


class TransformersEngine:
    """Implements ``posttrain.protocols.Engine``.

    ``model`` is taken over: it is set to evaluation, loses its gradients, and lives on the device it is on. Keep
    the learner's copy apart. Full attention in every layer is needed (Llama, Qwen, SmolLM2 and their like).
    ``stop_ids`` end a completion. ``max_length`` is the window, prompt and completion together; None takes the
    model's own, and a longer one is cut to it.

    Order: requests join in the order in which they were submitted. Those submitted in one tick of the event loop,
    such as by ``asyncio.gather``, join in the same decode step as far as rows are free. The numbers drawn for a
    request depend on its seed, id and positions alone; only rounding in the last bits depends on what shares the
    batch. So the same requests, submitted together to an idle engine, give the same completions.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        stop_ids: Sequence[int],
        max_batch_size: int = 64,
        max_length: int | None = None,
        version: int = 0,
    ) -> None:
        _check_full_attention(model)
        config = model.config.get_text_config()
        self._max_batch_size = max_batch_size
        self._max_length = min(max_length or config.max_position_embeddings, config.max_position_embeddings)
        self._vocabulary = config.vocab_size
        self._version = version
        self._wake = threading.Condition()
        # Everything below is guarded by ``_wake``.
        self._arriving: list[_Job] = []
        self._waiting: deque[_Job] = deque()
        self._running: dict[Generation, _Job] = {}
        self._updates: deque[_Update] = deque()
        self._stopped: str | None = None
        self._cause: BaseException | None = None
        # The thread alone holds the model, so that its end frees it.
        batch = DecodeBatch(model, stop_ids=stop_ids, max_length=self._max_length, version=version)
        self._thread = threading.Thread(target=self._run, args=(batch,), name="engine", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_length(self) -> int:
        """The window: most tokens of a prompt and its completion together."""
        return self._max_length

    async def generate(self, request: Request) -> Completion:
        """See ``Engine.generate``. The budget is cut to what the window has left.

        Raises ``ValueError`` for a prompt that is empty, fills the window or holds ids outside the vocabulary,
        and ``RuntimeError`` when the engine is closed or its decoding failed.
        """
        self._check(request)
        room = min(request.sampling.max_tokens, self._max_length - len(request.prompt_ids))
        loop = asyncio.get_running_loop()
        job = _Job(Generation(request, room), loop, loop.create_future())
        with self._wake:
            self._raise_if_stopped()
            self._arriving.append(job)
        # Runs after all that is ready in this tick, so the requests of one tick join together.
        loop.call_soon(self._let_in)
        try:
            return await job.result
        finally:
            job.cancelled = True

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """See ``Engine.load_weights``. Returns when the weights are in place; ``ValueError`` if they do not fit."""
        update = _Update(weights, version, Future())
        with self._wake:
            self._raise_if_stopped()
            self._updates.append(update)
            self._wake.notify()
        update.done.result()

    def close(self) -> None:
        """See ``Engine.close``. Closing twice is allowed."""
        with self._wake:
            self._stopped = self._stopped or "it was closed"
            self._wake.notify()
        self._thread.join()

    def _check(self, request: Request) -> None:
        ids = request.prompt_ids
        if not 0 < len(ids) < self._max_length:
            raise ValueError(
                f"request {request.id!r}: prompt of {len(ids)} tokens in a window of {self._max_length}; expected at "
                f"least 1 and at most {self._max_length - 1}; shorten the prompt or raise the window"
            )
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise ValueError(
                f"request {request.id!r}: token ids from {ids.min()} to {ids.max()}; expected 0 to "
                f"{self._vocabulary - 1}; encode the prompt with this model's tokenizer"
            )

    def _raise_if_stopped(self) -> None:
        if self._stopped is not None:
            raise self._stop_error()

    def _stop_error(self) -> RuntimeError:
        error = RuntimeError(f"the engine stopped: {self._stopped}")
        error.__cause__ = self._cause
        return error

    def _let_in(self) -> None:
        with self._wake:
            if self._arriving:
                self._waiting += self._arriving
                self._arriving.clear()
                self._wake.notify()

    def _run(self, batch: DecodeBatch) -> None:
        try:
            with torch.inference_mode():
                while self._turn(batch):
                    pass
        except BaseException as error:  # noqa: BLE001 - whatever ended the loop must reach those who wait for it
            self._cause = error
            with self._wake:
                self._stopped = f"decoding failed with {type(error).__name__}: {error}"
        self._fail_pending()

    def _turn(self, batch: DecodeBatch) -> bool:
        """Weights, leavers, newcomers, one decode step. False when the engine is to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopped or self._updates or self._waiting or batch.rows)
            if self._stopped:
                return False
        self._apply_updates(batch)
        batch.remove(lambda row: self._running[row].cancelled)
        batch.admit(self._next_jobs(batch))
        if batch.rows:
            self._deliver(batch.step())
        return True

    def _apply_updates(self, batch: DecodeBatch) -> None:
        while self._updates:
            update = self._updates.popleft()
            try:
                batch.load_weights(update.weights, update.version)
            except BaseException as error:
                update.done.set_exception(error)
                if isinstance(error, ValueError):
                    continue
                # Some weights may have been replaced and others not.
                raise
            self._version = update.version
            update.done.set_result(None)

    def _next_jobs(self, batch: DecodeBatch) -> list[Generation]:
        with self._wake:
            self._running = {row: self._running[row] for row in batch.rows}
            chosen: list[Generation] = []
            while self._waiting and len(batch.rows) + len(chosen) < self._max_batch_size:
                job = self._waiting.popleft()
                if not job.cancelled:
                    self._running[job.generation] = job
                    chosen.append(job.generation)
            return chosen

    def _deliver(self, finished: Iterable[Generation]) -> None:
        # One callback per loop, so that completions of one step are also resumed in one tick, in row order.
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Job, Completion]]] = {}
        with self._wake:
            for generation in finished:
                job = self._running.pop(generation)
                by_loop.setdefault(job.loop, []).append((job, generation.completion()))
        for loop, results in by_loop.items():
            _call(loop, _resolve, results)

    def _fail_pending(self) -> None:
        with self._wake:
            jobs = [*self._running.values(), *self._waiting, *self._arriving]
            updates = list(self._updates)
            for pending in (self._running, self._waiting, self._arriving, self._updates):
                pending.clear()
        for update in updates:
            update.done.set_exception(self._stop_error())
        for job in jobs:
            _call(job.loop, _reject, job, self._stop_error())


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    # A closed loop has nobody left who waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def _resolve(results: Sequence[tuple[_Job, Completion]]) -> None:
    for job, completion in results:
        if not job.result.done():
            job.result.set_result(completion)


def _reject(job: _Job, error: RuntimeError) -> None:
    if not job.result.done():
        job.result.set_exception(error)


def _check_full_attention(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"model {config.model_type!r} has layers of kind {sorted(kinds)}; expected full_attention only; serve it "
            "with another engine"
        )
