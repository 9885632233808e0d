"""Responses written down, one JSON object a line, as rollouts that a reward can score."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import RecipeError
from posttrain.types import Completion, FinishReason, Message, Rollout, StopReason, Task, Turn


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with their line numbers, from 1. ``RecipeError`` names a line that is none."""
    try:
        # Not splitlines, which would also split at U+2028 inside a text.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{str(path)!r} cannot be read: {error}; expected a JSON Lines file in UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _parsed(line, path, number)


def _parsed(line: str, path: str | Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise RecipeError(f"{path}:{number}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise RecipeError(f"{path}:{number}: {line.strip()[:80]!r}; expected one JSON object a line")
    return row


def read_rollouts(path: str | Path) -> list[Rollout]:
    """One rollout a line: ``{"prompt": text or messages, "response": text, "id"?, "answer"?, "info"?: {...}}``.

    Further fields join ``info``, where a rubric finds its ``{field}``. Raises ``RecipeError`` that names the line.
    """
    rollouts = []
    for number, row in read_jsonl(path):
        try:
            rollouts.append(rollout_of(row, default_id=str(number)))
        except ValueError as error:
            raise RecipeError(f"{path}:{number}: {error}") from error
    if not rollouts:
        raise RecipeError(f"{path} has no rows; expected one JSON object a line with 'prompt' and 'response'")
    return rollouts


def rollout_of(row: Mapping[str, Any], *, default_id: str) -> Rollout:
    """A finished rollout with this response and no tokens. Raises ``ValueError`` for a row that is not one."""
    response, info = row.get("response"), row.get("info") or {}
    if not isinstance(response, str):
        raise ValueError(f"'response' is {response!r:.80}; expected a text")
    if not isinstance(info, Mapping):
        raise ValueError(f"'info' is {info!r:.80}; expected an object")
    name = str(row.get("id", default_id))
    further = {key: value for key, value in row.items() if key not in ("id", "prompt", "response", "answer", "info")}
    answer = row.get("answer")
    task = Task(
        id=name,
        domain="rows",
        prompt=_messages(row.get("prompt", "")),
        answer=None if answer is None else str(answer),
        info={**further, **info},
    )
    completion = Completion(
        request_id=name,
        token_ids=np.zeros(0, np.int32),
        logprobs=np.zeros(0, np.float32),
        versions=np.zeros(0, np.int32),
        finish=FinishReason.STOP,
    )
    turn = Turn(context_ids=np.zeros(1, np.int32), completion=completion, text=response)
    return Rollout(id=name, task=task, turns=(turn,), stop=StopReason.FINISHED)


def _messages(prompt: Any) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},) if prompt else ()
    if isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    ):
        return tuple({"role": m["role"], "content": m["content"]} for m in prompt)
    raise ValueError(f"'prompt' is {prompt!r:.80}; expected a text, or messages with a role and a content")
