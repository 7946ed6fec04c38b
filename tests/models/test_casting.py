"""Weights that are cast together under autocast: the same values and gradients, in fewer launches, and nothing left behind."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Event, get_ident

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast import capture
from detr_fast.dispatch import use_backend
from detr_fast.models import ModelConfig, build_model, casting
from detr_fast.models.casting import cast_groups, cast_weights
from detr_fast.nn.casts import cast_of

TINY = ModelConfig(
    backbone="conv",
    num_classes=4,
    num_queries=6,
    d_model=16,
    heads=2,
    encoder_layers=2,
    decoder_layers=2,
    feedforward=16,
    backbone_width=4,
    dropout=0.0,
)
CPU = torch.device("cpu")


class Casts(TorchDispatchMode):
    """Counts what changes dtypes."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten._foreach_copy_):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step(model):
    torch.manual_seed(1)
    images = torch.rand(2, 3, 32, 48)
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
        out = model(images)
        loss = out["pred_logits"].sum() + out["pred_boxes"].square().sum() + out["aux_outputs"][0]["pred_boxes"].sum()
        loss.backward()
    return out["pred_logits"], {n: p.grad for n, p in model.named_parameters()}, casts.counts


def test_a_step_under_autocast_has_the_same_values_and_gradients_in_fewer_casts(monkeypatch):
    torch.manual_seed(0)
    model = build_model(TINY).train()
    parameters = dict(model.named_parameters())
    logits, gradients, counts = step(model)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    model.zero_grad()
    monkeypatch.setattr(casting, "autocast_dtype", lambda device: None)
    expected_logits, expected, single = step(model)
    assert torch.equal(logits, expected_logits)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6)
    assert counts["_foreach_copy_"] == 2 * 2  # of the encoder and the decoder, and of their gradients
    weights = 8 * TINY.encoder_layers + 12 * TINY.decoder_layers
    assert single["_to_copy"] - counts["_to_copy"] >= 2 * weights


def test_a_thread_knows_its_casts_until_its_forward_ends_or_fails_and_no_other_does():
    layer = nn.Linear(3, 3)
    weight = layer.weight

    def fail():
        with torch.autocast("cpu", torch.bfloat16), cast_weights([layer], CPU):
            assert cast_of(weight).dtype == torch.bfloat16
            assert layer.weight is weight
            with ThreadPoolExecutor(1) as other:
                assert other.submit(cast_of, weight).result() is weight
            raise RuntimeError("of mine")

    with pytest.raises(RuntimeError, match="of mine"):
        fail()
    assert cast_of(weight) is weight


def test_a_cast_that_is_not_what_autocast_would_make_here_is_not_taken():
    weight = (layer := nn.Linear(3, 3)).weight
    with torch.autocast("cpu", torch.bfloat16), cast_weights([layer], CPU):
        with torch.autocast("cpu", enabled=False):
            assert cast_of(weight) is weight
        with torch.autocast("cpu", torch.float16):
            assert cast_of(weight) is weight
        assert cast_of(weight).requires_grad
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), cast_weights([layer], CPU):
        assert cast_of(weight).dtype == torch.bfloat16
        with torch.enable_grad():
            assert cast_of(weight) is weight


def test_a_model_that_another_thread_evaluates_trains_and_is_saved_as_if_alone(monkeypatch):
    model = build_model(TINY).train()
    forward = type(model.transformer.encoder).forward
    inside, go, main = Event(), Event(), get_ident()

    def slow(self, *arguments):
        if get_ident() != main:
            inside.set()
            assert go.wait(60)
        return forward(self, *arguments)

    monkeypatch.setattr(type(model.transformer.encoder), "forward", slow)

    def evaluate():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(torch.rand(1, 3, 32, 32))["pred_logits"]

    with ThreadPoolExecutor(1) as other:
        evaluated = other.submit(evaluate)
        try:
            assert inside.wait(60)
            assert torch.bfloat16 not in {t.dtype for t in model.state_dict().values()}
            _, gradients, _ = step(model)
        finally:
            go.set()
        assert evaluated.result().isfinite().all()
    assert all(gradients[name] is not None for name in gradients if name.startswith("transformer"))


def test_hooks_of_a_layer_see_and_may_change_weights_that_are_cast_behind_them():
    for register in ("register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook"):
        layer = nn.Sequential(nn.Linear(3, 3))
        getattr(layer, register)(lambda *_: None)
        with torch.autocast("cpu", torch.bfloat16), cast_weights([layer], CPU):
            assert cast_of(layer[0].weight) is layer[0].weight


def test_what_is_no_plain_weight_or_may_come_by_a_hook_stays_as_it_is():
    plain, hooked, parametrised, double = (
        nn.Linear(3, 3),
        nn.Sequential(nn.Linear(3, 3)),
        nn.Linear(3, 3),
        nn.Linear(3, 3),
    )
    hooked.register_forward_pre_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(parametrised)
    mixed = nn.Sequential(nn.LayerNorm(3), nn.Embedding(2, 3), double.double())

    class Own(nn.Linear):
        pass

    layers = [plain, hooked, parametrised, mixed, Own(3, 3)]
    with torch.autocast("cpu", torch.bfloat16), cast_weights(layers, CPU):
        kinds = [
            {cast_of(t).dtype for t in layer._parameters.values()}
            for layer in (plain, hooked[0], parametrised, layers[-1])
        ]
        assert kinds == [{torch.bfloat16}, {torch.float32}, {torch.float32}, {torch.float32}]
        assert {cast_of(p).dtype for p in mixed.parameters()} == {torch.float32, torch.float64}
    with cast_weights(layers, CPU):  # no autocast
        assert cast_of(plain.weight) is plain.weight


@pytest.mark.interpreter(int32_limit=1 << 16)
@pytest.mark.parametrize(("capturing", "launches"), [(False, 2), (True, 1)])
def test_groups_are_cast_one_by_one_but_together_in_a_capture_whose_launch_is_ours(
    capturing, launches, interpreter, monkeypatch
):
    groups = [[torch.randn(3, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)], [torch.randn(20)]]
    monkeypatch.setattr(capture._thread, "behind", [] if capturing else None)
    with use_backend(cast_together="triton"):
        casts = cast_groups(groups, torch.bfloat16, channels_last=True)
        assert interpreter.counts() == {"cast_kernel": launches}
        sum(t.float().sum() for t in casts[0]).backward()
    assert [[*map(len, group)] for group in casts] == [[3, 8], [20]]
    assert all(torch.equal(y, x.bfloat16()) for xs, ys in zip(groups, casts) for x, y in zip(xs, ys))
    assert all(torch.equal(x.grad, torch.ones_like(x)) for x in groups[0])
    assert interpreter.counts() == {"cast_kernel": launches + 1}
