"""Checks that may hang, in processes that can be killed.

Sympy, and other checkers of answers, can take for ever over a few characters, and nothing inside a Python process
stops C code. So they run in processes of their own. A process that burns its CPU time over one answer is ended by the
kernel (``ITIMER_PROF``), and says by the signal it died of that this answer is to blame. Anything else that ends it,
or a machine too busy to give it that CPU time, is not the answer's doing: the check is tried once more, then there is
no verdict. No signal handler and no main thread is needed, so it works in threads and in Ray's workers.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import RecipeError

_SCRIPT = Path(__file__).with_name("worker_process.py")
_MAX_CACHED = 20_000
_MAX_REPLY = 1 << 20
_CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)
Kind = Literal["math", "puzzle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one check may use. The defaults leave a hundred times what an honest answer takes."""

    workers: int = 2
    """Processes of each process that scores, started when they are first needed; about 150 MB each."""
    cpu_s: float = 3.0
    """CPU time of one check, user and system; beyond it the answer is at fault."""
    wall_s: float = 60.0
    """Wall-clock time of one check, start of a process included; beyond it the machine is at fault."""
    memory_mb: int = 2048
    """Address space of a process; beyond it the answer is at fault."""
    max_checks: int = 5000
    """Checks after which a process is replaced, since sympy's caches grow."""

    def __post_init__(self) -> None:
        if min(self.workers, self.cpu_s, self.wall_s, self.memory_mb, self.max_checks) <= 0:
            raise RecipeError(f"{self}: expected positive numbers")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one check."""

    value: float | None
    """None when the machinery failed, which says nothing of the answer."""
    reason: str
    killed: bool = False
    """Whether the process had to be ended over it."""


class _WorkerDied(Exception):
    """The process ended without an answer."""

    def __init__(self, message: str, *, by_answer: bool = False, crashed: bool = False) -> None:
        super().__init__(message)
        self.by_answer, self.crashed = by_answer, crashed


@dataclass(slots=True, eq=False)
class _Worker:
    """One process. It reads pickles, which only we write, and answers with JSON, which is all we read of it."""

    process: subprocess.Popen[bytes]
    num_checks: int = 0

    @classmethod
    def start(cls, kind: Kind, limits: Limits) -> _Worker:
        # -P keeps this folder, whose modules are named as some of the standard library's, off the path.
        command = [sys.executable, "-P", str(_SCRIPT), kind, str(limits.cpu_s), str(limits.memory_mb)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True)
        return cls(process)

    def ask(self, request: Mapping[str, Any], deadline: float) -> Any:
        """Raises ``_WorkerDied``; the process is then of no more use."""
        assert self.process.stdin is not None
        data = pickle.dumps(dict(request))
        try:
            self.process.stdin.write(struct.pack("<Q", len(data)) + data)
            self.process.stdin.flush()
        except OSError:
            raise self._death() from None
        self.num_checks += 1
        return self._read(deadline)

    def _read(self, deadline: float) -> Any:
        assert self.process.stdout is not None
        output = b""
        while not output.endswith(b"\n"):
            left = deadline - time.monotonic()
            readable = left > 0 and select.select([self.process.stdout], [], [], left)[0]
            if not readable:
                raise _WorkerDied("the check passed its wall-clock deadline on a busy machine")
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data or len(output) > _MAX_REPLY:
                raise self._death()
            output += data
        return json.loads(output)

    def _death(self) -> _WorkerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        code = self.process.returncode
        if code == -signal.SIGPROF:
            return _WorkerDied("checking it takes too much CPU time", by_answer=True)
        return _WorkerDied(f"the checking process ended with {code}", crashed=code in _CRASHES)

    def kill(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self.process.wait()


@dataclass(eq=False)
class WorkerPool:
    """Processes for one kind of check, shared by all threads of this process."""

    kind: Kind
    limits: Limits
    _idle: list[_Worker] = field(default_factory=list)
    _busy: set[_Worker] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _slots: threading.Semaphore = field(init=False)
    _cache: OrderedDict[str, Verdict] = field(default_factory=OrderedDict)
    num_killed: int = 0
    """Processes that were lost or killed over a check."""

    def __post_init__(self) -> None:
        self._slots = threading.Semaphore(self.limits.workers)
        atexit.register(self.close)

    def check(self, request: Mapping[str, Any]) -> Verdict:
        """Blocks until there is a verdict, at most twice ``limits.wall_s`` and the wait for a free process."""
        key = repr(sorted(request.items()))
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        verdict = self._check(request)
        if verdict.value is not None:
            with self._lock:
                self._cache[key] = verdict
                while len(self._cache) > _MAX_CACHED:
                    self._cache.popitem(last=False)
        return verdict

    def _check(self, request: Mapping[str, Any]) -> Verdict:
        reason, crashes = "", 0
        for _ in range(2):
            try:
                with self._slots:
                    reply = self._ask_one(request)
                return Verdict(float(reply["value"]), str(reply["reason"]))
            except _WorkerDied as death:
                reason, crashes = str(death), crashes + death.crashed
                if death.by_answer or crashes == 2:
                    # A new process that crashes over the same answer was crashed by it.
                    return Verdict(0.0, reason, killed=True)
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = f"the checking process gave no usable answer ({type(error).__name__}: {error})"
        return Verdict(None, reason)

    def _ask_one(self, request: Mapping[str, Any]) -> Any:
        worker = self._take()
        fit = False
        try:
            reply = worker.ask(request, time.monotonic() + self.limits.wall_s)
            fit = not reply.get("last") and worker.num_checks < self.limits.max_checks
            return reply
        except BaseException:
            self.num_killed += 1
            raise
        finally:
            with self._lock:
                self._busy.discard(worker)
                if fit:
                    self._idle.append(worker)
            if not fit:
                worker.kill()

    def _take(self) -> _Worker:
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or _Worker.start(self.kind, self.limits)
        with self._lock:
            self._busy.add(worker)
        return worker

    def close(self) -> None:
        """Kill all processes; checks that are running end without a verdict."""
        with self._lock:
            workers, self._idle = [*self._idle, *self._busy], []
        for worker in workers:
            worker.process.kill()


@cache
def shared_pool(kind: Kind, limits: Limits) -> WorkerPool:
    """The pool of this process for these limits."""
    return WorkerPool(kind, limits)
