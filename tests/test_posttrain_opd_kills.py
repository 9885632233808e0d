"""A merge killed by SIGKILL in the teacher pass, in a cache write and in the update goes on exactly, and a teacher that
had finished is not run again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.killed_merge import ROLLOUTS, STEPS
from tests.tiny_models import save_tiny_model

HALF = ROLLOUTS // 2
KILLS = {"after_a_teacher": 1, "in_a_write": 2, "in_the_update": 3}
"""Place -> step."""
LEFT = {"after_a_teacher": (HALF, 0), "in_a_write": (HALF + 1, 1), "in_the_update": (ROLLOUTS, 0)}
"""Place -> whole states and temporary files that lie there after the kill."""
LOADS = {"after_a_teacher": 1, "in_a_write": 1, "in_the_update": 0}
"""Place -> teachers that the step loads when it is resumed."""


Merge = Callable[..., int]


@pytest.fixture
def merge(tmp_path: Path) -> Iterator[Merge]:
    """Runs the merge in a folder, up to where it kills itself; its exit status."""
    # Student and two teachers, of one tokenizer.
    models = [save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("student", "vowels", "digits"))]

    def run(run_dir: Path, *place: str) -> int:
        command = [sys.executable, "-m", "tests.killed_merge", str(run_dir), *models, *place]
        # Not a pipe: Ray's own processes would hold it open for a while.
        with (tmp_path / "output.txt").open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                return process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    yield run
    print((tmp_path / "output.txt").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_merge_killed_at_every_kind_of_place_goes_on_exactly(merge: Merge, tmp_path: Path) -> None:
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "killed"
    assert merge(undisturbed) == 0
    states = run_dir / "stages/distill/states"
    for place, step in KILLS.items():
        assert merge(run_dir, place, str(step)) == -signal.SIGKILL, place
        assert len(metrics_of(run_dir)) == step, place
        found = [path.suffix for path in states.iterdir()]
        assert (found.count(".states"), found.count(".tmp")) == LEFT[place], place
    assert merge(run_dir) == 0

    lines, expected = metrics_of(run_dir), metrics_of(undisturbed)
    assert len(lines) == STEPS
    for place, step in KILLS.items():
        assert lines[step]["teacher/samples_found"] == LEFT[place][0], place
        assert lines[step]["teacher/teacher_loads"] == LOADS[place], place
        assert lines[step]["teacher/bytes_cached"] == expected[step]["teacher/bytes_cached"], place
    for name in ("loss", "kl", "kl/vowels", "kl/digits", "grad_norm"):
        assert [line[name] for line in lines] == [line[name] for line in expected], name
    weights = Path("stages/distill/final/model.safetensors")
    assert (run_dir / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".states", ".tmp"}]


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
