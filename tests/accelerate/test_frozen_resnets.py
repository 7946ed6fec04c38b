"""Residual blocks with frozen norms of transformers, timm and torchvision: in 16 bits one pass between two convolutions."""

from __future__ import annotations

import copy
import importlib
import inspect
import pickle
import sys

import pytest
import torch
from torch import nn

import detr_fast
from detr_fast import dispatch, use_backend
from detr_fast.adapters import frozen_resnet
from detr_fast.adapters.base import fingerprint
from detr_fast.dispatch import BackendError
from detr_fast.testing.interpreter import checked_interpreter

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
interpreter = pytest.mark.interpreter
bf16 = torch.bfloat16


def modeling(model, file=""):
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}{file}")


def frozen(model):
    holder = nn.ModuleList([model])
    with torch.no_grad():
        modeling("detr").replace_batch_norm(holder)
    return holder[0]


def of_transformers(layer, model="resnet", **options):
    config = {"depths": [1, 2], "hidden_sizes": [16, 24], "embedding_size": 16, "layer_type": layer, **options}
    kind = {"resnet": "ResNet", "rt_detr": "RTDetrResNet"}[model]
    module = modeling(model, "_resnet" if model == "rt_detr" else "")
    backbone = getattr(module, f"{kind}Backbone")(getattr(transformers, f"{kind}Config")(**config))
    return frozen(backbone.encoder)


def first(module):
    """Of an encoder of transformers', its last features."""
    return lambda x: getattr(found := module(x), "last_hidden_state", found)


def of_timm(block, **options):
    net = timm.models.resnet.ResNet(block, [1, 2, 1, 1], channels=(8, 12, 16, 16), **options)
    return frozen(nn.Sequential(net.layer1, net.layer2))


def of_torchvision(block):
    net = torchvision.models.ResNet(block, [1, 2, 1, 1], norm_layer=torchvision.ops.FrozenBatchNorm2d)
    return nn.Sequential(net.layer1, net.layer2)


# What makes a backbone's stages, the channels that go in, and how many blocks there are.
BACKBONES = {
    "transformers, bottleneck": (lambda: of_transformers("bottleneck"), 16, 3),
    "transformers, basic": (lambda: of_transformers("basic"), 16, 3),
    "RT-DETR, bottleneck": (lambda: of_transformers("bottleneck", "rt_detr"), 16, 3),
    "RT-DETR, basic": (lambda: of_transformers("basic", "rt_detr"), 16, 3),
    "timm, bottleneck": (lambda: of_timm(timm.models.resnet.Bottleneck), 64, 3),
    "timm, pooled": (lambda: of_timm(timm.models.resnet.BasicBlock, avg_down=True), 64, 3),
    "torchvision, bottleneck": (lambda: of_torchvision(torchvision.models.resnet.Bottleneck), 64, 3),
    "torchvision, basic": (lambda: of_torchvision(torchvision.models.resnet.BasicBlock), 64, 3),
}


def made(name):
    torch.manual_seed(0)
    make, channels, blocks = BACKBONES[name]
    module = make()
    for buffer_name, buffer in module.named_buffers():
        positive = buffer_name.endswith(("weight", "running_var"))
        buffer.uniform_(0.5, 1.0) if positive else buffer.normal_(0, 0.2)
    return module, torch.randn(2, channels, 6, 5).relu(), blocks


def step(module, x, dy, dtype=None):
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype or bf16, enabled=dtype is not None):
        y = first(module)(x)
    leaves = [x, *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@interpreter
@pytest.mark.parametrize("name", BACKBONES)
def test_under_autocast_it_is_as_accurate_as_the_original_and_half_as_wide(name):
    module, x, blocks = made(name)
    exact = copy.deepcopy(module).double()
    dy = torch.randn_like(first(exact)(x.double()))
    truth, before = step(exact, x.double(), dy), step(module, x, dy, bf16)
    report = detr_fast.accelerate(module)
    assert len([one for one in report.switched if "channel_affine" in one.now]) == blocks
    taken = []
    with (
        checked_interpreter(),
        use_backend(channel_affine="triton"),
        dispatch.recording(lambda op, d: taken.append((op, d.implementation.name))),
    ):
        found = step(module, x, dy, bf16)
    assert taken
    assert set(taken) - {("bottlenecks", "eager")} == {("channel_affine", "triton")}
    assert_as_accurate(found, before, truth)


def assert_as_accurate(found, before, truth):
    assert found[0].dtype == bf16
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    errors = [[((t - right).norm() / right.norm()).item() for t, right in zip(ts, truth)] for ts in (found, before)]
    assert errors[0][0] <= 2 * errors[1][0]
    assert sum(errors[0]) <= 1.5 * sum(errors[1])


@pytest.mark.parametrize(("op", "name"), [("bottlenecks", "kernels"), ("pointwise_affine", "triton")])
def test_what_is_asked_for_by_name_and_cannot_run_on_a_cpu_is_refused(op, name):
    module, x, _ = made("torchvision, bottleneck")
    detr_fast.accelerate(module.requires_grad_(op == "bottlenecks"))
    with use_backend(**{op: name}), torch.autocast("cpu", bf16), pytest.raises(BackendError, match=f"{op} was asked"):
        module(x)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name.endswith("bottleneck")])
def test_bottlenecks_that_are_one_node_each_are_as_accurate_as_the_original(name):
    module, x, blocks = made(name)
    exact = copy.deepcopy(module).double()
    dy = torch.randn_like(first(exact)(x.double()))
    truth, before = step(exact, x.double(), dy), step(module, x, dy, bf16)
    detr_fast.accelerate(module)
    taken = []
    with (
        use_backend(bottlenecks="one_node"),
        dispatch.recording(lambda op, d: taken.append((op, d.implementation.name))),
    ):
        found = step(module, x, dy, bf16)
    pooled = name.startswith("RT-DETR")  # what averages pixels before its shortcut's convolution stays apart
    assert taken.count(("bottlenecks", "one_node")) == blocks - pooled
    assert_as_accurate(found, before, truth)
    assert {g.dtype for g in found[1:]} == {torch.float32}


@interpreter
@pytest.mark.parametrize("name", ["transformers, bottleneck", "timm, bottleneck"])
def test_a_model_in_16_bits_is_more_accurate_than_with_scales_of_16_bits(name):
    module, x, _ = made(name)
    module, x = module.to(bf16), x.to(bf16)
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        truth, before = first(exact)(x.double()), first(module)(x)
        detr_fast.accelerate(module)
        with checked_interpreter(), use_backend(channel_affine="triton"):
            found = first(module)(x)
    assert (found - truth).norm() <= (before - truth).norm()


@pytest.mark.parametrize("name", BACKBONES)
def test_in_fp32_on_a_cpu_and_under_compile_the_original_runs_to_the_bit(name):
    module, x, _ = made(name)
    expected = first(module)(x)
    detr_fast.accelerate(module)
    for one in (module, pickle.loads(pickle.dumps(module))):
        assert torch.equal(first(one)(x), expected)
    with use_backend(channel_affine="eager"), torch.no_grad():
        assert torch.equal(first(module)(x), expected)  # in fp32 also where it was asked for
    if name.startswith("timm"):
        with use_backend(channel_affine="eager"), torch.autocast("cpu", bf16), torch.no_grad():
            compiled = torch.compile(module, fullgraph=True, backend="eager")(x)
        assert compiled.dtype == torch.float32  # autocast's, of the original
    detr_fast.restore(module)
    assert torch.equal(first(module)(x), expected)


def test_norms_that_learn_other_activations_and_hooks_are_left_to_the_original():
    net = timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, [1, 1, 1, 1], channels=(8, 8, 8, 8), stem_width=8)
    assert not any("channel_affine" in one.now for one in detr_fast.accelerate(net).switched)
    module, x, _ = made("timm, bottleneck")
    detr_fast.accelerate(module)
    seen = []
    module[0][0].conv2.register_forward_hook(lambda *_: seen.append("hook"))
    module[1][0].act2 = nn.GELU()
    recording = dispatch.recording(lambda op, _: seen.append(op))
    with torch.autocast("cpu", bf16), use_backend(channel_affine="eager"), torch.no_grad(), recording:
        module(x)
    # Of the one block that is left, whose first and last convolution are products.
    assert seen == ["hook", "pointwise_affine", *["channel_affine"] * 2, "pointwise_affine", "channel_affine"]


@pytest.fixture(params=["1e-5", "self.eps"])
def original_norm(request, tmp_path, monkeypatch):
    """The repositories' norm, which is torchvision's with an epsilon of its own line."""
    source = inspect.getsource(torchvision.ops.FrozenBatchNorm2d.forward)
    line = f"        eps = {request.param}\n        scale"
    source = (
        source.replace("rv + self.eps", "rv + eps")
        .replace("        scale", line, 1)
        .replace(": Tensor) -> Tensor", ")")
    )
    start = "import torchvision\n\n\nclass FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):\n"
    (tmp_path / "original_backbone.py").write_text(start + source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "original_backbone", raising=False)
    return importlib.import_module("original_backbone").FrozenBatchNorm2d


def test_norms_of_the_original_repositories_are_known(original_norm):
    net = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], norm_layer=original_norm)
    report = detr_fast.accelerate(net)
    assert sum("channel_affine" in one.now for one in report.switched) == 4
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", bf16), use_backend(channel_affine="eager"):
        found = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
    assert found.dtype == bf16


def test_all_code_that_is_known_is_theirs():
    blocks = [modeling("resnet").ResNetBasicLayer, timm.models.resnet.Bottleneck, timm.models.resnet.BasicBlock]
    blocks += [torchvision.models.resnet.Bottleneck, torchvision.models.resnet.BasicBlock]
    assert {fingerprint(one.forward) for one in blocks} == set(frozen_resnet._BLOCKS)
    norms = [modeling("detr").DetrFrozenBatchNorm2d, torchvision.ops.FrozenBatchNorm2d]
    assert {fingerprint(one.forward) for one in norms} < set(frozen_resnet._NORMS)
    assert fingerprint(modeling("resnet").ResNetConvLayer.forward) == frozen_resnet._CONVOLUTION
    assert fingerprint(modeling("resnet").ResNetShortCut.forward) == frozen_resnet._SHORTCUT
