"""Backbones: shapes, frozen norms folded into convolutions, what trains and what does not."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from benchmarks.hardware import DEVICE, sized
from detr_fast import dispatch
from detr_fast.dispatch import BackendError, use_backend
from detr_fast.models.backbone import ConvBackbone, ResNetBackbone
from detr_fast.models.weight_files import WeightsError
from detr_fast.testing import count
from detr_fast.testing.interpreter import checked_interpreter

torchvision = pytest.importorskip("torchvision")

from detr_fast.models.resnet import FrozenBatchNorm2d, conv_norm  # noqa: E402
from detr_fast.nn.forked import Forked  # noqa: E402


def random_norm(channels: int) -> FrozenBatchNorm2d:
    norm = FrozenBatchNorm2d(channels).double()
    for name, buffer in norm.named_buffers():
        buffer.uniform_(0.5, 1.5) if name in ("weight", "running_var") else buffer.uniform_(-1, 1)
    return norm


def test_the_frozen_norm_equals_batch_norm_in_eval_mode():
    norm = random_norm(5)
    peer = nn.BatchNorm2d(5).double().eval()
    peer.load_state_dict(norm.state_dict(), strict=False)
    x = torch.randn(2, 5, 4, 3).double()
    torch.testing.assert_close(norm(x), peer(x))
    norm.load_state_dict(peer.state_dict())  # which counts batches; a frozen norm ignores that
    assert list(norm.parameters()) == []


def test_folding_the_norm_into_the_convolution_changes_neither_value_nor_gradient():
    conv, norm = nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False).double(), random_norm(5)
    x = torch.randn(2, 3, 8, 6).double().requires_grad_()
    probe = torch.randn(2, 5, 4, 3).double()
    results = []
    for result in (conv_norm(conv, norm, x), norm(conv(x))):
        gradients = torch.autograd.grad((result * probe).sum(), (x, conv.weight))
        results.append((result, *gradients))
    for folded, plain in zip(*results):
        torch.testing.assert_close(folded, plain)


def test_a_convolution_with_a_hook_or_of_another_class_is_not_folded_away():
    class Doubled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    norm, x = random_norm(4).float(), torch.randn(1, 3, 5, 5)
    conv = nn.Conv2d(3, 4, 3, bias=False)
    seen = []
    conv.register_forward_hook(lambda *_: seen.append(True))
    conv_norm(conv, norm, x)
    assert seen == [True]
    other = Doubled(3, 4, 3, bias=False)
    torch.testing.assert_close(conv_norm(other, norm, x), norm(other(x)))


def test_hooks_on_any_part_of_a_resnet_are_called():
    body = ResNetBackbone("resnet18").body
    seen = []
    for name, module in body.named_modules():
        if name:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        body(torch.randn(1, 3, 32, 32))
    assert set(seen) == {name for name, _ in body.named_modules() if name}


def randomised(body: nn.Module) -> nn.Module:
    """With norms that do something."""
    for module in body.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for name, buffer in module.named_buffers():
                buffer.uniform_(0.5, 1.0) if name in ("weight", "running_var") else buffer.normal_(0, 0.2)
    return body


def step_in_16_bits(body, x, dy, backend, bottlenecks="eager"):
    backends = use_backend(channel_affine=backend, resnet_stem=backend, bottlenecks=bottlenecks)
    with torch.autocast(x.device.type, torch.bfloat16), backends:
        y = body(x)
        return y, *torch.autograd.grad(y, [p for p in body.parameters() if p.requires_grad], dy)


def assert_as_accurate_as_folded_norms(
    name, dilation, backend, monkeypatch, device="cpu", size=(37, 40), bottlenecks="eager"
):
    """In 16 bits, channels last, against fp64."""
    torch.manual_seed(0)
    body = randomised(ResNetBackbone(name, dilation).body).to(device)
    exact = copy.deepcopy(body).double()
    x = torch.randn(1, 3, *size, device=device)
    truth = exact(x.double())
    dy = torch.randn_like(truth)
    expected = truth, *torch.autograd.grad(truth, [p for p in exact.parameters() if p.requires_grad], dy)
    # Weights have a million elements, whose offsets are known to fit.
    interpreted = checked_interpreter(**({"int32_limit": 1 << 22} if bottlenecks == "kernels" else {}))
    with interpreted if backend == "triton" and x.device.type == "cpu" else nullcontext():
        found = step_in_16_bits(body, x, dy.float(), backend, bottlenecks)
    monkeypatch.setattr(type(body), "_is_plain", lambda self: False)
    before = step_in_16_bits(body, x, dy.float(), "auto")
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[0].dtype == torch.bfloat16
    assert not before[0].is_contiguous(memory_format=torch.channels_last)
    errors = [[((t - right).norm() / right.norm()).item() for t, right in zip(ts, expected)] for ts in (found, before)]
    assert errors[0][0] <= 2 * errors[1][0]
    # Which ReLUs a rounding flips decides over the gradients' errors: by draw and CPU it is 0.9 to 1.8 times as much.
    assert sum(errors[0]) <= 2 * sum(errors[1])
    assert [t.dtype for t in found[1:]] == [torch.float32] * len(found[1:])


@pytest.mark.parametrize("backend", [pytest.param("triton", marks=pytest.mark.interpreter), "eager"])
@pytest.mark.parametrize(("name", "dilation"), [("resnet18", False), ("resnet50", True)])
def test_in_16_bits_features_are_channels_last_and_as_accurate_as_folded_norms(name, dilation, backend, monkeypatch):
    assert_as_accurate_as_folded_norms(name, dilation, backend, monkeypatch)


@pytest.mark.parametrize("dilation", [False, True])
def test_stages_that_are_one_node_are_as_accurate_as_folded_norms(dilation, monkeypatch):
    assert_as_accurate_as_folded_norms("resnet50", dilation, "eager", monkeypatch, bottlenecks="one_node")


@pytest.mark.interpreter(int32_limit=1 << 22)
def test_stages_on_kernels_are_as_accurate_as_folded_norms(monkeypatch):
    assert_as_accurate_as_folded_norms("resnet50", False, "triton", monkeypatch, bottlenecks="kernels")


def test_stages_are_a_node_each_and_their_gradients_arrive_one_after_the_other():
    """As communication of several processes wants them; of a stage's blocks those before the first that trains are not in it."""
    body = randomised(ResNetBackbone("resnet50").body)
    body.layer2[0].requires_grad_(False)
    order = []
    for name, parameter in body.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name.split(".")[0]))
    with torch.autocast("cpu", torch.bfloat16), use_backend(bottlenecks="one_node"):
        y = body(torch.randn(1, 3, 32, 32))
    nodes = 0
    node = y.grad_fn
    while node is not None and "_Node" in node.name():
        nodes += 1
        assert len(node.next_functions) == {1: 11, 2: 20, 3: 10}[nodes]
        node = node.next_functions[0][0]
    assert nodes == 3
    assert node is None
    y.float().sum().backward()
    assert order == ["layer4"] * 10 + ["layer3"] * 19 + ["layer2"] * 9


@pytest.mark.parametrize("trained", ["both", "weight", "neither but x"])
def test_a_convolution_beside_which_its_input_goes_on_has_the_gradients_of_both(trained):
    x = (
        torch.randn(2, 3, 5, 4)
        .double()
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_(trained != "weight")
    )
    weight = torch.randn(6, 3, 1, 1).double().requires_grad_(trained != "neither but x")
    probes = torch.randn(2, 6, 5, 4).double(), torch.randn(2, 3, 5, 4).double()
    leaves = [t for t in (x, weight) if t.requires_grad]

    def gradients(y, beside):
        loss = (y.square() * probes[0]).sum() + (beside.square() * probes[1]).sum()
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return *(g.detach() for g in first), *second

    for found, expected in zip(gradients(*Forked.apply(x, weight)), gradients(nn.functional.conv2d(x, weight), x)):
        torch.testing.assert_close(found, expected)
    y, beside = Forked.apply(x, weight)
    found = torch.autograd.grad((y * probes[0]).sum() + (beside * probes[1]).sum(), leaves)  # in place
    expected = torch.autograd.grad((nn.functional.conv2d(x, weight) * probes[0]).sum() + (x * probes[1]).sum(), leaves)
    for pair in zip(found, expected):
        torch.testing.assert_close(*pair)


@pytest.mark.parametrize("frozen_stages", [1, 0], ids=["the first stage frozen", "all trained"])
def test_gradients_of_what_a_bottleneck_reads_are_added_up_inside_products(frozen_stages):
    with torch.device("meta"):
        body = ResNetBackbone("resnet50").body.to(torch.bfloat16)
    if not frozen_stages:
        body.layer1.requires_grad_(True)
    x = torch.empty(2, 3, 64, 64, device="meta", dtype=torch.bfloat16)

    def step():
        y = body(x)
        y.backward(torch.empty_like(y))

    with use_backend("triton", bottlenecks="eager"):
        launches = count(step).launches
    # Of 16 blocks all but the first whose input is trained; the last of a stage writes what two read, too.
    assert launches["aten.addmm_.default"] == (12 if frozen_stages else 15)
    assert launches["aten.add.Tensor"] == 0


def test_on_a_cpu_nothing_is_channels_last_unasked():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = ResNetBackbone("resnet18").body(torch.randn(1, 3, 64, 64))
    assert not y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("bottlenecks", ["eager", "one_node", "kernels"])
def test_on_a_gpu_features_in_16_bits_are_as_accurate_as_folded_norms(name, bottlenecks, monkeypatch):
    if name == "resnet18" and bottlenecks != "eager":
        pytest.skip("it has no bottlenecks")
    size = sized((133, 270), (37, 40))
    assert_as_accurate_as_folded_norms(name, False, "triton", monkeypatch, DEVICE, size, bottlenecks)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "trace", "dual numbers"])
def test_transforms_and_tracing_take_the_folded_norms(transform):
    backbone = ResNetBackbone("resnet18").eval()
    trained = {name: p.detach() for name, p in backbone.named_parameters() if p.requires_grad}
    x = torch.randn(1, 3, 32, 32)

    def loss(parameters, x):
        return torch.func.functional_call(backbone, parameters, (x,))[0].float().square().mean()

    def run():
        if transform == "grad":
            return list(torch.func.grad(loss)(trained, x).values())
        if transform == "vmap":
            return torch.vmap(lambda one: loss(trained, one[None]))(x)
        if transform == "jvp":
            return torch.func.jvp(lambda parameters: loss(parameters, x), (trained,), (trained,))
        if transform == "dual numbers":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(loss(trained, forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        with torch.no_grad():
            return torch.jit.trace(backbone.body, x, check_trace=False)(x)

    with torch.autocast("cpu", torch.bfloat16):
        expected = run()
        with use_backend(channel_affine="eager"):  # which is channels last otherwise
            torch.testing.assert_close(run(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("op", "name"), [
    ("bottlenecks", "one_node"), ("bottlenecks", "kernels"), ("pointwise_affine", "triton"), ("resnet_stem", "triton"),
])  # fmt: skip
def test_in_16_bits_what_is_asked_for_by_name_runs_also_on_a_cpu_or_is_refused(op, name):
    body, seen = randomised(ResNetBackbone("resnet50").body), []
    expected = nullcontext() if name == "one_node" else pytest.raises(BackendError, match=f"{op} was asked to run on")
    with use_backend(**{op: name}), dispatch.recording(lambda op, decision: seen.append((op, decision))), expected:
        with torch.autocast("cpu", torch.bfloat16):
            body(torch.randn(1, 3, 32, 32))
        assert [decision.implementation.name for one, decision in seen if one == op] == [name] * 3


def test_in_16_bits_a_part_that_is_not_plain_runs_as_it_is():
    body, x = randomised(ResNetBackbone("resnet18").body), torch.randn(1, 3, 64, 64)
    seen = []
    handle = body.layer3[1].bn2.register_forward_hook(lambda *_: seen.append(True))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), use_backend(channel_affine="eager"):
        assert not body(x).is_contiguous(memory_format=torch.channels_last)
        assert seen == [True]
        handle.remove()
        assert body(x).is_contiguous(memory_format=torch.channels_last)
        body.layer1[0].conv1 = nn.utils.parametrizations.weight_norm(body.layer1[0].conv1)
        assert not body(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("name", "dilation", "norm"), [("resnet18", False, "batch"), ("resnet50", True, "frozen")])
def test_the_feature_map_equals_torchvisions(name, dilation, norm):
    torch.manual_seed(0)
    backbone = ResNetBackbone(name, dilation, norm=norm).eval()
    peer = torchvision.models.get_model(
        name, weights=None, replace_stride_with_dilation=[False, False, dilation]
    ).eval()
    peer.load_state_dict(backbone.body.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features, mask = backbone(x)
        expected = torchvision.models._utils.IntermediateLayerGetter(peer, {"layer4": "map"})(x)["map"]
    assert mask is None
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("backbone", "channels", "stride"),
    [
        (lambda: ResNetBackbone("resnet34"), 512, 32),
        (lambda: ResNetBackbone("resnet101", dilation=True), 2048, 16),
        (lambda: ConvBackbone(8, 8), 64, 8),
        (lambda: ConvBackbone(8, 16), 64, 16),
        (lambda: ConvBackbone(16, 32), 128, 32),
    ],
    ids=["resnet34", "resnet101-dc5", "conv-8", "conv-16", "conv-32"],
)
def test_features_and_mask_have_the_resolution_of_the_stride(backbone, channels, stride):
    backbone = backbone()
    mask = torch.zeros(1, 64, 90, dtype=torch.bool)
    mask[:, :, 64:] = True
    with torch.no_grad():
        features, small = backbone(torch.randn(1, 3, 64, 90), mask)
    assert backbone.num_channels == channels
    assert features.shape == (1, channels, 64 // stride, -(-90 // stride))
    assert small.shape == (1, *features.shape[2:])
    assert small.dtype == torch.bool
    # The mask of the nearest pixel, as torch's nearest neighbour counts it.
    expected = nn.functional.interpolate(mask[None].float(), size=features.shape[2:])[0].bool()
    assert torch.equal(small, expected)


def test_with_frozen_norms_the_stem_and_the_first_stage_do_not_train():
    frozen = {
        name.split(".")[0] for name, p in ResNetBackbone("resnet18").body.named_parameters() if not p.requires_grad
    }
    trained = {name.split(".")[0] for name, p in ResNetBackbone("resnet18").body.named_parameters() if p.requires_grad}
    assert frozen == {"conv1", "layer1"}
    assert trained == {"layer2", "layer3", "layer4"}
    assert all(p.requires_grad for p in ResNetBackbone("resnet18", norm="batch").parameters())


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_a_torchvision_file_gives_the_backbones_weights(norm, tmp_path):
    peer = torchvision.models.resnet18(weights=None)
    torch.save(peer.state_dict(), tmp_path / "resnet18.pth")
    backbone = ResNetBackbone("resnet18", weights=tmp_path / "resnet18.pth", norm=norm)
    state = backbone.body.state_dict()
    assert len(state) >= 100
    assert all(torch.equal(tensor, peer.state_dict()[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vgg16"}, "got backbone 'vgg16'; expected one of resnet18"),
        ({"name": "resnet34", "dilation": True}, r"resnet34 has no dilated \(DC5\) variant"),
        ({"name": "resnet18", "norm": "group"}, "got norm 'group'"),
        ({"name": "resnet18", "weights": "absent.pth"}, "'absent.pth': no such file, and .* IMAGENET1K_V1"),
    ],
)
def test_unknown_backbones_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNetBackbone(**arguments)
    with pytest.raises(ValueError, match="got stride 4"):
        ConvBackbone(stride=4)


def test_backbone_weights_that_cannot_be_had_or_do_not_fit_are_one_line(tmp_path, monkeypatch):
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(WeightsError, match=r"lack layer1\.\{0,1,2\}\.bn3 .*; give those of this ResNet") as error:
        ResNetBackbone("resnet50", weights=tmp_path / "resnet34.pth")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 900

    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", offline)
    with pytest.raises(
        WeightsError, match=r"cannot download .* \(.*no route to host.*\); fetch https://.*resnet18.*pth"
    ):
        ResNetBackbone("resnet18", weights="IMAGENET1K_V1")


@pytest.mark.parametrize(
    "make", [lambda: ConvBackbone(4, 16), lambda: ConvBackbone(4, 32), lambda: ResNetBackbone("resnet18")]
)
@pytest.mark.parametrize("size", [(32, 64), (33, 65), (1, 47)])
def test_the_size_of_the_features_is_known_beforehand(make, size):
    backbone = make().eval()
    with torch.device("meta"):
        features, _ = backbone.to("meta")(torch.empty(1, 3, *size))
    assert features.shape[-2:] == backbone.map_size(*size)
