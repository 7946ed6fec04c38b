"""What other libraries' kernels are given: nothing that they would have to copy first, for then they would seem slow."""

from __future__ import annotations

import pytest
import torch

from benchmarks.libraries import Padded


@pytest.mark.parametrize("keys", [100, 850, 1000, 7])
def test_the_mask_for_padded_keys_lies_as_the_memory_efficient_kernel_takes_it(keys):
    lengths = torch.tensor([keys, keys * 2 // 3])
    visible = torch.arange(keys) < lengths[:, None]
    bias = Padded(visible, heads=8, queries=3, dtype=torch.bfloat16).bias
    assert bias.shape == (2, 8, 3, keys)
    assert torch.equal(bias == 0, visible[:, None, None].expand_as(bias))
    assert torch.equal(bias == -torch.inf, ~visible[:, None, None].expand_as(bias))
    for given in (bias, bias[:, :1, :1]):  # xformers', SDPA's
        assert given.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in given.stride()[:-1])
