from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from benchmarks.hardware import DEVICE
from detr_fast.ops.dropout import keep_mask, next_seed, shared_seed

CPU = torch.device("cpu")


def draws(count):
    return [(seed.item(), offset) for seed, offset in (next_seed(CPU) for _ in range(count))]


def test_philox_gives_the_published_numbers():
    # Random123's known answers, kat_vectors, "philox4x32 7".
    from detr_fast.ops.dropout import _philox

    def words(key, c0, c1, c2, c3):
        seed = torch.tensor([key[0] | (key[1] << 32) if key[1] < 1 << 31 else (key[0] | key[1] << 32) - (1 << 64)])
        found = _philox(seed, torch.tensor([c0]), torch.tensor([c1]), torch.tensor([c2]), c3)
        return [f"{word.item():08x}" for word in found]

    assert words((0, 0), 0, 0, 0, 0) == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]
    ones = 0xFFFFFFFF
    assert words((ones, ones), ones, ones, ones, ones) == ["5207ddc2", "45165e59", "4d8ee751", "8c52f662"]


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_of_kept_elements_is_that_of_p(p, tiles):
    kept = keep_mask(next_seed(CPU)[0], 0, p, 1, 500, 1000, tiles=tiles).double()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 4 * deviation
    # and in every one of the places that a Philox call serves
    for rows, columns in ((16, 1), (1, 16)):
        for row in range(rows):
            for column in range(columns):
                part = kept[:, row::rows, column::columns]
                assert abs(part.mean().item() - (1 - p)) < 5 * (p * (1 - p) / part.numel()) ** 0.5


def _correlation(one, other):
    return torch.corrcoef(torch.stack([one.flatten().double(), other.flatten().double()]))[0, 1].abs().item()


@pytest.mark.parametrize("tiles", [False, True])
def test_masks_of_ops_heads_rows_and_columns_are_independent(tiles):
    seed = torch.tensor([42])
    heads = 4 if tiles else 1
    kept = keep_mask(seed, 0, 0.5, heads, 256, 256, tiles=tiles)
    limit = 4 / 255**0.5 / 255**0.5 * 1.5
    assert _correlation(kept, keep_mask(seed, 1, 0.5, heads, 256, 256, tiles=tiles)) < limit
    assert _correlation(kept, keep_mask(seed + 1, 0, 0.5, heads, 256, 256, tiles=tiles)) < limit
    assert _correlation(kept, kept.mT) < limit
    for distance in (1, 2, 4, 8, 16):
        assert _correlation(kept[:, distance:], kept[:, :-distance]) < limit
        assert _correlation(kept[..., distance:], kept[..., :-distance]) < limit
    for head in range(1, heads):
        assert _correlation(kept[0], kept[head]) < 2 * limit


@pytest.mark.parametrize("tiles", [False, True])
def test_a_larger_tensors_mask_begins_with_a_smaller_ones(tiles):
    seed = torch.tensor([7])
    large = keep_mask(seed, 5, 0.3, 1, 50, 70, tiles=tiles)
    assert torch.equal(keep_mask(seed, 5, 0.3, 1, 33, 11, tiles=tiles), large[:, :33, :11])


def test_manual_seed_repeats_seeds_and_each_draw_differs():
    torch.manual_seed(3)
    first = draws(3)
    torch.manual_seed(3)
    assert draws(3) == first
    assert len({seed for seed, _ in first}) == 3
    assert all(offset == 1 for _, offset in first)


def test_a_block_shares_one_draw_and_tells_ops_apart_by_offset():
    with shared_seed():
        one = draws(2)
        with shared_seed():
            two = draws(1)
        three = draws(1)
    other = draws(1)
    assert [offset for _, offset in one + two + three] == [1, 2, 3, 4]
    assert len({seed for seed, _ in one + two + three}) == 1
    assert other[0][0] != one[0][0]


def test_ops_of_a_block_that_drop_tiles_and_rows_take_no_call_in_common():
    from detr_fast.ops.dropout import _philox, _tile_words

    with shared_seed():
        (seed, first), (_, second) = next_seed(CPU), next_seed(CPU)
    for tiles, rows in ((first, second), (second, first)):
        of_tiles = _tile_words(seed, tiles, 16, 32, 256)
        group, row = torch.arange(16), torch.arange(32)[:, None]
        of_rows = torch.stack(_philox(seed, group, row, torch.zeros_like(group), rows))
        assert not set(of_tiles.flatten().tolist()) & set(of_rows.flatten().tolist())


def test_an_error_inside_the_block_ends_it():
    with pytest.raises(KeyError), shared_seed():
        raise KeyError
    assert [offset for _, offset in draws(2)] == [1, 1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("block", ["around", "inside", "both"])
def test_recomputation_in_checkpoints_draws_the_same_seeds(block, reentrant):
    seen = []

    def region(x):
        if block != "around":
            with shared_seed():
                seen.append(draws(3))
        else:
            seen.append(draws(3))
        return x.sin().cos()

    def forward(x):
        before = draws(1)
        return checkpoint(region, x, use_reentrant=reentrant), before + draws(1)

    x = torch.randn(3, requires_grad=True)
    if block == "inside":
        y, outside = forward(x)
    else:
        with shared_seed():
            y, outside = forward(x)
        assert len({seed for seed, _ in outside}) == 1
    y.sum().backward()
    assert len(seen) == 2
    assert seen[0] == seen[1]
    assert len({*seen[0], *outside}) == 5


def test_compiled_code_draws_without_a_graph_break_and_masks_trace():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def masked(x):
        with shared_seed():
            seed, offset = next_seed(x.device)
            return x * keep_mask(seed, offset, 0.5, 1, *x.shape)[0]

    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    x = torch.ones(20, 30)
    torch.manual_seed(1)
    found = compiled(x)
    torch.manual_seed(1)
    assert torch.equal(found, masked(x))
    with FakeTensorMode():
        seed, offset = next_seed(torch.device("cuda"))
        mask = keep_mask(seed, offset, 0.5, 3, 20, 30, tiles=True)
    assert (mask.shape, mask.dtype, mask.device.type) == ((3, 20, 30), torch.bool, "cuda")


@pytest.mark.gpu
def test_on_a_gpu_each_replay_of_a_graph_draws_a_new_seed():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed, _ = next_seed(DEVICE)
    values = set()
    for _ in range(3):
        graph.replay()
        values.add(seed.item())
    assert len(values) == 3
