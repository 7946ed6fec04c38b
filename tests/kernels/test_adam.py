"""Adam's launches beside PyTorch's fused ones and fp64: sizes, places in memory, numbers of tensors, settings, clipping."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from detr_fast.kernels import adam, offline
from detr_fast.kernels.adam import ADAM, AdamTables, Settings, adam_step
from torch.nn.utils import clip_grad_norm_

from detr_fast.testing import assert_close_to_truth

interpreted = pytest.mark.interpreter(int32_limit=1 << 16)
CHUNK = ADAM.chunk


def off_16_bytes(tensor):
    """The same numbers from an address on that is no multiple of 16."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].copy_(tensor.flatten()).view(tensor.shape)


def case(shapes, dtype=torch.float32, places=lambda i, t: t, scale=1.0):
    """Parameters, gradients and moments, as after some steps."""
    drawn = [[torch.randn(shape) for shape in shapes] for _ in range(4)]
    drawn[1] = [scale * t for t in drawn[1]]
    drawn[3] = [t.square() for t in drawn[3]]
    return [[places(i, t.to(dtype)) for i, t in enumerate(tensors)] for tensors in drawn]


def by_pytorch(drawn, dtype, steps, max_norm, kind=torch.optim.AdamW, **settings):
    """Parameters, moments and steps after a step of PyTorch's in `dtype`."""
    p, g, m, v = ([t.detach().to(dtype, copy=True) for t in tensors] for tensors in drawn)
    optimizer = kind([t.requires_grad_() for t in p], fused=True, **settings)
    for i, one in enumerate(p):
        one.grad = g[i]
        optimizer.state[one] = {"step": torch.tensor(float(steps)), "exp_avg": m[i], "exp_avg_sq": v[i]}
    if max_norm:
        clip_grad_norm_(p, max_norm)
    optimizer.step()
    return [t.detach() for t in (*p, *m, *v)]


def by_the_kernels(drawn, steps, max_norm, lr, settings):
    p, g, m, v = ([t.clone(memory_format=torch.preserve_format) for t in tensors] for tensors in drawn)
    # Clones begin at whole 16 bytes: as they were, elsewhere.
    p, g, m, v = (
        [off_16_bytes(new) if t.data_ptr() % 16 else new for new, t in zip(tensors, given)]
        for tensors, given in zip((p, g, m, v), drawn)
    )
    before = [t.clone() for t in g]
    counted = [torch.tensor(float(steps)) for _ in p]
    tables = AdamTables(p, g, m, v, counted, [torch.tensor(lr)] * len(p), [settings] * len(p))
    tables.fill()
    adam_step(tables, max_norm)
    torch.testing.assert_close(g, before, rtol=0, atol=0, equal_nan=True)  # unclipped
    assert {t.item() for t in counted} == {steps + 1.0}
    return [*p, *m, *v]


def assert_accurate(drawn, steps=4, max_norm=0.0, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, decay=0.1, l2=0.0, sign=1.0):
    kind = torch.optim.Adam if l2 else torch.optim.AdamW
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": l2 or decay, "maximize": sign < 0}
    dtype = drawn[0][0].dtype
    eager = by_pytorch(drawn, dtype, steps, max_norm, kind, **options)
    truth = by_pytorch(drawn, torch.float64, steps, max_norm, kind, **options)
    ours = by_the_kernels(drawn, steps, max_norm, lr, Settings(*betas, eps, 0.0 if l2 else decay, l2, sign))
    for i, (one, other, exact) in enumerate(zip(ours, eager, truth, strict=True)):
        name = f"{('parameter', 'first moment', 'second moment')[i // len(drawn[0])]} {i % len(drawn[0])}"
        assert_close_to_truth(name, one, other, exact)


# Nothing, one element, less than a run, whole runs and some more, a chunk, more than a chunk; several at once, of several dimensions.
SHAPES = [[(1,)], [(3,), (0,), (5, 7)], [(64,), (CHUNK,)], [(CHUNK + 5,), (2, 3, 4, 5)], [(2 * CHUNK + 1024,), ()]]


@interpreted
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("max_norm", [0.0, 0.1])
def test_a_step_is_as_accurate_as_pytorchs_fused_one(interpreter, shapes, max_norm):
    assert_accurate(case(shapes), max_norm=max_norm)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_and_moments_round_once(interpreter, dtype):
    assert_accurate(case([(40,), (CHUNK + 13,)], dtype), max_norm=3.0)


@interpreted
@pytest.mark.parametrize("elsewhere", [(0,), (1,), (0, 1, 2)])
def test_tensors_that_begin_off_16_bytes_are_read_one_by_one(interpreter, elsewhere):
    drawn = case([(70,), (40,), (CHUNK + 9,)])
    drawn = [[off_16_bytes(t) if i in elsewhere else t for i, t in enumerate(tensors)] for tensors in drawn]
    assert_accurate(drawn, max_norm=1.0)


@interpreted
def test_a_gradient_alone_that_begins_off_16_bytes_is_enough(interpreter):
    p, g, m, v = case([(70,), (64,)])
    assert_accurate([p, [off_16_bytes(g[0]), g[1]], m, v], max_norm=1.0)


@interpreted
@pytest.mark.parametrize(
    "settings",
    [
        {"decay": 0.0, "l2": 0.1},
        {"decay": 0.0, "sign": -1.0},
        {"decay": 0.0, "l2": 0.3, "sign": -1.0, "max_norm": 0.5},
        {"betas": (0.0, 0.9)},
        {"betas": (0.95, 0.0), "eps": 1e-3},
        {"steps": 0},
        {"steps": 1_000_000, "betas": (0.9, 0.9999)},
        {"lr": 0.0},
        {"max_norm": 1e9},
    ],
    ids=str,
)
def test_settings_are_those_of_pytorch(interpreter, settings):
    assert_accurate(case([(70,), (20, 3)]), **settings)


@interpreted
def test_the_first_step_from_no_moments_is_as_accurate(interpreter):
    p, g, m, v = case([(70,), (33,)])
    for tensor in (*m, *v):
        tensor.zero_()
    assert_accurate([p, g, m, v], steps=0, max_norm=0.1, betas=(0.9, 0.999))


@interpreted
def test_tensors_laid_out_channels_last_are_updated_where_they_lie(interpreter):
    assert_accurate(case([(5, 4, 3, 3), (7,)], places=lambda i, t: t if i else t.to(memory_format=torch.channels_last)))


@interpreted
def test_many_small_tensors_and_a_large_one_are_one_launch_each(interpreter):
    assert_accurate(case([(4 * (1 + i % 3),) for i in range(40)] + [(4 * CHUNK,)]), max_norm=0.1)
    grids = [(one.variant.name, one.grid) for one in interpreter.launches]
    assert grids == [("gradient_squares_kernel", (44,)), ("adam_scalars_kernel", (1,)), ("adam_update_kernel", (44,))]


def covered(rows, kind, tensors, base):
    """Of each tensor the elements that chunks begin and end at, in order."""
    found = {i: [] for i in range(len(tensors))}
    for row in rows.tolist():
        first = row[kind] + (base.data_ptr() - tensors[row[4]].data_ptr()) // base.element_size()
        found[row[4]].append((first, first + row[5]))
    return {i: sorted(ranges) for i, ranges in found.items()}


@pytest.mark.parametrize(("kind", "chunk"), [(0, CHUNK), (1, 1 << 28), (2, CHUNK), (3, 1 << 28)])
def test_chunks_of_thousands_of_tensors_and_of_one_beyond_32_bits_are_each_element_once(kind, chunk, monkeypatch):
    monkeypatch.setattr(adam, "ADAM", replace(ADAM, chunk=chunk))
    sizes = [1 + i % 40 for i in range(3000)] + [3 * CHUNK + 7]
    large = torch.zeros(1).expand(40 * chunk + 7)  # nothing is read
    tensors = [[off_16_bytes(t) if t.numel() == 13 else t for t in map(torch.zeros, sizes)] + [large] for _ in range(4)]
    rest = [torch.zeros(()) for _ in tensors[0]], [torch.zeros(())] * 3002, [Settings(0.9, 0.99, 1e-8, 0, 0, 1)] * 3002
    tables = AdamTables(*tensors, *rest)
    tables.fill()
    assert tables.whole.dtype is torch.int64
    found = covered(torch.cat([tables.whole, tables.rest]), kind, tensors[kind], tables.bases[kind])
    for tensor, ranges in zip(tensors[kind], found.values()):
        ends = [0, *(end for _, end in ranges)]
        assert [begin for begin, _ in ranges] == ends[:-1]
        assert ends[-1] == tensor.numel()
        assert max(end - begin for begin, end in ranges) <= chunk
    elsewhere = {i for i, t in enumerate(tensors[0]) if t.data_ptr() % 16}
    assert elsewhere
    assert not elsewhere & set(tables.whole[:, 4].tolist())
    assert (tables.whole[:, 5] % 4 == 0).all()


@interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_do_what_they_do_in_pytorch(interpreter, bad):
    drawn = case([(70,), (20,)])
    drawn[1][0][3] = bad
    expected = by_pytorch(drawn, torch.float32, 4, 0.1, lr=1e-2, weight_decay=0.1)
    found = by_the_kernels(drawn, 4, 0.1, 1e-2, Settings(0.9, 0.999, 1e-8, 0.1, 0.0, 1.0))
    for one, other in zip(found, expected):
        assert torch.equal(one.isnan(), other.isnan())
        torch.testing.assert_close(one, other, equal_nan=True)


@interpreted
def test_infinite_parameters_stay_what_they_are_without_decay(interpreter):
    drawn = case([(70,)])
    drawn[0][0][5], drawn[0][0][6] = float("inf"), float("-inf")
    expected = by_pytorch(drawn, torch.float32, 4, 0.0, lr=1e-2, weight_decay=0.0)
    found = by_the_kernels(drawn, 4, 0.0, 1e-2, Settings(0.9, 0.999, 1e-8, 0.0, 0.0, 1.0))
    torch.testing.assert_close(found, expected)
    assert found[0].isinf().sum() == 2


@interpreted
def test_each_tensor_goes_by_its_own_rate_step_and_settings(interpreter):
    drawn = case([(9,), (12,)])
    p, g, m, v = ([t.clone() for t in tensors] for tensors in drawn)
    steps, rates = [torch.tensor(3.0), torch.tensor(50.0)], [torch.tensor(1e-2), torch.tensor(1e-4)]
    settings = [Settings(0.9, 0.999, 1e-8, 0.1, 0.0, 1.0), Settings(0.5, 0.9, 1e-3, 0.0, 0.2, -1.0)]
    tables = AdamTables(p, g, m, v, steps, rates, settings)
    tables.fill()
    adam_step(tables)
    for i, kind in enumerate((torch.optim.AdamW, torch.optim.Adam)):
        options = {"betas": settings[i][:2], "eps": settings[i].eps, "weight_decay": (0.1, 0.2)[i], "maximize": bool(i)}
        one = [[tensors[i]] for tensors in drawn]
        expected = by_pytorch(one, torch.float32, (3, 50)[i], 0.0, kind, lr=rates[i].item(), **options)
        for found, right in zip((p[i], m[i], v[i]), expected):
            torch.testing.assert_close(found, right, rtol=1e-6, atol=1e-7)
    assert [t.item() for t in steps] == [4.0, 51.0]


@pytest.mark.offline
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_chunk_is_read_and_written_in_runs_of_16_bytes(target):
    _, assembly, resources = offline.compile_variant(adam.update_variant(torch.float32, True, 4), target)
    # Of each tensor 8 elements a thread.
    assert assembly.count("ld.global.v4") == 8
    assert assembly.count("st.global.v4") == 6
    assert resources.spills == 0


@interpreted
def test_what_lies_outside_of_a_tables_tensors_is_seen_by_the_interpreters_checks(interpreter):
    p, g, m, v = case([(40,)])
    settings = [Settings(0.9, 0.99, 1e-8, 0.0, 0.0, 1.0)]
    tables = AdamTables(p, g, m, v, [torch.zeros(())], [torch.zeros(())], settings)
    tables.fill()
    tables.whole[0, 3] += 400
    with pytest.raises(Exception, match="loads 40 elements outside its tensors"):
        adam_step(tables)
