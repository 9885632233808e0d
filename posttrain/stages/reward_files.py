"""Rubrics and other files of a reward, taken up between two steps when somebody has edited them.

What each step was scored with is on disk before its rollouts are played, so a resumed stage scores the steps it repeats
with the same texts, and looks at the files again only with the first step that nobody had begun.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from posttrain.errors import RecipeError
from posttrain.protocols import Reloadable
from posttrain.runs.durable import JsonLines, Record, iter_jsonl
from posttrain.runs.rundir import EventKind, StageDir
from posttrain.stages.session import Session


class RewardFiles:
    """The files of one domain's reward during one stage."""

    def __init__(self, session: Session, stage: StageDir, domain: str) -> None:
        self._session, self._stage, self._domain = session, stage, domain
        self._path = stage.path / f"reward_files-{domain}.jsonl"
        self._refused: dict[str, str] = {}
        """The last text of each file that was not taken up, so that it is complained about once."""
        self._begun: dict[int, Record] = {}

    def restore(self, step: int) -> None:
        """Put into effect what the stage had taken up before ``step``; nothing when it starts."""
        self._begun = {record["step"]: record for record in iter_jsonl(self._path)}
        texts: dict[str, str] = {}
        for number in sorted(self._begun):
            if number < step:
                texts |= self._begun[number]["texts"]
        self._use(texts)

    def refresh(self, step: int) -> dict[str, float]:
        """Take up what was edited since the last step, and return metrics of it, if any.

        A file that cannot be read or used, needs what tasks do not have, or whose fixed responses cannot be scored, is
        left as it was, with a warning in the report.
        """
        reward = self._session.reward(self._domain)
        if not isinstance(reward, Reloadable) or not reward.files:
            return {}
        if step in self._begun:
            self._use(self._begun[step]["texts"])
            return dict(self._begun[step]["metrics"])
        texts = {} if self._begun else dict(reward.files)
        taken, metrics = self._take_up(reward, step)
        record = {"step": step, "texts": texts | taken, "metrics": metrics}
        JsonLines(self._path).append([record], sync=True)
        self._begun[step] = record
        self._use(taken)
        return metrics

    def _use(self, texts: Mapping[str, str]) -> None:
        if texts:
            reward = self._session.reward(self._domain)
            assert isinstance(reward, Reloadable)
            self._session.use_reward(self._domain, reward.with_files(texts))

    def _take_up(self, reward: Reloadable, step: int) -> tuple[dict[str, str], dict[str, float]]:
        """The texts that are to take effect, and metrics of what they change."""
        try:
            edited = {path: text for path, text in reward.read_files().items() if text != reward.files[path]}
        except OSError as error:
            self._refuse({str(error.filename or "a file"): str(error)}, str(error))
            return {}, {}
        new = {path: text for path, text in edited.items() if self._usable(reward, path, text)}
        if not new:
            return {}, {}
        try:
            before = self._session.rollouts.score_anchors(reward)
            after = self._session.rollouts.score_anchors(reward.with_files(new))
        except RuntimeError as error:
            self._refuse(new, f"the fixed responses could not be scored under both versions: {error}")
            return {}, {}
        shifts = {path: _shift(before.get(path, ()), after.get(path, ())) for path in new}
        self._session.run.log_event(
            EventKind.RELOADED, stage=self._stage.name, step=step, files=sorted(new), anchors=shifts
        )
        return new, {"reloaded_files": float(len(new))} | _metrics(shifts)

    def _usable(self, reward: Reloadable, path: str, text: str) -> bool:
        tasks = self._session.recipe.domains[self._domain].tasks.train(seed=self._session.recipe.seed)
        try:
            edited = reward.with_files({path: text})
            for task in itertools.islice(tasks, 1):
                # Otherwise every rollout would fail, and go on failing when the run is resumed.
                edited.check_task(task)
        except RecipeError as error:
            self._refuse({path: text}, str(error))
            return False
        return True

    def _refuse(self, texts: Mapping[str, str], reason: str) -> None:
        if any(self._refused.get(path) != text for path, text in texts.items()):
            self._refused |= texts
            names = ", ".join(sorted(texts))
            self._session.warn(f"{self._stage.name}: the edit of {names} is not taken up; {reason}")


def _shift(before: tuple[float | None, ...], after: tuple[float | None, ...]) -> dict[str, Any]:
    """Means over the fixed responses that both versions scored, and how many those are."""
    both = [(old, new) for old, new in zip(before, after, strict=True) if old is not None and new is not None]
    if not both:
        return {"num_scored": 0, "num_anchors": len(before)}
    old, new = (sum(values) / len(both) for values in zip(*both, strict=True))
    return {"num_scored": len(both), "num_anchors": len(before), "old": old, "new": new, "shift": new - old}


def _metrics(shifts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    known = [shift["shift"] for shift in shifts.values() if "shift" in shift]
    return {"anchor_shift": sum(known) / len(known)} if known else {}
