"""DETR's numbers against an implementation that is not ours: Hugging Face's DetrForObjectDetection, random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from detr_fast.models import ModelConfig, NestedTensor, PostProcess, Targets, build_criterion, build_model
from detr_fast.models import nested_tensor_from_list as nested
from detr_fast.models.convert import Weights, load_weights
from detr_fast.models.weight_names import from_huggingface

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

CLASSES = 5
TRANSFORMER = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "num_queries": 12}
# Both sides run in fp64, so that what is compared is what they compute and not how they round; positions are fp32 in ours.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

OURS_ALONE = {"class_error", "broken_predictions", "broken_targets"}


def peer_model(
    backbone: str = "resnet50", dilation: bool = False, own_resnet: bool = False, position: str = "sine"
) -> Any:
    """Their model with random weights and random, harmless batch norm statistics."""
    if own_resnet:
        kind = {"use_timm_backbone": False, "backbone_config": transformers.ResNetConfig(out_features=["stage4"])}
    else:
        kind = {"backbone": backbone, "use_pretrained_backbone": False, "dilation": dilation}
    config = transformers.DetrConfig(
        **TRANSFORMER,
        **kind,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        position_embedding_type=position,
        num_labels=CLASSES,
    )
    torch.manual_seed(1)
    model = transformers.DetrForObjectDetection(config).double().eval().requires_grad_(True)
    for name, tensor in model.state_dict().items():
        if "backbone" in name and tensor.ndim == 1:
            last = "bn3" in name or "layer.2" in name or "downsample" in name  # keeps the residual stream's size
            spread = (0.1, 0.4) if last and name.endswith("weight") else (0.5, 1.5)
            tensor.uniform_(*spread) if name.endswith(("weight", "var")) else tensor.uniform_(-0.5, 0.5)
    # Default biases are zero; with random ones a box head that forgot them would be seen.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def own_model(peer: Any, **settings: Any) -> Any:
    config = ModelConfig(**TRANSFORMER, heads=4, feedforward=96, num_classes=CLASSES, **settings)
    model = build_model(config).double().eval().requires_grad_(True)
    load_weights(model, Weights(from_huggingface(peer.state_dict())))
    return config, model


def batch() -> tuple[NestedTensor, list[dict[str, Tensor]]]:
    """Three images of different sizes, one without objects."""
    torch.manual_seed(2)
    images = [torch.randn(3, h, w).double() for h, w in ((96, 128), (64, 128), (90, 70))]
    targets = [
        {"boxes": torch.rand(n, 4).double() * 0.4 + 0.3, "labels": torch.randint(CLASSES, (n,))} for n in (4, 0, 2)
    ]
    return nested(images), targets


@dataclass
class PeerRun:
    logits: Tensor
    boxes: Tensor
    losses: dict[str, Tensor]
    total: Tensor


def run_peer(peer: Any, images: NestedTensor, targets: list[dict[str, Tensor]]) -> PeerRun:
    """Their outputs, and their losses of all layers.

    Their own auxiliary mode feeds each layer's normalised output to the next layer, which the original does not; so it
    stays off in the model, the layers' outputs are taken by hooks, and only their loss function runs with it on.
    """
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

    layers: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, output: layers.append(output)) for layer in peer.model.decoder.layers
    ]
    outputs = peer(images.tensors, pixel_mask=(~images.mask).long())
    for hook in hooks:
        hook.remove()
    queries = peer.model.decoder.layernorm(torch.stack(layers))
    classes, boxes = peer.class_labels_classifier(queries), peer.bbox_predictor(queries).sigmoid()
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    peer.config.auxiliary_loss = True
    torch.set_default_dtype(torch.float64)  # of the class weights that it makes
    try:
        total, losses, _ = ForObjectDetectionLoss(
            outputs.logits, labels, torch.device("cpu"), outputs.pred_boxes, peer.config, classes, boxes
        )
    finally:
        torch.set_default_dtype(torch.float32)
        peer.config.auxiliary_loss = False
    return PeerRun(classes, boxes, losses, total)


@pytest.mark.parametrize(
    ("peer_kind", "own_kind"),
    [
        ({}, {}),
        ({"own_resnet": True}, {}),
        ({"backbone": "resnet101"}, {"backbone": "resnet101"}),
        ({"dilation": True}, {"dilation": True}),
        ({"backbone": "resnet18"}, {"backbone": "resnet18"}),
        ({"position": "learned"}, {"position": "learned"}),
    ],
    ids=["r50", "r50-own-resnet", "r101", "dc5-r50", "r18", "learned-positions"],
)
def test_logits_boxes_losses_and_gradients_equal_hugging_faces(peer_kind, own_kind):
    peer = peer_model(**peer_kind)
    config, model = own_model(peer, **own_kind)
    images, targets = batch()

    theirs = run_peer(peer, images, targets)
    outputs = model(images)
    layers = [*outputs["aux_outputs"], outputs]
    torch.testing.assert_close(torch.stack([layer["pred_logits"] for layer in layers]), theirs.logits, **CLOSE)
    torch.testing.assert_close(torch.stack([layer["pred_boxes"] for layer in layers]), theirs.boxes, **CLOSE)
    assert theirs.logits.std() > 0.05  # the comparison is not one of constants

    criterion = build_criterion(config)
    losses = criterion(outputs, targets)
    assert theirs.losses.keys() == losses.keys() - OURS_ALONE
    for name, value in theirs.losses.items():
        torch.testing.assert_close(
            losses[name], value.to(losses[name].dtype), **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
    total = criterion.weighted_sum(losses)
    torch.testing.assert_close(total, theirs.total, **CLOSE)

    total.backward()
    theirs.total.backward()
    expected = from_huggingface({name: p.grad for name, p in peer.named_parameters() if p.grad is not None})
    # Some gradients are zero but for rounding: the first decoder layer's queries have no content to tell apart.
    floor = 1e-9 * max(gradient.abs().max().item() for gradient in expected.values())
    compared = 0
    for name, parameter in model.named_parameters():
        if name in expected:
            tolerance = max(floor, 1e-5 * expected[name].abs().max().item())
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-5, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
            compared += 1
    assert compared == len(expected) == len(list(model.parameters()))


def test_float32_outputs_equal_hugging_faces_to_1e_5():
    peer = peer_model()
    _, model = own_model(peer)
    images, _ = batch()
    images = NestedTensor(images.tensors.float(), images.mask)
    with torch.no_grad():
        theirs = peer.float()(images.tensors, pixel_mask=(~images.mask).long())
        outputs = model.float()(images)
    torch.testing.assert_close(outputs["pred_logits"], theirs.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["pred_boxes"], theirs.pred_boxes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("counts", [(3, 7, 1), (0, 0, 0), (5, 0, 12), (14, 2, 0)])  # the last: more boxes than queries
def test_matcher_finds_the_same_pairs_as_hugging_faces(counts):
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    from detr_fast.models import HungarianMatcher as Own

    torch.manual_seed(sum(counts))
    outputs = {"pred_logits": torch.randn(3, 12, CLASSES + 1), "pred_boxes": torch.rand(3, 12, 4) * 0.5 + 0.25}
    targets = [{"boxes": torch.rand(n, 4) * 0.4 + 0.3, "labels": torch.randint(CLASSES, (n,))} for n in counts]
    theirs = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)(
        {"logits": outputs["pred_logits"], "pred_boxes": outputs["pred_boxes"]},
        [{"boxes": t["boxes"], "class_labels": t["labels"]} for t in targets],
    )
    for own in (Own()(outputs, targets), Own()(outputs, Targets.from_list(targets, capacity=20))):
        for (own_query, own_box), (query, box) in zip(own, theirs):
            assert torch.equal(own_query, query)
            assert torch.equal(own_box, box)


def test_post_processing_equals_hugging_faces():
    torch.manual_seed(3)
    outputs = {"pred_logits": torch.randn(2, 12, CLASSES + 1), "pred_boxes": torch.rand(2, 12, 4)}
    sizes = torch.tensor([[480, 640], [333, 500]])
    own = PostProcess()(outputs, sizes)
    processor = transformers.DetrImageProcessor()
    peer_outputs = transformers.models.detr.modeling_detr.DetrObjectDetectionOutput(
        logits=outputs["pred_logits"], pred_boxes=outputs["pred_boxes"]
    )
    theirs = processor.post_process_object_detection(peer_outputs, threshold=-1, target_sizes=sizes)
    for own_image, image in zip(own, theirs):
        assert torch.equal(own_image["labels"], image["labels"])
        torch.testing.assert_close(own_image["scores"], image["scores"])
        torch.testing.assert_close(own_image["boxes"], image["boxes"])


@pytest.mark.parametrize("counts", [(0, 0, 0), (5, 0, 12), (14, 2, 0)])  # none at all; as many as queries; more
def test_losses_of_all_layers_and_class_error_equal_hugging_faces_for_any_number_of_objects(counts):
    from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss, HungarianMatcher

    torch.manual_seed(sum(counts))
    layers = [
        {"logits": torch.randn(3, 12, CLASSES + 1), "pred_boxes": torch.rand(3, 12, 4) * 0.5 + 0.25} for _ in range(3)
    ]
    targets = [{"boxes": torch.rand(n, 4) * 0.4 + 0.3, "labels": torch.randint(CLASSES, (n,))} for n in counts]
    labels = [{"boxes": t["boxes"], "class_labels": t["labels"]} for t in targets]
    peer = transformers.DetrConfig(decoder_layers=3, auxiliary_loss=True, num_labels=CLASSES, backbone="resnet18")
    logits, boxes = (torch.stack([layer[key] for layer in layers]) for key in ("logits", "pred_boxes"))
    total, theirs, _ = ForObjectDetectionLoss(logits[-1], labels, torch.device("cpu"), boxes[-1], peer, logits, boxes)
    pairs = HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)(layers[-1], labels)
    hits = [logits[-1, image, q].argmax(-1) == targets[image]["labels"][b] for image, (q, b) in enumerate(pairs)]
    correct = torch.cat(hits).float()

    criterion = build_criterion(ModelConfig(num_classes=CLASSES, decoder_layers=3))
    own = [{"pred_logits": layer["logits"], "pred_boxes": layer["pred_boxes"]} for layer in layers]
    losses = criterion({**own[-1], "aux_outputs": own[:-1]}, targets)
    assert theirs.keys() == losses.keys() - OURS_ALONE
    for name, value in theirs.items():
        torch.testing.assert_close(
            losses[name], value.to(losses[name].dtype), **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(criterion.weighted_sum(losses), total, **CLOSE)
    # The original's class_error, which they leave out: 100 minus the accuracy, and 100 where nothing is matched.
    assert losses["class_error"] == pytest.approx(100 - 100 * correct.sum().item() / max(1, len(correct)))
