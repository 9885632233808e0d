"""What the benchmarks share: random samples, timing, peak memory, the table on the terminal and the JSON file."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from posttrain.types import Tokens

MIB = 2**20
_Key = TypeVar("_Key")


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    value: float
    unit: str
    goal: str
    """Such as ``<= 1.5``; empty where the figure is only for information."""

    @property
    def met(self) -> bool | None:
        if not self.goal:
            return None
        comparison, bound = self.goal.split()
        return self.value <= float(bound) if comparison == "<=" else self.value >= float(bound)


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smaller form that takes less than 50 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the metrics here, too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def random_tokens(rng: np.random.Generator, length: int, vocabulary: int, *, prompt: int) -> Tokens:
    """Random tokens of a sample, as a uniform policy would have drawn those after the prompt."""
    # Not above: benchmarks.full_logits is timed without posttrain.
    from posttrain.types import TokenArrays, Tokens

    arrays = TokenArrays(
        token_ids=rng.integers(0, vocabulary, length).astype(np.int32),
        loss_mask=np.arange(length) >= prompt,
        logprobs=np.full(length, -np.log(vocabulary), np.float32),
        versions=np.zeros(length, np.int32),
    )
    return Tokens.of(arrays)


def seconds(function: Callable[[], object], device: str, *, repeats: int, warm_up: int = 1) -> float:
    """Median wall time of one call."""
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(repeats):
        _synchronize(device)
        started = time.perf_counter()
        function()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def seconds_in_turns(
    functions: Mapping[_Key, Callable[[], object]], device: str, *, repeats: int, warm_up: int = 1
) -> dict[_Key, float]:
    """Median wall time of one call of each, called in turn, so that what slows the machine slows all of them."""
    times: dict[_Key, list[float]] = {name: [] for name in functions}
    for turn in range(warm_up + repeats):
        for name, function in functions.items():
            taken = seconds(function, device, repeats=1, warm_up=0)
            if turn >= warm_up:
                times[name].append(taken)
    return {name: statistics.median(taken) for name, taken in times.items()}


class PeakMemory:
    """Highest memory use since it was made beyond that at the time; on the CPU, of resident memory (Linux only)."""

    def __init__(self, device: str) -> None:
        self._device = device
        gc.collect()
        if device == "cpu":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present size
            self._before = _status_bytes("VmRSS")
        else:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def mib(self) -> float:
        peak = _status_bytes("VmHWM") if self._device == "cpu" else torch.cuda.max_memory_allocated()
        return (peak - self._before) / MIB


def peak_resident_mib() -> float:
    """Highest resident memory this process ever had, imports included (Linux only)."""
    return _status_bytes("VmHWM") / MIB


def report(title: str, metrics: list[Metric], json_path: Path | None, **facts: Any) -> None:
    """Print the metrics with their goals and write them to ``json_path`` if there is one."""
    table = Table(title=title, title_justify="left")
    for heading, side in (("metric", "left"), ("value", "right"), ("unit", "left"), ("goal", "left"), ("", "left")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    for metric in metrics:
        verdict = {None: "", True: "met", False: "missed"}[metric.met]
        table.add_row(metric.name, f"{metric.value:.4g}", metric.unit, metric.goal, verdict)
    Console(width=110).print(table)
    if json_path is not None:
        content = {"machine": machine(), **facts, "metrics": [asdict(metric) for metric in metrics]}
        json_path.write_text(json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu_count": os.cpu_count(), "processor": platform.machine(), "gpu": gpu, "torch": torch.__version__}


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
