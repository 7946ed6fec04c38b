"""The detector: forms of input, names of weights, masks, configurations, and no look at a value on the host."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detr_fast.models import (
    Detr,
    ModelConfig,
    NestedTensor,
    PostProcess,
    Targets,
    build_criterion,
    build_model,
    detr_resnet50,
    nested_tensor_from_list,
)
from detr_fast.models.position import PositionEmbeddingLearned, PositionEmbeddingSine

CONV = ModelConfig(
    backbone="conv", num_classes=5, num_queries=7, d_model=32, heads=4, encoder_layers=2, decoder_layers=3, feedforward=48,
    dropout=0.0, backbone_width=8,
)  # fmt: skip


@pytest.fixture
def model() -> Detr:
    torch.manual_seed(0)
    return build_model(CONV).eval()


def test_outputs_have_the_documented_shapes(model):
    outputs = model(torch.rand(2, 3, 64, 80))
    assert outputs.keys() == {"pred_logits", "pred_boxes", "aux_outputs"}
    assert len(outputs["aux_outputs"]) == 2
    for layer in (outputs, *outputs["aux_outputs"]):
        assert layer["pred_logits"].shape == (2, 7, 6)
        assert layer["pred_boxes"].shape == (2, 7, 4)
        assert ((layer["pred_boxes"] >= 0) & (layer["pred_boxes"] <= 1)).all()


def test_without_auxiliary_losses_only_the_last_layer_is_returned(model):
    images = torch.rand(1, 3, 64, 64)
    expected = model(images)
    model.aux_loss = False
    outputs = model(images)
    assert outputs.keys() == {"pred_logits", "pred_boxes"}
    torch.testing.assert_close(outputs["pred_logits"], expected["pred_logits"])


def test_every_form_of_the_same_images_gives_the_same_detections(model):
    images = [torch.rand(3, 64, 80), torch.rand(3, 48, 80)]
    nested = nested_tensor_from_list(images)
    expected = model(nested)["pred_logits"]
    for form in (images, tuple(images), (nested.tensors, nested.mask)):
        torch.testing.assert_close(model(form)["pred_logits"], expected)


def test_an_empty_mask_and_no_mask_give_the_same_detections(model):
    tensors = torch.rand(2, 3, 64, 80)
    mask = torch.zeros(2, 64, 80, dtype=torch.bool)
    expected = model((tensors, mask))["pred_boxes"]
    for form in (tensors, (tensors, None), NestedTensor(tensors, mask, padded=False), list(tensors)):
        torch.testing.assert_close(model(form)["pred_boxes"], expected, rtol=1e-4, atol=1e-6)


def test_the_mask_keeps_padding_out_of_the_attention(model):
    # Compared behind the backbone, whose convolutions see across the border as the original's do.
    torch.manual_seed(1)
    source, query = torch.randn(1, 12, 32), model.query_embed.weight
    position = torch.randn(1, 12, 32)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 9:] = True
    with torch.no_grad():
        masked = model.transformer(source, position, query, mask)
        short = model.transformer(source[:, :9], position[:, :9], query)
        source[:, 9:] = 100
        changed = model.transformer(source, position, query, mask)
    torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(masked, changed)


def test_a_fully_padded_image_gives_finite_detections_and_gradients(model):
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[1] = True
    outputs = model((torch.rand(2, 3, 64, 64), mask))
    criterion = build_criterion(CONV)
    targets = [
        {"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]), "labels": torch.tensor([1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    loss = criterion.weighted_sum(criterion(outputs, targets))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(1, 1, 32, 32), r"images of shape \(1, 1, 32, 32\); expected \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "got torch.uint8 images; expected floats"),
        ((torch.rand(1, 3, 32, 32), torch.zeros(1, 32, 32)), "got a torch.float32 mask"),
        ((torch.rand(1, 3, 32, 32), torch.zeros(1, 8, 8, dtype=torch.bool)), r"mask of shape \(1, 8, 8\); expected"),
        ([], "got no images"),
    ],
)
def test_images_of_another_form_are_refused(model, images, message):
    with pytest.raises(ValueError, match=message):
        model(images)


def original_names(blocks: tuple[int, ...]) -> set[str]:
    """The original repository's parameter and buffer names for a DETR with a bottleneck ResNet, 6+6 layers."""
    norm = ("weight", "bias", "running_mean", "running_var")
    body = {"conv1.weight", *(f"bn1.{n}" for n in norm)}
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            prefix = f"layer{stage}.{block}."
            body |= {f"{prefix}conv{i}.weight" for i in (1, 2, 3)} | {
                f"{prefix}bn{i}.{n}" for i in (1, 2, 3) for n in norm
            }
            if block == 0:
                body |= {f"{prefix}downsample.0.weight"} | {f"{prefix}downsample.1.{n}" for n in norm}
    names = {f"backbone.0.body.{name}" for name in body}
    pair = ("weight", "bias")
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    for side, attentions, norms in (("encoder", ["self_attn"], 2), ("decoder", ["self_attn", "multihead_attn"], 3)):
        for layer in range(6):
            prefix = f"transformer.{side}.layers.{layer}."
            names |= {f"{prefix}{a}.{n}" for a in attentions for n in attention}
            names |= {f"{prefix}linear{i}.{n}" for i in (1, 2) for n in pair}
            names |= {f"{prefix}norm{i + 1}.{n}" for i in range(norms) for n in pair}
    for module in (
        "transformer.decoder.norm",
        "class_embed",
        "input_proj",
        *(f"bbox_embed.layers.{i}" for i in range(3)),
    ):
        names |= {f"{module}.{n}" for n in pair}
    return names | {"query_embed.weight"}


def test_weights_bear_the_original_repositorys_names_and_shapes():
    pytest.importorskip("torchvision")
    model = detr_resnet50()
    state = model.state_dict()
    assert set(state) == original_names((3, 4, 6, 3))
    assert state["class_embed.weight"].shape == (92, 256)
    assert state["query_embed.weight"].shape == (100, 256)
    assert state["input_proj.weight"].shape == (256, 2048, 1, 1)
    assert state["transformer.encoder.layers.5.linear1.weight"].shape == (2048, 256)
    # What the original's training logs print as "number of params".
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 41_302_368


def test_pre_norm_models_have_a_norm_behind_the_encoder_and_learned_positions_their_tables():
    config = replace(CONV, pre_norm=True, position="learned")
    model = build_model(config).eval()
    assert {"transformer.encoder.norm.weight", "backbone.1.row_embed.weight", "backbone.1.col_embed.weight"} <= set(
        model.state_dict()
    )
    assert model([torch.rand(3, 64, 64), torch.rand(3, 48, 64)])["pred_boxes"].isfinite().all()


def test_pre_norm_normalises_before_each_block():
    torch.manual_seed(0)
    layer = build_model(replace(CONV, pre_norm=True)).transformer.encoder.layers[0]
    x, position = torch.randn(2, 5, 32), torch.randn(1, 5, 32)
    y = layer.norm1(x)
    x1 = x + layer.self_attn(y + position, y + position, y, need_weights=False)[0]
    expected = x1 + layer.linear2(layer.linear1(layer.norm2(x1)).relu())
    torch.testing.assert_close(layer(x, position), expected)


def sine_reference(height: int, width: int, features: int) -> Tensor:
    """The paper's embedding of an unpadded image, entry by entry."""
    result = torch.empty(height, width, 2 * features)
    for row in range(height):
        for column in range(width):
            for axis, (index, size) in enumerate(((row, height), (column, width))):
                angle = torch.tensor(2 * torch.pi * (index + 1) / (size + 1e-6), dtype=torch.float64)
                for channel in range(features):
                    period = 10_000.0 ** (2 * (channel // 2) / features)
                    wave = torch.sin if channel % 2 == 0 else torch.cos
                    result[row, column, axis * features + channel] = wave(angle / period)
    return result


def test_sine_positions_follow_the_paper_and_the_visible_part():
    embedding = PositionEmbeddingSine(8)
    features = torch.zeros(2, 1, 5, 7)
    torch.testing.assert_close(embedding(features)[0], sine_reference(5, 7, 8), rtol=1e-4, atol=1e-5)
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[1, 3:] = mask[1, :, 4:] = True
    positions = embedding(features, mask)
    torch.testing.assert_close(positions[0], sine_reference(5, 7, 8), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(positions[1, :3, :4], sine_reference(3, 4, 8), rtol=1e-4, atol=1e-5)


def test_learned_positions_end_at_fifty():
    with pytest.raises(ValueError, match="feature map is 4×51 but learned positions end at 50×50"):
        PositionEmbeddingLearned(4)(torch.zeros(1, 1, 4, 51))


def test_configurations_survive_json():
    config = replace(CONV, position="learned", backbone_stride=32)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "vit"}, "got backbone 'vit'"),
        ({"heads": 7}, "d_model 256 is no multiple of 7 heads"),
        ({"d_model": 6, "heads": 3}, "d_model 6 is no multiple of 4"),
        ({"num_classes": 0}, "got num_classes 0; expected at least 1"),
        ({"position": "none"}, "got position='none'; expected 'sine' or 'learned'"),
        ({"width": 3}, r"unknown model settings \['width'\]"),
    ],
)
def test_settings_that_build_no_model_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig.from_dict({"backbone": "conv", **settings}))


def test_post_processing_gives_pixels_of_the_size_asked_for():
    logits = torch.tensor([[[1.0, 3.0, 0.0], [0.0, 0.0, 9.0]]])
    boxes = torch.tensor([[[0.5, 0.25, 0.5, 0.5], [0.1, 0.1, 0.2, 0.2]]])
    (result,) = PostProcess()({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([[100, 200]]))
    (same,) = PostProcess()({"pred_logits": logits, "pred_boxes": boxes}, [(100, 200)])
    assert all(same[key].equal(value) for key, value in result.items())
    assert result["labels"][0] == 1
    torch.testing.assert_close(result["scores"], logits[0].softmax(-1)[:, :2].amax(-1))  # "no object" never wins
    torch.testing.assert_close(result["boxes"][0], torch.tensor([50.0, 0.0, 150.0, 50.0]))
    with pytest.raises(ValueError, match=r"target_sizes of shape \(2,\); expected \(1, 2\)"):
        PostProcess()({"pred_logits": logits, "pred_boxes": boxes}, torch.tensor([100, 200]))


def test_a_focal_models_scores_are_sigmoids_and_start_low():
    model = build_model(replace(CONV, focal=True)).eval()
    outputs = model(torch.rand(1, 3, 64, 64))
    (found,) = PostProcess(focal=True)(outputs, torch.tensor([[64, 64]]))
    expected = outputs["pred_logits"][0, :, :-1].sigmoid().max(-1)
    assert torch.equal(found["scores"], expected.values)
    assert torch.equal(found["labels"], expected.indices)
    assert build_criterion(replace(CONV, focal=True)).focal
    assert 0.001 < found["scores"].mean() < 0.1


def test_heads_keep_full_precision_under_autocast(model):
    images = torch.rand(2, 3, 64, 80)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images)
    assert outputs["pred_boxes"].dtype == torch.float32
    assert outputs["pred_logits"].dtype == torch.float32
    coarse = outputs["pred_boxes"].to(torch.bfloat16).float()
    assert (coarse != outputs["pred_boxes"]).float().mean() > 0.9  # computed so, not converted behind


def test_models_work_in_bfloat16_and_on_the_meta_device(model):
    assert model.bfloat16()(torch.rand(1, 3, 64, 64).bfloat16())["pred_boxes"].isfinite().all()
    with torch.device("meta"):
        assert build_model(CONV)([torch.rand(3, 64, 64), torch.rand(3, 48, 64)])["pred_boxes"].shape == (2, 7, 4)


@pytest.mark.parametrize("focal", [False, True])
def test_model_and_losses_compile_without_a_graph_break(focal):
    model, criterion = build_model(CONV).eval(), build_criterion(CONV, focal=focal)
    targets = Targets.from_list([{"boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]]), "labels": torch.tensor([2])}] * 2, 4)

    def step(images: Tensor, mask: Tensor) -> Tensor:
        return criterion.weighted_sum(criterion(model((images, mask)), targets))

    arguments = torch.rand(2, 3, 64, 80), torch.zeros(2, 64, 80, dtype=torch.bool)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), step(*arguments))


@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_forward_and_losses_never_look_at_a_value_on_the_host(padded, focal):
    """On fake tensors every such look raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = replace(CONV, num_classes=5)
    with FakeTensorMode(), torch.device("cuda"):
        model, criterion = build_model(config).train(), build_criterion(config, focal=focal)
        images = NestedTensor(torch.rand(2, 3, 64, 80), torch.zeros(2, 64, 80, dtype=torch.bool), padded)
        targets = Targets(torch.rand(2, 9, 4), torch.zeros(2, 9, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
        total = criterion.weighted_sum(criterion(model(images), targets))
        assert total.device.type == "cuda"
        with pytest.raises(RuntimeError, match="local_scalar"):  # had there been one
            total.item()
