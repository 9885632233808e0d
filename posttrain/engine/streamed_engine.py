"""An engine over a source of token streams: the journal, resumption, stop strings, weight versions and failures.

The source (``posttrain.engine.token_source``) is what another project provides; everything here is ours, and the same
for each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from posttrain.engine.journal import Journal, NoJournal, Progress
from posttrain.engine.requests import RequestKey, check_prompt, request_key
from posttrain.engine.stopping import Decode, StopRule
from posttrain.engine.token_source import Delta, TokenSource
from posttrain.errors import EngineStopped
from posttrain.types import Completion, FinishReason, Request

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Job:
    progress: Progress
    result: asyncio.Future[Completion]
    waiting: int = 0
    """How many have asked for it."""
    pump: asyncio.Task[None] | None = None
    streamed: list[int] = field(default_factory=list)
    """The version recorded for each token that this process received, to compare with the source's own count."""


class StreamedEngine:
    """Implements ``posttrain.protocols.Engine`` over a ``TokenSource``, in an event loop of its own.

    ``open_source`` is called once, in that loop; what it raises, the constructor raises. ``decode`` gives the text of
    generated tokens and is needed for stop strings only. The journal is closed with the engine.

    A request that the journal knows goes on after its last recorded token with what is left of its budget; one that had
    finished is answered at once, and one that is asked for twice at a time once, to both. Tokens are recorded once per
    turn of the event loop, together for all requests that received some, and a completion is handed out when the disk
    has it.
    """

    def __init__(
        self,
        open_source: Callable[[], Awaitable[TokenSource]],
        *,
        decode: Decode | None = None,
        journal: Journal | None = None,
        version: int = 0,
    ) -> None:
        self._open_source = open_source
        self._stop_rule = StopRule([], decode)
        self._journal: Journal = NoJournal() if journal is None else journal
        self._version = version
        self._jobs: dict[RequestKey, _Job] = {}
        self._decoded = self._resumed = 0
        self._journal_closed = False
        self._unrecorded: dict[_Job, None] = {}
        self._updating = asyncio.Lock()
        # Guarded by ``_lock``, for callers in other threads: nothing is submitted once it is set.
        self._lock = threading.Lock()
        self._stopped: str | None = None
        self._cause: BaseException | None = None
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(opened)), name="engine", daemon=True)
        self._thread.start()
        opened.result()

    @property
    def version(self) -> int:
        return self._version

    @property
    def max_length(self) -> int:
        """The window: most tokens of a prompt and its completion together."""
        return self._source.max_length

    async def generate(self, request: Request) -> Completion:
        """See ``Engine.generate``. The budget is cut to what the window has left.

        Raises ``ValueError`` for a prompt that is empty, fills the window or holds ids outside the vocabulary, and for
        a sampling that the source cannot do; ``EngineStopped`` when the engine is closed or its source failed.
        """
        self._check(request)
        future = self._submit(lambda: self._complete(request))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._stopped is not None and task is not None and not task.cancelling():
                raise self._stop_error() from None
            raise

    def load_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """See ``Engine.load_weights``. Returns when the weights are in place; ``ValueError`` if they do not fit."""
        try:
            self._submit(lambda: self._update(weights, version)).result()
        except CancelledError:
            raise self._stop_error() from None

    def forget(self, prefix: str) -> None:
        """See ``Engine.forget``."""
        self._journal.forget(prefix)

    def counters(self) -> dict[str, int]:
        """Tokens decoded and resumed so far, and how many requests wait. ``EngineStopped`` when there are no more."""
        if self._stopped is not None:
            raise self._stop_error()
        return {"decode_tokens": self._decoded, "resumed_tokens": self._resumed, "waiting": len(self._jobs)}

    def preempt(self, path: Path) -> None:
        """Stop; pending requests fail with ``EngineStopped``. The source keeps its states to itself: a resumed request
        is computed again from its tokens in the journal, and nothing is written to ``path``."""
        self._close("it was preempted; its tokens are in the journal")

    def close(self) -> None:
        """See ``Engine.close``. Closing twice is allowed."""
        self._close("it was closed")

    def _close(self, reason: str) -> None:
        self._call(self._stop, reason, None)
        self._thread.join()
        if not self._journal_closed:
            self._journal_closed = True
            self._journal.close()

    def _check(self, request: Request) -> None:
        check_prompt(request, window=self._source.max_length, vocabulary=self._source.vocabulary)
        self._stop_rule.check(request.sampling)
        self._source.check(request)

    def _submit(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        with self._lock:
            if self._stopped is not None:
                raise self._stop_error()
            return asyncio.run_coroutine_threadsafe(work(), self._loop)

    def _stop_error(self) -> EngineStopped:
        error = EngineStopped(f"the engine stopped: {self._stopped}")
        error.__cause__ = self._cause
        return error

    # Everything below runs in the engine's own event loop.

    async def _run(self, opened: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        try:
            self._source = await self._open_source()
        except BaseException as error:  # noqa: BLE001 - the constructor raises it in the caller's thread
            self._stopped = f"its source did not open: {error}"
            opened.set_exception(error)
            return
        opened.set_result(None)
        await self._closing.wait()
        self._source.close()

    def _stop(self, reason: str, cause: BaseException | None) -> None:
        """Fail everything pending, now and later. The first reason stays."""
        with self._lock:
            if self._stopped is not None:
                return
            self._stopped, self._cause = reason, cause
        for job in self._jobs.values():
            if not job.result.done():
                job.result.set_exception(self._stop_error())
        self._closing.set()

    async def _complete(self, request: Request) -> Completion:
        key = request_key(request)
        job = self._jobs.get(key) or self._begin(key, request)
        job.waiting += 1
        try:
            return await asyncio.shield(job.result)
        finally:
            job.waiting -= 1
            if not job.waiting:
                if self._jobs.get(key) is job:
                    del self._jobs[key]
                if job.pump is not None:
                    job.pump.cancel()

    def _begin(self, key: RequestKey, request: Request) -> _Job:
        job = self._jobs[key] = _Job(self._journal.begin(request), self._loop.create_future())
        self._resumed += len(job.progress.token_ids)
        room = self._room(job.progress)
        if job.progress.finish is None and room <= 0:
            job.progress.finish = FinishReason.LENGTH
        if job.progress.finish is not None:
            self._record_soon(job)
        else:
            job.pump = self._loop.create_task(self._pump(job, room))
        return job

    def _room(self, progress: Progress) -> int:
        request = progress.request
        budget = min(request.sampling.max_tokens, self._source.max_length - len(request.prompt_ids))
        return budget - len(progress.token_ids)

    async def _pump(self, job: _Job, room: int) -> None:
        progress = job.progress
        stream = self._source.stream(progress.request, tuple(progress.token_ids), room)
        try:
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    self._take(job, delta)
                    if progress.finish is not None:
                        return
            raise EOFError(f"the stream of request {progress.request.id!r} ended without a reason")
        except ValueError as error:
            if not job.result.done():
                job.result.set_exception(error)
        except Exception as error:  # noqa: BLE001 - whatever broke the source must reach all who wait for it
            self._stop(f"its source failed with {type(error).__name__}: {error}", error)

    def _take(self, job: _Job, delta: Delta) -> None:
        progress = job.progress
        for token, logprob, kept in zip(delta.token_ids, delta.logprobs, delta.kept, strict=True):
            if not math.isfinite(logprob):
                raise FloatingPointError(
                    f"request {progress.request.id!r}: token {token} with log-probability {logprob}; the model's "
                    "logits are not finite numbers; look for a diverged learner, or generate in float32"
                )
            progress.token_ids.append(token)
            progress.logprobs.append(logprob)
            progress.versions.append(self._version)
            progress.kept.append(kept)
            job.streamed.append(self._version)
            self._decoded += 1
            # The source ends at stop tokens by itself.
            if progress.request.sampling.stop:
                progress.finish = self._stop_rule.finish(progress.request.sampling, progress.token_ids)
            if progress.finish is not None:
                break
        else:
            progress.finish = delta.finish
        self._compare_versions(job, delta)
        self._record_soon(job)

    def _compare_versions(self, job: _Job, delta: Delta) -> None:
        if delta.versions is not None and list(delta.versions[: len(job.streamed)]) != job.streamed:
            raise RuntimeError(
                f"request {job.progress.request.id!r}: its tokens were recorded with weight versions {job.streamed}, "
                f"the source says {list(delta.versions)}; a delta was late across an update of the weights"
            )

    def _record_soon(self, job: _Job) -> None:
        if not self._unrecorded:
            # Runs after all that is ready in this turn of the loop, so the streams of one step share a write.
            self._loop.call_soon(self._record)
        self._unrecorded[job] = None

    def _record(self) -> None:
        jobs = list(self._unrecorded)
        self._unrecorded.clear()
        finished = [job for job in jobs if job.progress.finish is not None]
        try:
            self._journal.append([job.progress for job in jobs])
            if finished:
                self._journal.when_durable(
                    lambda: self._call(self._hand_out, finished),
                    lambda error: self._call(self._stop, f"the journal failed: {error}", error),
                )
        except Exception as error:  # noqa: BLE001 - tokens that cannot be recorded must not be seen by anyone
            self._stop(f"the journal failed with {type(error).__name__}: {error}", error)

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        # A closed loop has nobody left who waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def _hand_out(self, finished: Sequence[_Job]) -> None:
        for job in finished:
            if not job.result.done():
                job.result.set_result(job.progress.completion())

    async def _update(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        async with self._updating:
            staged = await asyncio.to_thread(self._source.stage, weights, version)
            try:
                await self._source.pause()
                await self._source.load(staged, version)
                self._version = version
                await self._source.resume()
            except BaseException as error:
                # Some weights may have been replaced and others not.
                self._stop(f"weights of version {version} failed with {type(error).__name__}: {error}", error)
                raise
