"""The divergences of bfloat16 models on a CPU with AVX-512: logit products and what follows, fused in C++.

Float32 logits live in the innermost cache only, a block of positions and vocabulary at a time, made by the kernel
behind PyTorch's own bfloat16 products. A block leaves its share of every sum over the vocabulary in float32, and two
half-precision numbers per entry: the higher of the two models' logits below their highest in the block, and the
difference of the two. Both are near 0 where probability lies, so rounding them moves a probability by 2^-12 there; the
difference of nearly equal ones keeps its digits; and a constant between the two models' logits does not matter. Either
KL is made of the sums alone and so is exact to float32; the Jensen-Shannon divergence, which is not a sum over blocks
before the whole mass is known, and all gradients are made of the kept numbers.

``cpu_tiles.cpp`` is compiled once a machine, which takes a C++ compiler and some seconds, and kept in the cache folder.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from posttrain.divergence.measure import Measure
from posttrain.native import compiled

BLOCK_V = 128
KINDS = ("reverse_kl", "forward_kl", "jsd")
"""As numbered in the C++ source."""
_ROW_MULTIPLE = 32
SOURCE = Path(__file__).with_suffix(".cpp")


def is_available() -> bool:
    """Whether this machine has the instructions and a compiler; compiles on the first call."""
    return _library() is not None


class CpuTiles:
    """As ``TorchTiles``; hidden states and heads are contiguous bfloat16 with even widths."""

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
        self._heads = student_head_VD.detach(), teacher_head_VE.detach()
        self._measure = measure
        self._vocabulary = len(student_head_VD)
        self._num_blocks = -(-self._vocabulary // BLOCK_V)
        self._higher = torch.empty(max_positions, self._vocabulary, dtype=torch.float16)
        self._apart = torch.empty_like(self._higher)
        self._sums = torch.empty(5, self._num_blocks, max_positions)

    def divergence_and_logit_gradient(
        self,
        student_hidden_CD: torch.Tensor,
        teacher_hidden_CE: torch.Tensor,
        *,
        weights_C: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``TorchTiles.divergence_and_logit_gradient``; gradients are bfloat16."""
        library = _library()
        assert library is not None, "callers ask is_available() first"
        measure, count = self._measure, len(student_hidden_CD)
        kind = KINDS.index(measure.kind)
        higher, apart, sums_5BC = self._higher[:count], self._apart[:count], self._sums[:, :, :count]
        strides = higher.stride(0), sums_5BC.stride(0), sums_5BC.stride(1)
        pointers = _pointers(
            student_hidden_CD, self._heads[0], teacher_hidden_CE, self._heads[1], higher, apart, sums_5BC
        )
        widths = student_hidden_CD.shape[1], teacher_hidden_CE.shape[1]
        scale, cap = 1 / measure.temperature, measure.teacher_logit_cap or 0.0

        def block_sums(first: int, last: int) -> None:
            library.posttrain_block_sums(
                kind, *pointers, count, self._vocabulary, *widths, *strides, scale, cap, first, last
            )

        _in_threads(block_sums, self._num_blocks)
        divergence_C, log_scales_2BC = measure.of_blocks(sums_5BC)
        kept = _pointers(higher, apart, log_scales_2BC)
        shape = self._vocabulary, higher.stride(0), log_scales_2BC.stride(0), log_scales_2BC.stride(1)
        centre_C = divergence_C
        if measure.kind == "jsd":
            totals_2C = torch.empty(2, count)

            def jsd_sums(first: int, last: int) -> None:
                library.posttrain_jsd_sums(*kept, totals_2C.data_ptr(), *shape, count, measure.beta, first, last)

            _in_threads(jsd_sums, count)
            divergence_C, centre_C = measure.total(totals_2C)
        if weights_C is None:
            return divergence_C, None
        scaled_C = weights_C / measure.temperature

        def gradient(first: int, last: int) -> None:
            library.posttrain_gradient(kind, *kept, *_pointers(scaled_C, centre_C), *shape, measure.beta, first, last)

        _in_threads(gradient, count)
        return divergence_C, higher.view(torch.bfloat16)


def head_gradient(total_VD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor, *, add: bool) -> None:
    """``total_VD``, float32, becomes ``grad_CV.T @ hidden_CD``, or with ``add`` grows by it; sums are float32."""
    library = _library()
    assert library is not None, "callers ask is_available() first"
    (count, vocabulary), width = grad_CV.shape, hidden_CD.shape[1]
    padded = -(-count // _ROW_MULTIPLE) * _ROW_MULTIPLE
    packed = torch.empty(padded, width, dtype=torch.bfloat16)
    library.posttrain_pack_positions(hidden_CD.data_ptr(), count, width, padded, packed.data_ptr())
    pointers = _pointers(grad_CV, packed, total_VD)

    def blocks(first: int, last: int) -> None:
        library.posttrain_head_gradient(
            *pointers, count, padded, vocabulary, width, grad_CV.stride(0), int(add), first, last
        )

    _in_threads(blocks, -(-vocabulary // BLOCK_V))


def _pointers(*tensors: torch.Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _in_threads(work: Callable[[int, int], None], count: int) -> None:
    """``work(first, last)`` over 0 to ``count``, on as many threads as PyTorch uses."""
    num_threads = torch.get_num_threads()
    # Several pieces a thread, since the threads share cores with the rollouts.
    bounds = [count * piece // (4 * num_threads) for piece in range(4 * num_threads + 1)]
    list(_threads(num_threads).map(work, bounds[:-1], bounds[1:]))


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="divergence")


@functools.cache
def _library() -> Any:
    """The compiled kernels, or None where they cannot run or be compiled."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.cpu._is_avx512_bf16_supported():
        return None
    library = compiled(SOURCE, otherwise="distillation takes the slower path")
    if library is None:
        return None
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.posttrain_block_sums.argtypes = [size, *[pointer] * 7, *[size] * 7, number, number, size, size]
    library.posttrain_jsd_sums.argtypes = [*[pointer] * 4, *[size] * 5, number, size, size]
    library.posttrain_gradient.argtypes = [size, *[pointer] * 5, *[size] * 4, number, size, size]
    library.posttrain_pack_positions.argtypes = [pointer, size, size, size, pointer]
    library.posttrain_head_gradient.argtypes = [pointer] * 3 + [size] * 8
    for name in ("block_sums", "jsd_sums", "gradient", "pack_positions", "head_gradient"):
        getattr(library, f"posttrain_{name}").restype = None
    return library
