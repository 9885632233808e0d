"""Several learner processes: the loss of one, whatever their shares, and a clear end when one of them fails."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from posttrain.config import GRPO, Distill, Optim
from posttrain.learner.distillation import DistillSpec
from posttrain.learner.group import AnyLearner, LearnerGroup, LearnerSpec, open_learner
from posttrain.learner.objectives import GrpoSpec, Objective
from posttrain.models import load_model
from posttrain.rollout.local_store import LocalStore
from posttrain.types import Sample, TokenArrays, Tokens
from teachers.library import SwapOnDemand
from tests.tiny_models import save_tiny_model

VOCABULARY = 200
GRPO_SPEC = GrpoSpec(config=GRPO(beta=0.05), max_completion_tokens=24)
MIXTURE = [*["math"] * 9, *["code"] * 2, "prose"]


def make_samples(teachers: list[str]) -> list[Sample]:
    """Random sequences of ragged length."""
    rng = np.random.default_rng(7)
    samples = []
    for index, teacher in enumerate(teachers):
        length = int(rng.integers(8, 40))
        mask = np.arange(length) >= 3
        arrays = TokenArrays(
            token_ids=rng.integers(0, VOCABULARY, length).astype(np.int32),
            loss_mask=mask,
            logprobs=np.where(mask, -rng.random(length) * 6, np.nan).astype(np.float32),
            versions=np.where(mask, 0, -1).astype(np.int32),
        )
        samples.append(
            Sample(
                id=f"sample-{index}",
                task_id=f"task-{index}",
                domain=teacher,
                tokens=Tokens.of(arrays),
                advantage=(1.0, -0.5)[index % 2],
                teacher=teacher,
                silent=index == 4,
            )
        )
    return samples


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders ``student``, ``math``, ``code`` and ``prose``."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "math", "code", "prose")):
        save_tiny_model(root / name, seed=seed)
    return root


@pytest.fixture(scope="module")
def spec(models: Path) -> LearnerSpec:
    return LearnerSpec(
        load_model=partial(load_model, str(models / "student"), torch.float32),
        optim=Optim(learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=1, weight_decay=0.01),
        num_steps=40,
        tokens_per_micro_batch=64,
        keep_reference=True,
    )


@pytest.fixture(scope="module")
def teaching(models: Path) -> DistillSpec:
    library = SwapOnDemand()
    names = ("math", "code", "prose")
    return DistillSpec(
        config=Distill(teachers=library),
        teachers={name: library.from_checkpoint(str(models / name)) for name in names},
        student_path=str(models / "student"),
        probes={name: [np.arange(9, 30, dtype=np.int32)] for name in names},
    )


@pytest.fixture(scope="module")
def group(spec: LearnerSpec) -> Iterator[LearnerGroup]:
    opened = LearnerGroup(spec, 2)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def start(group: LearnerGroup, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the group as it was made."""
    return group.save_checkpoint(tmp_path_factory.mktemp("start"))


def assert_same(found: dict[str, float], expected: dict[str, float], *, rel: float = 1e-6) -> None:
    measured = {name for name in expected if name.startswith("teacher/") or name in ("tokens_per_s", "packing_fill")}
    assert found.keys() == expected.keys()
    for name in expected.keys() - measured - {"micro_batches"}:
        assert found[name] == pytest.approx(expected[name], rel=rel, abs=1e-7), name


def test_statistics_of_a_step_and_a_moved_reference_are_those_of_one_process(
    group: LearnerGroup, start: Path, spec: LearnerSpec
) -> None:
    group.load_checkpoint(start)
    samples, found = make_samples(MIXTURE), []
    one = spec.build()
    for learner in (one, group):
        objective = learner.open_objective(GRPO_SPEC)
        stats = learner.token_stats(samples, objective)
        learner.update(samples, objective)
        learner.sync_reference(0.5)
        found.append((stats, learner.update(samples, objective)["kl_ref"]))
        learner.close_objective(objective)
    one.close()
    (stats, kl), (other_stats, other_kl) = found
    assert stats.keys() == other_stats.keys() == {sample.id for sample in samples if not sample.silent}
    for name, each in stats.items():
        torch.testing.assert_close(other_stats[name].logprobs, each.logprobs)
        torch.testing.assert_close(other_stats[name].entropies, each.entropies)
    assert other_kl == pytest.approx(kl, rel=1e-4)


def steps(learner: AnyLearner, objective: Objective, samples: list[Sample], count: int) -> list[dict[str, float]]:
    return [learner.update(samples, objective) for _ in range(count)]


def test_two_processes_take_the_steps_of_one_and_checkpoints_fit_either(spec, group, start, tmp_path):
    one = open_learner(spec, 1)
    samples = make_samples(["math"] * 11)
    alone, shared = one.open_objective(GRPO_SPEC), group.open_objective(GRPO_SPEC)
    group.load_checkpoint(start)
    for step, (expected, found) in enumerate(
        zip(steps(one, alone, samples, 4), steps(group, shared, samples, 4), strict=True)
    ):
        # A difference in the last bit of a gradient grows in Adam's division by its size.
        assert_same(found, expected, rel=1e-6 if step < 2 else 1e-4)
    assert expected["kl_ref"] > 0
    ours, theirs = group.token_stats(samples, shared), one.token_stats(samples, alone)
    assert ours.keys() == theirs.keys() == {sample.id for sample in samples if not sample.silent}
    for name, stats in theirs.items():
        torch.testing.assert_close(ours[name].logprobs, stats.logprobs, rtol=1e-4, atol=1e-4)
    assert len(set(group.checksums())) == 1
    weights = group.weights(torch.float32)
    for name, tensor in one.weights(torch.float32).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5)

    checkpoint = group.save_checkpoint(tmp_path, caller={"next_step": 4})
    assert one.load_checkpoint(checkpoint) == {"next_step": 4}
    assert_same(group.update(samples, shared), one.update(samples, alone))
    after = [group.update(samples, shared)["loss"] for _ in range(2)]
    group.load_checkpoint(one.save_checkpoint(tmp_path))
    assert [group.update(samples, shared)["loss"] for _ in range(2)] != after, "one more step was made alone"
    assert group.load_checkpoint(checkpoint) == {"next_step": 4}
    group.update(samples, shared)
    assert [group.update(samples, shared)["loss"] for _ in range(2)] == after
    assert len(set(group.checksums())) == 1


def test_teachers_that_are_absent_from_a_process_change_nothing(spec, teaching, group, start):
    one = open_learner(spec, 1)
    alone, shared = one.open_objective(teaching), group.open_objective(teaching)
    group.load_checkpoint(start)
    samples = make_samples(MIXTURE)
    for found, expected in zip(steps(group, shared, samples, 2), steps(one, alone, samples, 2), strict=True):
        assert_same(found, expected)
        assert found["kl/prose"] > 0
        assert found["teacher/tokens"] == expected["teacher/tokens"]
        assert found["teacher/bytes_cached"] == expected["teacher/bytes_cached"]
    # Three teachers, one of them on both ranks.
    assert found["teacher/head_loads"] == 4
    # What teachers read for a step that failed is there for the next one.
    with pytest.raises(FloatingPointError, match="learner process 0 of 2"):
        group.update([replace(sample, weight=math.nan) for sample in samples], shared)
    assert group.update(samples, shared)["teacher/tokens"] == expected["teacher/tokens"]
    one.update(samples, alone)
    # One rank has nothing to do.
    lonely = [sample for sample in samples if sample.domain == "prose"]
    assert_same(group.update(lonely, shared), one.update(lonely, alone))
    assert_same(group.evaluate(samples, shared), one.evaluate(samples, alone))
    with pytest.raises(ValueError, match="use what open_objective of this group returned"):
        group.update(samples, alone)
    group.close_objective(shared)
    one.close()


class ElsewhereRef:
    """The way to arrays that no other process knows."""

    def __init__(self, arrays: TokenArrays) -> None:
        self._parts, self._lock = arrays.parts(), threading.Lock()

    def load(self):
        return self._parts

    def free(self) -> None:
        raise AssertionError("not the learner's to free")


def test_arrays_reach_every_process_wherever_they_are(group, start):
    objective = group.open_objective(GRPO_SPEC)
    samples = make_samples(["math"] * 8)
    store = LocalStore()
    stored = [replace(sample, tokens=sample.tokens.put_in(store)) for sample in samples]
    elsewhere = [
        replace(sample, tokens=replace(sample.tokens, source=ElsewhereRef(sample.load()))) for sample in samples
    ]
    losses = [group.evaluate(each, objective)["loss"] for each in (samples, stored, elsewhere)]
    assert losses == [losses[0]] * 3
    assert math.isfinite(losses[0])
    store.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_what_fails_in_one_process_is_raised_and_changes_the_weights_of_none(group, start, rank):
    objective = group.open_objective(GRPO_SPEC)
    group.load_checkpoint(start)
    samples = make_samples(["math"] * 8)
    group.update(samples, objective)
    before = group.checksums()
    # The longest goes to rank 0, the one after it to rank 1.
    victim = sorted(samples, key=len)[-1 - rank].id
    poisoned = [replace(s, advantage=math.nan) if s.id == victim else s for s in samples]
    with pytest.raises(FloatingPointError, match=rf"learner process {rank} of 2: .*the loss is nan.*{victim}'"):
        group.update(poisoned, objective)
    huge = [replace(sample, advantage=3e38) for sample in samples]
    with pytest.raises(FloatingPointError, match="sample-"):
        group.update(huge, objective)
    with pytest.raises(ValueError, match="none of the 8 samples"):
        group.update([replace(sample, silent=True) for sample in samples], objective)
    assert group.checksums() == before
    assert group.step == 1
    assert math.isfinite(group.update(samples, objective)["loss"])


def test_a_process_killed_in_an_update_is_named_within_seconds(group, start):
    """The last test of the group."""
    objective = group.open_objective(GRPO_SPEC)
    group.load_checkpoint(start)
    samples = make_samples(["math"] * 8)
    victim = group.pids[1]
    os.kill(victim, signal.SIGTERM)
    time.sleep(0.1)
    group.update(samples, objective)  # That one is the driver's to hear.
    os.kill(victim, signal.SIGSTOP)
    threading.Timer(1.0, os.kill, (victim, signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(ChildProcessError, match=rf"process 1 of 2 \(pid {victim}\) was killed by SIGKILL.*--resume"):
        group.update(samples, objective)
    with pytest.raises(ChildProcessError, match="resume the run"):
        group.update(samples, objective)
    group.close()
    group.close()
    assert time.monotonic() - started < 10
    assert not psutil.pid_exists(victim)
