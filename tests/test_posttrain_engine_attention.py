"""The two ways in which the embedded engine computes attention."""

from __future__ import annotations

import pytest
import torch

from posttrain.engine import attention, cpu_attention
from posttrain.engine.attention import Layout, Stretch


@pytest.mark.parametrize("key_heads", [9, 3])
def test_pytorchs_kernels_give_what_the_compiled_one_gives(key_heads: int):
    if not cpu_attention.serves(torch.empty(1, 64)):
        pytest.skip("attention could not be compiled here")
    torch.manual_seed(0)
    query = torch.randn(1, 9, 15, 64)
    key, value = torch.randn(2, 6, key_heads, 64, 64)
    stretches = [Stretch(row=2, past=0, count=7), Stretch(row=3, past=10, count=5), Stretch(row=4, past=20, count=1)]
    rows = torch.tensor([0, 1, *[2] * 7, *[3] * 5, 4])
    positions = torch.tensor([11, 30, *range(7), *range(10, 15), 20])
    layout = Layout(2, stretches, rows, positions)
    compiled = cpu_attention.attend(query[0], key, value, rows, layout.seen_N, scaling=0.125)
    torch.testing.assert_close(attention._fused(query, key, value, layout, 0.125), compiled)
