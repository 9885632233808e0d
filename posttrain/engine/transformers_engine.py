"""The embedded engine: continuous batching over a Hugging Face causal language model, in one background thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from posttrain.engine.decode_batch import DecodeBatch, Generation
from posttrain.engine.journal import Journal, NoJournal
from posttrain.engine.requests import RequestKey, check_prompt, request_key
from posttrain.engine.stopping import Decode, StopRule
from posttrain.errors import EngineStopped
from posttrain.types import Completion, FinishReason, Request

_PREFILL_BESIDE_DECODING = 512
"""States computed per pass while other rows decode: what a newcomer may hold them up by."""
_PREFILL_ALONE = 8192
"""States computed per pass while nothing decodes; bounds its memory."""

_Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Completion]"]


@dataclass(slots=True, eq=False)
class _Job:
    """A request being answered, and everyone who asked for it."""

    key: RequestKey
    generation: Generation
    waiters: list[_Waiter] = field(default_factory=list)

    @property
    def cancelled(self) -> bool:
        return not self.waiters


@dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """Something for the thread to do between two steps."""

    act: Callable[[DecodeBatch], Any]
    done: Future[Any] = field(default_factory=Future)


class TransformersEngine:
    """Implements ``posttrain.protocols.Engine``.

    ``model`` is taken over: it is set to evaluation, loses its gradients, and lives on the device it is on. Keep
    the learner's copy apart. Full attention in every layer is needed (Llama, Qwen, SmolLM2 and their like).
    ``stop_ids`` end a completion; ``decode`` turns tokens into text, for stop strings. ``max_length`` is the window,
    prompt and completion together; None takes the model's own, and a longer one is cut to it. ``max_batch_tokens``
    bounds the cache (rows times the longest row): rows beyond it wait, or return to the queue with what they have.
    ``max_parked_tokens`` bounds the states kept of requests that say they are continued. ``keep_routing`` has the
    completions of a mixture-of-experts model say which experts their tokens went to.

    Every token is in ``journal`` before anyone sees it. A request that the journal knows goes on from there: its
    tokens are computed in one pass and what is left of its budget is drawn.

    Order: requests join in the order in which they were submitted. Those submitted in one tick of the event loop,
    such as by ``asyncio.gather``, join in the same decode step as far as rows are free. The numbers drawn for a
    request depend on its seed, id and positions alone, and in float32 on a CPU so do the logits, to the last bit (see
    ``attention`` on batch invariance): the same requests give the same completions, whatever else is asked for, however
    often they are interrupted. Elsewhere that holds up to rounding, and for requests submitted together to an idle
    engine. A request that is asked for again while it is being answered is answered once, to both.
    """

    def __init__(  # noqa: PLR0913 - settings of their own, all but the first by name
        self,
        model: PreTrainedModel,
        *,
        stop_ids: Sequence[int],
        decode: Decode | None = None,
        max_batch_size: int = 64,
        max_batch_tokens: int = 1 << 17,
        max_parked_tokens: int = 1 << 15,
        max_length: int | None = None,
        keep_routing: bool = False,
        journal: Journal | None = None,
    ) -> None:
        _check_full_attention(model)
        config = model.config.get_text_config()
        self._max_batch_size = max_batch_size
        self._max_length = min(max_length or config.max_position_embeddings, config.max_position_embeddings)
        self._vocabulary = config.vocab_size
        self._version = 0
        self._journal: Journal = journal or NoJournal()
        self._stop = StopRule(stop_ids, decode)
        self._journal_closed = False
        self._resumed_tokens = 0
        self._wake = threading.Condition()
        # Everything below is guarded by ``_wake``.
        self._arrivals = 0
        self._jobs: dict[RequestKey, _Job] = {}
        self._arriving: list[_Job] = []
        self._waiting: deque[_Job] = deque()
        self._running: dict[Generation, _Job] = {}
        self._orders: deque[_Order] = deque()
        self._stopped: str | None = None
        self._cause: BaseException | None = None
        # The thread alone holds the model, so that its end frees it.
        batch = DecodeBatch(
            model,
            stop=self._stop,
            max_tokens=max_batch_tokens,
            max_parked_tokens=max_parked_tokens,
            keep_routing=keep_routing,
        )
        self._keeps_routes = batch.keeps_routes
        self._counters = batch.counters
        self._thread = threading.Thread(target=self._run, args=(batch,), name="engine", daemon=True)
        self._thread.start()

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_length(self) -> int:
        """The window: most tokens of a prompt and its completion together."""
        return self._max_length

    def counters(self) -> dict[str, int]:
        """What was done since the engine was made, in tokens and steps; see ``decode_batch.Counters``.

        ``waiting`` is the number of requests that are not answered yet.

        Raises ``EngineStopped`` when it generates no more.
        """
        self._raise_if_stopped()
        counts = dataclasses.asdict(self._counters) | {"resumed_tokens": self._resumed_tokens}
        return counts | {"waiting": len(self._jobs)}

    async def generate(self, request: Request) -> Completion:
        """See ``Engine.generate``. The budget is cut to what the window has left.

        Raises ``ValueError`` for a prompt that is empty, fills the window or holds ids outside the vocabulary, and for
        stop strings without ``decode``; ``EngineStopped`` when the engine is closed or its decoding failed.
        """
        self._check(request)
        loop = asyncio.get_running_loop()
        waiter = (loop, loop.create_future())
        job = self._join(request, waiter)
        if job is None:
            return await waiter[1]
        # Runs after all that is ready in this tick, so the requests of one tick join together.
        loop.call_soon(self._let_in)
        try:
            return await waiter[1]
        finally:
            with self._wake:
                job.waiters = [other for other in job.waiters if other is not waiter]

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """See ``Engine.load_weights``. Returns when the weights are in place; ``ValueError`` if they do not fit.

        Requests in flight go on under the new weights, which compute all their states again.
        """

        def load(batch: DecodeBatch) -> None:
            batch.load_weights(weights, version)
            self._version = version

        self._order(load)

    def forget(self, prefix: str) -> None:
        """Requests with ids that start so are over and recorded elsewhere: journal and parked states may go."""
        self._journal.forget(prefix)
        self._order(lambda batch: batch.parked.forget(prefix), wait=False)

    def preempt(self, path: Path) -> None:
        """Stop after this step and save all states to ``path``; pending requests fail with ``EngineStopped``.

        An engine with the same weights and journal that is given the file goes on without computing anything twice.
        """

        def save(batch: DecodeBatch) -> None:
            batch.park_all()
            batch.parked.save(path, weights=batch.fingerprint())
            with self._wake:
                self._stopped = "it was preempted; its tokens are in the journal"

        self._order(save)
        self._thread.join()

    def restore(self, path: Path) -> int:
        """Take in the states a preempted engine saved, if these weights computed them; returns how many sequences."""
        return int(self._order(lambda batch: batch.restore(path)))

    def close(self) -> None:
        """See ``Engine.close``; the journal is closed, too. Closing twice is allowed."""
        with self._wake:
            self._stopped = self._stopped or "it was closed"
            self._wake.notify()
        self._thread.join()
        if not self._journal_closed:
            self._journal_closed = True
            self._journal.close()

    def _check(self, request: Request) -> None:
        check_prompt(request, window=self._max_length, vocabulary=self._vocabulary)
        self._stop.check(request.sampling)

    def _join(self, request: Request, waiter: _Waiter) -> _Job | None:
        """Add a waiter to the request's job, new or running. None when the journal has the whole answer."""
        key = request_key(request)
        with self._wake:
            self._raise_if_stopped()
            job = self._jobs.get(key)
            if job is not None:
                job.waiters.append(waiter)
                return job
            progress = self._journal.begin(request)
            room = min(request.sampling.max_tokens, self._max_length - len(request.prompt_ids))
            self._arrivals += 1
            generation = Generation(progress, room, self._arrivals)
            self._resumed_tokens += len(progress.token_ids)
            if progress.finish is None and len(progress.token_ids) >= room:
                progress.finish = FinishReason.LENGTH
            # The journal does not say which experts a finished request went to: its states are computed again.
            if progress.finish is not None and not self._keeps_routes:
                waiter[1].set_result(generation.progress.completion())
                return None
            job = self._jobs[key] = _Job(key, generation, [waiter])
            self._arriving.append(job)
            return job

    def _order(self, act: Callable[[DecodeBatch], Any], *, wait: bool = True) -> Any:
        """Have the thread do something between two steps; returns or raises what it did."""
        order = _Order(act)
        with self._wake:
            self._raise_if_stopped()
            self._orders.append(order)
            self._wake.notify()
        return order.done.result() if wait else None

    def _raise_if_stopped(self) -> None:
        if self._stopped is not None:
            raise self._stop_error()

    def _stop_error(self) -> EngineStopped:
        error = EngineStopped(f"the engine stopped: {self._stopped}")
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
        """Orders, leavers, newcomers, one pass. False when the engine is to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopped or self._orders or self._waiting or batch.rows)
            if self._stopped:
                return False
        self._obey(batch)
        if self._stopped:
            return False
        batch.remove(self._is_cancelled)
        batch.admit(self._next_jobs(batch))
        stepped, finished = batch.step(_PREFILL_BESIDE_DECODING if batch.decoding else _PREFILL_ALONE)
        if stepped:
            self._journal.append([row.progress for row in stepped])
        if finished:
            self._deliver(finished)
        self._requeue(batch.evict())
        return True

    def _obey(self, batch: DecodeBatch) -> None:
        while self._orders:
            order = self._orders.popleft()
            try:
                order.done.set_result(order.act(batch))
            except BaseException as error:
                order.done.set_exception(error)
                # Nothing was changed, or only what was asked for failed; anything else may have left it half done.
                if not isinstance(error, (ValueError, OSError)):
                    raise

    def _is_cancelled(self, row: Generation) -> bool:
        with self._wake:
            job = self._running[row]
            if job.cancelled:
                del self._running[row]
                self._jobs.pop(job.key, None)
            return job.cancelled

    def _next_jobs(self, batch: DecodeBatch) -> list[Generation]:
        with self._wake:
            chosen: list[Generation] = []
            while self._waiting and len(batch.rows) + len(chosen) < self._max_batch_size:
                job = self._waiting[0]
                if not job.cancelled and not batch.fits(chosen, job.generation):
                    break
                self._waiting.popleft()
                if job.cancelled:
                    self._jobs.pop(job.key, None)
                else:
                    self._running[job.generation] = job
                    chosen.append(job.generation)
            return chosen

    def _requeue(self, evicted: Iterable[Generation]) -> None:
        with self._wake:
            for generation in evicted:
                self._waiting.appendleft(self._running.pop(generation))

    def _deliver(self, finished: Iterable[Generation]) -> None:
        with self._wake:
            jobs = [self._running.pop(generation) for generation in finished]

        def hand_over() -> None:
            # One callback per loop, so that completions of one step are also resumed in one tick, in row order.
            by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Completion], Completion]]] = {}
            with self._wake:
                for job in jobs:
                    self._jobs.pop(job.key, None)
                    completion = job.generation.progress.completion()
                    for loop, future in job.waiters:
                        by_loop.setdefault(loop, []).append((future, completion))
            for loop, results in by_loop.items():
                _call(loop, _resolve, results)

        self._journal.when_durable(hand_over, self._disk_failed)

    def _disk_failed(self, error: OSError) -> None:
        """Nobody is shown what is not on the disk: the engine ends."""
        with self._wake:
            self._stopped, self._cause = f"the journal failed: {error}", error
            self._wake.notify()

    def _fail_pending(self) -> None:
        with self._wake:
            waiters = [waiter for job in self._jobs.values() for waiter in job.waiters]
            orders = list(self._orders)
            for pending in (self._jobs, self._running, self._waiting, self._arriving, self._orders):
                pending.clear()
        for order in orders:
            order.done.set_exception(self._stop_error())
        for loop, future in waiters:
            _call(loop, _reject, [future], self._stop_error())


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    # A closed loop has nobody left who waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def _resolve(results: Sequence[tuple[asyncio.Future[Completion], Completion]]) -> None:
    for future, completion in results:
        if not future.done():
            future.set_result(completion)


def _reject(futures: Sequence[asyncio.Future[Completion]], error: RuntimeError) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(error)


def _check_full_attention(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"model {config.model_type!r} has layers of kind {sorted(kinds)}; expected full_attention only; serve it "
            "with another engine"
        )
