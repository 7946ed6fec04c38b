"""Bottlenecks of a ResNet with frozen norms as one node of autograd's."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels import launch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from detr_fast import dispatch, ops, use_backend
from detr_fast.dispatch import BackendError
from detr_fast.ops import regimes
from detr_fast.ops.bottlenecks import is_product
from detr_fast.ops.bottlenecks_autograd import Chain, Link, through_one_node
from detr_fast.ops.bottlenecks_choice import BOTTLENECKS, OneNode, measured_as
from detr_fast.ops.pointwise_gradient import pointwise_gradient
from detr_fast.ops.regimes import Regime
from detr_fast.testing import assert_as_accurate_as_eager, assert_close_to_truth, count
from detr_fast.testing.interpreter import checked_interpreter
from tests.bottleneck_inputs import FIRST, make_blocks, make_input

interpreter = pytest.mark.interpreter


def with_weights(blocks, weights):
    given = iter(weights)
    return [block._replace(weights=tuple(next(given) for _ in block.weights)) for block in blocks]


def weights_of(blocks):
    return [weight for block in blocks for weight in block.weights]


def by_parts(blocks):
    """The blocks in plain PyTorch, in the dtype of what they are given."""

    def run(x, *weights):
        for block in with_weights(blocks, weights):
            z, dtype = x, torch.promote_types(x.dtype, torch.float32)
            scales, shifts = ([t.to(dtype)[:, None, None] for t in ts] for ts in (block.scales, block.shifts))
            for n in range(3):
                z = F.conv2d(z, block.weights[n], None, *block.geometries[n]) * scales[n] + shifts[n]
                if n == 2:
                    shortcut = len(block.weights) > 3
                    z = z + (F.conv2d(x, block.weights[3], None, *block.geometries[3]) * scales[3] if shortcut else x)
                z = z.relu().to(x.dtype)
            x = z
        return x

    return run


def by_passes(x, blocks):
    """The blocks part by part, as a backbone runs them."""
    for block in blocks:
        z = x
        for n in range(3):
            beside = (x,) if n == 2 else ()
            if n == 2 and len(block.weights) > 3:
                beside = F.conv2d(x, block.weights[3], None, *block.geometries[3]), block.scales[3]
            z = F.conv2d(z, block.weights[n], None, *block.geometries[n])
            z = ops.channel_affine(z, block.scales[n], block.shifts[n], *beside)
        x = z
    return x


def as_one_node(blocks, kernels=False):
    return lambda x, *weights: through_one_node(x, with_weights(blocks, weights), kernels)


def gradients(function, x, weights, dy, trained):
    """Of those among x and the weights that are trained."""
    leaves = [t.detach().requires_grad_(wanted) for t, wanted in zip((x, *weights), trained)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], dy)]


@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("trained", ["all", "x alone", "weights alone", "one each", "all but one each", "any"])
def test_whatever_trains_has_its_gradient(kind, trained):
    blocks = make_blocks(kind)
    x, weights = make_input(blocks), weights_of(blocks)
    everything = 1 + len(weights)
    sets = {
        "all": [[True] * everything],
        "x alone": [[True] + [False] * len(weights)],
        "weights alone": [[False] + [True] * len(weights)],
        "one each": [[i == j for j in range(everything)] for i in range(everything)],
        "all but one each": [[i != j for j in range(everything)] for i in range(everything)],
        "any": (torch.rand(20, everything) < 0.4).tolist(),
    }
    dy = torch.randn_like(by_parts(blocks)(x, *weights))
    for one in sets[trained]:
        if any(one):
            found, expected = (gradients(f(blocks), x, weights, dy, one) for f in (as_one_node, by_parts))
            for pair in zip(found, expected):
                torch.testing.assert_close(*pair)


ON_KERNELS = {"channel_affine": "triton", "bottlenecks": "kernels"}


@pytest.mark.parametrize(
    "parts", [pytest.param("products", marks=interpreter), pytest.param("passes", marks=interpreter), "eager"]
)
@pytest.mark.parametrize(("kind", "blocks", "spread"), [("strided", 2, 1.5), ("inner", 1, 1.5), ("dilated", 1, 1000.0)])
def test_it_is_as_accurate_as_its_parts_in_16_bits(parts, kind, blocks, spread):
    torch.manual_seed(0)
    run = make_blocks(kind, blocks, wide=32, dtype=torch.bfloat16, spread=spread)
    passes = use_backend(channel_affine="eager" if parts == "eager" else "triton")
    with nullcontext() if parts == "eager" else checked_interpreter(), passes:
        inputs = [make_input(run, (9, 8)), *weights_of(run)]
        ours = as_one_node(run, kernels=parts == "products")
        assert_as_accurate_as_eager(ours, reference=by_parts(run), inputs=inputs, dtype=torch.bfloat16)


def test_layouts_of_the_input_and_of_gradients_do_not_matter():
    blocks = make_blocks()
    x, weights = make_input(blocks), weights_of(blocks)
    dy = torch.randn(16, 1, 1).double().expand(2, 16, 3, 4)
    found, expected = (gradients(f(blocks), x.contiguous(), weights, dy, [True] * 11) for f in (as_one_node, by_parts))
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for pair in zip(found, expected):
        torch.testing.assert_close(*pair)


def test_gradients_can_be_taken_again_of_batches_and_of_gradients():
    blocks = make_blocks(count=2)
    x, weights = make_input(blocks), weights_of(blocks)
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    results = []
    for function in (as_one_node(blocks), by_parts(blocks)):
        y = function(*leaves)
        torch.manual_seed(0)
        dys = torch.randn(3, *y.shape).double()
        again = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in (dys[0], dys[0])]
        batch = torch.autograd.grad(y, leaves, dys, retain_graph=True, is_grads_batched=True)
        first = torch.autograd.grad(y, leaves, dys[1].requires_grad_(), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*again[0], *again[1], *batch, *first, *second])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_under_checkpoints_gradients_are_the_same_bits():
    blocks = make_blocks()
    x, weights = make_input(blocks), weights_of(blocks)
    function = as_one_node(blocks)
    dy = torch.randn_like(function(x, *weights))
    trained = [True] * 11
    found = gradients(lambda *given: checkpoint(function, *given, use_reentrant=False), x, weights, dy, trained)
    for one, expected in zip(found, gradients(function, x, weights, dy, trained)):
        assert torch.equal(one, expected)


def test_of_each_block_three_features_are_kept():
    blocks = make_blocks("inner", 2)
    x = make_input(blocks)
    known = [x, *(t for b in blocks for t in (*b.weights, *b.scales, *b.shifts))]
    sizes = []

    def pack(t):
        if not any(t.data_ptr() == one.data_ptr() for one in known):
            sizes.append(t.shape[1])
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        through_one_node(x.requires_grad_(), blocks)
    assert sizes == [8, 8, 16] * 2


def test_a_tensor_kept_for_backward_that_was_written_to_is_an_error():
    blocks = make_blocks()
    x = make_input(blocks)
    y = through_one_node(x.requires_grad_(), blocks)
    with torch.no_grad():
        blocks[0].weights[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def on_meta(images, dtype=torch.bfloat16, kind="strided"):
    """Of ResNet-50's third stage; x and all weights train."""
    blocks = make_blocks(kind, 6, 1024, 256, dtype, device="meta")
    x = torch.empty(images, blocks[0].weights[0].shape[1], 100, 134, device="meta", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    return x.requires_grad_(), with_weights(blocks, [w.requires_grad_() for w in weights_of(blocks)])


@pytest.mark.parametrize(("images", "dtype", "passes", "reason"), [
    (4, torch.bfloat16, "triton", None),
    (1, torch.bfloat16, "triton", "scaling its weights takes longer than the bytes that this saves"),
    (4, torch.bfloat16, "eager", "channel_affine was asked to run on 'eager'"),
    (4, torch.float16, "triton", "float16 inputs: it takes bfloat16"),
])  # fmt: skip
def test_it_is_chosen_where_that_moves_fewer_bytes_than_its_launches_cost(images, dtype, passes, reason):
    seen = []
    with use_backend(channel_affine=passes), dispatch.recording(lambda op, decision: seen.append((op, decision))):
        y = Chain().one_node(*on_meta(images, dtype))
    assert (y is not None) == (reason is None)
    ((_, decision),) = [one for one in seen if one[0] == "bottlenecks"]
    assert decision.reasons.get("one_node", "").startswith(reason or "")


def test_what_it_cannot_take_is_refused_by_name():
    blocks = make_blocks(dtype=torch.bfloat16)
    x = make_input(blocks)
    with use_backend(bottlenecks="one_node"):
        with pytest.raises(BackendError, match="nothing needs a gradient"):
            BOTTLENECKS.choose(x, blocks)
        x.requires_grad_()
        assert isinstance(BOTTLENECKS.choose(x, blocks), OneNode)
        with pytest.raises(BackendError, match="transforms"):
            torch.func.grad(lambda x: Chain().one_node(x, blocks).float().sum())(x.detach())
    assert Chain().one_node(x, blocks) is None  # on a CPU
    assert Chain().one_node(x, [*blocks, None]) is None


def test_kernels_are_chosen_by_what_was_measured_of_products_as_long(unmeasured, monkeypatch):
    monkeypatch.setattr(dispatch, "architecture", lambda device: "sm_90")

    def chosen(middle, images):
        seen = []
        with FakeTensorMode(), dispatch.recording(lambda op, decision: seen.append((op, decision))):
            blocks = make_blocks("inner", 2, 4 * middle, middle, torch.bfloat16, device="cuda")
            x = torch.empty(images, 4 * middle, 25, 34, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            BOTTLENECKS.choose(x, blocks)
        (_, decision) = seen[0]
        return decision.implementation.name, decision.reasons.get("kernels", "")

    assert chosen(128, 64) == ("one_node", "products against cuBLAS stay PyTorch's until measured: run detr-fast tune")
    short, long = (Regime(measured_as(n), "sm_90", 0, 0, "a test") for n in (128, 256))
    for measured, names in ((short, ("kernels", "one_node")), (long, ("one_node", "kernels"))):
        monkeypatch.setattr(regimes, "SHIPPED", (measured,))
        regimes.known.cache_clear(), dispatch.forget_decisions()
        assert tuple(chosen(middle, 64)[0] for middle in (128, 256)) == names
    assert chosen(1024, 64)[1].startswith("1024 channels inside: measured, and chosen, up to 512")


def test_at_a_blocks_end_one_gradient_is_written_and_its_parts_write_two():
    two = {}
    for backend in ("one_node", "eager"):
        x, blocks = on_meta(4)
        with use_backend(channel_affine="triton", bottlenecks=backend):
            y = Chain().one_node(x, blocks)
            y = by_passes(x, blocks) if y is None else y
            passes = []
            launch.observers.append(lambda one, passes=passes: passes.append(one.arguments[4:6]))
            count(lambda y=y: y.backward(torch.empty_like(y)))
            launch.observers.pop()
        assert len(passes) == 18
        two[backend] = sum(None not in written for written in passes)
    assert two == {"one_node": 0, "eager": 6}


@interpreter
@pytest.mark.parametrize("trained", ["all", "weights alone", "the last alone"])
def test_of_two_stages_the_second_masks_what_the_first_gets(trained):
    torch.manual_seed(0)
    stages = make_blocks("inner", 1, dtype=torch.bfloat16), make_blocks("strided", 2, wide=32, dtype=torch.bfloat16)
    x, weights = make_input(stages[0]), [weights_of(stage) for stage in stages]
    wanted = {"all": [True] * 11, "weights alone": [False] + [True] * 10, "the last alone": [False] * 10 + [True]}[
        trained
    ]

    def linked(x, *given):
        link = Link()
        y = through_one_node(x, with_weights(stages[0], given[:3]), True, None, link)
        found = through_one_node(y, with_weights(stages[1], given[3:]), True, link)
        assert link.masked == (trained != "the last alone")
        return found

    def exact(x, *given):
        return by_parts(stages[1])(by_parts(stages[0])(x, *given[:3]), *given[3:])

    def run(function, dtype):
        return gradients(function, x.to(dtype), [w.to(dtype) for one in weights for w in one], dy.to(dtype), wanted)

    with checked_interpreter(), use_backend(channel_affine="triton"):
        dy = torch.randn(2, 32, 3, 4).bfloat16()
        found = run(linked, torch.bfloat16)
    for number, (one, eager, truth) in enumerate(zip(found, run(exact, torch.bfloat16), run(exact, torch.float64))):
        assert_close_to_truth(f"result {number}", one, eager, truth)


def test_behind_products_on_kernels_no_pass_is_left_but_in_the_middle_and_at_the_stages_end():
    with use_backend(**ON_KERNELS):
        chain = Chain()
        y = chain.one_node(*on_meta(4))
        end = chain.one_node(y, make_blocks("inner", 2, 1024, 256, torch.bfloat16, device="meta"))
        launches = count(lambda: end.backward(torch.empty_like(end))).launches
    assert launches["channel_affine_backward_kernel"] == 8 + 1
    assert launches["pointwise_backward_kernel"] == 2 * 8 - 1  # x's own gradient needs no mask
    assert launches["aten.addmm_.default"] == 1


@interpreter
@pytest.mark.parametrize("beside", ["added", "mask", "scale", "nothing"])
def test_opcheck_accepts_the_products_gradient_which_can_be_differentiated(beside):
    images = [torch.randn(2, n, 3, 4).contiguous(memory_format=torch.channels_last) for n in (24, 16, 16)]
    g, added, y = (t.bfloat16() for t in images)
    arguments = g, torch.randn(24, 16).bfloat16(), added, y, torch.randn(16)
    counts = {"nothing": 2, "added": 3, "mask": 4, "scale": 5}
    arguments = *arguments[: counts[beside]], *[None] * (5 - counts[beside])
    torch.library.opcheck(torch.ops.detr_fast.pointwise_gradient.default, arguments)
    with checked_interpreter():
        found = pointwise_gradient(*arguments)
    given = [None if t is None else t.double().requires_grad_() for t in arguments]
    assert_close_to_truth(
        "result",
        found,
        pointwise_gradient(*[t if t is None else t.detach().requires_grad_() for t in arguments]).detach(),
        pointwise_gradient(*given).detach(),
    )


def test_a_product_is_a_convolution_of_single_pixels_without_bias():
    plain = {"kernel_size": 1, "bias": False}
    assert is_product(torch.nn.Conv2d(4, 4, **plain))
    for other in ({"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": 3}, {"bias": True}):
        assert not is_product(torch.nn.Conv2d(4, 4, **{**plain, **other}))
