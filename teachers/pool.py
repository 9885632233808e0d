"""Many teachers, few in memory: each is loaded on demand, run over all its samples, and let go.

What stays behind of a teacher is the hidden states of its samples' loss positions (in a ``StateStore``) and its
output head (in host memory, keyed by content, so that LoRA specialists of one base share a single one). The learner
then rebuilds full logits as head @ state, one head on the device at a time.

States are kept in bfloat16, which rounds each element by at most 1 part in 512. For logits that spread by s nats
around their mean this adds about 1e-6 s^2 nats to the KL of a float32 teacher: far below what a student is away
from it, and for a bfloat16 teacher nothing at all. ``teachers.checks`` measures it at start-up.

One thread uses a pool; the pool's own background thread loads, and closes what a load has no use for.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import numpy as np
import torch

from posttrain.errors import RecipeError
from posttrain.protocols import StateStore, Teacher, TeacherModel
from posttrain.types import IntArray, Sample, TokenArrays
from teachers.batching import length_batches
from teachers.logits import OutputHead


@runtime_checkable
class Sized(Protocol):
    """A loaded teacher that knows its size may stay resident; others are closed after use."""

    @property
    def num_bytes(self) -> int: ...


@runtime_checkable
class Capped(Protocol):
    """A loaded teacher whose logits may be soft-capped."""

    @property
    def logit_cap(self) -> float | None: ...


@runtime_checkable
class OnePass(Protocol):
    """A loaded teacher that runs many sequences and gives each one's states as soon as it has them."""

    def each_state(self, sequences: Sequence[IntArray]) -> Iterator[tuple[int, torch.Tensor]]: ...


@runtime_checkable
class Streamable(Protocol):
    """A teacher that knows its size beforehand and can run in less memory than that."""

    def num_bytes(self, device: str) -> int | None: ...

    def stream(self, device: str, *, memory_bytes: int) -> TeacherModel: ...


@runtime_checkable
class Refilling(Protocol):
    """A teacher that can be read into the memory of another's model, which saves building a model and its memory."""

    def refill(self, model: TeacherModel, device: str) -> bool:
        """Make ``model`` this teacher's; tensors it gave change. False, and nothing done, if it is of another kind."""
        ...


@runtime_checkable
class HasHead(Protocol):
    """A teacher whose head can be had without the rest."""

    def load_head(self, device: str) -> OutputHead: ...


@dataclass(slots=True, kw_only=True)
class PoolStats:
    """What a pool has done."""

    teacher_loads: int = 0
    head_loads: int = 0
    """Times the head on the device was replaced by another."""
    load_wait_s: float = 0.0
    """Seconds the caller stood still while a teacher was loading."""
    bytes_cached: int = 0
    """Size of the states the learner was given, found ones included."""
    tokens: int = 0
    """Tokens that went through teachers, padding excluded."""
    samples_found: int = 0
    """Samples whose states were in the store already."""

    def since(self, earlier: PoolStats) -> PoolStats:
        """The difference to an earlier reading."""
        return PoolStats(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})

    def copy(self) -> PoolStats:
        return self.since(PoolStats())


@dataclass(frozen=True, slots=True)
class _Asked:
    """A sample that its teacher has to read."""

    id: str
    arrays: TokenArrays
    origin: str


class TeacherPool:
    """Runs teachers by name within a memory limit. Use as a context manager, or call ``close``.

    ``memory_mb`` (MiB) bounds the weights held at any time: teachers in use, resident after use or loading, and heads.
    A ``Streamable`` teacher above it runs layer by layer, and ``RecipeError`` is raised when even that does not fit;
    any other kind is always allowed while it is in use. The next teacher is loaded in the background while both fit.
    """

    def __init__(self, teachers: Mapping[str, Teacher], *, memory_mb: int, device: str = "cpu") -> None:
        self._teachers = dict(teachers)
        self._with_head_apart = frozenset(name for name, each in teachers.items() if isinstance(each, HasHead))
        self._capacity = memory_mb * 2**20
        self._device = device
        self._resident: OrderedDict[str, TeacherModel] = OrderedDict()  # least recently used first
        self._loading: dict[str, Future[TeacherModel]] = {}
        self._sizes: dict[str, int] = {}
        self._fingerprints: dict[str, str] = {}
        self._head_keys: dict[str, str] = {}
        self._caps: dict[str, float | None] = {}
        self._heads: OrderedDict[str, torch.Tensor] = OrderedDict()  # in host memory; least recently used first
        self._loading_heads: dict[str, Future[OutputHead]] = {}
        self._device_head: tuple[str, torch.Tensor] | None = None
        self._order: list[str] = []
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher-load")
        self._stats = PoolStats()

    @property
    def stats(self) -> PoolStats:
        """Totals since the pool was made."""
        return self._stats.copy()

    def cache_states(self, samples: Sequence[Sample], store: StateStore) -> PoolStats:
        """Put the hidden states that predict each sample's loss tokens into ``store``, under the sample's id.

        Row i of a sample's [num_loss_tokens, E] bfloat16 tensor predicts its i-th loss token. Samples are grouped by
        teacher, so that every teacher is loaded at most once. Samples whose states are in the store, of the same
        teacher and tokens, are left out. Returns what this call did. ``ValueError`` when a sample names no teacher of
        this pool.
        """
        before = self.stats
        missing = self._not_held(samples, store)
        names = self._visiting_order(missing)
        for name, following in itertools.zip_longest(names, names[1:]):
            model = self._model(name)
            if following is not None:
                self._load_ahead(following, beside=name)
            self._run(model, missing[name], store)
            self._settle(name)
        self._order = sorted({str(sample.teacher) for sample in samples})
        if self._order:
            self.prefetch_head(self._order[0])
        return self.stats.since(before)

    def head(self, name: str) -> torch.Tensor:
        """The output head of a teacher, [V, E], on the pool's device.

        The head given before leaves the device, unless it is the same by content: drop it before asking for the next
        one. Visit samples in the order of their teachers' names, as ``plan_micro_batches`` puts them, and each head is
        moved once, and was read in the background. ``KeyError`` for unknown names.
        """
        key = self._head_keys.get(self._known(name))
        if key is None or self._device_head is None or self._device_head[0] != key:
            key = self._bring_head(name)
        if self._device_head is None or self._device_head[0] != key:
            self._device_head = None  # Freed before the next one arrives: one head at a time.
            self._device_head = (key, self._heads[key].to(self._device))
            self._stats.head_loads += 1
        following = bisect_right(self._order, name)
        if following < len(self._order):
            self.prefetch_head(self._order[following])
        return self._device_head[1]

    def logit_cap(self, name: str) -> float | None:
        """c where a teacher's logits are ``c tanh(head @ state / c)``; None where they are not capped."""
        if self._known(name) not in self._caps:
            self._bring_head(name)
        return self._caps[name]

    def prefetch_head(self, name: str) -> None:
        """Start loading in the background what ``head(name)`` will need, if it is not in host memory and has room."""
        key = self._head_keys.get(self._known(name))
        if key is not None and key in self._heads:
            return
        if name not in self._with_head_apart:
            self._load_ahead(name, beside=None)
            return
        in_use = self._device_head[0] if self._device_head is not None else None
        largest = max((head.nbytes for head in self._heads.values()), default=0)
        self._shrink(self._capacity - largest, keep_head=in_use)
        if self._used() + largest <= self._capacity:
            self._start_loading_head(name)

    def close(self) -> None:
        """Free all teachers and heads. Loads under way are awaited, then closed."""
        for future in self._loading.values():
            if future.exception() is None:
                future.result().close()
        self._loading.clear()
        self._loader.shutdown(cancel_futures=True)
        self._loading_heads.clear()
        while self._resident:
            self._resident.popitem()[1].close()
        self._heads.clear()
        self._device_head = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _not_held(self, samples: Sequence[Sample], store: StateStore) -> dict[str, list[_Asked]]:
        """By teacher, the samples whose states the store does not hold yet."""
        missing: dict[str, list[_Asked]] = {}
        for sample in samples:
            if sample.teacher not in self._teachers:
                raise ValueError(
                    f"Sample {sample.id!r}: teacher = {sample.teacher!r}; expected one of {sorted(self._teachers)}"
                )
            arrays = sample.load()
            asked = _Asked(sample.id, arrays, self._origin(sample.teacher, arrays))
            if store.holds(sample.id, origin=asked.origin):
                self._stats.samples_found += 1
                self._stats.bytes_cached += store.get(sample.id).nbytes
            else:
                missing.setdefault(sample.teacher, []).append(asked)
        return missing

    def _origin(self, name: str, arrays: TokenArrays) -> str:
        """What a sample's states depend on, in one digest."""
        if name not in self._fingerprints:
            self._require_unchanged(name)
        digest = hashlib.sha256(self._fingerprints[name].encode())
        digest.update(arrays.token_ids.astype(np.int32).tobytes())
        digest.update(arrays.loss_mask.astype(np.bool_).tobytes())
        digest.update(np.array(arrays.lengths, np.int64).tobytes())
        return digest.hexdigest()

    def _visiting_order(self, names: Iterable[str]) -> list[str]:
        """The teachers to run, those already in memory first."""
        return sorted(names, key=lambda name: (name not in self._resident, name))

    def _known(self, name: str) -> str:
        if name not in self._teachers:
            raise KeyError(f"no teacher {name!r} in this pool; it has {sorted(self._teachers)}")
        return name

    def _run(self, model: TeacherModel, samples: Sequence[_Asked], store: StateStore) -> None:
        # A sample may hold several sequences, which the teacher reads apart.
        sequences = [np.split(each.arrays.token_ids, np.cumsum(each.arrays.lengths)[:-1]) for each in samples]
        places = [(owner, part) for owner, parts in enumerate(sequences) for part in range(len(parts))]
        kept: dict[int, dict[int, torch.Tensor]] = {}
        for index, states_TE in _each_state(model, [part for parts in sequences for part in parts], self._device):
            owner, part = places[index]
            each = samples[owner]
            masks = np.split(each.arrays.loss_mask, np.cumsum(each.arrays.lengths)[:-1])
            predicting = torch.from_numpy(np.flatnonzero(masks[part]) - 1)
            mine = kept.setdefault(owner, {})
            mine[part] = states_TE[predicting.to(states_TE.device)].to("cpu", torch.bfloat16)
            if len(mine) < len(sequences[owner]):
                continue
            kept_LE = torch.cat([states for _, states in sorted(kept.pop(owner).items())])
            store.put(each.id, kept_LE, origin=each.origin)
            self._stats.bytes_cached += kept_LE.nbytes
            self._stats.tokens += len(each.arrays)

    def _model(self, name: str) -> TeacherModel:
        """The loaded teacher, most recently used."""
        if name not in self._resident:
            started = time.monotonic()
            future = self._start_loading(name)
            try:
                model = future.result()
            finally:
                if future.done():  # and not interrupted
                    del self._loading[name]  # A load that failed is tried again next time.
            self._require_unchanged(name)
            self._stats.load_wait_s += time.monotonic() - started
            self._stats.teacher_loads += 1
            self._resident[name] = model
            self._sizes[name] = model.num_bytes if isinstance(model, Sized) else self._capacity
        self._resident.move_to_end(name)
        if name not in self._with_head_apart:
            model = self._resident[name]
            self._keep_head(name, model.head, model.logit_cap if isinstance(model, Capped) else None)
        return self._resident[name]

    def _start_loading(self, name: str, *, beside: str | None = None) -> Future[TeacherModel]:
        """Load a teacher in the background, into the memory of one that has to go where that can be."""
        if name not in self._loading:
            gone = self._shrink(self._capacity - self._expected(name), keep_teacher=beside, keep_one_open=True)
            self._loading[name] = self._loader.submit(
                load_within, self._teachers[name], self._device, self._capacity, into=gone
            )
        return self._loading[name]

    def _start_loading_head(self, name: str) -> None:
        teacher = self._teachers[name]
        if name not in self._loading_heads and isinstance(teacher, HasHead):
            self._loading_heads[name] = self._loader.submit(teacher.load_head, self._device)

    def _require_unchanged(self, name: str) -> None:
        """States and heads of one teacher must come from the same files, however often they are read."""
        now = self._teachers[name].fingerprint
        if self._fingerprints.setdefault(name, now) != now:
            raise RecipeError(
                f"teacher {name!r}: its files changed during the run; states of the old weights would meet a head of "
                "the new; expected files that stay; copy them, and start again with --resume"
            )

    def _expected(self, name: str) -> int:
        """Bytes a teacher will take; one not known to be smaller is taken as large as the largest."""
        if name not in self._sizes:
            teacher = self._teachers[name]
            size = teacher.num_bytes(self._device) if isinstance(teacher, Streamable) else None
            if size is None:
                return max(self._sizes.values(), default=0)
            self._sizes[name] = min(size, self._capacity)
        return self._sizes[name]

    def _load_ahead(self, name: str, *, beside: str | None) -> None:
        """Begin to load a teacher if it fits beside what must stay."""
        if name in self._resident or name in self._loading:
            return
        expected = self._expected(name)
        pinned = self._sizes[beside] if beside is not None else 0
        if pinned + expected <= self._capacity:
            self._start_loading(name, beside=beside)

    def _bring_head(self, name: str) -> str:
        """The key of a head that is in host memory now."""
        key = self._head_keys.get(self._known(name))
        if key is None or key not in self._heads:
            if name in self._with_head_apart:
                started = time.monotonic()
                self._start_loading_head(name)
                head = self._loading_heads.pop(name).result()
                self._require_unchanged(name)
                self._keep_head(name, head.weight_VE, head.logit_cap)
                self._stats.load_wait_s += time.monotonic() - started
            else:
                self._model(name)
                self._settle(name)
        key = self._head_keys[name]
        self._heads.move_to_end(key)
        self._shrink(self._capacity, keep_head=key)
        return key

    def _keep_head(self, name: str, head: torch.Tensor, cap: float | None) -> None:
        self._caps[name] = cap
        if name not in self._head_keys:
            self._head_keys[name] = content_hash(head)
        key = self._head_keys[name]
        if key not in self._heads:
            self._heads[key] = head.detach().cpu()
        self._heads.move_to_end(key)

    def _settle(self, name: str) -> None:
        """Let go of what does not fit, after a teacher was used."""
        if not isinstance(self._resident[name], Sized):
            self._resident.pop(name).close()
        self._shrink(self._capacity, keep_head=self._head_keys.get(name))

    def _used(self) -> int:
        """Bytes held: teachers, and heads that no resident teacher holds anyway."""
        lent = {self._head_keys[name] for name in self._resident if name not in self._with_head_apart}
        heads = sum(head.nbytes for key, head in self._heads.items() if key not in lent or self._device != "cpu")
        return heads + sum(self._sizes[name] for name in self._resident)

    def _shrink(
        self,
        capacity: int,
        *,
        keep_teacher: str | None = None,
        keep_head: str | None = None,
        keep_one_open: bool = False,
    ) -> TeacherModel | None:
        """Let go of what was unused longest until what is held fits into ``capacity`` bytes.

        First heads that can be read without their teachers, then teachers, then the other heads. With
        ``keep_one_open``, one of the teachers, whose tensors nobody has, is returned instead of closed.
        """
        held = self._head_keys.get(keep_teacher) if keep_teacher else None
        readable = {self._head_keys.get(name) for name in self._with_head_apart}
        heads = [key for key in self._heads if key not in (keep_head, held)]
        still_open = None
        for key in [key for key in heads if key in readable]:
            if self._used() <= capacity:
                return None
            del self._heads[key]
        for name in [name for name in self._resident if name != keep_teacher]:
            if self._used() <= capacity:
                return still_open
            model = self._resident.pop(name)
            if keep_one_open and still_open is None and name in self._with_head_apart:
                still_open = model
            else:
                model.close()
        for key in [key for key in heads if key not in readable]:
            if self._used() <= capacity:
                break
            del self._heads[key]
        return still_open


def load_within(teacher: Teacher, device: str, memory_bytes: int, *, into: TeacherModel | None = None) -> TeacherModel:
    """The teacher, to run layer by layer if its weights need more memory than that and it can.

    ``into`` is a model that is not needed any more: it becomes the teacher's if it can, or is closed.
    """
    if into is not None:
        refilled = False
        try:
            refilled = isinstance(teacher, Refilling) and teacher.refill(into, device)
        finally:
            if not refilled:
                into.close()
        if refilled:
            return into
    if isinstance(teacher, Streamable) and (teacher.num_bytes(device) or 0) > memory_bytes:
        return teacher.stream(device, memory_bytes=memory_bytes)
    return teacher.load(device)


def _each_state(model: TeacherModel, sequences: Sequence[IntArray], device: str) -> Iterator[tuple[int, torch.Tensor]]:
    """Index and states [T, E] of each sequence."""
    if isinstance(model, OnePass):
        yield from model.each_state(sequences)
        return
    for batch in length_batches([len(sequence) for sequence in sequences], device):
        yield from zip(batch, model.hidden_states([sequences[index] for index in batch]), strict=True)


def content_hash(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
