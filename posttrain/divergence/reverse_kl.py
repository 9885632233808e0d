"""Reverse KL, KL(student || teacher), exact over the whole vocabulary, from hidden states and output heads.

The on-policy distillation objective of DeepSeek-V4 (Eq. 29). With z the student's logits over the temperature,
p its distribution and q the teacher's,

    KL        = sum_v p_v (log p_v - log q_v)
    dKL/dz_v  = p_v (log p_v - log q_v - KL)

so that logits are needed only a tile of ``chunk_tokens`` positions at a time, and never kept. Half-precision models go
through ``triton_tiles`` on a GPU, and bfloat16 ones through ``cpu_tiles`` on a CPU that multiplies them, which keep 4
bytes per entry of one [chunk_tokens, V] tile. Otherwise two float32 tiles are alive at once (three for a moment),
besides float32 copies of half-precision heads on the CPU.

Precision: the arithmetic on logits, and every sum over tiles, is float32. The KL of half-precision inputs never sees
a logit rounded to half precision: two models that agree would differ by rounding noise of about 1e-3 nats, as much as
a nearly converged student is away from its teacher. The two gradient products run in the dtype of the student's
hidden states.

Shape letters: ``N`` positions, ``V`` vocabulary, ``D`` student width, ``E`` teacher width, ``C`` positions of a tile.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from posttrain.divergence.cpu_tiles import CpuTiles
    from posttrain.divergence.triton_tiles import TritonTiles

_HALF = (torch.bfloat16, torch.float16)
_CPU_TILE_BYTES, _GPU_TILE_BYTES = 2**28, 2**30
_MIN_CHUNK = 64
_SCALED_ENTRIES = 1 << 20


def reverse_kl_sum(
    student_hidden_ND: torch.Tensor,
    student_head_VD: torch.Tensor,
    teacher_hidden_NE: torch.Tensor,
    teacher_head_VE: torch.Tensor,
    *,
    weights_N: torch.Tensor | None = None,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss ``sum_n weights_n KL(student_n || teacher_n)`` in nats, and each position's KL without its weight.

    The loss is a float32 scalar to call ``backward`` on; the KLs are float32 [N] and detached. The gradients with
    respect to the student's hidden states and head are computed in the forward pass, while the logits exist, so
    that logits are computed once instead of twice. This is the one to train with. No gradient reaches the teacher
    or the weights. Missing weights are ones. ``chunk_tokens`` None takes tiles of 256 MiB on the CPU and of 1 GiB on a
    GPU.

    Raises ``ValueError`` when shapes do not fit together.
    """
    inputs = _Inputs(
        student_hidden_ND, student_head_VD, teacher_hidden_NE, teacher_head_VE, float(temperature), chunk_tokens
    )
    weights_N = _checked_weights(weights_N, student_hidden_ND)
    loss, kl_N = _ReverseKLSum.apply(student_hidden_ND, student_head_VD, inputs, weights_N, torch.is_grad_enabled())
    return loss, kl_N


def reverse_kl(
    student_hidden_ND: torch.Tensor,
    student_head_VD: torch.Tensor,
    teacher_hidden_NE: torch.Tensor,
    teacher_head_VE: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    weights_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """``weights_n KL(student_n || teacher_n)`` of each position in nats, float32 [N], differentiable.

    For losses that are not a weighted sum; the backward pass computes the logits again, so prefer
    ``reverse_kl_sum`` where it will do. No gradient reaches the teacher or the weights.

    Raises ``ValueError`` when shapes do not fit together.
    """
    inputs = _Inputs(
        student_hidden_ND, student_head_VD, teacher_hidden_NE, teacher_head_VE, float(temperature), chunk_tokens
    )
    kl_N: torch.Tensor = _ReverseKL.apply(student_hidden_ND, student_head_VD, inputs)
    return kl_N if weights_N is None else kl_N * _checked_weights(weights_N, student_hidden_ND)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """The arguments both functions share, checked."""

    student_hidden_ND: torch.Tensor
    student_head_VD: torch.Tensor
    teacher_hidden_NE: torch.Tensor
    teacher_head_VE: torch.Tensor
    temperature: float
    chunk_tokens: int | None

    def __post_init__(self) -> None:
        if not self.temperature > 0 or (self.chunk_tokens is not None and self.chunk_tokens < 1):
            raise ValueError(
                f"reverse_kl: temperature = {self.temperature}, chunk_tokens = {self.chunk_tokens}; "
                "expected a temperature > 0 and at least one token per chunk"
            )
        for side in ("student", "teacher"):
            hidden, head = self.side(side)
            if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
                raise ValueError(
                    f"reverse_kl: {side}_hidden has shape {list(hidden.shape)} and {side}_head {list(head.shape)}; "
                    "expected [positions, width] and [vocabulary, width]. Are both from the same model?"
                )
        for index, what in ((0, "positions in the hidden states"), (1, "vocabulary entries in the head")):
            found = [self.side(side)[index].shape[0] for side in ("student", "teacher")]
            if found[0] != found[1]:
                raise ValueError(
                    f"reverse_kl: the student has {found[0]} {what} and the teacher {found[1]}; expected the same "
                    "number, since position and token id must mean the same on both sides"
                )

    def fused_tiles(self) -> type[TritonTiles] | type[CpuTiles] | None:
        """The kernels that take these inputs on this machine, if any."""
        matrices = (*self.side("student"), *self.side("teacher"))
        if not all(matrix.is_contiguous() for matrix in matrices):
            return None
        if all(matrix.is_cuda for matrix in matrices):
            same = all(hidden.dtype == head.dtype for hidden, head in (self.side("student"), self.side("teacher")))
            half = all(matrix.dtype in _HALF for matrix in matrices)
            # Bulk copies want rows that begin at multiples of 16 bytes.
            aligned = all(m.shape[1] % 8 == 0 and m.data_ptr() % 16 == 0 for m in matrices)
            if same and half and aligned and importlib.util.find_spec("triton"):
                from posttrain.divergence.triton_tiles import TritonTiles

                return TritonTiles
        elif all(not m.is_cuda and m.dtype == torch.bfloat16 and m.shape[1] % 2 == 0 for m in matrices):
            from posttrain.divergence.cpu_tiles import CpuTiles, is_available

            return CpuTiles if is_available() else None
        return None

    def rows(self, bytes_per_entry: int) -> Iterator[slice]:
        """The positions of each tile."""
        count = len(self.student_hidden_ND)
        size = self.chunk_tokens
        if size is None:
            tile_bytes = _GPU_TILE_BYTES if self.student_head_VD.is_cuda else _CPU_TILE_BYTES
            size = max(
                _MIN_CHUNK, tile_bytes // (bytes_per_entry * len(self.student_head_VD)) // _MIN_CHUNK * _MIN_CHUNK
            )
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

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


class _ReverseKLSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden_ND: torch.Tensor,
        student_head_VD: torch.Tensor,
        inputs: _Inputs,
        weights_N: torch.Tensor,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # needs_input_grad ignores torch.no_grad(), which the caller therefore passes on.
        wanted = tuple(needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        kl_N, gradients = _kl_and_gradients(inputs, weights_N, wants_hidden=wanted[0], wants_head=wanted[1])
        ctx.save_for_backward(gradients.hidden_ND, gradients.head_VD)
        ctx.head_dtype = student_head_VD.dtype
        ctx.mark_non_differentiable(kl_N)
        return kl_N @ weights_N, kl_N

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_kl: torch.Tensor) -> tuple[Any, ...]:
        hidden_ND, head_VD = ctx.saved_tensors
        return (
            None if hidden_ND is None else hidden_ND * grad_loss.to(hidden_ND.dtype),
            None if head_VD is None else _scaled(head_VD, grad_loss, ctx.head_dtype),
            None,
            None,
            None,
        )


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_hidden_ND: torch.Tensor, student_head_VD: torch.Tensor, inputs: _Inputs
    ) -> torch.Tensor:
        ctx.save_for_backward(student_hidden_ND, student_head_VD, inputs.teacher_hidden_NE, inputs.teacher_head_VE)
        ctx.settings = inputs.temperature, inputs.chunk_tokens
        kl_N, _ = _kl_and_gradients(inputs, None, wants_hidden=False, wants_head=False)
        return kl_N

    @staticmethod
    def backward(ctx: Any, grad_kl_N: torch.Tensor) -> tuple[Any, ...]:
        inputs = _Inputs(*ctx.saved_tensors, *ctx.settings)
        wants_hidden, wants_head, _ = ctx.needs_input_grad
        _, gradients = _kl_and_gradients(inputs, grad_kl_N, wants_hidden=wants_hidden, wants_head=wants_head)
        head_VD = gradients.head_VD
        return gradients.hidden_ND, None if head_VD is None else head_VD.to(inputs.student_head_VD.dtype), None


def _kl_and_gradients(
    inputs: _Inputs, weights_N: torch.Tensor | None, *, wants_hidden: bool, wants_head: bool
) -> tuple[torch.Tensor, _Gradients]:
    """KL of each position, and the wanted gradients of its sum weighted by ``weights_N``."""
    hidden_ND, head_VD = inputs.student_hidden_ND.detach(), inputs.student_head_VD.detach()
    kl_N = torch.empty(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
    grad_hidden_ND = torch.empty_like(hidden_ND) if wants_hidden else None
    grad_head_VD = torch.empty_like(head_VD, dtype=torch.float32) if wants_head else None
    if grad_head_VD is not None and not len(hidden_ND):
        grad_head_VD.zero_()
    head_cast_VD = head_VD.to(hidden_ND.dtype) if wants_hidden else None
    if not (wants_hidden or wants_head):
        weights_N = None
    # Under autocast the float32 products below would silently become half precision.
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        for rows, kl_C, grad_CV in _tiles(inputs, weights_N):
            kl_N[rows] = kl_C
            if grad_CV is None:
                continue
            if grad_hidden_ND is not None and head_cast_VD is not None:
                torch.mm(grad_CV, head_cast_VD, out=grad_hidden_ND[rows])
            if grad_head_VD is not None:
                _add_head_gradient(grad_head_VD, grad_CV, hidden_ND[rows], add=rows.start > 0)
    return kl_N, _Gradients(grad_hidden_ND, grad_head_VD)


Tile = tuple[slice, torch.Tensor, torch.Tensor | None]
"""Rows, their KL [C], and the gradient of the weighted KLs' sum by the student's logits [C, V] if there are weights."""


def _tiles(inputs: _Inputs, weights_N: torch.Tensor | None) -> Iterator[Tile]:
    kind = inputs.fused_tiles()
    if kind is None:
        yield from _unfused_tiles(inputs, weights_N)
        return
    tiles = None
    for rows in inputs.rows(bytes_per_entry=4):
        tiles = tiles or kind(rows.stop - rows.start, inputs.student_head_VD, inputs.teacher_head_VE)
        kl_C, grad_CV = tiles.kl_and_logit_gradient(
            inputs.student_hidden_ND[rows].detach(),
            inputs.teacher_hidden_NE[rows].detach(),
            weights_C=None if weights_N is None else weights_N[rows].contiguous(),
            temperature=inputs.temperature,
        )
        yield rows, kl_C, grad_CV


def _unfused_tiles(inputs: _Inputs, weights_N: torch.Tensor | None) -> Iterator[Tile]:
    for rows, log_p_CV, log_q_CV in _log_prob_tiles(inputs):
        # log_p_CV becomes p, and log_q_CV the log-ratio and then the gradient, each in its own memory.
        log_ratio_CV = log_q_CV.neg_().add_(log_p_CV)
        p_CV = log_p_CV.exp_()
        kl_C = torch.linalg.vecdot(p_CV, log_ratio_CV)
        if weights_N is None:
            yield rows, kl_C, None
            continue
        grad_CV = log_ratio_CV.sub_(kl_C[:, None]).mul_(p_CV)
        grad_CV.mul_(weights_N[rows, None] / inputs.temperature)
        yield rows, kl_C, grad_CV.to(inputs.student_hidden_ND.dtype)


def _log_prob_tiles(inputs: _Inputs) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows, and the float32 log-probabilities [C, V] of student and teacher there, tile by tile."""
    heads_VD = {side: _logit_head(*inputs.side(side)) for side in ("student", "teacher")}
    for rows in inputs.rows(bytes_per_entry=8):
        tiles = []
        for side, head in heads_VD.items():
            hidden = inputs.side(side)[0].detach()[rows].to(head.dtype)
            logits_CV = _product(hidden, head.T)
            if inputs.temperature != 1.0:
                logits_CV.div_(inputs.temperature)
            tiles.append(logits_CV.log_softmax(-1))
        yield rows, tiles[0], tiles[1]


def _logit_head(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """The head in the dtype its logits are computed in: half precision only where the product is float32."""
    half = head.is_cuda and hidden.dtype == head.dtype and head.dtype in _HALF
    return head.detach() if half else head.detach().float()


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b``; on a GPU half-precision factors give a float32 product, which the CPU kernels cannot."""
    if a.is_cuda and a.dtype in _HALF:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _scaled(matrix: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``matrix * factor`` in ``dtype``, a few rows at a time: PyTorch would make the whole product in float32 first."""
    scaled = torch.empty_like(matrix, dtype=dtype)
    rows = max(1, _SCALED_ENTRIES // matrix.shape[1])
    for source, target in zip(matrix.split(rows), scaled.split(rows), strict=True):
        torch.mul(source, factor, out=target)
    return scaled


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
    else:
        total_VD += grad_CV.T @ hidden_CD


def _checked_weights(weights_N: torch.Tensor | None, student_hidden_ND: torch.Tensor) -> torch.Tensor:
    size = student_hidden_ND.shape[0]
    if weights_N is None:
        return torch.ones(size, dtype=torch.float32, device=student_hidden_ND.device)
    if weights_N.shape != (size,):
        raise ValueError(f"reverse_kl: weights have shape {list(weights_N.shape)}; expected [{size}], one per position")
    return weights_N.detach().float()
