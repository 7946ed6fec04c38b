"""The packed encoder: equal to the padded one on every real token, with less work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import detr_fast
from detr_fast.dispatch import use_backend
from detr_fast.explanation import explaining
from detr_fast.models import ModelConfig, build_criterion, build_model, nested_tensor_from_list
from detr_fast.models.packing import Packing
from detr_fast.models.structures import NestedTensor
from detr_fast.testing.counters import counting

CONV = ModelConfig(
    backbone="conv", num_classes=5, num_queries=7, d_model=32, heads=4, encoder_layers=2, decoder_layers=2, feedforward=48,
    dropout=0.0, backbone_width=8,
)  # fmt: skip
SIZES = [(64, 80), (33, 128), (96, 47)]


def images_of(sizes=SIZES):
    return nested_tensor_from_list([torch.rand(3, *size) for size in sizes])


@pytest.fixture(params=[False, True], ids=["post-norm", "pre-norm"])
def pair(request):
    """The same model, padded and packed."""
    padded, packed = (build_model(replace(CONV, pre_norm=request.param, packed=on)) for on in (False, True))
    packed.load_state_dict(padded.state_dict())
    return padded, packed


def test_packed_and_padded_models_find_the_same_and_learn_the_same(pair):
    images = images_of()
    targets = [{"boxes": torch.tensor([[0.5, 0.4, 0.3, 0.2]]), "labels": torch.tensor([n])} for n in range(3)]
    criterion = build_criterion(CONV)
    results = []
    for model in pair:
        model = model.double().train()
        for module in model.modules():  # batch statistics would mix the images
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        doubled = NestedTensor(images.tensors.double(), images.mask, images.padded, images.sizes)
        outputs = model(doubled)
        criterion.weighted_sum(criterion(outputs, targets)).backward()
        results.append(
            (outputs["pred_logits"], outputs["pred_boxes"], {n: p.grad for n, p in model.named_parameters()})
        )
    (logits, boxes, gradients), (packed_logits, packed_boxes, packed_gradients) = results
    torch.testing.assert_close(packed_logits, logits)
    torch.testing.assert_close(packed_boxes, boxes)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_the_packed_model_moves_fewer_bytes(pair):
    images = images_of([(128, 32), (32, 128)])
    moved = []
    for model in pair:
        with torch.no_grad(), counting() as counts:
            model.eval()(images)
        moved.append(counts.bytes_moved)
    assert moved[1] < 0.9 * moved[0]


@pytest.mark.parametrize("map_size", [(6, 8), (3, 4), (5, 7)])
def test_the_packing_holds_exactly_what_the_downsampled_mask_shows(map_size):
    images = images_of()
    mask = torch.nn.functional.interpolate(images.mask[None].byte(), size=map_size)[0].bool()
    packing = Packing.of_images(images.sizes, images.tensors.shape[-2:], map_size)
    assert packing.index.tolist() == (~mask).flatten().nonzero()[:, 0].tolist()
    counts = (~mask).flatten(1).sum(1)
    assert packing.cu_seqlens.tolist() == [0, *counts.cumsum(0).tolist()]
    assert packing.longest == counts.max()


def test_features_are_counted_as_nearest_neighbours_of_any_size():
    for padded in range(1, 140, 7):
        for mapped in {1, 2, (padded + 2) // 3, (padded + 1) // 2, padded}:
            lengths = sorted({1, padded // 3 + 1, padded - padded // 5, padded})
            mask = torch.arange(padded) >= torch.tensor(lengths)[:, None]
            small = torch.nn.functional.interpolate(mask[None].byte(), size=mapped)[0]
            expected = (small == 0).sum(1).tolist()
            packing = Packing.of_images([(n, 1) for n in lengths], (padded, 1), (mapped, 1))
            assert packing.cu_seqlens.diff().tolist() == expected


def test_a_capacity_fixes_the_number_of_tokens():
    images = images_of()
    shape = images.tensors.shape[-2:], (6, 8)
    exact = Packing.of_images(images.sizes, *shape)
    fixed = Packing.of_images(images.sizes, *shape, capacity=120)
    assert len(fixed.index) == 120
    assert fixed.index[: len(exact.index)].tolist() == exact.index.tolist()
    assert fixed.cu_seqlens.tolist() == exact.cu_seqlens.tolist()
    with pytest.raises(ValueError, match="the capacity is 50; raise it"):
        Packing.of_images(images.sizes, *shape, capacity=50)


@pytest.mark.parametrize("sizes", [SIZES, [(96, 128)] * 3, [(1, 1)] * 3])
def test_captured_steps_have_one_of_eight_numbers_of_tokens(sizes):
    shape = (96, 128), (6, 8)
    tokens = len(Packing.of_images(sizes, *shape).index)
    capacity = Packing.capacity(sizes, *shape)
    assert tokens <= capacity < tokens + 3 * 6 * 8 // 8
    assert capacity % (3 * 6 * 8 // 8) == 0


def test_a_batch_with_a_packing_made_beforehand_gives_the_same_in_a_fixed_number_of_tokens(pair):
    _, packed = (model.eval() for model in pair)
    images = images_of()
    beforehand = packed.with_packing(images).to("cpu")
    assert beforehand.sizes is None
    assert len(beforehand.packing.index) > len(Packing.of_images(images.sizes, (96, 128), (6, 8)).index)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(packed(beforehand)[name], packed(images)[name])
    assert packed.with_packing(beforehand).packing is beforehand.packing
    assert packed.with_packing(replace(images, padded=False)).packing is None


def test_one_image_with_as_many_queries_as_tokens_is_packed_rightly():
    padded, packed = (build_model(replace(CONV, num_queries=24, packed=on)).eval() for on in (False, True))
    packed.load_state_dict(padded.state_dict())
    images = nested_tensor_from_list([torch.rand(3, 60, 70)], size=(64, 96))  # 4 × 6 features, 20 of them real
    beforehand = packed.with_packing(images)
    assert len(beforehand.packing.index) == 21
    fixed = replace(beforehand, packing=Packing.of_images(images.sizes, (64, 96), (4, 6), capacity=24))
    torch.testing.assert_close(packed(fixed)["pred_boxes"], padded(images)["pred_boxes"])


def test_explain_says_whether_tokens_are_packed_and_why_not(pair):
    _, packed = pair
    images = images_of()
    reasons = {}
    for name, form in (("host", images), ("device", images.decompose()), ("whole", torch.rand(2, 3, 64, 80))):
        (record,) = (r for r in detr_fast.explain(packed, form, quiet=True) if r.op == "packing")
        reasons[name] = record.chosen, record.reasons
    assert reasons == {
        "host": ("packed", {}),
        "device": ("padded", {"packed": "the mask exists only on the device: no packing"}),
        "whole": ("padded", {"packed": "nothing is padded"}),
    }


def test_without_sizes_on_the_host_the_model_runs_padded(pair):
    padded, packed = (model.eval() for model in pair)
    images = images_of()
    for form in (images.decompose(), torch.rand(2, 3, 64, 64)):
        torch.testing.assert_close(packed(form)["pred_logits"], padded(form)["pred_logits"], rtol=0, atol=0)


def test_the_packed_model_never_makes_the_host_wait_for_a_gpu():
    with FakeTensorMode(), counting() as counts, explaining() as records:
        with torch.device("cuda"):
            model = build_model(replace(CONV, packed=True))
        images = torch.empty(3, 3, 96, 128, device="cuda")
        mask = torch.empty(3, 96, 128, dtype=torch.bool, device="cuda")
        outputs = model(NestedTensor(images, mask, True, tuple(SIZES)))
    assert outputs["pred_boxes"].shape == (3, 7, 4)
    assert not counts.synchronisations
    assert {record.chosen for record in records if record.op == "attention_varlen"} == {"triton"}


@pytest.mark.interpreter
def test_the_packed_model_on_the_kernels_learns_what_the_padded_one_does():
    small = replace(CONV, encoder_layers=1, decoder_layers=1)
    padded, packed = (build_model(replace(small, packed=on)).eval() for on in (False, True))
    packed.load_state_dict(padded.state_dict())
    images = images_of([(30, 40), (20, 64)])
    results = []
    for model, form in ((padded, images), (packed, packed.with_packing(images))):
        with use_backend(attention_varlen="triton", linear_add_layer_norm="triton"), counting() as counts:
            boxes = model(form)["pred_boxes"]
        with use_backend(attention_varlen="triton", linear_add_layer_norm="triton"):
            boxes.square().sum().backward()
        parameters = model.transformer.named_parameters()
        results.append((boxes, {name: p.grad for name, p in parameters if p.grad is not None}))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-3)
    assert counts.launches["attention_forward_kernel"] == 2
    assert counts.launches["linear_norm_kernel"] == 2  # each with its projection, residual and norm


def test_accelerate_turns_packing_on_and_restore_turns_it_off(pair):
    padded, _ = pair
    images = images_of()
    expected = padded.eval()(images)["pred_logits"]
    with detr_fast.accelerated(padded, packed=True) as report:
        assert padded.packed
        assert "padded tokens -> packed tokens" in str(report)
        torch.testing.assert_close(padded(images)["pred_logits"], expected)
    assert not padded.packed
    detr_fast.accelerate(padded, packed=True)
    assert padded.packed
    detr_fast.restore(padded)
    assert not padded.packed


def test_accelerate_leaves_a_packed_setting_of_other_modules_alone():
    other = torch.nn.Linear(2, 2)
    other.packed = False
    report = detr_fast.accelerate(other, packed=True)
    assert other.packed is False
    assert "packed=True needs images' sizes on the host" in str(report)


def test_accelerate_says_where_nothing_can_be_packed():
    report = detr_fast.accelerate(torch.nn.Linear(2, 2), packed=True)
    assert "packed=True needs images' sizes on the host" in str(report)
