"""Rubrics that may be edited while a run uses them."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.types import Rollout, Task
from rewards.lint import ERROR, lint_text
from rewards.rows import read_rollouts
from rewards.rubric import Rubric
from rewards.rubric_file import rubric_source

SETTLE_S = 1.0
"""A file that was changed less than this ago is left for the next step: its editor may not have finished writing."""


class RubricFile:
    """A rubric as a file somebody may edit during a run; for ``RubricReward(RubricFile("my.toml"))``.

    ``anchors`` names a JSON Lines file of responses (``rewards.rows``) which are scored under the old and the new
    version before the new one takes effect, so that the run's record shows how far the scale moved. It is read once.
    Holds the text in effect: workers never look at the file. Raises ``RecipeError`` for a file that cannot be used.
    """

    def __init__(self, path: str | Path, *, anchors: str | Path | None = None) -> None:
        self.path = str(path)
        self.anchor_file = None if anchors is None else str(anchors)
        self.anchors_version = ""
        """Content hash; it is part of the recipe, while the text of the rubric is not."""
        self._anchors: tuple[Rollout, ...] = ()
        if anchors is not None:
            self._anchors = tuple(read_rollouts(anchors))
            self.anchors_version = hashlib.sha256(Path(anchors).read_bytes()).hexdigest()[:16]
        self._text = rubric_source(self.path)[1]
        self._rubric = _sound(self.path, self._text)

    @property
    def text(self) -> str:
        return self._text

    @property
    def rubric(self) -> Rubric:
        return self._rubric

    @property
    def anchors(self) -> tuple[Rollout, ...]:
        return self._anchors

    def for_task(self, task: Task) -> Rubric:
        return self._rubric

    def read(self) -> str:
        """The file's text, or the one in effect while the file is still being written. Raises ``OSError``."""
        path = Path(self.path)
        if 0 <= time.time() - path.stat().st_mtime < SETTLE_S:
            return self._text
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise OSError(f"{self.path} is not UTF-8: {error}") from error

    def with_text(self, text: str) -> RubricFile:
        """This file with another text in effect. Raises ``RecipeError`` where the linter finds an error."""
        other = RubricFile.__new__(RubricFile)
        other.__dict__ |= self.__dict__ | {"_text": text, "_rubric": _sound(self.path, text)}
        return other

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RubricFile) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        anchors = f", anchors={self.anchor_file!r}" if self.anchor_file else ""
        return f"RubricFile({self.path!r}{anchors})"

    def _identity(self) -> tuple[str, str | None, str, str]:
        return self.path, self.anchor_file, self.anchors_version, self._text


def _sound(path: str, text: str) -> Rubric:
    """The rubric of a text. ``RecipeError`` where the linter finds an error."""
    errors = [finding for finding in lint_text(path, text) if finding.severity == ERROR]
    if errors:
        raise RecipeError("; ".join(map(str, errors)))
    return Rubric.parse(path, text)
