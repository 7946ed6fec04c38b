"""What other libraries' kernels are given: nothing that they would have to copy first, for then they would seem slow."""

from __future__ import annotations

import sys
import textwrap

import pytest
import torch

from benchmarks import libraries
from benchmarks.libraries import Padded
from benchmarks.timing import NotInstalled


@pytest.mark.parametrize("keys", [100, 850, 1000, 7])
def test_the_mask_for_padded_keys_lies_as_the_memory_efficient_kernel_takes_it(keys):
    lengths = torch.tensor([keys, keys * 2 // 3])
    visible = torch.arange(keys) < lengths[:, None]
    bias = Padded(visible, queries=3, dtype=torch.bfloat16).bias
    assert bias.shape == (2, 1, 1, keys)
    assert torch.equal(bias == 0, visible[:, None, None])
    assert torch.equal(bias == -torch.inf, ~visible[:, None, None])
    assert bias.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in bias.stride()[:-1])


def test_packed_rows_are_those_of_all_queries_and_of_the_keys_that_count():
    lengths = torch.tensor([3, 2])
    padded = Padded(torch.arange(3) < lengths[:, None], queries=4, dtype=torch.float32)
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 3, 1, 8)
    rows, keys, values = padded.rows(q, k, 2 * k)
    assert torch.equal(rows, torch.cat([*q]))
    assert torch.equal(keys, torch.cat([k[0], k[1, :2]]))
    assert torch.equal(values, 2 * keys)
    assert (padded.query_ends.tolist(), padded.key_ends.tolist()) == ([0, 4, 8], [0, 3, 5])


def fake_xformers(tmp_path, monkeypatch, built):
    package = tmp_path / "xformers"
    for name, text in {
        "__init__.py": "",
        "_cpp_lib.py": f"_built_with_cuda = {built}",
        "ops.py": """
            import torch

            class BlockDiagonalMask:
                @classmethod
                def from_seqlens(cls, q_seqlen, kv_seqlen, *, device=None):
                    mask = cls()
                    mask.lengths = q_seqlen, kv_seqlen
                    return mask

            class fmha:
                class attn_bias:
                    BlockDiagonalMask = BlockDiagonalMask

            def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0):
                heads_first = lambda t: t.transpose(1, 2)
                blocks = ((q.shape[1],), (k.shape[1],)) if attn_bias is None else attn_bias.lengths
                parts = zip(*(t.split(n, 1) for t, n in ((q, list(blocks[0])), (k, list(blocks[1])), (v, list(blocks[1])))))
                attend = torch.nn.functional.scaled_dot_product_attention
                return torch.cat([heads_first(attend(*map(heads_first, part))) for part in parts], 1)
        """,
    }.items():
        package.mkdir(exist_ok=True)
        (package / name).write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    libraries.xformers_ops.cache_clear()


@pytest.fixture(autouse=True)
def _forgotten():
    yield
    libraries.xformers_ops.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]


def test_an_xformers_that_could_not_load_its_part_in_c_counts_as_not_installed(tmp_path, monkeypatch):
    fake_xformers(tmp_path, monkeypatch, built=False)
    with pytest.raises(NotInstalled, match="nvidia-cuda-runtime-cu12"):
        libraries.xformers_ops()


@pytest.mark.parametrize("padding", [False, True])
def test_xformers_gets_packed_keys_and_gives_what_attention_gives(tmp_path, monkeypatch, padding):
    fake_xformers(tmp_path, monkeypatch, built=True)
    visible = torch.arange(5) < torch.tensor([5, 3])[:, None]
    q, k, v = torch.randn(2, 4, 2, 8), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    padded = Padded(visible, queries=4, dtype=torch.float32) if padding else None
    found = libraries.xformers_attention(q, k, v, padded, 0.0)
    mask = visible[:, None, None] if padding else None
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask)
    torch.testing.assert_close(found, expected.transpose(1, 2))
