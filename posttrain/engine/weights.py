"""Weights on their way from the learner to the engines, as NumPy arrays that shared memory can hold.

Ray's object store keeps NumPy arrays out of band and hands every reader on the node the same memory, but pickles
torch tensors. NumPy has no bfloat16, so those travel as their bits in uint16; no weight is stored in uint16 itself,
so the type alone says what an array is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

WeightArrays = dict[str, npt.NDArray[Any]]


def export_weights(tensors: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> WeightArrays:
    """Named tensors as arrays in ``dtype`` (float32, float16 or bfloat16), in host memory.

    Tensors that share memory (tied weights) are exported once, under the first of their names. A tensor that
    already has the dtype and lies in host memory is not copied: put the result away before the next optimizer step.
    """
    arrays: WeightArrays = {}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name, tensor in tensors:
        # Empty tensors share the address 0.
        identity = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        ready = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        arrays[name] = (ready.view(torch.uint16) if dtype == torch.bfloat16 else ready).numpy()
    return arrays


def import_weights(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, torch.Tensor]:
    """The tensors behind exported arrays, sharing their memory. Read-only memory stays so: copy before writing."""
    with warnings.catch_warnings():
        # Arrays from the object store are read-only, of which torch warns; the readers here only copy from them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return {name: _tensor(array) for name, array in arrays.items()}


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor
