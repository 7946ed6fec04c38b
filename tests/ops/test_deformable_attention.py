from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch, ops
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.ops.deformable_eager import by_indexing, located
from detr_fast.testing import assert_as_accurate_as_eager, count
from detr_fast.testing.interpreter import checked_interpreter
from tests.deformable_inputs import SHAPES, by_hand, by_offsets, by_points, make_case, make_offsets

interpreter = pytest.mark.interpreter
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEVELS = tuple((h, w, 2) for h, w in SHAPES)


@pytest.fixture
def triton():
    with checked_interpreter(), use_backend(deformable_attention="triton"):
        yield


def assert_right(case, dtype, points=(2, 2, 2), shapes=SHAPES, **settings):
    def eager(*tensors):
        with use_backend(deformable_attention="eager"):
            return by_points(points, shapes)(*tensors)

    assert_as_accurate_as_eager(by_points(points, shapes), reference=eager, inputs=case, dtype=dtype, **settings)


def test_it_is_the_papers_formula_sample_by_sample():
    value, locations, weights = (t.double() for t in make_case(queries=3, channels=4))
    out = ops.deformable_attention(value, SHAPES, locations, weights, points=(2, 2, 2))
    for b, q, h in [(0, 0, 0), (0, 2, 1), (1, 1, 0), (1, 2, 1)]:
        torch.testing.assert_close(out[b, q, h], by_hand(value[b, :, h], locations[b, q, h], weights[b, q, h]))


@pytest.mark.parametrize("coordinates", [2, 4])
def test_offsets_from_points_or_boxes_and_logits_are_where_and_by_which_weights_it_samples(coordinates):
    value, references, offsets, logits = (t.double() for t in make_offsets(coordinates))
    found = by_offsets(spread=0.7)(value, references, offsets, logits)
    levels = [i for i, n in enumerate((2, 1, 3)) for _ in range(n)]
    size = torch.tensor([SHAPES[i][::-1] for i in levels]).double()
    reference = references[:, :, None, levels]
    step = 1 / size if coordinates == 2 else reference[..., 2:] * 0.7 / torch.tensor([2, 2, 1, 3, 3, 3])[:, None]
    weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
    torch.testing.assert_close(found, by_points((2, 1, 3))(value, reference[..., :2] + offsets * step, weights))
    one = references[:, :, :1].clone()
    repeated = by_offsets()(value, one.expand(-1, -1, 3, -1), offsets, logits)
    assert torch.equal(by_offsets()(value, one, offsets, logits), repeated)


def test_levels_with_as_many_points_need_no_list_of_them():
    value, locations, weights = make_case()
    apart = locations.unflatten(3, (3, 2)), weights.unflatten(3, (3, 2))
    expected = ops.deformable_attention(value, SHAPES, locations, weights, points=(2, 2, 2))
    assert torch.equal(ops.deformable_attention(value, SHAPES, *apart), expected)


# no query, one, no multiple of a block; heads that fill no power of two, no runs of 16 bytes, several lanes; levels of no point
@interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("queries", "heads", "channels", "points"),
    [(0, 2, 32, (2, 2, 2)), (1, 1, 16, (1, 0, 2)), (9, 2, 32, (2, 1, 3)), (5, 3, 24, (1, 1, 1)), (3, 1, 5, (2, 1, 1))],
)
def test_it_is_as_accurate_as_eager(triton, queries, heads, channels, points, dtype):
    assert_right(make_case(2, queries, heads, channels, points), dtype, points)


# heads that fill no power of two, no runs of 16 bytes, a level without points, references that all levels share and that are strided
@interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("coordinates", "queries", "heads", "channels", "points", "on_device", "shared"),
    [
        (2, 9, 1, 32, (2, 1, 1), False, False),
        (4, 5, 2, 16, (1, 1, 1), True, False),
        (4, 3, 1, 5, (1, 0, 2), False, True),
        (2, 1, 1, 24, (1, 1, 1), True, True),
        (4, 0, 1, 8, (1, 1, 1), True, False),
    ],
)
def test_from_offsets_it_is_as_accurate_as_eager(
    triton, coordinates, queries, heads, channels, points, on_device, shared, dtype
):
    value, references, *rest = make_offsets(coordinates, 2, queries, heads, channels, points)
    if shared:
        references = references[:, :, :1].transpose(1, 3).contiguous().transpose(1, 3)
    sizes = torch.tensor([(0, *size) for size in SHAPES])[:, 1:]  # their rows do not lie side by side
    function = by_offsets(points, sizes if on_device else SHAPES)

    def eager(*tensors):
        with use_backend(deformable_attention="eager"):
            return by_offsets(points)(*tensors)

    # Where queries lie models say in fp32.
    dtypes = dtype, torch.float32, torch.float32 if channels == 16 else dtype, dtype
    assert_as_accurate_as_eager(function, reference=eager, inputs=(value, references, *rest), dtype=dtypes)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager"])
@pytest.mark.parametrize(
    "wrong",
    [[(3, 5), (2, 3), (1, 2)], [(3, 5), (2, 3), (0, 1)], [(-3, -5), (2, 3), (1, 1)], [(3, 1 << 40), (2, 3), (1, 1)]],
)
def test_sizes_on_the_device_that_do_not_make_the_values_rows_are_seen_in_the_result(backend, wrong):
    value, *rest = make_case(1, 2, 1, 4)
    with use_backend(deformable_attention=backend):
        if backend == "eager":
            with pytest.raises(ValueError, match="expected"):
                by_points((2, 2, 2), torch.tensor(wrong))(value, *rest)
        else:
            assert by_points((2, 2, 2), torch.tensor(wrong))(value, *rest).isnan().all()


@interpreter
@pytest.mark.parametrize("shapes", [[(4, 7)], [(2, 2), (1, 3), (3, 1), (1, 1), (2, 1), (1, 2)]])
def test_one_level_and_the_most_are_as_accurate_as_eager(triton, shapes):
    points = (2,) * len(shapes)
    assert_right(make_case(1, 3, 1, 16, points, shapes), torch.float32, points, shapes)


@interpreter
def test_values_of_16_bits_go_with_locations_and_weights_of_32(triton):
    assert_right(make_case(), (torch.bfloat16, torch.float32, torch.float32))


@interpreter
def test_large_values_and_gradients_of_any_layout_are_as_accurate_as_eager(triton):
    value, locations, weights = make_case(queries=6, channels=8)
    value = (value * 1e4).transpose(1, 2).contiguous().transpose(1, 2)
    locations = locations.transpose(1, 3).contiguous().transpose(1, 3)
    assert_right((value, locations, weights), torch.float32, upstream=lambda y: torch.randn(2, 6, 1, 8).expand(y.shape))


@interpreter
def test_wide_heads_and_many_queries_are_as_accurate_as_eager(triton):
    assert_right(make_case(1, 3, 1, 200, (1, 1, 0)), torch.float32, (1, 1, 0))
    with torch.no_grad():  # more than one block of queries, and blocks of four warps
        case = make_case(1, 600, 2, 8, (1, 0, 0))
        assert_right(case, torch.bfloat16, (1, 0, 0), grad=False)


@interpreter
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_wanted_are_computed(triton, wanted):
    case = [t.requires_grad_(want) for t, want in zip(make_case(1, 5, 1, 16), wanted)]
    leaf = next(t for t in case if t.requires_grad)
    found = torch.autograd.grad(by_points((2, 2, 2))(*case).square().sum(), leaf)
    with use_backend(deformable_attention="eager"):
        expected = torch.autograd.grad(by_points((2, 2, 2))(*case).square().sum(), leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager"])
@pytest.mark.parametrize(("shapes", "points"), [([(0, 3), (2, 2)], (1, 0)), ([(0, 3)], (2,)), ([(2, 2)], (0,))])
def test_levels_without_pixels_or_points_give_zero(backend, shapes, points):
    value, *rest = make_case(1, 3, 1, 8, points, shapes)
    case = [t.requires_grad_() for t in (value.fill_(float("inf")), *rest)]  # which nothing reads
    with use_backend(deformable_attention=backend):
        out = by_points(points, shapes)(*case)
        gradients = torch.autograd.grad(out.sum(), case)
    assert out.shape == (1, 3, 1, 8)
    assert not out.any()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager"])
def test_what_lies_far_outside_is_zero_and_nan_stays_nan(backend):
    value, locations, weights = make_case(1, 4, 1, 8)
    locations[0, 0, 0], locations[0, 1, 0, :, 0] = 1e30, -1e30
    locations[0, 2, 0, 1, 1] = float("nan")
    with use_backend(deformable_attention=backend):
        out = by_points((2, 2, 2))(value, locations, weights)
    assert (out[0, :2] == 0).all()
    assert out[0, 2].isnan().all()
    assert out[0, 3].isfinite().all()


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager", "indexing"])
def test_infinitely_far_is_outside(backend):
    value, locations, weights = case = make_case(1, 2, 1, 8)
    expected = by_points((2, 2, 2))(
        value, locations.clone(), torch.cat([weights[:, :, :, :1] * 0, weights[..., 1:]], 3)
    )
    locations[0, 0, 0, 0], locations[0, 1, 0, 0, 0] = float("inf"), -float("inf")
    case = [t.requires_grad_() for t in case]
    with use_backend(deformable_attention="triton" if backend == "triton" else "eager"):
        out = by_indexing(*case, LEVELS) if backend == "indexing" else by_points((2, 2, 2))(*case)
        gradients = torch.autograd.grad(out.sum(), case)
    torch.testing.assert_close(out, expected)
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[1][0, 0, 0, 0].any()  # where there is nothing all around
    assert not gradients[2][0, :, 0, 0].any()


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager"])
def test_large_logits_and_offsets_that_go_infinitely_far_are_as_a_softmax_and_outside(backend):
    value, references, offsets, logits = make_offsets(2, 1, 2, 1, 8, (2, 2, 2))
    logits *= 1e4
    offsets[0, 0, 0, 0], offsets[0, 1, 0, :, 1] = float("inf"), -float("inf")
    case = [t.requires_grad_() for t in (value, references, offsets, logits)]
    with use_backend(deformable_attention=backend):
        out = by_offsets((2, 2, 2))(*case)
        gradients = torch.autograd.grad(out.sum(), case)
    assert not out[0, 1].any()
    assert all(g.isfinite().all() for g in (out, *gradients))


def test_forward_mode_gives_what_the_backward_says():
    case = [t.double() for t in make_case(1, 3, 1, 4)]
    tangents, dout = [torch.randn_like(t) for t in case], torch.randn(1, 3, 1, 4).double()
    out, tangent = torch.func.jvp(by_points((2, 2, 2)), tuple(case), tuple(tangents))
    gradients = torch.func.vjp(by_points((2, 2, 2)), *case)[1](dout)
    torch.testing.assert_close(out, by_points((2, 2, 2))(*case))
    torch.testing.assert_close((tangent * dout).sum(), sum((g * t).sum() for g, t in zip(gradients, tangents)))


def test_sizes_that_are_symbols_stay_so():
    def sample(image, locations, weights):
        value = image.flatten(2).transpose(1, 2)[:, :, None]
        return ops.deformable_attention(value, [image.shape[-2:]], locations, weights, [2])

    def inputs(height, width):
        return torch.randn(1, 4, height, width), torch.rand(1, 3, 1, 2, 2), torch.rand(1, 3, 1, 2)

    traced = make_fx(sample, tracing_mode="symbolic")(*inputs(4, 6))
    other = inputs(5, 3)
    torch.testing.assert_close(traced(*other), sample(*other))


def test_sizes_that_are_tensors_count_as_they_are_at_the_call():
    value, locations, weights = make_case(1, 3, 1, 4, (2,), [(2, 3)])
    sizes = torch.tensor([[2, 3]])
    rows = [tuple(sizes[0])]  # each a view of the tensor
    for height, width in [(2, 3), (3, 2)]:
        sizes.copy_(torch.tensor([[height, width]]))
        expected = ops.deformable_attention(value, [(height, width)], locations, weights, (2,))
        for given in (sizes, rows):
            assert torch.equal(ops.deformable_attention(value, given, locations, weights, (2,)), expected)


@interpreter
def test_the_double_backward_is_right(triton):
    case = [t.double().requires_grad_() for t in make_case(1, 2, 1, 3, (1, 1, 1))]
    single = [t.detach().float().requires_grad_() for t in case]

    def penalty(tensors, backend):
        with use_backend(deformable_attention=backend):
            out = by_points((1, 1, 1))(*tensors)
            first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    levels = tuple((h, w, 1) for h, w in SHAPES)
    out = by_indexing(*case, levels)
    first = torch.autograd.grad(out.square().sum(), case, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in first), case)
    for found, truth in zip(penalty(single, "triton"), expected):
        torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=1e-3)


@interpreter
def test_the_double_backward_from_offsets_is_right(triton):
    case = [t.double().requires_grad_() for t in make_offsets(4, 1, 2, 1, 3, (1, 1, 1))]
    single = [t.detach().float().requires_grad_() for t in case]

    def penalty(function, tensors):
        first = torch.autograd.grad(function(*tensors).square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    def indexed(value, references, offsets, logits):
        levels = tuple((h, w, 1) for h, w in SHAPES)
        return by_indexing(value, *located(references, offsets, logits, levels, 0.5), levels)

    for found, truth in zip(penalty(by_offsets((1, 1, 1)), single), penalty(indexed, case)):
        torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=1e-3)


def test_indexing_gives_what_grid_sample_gives_and_its_gradients():
    case = [t.double().requires_grad_() for t in make_case()]
    out, expected = by_indexing(*case, LEVELS), by_points((2, 2, 2))(*case)
    dout = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, case, dout), torch.autograd.grad(expected, case, dout))


@interpreter
def test_opcheck_accepts_both_ops():
    value, locations, weights = (t.requires_grad_() for t in make_case(1, 3, 1, 8))
    sizes = [n for (height, width) in SHAPES for n in (height, width, 2)]
    forward, backward = torch.ops.detr_fast.deformable_attention, torch.ops.detr_fast.deformable_attention_backward
    references, shapes = torch.rand(1, 3, 3, 4).requires_grad_(), torch.tensor(SHAPES)
    torch.library.opcheck(forward.default, (value, locations, weights, references, shapes, sizes, 0.5))
    dout = torch.randn(1, 3, 1, 8).requires_grad_()
    torch.library.opcheck(
        backward.default, (dout, value, locations, weights, references, shapes, sizes, 0.5, [True] * 4)
    )


@interpreter
def test_a_compiled_model_has_no_graph_break_and_equal_gradients(triton):
    case = [t.requires_grad_() for t in make_case(1, 3, 1, 8)]

    def step(*tensors):
        return by_points((2, 2, 2))(*tensors).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(run(*case), case) for run in (compiled, step))
    torch.testing.assert_close(found, expected)


def test_a_gpu_takes_one_kernel_and_waits_for_nothing():
    with FakeTensorMode():
        case = make_case(device="cuda")
        counts = count(lambda: by_points((2, 2, 2))(*case))
        case = make_offsets(4, points=(2, 2, 2), device="cuda")
        sizes = torch.tensor(SHAPES, device="cuda")
        fused = count(lambda: by_offsets((2, 2, 2), sizes)(*case))
    for one in (counts, fused):
        assert one.launches == {"deformable_attention_kernel": 1}
        assert one.total_synchronisations == 0


def test_the_deterministic_form_copies_nothing_to_a_gpu_so_that_a_cuda_graph_may_hold_it():
    with FakeTensorMode():
        case = make_case(device="cuda")
        traced = make_fx(lambda *tensors: by_indexing(*tensors, LEVELS), _allow_non_fake_inputs=True)(*case)
    made = [node.meta["val"] for node in traced.graph.nodes if node.op != "output"]
    assert {value.device.type for value in made if isinstance(value, torch.Tensor)} == {"cuda"}


def test_what_no_kernel_takes_is_left_to_eager_with_a_reason(monkeypatch):
    reasons = []
    with FakeTensorMode(), dispatch.recording(lambda op, decision: reasons.append(decision.reasons.get("triton"))):
        value, locations, weights = make_case(device="cuda", shapes=[(1, 1)] * 7, points=(1,) * 7)
        ops.deformable_attention(value, [(1, 1)] * 7, locations, weights, [1] * 7)
        value, locations, weights = make_case(device="cuda")
        by_points((2, 2, 2))(value, locations.double(), weights)
        by_points((2, 2, 2))(value.expand(-1, -1, -1, 32).repeat(1, 1, 1, 9), locations, weights)
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        by_points((2, 2, 2))(value.requires_grad_(), locations, weights)
    assert reasons[0] == "7 levels: it takes 1 to 6"
    assert "torch.float64" in reasons[1]
    assert reasons[2] == "head dimension 288: it takes 1 to 256"
    assert "use_deterministic_algorithms" in reasons[3]


def test_shapes_that_do_not_fit_are_refused():
    value, locations, weights = make_case()
    with pytest.raises(
        ValueError, match=r"got value \(2, 22, 2, 32\), levels \[\(3, 5\), \(2, 3\)\].*expected \(B, S, H, E\)"
    ):
        ops.deformable_attention(value, SHAPES[:2], locations, weights, (3, 3))
    with pytest.raises(ValueError, match=r"\[2, 2, 1\] points"):
        ops.deformable_attention(value, SHAPES, locations, weights, (2, 2, 1))
    with pytest.raises(ValueError, match="points of each level"):  # six points of three levels: which are whose?
        ops.deformable_attention(value, SHAPES, locations, weights)
    for wrong in (
        (value[:1], locations, weights),
        (value, locations[:, :5], weights),
        (value[:, :, :1], locations, weights),
        (value, locations[..., 0, :], weights[..., 0]),
    ):
        with pytest.raises(ValueError, match="expected"):
            by_points((2, 2, 2))(*wrong)


@pytest.mark.parametrize("on_device", [False, True])
def test_levels_that_are_no_pairs_of_integers_are_refused(on_device):
    case = make_case()
    with use_backend(deformable_attention="eager") if on_device else nullcontext():
        for wrong in (torch.tensor([22, 1, 1]), torch.ones(3, 3, dtype=torch.int64)):
            with pytest.raises(ValueError, match=rf"got shapes \({wrong.shape[0]},.*expected \(L, 2\)"):
                ops.deformable_attention(case[0], wrong, *case[1:], (2, 2, 2))
        with pytest.raises(TypeError, match=r"got shapes of torch\.float32"):
            ops.deformable_attention(case[0], torch.tensor(SHAPES) + 0.4, *case[1:], (2, 2, 2))


def test_numbers_that_are_not_floating_point_are_refused():
    value, locations, weights = make_case()
    for wrong in (
        (value.long(), locations, weights.long()),
        (value, locations, weights.int()),
        (value.bool(), locations, weights),
    ):
        with pytest.raises(
            TypeError, match=r"expected floating-point tensors: convert them first, as by value\.float\(\)"
        ):
            by_points((2, 2, 2))(*wrong)


def test_references_that_do_not_fit_are_refused():
    value, references, offsets, logits = make_offsets(4)
    for wrong in (references[..., :3], references[:, :2], references[:, :, :2], references[0]):
        with pytest.raises(ValueError, match=r"expected \(2, 5, 3 levels or 1, 2 or 4\)"):
            by_offsets()(value, wrong, offsets, logits)


@interpreter
def test_logits_gradients_are_as_accurate_as_eagers_where_one_point_takes_nearly_all_of_the_softmax(triton):
    # more points than are corrected at once
    value, references, offsets, logits = make_offsets(2, 1, 4, 1, 16, (6, 6, 6))
    logits[..., 0] += 20

    def run(backend):
        def sample(logits):
            with use_backend(deformable_attention=backend):
                return by_offsets((6, 6, 6))(value.bfloat16(), references, offsets, logits)

        return sample

    assert_as_accurate_as_eager(run("triton"), reference=run("eager"), inputs=[logits], dtype=torch.bfloat16)


@interpreter
def test_what_was_asked_for_by_name_and_cannot_be_is_an_error(triton):
    with pytest.raises(BackendError, match="float64 inputs: it takes bfloat16, float16, float32"):
        by_points((2, 2, 2))(*(t.double() for t in make_case()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 32, 30, 64])
def test_on_a_gpu_it_is_as_accurate_as_eager(channels, dtype):
    shapes = sized([(25, 34), (13, 17), (7, 9), (4, 5)], [(3, 4), (2, 2), (1, 2), (1, 1)])
    points = (4,) * 4
    case = make_case(2, sized(300, 3), sized(8, 1), channels, points, shapes, DEVICE)
    with use_backend(deformable_attention="triton"):
        assert_right(case, (dtype, torch.float32, dtype), points, shapes)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("coordinates", "on_device"), [(2, False), (4, True)])
def test_on_a_gpu_it_is_as_accurate_from_offsets(coordinates, on_device, dtype):
    shapes = sized([(25, 34), (13, 17), (7, 9), (4, 5)], [(3, 4), (2, 2), (1, 2), (1, 1)])
    points, known = (4, 2, 3, 4), torch.tensor(shapes, device=DEVICE) if on_device else shapes
    case = make_offsets(coordinates, 2, sized(300, 3), sized(8, 1), 32, points, shapes, DEVICE)

    def eager(*tensors):
        with use_backend(deformable_attention="eager"):
            return by_offsets(points, shapes)(*tensors)

    with use_backend(deformable_attention="triton"):
        dtypes = dtype, torch.float32, torch.float32, dtype
        assert_as_accurate_as_eager(by_offsets(points, known), reference=eager, inputs=case, dtype=dtypes)


@pytest.mark.gpu
def test_on_a_gpu_a_deterministic_backward_is_the_same_twice():
    case = [t.requires_grad_() for t in make_case(2, 50, 2, 32, device=DEVICE)]
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(by_points((2, 2, 2))(*case).square().sum(), case) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *runs))
