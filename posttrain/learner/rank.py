"""What one of several learner processes does: the commands it takes, and the program of all but the first.

Arguments and results pickle. The first process, rank 0, calls a ``Rank`` of its own directly and sends the others the
same commands (``posttrain.learner.group``).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from transformers import PreTrainedModel

from posttrain.config import Lora, Optim
from posttrain.errors import RecipeError
from posttrain.learner.learner import Learner
from posttrain.learner.objectives import Objective, ObjectiveSpec, TokenStats
from posttrain.learner.packing import Totals
from posttrain.learner.tally import Tally
from posttrain.types import Sample

BUCKET_BYTES = 64 << 20
"""Gradient that is summed over processes in one go, beside its parameters' own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSpec:
    """A learner as a value: of one specification every process builds the same. Fields as of ``Learner``."""

    load_model: Callable[[], PreTrainedModel]
    optim: Optim
    num_steps: int
    tokens_per_micro_batch: int
    dtype: torch.dtype = torch.float32
    lora: Lora | None = None
    keep_reference: bool = False
    keep_routing: bool = False
    seed: int = 0

    def build(self) -> Learner:
        return Learner(
            self.load_model(),
            optim=self.optim,
            num_steps=self.num_steps,
            tokens_per_micro_batch=self.tokens_per_micro_batch,
            dtype=self.dtype,
            lora=self.lora,
            keep_reference=self.keep_reference,
            keep_routing=self.keep_routing,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process stands among the others."""

    rank: int
    num_ranks: int
    meeting_file: Path
    """Through which the processes find one another."""
    num_threads: int
    timeout_s: float


@dataclass(frozen=True, slots=True)
class Failure:
    """A command that failed, as its process reports it."""

    kind: type[Exception]
    message: str
    trace: str

    @classmethod
    def of(cls, error: Exception, place: Place) -> Failure:
        known = (RecipeError, FloatingPointError, ValueError, OSError)
        kind = next((kind for kind in known if isinstance(error, kind)), RuntimeError)
        message = str(error) if kind is not RuntimeError else f"{type(error).__name__}: {error}"
        return cls(kind, f"learner process {place.rank} of {place.num_ranks}: {message}", traceback.format_exc())


def raise_first(results: Sequence[Any]) -> None:
    """Raise the first failure among the results of processes."""
    for result in results:
        if isinstance(result, Failure):
            error = result.kind(result.message)
            error.add_note(result.trace)
            raise error


COLLECTIVE = ("join", "sum_gradients")
"""Commands in which processes wait for one another, so that they are taken by all and fail for all."""


def attempt(rank: Rank, command: str, arguments: Sequence[Any]) -> Any:
    """The result of a command, or its ``Failure``."""
    try:
        return getattr(rank, command)(*arguments)
    except Exception as error:  # noqa: BLE001 - rank 0 raises it
        if command in COLLECTIVE:
            rank.leave()
        return Failure.of(error, rank.place)


class Rank:
    """One process's learner, its objectives, and its way to the other processes."""

    def __init__(self, spec: LearnerSpec, place: Place, watch: Callable[[], None] = lambda: None) -> None:
        self.learner = spec.build()
        self.place, self._seed, self._watch = place, spec.seed, watch
        self._objectives: dict[int, Objective] = {}
        self._peers: Any = None

    def join(self) -> None:
        """Meet the other processes, which must do the same at the same time."""
        place = self.place
        store = distributed.FileStore(str(place.meeting_file), place.num_ranks)
        timeout = timedelta(seconds=place.timeout_s)
        # Not the default group, of which a process has one only.
        if self.learner.device.type == "cuda":
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._peers = distributed.ProcessGroupNCCL(store, place.rank, place.num_ranks, options)
        else:
            # All processes are on this machine; the name of its host may lead anywhere.
            with _environment("GLOO_SOCKET_IFNAME", "lo"):
                self._peers = distributed.ProcessGroupGloo(store, place.rank, place.num_ranks, timeout)

    def open_objective(self, number: int, spec: ObjectiveSpec) -> None:
        """Open an objective, to be named by its number from now on; rank 0 checks it."""
        self._objectives[number] = self.learner.open_objective(spec, check=self.place.rank == 0)

    def objective(self, number: int) -> Objective:
        return self._objectives[number]

    def close_objective(self, number: int) -> None:
        self.learner.close_objective(self._objectives.pop(number))

    def accumulate(self, samples: Sequence[Sample], number: int, totals: Totals) -> tuple[Tally, list[bool]]:
        """The tally of this process's share, and which parameters have a gradient of it."""
        if self.place.rank:
            # Rank 0 goes on with the random numbers of its checkpoint; the others have theirs from the step.
            entropy = np.random.SeedSequence([self._seed, self.learner.step, self.place.rank])
            torch.manual_seed(int(entropy.generate_state(1)[0]))
        objective = self._objectives[number]
        tally = self.learner.accumulate(samples, objective, totals, before_each=self._watch)
        return tally, [parameter.grad is not None for parameter in self.learner.parameters()]

    def measure(self, samples: Sequence[Sample], number: int, totals: Totals) -> Tally:
        return self.learner.measure(samples, self._objectives[number], totals)

    def token_stats(self, samples: Sequence[Sample], number: int) -> dict[str, TokenStats]:
        return self.learner.token_stats(samples, self._objectives[number])

    def sync_reference(self, alpha: float) -> None:
        self.learner.sync_reference(alpha)

    def sum_gradients(self, present: Sequence[bool]) -> None:
        """Sum the gradients over processes, of the parameters that have one in any of them.

        The only collective there is: all processes come here at once, whatever their shares were.
        """
        parameters = [each for each, has in zip(self.learner.parameters(), present, strict=True) if has]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(parameters):
            gradients = [each.grad for each in bucket if each.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            work = self._peers.allreduce([flat])
            while not work.is_completed():
                self._watch()
                time.sleep(0.0005)
            work.wait()
            for gradient, summed in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def apply(self, grad_norm: float) -> float:
        """The same step in all processes, with rank 0's norm; returns the learning rate."""
        return self.learner.apply(grad_norm)

    def drop_gradient(self) -> None:
        self.learner.drop_gradient()

    def load_checkpoint(self, path: Path) -> Any:
        return self.learner.load_checkpoint(path)

    def checksum(self) -> int:
        """Of the trained weights, bit by bit."""
        value = 0
        for parameter in self.learner.parameters():
            value = zlib.crc32(parameter.detach().cpu().contiguous().numpy().data, value)
        return value

    def leave(self) -> None:
        """Hang up, so that nobody goes on waiting for this process."""
        self._peers = None

    def close(self) -> None:
        self.learner.close()
        self.leave()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """A variable that has this value inside, unless the user has given it another."""
    missing = name not in os.environ
    os.environ.setdefault(name, value)
    try:
        yield
    finally:
        if missing:
            del os.environ[name]


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and sum(each.nbytes for each in bucket) + parameter.nbytes > BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def send(connection: Connection, message: Any) -> None:
    """Send by value. ``Connection.send`` would share tensors, for which the processes would have to be relatives."""
    connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """What ``send`` sent. ``EOFError`` when the other process has ended."""
    return pickle.loads(connection.recv_bytes())


def main() -> None:
    """The program of rank 1 and above: take commands until told to close, or until rank 0 is gone."""
    # Rank 0 hears them, and finishes its step first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_end_with_peer, args=(connection.fileno(),), daemon=True).start()
    spec, place = receive(connection)
    torch.set_num_threads(place.num_threads)
    try:
        rank = Rank(spec, place)
    except Exception as error:  # noqa: BLE001 - rank 0 raises it
        send(connection, Failure.of(error, place))
        return
    send(connection, None)
    while True:
        command, arguments = receive(connection)
        send(connection, attempt(rank, command, arguments))
        if command == "close":
            # All is closed; taking the interpreter down would take seconds.
            os._exit(0)


def _end_with_peer(descriptor: int) -> None:
    """End this process, whatever it is doing, once the other end of its connection is closed."""
    poller = select.poll()
    poller.register(descriptor, 0)
    poller.poll()
    os._exit(1)
