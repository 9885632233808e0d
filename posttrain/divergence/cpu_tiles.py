"""Reverse KL of bfloat16 models on a CPU with AVX-512: logit products and what follows, fused in C++.

The same as ``posttrain.divergence.triton_tiles``, whose description holds: float32 logits live in the innermost cache
only, a block at a time, made by the kernel behind PyTorch's own bfloat16 products. ``cpu_tiles.cpp`` is compiled once a
machine, which takes a C++ compiler and some seconds, and kept in the cache folder.
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
_ROW_MULTIPLE = 32
SOURCE = Path(__file__).with_suffix(".cpp")


def is_available() -> bool:
    """Whether this machine has the instructions and a compiler; compiles on the first call."""
    return _library() is not None


class CpuTiles:
    """As ``TritonTiles``; hidden states and heads are contiguous bfloat16 with even widths."""

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
        self._vocabulary = len(student_head_VD)
        self._num_blocks = -(-self._vocabulary // BLOCK_V)
        self._below_top = torch.empty(max_positions, self._vocabulary, dtype=torch.float16)
        self._difference = torch.empty_like(self._below_top)
        self._sums = torch.empty(5, self._num_blocks, max_positions)

    def divergence_and_logit_gradient(
        self,
        student_hidden_CD: torch.Tensor,
        teacher_hidden_CE: torch.Tensor,
        *,
        weights_C: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``TritonTiles.divergence_and_logit_gradient``."""
        library = _library()
        assert library is not None, "callers ask is_available() first"
        count, vocabulary = len(student_hidden_CD), self._vocabulary
        below_top, difference, sums = self._below_top[:count], self._difference[:count], self._sums[:, :, :count]
        strides = below_top.stride(0), sums.stride(0), sums.stride(1)
        pointers = (student_hidden_CD, self._heads[0], teacher_hidden_CE, self._heads[1], below_top, difference, sums)
        temperature = self._measure.temperature
        widths = student_hidden_CD.shape[1], teacher_hidden_CE.shape[1]

        def block_sums(first: int, last: int) -> None:
            library.posttrain_block_sums(
                *(tensor.data_ptr() for tensor in pointers),
                count,
                vocabulary,
                *widths,
                *strides,
                1.0 / temperature,
                first,
                last,
            )

        _in_threads(block_sums, self._num_blocks)
        top_BC, total_BC, mean_BC, teacher_top_BC, teacher_total_BC = sums
        log_mass_BC = total_BC.log() + top_BC
        lse_C = log_mass_BC.logsumexp(0)
        mean_C = ((log_mass_BC - lse_C).exp_() * mean_BC).sum(0)
        kl_C = mean_C - lse_C + (teacher_total_BC.log() + teacher_top_BC).logsumexp(0)
        if weights_C is None:
            return kl_C, None
        factors = sums[1:3]
        torch.mul((top_BC - lse_C).exp_(), weights_C / temperature, out=factors[0])
        factors[1] -= mean_C

        def gradient(first: int, last: int) -> None:
            library.posttrain_gradient(
                *(tensor.data_ptr() for tensor in (below_top, difference, factors)), vocabulary, *strides, first, last
            )

        _in_threads(gradient, count)
        return kl_C, below_top.view(torch.bfloat16)


def head_gradient(total_VD: torch.Tensor, grad_CV: torch.Tensor, hidden_CD: torch.Tensor, *, add: bool) -> None:
    """``total_VD``, float32, becomes ``grad_CV.T @ hidden_CD``, or with ``add`` grows by it; sums are float32."""
    library = _library()
    assert library is not None, "callers ask is_available() first"
    (count, vocabulary), width = grad_CV.shape, hidden_CD.shape[1]
    padded = -(-count // _ROW_MULTIPLE) * _ROW_MULTIPLE
    packed = torch.empty(padded, width, dtype=torch.bfloat16)
    library.posttrain_pack_positions(hidden_CD.data_ptr(), count, width, padded, packed.data_ptr())
    pointers = [tensor.data_ptr() for tensor in (grad_CV, packed, total_VD)]

    def blocks(first: int, last: int) -> None:
        library.posttrain_head_gradient(
            *pointers, count, padded, vocabulary, width, grad_CV.stride(0), int(add), first, last
        )

    _in_threads(blocks, -(-vocabulary // BLOCK_V))


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
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.posttrain_block_sums.argtypes = [pointer] * 7 + [size] * 7 + [ctypes.c_float] + [size] * 2
    library.posttrain_gradient.argtypes = [pointer] * 3 + [size] * 6
    library.posttrain_pack_positions.argtypes = [pointer, size, size, size, pointer]
    library.posttrain_head_gradient.argtypes = [pointer] * 3 + [size] * 8
    for name in ("block_sums", "gradient", "pack_positions", "head_gradient"):
        getattr(library, f"posttrain_{name}").restype = None
    return library
