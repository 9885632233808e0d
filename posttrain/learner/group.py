"""Several learner processes that share each mini-batch, on one machine: data parallel, to be used like one ``Learner``.

The process that makes a ``LearnerGroup`` is rank 0 and starts the others itself. Each has the whole model and optimizer
and sees a share of the samples; gradients are summed once per mini-batch, after all processes have said that their
share went well. So no process waits for another within forward or backward passes, and shares may differ in teachers,
in micro-batches, or be empty. What fails in one process is raised in rank 0 and changes the weights of none.

Loss and gradient are those of one process up to the order of summation. Dropout draws other numbers in each process.
Not covered: processes on several machines, and models too large for one device.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from posttrain.learner.learner import Learner, with_loss
from posttrain.learner.objectives import Objective, ObjectiveSpec, TokenStats
from posttrain.learner.packing import PackedBatch, Totals, divide_over_ranks
from posttrain.learner.policy import HeadInputs
from posttrain.learner.rank import COLLECTIVE, Failure, LearnerSpec, Place, Rank, attempt, raise_first, receive, send
from posttrain.learner.tally import add_up, step_metrics
from posttrain.rollout.local_store import LocalRef, LocalStore
from posttrain.types import Sample, TokenArrays

TIMEOUT_S = 1800.0
"""How long one process may keep the others waiting, once they are done, before it is taken for hung."""
_CLOSING_S = 10.0
_REASON_S = 1.0


class LearnerGroup:
    """``num_learners`` processes with a learner of ``spec`` each. Use like ``Learner``, and close it.

    Objectives must come from ``open_objective``, which opens them in every process. Raises what ``Learner`` raises;
    ``ChildProcessError`` when a process has ended or hangs, after which nothing but ``close`` is left to do.
    """

    def __init__(self, spec: LearnerSpec, num_learners: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self._threads = torch.get_num_threads()
        self._folder = tempfile.TemporaryDirectory(prefix="posttrain-learners-")
        self._store = LocalStore()
        self._numbers: list[tuple[int, Objective]] = []
        self._next_number = 0
        self._broken = False
        self._followers: list[_Follower] = []
        places = [
            Place(
                rank=rank,
                num_ranks=num_learners,
                meeting_file=Path(self._folder.name, "meeting"),
                num_threads=max(1, self._threads // num_learners),
                timeout_s=timeout_s,
            )
            for rank in range(num_learners)
        ]
        try:
            self._followers = [_Follower(spec, place) for place in places[1:]]
            torch.set_num_threads(places[0].num_threads)
            self._rank = Rank(spec, places[0], watch=self._watch)
            raise_first([follower.receive() for follower in self._followers])
            self._everywhere("join")
        except BaseException:
            self._broken = True
            self.close()
            raise

    @property
    def _own(self) -> Learner:
        return self._rank.learner

    @property
    def step(self) -> int:
        """Optimizer steps made so far."""
        return self._own.step

    @property
    def device(self) -> torch.device:
        return self._own.device

    @property
    def dtype(self) -> torch.dtype:
        return self._own.dtype

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes, rank by rank."""
        return os.getpid(), *(follower.process.pid for follower in self._followers)

    def open_objective(self, spec: ObjectiveSpec) -> Objective:
        """See ``Learner.open_objective``; each process has its own, and start-up checks run in rank 0."""
        number, self._next_number = self._next_number, self._next_number + 1
        self._everywhere("open_objective", number, spec)
        objective = self._rank.objective(number)
        self._numbers.append((number, objective))
        return objective

    def close_objective(self, objective: Objective) -> None:
        """See ``Learner.close_objective``."""
        number = self._number(objective)
        self._everywhere("close_objective", number)
        self._numbers.remove((number, objective))

    def update(self, samples: Sequence[Sample], objective: Objective) -> dict[str, float]:
        """See ``Learner.update``."""
        started = time.perf_counter()
        trained, totals, number = with_loss(samples), Totals.of(samples), self._number(objective)
        try:
            shares = self._on_shares("accumulate", trained, number, totals)
            has_gradient = [any(parameter) for parameter in zip(*(present for _, present in shares), strict=True)]
            self._everywhere("sum_gradients", has_gradient)
            grad_norm = self._own.grad_norm([sample.id for sample in trained])
        except Exception:
            if not self._broken:
                self._everywhere("drop_gradient")
            raise
        learning_rate = self._everywhere("apply", grad_norm)[0]
        return step_metrics(
            add_up(tally for tally, _ in shares),
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            budget=self._own.budget,
            seconds=time.perf_counter() - started,
        )

    def evaluate(self, samples: Sequence[Sample], objective: Objective) -> dict[str, float]:
        """See ``Learner.evaluate``."""
        return add_up(self._on_shares("measure", samples, self._number(objective), Totals.of(samples))).metrics()

    def token_stats(self, samples: Sequence[Sample], objective: Objective) -> dict[str, TokenStats]:
        """See ``Learner.token_stats``."""
        shares = self._on_shares("token_stats", samples, self._number(objective))
        return {sample_id: stats for share in shares for sample_id, stats in share.items()}

    def sync_reference(self, alpha: float) -> None:
        """See ``Learner.sync_reference``."""
        self._everywhere("sync_reference", alpha)

    def reference(self, batch: PackedBatch) -> HeadInputs:
        """See ``Learner.reference``."""
        return self._own.reference(batch)

    def weights(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """See ``Learner.weights``."""
        return self._own.weights(dtype)

    def save_final(
        self, directory: Path, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype | None = None
    ) -> None:
        """See ``Learner.save_final``."""
        self._own.save_final(directory, tokenizer, dtype=dtype)

    def save_checkpoint(self, root: Path, caller: Any = None) -> Path:
        """See ``Learner.save_checkpoint``; any number of processes can go on from it.

        Raises ``RuntimeError`` when the processes' weights have come to differ, before anything is written.
        """
        checksums = self.checksums()
        if len(set(checksums)) > 1:
            raise RuntimeError(
                f"step {self.step}: the learner processes' weights differ (checksums {checksums}), although all made "
                "the same steps with the same gradient; go on from the last checkpoint, and suspect the hardware"
            )
        return self._own.save_checkpoint(root, caller)

    def load_checkpoint(self, path: Path) -> Any:
        """See ``Learner.load_checkpoint``."""
        return self._everywhere("load_checkpoint", path)[0]

    def checksums(self) -> list[int]:
        """Of the trained weights of each process, bit by bit; equal as long as all is well."""
        return self._everywhere("checksum")

    def close(self) -> None:
        """End the other processes and free everything. May be called again."""
        for follower in self._followers:
            follower.end(now=self._broken)
        self._followers = []
        if hasattr(self, "_rank"):
            self._rank.close()
        self._store.close()
        self._folder.cleanup()
        torch.set_num_threads(self._threads)

    def _number(self, objective: Objective) -> int:
        for number, opened in self._numbers:
            if opened is objective:
                return number
        raise ValueError(
            f"this {type(objective).__name__} is not known to the other learner processes; use what open_objective "
            "of this group returned"
        )

    def _on_shares(self, command: str, samples: Sequence[Sample], *arguments: Any) -> list[Any]:
        """Have each process work on its share of the samples."""
        shares = divide_over_ranks(samples, 1 + len(self._followers))
        sent = [[self._sendable(sample) for sample in share] for share in shares[1:]]
        try:
            return self._call(command, [(share, *arguments) for share in (shares[0], *sent)])
        finally:
            for share, copies in zip(shares[1:], sent, strict=True):
                for sample, copy in zip(share, copies, strict=True):
                    if copy is not sample:
                        copy.tokens.free()

    def _sendable(self, sample: Sample) -> Sample:
        """The sample, its arrays where any process of this machine finds them."""
        if isinstance(sample.tokens.source, TokenArrays | LocalRef):
            return sample
        return replace(sample, tokens=sample.tokens.put_in(self._store))

    def _everywhere(self, command: str, *arguments: Any) -> list[Any]:
        """The results of a command, rank by rank."""
        return self._call(command, [arguments] * (1 + len(self._followers)))

    def _call(self, command: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        if self._broken:
            raise ChildProcessError("these learner processes were given up after a failure; resume the run")
        # Whatever interrupts it leaves processes behind that are somewhere else.
        self._broken = True
        for follower, given in zip(self._followers, arguments[1:], strict=True):
            follower.send(command, given)
        own = attempt(self._rank, command, arguments[0])
        if isinstance(own, Failure) and command in COLLECTIVE:
            # The others may wait for what will not come; or one of them has the reason.
            known = [follower.receive() for follower in self._followers if follower.answers_within(_REASON_S)]
            raise_first([*known, own])
        results = [own, *(follower.receive() for follower in self._followers)]
        self._broken = command in COLLECTIVE and any(isinstance(result, Failure) for result in results)
        raise_first(results)
        return results

    def _watch(self) -> None:
        for follower in self._followers:
            follower.require_alive()


class _Follower:
    """Rank 0's view of another process."""

    def __init__(self, spec: LearnerSpec, place: Place) -> None:
        self._place = place
        self._connection, theirs = Pipe()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        if torch.cuda.is_available():
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
            environment["CUDA_VISIBLE_DEVICES"] = devices[place.rank]
        code = "from posttrain.learner.rank import main; main()"
        with theirs:
            # Not multiprocessing's spawn, which would run the user's main program again.
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())], env=environment, pass_fds=[theirs.fileno()]
            )
        send(self._connection, (spec, place))

    def send(self, command: str, arguments: Sequence[Any]) -> None:
        try:
            send(self._connection, (command, tuple(arguments)))
        except OSError as error:
            raise self._lost() from error

    def receive(self) -> Any:
        """What it answers. ``ChildProcessError`` when it has ended, or stays silent for too long."""
        try:
            if not self._connection.poll(self._place.timeout_s):
                raise ChildProcessError(
                    f"{self._name} has not answered for {self._place.timeout_s:g} s and is taken for hung; look at "
                    "what it was doing, and go on with --resume"
                )
            return receive(self._connection)
        except (EOFError, ConnectionError) as error:
            raise self._lost() from error

    def answers_within(self, seconds: float) -> bool:
        """Whether it answers, or ends, in this time."""
        return self._connection.poll(seconds)

    def require_alive(self) -> None:
        if self.process.poll() is not None:
            raise self._lost()

    def end(self, *, now: bool) -> None:
        """Have the process close and see it end; kill it if it is not to be asked, or takes too long."""
        try:
            if not now:
                send(self._connection, ("close", ()))
                self.process.wait(_CLOSING_S)
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            self.process.kill()
            self.process.wait()
            self._connection.close()

    @property
    def _name(self) -> str:
        return f"learner process {self._place.rank} of {self._place.num_ranks} (pid {self.process.pid})"

    def _lost(self) -> ChildProcessError:
        try:
            code = self.process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            code = 0
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildProcessError(
            f"{self._name} {ended}; if the kernel killed it for lack of memory, lower tokens_per_micro_batch or "
            "workers.num_learners; go on with --resume from the last checkpoint"
        )


AnyLearner = Learner | LearnerGroup


def open_learner(spec: LearnerSpec, num_learners: int) -> AnyLearner:
    """A learner in this process, or several processes that share its work."""
    return spec.build() if num_learners == 1 else LearnerGroup(spec, num_learners)
