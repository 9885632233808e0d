"""Reverse KL on a GPU: both logit products, and all that lies between them and the gradient products, in Triton.

For a tile of ``C`` positions, three kernels replace float32 logits of shape [C, V]:

1. Hidden states times both heads, a [BLOCK_C, BLOCK_V] block at a time. The float32 logits live in registers only.
   A block leaves its share of every sum over the vocabulary, and two half-precision numbers per entry: how far the
   student's logit is below the highest of the block, and how far the difference of the two models' logits is from the
   block's mean under the student. Both are near 0 where the student's probability lies, so rounding them moves a
   probability by 2^-12 there, and a constant between the two models' logits does not matter.
2. The shares become the KL of each position, which therefore is exact to float32, and two factors per block.
3. The two numbers become the gradient by the logits, in place of the first.

With l = z_student - z_teacher and its mean m = sum_v p_v l_v under the student,

    KL        = m - logsumexp(z_student) + logsumexp(z_teacher)
    dKL/dz_v  = p_v (l_v - m)

Shape letters: ``C`` positions of a tile, ``V`` vocabulary, ``B`` blocks of the vocabulary, ``D`` student width,
``E`` teacher width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from posttrain.divergence.measure import Measure

# Blocks, warps and pipeline stages that were fastest on an H200, of ten tried at widths 576 and 2,048.
BLOCK_C, BLOCK_V, BLOCK_K = 64, 128, 64
NUM_WARPS, NUM_STAGES = 4, 4
_BLOCK_ROWS = 16
"""Positions per program of the two kernels that only stream."""
_ALIGNMENT = 8
"""Half-precision rows start at multiples of this many entries, as bulk copies and matrix units ask for."""


class TritonTiles:
    """KL and logit gradient of tiles of up to ``max_positions`` positions; the memory of one tile is used again.

    ``student_head_VD`` and ``teacher_head_VE`` are contiguous and half precision, like the hidden states given later,
    and their widths are multiples of 8.
    """

    BYTES_PER_ENTRY = 4

    def __init__(
        self,
        max_positions: int,
        student_head_VD: torch.Tensor,
        teacher_head_VE: torch.Tensor,
        measure: Measure,
        *,
        largest_slice: int = 0,
    ) -> None:
        self._measure = measure
        self._heads = student_head_VD.detach(), teacher_head_VE.detach()
        device = student_head_VD.device
        self._vocabulary = len(student_head_VD)
        self._num_blocks = triton.cdiv(self._vocabulary, BLOCK_V)
        stride = triton.cdiv(self._vocabulary, _ALIGNMENT) * _ALIGNMENT
        self._below_top = torch.empty(max_positions, stride, dtype=torch.float16, device=device)
        self._difference = torch.empty_like(self._below_top)
        # Highest logit, sum of exponentials and mean difference of each block; then the teacher's first two.
        self._sums = torch.empty(5, self._num_blocks, max_positions, dtype=torch.float32, device=device)

    def divergence_and_logit_gradient(
        self,
        student_hidden_CD: torch.Tensor,
        teacher_hidden_CE: torch.Tensor,
        *,
        weights_C: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """KL [C] in nats, float32, and the gradient [C, V] of ``sum_c weights_c KL_c`` in the hidden states' dtype.

        The gradient is with respect to the student's logits before the temperature, None without weights, and
        overwritten by the next call.
        """
        hidden = student_hidden_CD, teacher_hidden_CE
        count = len(student_hidden_CD)
        below_top, difference, sums = self._below_top[:count], self._difference[:count], self._sums[:, :, :count]
        strides = sums.stride(0), sums.stride(1)
        _block_sums_kernel[(triton.cdiv(count, BLOCK_C) * self._num_blocks,)](
            *(TensorDescriptor.from_tensor(tensor, [BLOCK_C, BLOCK_K]) for tensor in hidden),
            *(TensorDescriptor.from_tensor(tensor, [BLOCK_V, BLOCK_K]) for tensor in self._heads),
            below_top,
            difference,
            sums,
            count,
            1.0 / self._measure.temperature,
            self._measure.teacher_logit_cap or 0.0,
            below_top.stride(0),
            *strides,
            CAPPED=self._measure.teacher_logit_cap is not None,
            VOCABULARY=self._vocabulary,
            STUDENT_WIDTH=hidden[0].shape[1],
            TEACHER_WIDTH=hidden[1].shape[1],
            BLOCK_C=BLOCK_C,
            BLOCK_V=BLOCK_V,
            BLOCK_K=BLOCK_K,
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )
        row_blocks = triton.cdiv(count, _BLOCK_ROWS)
        if self._measure.vocabulary_group is None:
            kl_C = self._combined(sums, weights_C)
        else:
            kl_C = self._combined_over_slices(sums, weights_C)
        if weights_C is None:
            return kl_C, None
        gradient = below_top.view(student_hidden_CD.dtype)
        _gradient_kernel[(row_blocks, self._num_blocks)](
            below_top,
            difference,
            gradient,
            sums,
            count,
            below_top.stride(0),
            *strides,
            VOCABULARY=self._vocabulary,
            BLOCK_C=_BLOCK_ROWS,
            BLOCK_V=BLOCK_V,
        )
        return kl_C, gradient[:, : self._vocabulary]

    def _combined(self, sums_5BC: torch.Tensor, weights_C: torch.Tensor | None) -> torch.Tensor:
        """The KL [C]. With weights, a block's total becomes the factor of its exponentials, and its mean what is added
        to its differences."""
        count = sums_5BC.shape[2]
        kl_C = torch.empty(count, dtype=torch.float32, device=sums_5BC.device)
        _combine_kernel[(triton.cdiv(count, _BLOCK_ROWS),)](
            sums_5BC,
            kl_C if weights_C is None else weights_C,
            kl_C,
            count,
            1.0 / self._measure.temperature,
            sums_5BC.stride(0),
            sums_5BC.stride(1),
            WEIGHTED=weights_C is not None,
            NUM_BLOCKS=self._num_blocks,
            BLOCK_C=_BLOCK_ROWS,
            BLOCK_B=128,
        )
        return kl_C

    def _combined_over_slices(self, sums_5BC: torch.Tensor, weights_C: torch.Tensor | None) -> torch.Tensor:
        """As ``_combined``, where other processes have the rest of the vocabulary."""
        top_BC, total_BC, mean_BC, teacher_top_BC, teacher_total_BC = sums_5BC
        mean_BC = mean_BC - (top_BC - teacher_top_BC)
        kl_C, log_scales_2BC = self._measure.of_blocks(
            torch.stack([top_BC, teacher_top_BC, total_BC, teacher_total_BC, mean_BC])
        )
        if weights_C is not None:
            torch.mul(log_scales_2BC[0].exp(), weights_C / self._measure.temperature, out=sums_5BC[1])
            torch.sub(mean_BC + log_scales_2BC[0] - log_scales_2BC[1], kl_C, out=sums_5BC[2])
        return kl_C


@triton.jit
def _logits(
    hidden,
    head,
    row,
    column,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    logits = tl.zeros((BLOCK_C, BLOCK_V), dtype=tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        logits = tl.dot(hidden.load([row, k]), head.load([column, k]).T, logits)
    return logits


@triton.jit
def _capped(logits, cap):
    """``cap tanh(logits / cap)``, by its series where the quotient of exponentials would lose digits."""
    x = logits / cap
    falling = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - falling) / (1.0 + falling)
    square = x * x
    small = x * (1.0 - square * (1.0 / 3 - square * (2.0 / 15)))
    return cap * tl.where(square < 0.01, small, tl.where(x < 0, -size, size))


@triton.jit
def _block_sums_kernel(
    student_hidden,
    teacher_hidden,
    student_head,
    teacher_head,
    below_top,
    difference,
    sums,
    num_positions,
    inverse_temperature,
    cap,
    row_stride,
    sum_stride,
    block_stride,
    CAPPED: tl.constexpr,
    VOCABULARY: tl.constexpr,
    STUDENT_WIDTH: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs side by side share a block of both heads.
    row_blocks = tl.cdiv(num_positions, BLOCK_C)
    block = tl.program_id(0) // row_blocks
    row = (tl.program_id(0) % row_blocks) * BLOCK_C
    column = block * BLOCK_V
    student = _logits(student_hidden, student_head, row, column, STUDENT_WIDTH, BLOCK_C, BLOCK_V, BLOCK_K)
    teacher = _logits(teacher_hidden, teacher_head, row, column, TEACHER_WIDTH, BLOCK_C, BLOCK_V, BLOCK_K)
    rows = row + tl.arange(0, BLOCK_C)
    columns = column + tl.arange(0, BLOCK_V)
    exists = columns[None, :] < VOCABULARY
    if CAPPED:
        teacher = _capped(teacher, cap)
    student *= inverse_temperature
    teacher *= inverse_temperature
    apart = tl.where(exists, student - teacher, 0.0)
    student = tl.where(exists, student, float("-inf"))
    teacher = tl.where(exists, teacher, float("-inf"))
    top = tl.max(student, 1)
    teacher_top = tl.max(teacher, 1)
    below = student - top[:, None]
    weight = tl.exp(below)
    total = tl.sum(weight, 1)
    mean = tl.sum(weight * apart, 1) / total
    teacher_total = tl.sum(tl.exp(teacher - teacher_top[:, None]), 1)
    # Half precision ends at 65504; what is that far away has probability 0.
    apart = tl.minimum(tl.maximum(apart - mean[:, None], -60000.0), 60000.0)
    present = rows < num_positions
    where = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    kept = present[:, None] & exists
    tl.store(below_top + where, tl.maximum(below, -60000.0).to(tl.float16), kept)
    tl.store(difference + where, apart.to(tl.float16), kept)
    at = sums + block * block_stride + rows
    tl.store(at, top, present)
    tl.store(at + sum_stride, total, present)
    tl.store(at + 2 * sum_stride, mean, present)
    tl.store(at + 3 * sum_stride, teacher_top, present)
    tl.store(at + 4 * sum_stride, teacher_total, present)


@triton.jit
def _combine_kernel(
    sums,
    weights,
    kl,
    num_positions,
    inverse_temperature,
    sum_stride,
    block_stride,
    WEIGHTED: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """As ``TritonTiles._combined``."""
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    present = rows < num_positions
    top = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    teacher_top = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_C,), tl.float32)
    teacher_total = tl.zeros((BLOCK_C,), tl.float32)
    weighted = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, NUM_BLOCKS, BLOCK_B):
        blocks = start + tl.arange(0, BLOCK_B)
        at = sums + blocks[:, None] * block_stride + rows[None, :]
        kept = (blocks[:, None] < NUM_BLOCKS) & present[None, :]
        tops = tl.load(at, kept, float("-inf"))
        higher = tl.maximum(top, tl.max(tops, 0))
        mass = tl.load(at + sum_stride, kept, 0.0) * tl.exp(tops - higher[None, :])
        means = tl.load(at + 2 * sum_stride, kept, 0.0)
        rescale = tl.exp(top - higher)
        total = total * rescale + tl.sum(mass, 0)
        weighted = weighted * rescale + tl.sum(mass * means, 0)
        top = higher
        tops = tl.load(at + 3 * sum_stride, kept, float("-inf"))
        higher = tl.maximum(teacher_top, tl.max(tops, 0))
        mass = tl.load(at + 4 * sum_stride, kept, 0.0) * tl.exp(tops - higher[None, :])
        teacher_total = teacher_total * tl.exp(teacher_top - higher) + tl.sum(mass, 0)
        teacher_top = higher
    mean = weighted / total
    tl.store(kl + rows, mean - top - tl.log(total) + teacher_top + tl.log(teacher_total), present)
    if WEIGHTED:
        factor = tl.load(weights + rows, present, 0.0) * inverse_temperature / total
        for start in range(0, NUM_BLOCKS, BLOCK_B):
            blocks = start + tl.arange(0, BLOCK_B)
            at = sums + blocks[:, None] * block_stride + rows[None, :]
            kept = (blocks[:, None] < NUM_BLOCKS) & present[None, :]
            tops = tl.load(at, kept, float("-inf"))
            means = tl.load(at + 2 * sum_stride, kept, 0.0)
            tl.store(at + sum_stride, tl.exp(tops - top[None, :]) * factor[None, :], kept)
            tl.store(at + 2 * sum_stride, means - mean[None, :], kept)


@triton.jit
def _gradient_kernel(
    below_top,
    difference,
    grad,
    sums,
    num_positions,
    row_stride,
    sum_stride,
    block_stride,
    VOCABULARY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    present = rows < num_positions
    at = sums + tl.program_id(1) * block_stride + rows
    scale = tl.load(at + sum_stride, present, 0.0)
    shift = tl.load(at + 2 * sum_stride, present, 0.0)
    where = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    kept = present[:, None] & (columns[None, :] < VOCABULARY)
    probability = tl.exp(tl.load(below_top + where, kept, 0.0).to(tl.float32)) * scale[:, None]
    apart = tl.load(difference + where, kept, 0.0).to(tl.float32) + shift[:, None]
    tl.store(grad + where, (probability * apart).to(grad.dtype.element_ty), kept)
