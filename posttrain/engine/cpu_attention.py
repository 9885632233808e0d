"""Attention of a packed pass on a CPU, in C++: every token over the states of its own row, and no others.

What a query gets depends on that query and on the states it sees, in an order of additions fixed by their positions:
softmax runs over blocks of states with a running maximum (Milakov & Gimelshein 2018, as in FlashAttention), whatever
else is in the pass. Nothing is padded or masked. Keys and values are read where they lie in the cache, in float32 or
bfloat16, and every sum is in float32.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from posttrain.native import compiled

SOURCE = Path(__file__).with_suffix(".cpp")
BLOCK = 64
"""States that are read together; the cache's capacity is a multiple of it."""
_HEAD_SIZES = (16, 32, 48, 64, 80, 96, 128, 256)
_DTYPES = (torch.float32, torch.bfloat16)


def serves(query: torch.Tensor) -> bool:
    """Whether there is a kernel for such queries; compiles on the first call."""
    fits = query.device.type == "cpu" and query.dtype in _DTYPES and query.shape[-1] in _HEAD_SIZES
    return fits and query.stride(-1) == 1 and _library() is not None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows_N: torch.Tensor,
    seen_N: torch.Tensor,
    *,
    scaling: float,
) -> torch.Tensor:
    """[N, heads, D] from ``query`` [heads, N, D]; callers ask ``serves`` first.

    ``key`` and ``value`` are contiguous, [rows, key heads, capacity, D], the capacity a multiple of ``BLOCK``. Token
    ``n`` attends to the first ``seen_N[n]`` states of row ``rows_N[n]``; both are contiguous int64.
    """
    assert all(tensor.is_contiguous() for tensor in (key, value, rows_N, seen_N)), "the kernel would read elsewhere"
    heads, count, dim = query.shape
    output = query.new_empty(count, heads, dim)
    library = _library()
    assert library is not None, "callers ask serves() first"
    library.posttrain_attention(
        query.dtype is torch.float32,
        *(tensor.data_ptr() for tensor in (query, key, value, rows_N, seen_N, output)),
        *(count, heads, key.shape[1], key.shape[2], dim),
        *query.stride()[:2],
        scaling,
        torch.get_num_threads(),
    )
    return output


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiled(SOURCE, otherwise="the embedded engine takes the slower path")
    if library is not None:
        pointers, sizes = (ctypes.c_void_p,) * 6, (ctypes.c_int64,) * 7
        library.posttrain_attention.argtypes = (ctypes.c_int, *pointers, *sizes, ctypes.c_float, ctypes.c_int)
        library.posttrain_attention.restype = None
    return library
