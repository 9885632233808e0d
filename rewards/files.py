"""How rewards made of others pass on the files of their parts, which may be edited while a run goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Self

from posttrain.protocols import Reloadable
from posttrain.types import Task


class PassesFilesOn:
    """Makes a dataclass of rewards ``posttrain.protocols.Reloadable``: its files are those of its parts.

    Parts are the fields that are rewards, and the values of fields that map names to them.
    """

    __slots__ = ()

    @property
    def files(self) -> Mapping[str, str]:
        return {path: text for part in self._parts() for path, text in part.files.items()}

    def read_files(self) -> Mapping[str, str]:
        return {path: text for part in self._parts() for path, text in part.read_files().items()}

    def with_files(self, texts: Mapping[str, str]) -> Self:
        if not self.files.keys() & texts.keys():
            return self
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        changes = {field.name: _with_files(getattr(self, field.name), texts) for field in fields}
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def check_task(self, task: Task) -> None:
        for part in self._parts():
            part.check_task(task)

    async def score_anchors(self) -> Mapping[str, tuple[float | None, ...]]:
        found: dict[str, tuple[float | None, ...]] = {}
        for part in self._parts():
            found |= await part.score_anchors()
        return found

    def _parts(self) -> Iterator[Reloadable]:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            for part in value.values() if isinstance(value, Mapping) else (value,):
                if isinstance(part, Reloadable):
                    yield part


def _with_files(value: Any, texts: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_files(part, texts) for name, part in value.items()}
    return value.with_files(texts) if isinstance(value, Reloadable) else value
