"""Packing and packed attention: nothing is padded, nothing is lost, and segments do not see each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from posttrain.errors import RecipeError
from posttrain.learner.attention import packed_attention, use_packed_attention
from posttrain.learner.packing import PackedBatch, Totals, divide_over_ranks, plan_micro_batches
from posttrain.types import Sample, TokenArrays, Tokens

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def sample(
    name: str, length: int, *, teacher: str | None = None, seed: int = 0, starts: Sequence[int] | None = None
) -> Sample:
    rng = np.random.default_rng([seed, length])
    mask = rng.random(length) < 0.6
    mask[list(starts or [0])] = False
    arrays = TokenArrays(
        token_ids=rng.integers(0, 50, length).astype(np.int32),
        loss_mask=mask,
        logprobs=np.where(mask, -rng.random(length), np.nan).astype(np.float32),
        versions=np.zeros(length, np.int32),
        starts=None if starts is None else np.array(starts, np.int32),
    )
    return Sample(
        id=name, task_id=name, domain="math", tokens=Tokens.of(arrays), advantage=float(length), teacher=teacher
    )


def tiny_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SIZES))
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    budget=st.integers(1, 64),
    teachers=st.lists(st.sampled_from([None, "a", "b"]), min_size=30, max_size=30),
)
def test_plan_keeps_every_sample_once_within_the_budget(
    lengths: list[int], budget: int, teachers: list[str | None]
) -> None:
    samples = [sample(f"s{i}", n, teacher=teachers[i]) for i, n in enumerate(lengths)]
    plan = plan_micro_batches(samples, budget)
    assert sorted(s.id for members in plan for s in members) == sorted(s.id for s in samples)
    for members in plan:
        assert sum(map(len, members)) <= budget or len(members) == 1
    names = [sample.teacher or "" for members in plan for sample in members]
    assert names == sorted(names)
    assert plan == plan_micro_batches(samples[::-1], budget)
    # Best-fit leaves at most one micro-batch per teacher half empty.
    half_empty = [members for members in plan if sum(map(len, members)) * 2 <= budget]
    assert len(half_empty) <= len(set(names))


def test_teachers_of_few_samples_share_micro_batches() -> None:
    samples = [sample(f"s{i}", 10, teacher=f"teacher-{i % 50:02}") for i in range(100)]
    plan = plan_micro_batches(samples, 100)
    assert [len(members) for members in plan] == [10] * 10
    batch = PackedBatch.collate(plan[0])
    runs = list(batch.runs(lambda sample: sample.teacher))
    assert [(name, len(mine)) for name, mine, _ in runs] == [(f"teacher-{i:02}", 2) for i in range(5)]
    for _, mine, rows in runs:
        assert batch.targets[rows].tolist() == PackedBatch.collate(mine).targets.tolist()


def test_a_plan_of_many_samples_is_quick_and_tight_and_reads_no_arrays() -> None:
    lengths = np.random.default_rng(0).integers(1, 4096, 30_000).tolist()
    light = Tokens(num_tokens=1, num_loss_tokens=1, version_range=(0, 0), source=None)
    samples = [
        Sample(id=f"s{i}", task_id="t", domain="d", tokens=replace(light, num_tokens=n)) for i, n in enumerate(lengths)
    ]
    started = time.perf_counter()
    plan = plan_micro_batches(samples, 8192)
    # Looking at every micro-batch for every sample takes tens of seconds.
    assert time.perf_counter() - started < 3
    assert sum(lengths) > 0.99 * 8192 * len(plan)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("counts", [[40], [30, 9, 1], [2] * 12, [1, 0, 0, 50, 3], [1]])
def test_ranks_get_equal_tokens_and_few_teachers(num_ranks: int, counts: list[int]) -> None:
    rng = np.random.default_rng(1)
    light = Tokens(num_tokens=1, num_loss_tokens=1, version_range=(0, 0), source=None)
    samples = [
        Sample(
            id=f"s{teacher}-{i}",
            task_id="t",
            domain="d",
            teacher=f"teacher-{teacher}",
            tokens=replace(light, num_tokens=int(rng.integers(1, 500))),
        )
        for teacher, count in enumerate(counts)
        for i in range(count)
    ]
    shares = divide_over_ranks(samples, num_ranks)
    assert sorted(each.id for share in shares for each in share) == sorted(each.id for each in samples)
    tokens, longest = [sum(map(len, share)) for share in shares], max(map(len, samples))
    assert max(tokens) - sum(tokens) / num_ranks <= longest
    visits = sum(len({each.teacher for each in share}) for share in shares)
    assert visits <= len({each.teacher for each in samples}) + num_ranks - 1
    assert divide_over_ranks(samples[::-1], num_ranks) == shares


def test_collate_points_each_loss_token_at_its_predecessor() -> None:
    # The row goes from the longest to the shortest, loss tokens go as the samples do.
    samples = [sample("b", 5), sample("a", 9), sample("c", 5, seed=1)]
    batch = PackedBatch.collate(samples)
    assert batch.cu_seqlens.tolist() == [0, 9, 14, 19]
    assert batch.position_ids.tolist() == [*range(9), *range(5), *range(5)]
    assert batch.segment_lengths == (9, 5, 5)
    expected = [
        (start + t - 1, int(arrays.token_ids[t]), float(arrays.logprobs[t]), index)
        for index, (arrays, start) in enumerate(zip([s.load() for s in samples], (9, 0, 14), strict=True))
        for t in range(len(arrays))
        if arrays.loss_mask[t]
    ]
    found = zip(
        batch.loss_positions.tolist(),
        batch.targets.tolist(),
        batch.behaviour_logprobs.tolist(),
        batch.segment_ids.tolist(),
        strict=True,
    )
    assert list(found) == expected
    assert batch.advantages.tolist() == [5.0, 9.0, 5.0]
    assert Totals.of(samples) == Totals(num_samples=3, num_loss_tokens=len(expected))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packed_states_and_gradients_equal_those_of_each_sample_alone(kind: str) -> None:
    anew = sample("f", 21, starts=[0, 9, 12])
    samples = [sample("a", 17), sample("b", 9), anew, sample("c", 9, seed=1), sample("d", 1), sample("e", 30)]
    row_order = sorted(samples, key=len, reverse=True)
    sequences = [part for s in row_order for part in np.split(s.load().token_ids, np.cumsum(s.load().lengths)[:-1])]
    alone, packed = tiny_model(kind), tiny_model(kind)
    use_packed_attention(packed)
    batch = PackedBatch.collate(samples)
    direction = torch.randn(len(batch.token_ids), 32, generator=torch.Generator().manual_seed(1))

    assert batch.segment_lengths == (30, 9, 3, 9, 17, 9, 9, 1)
    assert batch.segment_ids.max() == len(samples) - 1
    states = [alone.get_decoder()(torch.tensor(part[None])).last_hidden_state[0] for part in sequences]
    row = packed.get_decoder()(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        segment_lengths=batch.segment_lengths,
        use_cache=False,
    ).last_hidden_state[0]
    torch.testing.assert_close(row, torch.cat(states), atol=1e-5, rtol=1e-5)

    (torch.cat(states) * direction).sum().backward()
    (row * direction).sum().backward()
    for (name, expected), found in zip(
        alone.get_decoder().named_parameters(), packed.get_decoder().parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_attention_over_a_long_segment_has_no_square_matrix(num_key_heads: int, dtype: torch.dtype) -> None:
    query = torch.randn(1, 4, 8192, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(1, num_key_heads, 8192, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
    before = memory_peak()
    output, _ = packed_attention(torch.nn.Identity(), query, key, value, None)
    output.float().square().sum().backward()
    assert key.grad is not None
    # One matrix of 8192 x 8192 truth values is 64 MiB; one of scores is four times that a head.
    assert memory_peak() - before < 48 << 20


def memory_peak() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


def test_packed_attention_refuses_what_it_does_not_compute() -> None:
    module, row = torch.nn.Identity(), torch.randn(1, 2, 6, 4)
    for arguments, error, message in (
        ({"segment_lengths": (2, 3)}, ValueError, "add up"),
        ({"segment_lengths": (2, 4), "softcap": 30.0}, RecipeError, "softcap"),
        ({"segment_lengths": (2, 4), "sliding_window": 3}, RecipeError, "window is 3 tokens and a sample has 4"),
    ):
        with pytest.raises(error, match=message):
            packed_attention(module, row, row, row, None, **arguments)
    with pytest.raises(ValueError, match="2 rows"):
        packed_attention(module, row.repeat(2, 1, 1, 1), row, row, None)
    output, _ = packed_attention(module, row, row, row, None, segment_lengths=(2, 4), sliding_window=4)
    assert output.shape == (1, 6, 2, 4)
