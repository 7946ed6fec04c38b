"""Weights of captured steps and inference, cast by one launch of ours, and their gradients by another."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from detr_fast import capture
from detr_fast.dispatch import use_backend
from detr_fast.engine.captured import CapturedInference, CapturedStep
from detr_fast.models import ModelConfig, build_model
from detr_fast.ops.cast_together import room_for_casts

interpreter = pytest.mark.interpreter(int32_limit=1 << 16)
AUTOCAST = partial(torch.autocast, "cpu", torch.bfloat16)
SMALL = {"d_model": 16, "heads": 2, "feedforward": 16, "backbone_width": 4, "num_queries": 6}
TINY = ModelConfig(backbone="conv", num_classes=4, encoder_layers=2, decoder_layers=2, dropout=0.0, **SMALL)


def detector():
    torch.manual_seed(0)
    return build_model(TINY)


def loss_of(out, _):
    return out["pred_logits"].float().square().mean() + out["pred_boxes"].float().square().mean()


def training(**settings):
    model = detector().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return CapturedStep(model, loss_of, optimizer, autocast=AUTOCAST, **settings)


def losses_of(step, seeds):
    return [step((torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(s)),))["loss"].item() for s in seeds]


@interpreter
def test_replayed_steps_on_our_casts_train_as_on_pytorchs_to_the_bit(emulated, interpreter):
    ours, theirs = training(), training()
    expected = losses_of(theirs, range(4))
    assert not interpreter.launches
    with use_backend(cast_together="triton"):
        assert losses_of(ours, range(4)) == expected
    assert ours.graphs == theirs.graphs == 1
    for name, parameter in theirs.model.named_parameters():
        assert torch.equal(ours.model.get_parameter(name), parameter)
    # Encoder and decoder by one launch each, and back, in two eager steps; together in the capture, and in two replays.
    assert interpreter.counts() == {"cast_kernel": 2 * 4 + 3 * 2}


def test_captures_have_room_for_casts_of_all_weights_and_in_training_of_all_gradients(emulated):
    left = []
    step = training()
    step.criterion = lambda *given: left.append(capture.left_aside("cast_together")) or loss_of(*given)
    losses_of(step, range(3))
    inference = CapturedInference(detector(), autocast=AUTOCAST)
    inference.model.transformer.register_forward_hook(lambda *_: left.append(capture.left_aside("cast_together")))
    for _ in range(3):
        inference(torch.rand(1, 3, 32, 32))
    assert len(emulated) == 2
    one = room_for_casts(detector().parameters(), gradients=False)
    assert left == [2 * one] * 3 + [one] * 3
    assert one >= 8 * len([*detector().parameters()])
    assert capture.left_aside("cast_together") == 0


@interpreter
def test_replayed_inference_on_our_casts_is_the_same(emulated, interpreter):
    x = torch.rand(1, 3, 32, 32)
    expected = CapturedInference(detector(), autocast=AUTOCAST)(x)["pred_logits"].clone()
    inference = CapturedInference(detector(), autocast=AUTOCAST)
    with use_backend(cast_together="triton"):
        for _ in range(4):
            assert torch.equal(inference(x)["pred_logits"], expected)
    assert inference.graphs == 1
    assert interpreter.counts() == {"cast_kernel": 2 * 2 + 3}


@interpreter
def test_a_parameter_that_is_frozen_between_steps_is_cast_with_the_others_and_gets_no_gradient(emulated):
    ours, theirs = training(), training()
    for step, way in ((ours, "triton"), (theirs, "eager")):
        with use_backend(cast_together=way):
            losses_of(step, range(3))
            frozen = step.model.transformer.encoder.layers[0].linear1.weight.requires_grad_(False)
            before = frozen.clone()
            losses_of(step, range(3, 6))
            assert torch.equal(frozen, before)
    for name, parameter in theirs.model.named_parameters():
        assert torch.equal(ours.model.get_parameter(name), parameter)


def test_inference_of_lazy_modules_is_captured_once_their_parameters_have_sizes(emulated):
    inference = CapturedInference(
        torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.LazyLinear(2)), autocast=AUTOCAST
    )
    x = torch.rand(2, 3)
    first = inference(x).clone()
    for _ in range(4):
        assert torch.equal(inference(x), first)
    assert inference.graphs == 1
