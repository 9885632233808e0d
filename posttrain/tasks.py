"""Tasks from any ``datasets`` source: JSONL, CSV or Parquet files, or a hub name, with a column mapping."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.protocols import Demonstration, TaskSource
from posttrain.types import EMPTY, Message, Task

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True, kw_only=True)
class DatasetTasks:
    """One task a row. Rows are split into train and held-out by a hash of their prompt, so no task is in both.

    Columns and rows are checked before a run starts: a prompt, an answer or a demonstration that is mapped to a column
    must be there in every row.
    """

    domain: str
    path: str
    """A file (.jsonl, .json, .csv, .parquet) or a data set name on the hub."""
    prompt: str = "prompt"
    """Column with the user's message, or with a list of chat messages."""
    answer: str | None = None
    """Column with the reference answer."""
    demonstration: str | None = None
    """Column with an answer to imitate in SFT."""
    info: Mapping[str, str] = field(default_factory=dict)
    """Key of ``Task.info`` -> column, for grading data."""
    template: str = "{prompt}"
    """Wraps the prompt; ``{prompt}`` is replaced once."""
    system: str | None = None
    split: str = "train"
    config_name: str | None = None
    heldout_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.heldout_fraction < 1:
            raise RecipeError(
                f"DatasetTasks.heldout_fraction = {self.heldout_fraction!r}: expected a number between 0 and 1; "
                "both splits must have rows"
            )
        if "{prompt}" not in self.template:
            raise RecipeError(f"DatasetTasks.template = {self.template!r}: expected a text that contains {{prompt}}")

    def train(self, *, seed: int) -> Iterable[Task]:
        rows = [row for row, held in self._rows if not held]
        random.Random(seed).shuffle(rows)
        return (self._task(row) for row in rows)

    def heldout(self, *, count: int) -> Sequence[Task]:
        return [self._task(row) for row, held in self._rows if held][:count]

    def demonstrations(self, *, count: int, seed: int) -> Sequence[Demonstration]:
        if self.demonstration is None:
            return ()
        rows = [row for row, held in self._rows if not held]
        random.Random(seed).shuffle(rows)
        return [(*self._messages(row), _said(row[self.demonstration])) for row in rows[:count]]

    @cached_property
    def _rows(self) -> list[tuple[Mapping[str, Any], bool]]:
        """Each row with whether it is held out."""
        data = self._load()
        self._check_columns(data.column_names)
        rows = [dict(row) for row in data]
        if not rows:
            raise RecipeError(f"data set {self.path!r} split {self.split!r} is empty; expected at least one row")
        for number, row in enumerate(rows, start=1):
            self._check_row(number, row)
        return [(row, _bucket(row[self.prompt]) < self.heldout_fraction) for row in rows]

    def _load(self) -> Any:
        import datasets

        file = Path(self.path)
        builder = _BUILDERS.get(file.suffix)
        if builder and not file.is_file():
            raise RecipeError(f"data file {self.path!r} does not exist; give the path of a {file.suffix} file")
        if builder and file.stat().st_size == 0:
            raise RecipeError(f"data file {self.path!r} is empty; expected at least one row")
        try:
            if builder:
                return datasets.load_dataset(builder, data_files=str(file), split=self.split)
            return datasets.load_dataset(self.path, self.config_name, split=self.split)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as failure:
            # The library lists the splits or configurations that exist; the row is in its cause, by chunk only.
            reason = (file.suffix == ".jsonl" and _broken_line(file)) or str(failure.__cause__ or failure).strip(" .\n")
            raise RecipeError(
                f"DatasetTasks(path={self.path!r}, config_name={self.config_name!r}, split={self.split!r}) cannot be "
                f"read: {reason}; correct that setting or the data"
            ) from failure

    def _check_columns(self, columns: Sequence[str]) -> None:
        wanted = {"prompt": self.prompt, "answer": self.answer, "demonstration": self.demonstration}
        wanted |= {f"info[{key!r}]": column for key, column in self.info.items()}
        for setting, column in wanted.items():
            if column is not None and column not in columns:
                raise RecipeError(
                    f"DatasetTasks.{setting} = {column!r}: data set {self.path!r} has no such column; its columns "
                    f"are {', '.join(columns)}"
                )

    def _check_row(self, number: int, row: Mapping[str, Any]) -> None:
        for setting, column, expected in (
            ("prompt", self.prompt, "a text, or chat messages that all have a role and a content"),
            ("answer", self.answer, "an answer"),
            ("demonstration", self.demonstration, "an answer to imitate"),
        ):
            if column is None:
                continue
            value = row[column]
            if value is None or (setting == "prompt" and not _is_prompt(value)):
                raise RecipeError(
                    f"data set {self.path!r} split {self.split!r}, row {number} (counted from 1): "
                    f"DatasetTasks.{setting} = {column!r} is {value!r:.80}; expected {expected}; correct the row or "
                    "leave it out"
                )

    def _task(self, row: Mapping[str, Any]) -> Task:
        messages = self._messages(row)
        key = hashlib.blake2b(json.dumps(messages, sort_keys=True).encode(), digest_size=8).hexdigest()
        return Task(
            id=f"{self.domain}-{key}",
            domain=self.domain,
            prompt=messages,
            answer=None if self.answer is None else str(row[self.answer]),
            info={key: row[column] for key, column in self.info.items()} or EMPTY,
        )

    def _messages(self, row: Mapping[str, Any]) -> tuple[Message, ...]:
        prompt = row[self.prompt]
        if isinstance(prompt, str):
            asked: list[Message] = [{"role": "user", "content": self.template.replace("{prompt}", prompt)}]
        else:
            asked = [{"role": m["role"], "content": m["content"]} for m in prompt]
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return (*system, *asked)


@dataclass(frozen=True, kw_only=True)
class TasksInMode:
    """Those tasks of a source that may be played in one effort mode, to be played in no other."""

    tasks: TaskSource
    effort: str

    def train(self, *, seed: int) -> Iterable[Task]:
        return (replace(task, effort=self.effort) for task in self.tasks.train(seed=seed) if self._fits(task))

    def heldout(self, *, count: int) -> Sequence[Task]:
        return [replace(task, effort=self.effort) for task in self.tasks.heldout(count=count) if self._fits(task)]

    def demonstrations(self, *, count: int, seed: int) -> Sequence[Demonstration]:
        return self.tasks.demonstrations(count=count, seed=seed)

    def _fits(self, task: Task) -> bool:
        return task.effort in (None, self.effort)


def _is_prompt(asked: Any) -> bool:
    if not isinstance(asked, list):
        return isinstance(asked, str)
    return bool(asked) and all(isinstance(m.get(key), str) for m in asked for key in ("role", "content"))


def _broken_line(file: Path) -> str:
    """What is wrong in the first line that is no JSON object; empty when all are."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                is_object = not line.strip() or isinstance(json.loads(line), dict)
            except ValueError:
                is_object = False
            if not is_object:
                return f"line {number} is {line.decode(errors='replace').strip()!r:.80}, expected one JSON object"
    return ""


def _said(text: Any) -> Message:
    return {"role": "assistant", "content": str(text)}


def _bucket(prompt: Any) -> float:
    """A number in [0, 1) that depends only on the prompt, so that a row's split never changes."""
    digest = hashlib.blake2b(json.dumps(prompt, sort_keys=True).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
