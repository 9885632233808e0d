"""A distillation step with twelve teachers against one, on the same tokens.

    python -m benchmarks.opd_teachers [--quick] [--json FILE] [--device cpu|cuda]

The student and the teachers are checkpoints of one shape with random weights, written for the occasion. A step is
what ``posttrain.stages.distill`` does after the rollouts: the teachers read their samples and leave the states in
files, and the learner makes one update. Each count of teachers gets a pool and a learner of its own; the pool has
memory for one teacher at work and one loading.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import MIB, Metric, PeakMemory, arguments, random_tokens, report, seconds
from posttrain.config import Distill, Optim
from posttrain.learner.distillation import DistillSpec
from posttrain.learner.learner import Learner
from posttrain.types import Sample
from teachers.library import SwapOnDemand
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


@contextmanager
def open_step(folder: Path, count: int, samples: list[Sample], device: str) -> Iterator[Callable[[], dict[str, float]]]:
    """One distillation step over ``count`` teachers, to be made again and again; it returns its metrics."""
    teachers = {f"teacher-{index:03}": HFTeacher(str(folder / f"{index}")) for index in range(count)}
    names = sorted(teachers)
    samples = [replace(sample, teacher=names[i % count]) for i, sample in enumerate(samples)]
    model = LlamaForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    memory_mb = int(BUDGET_IN_TEACHERS * model.num_parameters() * 2 / MIB)
    spec = DistillSpec(
        config=Distill(teachers=SwapOnDemand(memory_mb=memory_mb, device=device)),
        teachers=teachers,
        student_path=str(folder / "student"),
        probes={},
        folder=folder / f"states-{count}",
    )
    learner = Learner(
        model,
        optim=Optim(learning_rate=1e-5),
        num_steps=1000,
        tokens_per_micro_batch=2048,
        dtype=torch.bfloat16,
    )
    objective = learner.open_objective(spec, check=False)
    try:
        yield lambda: learner.update(samples, objective)
    finally:
        learner.close()


def main() -> None:
    options = arguments(__doc__).parse_args()
    config = SMALL_CONFIG if options.quick else CONFIG
    counts = [1, 12] if options.quick else [1, 12, 100]
    samples = make_samples(200, config.vocab_size)
    console = Console(width=110)
    taken: dict[int, float] = {}
    peaks: dict[int, float] = {}
    heads: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="posttrain-benchmark-") as name:
        folder = Path(name)
        write_checkpoint(config, folder / "student", seed=1000)
        for index in range(max(counts)):
            write_checkpoint(config, folder / str(index), seed=index)
        for count in counts:
            peak = PeakMemory(options.device)
            with open_step(folder, count, samples, options.device) as step:
                taken[count] = seconds(step, options.device, repeats=1 if options.quick else 2)
                heads[count] = step()["teacher/head_loads"]
                peaks[count] = peak.mib()
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
