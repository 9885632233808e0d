"""Start-up checks of a distillation: every silent way to learn from the wrong distribution that we know of.

A wrong head, a shifted cache, a permuted vocabulary or an untrained teacher all give a loss that looks reasonable
and falls. Each check raises ``RecipeError`` with what was compared, the values, and what to do.

Shape letters: ``N`` positions, ``V`` vocabulary, ``D`` student width, ``E`` teacher width, ``T`` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from posttrain.conversation.formats import open_format
from posttrain.divergence import divergence_sum
from posttrain.errors import RecipeError
from posttrain.models import load_tokenizer
from posttrain.protocols import Teacher
from posttrain.types import IntArray, Sample, TokenArrays, Tokens
from teachers.cache import MemoryStore
from teachers.logits import LogitTransform
from teachers.pool import TeacherPool, load_within
from teachers.streaming import StreamedTeacher

MAX_CACHED_KL = 1e-3
"""Nats per token that rounding cached states to bfloat16 may cost."""
MAX_IDENTICAL_KL = 5e-3
"""Nats per token between a model and itself, computed by two code paths, one of them perhaps in bfloat16."""
MAX_RELATIVE_ENTROPY = 0.9
"""Mean entropy over ln V, above which a teacher knows too little about its own text to teach."""


@runtime_checkable
class HasTokenizer(Protocol):
    """A teacher with a tokenizer of its own to compare with the student's."""

    @property
    def tokenizer_path(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherCheck:
    """What was measured of a teacher that passed."""

    cached_kl: float
    """Mean KL in nats between the teacher's own distribution and the one rebuilt from cached states."""
    entropy: float
    """Mean entropy in nats of the teacher on its probes."""


def check_teachers(
    teachers: Mapping[str, Teacher],
    *,
    student: Teacher,
    probes: Mapping[str, Sequence[IntArray]],
    memory_mb: int,
    device: str = "cpu",
) -> dict[str, TeacherCheck]:
    """Run every check on every teacher; ``RecipeError`` at the first that fails.

    ``student`` is the student's starting point, wrapped as a teacher. ``probes`` are, by teacher, a few token
    sequences of the kind the teacher is good at; about a hundred tokens in all are enough.
    """
    for name, teacher in teachers.items():
        if isinstance(teacher, HasTokenizer) and isinstance(student, HasTokenizer):
            theirs, ours = load_tokenizer(teacher.tokenizer_path), load_tokenizer(student.tokenizer_path)
            check_vocabulary(name, theirs, ours)
            check_chat_format(name, theirs, ours)
    results = {}
    vocabulary = _check_student(student, [probe for group in probes.values() for probe in group], memory_mb, device)
    with TeacherPool(teachers, memory_mb=memory_mb, device=device) as pool:
        for name, teacher in teachers.items():
            if not probes.get(name):
                raise RecipeError(f"teacher {name!r}: no probe sequences; give a few encoded prompts of its domain")
            samples = [_probe_sample(name, index, probe) for index, probe in enumerate(probes[name])]
            own_NE, own_head_VE = _own_states(teacher, samples, memory_mb, device)
            check_vocabulary_size(name, own_head_VE.shape[0], vocabulary)
            store = MemoryStore()
            pool.cache_states(samples, store)
            cached_NE = torch.cat([store.get(sample.id) for sample in samples]).to(device)
            results[name] = TeacherCheck(
                cached_kl=check_cached_states(name, own_NE, own_head_VE, cached_NE, pool.head(name)),
                entropy=check_not_uniform(name, own_NE, own_head_VE, pool.logit_cap(name)),
            )
    return results


def check_vocabulary(name: str, teacher_tokenizer: Any, student_tokenizer: Any) -> None:
    """Both tokenizers must map the same tokens to the same ids."""
    theirs, ours = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    differing = sorted(token for token in theirs.keys() | ours.keys() if theirs.get(token) != ours.get(token))
    if differing:
        shown = ", ".join(f"{token!r}: {theirs.get(token)} / {ours.get(token)}" for token in differing[:3])
        raise RecipeError(
            f"teacher {name!r}: {len(differing)} of {len(theirs)} tokens have another id than in the student's "
            f"vocabulary of {len(ours)} (teacher / student: {shown}). Full-vocabulary distillation compares ids; "
            "expected the same tokenizer; choose a teacher of the student's family"
        )


def check_vocabulary_size(name: str, teacher_size: int, student_size: int) -> None:
    """Both heads must have as many rows."""
    if teacher_size != student_size:
        raise RecipeError(
            f"teacher {name!r}: its head has {teacher_size} rows and the student's {student_size}; expected the "
            "same vocabulary size, padding rows included; resize the embeddings of one of them, or choose another "
            "teacher"
        )


def check_chat_format(name: str, teacher_tokenizer: Any, student_tokenizer: Any) -> None:
    """Both must write a conversation as the same tokens."""
    theirs, ours = open_format(teacher_tokenizer).fingerprint, open_format(student_tokenizer).fingerprint
    if theirs != ours:
        raise RecipeError(
            f"teacher {name!r}: chat format {theirs} differs from the student's {ours}. The teacher would judge "
            "conversations laid out in a way it was not trained on; train it with the student's chat template"
        )


def check_identical(
    student_hidden_ND: torch.Tensor,
    student_head_VD: torch.Tensor,
    teacher_hidden_ND: torch.Tensor,
    teacher_head_VD: torch.Tensor,
) -> float:
    """A model that is its own teacher has nothing to learn: mean KL(student || teacher), at most MAX_IDENTICAL_KL.

    Give the states as the model alone computes them on one side and as the pool caches them on the other.
    """
    kl = _mean_kl(student_hidden_ND, student_head_VD, teacher_hidden_ND, teacher_head_VD)
    if not kl <= MAX_IDENTICAL_KL:
        raise RecipeError(
            f"the student as its own teacher: KL(student || teacher) = {kl:.4g} nats per token, expected at most "
            f"{MAX_IDENTICAL_KL}. Its states change on their way through the pool: compare dtype, attention and "
            "positions, and make sure that dropout is off"
        )
    return kl


def check_cached_states(
    name: str,
    own_hidden_NE: torch.Tensor,
    own_head_VE: torch.Tensor,
    cached_hidden_NE: torch.Tensor,
    pool_head_VE: torch.Tensor,
) -> float:
    """Cached states times the pool's head must be the teacher's own logits: mean KL of at most MAX_CACHED_KL."""
    shapes = [list(tensor.shape) for tensor in (own_hidden_NE, cached_hidden_NE, own_head_VE, pool_head_VE)]
    kl = _mean_kl(own_hidden_NE, own_head_VE, cached_hidden_NE, pool_head_VE) if shapes[::2] == shapes[1::2] else None
    if kl is None or not kl <= MAX_CACHED_KL:
        found = f"KL = {kl:.4g} nats per token" if kl is not None else f"shapes {shapes}, own and cached in turn"
        raise RecipeError(
            f"teacher {name!r}: its own logits against cached states x head: {found}, expected at most "
            f"{MAX_CACHED_KL} nats and equal shapes. States or head belong to another checkpoint, or the states are "
            "shifted: clear the state cache, and check that the teacher's files did not change during the run"
        )
    return kl


def check_not_uniform(
    name: str, hidden_NE: torch.Tensor, head_VE: torch.Tensor, logit_cap: float | None = None
) -> float:
    """Mean entropy in nats of the teacher; must be at most MAX_RELATIVE_ENTROPY of ln V."""
    log_p_NV = LogitTransform(cap=logit_cap).logits(hidden_NE, head_VE).log_softmax(-1)
    entropy = -(log_p_NV.exp() * log_p_NV).sum(-1).mean().item()
    uniform = math.log(head_VE.shape[0])
    if not entropy <= MAX_RELATIVE_ENTROPY * uniform:
        raise RecipeError(
            f"teacher {name!r}: entropy {entropy:.3g} nats on its own text, where a uniform guess has {uniform:.3g} "
            f"and at most {MAX_RELATIVE_ENTROPY * uniform:.3g} is expected. Its weights look untrained: check the "
            "path, and for warnings about newly initialised weights"
        )
    return entropy


def _check_student(student: Teacher, probes: Sequence[IntArray], memory_mb: int, device: str) -> int:
    """Cache the student as if it were a teacher and compare it with itself; its vocabulary size."""
    samples = [_probe_sample("student", index, probe) for index, probe in enumerate(probes)]
    own_ND, head_VD = _own_states(student, samples, memory_mb, device)
    store = MemoryStore()
    with TeacherPool({"student": student}, memory_mb=memory_mb, device=device) as pool:
        pool.cache_states(samples, store)
        cached_ND = torch.cat([store.get(sample.id) for sample in samples]).to(device)
        check_identical(own_ND, head_VD, cached_ND, pool.head("student"))
    return head_VD.shape[0]


def _own_states(
    teacher: Teacher, samples: Sequence[Sample], memory_mb: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """States that predict the samples' loss tokens, in the teacher's own precision, and its head.

    Samples are read one by one, except where that would take a pass over all weights for each.
    """
    model = load_within(teacher, device, memory_mb * 2**20)
    ids = [sample.load().token_ids for sample in samples]
    try:
        if isinstance(model, StreamedTeacher):
            states = model.hidden_states(ids)
        else:
            states = [model.hidden_states([each])[0] for each in ids]
        return torch.cat([each[:-1] for each in states]), model.head
    finally:
        model.close()


def _probe_sample(teacher: str, index: int, token_ids: IntArray) -> Sample:
    """A sample whose every token but the first carries loss."""
    if len(token_ids) < 2:
        raise RecipeError(f"probe {index} of teacher {teacher!r} has {len(token_ids)} tokens; expected at least 2")
    return Sample(
        id=f"probe-{teacher}-{index}",
        task_id="probe",
        domain=teacher,
        tokens=Tokens.of(TokenArrays.unsampled(token_ids)),
        teacher=teacher,
    )


def _mean_kl(p_hidden: torch.Tensor, p_head: torch.Tensor, q_hidden: torch.Tensor, q_head: torch.Tensor) -> float:
    with torch.no_grad():
        return divergence_sum(p_hidden, p_head, q_hidden, q_head)[1].mean().item()
