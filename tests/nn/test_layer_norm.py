from __future__ import annotations

import pytest
import torch
from torch import nn as torch_nn

from detr_fast import nn, use_backend
from detr_fast.dispatch import BackendError
from detr_fast.explanation import explaining
from detr_fast.testing import assert_as_accurate_as_eager

SHAPES = [((16,), (3, 5, 16)), ((16,), (16,)), ((4, 6), (5, 4, 6)), ((7,), (0, 7)), ((1,), (3, 1))]
OPTIONS = [{}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-2}]
NORMS = [("LayerNorm", options) for options in OPTIONS]
NORMS += [("RMSNorm", options) for options in OPTIONS if "bias" not in options]


@pytest.mark.parametrize(("name", "options"), NORMS, ids=str)
@pytest.mark.parametrize(("normalized", "shape"), SHAPES)
@pytest.mark.parametrize("backend", [None, {"layer_norm": "eager", "rms_norm": "eager"}], ids=str)
def test_outputs_and_gradients_are_torch_nns_to_the_bit(
    backend, normalized, shape, name, options, twins, assert_same_step
):
    ours, original = twins(name, normalized, **options)
    x = torch.randn(shape, dtype=torch.float64)
    assert_same_step(ours, original, (x,), rtol=0, exact=True, backend=backend)


def test_the_kernel_that_was_asked_for_by_name_and_can_not_run_is_not_replaced_silently():
    norm = nn.LayerNorm(4, dtype=torch.float64)
    with use_backend("triton"), pytest.raises(BackendError, match="layer_norm was asked to run on 'triton'"):
        norm(torch.randn(2, 4, dtype=torch.float64))


@pytest.mark.interpreter
@pytest.mark.parametrize(("name", "options"), NORMS, ids=str)
@pytest.mark.parametrize(("normalized", "shape"), SHAPES)
def test_the_kernel_is_as_accurate_as_torch_nn(normalized, shape, name, options):
    original = getattr(torch_nn, name)(normalized, **options)
    ours = getattr(nn, name)(normalized, **options)
    parameters = [torch.rand_like(p) + 0.5 for p in original.parameters()]

    def run(module, *tensors):
        x, *values = tensors
        named = dict(zip(dict(module.named_parameters()), values))
        return torch.func.functional_call(module, named, (x,))

    def kernel(*tensors):
        with use_backend(layer_norm="triton", rms_norm="triton"), explaining() as records:
            y = run(ours, *tensors)
        assert [r.chosen for r in records] == ["triton"]
        return y

    assert_as_accurate_as_eager(
        kernel,
        reference=lambda *tensors: run(original, *tensors),
        inputs=[torch.randn(shape) * 3 + 1, *parameters],
        dtype=torch.float32,
    )


@pytest.mark.interpreter
def test_the_kernel_runs_and_learns_inside_a_transformer_layer():
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    x = torch.randn(2, 3, 16)
    expected = layer(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    with use_backend(layer_norm="triton"), explaining(layer) as records:  # all of them would fuse the norms away
        y = layer(x)
        y.square().sum().backward()
    assert {(r.module, r.chosen) for r in records if r.op == "layer_norm"} == {("norm1", "triton"), ("norm2", "triton")}
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for parameter, gradient in zip(layer.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_layers_whose_norms_were_replaced_by_rms_norms_take_each_with_the_sum_before_it(
    name, norm_first, twins, assert_same_step
):
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    ours, original = twins(name, 16, 2, 24, dtype=torch.float32, **options)
    norms = [part for part, module in original.named_children() if isinstance(module, torch_nn.LayerNorm)]
    for layer in (ours, original):
        for part in norms:
            setattr(layer, part, torch_nn.RMSNorm(16))
    x = [torch.randn(2, 3, 16) for _ in range(1 + len(norms) // 3)]
    with explaining(ours) as records:
        assert_same_step(ours, original, x, rtol=1e-4, backend={"add_rms_norm": "triton"})
    added = [r for r in records if r.op == "add_rms_norm"]
    assert {r.chosen for r in added} == {"triton"}
    assert sum(r.calls for r in added) == len(norms) - norm_first
