"""A distillation step with twelve teachers against one, on the same tokens.

    python -m benchmarks.opd_teachers [--quick] [--json FILE] [--device cpu|cuda]

The student and the teachers are checkpoints of one shape with random weights, written for the occasion. A step is
what ``posttrain.stages.distill`` does after the rollouts: the teachers read their samples, the learner makes one
update. Each count of teachers gets a pool and a learner of its own; the pool holds one teacher at work and one loading.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import MIB, Metric, PeakMemory, arguments, random_tokens, report, seconds
from posttrain.config import Distill, Optim
from posttrain.learner.distillation import DistillObjective
from posttrain.learner.learner import Learner
from posttrain.types import Sample
from teachers.cache import MemoryStore
from teachers.library import SwapOnDemand
from teachers.pool import TeacherPool
from teachers.sources import HFTeacher

CONFIG = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49_152,
    tie_word_embeddings=True,
)
SMALL_CONFIG = LlamaConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=16_384,
    tie_word_embeddings=True,
)
BUDGET_IN_TEACHERS = 2


def make_samples(count: int, vocabulary: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            id=f"sample-{index}",
            task_id=f"task-{index}",
            domain="math",
            tokens=random_tokens(rng, length, vocabulary, prompt=16),
        )
        for index, length in enumerate(rng.integers(40, 80, count))
    ]


def write_checkpoint(config: LlamaConfig, folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


class Step:
    """One distillation step over ``count`` teachers, again and again."""

    def __init__(self, config: LlamaConfig, folder: Path, count: int, samples: list[Sample], device: str) -> None:
        teachers = {f"teacher-{index:03}": HFTeacher(str(folder / f"{index}")) for index in range(count)}
        names = sorted(teachers)
        self._samples = [replace(sample, teacher=names[i % count]) for i, sample in enumerate(samples)]
        self._store = MemoryStore()
        model = LlamaForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
        teacher_mib = model.num_parameters() * 2 / MIB
        self._pool = TeacherPool(teachers, memory_mb=int(BUDGET_IN_TEACHERS * teacher_mib), device=device)
        self._learner = Learner(
            model,
            optim=Optim(learning_rate=1e-5),
            num_steps=1000,
            tokens_per_micro_batch=2048,
            dtype=torch.bfloat16,
        )
        distill = Distill(teachers=SwapOnDemand())
        self._objective = DistillObjective(config=distill, states=self._store, head_of=self._pool.head)

    def __call__(self) -> None:
        self._pool.cache_states(self._samples, self._store)
        self._learner.update(self._samples, self._objective)
        self._store.free(sample.id for sample in self._samples)

    @property
    def head_loads(self) -> int:
        return self._pool.stats.head_loads

    def close(self) -> None:
        self._pool.close()
        self._learner.close()
        gc.collect()


def main() -> None:
    options = arguments(__doc__).parse_args()
    config = SMALL_CONFIG if options.quick else CONFIG
    counts = [1, 12] if options.quick else [1, 12, 100]
    samples = make_samples(100 if options.quick else 200, config.vocab_size)
    console = Console(width=110)
    taken: dict[int, float] = {}
    peaks: dict[int, float] = {}
    heads: dict[int, int] = {}
    with tempfile.TemporaryDirectory(prefix="posttrain-benchmark-") as name:
        folder = Path(name)
        write_checkpoint(config, folder / "student", seed=1000)
        for index in range(max(counts)):
            write_checkpoint(config, folder / str(index), seed=index)
        for count in counts:
            peak = PeakMemory(options.device)
            step = Step(config, folder, count, samples, options.device)
            taken[count] = seconds(step, options.device, repeats=3)
            before = step.head_loads
            step()
            heads[count], peaks[count] = step.head_loads - before, peak.mib()
            step.close()
            console.print(f"{count} teachers: {taken[count]:.2f} s, {heads[count]} heads, {peaks[count]:,.0f} MiB")
    metrics = [
        Metric("step_ratio_12", taken[12] / taken[1], "ratio", "<= 1.1"),
        Metric("step_1", taken[1], "s", ""),
        Metric("step_12", taken[12], "s", ""),
        Metric("head_loads_12", heads[12], "per step", "<= 12"),
        Metric("peak_ratio_12", peaks[12] / peaks[1], "ratio", "<= 1.1"),
        Metric("peak_12", peaks[12], "MiB", ""),
    ]
    if 100 in taken:
        metrics.append(Metric("step_ratio_100", taken[100] / taken[1], "ratio", ""))
        metrics.append(Metric("peak_ratio_100", peaks[100] / peaks[1], "ratio", "<= 1.1"))
    tokens = sum(len(sample) for sample in samples)
    report(f"opd_teachers, {tokens:,} tokens a step", metrics, options.json, device=options.device)


if __name__ == "__main__":
    main()
