"""A distillation step with twelve teachers against one, on the same tokens.

    python -m benchmarks.opd_teachers [--quick] [--json FILE] [--device cpu|cuda]

The student and the teachers are checkpoints of one shape with random weights, written for the occasion. A step is
what ``posttrain.stages.distill`` does after the rollouts: the teachers read their samples and leave the states in
files, and the learner makes one update. Each count of teachers has a process of its own, whose memory is measured, with
a pool that has room for one teacher at work and one loading. Steps are made in turn, so that a slow moment of the
machine hits both counts. A hundred teachers are of a small shape, against one of that shape, with as many samples each
as the twelve.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import MIB, Metric, PeakMemory, arguments, random_tokens, report, seconds_in_turns
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
SAMPLES = 200


class Measured(NamedTuple):
    """Of one step, but for the peak, which is that of all."""

    seconds: float
    head_loads: float
    peak_mib: float

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.head_loads:.0f} heads, {self.peak_mib:,.0f} MiB"


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
    # One at work and one loading.
    memory_mb = math.ceil(2 * (teachers[names[0]].num_bytes(device) or 0) / MIB)
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


def serve(connection: Connection, folder: Path, count: int, samples: list[Sample], options: Namespace) -> None:
    """Make a step each time it is asked for, and at the end send what they took beside time."""
    peak = PeakMemory(options.device)
    with open_step(folder, count, samples, options.device) as step:
        while connection.recv():
            heads = step()["teacher/head_loads"]
            connection.send(heads)
    connection.send(peak.mib())


@contextmanager
def step_in_process(
    folder: Path, count: int, samples: list[Sample], options: Namespace
) -> Iterator[tuple[Callable[[], float], Callable[[], float]]]:
    """A step that returns its loads of heads, and a function that ends the process and returns its peak in MiB."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, folder, count, samples, options))
    process.start()
    there.close()

    def ask(for_step: bool) -> float:
        here.send(for_step)
        return float(here.recv())

    try:
        yield lambda: ask(True), lambda: ask(False)
    finally:
        here.close()
        process.join()


def measure(config: LlamaConfig, counts: Sequence[int], num_samples: int, options: Namespace) -> dict[int, Measured]:
    """By number of teachers."""
    samples, heads = make_samples(num_samples, config.vocab_size), {}
    with tempfile.TemporaryDirectory(prefix="posttrain-benchmark-") as name, ExitStack() as opened:
        folder, console = Path(name), Console(width=110)
        write_checkpoint(config, folder / "student", seed=1000)
        for index in range(max(counts)):
            write_checkpoint(config, folder / str(index), seed=index)
        processes = {count: opened.enter_context(step_in_process(folder, count, samples, options)) for count in counts}
        steps = {count: step for count, (step, _) in processes.items()}
        for count, step in steps.items():
            # The optimizer has its state from the second on.
            for _ in range(1 if options.quick else 2):
                heads[count] = step()
            console.print(f"{count} teachers, {config.num_hidden_layers} layers, {num_samples} samples: ready")
        taken = seconds_in_turns(steps, options.device, repeats=1 if options.quick else 3, warm_up=0)
        found = {count: Measured(taken[count], heads[count], end()) for count, (_, end) in processes.items()}
        for count in counts:
            console.print(f"{count} teachers: {found[count]}")
    return found


def main() -> None:
    options = arguments(__doc__).parse_args()
    num_samples = SAMPLES * 3 // 4 if options.quick else SAMPLES
    found = measure(SMALL_CONFIG if options.quick else CONFIG, [1, 12], num_samples, options)
    one, twelve = found[1], found[12]
    metrics = [
        Metric("step_ratio_12", twelve.seconds / one.seconds, "ratio", "<= 1.1"),
        Metric("step_1", one.seconds, "s", ""),
        Metric("step_12", twelve.seconds, "s", ""),
        Metric("head_loads_12", twelve.head_loads, "per step", "<= 12"),
        Metric("peak_ratio_12", twelve.peak_mib / one.peak_mib, "ratio", "<= 1.1"),
        Metric("peak_12", twelve.peak_mib, "MiB", ""),
    ]
    if not options.quick:
        found = measure(SMALL_CONFIG, [1, 100], SAMPLES * 100 // 12, options)
        metrics += [
            Metric("small_step_ratio_100", found[100].seconds / found[1].seconds, "ratio", "<= 1.1"),
            Metric("small_step_1", found[1].seconds, "s", ""),
            Metric("small_step_100", found[100].seconds, "s", ""),
            Metric("small_head_loads_100", found[100].head_loads, "per step", "<= 100"),
            Metric("small_peak_ratio_100", found[100].peak_mib / found[1].peak_mib, "ratio", "<= 1.1"),
        ]
    tokens = sum(len(sample) for sample in make_samples(num_samples, CONFIG.vocab_size))
    report(f"opd_teachers, {tokens:,} tokens a step", metrics, options.json, device=options.device)


if __name__ == "__main__":
    main()
