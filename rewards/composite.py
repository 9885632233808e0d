"""What rewards made of others pass on to their parts: the policy as judge, and files that are edited during a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from posttrain.protocols import Ask, Reloadable, asks_policy
from posttrain.types import Score, ScoreStatus, Task


def finite(score: Score) -> Score:
    """The score; unscored when its value is no finite number, since NaN would pass any gate."""
    if score.value is None or math.isfinite(score.value):
        return score
    error = f"value = {score.value}; expected a finite number, or None"
    return dataclasses.replace(score, value=None, status=ScoreStatus.REWARD_ERROR, error=error)


class Composite:
    """Makes a dataclass of rewards ``PolicyJudged`` and ``Reloadable`` (``posttrain.protocols``), as its parts are.

    Parts are the fields that are rewards, and the values of fields that map names to them.
    """

    __slots__ = ()

    @property
    def asks_policy(self) -> bool:
        return any(asks_policy(part) for part in self._parts())

    def with_policy(self, ask: Ask) -> Self:
        """The same, with this policy as judge wherever a part is judged by the policy."""
        return self._changed(lambda part: part.with_policy(ask) if asks_policy(part) else part)

    @property
    def files(self) -> Mapping[str, str]:
        return {path: text for part in self._editable() for path, text in part.files.items()}

    def read_files(self) -> Mapping[str, str]:
        return {path: text for part in self._editable() for path, text in part.read_files().items()}

    def with_files(self, texts: Mapping[str, str]) -> Self:
        if not self.files.keys() & texts.keys():
            return self
        return self._changed(lambda part: part.with_files(texts) if isinstance(part, Reloadable) else part)

    def check_task(self, task: Task) -> None:
        for part in self._editable():
            part.check_task(task)

    async def score_anchors(self) -> Mapping[str, tuple[float | None, ...]]:
        found: dict[str, tuple[float | None, ...]] = {}
        for part in self._editable():
            found |= await part.score_anchors()
        return found

    def _editable(self) -> Iterator[Reloadable]:
        return (part for part in self._parts() if isinstance(part, Reloadable))

    def _parts(self) -> Iterator[Any]:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            yield from value.values() if isinstance(value, Mapping) else (value,)

    def _changed(self, change: Callable[[Any], Any]) -> Self:
        """The same with ``change`` of every part in its place."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        changes = {
            name: {key: change(part) for key, part in value.items()} if isinstance(value, Mapping) else change(value)
            for name, value in fields.items()
        }
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]
