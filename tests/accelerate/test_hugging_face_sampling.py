"""Deformable attention of transformers' models: known by its code, samples by our op, and all else stays theirs."""

from __future__ import annotations

import copy
import importlib
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.exc import InternalTorchDynamoError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

import detr_fast
from detr_fast import dispatch, use_backend
from detr_fast.adapters import hugging_face_sampling as sampling
from detr_fast.adapters.base import fingerprint
from detr_fast.adapters.hugging_face_blocks import told
from detr_fast.adapters.hugging_face_offsets import _KINDS, SAMPLES
from detr_fast.dispatch import BackendError
from detr_fast.ops import regimes
from detr_fast.ops.regimes import NEVER, Regime
from detr_fast.testing import assert_as_accurate_as_eager, count
from detr_fast.testing.interpreter import checked_interpreter

transformers = pytest.importorskip("transformers")
interpreter = pytest.mark.interpreter

SHAPES = [(3, 4), (2, 2), (1, 2)]
PIXELS = sum(h * w for h, w in SHAPES)
WIDTH, QUERIES = 16, 5


def modeling(model):
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def config(**more):
    rest = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_n_points": 2, "encoder_n_points": 2}
    levels = {"num_feature_levels": 3, "decoder_n_levels": 3, "decoder_offset_scale": 0.5, "decoder_method": "default"}
    return SimpleNamespace(d_model=WIDTH, disable_custom_kernels=True, **{**rest, **levels, **more})


def pixel_decoder(model, name):
    return lambda: getattr(modeling(model), name)(embed_dim=WIDTH, num_heads=2, n_levels=3, n_points=2)


# Each way in which transformers' models sample: what makes such a module.
MODULES = {
    "RT-DETR": lambda: modeling("rt_detr").RTDetrMultiscaleDeformableAttention(config(), 2, 2),
    "Grounding DINO": lambda: modeling("grounding_dino").GroundingDinoMultiscaleDeformableAttention(config(), 2, 2),
    "OmDet-Turbo": lambda: modeling("omdet_turbo").OmDetTurboMultiscaleDeformableAttention(config(), 2, 2),
    "RT-DETR v2": lambda: modeling("rt_detr_v2").RTDetrV2MultiscaleDeformableAttention(config()),
    "D-FINE": lambda: modeling("d_fine").DFineMultiscaleDeformableAttention(config(decoder_n_points=[1, 3, 2])),
    "DEIMv2": lambda: modeling("deimv2").Deimv2MultiscaleDeformableAttention(config()),
    "Mask2Former": pixel_decoder("mask2former", "Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention"),
    "OneFormer": pixel_decoder("oneformer", "OneFormerPixelDecoderEncoderMultiscaleDeformableAttention"),
}


def call(module, masked=False):
    generator = torch.Generator().manual_seed(3)
    x, memory = (torch.randn(2, n, WIDTH, generator=generator) for n in (QUERIES, PIXELS))
    boxes = torch.rand(2, QUERIES, 1, 4, generator=generator) * 0.5 + 0.2
    mask = torch.rand(2, PIXELS, generator=generator) < 0.7 if masked else None
    start = torch.tensor([0, 12, 16])
    found = module(
        hidden_states=x,
        attention_mask=mask,
        encoder_hidden_states=memory,
        reference_points=boxes,
        spatial_shapes_list=SHAPES,
        **({} if "Mask2Former" in repr(module) else {"spatial_shapes": torch.tensor(SHAPES)}),
        level_start_index=start,
        **(told(module) if "OmDet" in repr(module) else {}),
    )
    return found[0]


def with_gradients(module, masked=False):
    module.zero_grad()
    out = call(module, masked)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in module.parameters())]


def made(name):
    torch.manual_seed(0)
    module = MODULES[name]()
    for parameter in module.parameters():  # all heads and queries sample the same places at first
        torch.nn.init.normal_(parameter, std=0.3)
    return module


# D-FINE's own code takes no mask of this shape.
@interpreter
@pytest.mark.parametrize(
    ("name", "masked"),
    [(name, masked) for name in MODULES for masked in (False, True) if not (masked and name in ("D-FINE", "DEIMv2"))],
)
def test_the_kernel_samples_what_transformers_does(name, masked):
    module = made(name)
    expected = with_gradients(module, masked)
    report = detr_fast.accelerate(module)
    assert len(report.switched) == (2 if hasattr(module, "attn") else 1)  # where what samples is a module of its own
    seen = []
    with (
        checked_interpreter(),
        use_backend(deformable_attention="triton"),
        dispatch.recording(lambda op, d: seen.append((op, d.implementation.name, "offsets" in d.shapes))),
    ):
        found = with_gradients(module, masked)
    # Grounding DINO's layers may return the weights, and here do not tell it that they are dropped.
    assert seen == [("deformable_attention", "triton", name != "Grounding DINO")]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    detr_fast.restore(module)
    assert all(torch.equal(*pair) for pair in zip(with_gradients(module, masked), expected))


@pytest.mark.parametrize("name", MODULES)
def test_where_no_kernel_is_to_run_each_projection_is_called_once(name, calls):
    module = made(name)
    detr_fast.accelerate(module)
    counted = calls(module)
    with use_backend(deformable_attention="eager"):
        call(module)
    assert counted == dict.fromkeys(counted, 1)
    assert len(counted) == (2 if name in ("D-FINE", "DEIMv2") else 4)


@pytest.mark.parametrize("name", MODULES)
def test_where_no_kernel_runs_theirs_does_to_the_bit_also_in_a_copy_and_under_compile(name):
    module = made(name).eval()
    expected = with_gradients(module)
    detr_fast.accelerate(module)
    for one in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(torch.equal(*pair) for pair in zip(with_gradients(one), expected, strict=True))
    with use_backend(deformable_attention="eager"), torch.no_grad():
        torch.testing.assert_close(compiled(module), expected[0])
        assert torch.equal(call(module), expected[0])


def compiled(module):
    """What the module gives in one graph; in several where PyTorch can't compile transformers' own code: 2.11 can't where it checks sizes."""
    torch.compiler.reset()
    try:
        return call(torch.compile(module, fullgraph=True, backend="eager"))
    except InternalTorchDynamoError as error:
        if torch.__version__ >= (2, 12) or "Pending unbacked symbols" not in str(error):
            raise
        return call(torch.compile(module, backend="eager"))


def test_a_gpu_launches_once_where_transformers_launches_19_operations():
    module = modeling("deformable_detr").MultiScaleDeformableAttention()
    shapes = [(8, 11), (4, 6), (2, 3), (1, 2)]
    pixels = sum(h * w for h, w in shapes)

    def launches():
        with FakeTensorMode():
            value, locations, weights = (
                torch.empty(2, pixels, 8, *rest, device="cuda") for rest in ((32,), (4, 4, 2), (4, 4))
            )
            return count(lambda: module(value, None, shapes, None, locations, weights, 64)).total_launches

    before = launches()
    detr_fast.accelerate(module)
    assert (before, launches()) == (19, 1)


def fake_launches(accelerated, levels=4, coordinates=2, calls=None):
    """What a GPU would launch for a module with its projections, and how often each of those is called."""
    with FakeTensorMode(), torch.device("cuda"):
        options = config(num_feature_levels=levels)
        module = modeling("deformable_detr").DeformableDetrMultiscaleDeformableAttention(options, 2, 2)
        if accelerated:
            detr_fast.accelerate(module)
        counted = calls(module) if calls else {}
        shapes = [(4, 5), (2, 3), (1, 2), *[(1, 1)] * (levels - 3)]
        pixels = sum(h * w for h, w in shapes)
        x, memory, references = (
            torch.empty(2, *rest) for rest in ((QUERIES, WIDTH), (pixels, WIDTH), (QUERIES, levels, coordinates))
        )
        given = {"encoder_hidden_states": memory, "reference_points": references, "spatial_shapes_list": shapes}
        given["spatial_shapes"] = torch.empty(levels, 2, dtype=torch.int64)
        return count(lambda: module(x, **given)), counted


@pytest.mark.parametrize(("coordinates", "theirs"), [(2, 27), (4, 28)])
def test_a_gpu_launches_four_products_and_one_kernel_for_a_module_with_offsets(coordinates, theirs):
    launches = [fake_launches(one, coordinates=coordinates)[0].total_launches for one in (False, True)]
    assert launches == [theirs, 5]


@pytest.mark.parametrize(("levels", "sampled"), [(4, 1), (7, 0)])
def test_where_it_is_faster_from_offsets_on_no_kernel_or_there_is_none_nothing_is_projected_twice(
    levels, sampled, tmp_path, monkeypatch, calls
):
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path))
    name = "deformable_attention_from_offsets"
    regimes.save([Regime(name, dispatch.architecture(torch.device("cuda")), NEVER, NEVER, "measured here")])
    try:
        (before, _), (after, counted) = fake_launches(False, levels), fake_launches(True, levels, calls=calls)
    finally:
        monkeypatch.undo()
        regimes.known.cache_clear()
        dispatch.forget_decisions()
    assert sorted(counted.values()) == [1] * 4
    assert after.launches["deformable_attention_kernel"] == sampled  # of locations that their code computes
    assert after.total_launches == (9 if sampled else before.total_launches)


def test_the_nearest_pixel_is_left_to_transformers():
    torch.manual_seed(0)
    module = modeling("rt_detr_v2").RTDetrV2MultiscaleDeformableAttention(config(decoder_method="discrete"))
    expected = call(module)
    detr_fast.accelerate(module)
    with use_backend(deformable_attention="eager"), dispatch.recording(lambda *_: pytest.fail("was asked")):
        assert torch.equal(call(module), expected)


def test_a_function_that_is_not_transformers_own_is_left_alone(monkeypatch):
    module = made("Mask2Former")
    monkeypatch.setattr(modeling("mask2former"), "multi_scale_deformable_attention", lambda *_: None)
    assert not detr_fast.accelerate(module).switched
    fine = made("D-FINE")
    fine.ms_deformable_attn_core = lambda *given: given[0]
    assert not detr_fast.accelerate(fine).switched


@interpreter
@pytest.mark.parametrize(("name", "model"), [("RT-DETR v2", "rt_detr_v2"), ("OneFormer", "oneformer")])
def test_a_function_that_is_patched_afterwards_is_called(name, model, monkeypatch):
    module, file = made(name), modeling(model)
    detr_fast.accelerate(module)
    (patched,) = (one for one in sampling._NAMES if hasattr(file, one))
    with use_backend(deformable_attention="triton"):
        before = call(module)
        calls, theirs = [], getattr(file, patched)
        monkeypatch.setattr(file, patched, lambda *given, **named: calls.append(1) or theirs(*given, **named))
        torch.testing.assert_close(call(module), before)
        assert calls == [1]
        monkeypatch.undo()
        assert torch.equal(call(module), before)
        assert calls == [1]


@pytest.mark.parametrize("name", ["D-FINE", "DEIMv2"])
def test_a_function_that_is_held_may_be_set_to_another_afterwards(name):
    module = made(name)
    detr_fast.accelerate(module)
    module.ms_deformable_attn_core = mine = lambda value, *given: value.new_full((2, QUERIES, WIDTH), 3.0)
    assert module.ms_deformable_attn_core is mine
    detr_fast.restore(module)
    assert module.ms_deformable_attn_core is mine


@interpreter
@pytest.mark.parametrize(
    ("name", "coordinates", "dtype"), [("RT-DETR", 2, torch.bfloat16), ("D-FINE", 4, torch.float16)]
)
def test_in_16_bits_it_is_as_accurate_as_theirs(name, coordinates, dtype):
    theirs, ours = made(name), made(name)
    detr_fast.accelerate(ours)
    names = [name for name, _ in theirs.named_parameters()]
    x, memory = (torch.randn(2, n, WIDTH) for n in (QUERIES, PIXELS))
    references = torch.rand(2, QUERIES, 1, coordinates) * 0.5 + 0.2

    def step(module):
        def run(x, memory, references, *parameters):
            given = {"encoder_hidden_states": memory, "reference_points": references, "spatial_shapes_list": SHAPES}
            given["spatial_shapes"] = torch.tensor(SHAPES)
            return functional_call(module, dict(zip(names, parameters)), (x,), given)[0]

        return run

    def accelerated(*tensors):
        with checked_interpreter(), use_backend(deformable_attention="triton"):
            return step(ours)(*tensors)

    case = (x, memory, references, *(p.detach() for p in theirs.parameters()))
    assert_as_accurate_as_eager(accelerated, reference=step(theirs), inputs=case, dtype=dtype)


@interpreter
def test_a_projection_that_gives_another_dtype_than_a_linear_does_is_seen():
    module = made("RT-DETR")
    detr_fast.accelerate(module)
    module.attention_weights.register_forward_hook(lambda part, given, logits: logits.double())
    with use_backend(deformable_attention="triton"), pytest.raises(BackendError, match="float64"):
        call(module)


@interpreter
def test_weights_that_somebody_looks_at_are_theirs():
    module = made("RT-DETR")
    detr_fast.accelerate(module)
    given = {"encoder_hidden_states": torch.randn(2, PIXELS, WIDTH), "spatial_shapes_list": SHAPES}
    given |= {"reference_points": torch.rand(2, QUERIES, 1, 4), "spatial_shapes": torch.tensor(SHAPES)}
    x = torch.randn(2, QUERIES, WIDTH)
    with use_backend(deformable_attention="triton"):
        assert module(x, **given)[1] is None
        assert module(x, **given, output_attentions=True)[1].shape == (2, QUERIES, 2, 3, 2)
        seen = []
        hook = module.register_forward_hook(lambda module, given, found: seen.append(found[1]))
        module(x, **given)
        hook.remove()
        module.attn.register_forward_hook(lambda module, given, found: seen.append(found))
        module(x, **given)
    assert len(seen) == 2
    assert seen[0] is not None


@interpreter
@pytest.mark.parametrize("name", ["RT-DETR v2", "D-FINE"])
def test_a_checkpoint_that_scales_offsets_otherwise_is_seen(name):
    module = made(name)
    detr_fast.accelerate(module)
    shapes = []
    with use_backend(deformable_attention="triton"), dispatch.recording(lambda op, d: shapes.append(d.shapes)):
        call(module)
        state = module.state_dict()
        scale = next(key for key in state if key.endswith("points_scale"))
        module.load_state_dict(state | {scale: state[scale] * 2})
        found = call(module)
    assert ["offsets" in one for one in shapes] == [True, False]
    detr_fast.restore(module)
    torch.testing.assert_close(found, call(module), rtol=1e-4, atol=1e-4)


def test_all_code_that_is_known_is_transformers():
    modules = [
        kind
        for model in ("rt_detr", "grounding_dino", "omdet_turbo", "rt_detr_v2", "d_fine", "mask2former", "oneformer")
        for kind in vars(modeling(model)).values()
    ]
    kinds = {
        fingerprint(one.forward)
        for one in modules
        if isinstance(one, type) and one.__name__.endswith("MultiscaleDeformableAttention")
    }
    assert set(_KINDS) <= kinds
    assert fingerprint(modeling("lw_detr").MultiScaleDeformableAttention.forward) == SAMPLES
    functions = [modeling(model).multi_scale_deformable_attention for model in ("mask2former", "oneformer")]
    functions += [modeling(model).multi_scale_deformable_attention_v2 for model in ("rt_detr_v2", "d_fine", "deimv2")]
    assert {fingerprint(one) for one in functions} == set(sampling._FUNCTIONS)
