"""The pool: each teacher loaded once, only loss positions kept, heads shared by content, memory bounded."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.protocols import TeacherModel
from posttrain.types import IntArray, Sample, TokenArrays, Tokens
from teachers.batching import length_batches, packed_rows
from teachers.cache import FileStore, MemoryStore
from teachers.logits import OutputHead
from teachers.pool import TeacherPool

MIB = 2**20
VOCAB = 11


@dataclass
class FakeModel:
    """A "language model" whose state is a running sum of embeddings."""

    embedding: torch.Tensor
    head: torch.Tensor
    num_bytes: int
    events: list[str]
    name: str

    def hidden_states(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        self.events.append(f"run {self.name}")
        return [self.embedding[torch.as_tensor(ids, dtype=torch.long)].cumsum(0) for ids in sequences]

    def close(self) -> None:
        self.events.append(f"close {self.name}")


@dataclass(frozen=True)
class FakeTeacher:
    name: str
    events: list[str] = field(compare=False)
    width: int = 4
    head_seed: int = 0
    num_bytes: int = MIB
    started: threading.Event = field(default_factory=threading.Event, compare=False)

    @property
    def fingerprint(self) -> str:
        return self.name

    def load(self, device: str) -> FakeModel:
        self.started.set()
        self.events.append(f"load {self.name}")
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        head = torch.randn(VOCAB, self.width, generator=torch.Generator().manual_seed(self.head_seed))
        embedding = torch.randn(VOCAB, self.width, generator=generator)
        return FakeModel(embedding, head, self.num_bytes, self.events, self.name)


def sample(index: int, teacher: str | None, length: int = 6, loss: Sequence[int] = (2, 3, 5)) -> Sample:
    mask = np.zeros(length, dtype=np.bool_)
    mask[list(loss)] = True
    arrays = TokenArrays.unsampled(((np.arange(length) * (index + 1)) % VOCAB).astype(np.int32))
    tokens = Tokens.of(replace(arrays, loss_mask=mask))
    return Sample(id=f"s{index}", task_id="t", domain="d", tokens=tokens, teacher=teacher)


def loads(events: Sequence[str]) -> list[str]:
    return [event for event in events if event.startswith("load")]


def test_states_are_those_that_predict_the_loss_tokens() -> None:
    teacher = FakeTeacher("math", [])
    store, one = MemoryStore(), sample(3, "math")
    with TeacherPool({"math": teacher}, memory_mb=64) as pool:
        stats = pool.cache_states([one], store)
    full = teacher.load("cpu").hidden_states([one.load().token_ids])[0]
    assert torch.equal(store.get("s3"), torch.stack([full[1], full[2], full[4]]).bfloat16())
    assert (stats.tokens, stats.bytes_cached, stats.teacher_loads) == (6, 3 * 4 * 2, 1)


def test_the_sequences_of_a_rollout_that_began_anew_are_read_apart() -> None:
    teacher, store, one = FakeTeacher("math", []), MemoryStore(), sample(3, "math")
    anew = replace(one.load(), starts=np.array([0, 4], np.int32))
    with TeacherPool({"math": teacher}, memory_mb=64) as pool:
        pool.cache_states([replace(one, tokens=Tokens.of(anew))], store)
    first, second = teacher.load("cpu").hidden_states(np.split(anew.token_ids, [4]))
    assert torch.equal(store.get("s3"), torch.stack([first[1], first[2], second[0]]).bfloat16())


def test_samples_without_loss_tokens_get_empty_states() -> None:
    store = MemoryStore()
    with TeacherPool({"math": FakeTeacher("math", [])}, memory_mb=64) as pool:
        pool.cache_states([sample(0, "math", loss=())], store)
    assert store.get("s0").shape == (0, 4)


def test_each_teacher_is_loaded_once_per_pass_however_samples_are_mixed() -> None:
    events: list[str] = []
    teachers = {name: FakeTeacher(name, events, num_bytes=2 * MIB) for name in "abc"}
    store = MemoryStore()
    with TeacherPool(teachers, memory_mb=1) as pool:
        stats = pool.cache_states([sample(i, "abc"[i % 3]) for i in range(12)], store)
        assert sorted(loads(events)) == ["load a", "load b", "load c"]
        assert stats.teacher_loads == 3
        assert all(store.get(f"s{i}").shape == (3, 4) for i in range(12))


def test_teachers_that_fit_stay_and_those_that_do_not_are_closed() -> None:
    events: list[str] = []
    small = {name: FakeTeacher(name, events, num_bytes=MIB) for name in "ab"}
    samples = [sample(0, "a"), sample(1, "b")]
    with TeacherPool(small, memory_mb=8) as pool:
        assert pool.cache_states(samples, MemoryStore()).teacher_loads == 2
        assert pool.cache_states(samples, MemoryStore()).teacher_loads == 0
        assert not [event for event in events if event.startswith("close")]
    assert sorted(event for event in events if event.startswith("close")) == ["close a", "close b"]

    events.clear()
    big = {name: FakeTeacher(name, events, num_bytes=9 * MIB) for name in "ab"}
    with TeacherPool(big, memory_mb=8) as pool:
        pool.cache_states(samples, MemoryStore())
        assert events == ["load a", "run a", "close a", "load b", "run b", "close b"]


def test_the_least_recently_used_teacher_leaves_first() -> None:
    events: list[str] = []
    teachers = {name: FakeTeacher(name, events, num_bytes=3 * MIB) for name in "abc"}
    with TeacherPool(teachers, memory_mb=7) as pool:
        for index, name in enumerate("abac"):
            pool.cache_states([sample(index, name)], MemoryStore())
        assert [event for event in events if event.startswith("close")] == ["close b"]


def test_the_next_teacher_loads_while_one_runs() -> None:
    events: list[str] = []
    second = FakeTeacher("b", events)

    @dataclass
    class Waiting(FakeModel):
        def hidden_states(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
            assert second.started.wait(timeout=30), "the second teacher never began to load"
            return super().hidden_states(sequences)

    class WaitingTeacher(FakeTeacher):
        def load(self, device: str) -> FakeModel:
            return Waiting(**vars(super().load(device)))

    with TeacherPool({"a": WaitingTeacher("a", events), "b": second}, memory_mb=64) as pool:
        stats = pool.cache_states([sample(0, "a"), sample(1, "b")], MemoryStore())
    assert stats.teacher_loads == 2


def test_a_failed_load_is_reported_and_tried_again() -> None:
    class Flaky(FakeTeacher):
        def load(self, device: str) -> FakeModel:
            if not self.started.is_set():
                self.started.set()
                raise OSError("storage is away")
            return super().load(device)

    with TeacherPool({"a": Flaky("a", [])}, memory_mb=64) as pool:
        with pytest.raises(OSError, match="storage is away"):
            pool.cache_states([sample(0, "a")], MemoryStore())
        assert pool.cache_states([sample(0, "a")], MemoryStore()).teacher_loads == 1


@dataclass(frozen=True)
class Refilled(FakeTeacher):
    """Can be read into another's model, or cannot, or fails at it."""

    result: bool | Exception = True
    asked: list[str] = field(default_factory=list, compare=False)

    @property
    def fingerprint(self) -> str:
        self.asked.append("fingerprint")
        return self.name

    def load_head(self, device: str) -> OutputHead:
        model = self.load(device)
        return OutputHead(weight_VE=model.head, logit_cap=None)

    def refill(self, model: TeacherModel, device: str) -> bool:
        assert isinstance(model, FakeModel)
        self.events.append(f"refill {model.name} with {self.name}")
        if isinstance(self.result, Exception):
            raise self.result
        if self.result:
            own = super().load(device)
            model.embedding, model.head, model.name = own.embedding, own.head, own.name
            self.events.pop()
        return self.result


def test_a_teacher_that_must_go_lends_its_memory_to_the_next() -> None:
    events: list[str] = []
    teachers = {name: Refilled(name, events, result=name != "d") for name in "abcd"}
    with TeacherPool(teachers, memory_mb=2) as pool:
        store = MemoryStore()
        stats = pool.cache_states([sample(index, name) for index, name in enumerate("abcd")], store)
        for index, name in enumerate("abcd"):
            expected = teachers[name].load("cpu").hidden_states([sample(index, name).load().token_ids])[0]
            assert torch.equal(store.get(f"s{index}"), expected[[1, 2, 4]].bfloat16())
    assert stats.teacher_loads == 4
    done = [event for event in events[: events.index("run d") + 1] if not event.startswith("run")]
    assert done == ["load a", "load b", "refill a with c", "refill b with d", "close b", "load d"]


def test_a_model_whose_memory_was_half_overwritten_is_closed() -> None:
    events: list[str] = []
    teachers = {name: Refilled(name, events) for name in "ab"}
    teachers["c"] = Refilled("c", events, result=OSError("storage is away"))
    with TeacherPool(teachers, memory_mb=2) as pool:
        with pytest.raises(OSError, match="storage is away"):
            pool.cache_states([sample(index, name) for index, name in enumerate("abc")], MemoryStore())
        assert [event for event in events if event.startswith("close")] == ["close a"]


def test_what_a_pool_asks_of_its_teachers_grows_with_their_number_only() -> None:
    """Each fingerprint is a look at a folder."""
    asked: list[str] = []
    count = 20
    names = [f"t{index:02}" for index in range(count)]
    teachers = {name: Refilled(name, [], head_seed=index, asked=asked) for index, name in enumerate(names)}
    with TeacherPool(teachers, memory_mb=2) as pool:
        pool.cache_states([sample(index, name) for index, name in enumerate(names)], MemoryStore())
        for name in names:
            pool.head(name)
    assert len(asked) <= 4 * count


def test_heads_with_equal_content_are_one_and_never_swap() -> None:
    teachers = {"a": FakeTeacher("a", []), "b": FakeTeacher("b", []), "c": FakeTeacher("c", [], head_seed=1)}
    with TeacherPool(teachers, memory_mb=64) as pool:
        assert pool.head("a") is pool.head("b")
        assert pool.stats.head_loads == 1
        assert not torch.equal(pool.head("c"), teachers["a"].load("cpu").head)
        assert torch.equal(pool.head("a"), teachers["a"].load("cpu").head)
        assert pool.stats.head_loads == 3


def test_heads_outlive_their_teachers_and_are_loaded_ahead_on_request() -> None:
    events: list[str] = []
    teachers = {name: FakeTeacher(name, events, num_bytes=9 * MIB, head_seed=ord(name)) for name in "ab"}
    with TeacherPool(teachers, memory_mb=10) as pool:
        pool.cache_states([sample(0, "a"), sample(1, "b")], MemoryStore())
        for name in "abab":
            pool.head(name)
        assert pool.stats.teacher_loads == 2

    other = {"a": FakeTeacher("a", [])}
    with TeacherPool(other, memory_mb=64) as pool:
        pool.prefetch_head("a")
        assert other["a"].started.wait(timeout=30)
        pool.head("a")
        assert pool.stats.teacher_loads == 1


def test_unknown_teachers_are_named() -> None:
    with TeacherPool({"a": FakeTeacher("a", [])}, memory_mb=64) as pool:
        with pytest.raises(ValueError, match=r"'s0'.*'x'.*\['a'\]"):
            pool.cache_states([sample(0, "x")], MemoryStore())
        with pytest.raises(ValueError, match="None"):
            pool.cache_states([sample(0, None)], MemoryStore())
        with pytest.raises(KeyError, match="'x'"):
            pool.head("x")


def test_length_batches_cover_everything_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 1, 20, 4]
    batches = list(length_batches(lengths, max_tokens=20))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches[0] == [1]  # longer than the budget: alone
    assert all(len(batch) * lengths[batch[0]] <= 20 for batch in batches[1:])


def test_a_batch_with_enough_tokens_ends_before_a_much_shorter_sequence() -> None:
    lengths = [40, 100, 95, 90, 100, 100]
    assert list(length_batches(lengths, max_tokens=10**6)) == [[1, 4, 5, 2], [3, 0]]
    assert list(length_batches(lengths, "cuda:0", max_tokens=10**6)) == [[1, 4, 5, 2, 3, 0]]


def test_packed_rows_cover_everything_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 1, 20, 4]
    assert list(packed_rows(lengths, max_tokens=20)) == [[1], [5], [2, 3, 6], [0, 4]]


@pytest.mark.parametrize("durable", [True, False])
def test_no_sample_is_read_twice_unless_its_teacher_or_its_tokens_changed(durable: bool, tmp_path: Path) -> None:
    events: list[str] = []
    teachers = {name: FakeTeacher(name, events) for name in "ab"}
    samples = [sample(0, "a"), sample(1, "b"), sample(2, "b")]
    stores = [FileStore(tmp_path) for _ in range(2)] if durable else [MemoryStore()] * 2
    with TeacherPool(teachers, memory_mb=64) as pool:
        first = pool.cache_states(samples[:2], stores[0])
    events.clear()
    changed = {**teachers, "a": FakeTeacher("a, trained on", events)}
    with TeacherPool(changed, memory_mb=64) as pool:
        again = pool.cache_states(samples, stores[1])
        assert sorted(loads(events)) == ["load a, trained on", "load b"]
        assert (again.samples_found, again.tokens) == (1, 12)
        assert again.bytes_cached == first.bytes_cached // 2 * 3
        other_tokens = replace(samples[1], tokens=sample(7, "b").tokens)
        other_mask = replace(samples[2], tokens=sample(2, "b", loss=(3, 4)).tokens)
        assert pool.cache_states([samples[0], other_tokens, other_mask], stores[1]).tokens == 12
