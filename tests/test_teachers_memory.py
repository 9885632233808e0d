"""A teacher with four times the allowed weights, in a process that the kernel would not let hold them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.types import Sample, TokenArrays, Tokens
from teachers.cache import FileStore
from teachers.pool import TeacherPool
from teachers.sources import HFTeacher

MIB = 2**20
MEMORY_MB = 38
CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=9,
    num_attention_heads=8,
    tie_word_embeddings=True,
    initializer_range=0.05,
)
SLACK_MIB = 72
"""For activations and for what torch and Python allocate beside the weights."""


def samples() -> list[Sample]:
    generator = np.random.default_rng(0)
    made = []
    for index, length in enumerate((40, 64, 25)):
        arrays = TokenArrays.unsampled(generator.integers(0, CONFIG.vocab_size, length).astype(np.int32))
        tokens = Tokens.of(replace(arrays, loss_mask=np.arange(length) >= 10))
        made.append(Sample(id=f"s{index}", task_id="t", domain="d", tokens=tokens, teacher="big"))
    return made


def cache(checkpoint: str, states: str, memory_mb: int) -> None:
    """What the child does: load all code first, then run the pool with little memory beyond what is taken."""
    warm = LlamaForCausalLM(LlamaConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1))
    warm(torch.zeros(1, 4, dtype=torch.long))
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = taken + (MEMORY_MB + SLACK_MIB) * MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with TeacherPool({"big": HFTeacher(checkpoint, "float32")}, memory_mb=memory_mb) as pool:
        stats = pool.cache_states(samples(), FileStore(states))
        print(json.dumps({"tokens": stats.tokens, "head": list(pool.head("big").shape)}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("big")
    torch.manual_seed(0)
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return str(folder)


def run(checkpoint: str, states: Path, memory_mb: int) -> subprocess.CompletedProcess[str]:
    code = f"from tests.test_teachers_memory import cache; cache({checkpoint!r}, {str(states)!r}, {memory_mb})"
    # The limit counts address space. Each thread's own heap would take 64 MiB of it for a few KiB, and weights that are
    # freed within a heap, where malloc puts even large blocks after a while, would not make it smaller.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_it_runs_where_loading_it_whole_is_out_of_memory(checkpoint: str, tmp_path: Path) -> None:
    source = HFTeacher(checkpoint, "float32")
    assert (source.num_bytes("cpu") or 0) >= 4 * MEMORY_MB * MIB
    done = run(checkpoint, tmp_path / "streamed", MEMORY_MB)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"tokens": 129, "head": [4096, 512]}
    whole = FileStore(tmp_path / "whole")
    with TeacherPool({"big": source}, memory_mb=1024) as pool:
        pool.cache_states(samples(), whole)
    for sample in samples():
        streamed, expected = FileStore(tmp_path / "streamed").get(sample.id), whole.get(sample.id)
        torch.testing.assert_close(streamed, expected, rtol=2**-7, atol=1e-4)  # rounded to bfloat16

    refused = run(checkpoint, tmp_path / "refused", 1024)
    assert refused.returncode != 0
    assert "MemoryError" in refused.stderr or "allocate memory" in refused.stderr, refused.stderr


class AtOnce(Executor):
    """A reader that is as fast as can be: it has read when it is asked."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def test_a_layer_is_let_go_before_the_next_but_one_is_read(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = HFTeacher(checkpoint, "float32").stream("cpu", memory_bytes=MEMORY_MB * MIB)
    read, in_memory, most = teacher._read, weakref.WeakValueDictionary[int, torch.Tensor](), []

    def watched(layer: int) -> dict[str, torch.Tensor]:
        most.append(len(in_memory))
        weights = read(layer)
        in_memory[layer] = next(iter(weights.values()))
        return weights

    monkeypatch.setattr(teacher, "_read", watched)
    monkeypatch.setattr(teacher, "_reader", AtOnce())
    teacher.hidden_states([np.arange(40, dtype=np.int32)])
    assert most == [0] + [1] * (CONFIG.num_hidden_layers - 1)
    teacher.close()
