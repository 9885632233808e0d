"""Divergences of two models, exact over the whole vocabulary, from hidden states and output heads.

Reverse KL is the on-policy distillation objective of DeepSeek-V4 (Eq. 29); ``measure`` has the formulas. The gradient
by the student's logits is p_v (g_v - sum_w p_w g_w) for all of them, so that logits are needed only a tile of
``chunk_tokens`` positions at a time, and never kept. Half-precision models go through ``triton_tiles`` on a GPU, for
reverse KL, and bfloat16 ones through ``cpu_tiles`` on a CPU that multiplies them, which keep 4 bytes per entry of one
[chunk_tokens, V] tile; what these do not do, ``torch_tiles`` does in 8 bytes.

Precision: the arithmetic on logits, and every sum over tiles, is float32. The KL of half-precision inputs never sees
a logit rounded to half precision: two models that agree would differ by rounding noise of about 1e-3 nats, as much as
a nearly converged student is away from its teacher. The two gradient products run in the dtype of the student's
hidden states.

Shape letters: ``N`` positions, ``V`` vocabulary, ``D`` student width, ``E`` teacher width, ``C`` positions of a tile.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from posttrain.divergence.measure import Divergence, Measure
from posttrain.divergence.torch_tiles import TorchTiles

if TYPE_CHECKING:
    from posttrain.divergence.cpu_tiles import CpuTiles
    from posttrain.divergence.triton_tiles import TritonTiles

_HALF = (torch.bfloat16, torch.float16)
_CPU_TILE_BYTES, _GPU_TILE_BYTES = 2**28, 2**30
_MIN_CHUNK = 64
_PART_ENTRIES = 1 << 20


def divergence_sum(  # noqa: PLR0913 - two models, and what is computed of them
    student_hidden_ND: torch.Tensor,
    student_head_VD: torch.Tensor,
    teacher_hidden_NE: torch.Tensor,
    teacher_head_VE: torch.Tensor,
    *,
    divergence: Divergence = "reverse_kl",
    beta: float = 0.5,
    weights_N: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    teacher_logit_cap: float | None = None,
    vocabulary_group: distributed.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss ``sum_n weights_n D(student_n, teacher_n)`` in nats, and each position's divergence without its weight.

    The loss is a float32 scalar to call ``backward`` on; the divergences are float32 [N] and detached. ``reverse_kl``
    is KL(student || teacher), ``forward_kl`` is KL(teacher || student), and ``jsd`` the generalised Jensen-Shannon
    divergence whose mixture has ``beta`` of the teacher (GKD, arXiv 2306.13649); as in TRL, beta 0 is forward and
    beta 1 reverse KL. ``temperature`` divides the logits of both. ``teacher_logit_cap`` is the teacher's soft-capping
    of final logits (Gemma 2), ``cap tanh(logit / cap)``, before the temperature.

    The gradients with respect to the student's hidden states and head are computed in the forward pass, while the
    logits exist, so that logits are computed once instead of twice. No gradient reaches the teacher or the weights.
    Missing weights are ones. ``chunk_tokens`` None takes tiles of 256 MiB on the CPU and of 1 GiB on a GPU.

    With a ``vocabulary_group`` each of its processes passes its slice of both heads' rows, cut at the same token ids
    and of any size, and the same hidden states and weights. All get the same loss, divergences and gradient of the
    hidden states, and the gradient of their slice of the head. Only a few numbers per position travel between them,
    besides that gradient of the hidden states.

    Raises ``ValueError`` when shapes do not fit together or a setting is out of range.
    """
    return divergence_sum_by_teacher(
        student_hidden_ND,
        student_head_VD,
        [TeacherLogits(hidden_NE=teacher_hidden_NE, head_VE=teacher_head_VE, logit_cap=teacher_logit_cap)],
        divergence=divergence,
        beta=beta,
        weights_N=weights_N,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        vocabulary_group=vocabulary_group,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLogits:
    """What a teacher's logits are made of: ``hidden @ head.T``, soft-capped if there is a cap."""

    hidden_NE: torch.Tensor
    head_VE: torch.Tensor
    logit_cap: float | None = None


def divergence_sum_by_teacher(  # noqa: PLR0913 - as above
    student_hidden_ND: torch.Tensor,
    student_head_VD: torch.Tensor,
    teachers: Iterable[TeacherLogits],
    *,
    divergence: Divergence = "reverse_kl",
    beta: float = 0.5,
    weights_N: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    vocabulary_group: distributed.ProcessGroup | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``divergence_sum``, with one teacher after the other for the positions in turn.

    ``teachers`` is read once and one at a time, so that it may bring each head when its positions come. The gradient of
    the student's head is one sum over all of them.
    """
    measure = Measure(
        divergence=divergence, beta=float(beta), temperature=float(temperature), vocabulary_group=vocabulary_group
    )
    parts = _parts(student_hidden_ND.detach(), student_head_VD.detach(), teachers, measure, chunk_tokens)
    weights_N = _checked_weights(weights_N, student_hidden_ND)
    loss, divergence_N = _DivergenceSum.apply(
        student_hidden_ND, student_head_VD, parts, weights_N, torch.is_grad_enabled()
    )
    return loss, divergence_N


def _parts(
    student_hidden_ND: torch.Tensor,
    student_head_VD: torch.Tensor,
    teachers: Iterable[TeacherLogits],
    measure: Measure,
    chunk_tokens: int | None,
) -> Iterator[tuple[slice, _Inputs]]:
    """The positions of each teacher in turn, with what is computed of them."""
    start = 0
    for teacher in teachers:
        rows = slice(start, start + len(teacher.hidden_NE))
        of_teacher = replace(measure, teacher_logit_cap=None if teacher.logit_cap is None else float(teacher.logit_cap))
        yield (
            rows,
            _Inputs(
                student_hidden_ND[rows],
                student_head_VD,
                teacher.hidden_NE.detach(),
                teacher.head_VE.detach(),
                of_teacher,
                chunk_tokens,
            ),
        )
        start = rows.stop
        # Whoever brings the heads may have room for one.
        del teacher
    if start != len(student_hidden_ND):
        raise ValueError(_other_counts(len(student_hidden_ND), start, "positions in the hidden states"))


def _other_counts(student: int, teacher: int, what: str) -> str:
    return (
        f"divergence: the student has {student} {what} and the teacher {teacher}; expected the same number, since "
        "position and token id must mean the same on both sides"
    )


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Both models and what is computed of them, checked."""

    student_hidden_ND: torch.Tensor
    student_head_VD: torch.Tensor
    teacher_hidden_NE: torch.Tensor
    teacher_head_VE: torch.Tensor
    measure: Measure
    chunk_tokens: int | None

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {self.chunk_tokens}; expected at least one token per tile, or None")
        for side in ("student", "teacher"):
            hidden, head = self.side(side)
            if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
                raise ValueError(
                    f"divergence: {side}_hidden has shape {list(hidden.shape)} and {side}_head {list(head.shape)}; "
                    "expected [positions, width] and [vocabulary, width]. Are both from the same model?"
                )
        for index, what in ((0, "positions in the hidden states"), (1, "vocabulary entries in the head")):
            found = [self.side(side)[index].shape[0] for side in ("student", "teacher")]
            if found[0] != found[1]:
                raise ValueError(_other_counts(found[0], found[1], what))

    def tiles(self) -> tuple[Iterator[slice], TorchTiles | TritonTiles | CpuTiles | None]:
        """The positions of each tile, and what computes it (None without positions)."""
        count = len(self.student_hidden_ND)
        fused = self._fused_tiles()
        largest_slice, most, minus_fewest, not_fused = self.measure.agreed(
            len(self.student_head_VD), count, -count, fused is None
        )
        if most != -minus_fewest:
            raise ValueError(
                f"divergence: this process has {count} positions and others of the vocabulary group from "
                f"{-minus_fewest} to {most}; expected the same hidden states in all of them"
            )
        kind = TorchTiles if fused is None or not_fused else fused
        size = self.chunk_tokens
        if size is None:
            tile_bytes = _GPU_TILE_BYTES if self.student_head_VD.is_cuda else _CPU_TILE_BYTES
            size = max(_MIN_CHUNK, tile_bytes // (kind.BYTES_PER_ENTRY * largest_slice) // _MIN_CHUNK * _MIN_CHUNK)
        rows = (slice(start, min(start + size, count)) for start in range(0, count, size))
        if not count:
            return rows, None
        heads = self.student_head_VD, self.teacher_head_VE
        return rows, kind(min(size, count), *heads, self.measure, largest_slice=largest_slice)

    def _fused_tiles(self) -> type[TritonTiles] | type[CpuTiles] | None:
        """The kernels that take these inputs on this machine, if any."""
        matrices = (*self.side("student"), *self.side("teacher"))
        if not all(matrix.is_contiguous() for matrix in matrices):
            return None
        if all(matrix.is_cuda for matrix in matrices):
            same = all(hidden.dtype == head.dtype for hidden, head in (self.side("student"), self.side("teacher")))
            half = all(matrix.dtype in _HALF for matrix in matrices)
            # Bulk copies want rows that begin at multiples of 16 bytes.
            aligned = all(m.shape[1] % 8 == 0 and m.data_ptr() % 16 == 0 for m in matrices)
            reverse = self.measure.kind == "reverse_kl"
            if reverse and same and half and aligned and importlib.util.find_spec("triton"):
                from posttrain.divergence.triton_tiles import TritonTiles

                return TritonTiles
        elif all(not m.is_cuda and m.dtype == torch.bfloat16 and m.shape[1] % 2 == 0 for m in matrices):
            from posttrain.divergence.cpu_tiles import CpuTiles, is_available

            return CpuTiles if is_available() else None
        return None

    def side(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and head of ``student`` or ``teacher``."""
        if name == "student":
            return self.student_hidden_ND, self.student_head_VD
        return self.teacher_hidden_NE, self.teacher_head_VE


@dataclass(frozen=True, slots=True)
class _Gradients:
    hidden_ND: torch.Tensor | None
    """Of the student's hidden states, in their dtype."""
    head_VD: torch.Tensor | None
    """Of the student's head, float32."""


class _DivergenceSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_ND: torch.Tensor,
        student_head_VD: torch.Tensor,
        parts: Iterator[tuple[slice, _Inputs]],
        weights_N: torch.Tensor,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # needs_input_grad ignores torch.no_grad(), which the caller therefore passes on.
        wanted = tuple(needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        # Under autocast the float32 products would silently become half precision.
        with torch.autocast(student_hidden_ND.device.type, enabled=False):
            divergence_N, gradients = _divergence_and_gradients(
                student_hidden_ND.detach(),
                student_head_VD.detach(),
                parts,
                weights_N,
                wants_hidden=wanted[0],
                wants_head=wanted[1],
            )
        ctx.save_for_backward(gradients.hidden_ND, gradients.head_VD)
        ctx.head_dtype = student_head_VD.dtype
        ctx.mark_non_differentiable(divergence_N)
        return divergence_N @ weights_N, divergence_N

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_divergence: torch.Tensor) -> tuple[Any, ...]:
        hidden_ND, head_VD = ctx.saved_tensors
        return (
            None if hidden_ND is None else hidden_ND * grad_loss.to(hidden_ND.dtype),
            None if head_VD is None else _scaled(head_VD, grad_loss, ctx.head_dtype),
            None,
            None,
            None,
        )


def _divergence_and_gradients(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    parts: Iterable[tuple[slice, _Inputs]],
    weights_N: torch.Tensor,
    *,
    wants_hidden: bool,
    wants_head: bool,
) -> tuple[torch.Tensor, _Gradients]:
    """Divergence of each position, and the wanted gradients of its sum weighted by ``weights_N``."""
    divergence_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
    grad_head_VD = torch.empty_like(head_VD, dtype=torch.float32) if wants_head else None
    if grad_head_VD is not None and not len(hidden_ND):
        grad_head_VD.zero_()
    head_cast_VD = head_VD.to(hidden_ND.dtype) if wants_hidden else None
    for of_teacher, inputs in parts:
        tile_rows, tiles = inputs.tiles()
        for of_tile in tile_rows:
            assert tiles is not None, "there are positions"
            rows = slice(of_teacher.start + of_tile.start, of_teacher.start + of_tile.stop)
            divergence_N[rows], grad_CV = tiles.divergence_and_logit_gradient(
                hidden_ND[rows],
                inputs.teacher_hidden_NE[of_tile],
                weights_C=weights_N[rows].contiguous() if wants_hidden or wants_head else None,
            )
            if grad_CV is None:
                continue
            if grad_hidden_ND is not None and head_cast_VD is not None:
                torch.mm(grad_CV, head_cast_VD, out=grad_hidden_ND[rows])
                inputs.measure.total(grad_hidden_ND[rows])
            if grad_head_VD is not None:
                _add_head_gradient(grad_head_VD, grad_CV, hidden_ND[rows], add=rows.start > 0)
        del inputs, tiles
    return divergence_N, _Gradients(grad_hidden_ND, grad_head_VD)


def _scaled(matrix: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``matrix * factor`` in ``dtype``, in the memory of ``matrix``: fresh memory of a head's size costs more than the
    product. An entry's new place is never behind its old one, so a part is read before another is written over it.
    The result keeps the memory of ``matrix``, and what was saved for a second backward is gone, which autograd reports.
    """
    if dtype.itemsize > matrix.itemsize:
        return matrix.to(dtype) * factor
    old, new = matrix.view(-1), matrix.view(-1).view(dtype)[: matrix.numel()]
    for source, target in zip(old.split(_PART_ENTRIES), new.split(_PART_ENTRIES), strict=True):
        target.copy_(source * factor)
    return new.view_as(matrix)


def _add_head_gradient(total_VD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor, *, add: bool) -> None:
    """The float32 ``total_VD`` becomes, or with ``add`` grows by, ``grad_CV.T @ hidden_CD``."""
    if grad_CV.dtype == hidden_CD.dtype == torch.bfloat16 and not grad_CV.is_cuda and hidden_CD.is_contiguous():
        from posttrain.divergence import cpu_tiles

        if cpu_tiles.is_available():
            cpu_tiles.head_gradient(total_VD, grad_CV, hidden_CD, add=add)
            return
    if not add:
        total_VD.zero_()
    if grad_CV.is_cuda and grad_CV.dtype in _HALF:
        torch.addmm(total_VD, grad_CV.T, hidden_CD, out_dtype=torch.float32, out=total_VD)
    elif grad_CV.dtype == torch.float32:
        total_VD.addmm_(grad_CV.T, hidden_CD)
    else:
        num_parts = math.ceil(total_VD.numel() / _PART_ENTRIES)
        for total, grad in zip(total_VD.chunk(num_parts), grad_CV.chunk(num_parts, 1), strict=True):
            total += grad.T @ hidden_CD


def _checked_weights(weights_N: torch.Tensor | None, student_hidden_ND: torch.Tensor) -> torch.Tensor:
    size = student_hidden_ND.shape[0]
    if weights_N is None:
        return torch.ones(size, dtype=torch.float32, device=student_hidden_ND.device)
    if weights_N.shape != (size,):
        raise ValueError(f"divergence: weights have shape {list(weights_N.shape)}; expected [{size}], one per position")
    return weights_N.detach().float()
