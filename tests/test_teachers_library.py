"""The teachers of a merge as a recipe asks for them: checked, opened, cached, charged."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from posttrain.errors import RecipeError
from posttrain.models import load_model
from posttrain.protocols import TeacherLibrary
from posttrain.types import Sample, TokenArrays, Tokens
from teachers.library import SwapOnDemand
from teachers.sources import HFTeacher
from tests.tiny_models import save_tiny_model, tiny_chat

PROBES = [tiny_chat().encode_prompt([{"role": "user", "content": f"what is {i}?"}]) for i in range(2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    return {name: save_tiny_model(folder / name, seed=seed) for seed, name in enumerate(("math", "code"), start=1)}


def sample(name: str, teacher: str) -> Sample:
    token_ids = PROBES[0]
    mask = np.arange(len(token_ids)) >= 5
    arrays = replace(TokenArrays.unsampled(token_ids), loss_mask=mask)
    return Sample(id=name, task_id="t", domain=teacher, tokens=Tokens.of(arrays), teacher=teacher)


def test_it_is_a_value_of_the_port():
    library = SwapOnDemand(memory_mb=7)
    assert isinstance(library, TeacherLibrary)
    assert pickle.loads(pickle.dumps(library)) == library
    assert library.from_checkpoint("runs/x/final") == HFTeacher("runs/x/final")


def test_states_and_heads_are_the_teachers_own(tiny_model, models):
    library = SwapOnDemand()
    teachers = {name: library.from_checkpoint(path) for name, path in models.items()}
    samples = [sample("a", "math"), sample("b", "code")]
    with library.open(teachers, student_path=tiny_model, probes=dict.fromkeys(teachers, PROBES)) as opened:
        opened.cache_states(samples)
        for asked in samples:
            model = load_model(models[asked.teacher], torch.float32)
            with torch.no_grad():
                logits = model(torch.tensor(asked.load().token_ids)[None].long()).logits[0]
            expected = logits[np.flatnonzero(asked.load().loss_mask) - 1].log_softmax(-1)
            rebuilt = (opened.store.get(asked.id).float() @ opened.head(asked.teacher).float().T).log_softmax(-1)
            # Cached states are rounded to bfloat16.
            torch.testing.assert_close(rebuilt, expected, atol=0.2, rtol=0)
            assert (rebuilt.argmax(-1) == expected.argmax(-1)).all()


def test_costs_are_what_was_spent_since_they_were_last_read(tiny_model, models):
    library = SwapOnDemand()
    teachers = {name: library.from_checkpoint(path) for name, path in models.items()}
    with library.open(teachers, student_path=tiny_model, probes=dict.fromkeys(teachers, PROBES)) as opened:
        opened.cache_states([sample("a", "math"), sample("b", "code")])
        first, nothing = opened.costs(), opened.costs()
        opened.cache_states([sample("c", "math")])
        second = opened.costs()
    kept = sample("a", "math").num_loss_tokens * 32 * 2
    assert (first["teacher/teacher_loads"], first["teacher/bytes_cached"]) == (2.0, 2.0 * kept)
    assert set(nothing.values()) == {0.0}
    assert (second["teacher/teacher_loads"], second["teacher/bytes_cached"]) == (0.0, 1.0 * kept)


def test_a_small_memory_keeps_one_teacher_between_steps(tiny_model, models, tmp_path):
    library = SwapOnDemand(memory_mb=3)
    wide = {name: save_tiny_model(tmp_path / name, seed=seed, hidden_size=256) for seed, name in enumerate(models)}
    teachers = {name: library.from_checkpoint(path) for name, path in wide.items()}
    with library.open(teachers, student_path=tiny_model, probes=dict.fromkeys(teachers, PROBES)) as opened:
        for loads in (2.0, 1.0, 1.0):
            opened.cache_states([sample("a", "math"), sample("b", "code")])
            assert opened.costs()["teacher/teacher_loads"] == loads
            opened.store.free("ab")


def test_teachers_that_cannot_teach_this_student_are_refused_before_the_first_step(tiny_model, models, tmp_path: Path):
    library = SwapOnDemand()
    shifted = library.from_checkpoint(save_tiny_model(tmp_path / "shifted", extra=["<new>"]))
    flat = library.from_checkpoint(save_tiny_model(tmp_path / "flat", spread=0.001))
    for teacher, message in ((shifted, "have another id"), (flat, "look untrained")):
        with (
            pytest.raises(RecipeError, match=message),
            library.open({"math": teacher}, student_path=tiny_model, probes={"math": PROBES}),
        ):
            raise AssertionError("opened")
