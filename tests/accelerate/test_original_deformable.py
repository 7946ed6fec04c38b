"""Modules with the code of MSDeformAttn, of Deformable DETR's repository and those after it, and the extension that they compile."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: F401, which the modules' code reads
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

import detr_fast
from detr_fast import dispatch, ops, use_backend
from detr_fast.adapters.deformable_extension import NAME
from detr_fast.testing import assert_as_accurate_as_eager, count
from detr_fast.testing.interpreter import checked_interpreter

interpreter = pytest.mark.interpreter
SHAPES = [(3, 4), (2, 2)]
PIXELS = sum(h * w for h, w in SHAPES)
WIDTH, QUERIES = 16, 3


class MSDeformAttnFunction:
    """In place of the compiled extension: PyTorch's form, to which the host brings the sizes."""

    @staticmethod
    def apply(value, shapes, start, locations, weights, step):
        with use_backend(deformable_attention="eager"):
            return ops.deformable_attention(value, shapes.tolist(), locations, weights).flatten(2)


def ms_deform_attn_core_pytorch(value, shapes, locations, weights):
    return MSDeformAttnFunction.apply(value, shapes, None, locations, weights, None)


class Parts(nn.Module):
    def __init__(self, d_model=WIDTH, n_levels=2, n_heads=2, n_points=2, use_4D_normalizer=False):
        super().__init__()
        self.d_model, self.n_levels, self.n_heads, self.n_points = d_model, n_levels, n_heads, n_points
        self.im2col_step, self.use_4D_normalizer = 64, use_4D_normalizer
        samples = n_heads * n_levels * n_points
        self.sampling_offsets, self.attention_weights = nn.Linear(d_model, 2 * samples), nn.Linear(d_model, samples)
        self.value_proj, self.output_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)


# What the repositories' forward functions share, and the places where they differ. Text, as pytest puts code of its own into assertions.
FORWARD = """
def forward(self, query, reference_points, input_flatten, input_spatial_shapes, input_level_start_index, input_padding_mask=None):
    images, queries, _ = query.shape
    images, pixels, _ = input_flatten.shape
    assert (input_spatial_shapes[:, 0] * input_spatial_shapes[:, 1]).sum() == pixels
    value = self.value_proj(input_flatten)
    if input_padding_mask is not None:
        value = value.masked_fill(input_padding_mask[..., None], float(0))
    value = value.view(images, pixels, self.n_heads, self.d_model // self.n_heads)
    steps = self.sampling_offsets(query).view(images, queries, self.n_heads, self.n_levels, self.n_points, 2)
    shares = self.attention_weights(query).view(images, queries, self.n_heads, self.n_levels * self.n_points)
    shares = F.softmax(shares, -1).view(images, queries, self.n_heads, self.n_levels, self.n_points)
    if reference_points.shape[-1] == 2:
        size = torch.stack([input_spatial_shapes[..., 1], input_spatial_shapes[..., 0]], -1)
        where = reference_points[:, :, None, :, None, :] + steps / size[None, None, None, :, None, :]
    elif reference_points.shape[-1] == 4:
        box = reference_points[:, :, None, :, None, 2:]
        BOXES
        where = reference_points[:, :, None, :, None, :2] + steps * box * 0.5
    else:
        raise ValueError("2 or 4 coordinates, not {}".format(reference_points.shape[-1]))
    levels = input_spatial_shapes, input_level_start_index
    SAMPLES
    return self.output_proj(found)
"""
SAMPLE = "found = MSDeformAttnFunction.apply(value, *levels, where, shares, self.im2col_step)"
CAUTIOUS = f"""try:
        {SAMPLE}
    except:
        found = ms_deform_attn_core_pytorch(value, input_spatial_shapes, where, shares)"""
IN_PIXELS = """if self.use_4D_normalizer:
            size = torch.stack([input_spatial_shapes[..., 1], input_spatial_shapes[..., 0]], -1)
            steps = steps / size[None, None, None, :, None, :]
        else:
            steps = steps / self.n_points"""
SINGLE = f"""if value.dtype == torch.float16:
        single = value.to(torch.float32), *levels, where.to(torch.float32), shares
        found = MSDeformAttnFunction.apply(*single, self.im2col_step).to(torch.float16)
        return self.output_proj(found)
    {SAMPLE}"""


def class_of(boxes, samples, change=lambda text: text):
    names = dict(globals())
    exec(change(FORWARD.replace("BOXES", boxes).replace("SAMPLES", samples)), names)
    return type("MSDeformAttn", (Parts,), {"forward": names["forward"], "__module__": __name__})


DeformableDetrs = class_of("steps = steps / self.n_points", SAMPLE)
Mask2Formers = class_of("steps = steps / self.n_points", CAUTIOUS)
Dinos = class_of(IN_PIXELS, SINGLE)
MSDeformAttn = DeformableDetrs  # as it is pickled


def made(kind=DeformableDetrs, **options):
    torch.manual_seed(0)
    module = kind(**options)
    for parameter in module.parameters():  # offsets of a pixel or so, and weights that differ
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(coordinates=4):
    generator = torch.Generator().manual_seed(3)
    x, memory = (torch.randn(2, n, WIDTH, generator=generator) for n in (QUERIES, PIXELS))
    references = torch.rand(2, QUERIES, len(SHAPES), coordinates, generator=generator) * 0.5 + 0.2
    return x, references, memory


def sizes(shapes=SHAPES):
    shapes = torch.tensor(shapes)
    return shapes, torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])


def padding():
    return torch.rand(2, PIXELS, generator=torch.Generator().manual_seed(4)) < 0.3


CASES = [
    (DeformableDetrs, 4, {}, True),
    (Mask2Formers, 2, {}, False),
    (Dinos, 4, {"use_4D_normalizer": True}, True),
    (Dinos, 4, {"n_points": 3}, False),
]


@interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "coordinates", "options", "padded"), CASES)
def test_outputs_and_all_gradients_are_as_accurate_as_theirs(kind, coordinates, options, padded, dtype):
    theirs, ours = made(kind, **options), made(kind, **options)
    report = detr_fast.accelerate(ours)
    assert [one.now for one in report.switched if not one.name] == [
        "detr_fast.adapters.original_deformable.MSDeformAttn"
    ]
    names = [name for name, _ in theirs.named_parameters()]
    mask = padding() if padded else None

    def step(module):
        def run(x, references, memory, *parameters):
            parameters = dict(zip(names, parameters))
            return functional_call(module, parameters, (x, references, memory, *sizes(), mask))

        return run

    def accelerated(*tensors):
        with checked_interpreter(), use_backend(deformable_attention="triton"):
            return step(ours)(*tensors)

    # Boxes stay in fp32, as models keep them.
    case = (*inputs(coordinates), *(p.detach() for p in theirs.parameters()))
    dtypes = [torch.float32 if i == 1 else dtype for i in range(len(case))]
    assert_as_accurate_as_eager(accelerated, reference=step(theirs), inputs=case, dtype=dtypes)


@interpreter
def test_sizes_may_differ_at_each_call_and_are_seen_where_they_do_not_fit():
    module = made()
    case = inputs()
    expected = [module(*case, *sizes(shapes)) for shapes in (SHAPES, [(2, 6), (4, 1)])]
    detr_fast.accelerate(module)
    with use_backend(deformable_attention="triton"):
        found = [module(*case, *sizes(shapes)) for shapes in (SHAPES, [(2, 6), (4, 1)])]
        assert module(*case, *sizes([(3, 4), (2, 1)])).isnan().all()
        with pytest.raises(ValueError, match="2 or 4 coordinates"):
            module(case[0], case[1][..., :3], case[2], *sizes())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_where_no_kernel_runs_theirs_does_to_the_bit_also_in_a_copy():
    module = made()
    expected = module(*inputs(), *sizes())
    detr_fast.accelerate(module, skip=["*_proj"])
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(one(*inputs(), *sizes()), expected)
        with use_backend(deformable_attention="eager"):
            assert torch.equal(one(*inputs(), *sizes()), expected)
    detr_fast.restore(module)
    assert type(module) is DeformableDetrs


@pytest.mark.parametrize(("kind", "options"), [(DeformableDetrs, {}), (Dinos, {"use_4D_normalizer": True})])
def test_where_no_kernel_is_to_run_each_projection_is_called_once(kind, options, calls):
    module = made(kind, **options)
    detr_fast.accelerate(module)
    counted = calls(module)
    with dispatch.recording(lambda *_: None):  # the dispatcher is asked, and a CPU has no kernel
        module(*inputs(), *sizes())
    assert sorted(counted.values()) == [1] * 4


def test_a_gpu_launches_four_products_and_one_kernel_and_the_host_waits_for_nothing():
    with FakeTensorMode(), torch.device("cuda"):
        module = made()
        detr_fast.accelerate(module)
        shapes = torch.empty(2, 2, dtype=torch.int64)
        case = *(torch.empty(2, n, WIDTH) for n in (QUERIES, PIXELS)), torch.empty(2, QUERIES, len(SHAPES), 4)
        counts = count(lambda: module(case[0], case[2], case[1], shapes, None))
    assert counts.launches["deformable_attention_kernel"] == 1
    assert counts.total_launches == 5
    assert counts.total_synchronisations == 0


def test_other_code_of_that_name_is_left_alone_with_the_reason():
    for old, new in (
        ("0.5", "0.25"),
        ("float(0)", "float(0) + self.n_points"),
        ("query, reference", "queries, reference"),
    ):
        changed = class_of(
            "steps = steps / self.n_points", SAMPLE, lambda text, old=old, new=new: text.replace(old, new)
        )
        (left,) = (one for one in detr_fast.accelerate(changed()).left if not one.name)
        assert "its code is not" in left.reason


@pytest.fixture
def extension(monkeypatch):
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    detr_fast.provide_deformable_extension()
    detr_fast.provide_deformable_extension()  # which changes nothing
    import MultiScaleDeformableAttention

    assert importlib.util.find_spec(NAME) is not None  # as libraries ask whether it is installed
    yield MultiScaleDeformableAttention
    sys.modules.pop(NAME)


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=interpreter), "eager", None])
def test_the_extension_that_others_compile_is_there_without(extension, backend):
    shapes, start = sizes()
    generator = torch.Generator().manual_seed(0)
    locations = torch.rand(2, QUERIES, 2, len(SHAPES), 2, 2, generator=generator)
    value, weights = (
        torch.randn(2, PIXELS, 2, 8, generator=generator),
        torch.rand(locations.shape[:-1], generator=generator),
    )
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    out = ops.deformable_attention(value, SHAPES, locations, weights).flatten(2)
    dout = torch.randn(out.shape, generator=generator)
    expected = torch.autograd.grad(out, leaves, dout)
    given = value, shapes, start, locations, weights
    with torch.no_grad(), use_backend(**({} if backend is None else {"deformable_attention": backend})):
        torch.testing.assert_close(extension.ms_deform_attn_forward(*given, 64), out)
        found = extension.ms_deform_attn_backward(*given, dout, 64)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_extension_that_is_imported_already_is_not_replaced(monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, sys)
    with pytest.raises(RuntimeError, match="was imported before"):
        detr_fast.provide_deformable_extension()
