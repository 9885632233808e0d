"""The run directory survives kills, and belongs to one process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import RecipeError
from posttrain.runs import history
from posttrain.runs.describe import describe
from posttrain.runs.durable import JsonLines, iter_jsonl, read_json, write_json
from posttrain.runs.metrics import MetricsLog, read_metrics
from posttrain.runs.rundir import EventKind, RunDir
from posttrain.types import Sampling


def test_json_is_replaced_in_one_piece(tmp_path):
    path = tmp_path / "a" / "value.json"
    write_json(path, {"x": math.nan, "y": np.float32(0.5), "z": [np.int64(3), (1, 2)]})
    assert read_json(path) == {"x": None, "y": 0.5, "z": [3, [1, 2]]}
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert read_json(path)["y"] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


RECORDS = [{"n": 1, "text": "a\nb"}, {"n": 22, "nested": {"k": ["\u00e9", None]}}, {"n": 333}]


@given(cut=st.integers(min_value=0))
def test_a_file_cut_anywhere_keeps_its_whole_lines(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "log.jsonl"
    JsonLines(path).append(RECORDS)
    data = path.read_bytes()
    path.write_bytes(data[: cut % (len(data) + 1)])
    whole = list(iter_jsonl(path))
    assert whole == RECORDS[: len(whole)]
    JsonLines(path).append([{"n": 4}])
    assert list(iter_jsonl(path)) == [*whole, {"n": 4}]


def test_a_long_torn_line_is_found(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"n": 1}\n{"text": "' + b"x" * 200_000)
    JsonLines(path)
    assert path.read_bytes() == b'{"n": 1}\n'


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 1}\nnot json\n{"n": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        list(iter_jsonl(path))


def test_kill_9_while_writing_leaves_a_readable_file(tmp_path):
    path = tmp_path / "log.jsonl"
    code = (
        "import sys; from pathlib import Path; from posttrain.runs.durable import JsonLines\n"
        "lines = JsonLines(Path(sys.argv[1])); n = 0\n"
        "while True:\n lines.append([{'n': n, 'pad': 'x' * 5000}]); n += 1; n == 20 and print('go', flush=True)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    JsonLines(path).append([{"n": "after"}])
    numbers = [record["n"] for record in iter_jsonl(path)]
    assert numbers == [*range(len(numbers) - 1), "after"]
    assert len(numbers) > 20


def test_a_run_belongs_to_one_process(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.lock(), pytest.raises(RecipeError, match=f"in use by process {os.getpid()}"), run.lock():
        pass
    with run.lock():
        pass


def test_the_lock_of_a_dead_process_is_taken_over_even_if_a_child_still_holds_it(tmp_path):
    run = RunDir(tmp_path / "run")
    # The owner is killed while a child it forked lives on with the inherited lock.
    code = (
        "import os, sys, time; from posttrain.runs.rundir import RunDir\n"
        "with RunDir(sys.argv[1]).lock():\n"
        " child = os.fork()\n"
        " if child: print(child, flush=True)\n"
        " time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE)
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(RecipeError, match=f"process {owner.pid}"), run.lock():
            pass
        owner.kill()
        owner.wait()
        with run.lock(), pytest.raises(RecipeError, match=f"process {os.getpid()}"), run.lock():
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        owner.stdout.close()


def test_a_lock_held_from_another_host_is_never_judged_dead(tmp_path):
    run = RunDir(tmp_path / "run")
    with run.lock():
        (run.path / "run.lock").write_text(json.dumps({"pid": 2**22 + 1, "host": "elsewhere"}))
        with pytest.raises(RecipeError, match="on elsewhere"), run.lock():
            pass


@dataclass(frozen=True)
class Reward:
    weight: float = 1.0


def a_function() -> None:
    pass


def test_a_recipe_becomes_data_without_addresses():
    data = describe({"reward": Reward(), "fn": a_function, "sampling": Sampling(), "blob": b"abc", "set": {2, 1}})
    assert data["reward"] == {"type": f"{__name__}.Reward", "weight": 1.0}
    assert data["fn"] == f"{__name__}.a_function"
    assert data["sampling"]["max_tokens"] == 256
    assert data["blob"].startswith("3 bytes, sha256 ba7816bf")
    assert data["set"] == [1, 2]


def test_resuming_with_another_recipe_is_refused(tmp_path):
    run = RunDir(tmp_path)
    run.write_recipe({"name": "a", "domains": {"math": Reward()}})
    run.write_recipe({"name": "a", "domains": {"math": Reward()}})
    with pytest.raises(RecipeError, match=r"domains\.math\.weight was 1\.0 and is 2\.0"):
        run.write_recipe({"name": "a", "domains": {"math": Reward(weight=2.0)}})


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden"])
def test_stage_names_are_folder_names(tmp_path, name):
    with pytest.raises(ValueError, match="stage = "):
        RunDir(tmp_path).stage(name)


def test_a_stage_is_done_when_it_says_so(tmp_path):
    stage = RunDir(tmp_path).stage("grpo-math")
    assert stage.done is None
    stage.mark_done({"steps": 3})
    assert stage.done["steps"] == 3
    assert [s.name for s in RunDir(tmp_path).stages()] == ["grpo-math"]


def without_time(path):
    return [{k: v for k, v in record.items() if k != "time"} for record in read_metrics(path)]


def test_a_rewound_metrics_file_equals_an_uninterrupted_one(tmp_path):
    straight, broken = RunDir(tmp_path / "straight"), RunDir(tmp_path / "broken")
    with MetricsLog(straight) as log:
        for step in range(1, 8):
            log.log("grpo-a", step, {"reward": step / 10})
            log.log("grpo-b", step, {"reward": step / 20})
    with MetricsLog(broken) as log:
        for step in range(1, 6):
            log.log("grpo-a", step, {"reward": step / 10 if step <= 3 else 99.0})
            log.log("grpo-b", step, {"reward": step / 20})
    with broken.metrics.open("ab") as file:
        file.write(b'{"stage": "grpo-b", "st')
    with MetricsLog(broken) as log:
        assert log.rewind("grpo-a", 3) == 2
        for step in range(4, 8):
            log.log("grpo-a", step, {"reward": step / 10})
        for step in range(6, 8):
            log.log("grpo-b", step, {"reward": step / 20})
    key = lambda record: (record["stage"], record["step"])  # noqa: E731
    assert sorted(without_time(broken.metrics), key=key) == sorted(without_time(straight.metrics), key=key)
    assert tensorboard(broken, "grpo-a") == tensorboard(straight, "grpo-a")


def tensorboard(run, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.tensorboard / stage))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("reward")]


def test_metrics_keep_nan_and_refuse_reserved_names(tmp_path):
    run = RunDir(tmp_path)
    with MetricsLog(run) as log:
        log.log("sft-a", 1, {"loss": math.nan})
        with pytest.raises(ValueError, match=r"\['step'\]"):
            log.log("sft-a", 2, {"step": 1.0})
    (record,) = read_metrics(run.metrics)
    assert math.isnan(record["loss"])


def test_events_tell_what_was_resumed_and_how_long_stages_ran(tmp_path):
    run = RunDir(tmp_path)
    run.log_event(EventKind.STARTED, name="x")
    run.log_event(EventKind.WARNING, message="careful")
    assert [event["kind"] for event in run.read_events()] == ["started", "warning"]
    events = [
        {"time": 100.0, "kind": "started"},
        {"time": 100.0, "kind": "stage_started", "stage": "s"},
        {"time": 500.0, "kind": "resumed", "stage": "s", "step": 2},
        {"time": 530.0, "kind": "stage_finished", "stage": "s"},
    ]
    metrics = [{"stage": "s", "step": n, "time": t} for n, t in ((1, 110.0), (2, 120.0), (3, 520.0))]
    assert history.created(events) == 100.0
    assert history.resumptions(events) == [{"time": 500.0, "stage": "s", "step": 2}]
    # 20 s until the last line kept before the kill, 30 s after it; not the 380 s in between.
    (timing,) = history.stage_timings(events, metrics)
    assert (timing["wall_s"], timing["sessions"], timing["finished"]) == (50.0, 2, 530.0)


def test_importing_the_run_modules_loads_no_framework():
    code = (
        "import sys; import posttrain.runs.report, posttrain.runs.metrics, posttrain.runs.rollout_log\n"
        "print(sorted({'torch', 'tensorboard', 'matplotlib', 'ray', 'transformers', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
