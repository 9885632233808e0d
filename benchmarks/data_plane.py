"""One optimizer step over a sample of 128k tokens and 10,000 short ones, in the memory of a small machine.

    python -m benchmarks.data_plane [--quick] [--json FILE] [--device cpu|cuda]

The per-token arrays of all samples lie in a ``LocalStore``; a step plans on light samples, loads the arrays of one
micro-batch at a time and frees them when it is over. The model is a random Llama of two layers and width 32, in
float32, so that what is measured is the way of the data and the attention over 128k tokens, not matrix products. A
[T, T] mask or score matrix would take 16 GiB a head in bfloat16 and cannot hide below the goal for the peak.

``--quick`` has a long sample of 32k tokens. Store and plan are timed on the same 10,001 samples in both forms.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import MIB, Metric, arguments, peak_resident_mib, random_tokens, report, seconds
from posttrain.config import GRPO, Optim
from posttrain.learner.learner import Learner
from posttrain.learner.objectives import GrpoObjective
from posttrain.learner.packing import fill, plan_micro_batches
from posttrain.protocols import ArrayRef
from posttrain.rollout.local_store import LocalRef, LocalStore
from posttrain.types import Sample

NUM_SHORT, SHORT_TOKENS = 10_000, 32
LONG_TOKENS, QUICK_LONG_TOKENS = 131_072, 32_768
BUDGET = 8192
PROMPT = 8
VOCABULARY = 263


class WatchedStore:
    """A ``LocalStore`` that knows how many bytes of its arrays are in use at once."""

    def __init__(self) -> None:
        self.store = LocalStore()
        self.used_bytes = self.peak_bytes = self.put_bytes = 0

    def put(self, arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRef:
        self.put_bytes += sum(array.nbytes for array in arrays.values())
        return WatchedRef(self, self.store.put(arrays))

    def watch(self, array: npt.NDArray[Any]) -> None:
        self._add(array.nbytes)
        weakref.finalize(array, self._add, -array.nbytes)

    def _add(self, num_bytes: int) -> None:
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)


class WatchedRef:
    def __init__(self, watcher: WatchedStore, ref: LocalRef) -> None:
        self._watcher, self._ref = watcher, ref

    def load(self) -> Mapping[str, npt.NDArray[Any]]:
        arrays = self._ref.load()
        for array in arrays.values():
            self._watcher.watch(array)
        return arrays

    def free(self) -> None:
        self._ref.free()


def make_samples(store: WatchedStore, long_tokens: int) -> list[Sample]:
    """Ten thousand short samples around a long one."""
    rng = np.random.default_rng(0)
    lengths = [SHORT_TOKENS] * NUM_SHORT
    lengths.insert(NUM_SHORT // 2, long_tokens)
    return [
        Sample(
            id=f"sample-{index}",
            task_id=f"task-{index}",
            domain="math",
            tokens=random_tokens(rng, length, VOCABULARY, prompt=PROMPT).put_in(store),
            advantage=float(rng.normal()),
        )
        for index, length in enumerate(lengths)
    ]


def new_learner(device: str) -> Learner:
    torch.manual_seed(0)
    with torch.device(device):
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
    return Learner(model, optim=Optim(learning_rate=1e-4), num_steps=100, tokens_per_micro_batch=BUDGET)


def timed_step(learner: Learner, samples: Sequence[Sample], objective: GrpoObjective) -> tuple[float, dict[str, float]]:
    """Seconds and metrics of one update, after which the samples' arrays are freed."""
    started = time.perf_counter()
    metrics = learner.update(samples, objective)
    for sample in samples:
        sample.tokens.free()
    return time.perf_counter() - started, metrics


def main() -> None:
    options = arguments(__doc__).parse_args()
    long_tokens = QUICK_LONG_TOKENS if options.quick else LONG_TOKENS
    store = WatchedStore()
    samples = make_samples(store, long_tokens)
    costs = store_costs([sample.load().parts() for sample in samples])
    store.peak_bytes = 0
    plan_s = seconds(lambda: plan_micro_batches(samples, BUDGET), "cpu", repeats=5)
    held_mib = store.store.num_bytes / MIB
    objective = GrpoObjective(config=GRPO(), max_completion_tokens=long_tokens)
    step_s, metrics = timed_step(new_learner(options.device), samples, objective)
    long_s = step_s - short_seconds(options.device, objective)
    report(
        f"data plane, one sample of {long_tokens} tokens and {NUM_SHORT} of {SHORT_TOKENS}, {options.device}",
        [
            Metric("peak_mib", peak_resident_mib(), "MiB", "<= 4096"),
            Metric("step_seconds", step_s, "s", ""),
            Metric("long_sample_seconds", long_s, "s", ""),
            Metric("plan_ms", plan_s * 1e3, "ms", ""),
            Metric("micro_batches", metrics["micro_batches"], "", ""),
            Metric("packing_fill", fill(plan_micro_batches(samples, BUDGET), BUDGET), "share", ""),
            Metric("arrays_put", store.put_bytes / MIB, "MiB", ""),
            Metric("arrays_held_in_store", held_mib, "MiB", ""),
            Metric("arrays_resident_at_peak", store.peak_bytes / MIB, "MiB", ""),
            Metric("arrays_held_after_step", store.store.num_bytes / MIB, "MiB", ""),
            *costs,
        ],
        options.json,
        device=options.device,
    )


def store_costs(arrays: Sequence[Mapping[str, npt.NDArray[Any]]]) -> list[Metric]:
    """What a ``LocalStore`` that nobody watches takes per sample."""
    store = LocalStore()
    times = [time.perf_counter()]
    refs = [store.put(each) for each in arrays]
    times.append(time.perf_counter())
    for ref in refs:
        ref.load()
    times.append(time.perf_counter())
    for ref in refs:
        ref.free()
    times.append(time.perf_counter())
    return [
        Metric(f"{verb}_us", (end - start) / len(arrays) * 1e6, "us/sample", "")
        for verb, start, end in zip(("put", "load", "free"), times[:-1], times[1:], strict=True)
    ]


def short_seconds(device: str, objective: GrpoObjective) -> float:
    """Seconds of a step over the short samples alone."""
    store = WatchedStore()
    shorts = [sample for sample in make_samples(store, 2 * SHORT_TOKENS) if len(sample) == SHORT_TOKENS]
    return timed_step(new_learner(device), shorts, objective)[0]


if __name__ == "__main__":
    main()
