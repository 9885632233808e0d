"""The run directory: where everything a run leaves behind lies, and what happened to it when.

::

    recipe.json  metrics.jsonl  events.jsonl  tensorboard/  plots/*.png  report.html  report.json
    stages/<stage>/{rollouts.jsonl, checkpoints/, judges/, states/, final/, done.json}
    boxes/  (what was done in each sandbox, where the substrate keeps them)
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.runs.describe import describe, first_difference
from posttrain.runs.durable import JsonLines, Record, iter_jsonl, read_json, write_json
from posttrain.runs.lock import locked

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class EventKind(StrEnum):
    """What can happen to a run."""

    STARTED = "started"
    """The run began, with the recipe's ``name``."""
    STAGE_STARTED = "stage_started"
    RESUMED = "resumed"
    """``stage`` goes on after ``step``, the last one kept; a new process took over."""
    STAGE_FINISHED = "stage_finished"
    WARNING = "warning"
    """Something the reader of the report should know: ``message``."""
    RELOADED = "reloaded"
    """Edited ``files`` of ``stage``'s reward take effect with ``step``; ``anchors``: how far fixed responses moved."""
    FINISHED = "finished"


class StageDir:
    """The part of a run directory that belongs to one stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.rollouts = path / "rollouts.jsonl"
        self.checkpoints = path / "checkpoints"
        self.judges = path / "judges"
        self.states = path / "states"
        self.start = path / "start"
        self.final = path / "final"
        self._done = path / "done.json"

    @property
    def done(self) -> Record | None:
        """What the stage left when it finished; None while it has not."""
        return read_json(self._done) if self._done.exists() else None

    def mark_done(self, summary: Mapping[str, Any]) -> None:
        """Declare the stage finished. Everything it leaves must be on disk already."""
        write_json(self._done, {"time": time.time(), **summary})


class RunDir:
    """Paths and records of one run. Reading needs no lock; whoever writes holds ``lock()``."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.json"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.plots = self.path / "plots"
        self.report_html = self.path / "report.html"
        self.report_json = self.path / "report.json"
        self.boxes = self.path / "boxes"
        self.rollouts = self.path / "rollouts"
        """What an interrupted run needs to go on without generating anything twice; empty after the run."""

    def lock(self) -> AbstractContextManager[None]:
        """Hold the directory for this process; ``RecipeError`` when another process has it."""
        return locked(self.path)

    def stage(self, name: str) -> StageDir:
        """The directory of a stage. ``ValueError`` when the name cannot be a folder's."""
        if not STAGE_NAME.fullmatch(name):
            raise ValueError(
                f"stage = {name!r}: expected letters, digits, '.', '_' and '-', starting with a letter or digit; "
                "rename the domain or stage"
            )
        return StageDir(self.path / "stages" / name)

    def stages(self) -> tuple[StageDir, ...]:
        """The stages that have left something, by name."""
        return tuple(StageDir(path) for path in sorted((self.path / "stages").glob("*")) if path.is_dir())

    def write_recipe(self, recipe: Any) -> None:
        """Keep the recipe as data. ``RecipeError`` when the directory belongs to a different one."""
        data = describe(recipe)
        if self.recipe.exists():
            difference = first_difference(read_json(self.recipe), data)
            if difference:
                raise RecipeError(
                    f"{self.path} holds a run of another recipe: {difference}; expected the same recipe when "
                    "resuming; choose another directory or undo the change"
                )
            return
        write_json(self.recipe, data)

    def log_event(self, kind: EventKind, **fields: Any) -> None:
        """Append one event, durably."""
        JsonLines(self.events).append([{"time": time.time(), "kind": kind.value, **fields}], sync=True)

    def read_events(self) -> list[Record]:
        """All events so far, oldest first."""
        return list(iter_jsonl(self.events))
