"""Numbers over training steps: ``metrics.jsonl`` for programs, TensorBoard for people."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.runs.durable import JsonLines, Record, iter_jsonl
from posttrain.runs.rundir import RunDir

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

KEYS = ("stage", "step", "time")


class MetricsLog:
    """Writes a run's metrics. Each stage is a run of its own in TensorBoard, so domains share a chart."""

    def __init__(self, rundir: RunDir) -> None:
        self._rundir = rundir
        self._lines = JsonLines(rundir.metrics)
        self._writers: dict[str, SummaryWriter] = {}
        self._purge: dict[str, int] = {}

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record one step of one stage. NaN is kept as null: measured, but without a value."""
        reserved = sorted(set(KEYS) & set(metrics))
        if reserved:
            raise ValueError(f"metrics of stage {stage!r} contain {reserved}; those keys name the line; rename them")
        values = {name: float(value) for name, value in metrics.items()}
        now = time.time()
        self._lines.append([{"stage": stage, "step": step, "time": now, **values}])
        writer = self._writer(stage)
        for name, value in values.items():
            if math.isfinite(value):
                writer.add_scalar(name, value, step, walltime=now)

    def rewind(self, stage: str, step: int) -> int:
        """Forget what ``stage`` logged after ``step``; returns the number of lines dropped.

        Called when a stage resumes from the checkpoint of ``step``, so that the file then equals the one
        of an uninterrupted run, times apart.
        """
        writer = self._writers.pop(stage, None)
        if writer is not None:
            writer.close()
        self._purge[stage] = step + 1
        return self._lines.keep(lambda record: record["stage"] != stage or record["step"] <= step)

    def close(self) -> None:
        """Flush TensorBoard's queues."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _writer(self, stage: str) -> SummaryWriter:
        if stage not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            folder = self._rundir.tensorboard / self._rundir.stage(stage).name
            # purge_step makes readers drop what an interrupted process wrote at or after that step.
            self._writers[stage] = SummaryWriter(str(folder), purge_step=self._purge.pop(stage, None))
        return self._writers[stage]


def read_metrics(path: Path) -> list[Record]:
    """The lines of a ``metrics.jsonl``, oldest first, nulls as NaN; also of one still being written."""
    return [
        {name: math.nan if value is None else value for name, value in record.items()} for record in iter_jsonl(path)
    ]
