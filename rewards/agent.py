"""Tool-using tasks graded by what they leave behind, not by what the policy says it did."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

from posttrain.errors import RecipeError
from posttrain.protocols import Sandbox
from posttrain.types import Rollout, Score, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalStateReward:
    """1.0 when every file of ``task.info["expected_files"]`` (path -> text) ends up with that content.

    Reads ``rollout.artifacts`` only. Trailing newlines do not count. A file at a path of
    ``task.info["forbidden_files"]`` makes the score 0. Raises ``RecipeError`` for a task without expectations.
    """

    partial: bool = False
    """Give the share of files that are right instead of all or nothing."""
    exact: bool = False
    """The expected files are the whole tree: any other file makes the score 0. It needs an environment that keeps the
    tree, such as ``ToolCalling(keep="tree")``."""

    def __post_init__(self) -> None:
        if self.partial and self.exact:
            raise RecipeError(
                "FinalStateReward: partial and exact are both set, and doing nothing would earn the share of the files "
                "that stay as they are; expected one of them; set the other to False"
            )

    async def score(self, rollout: Rollout, sandbox: Sandbox | None = None) -> Score:
        expected = _expected_files(rollout.task)
        found = {posixpath.normpath(path): content for path, content in rollout.artifacts.items()}
        parts = {path: float(_same_text(found.get(path), text)) for path, text in expected.items()}
        forbidden = sorted({posixpath.normpath(p) for p in rollout.task.info.get("forbidden_files", ())} & found.keys())
        if forbidden:
            return Score(value=0.0, parts=parts, explanation=f"Forbidden file {forbidden[0]!r} is there.")
        strangers = sorted(found.keys() - expected.keys()) if self.exact else []
        if strangers:
            return Score(
                value=0.0, parts=parts, explanation=f"There is a file {strangers[0]!r}, which is not expected."
            )
        share = sum(parts.values()) / len(parts)
        return Score(
            value=share if self.partial else float(share == 1.0),
            parts=parts,
            explanation=_explain(parts, found, expected),
        )


def _expected_files(task: Task) -> Mapping[str, str]:
    files = task.info.get("expected_files")
    if not isinstance(files, Mapping) or not files or not all(isinstance(text, str) for text in files.values()):
        raise RecipeError(
            f"task {task.id!r}: info['expected_files'] = {files!r}; expected a non-empty mapping of path to text"
        )
    return {posixpath.normpath(path): text for path, text in files.items()}


def _same_text(content: bytes | None, text: str) -> bool:
    return content is not None and content.rstrip(b"\n") == text.encode().rstrip(b"\n")


def _explain(parts: Mapping[str, float], found: Mapping[str, bytes], expected: Mapping[str, str]) -> str:
    wrong = [path for path, value in parts.items() if value == 0.0]
    if not wrong:
        return f"All {len(parts)} expected files are right."
    state = _difference(found[wrong[0]], expected[wrong[0]]) if wrong[0] in found else "is missing"
    return f"{len(parts) - len(wrong)} of {len(parts)} expected files are right; {wrong[0]!r} {state}."


def _difference(content: bytes, text: str) -> str:
    pairs = zip_longest(content.decode(errors="replace").split("\n"), text.split("\n"), fillvalue="")
    for number, (has, wanted) in enumerate(pairs, 1):
        if has != wanted:
            return f"has the wrong content: line {number} is {has!r:.80}, expected {wanted!r:.80}"
    return "has the wrong content"
