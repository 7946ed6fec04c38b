"""Whole detectors of transformers whose loss is switched to ours, and those whose loss is left alone."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch

import detr_fast
from detr_fast.explanation import explaining

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy")

from transformers.loss import loss_for_object_detection  # noqa: E402
from transformers.loss.loss_utils import LOSS_MAPPING  # noqa: E402

from detr_fast.adapters import hugging_face_loss  # noqa: E402
from detr_fast.adapters import hugging_face_loss_detr as adapter  # noqa: E402
from detr_fast.adapters.hugging_face_loss_code import names_read  # noqa: E402
from tests.accelerate.families import rt_detr_config  # noqa: E402
from tests.accelerate.test_hugging_face_loss import LABELS, QUERIES, labels_of  # noqa: E402

DETECTOR = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": QUERIES,
    "num_labels": LABELS,
    "dropout": 0.0,
    "use_timm_backbone": False,
    "auxiliary_loss": True,
}
LOSS = "its loss on detr_fast.ops, all decoder layers at once"


def detector(kind, task="ObjectDetection", base=None, **options):
    torch.manual_seed(1)
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    settings = getattr(transformers, f"{kind}Config")(**{**DETECTOR, **options}, backbone_config=backbone)
    return (base or getattr(transformers, f"{kind}For{task}"))(settings).eval()


def detect(model, width=96):
    torch.manual_seed(2)
    labels = labels_of((3, 0))
    model.zero_grad()
    outputs = model(torch.randn(2, 3, 64, width), labels=labels)
    if outputs.loss.requires_grad:
        outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reasons(model, **options):
    """Of modules with a loss: why it was left alone."""
    return [one.reason for one in detr_fast.accelerate(model, **options).left if "For" in one.kind]


def losses_switched(report):
    return [one.name for one in report.switched if one.now == LOSS]


@pytest.mark.parametrize("kind", ["Detr", "ConditionalDetr", "TableTransformer"])
def test_a_models_losses_and_gradients_are_as_before_and_its_loss_is_switched(kind):
    model = detector(kind)
    expected, expected_gradients = detect(model)
    report = detr_fast.accelerate(model)
    assert losses_switched(report) == [""]
    assert not report.left
    with explaining(model) as records:
        found, gradients = detect(model)
    assert {"matching_cost", "linear_assignment", "detection_losses"} <= {record.op for record in records}
    assert found.loss_dict.keys() == expected.loss_dict.keys()
    for name, value in expected.loss_dict.items():
        torch.testing.assert_close(found.loss_dict[name], value, msg=name)
    torch.testing.assert_close(found.loss, expected.loss)
    assert len(found.auxiliary_outputs) == 1
    assert gradients.keys() == expected_gradients.keys()
    scale = max(g.abs().max() for g in expected_gradients.values())
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-5 * scale, msg=name)
    detr_fast.restore(model)
    assert model.loss_function is LOSS_MAPPING[model.loss_type]
    assert "_loss_function" not in model.__dict__


def rt_detr():
    return transformers.RTDetrForObjectDetection(
        rt_detr_config(num_denoising=6, num_labels=LABELS, num_queries=QUERIES)
    )


def rt_detr_v2():
    settings = rt_detr_config(num_denoising=6, num_labels=LABELS, num_queries=QUERIES).to_dict()
    return transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config.from_dict(settings))


def d_fine():
    settings = rt_detr_config(num_denoising=6, num_labels=LABELS, num_queries=QUERIES, max_num_bins=8).to_dict()
    return transformers.DFineForObjectDetection(transformers.DFineConfig.from_dict(settings | {"model_type": "d_fine"}))


OF_GROUPS = {
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "group_detr": 2,
    "d_model": 16,
    "decoder_ffn_dim": 16,
    "decoder_n_points": 2,
    "decoder_layers": 2,
    "c2f_num_blocks": 1,
    "num_queries": QUERIES,
    "num_labels": LABELS,
    "dropout": 0.0,
}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "out_indices": [1, 2]}


def lw_detr():
    vit = transformers.LwDetrViTConfig(
        **SMALL, num_windows=4, image_size=64, pretrain_image_size=64, window_block_indices=[0]
    )
    config = transformers.LwDetrConfig(**OF_GROUPS, backbone_config=vit, projector_scale_factors=[1.0])
    return transformers.LwDetrForObjectDetection(config)


def rf_detr():
    vit = transformers.RfDetrDinov2Config(**SMALL, image_size=64, patch_size=16, num_windows=2)
    return transformers.RfDetrForObjectDetection(transformers.RfDetrConfig(**OF_GROUPS, backbone_config=vit))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (rt_detr, "loss_vfl_dn_1"),
        (rt_detr_v2, "loss_vfl_dn_1"),
        (d_fine, "loss_ddf_dn_0"),
        (lw_detr, "loss_ce_enc"),
        (rf_detr, "loss_ce_enc"),
    ],
)
def test_losses_of_detectors_with_denoising_queries_or_groups_are_as_before(build, name):
    torch.manual_seed(1)
    model = build().train()
    expected, expected_gradients = detect(model, 64)
    assert name in expected.loss_dict
    with detr_fast.accelerated(model) as report, explaining(model) as records:
        assert losses_switched(report) == [""]
        found, gradients = detect(model, 64)
    assert {"matching_cost", "linear_assignment"} <= {record.op for record in records}
    assert list(found.loss_dict) == list(expected.loss_dict)
    for name, value in expected.loss_dict.items():
        torch.testing.assert_close(found.loss_dict[name], value, rtol=1e-4, atol=1e-5, msg=name)
    assert gradients.keys() == expected_gradients.keys()
    scale = max(g.abs().max() for g in expected_gradients.values())
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-4 * scale, msg=name)
    assert model.loss_function is LOSS_MAPPING[model.loss_type]


@pytest.mark.parametrize("kind", ["GroundingDino", "MMGroundingDino"])
def test_the_loss_of_detectors_that_a_prompt_tells_what_to_look_for_is_as_before(kind):
    torch.manual_seed(1)
    text = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=1100
    )
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    sizes = {name: DETECTOR[name] for name in DETECTOR if "layers" in name or "dim" in name or "heads" in name}
    rest = {"max_text_len": 12, "num_feature_levels": 3, "decoder_n_points": 2, "encoder_n_points": 2}
    settings = getattr(transformers, f"{kind}Config")(
        **sizes,
        **rest,
        d_model=32,
        num_queries=QUERIES,
        text_config=text,
        backbone_config=backbone,
        dropout=0.0,
        auxiliary_loss=True,
        disable_custom_kernels=True,
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(settings).eval()
    words = torch.tensor([[101, 7, 8, 1012, 9, 1012, 102], [101, 5, 1012, 6, 7, 1012, 102]])  # two classes each

    def run():
        torch.manual_seed(2)
        labels = labels_of((3, 0))
        for target in labels:
            target["class_labels"] %= 2
        model.zero_grad()
        outputs = model(
            torch.randn(2, 3, 64, 96), input_ids=words, attention_mask=torch.ones_like(words), labels=labels
        )
        outputs.loss.backward()
        return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, expected_gradients = run()
    with detr_fast.accelerated(model) as report, explaining(model) as records:
        assert losses_switched(report) == [""]
        found, gradients = run()
    assert {"matching_cost", "linear_assignment"} <= {record.op for record in records}
    assert list(found.loss_dict) == list(expected.loss_dict)
    for name, value in expected.loss_dict.items():
        torch.testing.assert_close(found.loss_dict[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert gradients.keys() == expected_gradients.keys()


def test_copies_and_pickles_keep_it_and_saved_models_do_not_know_of_it(tmp_path):
    model = detector("Detr")
    detr_fast.accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.loss_function is adapter.object_detection_loss
        detr_fast.restore(twin)
        assert twin.loss_function is loss_for_object_detection.ForObjectDetectionLoss
    model.save_pretrained(tmp_path)
    assert "detr_fast" not in (tmp_path / "config.json").read_text()
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path)
    assert again.loss_function is loss_for_object_detection.ForObjectDetectionLoss


def test_selections_contexts_and_wrappers_hold_for_the_loss_too():
    model = detector("Detr")
    theirs = model.loss_function
    detr_fast.accelerate(model, only="model.encoder")
    detr_fast.accelerate(model, skip=transformers.DetrForObjectDetection)
    assert model.loss_function is theirs
    with detr_fast.accelerated(torch.nn.Sequential(model)) as report:
        assert losses_switched(report) == ["0"]
        assert model.loss_function is adapter.object_detection_loss
    assert model.loss_function is theirs


def mine(logits, labels, *rest, **options):
    return logits.sum(), {}, None


def test_a_loss_that_the_user_has_set_stays_before_and_after():
    model = detector("Detr")
    model.loss_function = mine
    assert reasons(model) == ["its loss_function was set by hand"]
    assert model.loss_function is mine
    detr_fast.restore(model)
    assert model.loss_function is mine

    model = detector("Detr")
    detr_fast.accelerate(model)
    with detr_fast.accelerated(model):
        model.loss_function = mine
    assert model.loss_function is mine
    detr_fast.restore(model)
    assert model.loss_function is mine


def test_a_loss_of_the_users_class_and_one_that_is_a_module_stay():
    class OwnForObjectDetection(transformers.DetrForObjectDetection):
        _loss_function = staticmethod(mine)

    class Loss(torch.nn.Module):
        forward = staticmethod(mine)

    model = detector("Detr")
    model._loss_function = Loss()
    for one in (detector("Detr", base=OwnForObjectDetection), model):
        before = one.loss_function
        assert reasons(one) == ["its loss_function was set by hand"]
        assert one.loss_function is before


def test_a_loss_that_is_another_since_is_not_switched_again():
    model = detector("Detr")
    detr_fast.accelerate(model)
    model.loss_type = "ForSegmentation"
    with detr_fast.accelerated(model):
        pass


def test_segmentation_keeps_its_loss_over_masks():
    model = detector("Detr", "Segmentation", encoder_attention_heads=8, decoder_attention_heads=8)
    assert reasons(model) == [
        "its loss, transformers' ForSegmentationLoss, is one over masks, too, which runs as it is"
    ]
    assert model.loss_function is LOSS_MAPPING["ForSegmentation"]


def test_losses_that_are_not_known_are_left_alone_with_a_reason(monkeypatch):
    known = ", ".join(hugging_face_loss._LOSSES)
    model = detector("Detr")
    monkeypatch.setitem(LOSS_MAPPING, "OwnForObjectDetection", mine)
    model.loss_type = "OwnForObjectDetection"
    assert reasons(model) == [f"its loss, mine, is none of those known: {known}"]

    class OwnForObjectDetection(transformers.DetrForObjectDetection):
        loss_function = property(lambda self: mine)

    assert reasons(detector("Detr", base=OwnForObjectDetection)) == ["its class has a loss_function of its own"]
    assert reasons(detector("ConditionalDetr", focal_alpha=0.5)) == [
        "its focal_alpha is 0.5, and our focal loss has 0.25"
    ]

    def imitation(*arguments, **options):
        return LOSS_MAPPING["ForObjectDetection"](*arguments, **options)

    imitation.__name__ = "ForObjectDetectionLoss"
    with monkeypatch.context() as patch:
        patch.setitem(LOSS_MAPPING, "ForObjectDetection", imitation)
        assert reasons(detector("Detr")) == ["its loss, ForObjectDetectionLoss, is not transformers' own"]


@pytest.mark.parametrize("where", ["box_iou", "HungarianMatcher.forward", "ImageLoss.loss_cardinality"])
def test_transformers_code_that_is_not_the_one_known_is_left_alone(where, monkeypatch):
    def other(self, *rest):
        return self.something_else(rest)

    owner, _, name = where.rpartition(".")
    monkeypatch.setattr(getattr(loss_for_object_detection, owner) if owner else loss_for_object_detection, name, other)
    assert reasons(detector("Detr")) == [f"this version of transformers computes its loss differently ({where})"]


def test_a_matcher_that_somebody_wrapped_is_another_one(monkeypatch):
    original = loss_for_object_detection.HungarianMatcher.forward

    @functools.wraps(original)
    def wrapped(self, *rest):
        return original(self, *rest)

    monkeypatch.setattr(loss_for_object_detection.HungarianMatcher, "forward", wrapped)
    assert reasons(detector("Detr")) == [
        "this version of transformers computes its loss differently (HungarianMatcher.forward)"
    ]


def test_a_constant_that_differs_is_code_that_differs():
    def first(x):
        return [0.25 * y.a for y in x]

    def second(x):
        return [0.5 * y.a for y in x]

    assert names_read(first) == {"a", "0.25"}
    assert names_read(first) != names_read(second)
