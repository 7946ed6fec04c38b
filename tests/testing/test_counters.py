from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels.add_layer_norm_backward import residual_norm_backward
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast import ops, use_backend
from detr_fast.testing import assert_close_to_truth, count


def test_launches_leave_views_and_allocations_out():
    counts = count(lambda x: (x.t().reshape(6, 2)[None] + 1).view(-1) * 2, torch.randn(4, 3))
    assert counts.launches == {"aten.clone.default": 1, "aten.add.Tensor": 1, "aten.mul.Tensor": 1}


def test_bytes_moved_count_every_operand_and_result_once():
    assert count(torch.add, torch.randn(10), torch.randn(10)).bytes_moved == 3 * 40


def test_an_operation_that_is_one_kernel_and_could_be_parts_is_counted_whole():
    x = torch.empty(4, 8, device="meta", requires_grad=True)
    counts = count(lambda: torch.autograd.grad(F.silu(x), x, torch.empty_like(x)))
    assert counts.launches == {"aten.silu.default": 1, "aten.silu_backward.default": 1}
    assert counts.bytes_moved == 5 * 4 * 8 * 4


def test_each_gradient_of_a_convolution_is_a_launch_that_reads_what_arrives():
    x, weight = torch.empty(2, 3, 5, 5, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    counted = []
    for trained in ((True, True), (False, True)):
        x.requires_grad_(trained[0]), weight.requires_grad_(trained[1])
        y, leaves = F.conv2d(x, weight), [t for t in (x, weight) if t.requires_grad]
        counted.append(count(torch.autograd.grad, y, leaves, torch.empty_like(y)))
    assert [one.launches["aten.convolution_backward.default"] for one in counted] == [2, 1]
    assert counted[0].bytes_moved - counted[1].bytes_moved == x.nbytes + y.nbytes


def test_jagged_tensors_are_counted_and_answer_for_their_sizes_themselves():
    jagged = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)], layout=torch.jagged)
    assert count(nn.LayerNorm(16), jagged).total_launches == 1


def test_saved_bytes_leave_parameters_and_inputs_out():
    x = torch.randn(3, 8)
    assert count(nn.Linear(8, 16), x).saved_bytes == 0
    assert count(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), x).saved_bytes == 3 * 16 * 4


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.empty(4).copy_(x),
    ],
    ids=["item", "nonzero", "mask", "cpu", "copy"],
)
def test_what_makes_the_host_wait_is_seen_on_fake_cuda_tensors(wait):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        mode.shape_env = None
        x = torch.empty(4, device="cuda")

        def attempt():
            with contextlib.suppress(Exception):  # fake tensors have no values: some calls can't go on once seen
                wait(x)

        assert count(attempt).total_synchronisations == 1


def test_work_that_stays_on_the_device_does_not_wait():
    with FakeTensorMode():
        x = torch.empty(4, 4, device="cuda")
        assert count(lambda: (x @ x).masked_fill(x > 0, 0.0).softmax(-1)).total_synchronisations == 0


def _norm_step(device):
    """LayerNorm, forward and backward, of an input that must be copied to be read row by row."""
    x = torch.zeros(4, 30, 64, device=device).transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    norm = nn.LayerNorm(64, device=device)
    with use_backend(layer_norm="triton"):
        return count(lambda: ops.layer_norm(x, (64,), norm.weight, norm.bias).backward(torch.ones_like(x)))


@pytest.mark.interpreter
def test_triton_launches_are_counted_by_kernel():
    launches = _norm_step("cpu").launches
    kernels = {name: times for name, times in launches.items() if not name.startswith("aten")}
    assert kernels == {"layer_norm_forward_kernel": 1, "layer_norm_backward_kernel": 1, "sum_partials_kernel": 1}


def test_parts_of_a_tensor_that_a_launch_gets_whole_are_counted_once():
    dy, xhat = (torch.empty(64, 256, device="meta") for _ in range(2))
    rstd, weight = torch.empty(64, device="meta"), torch.empty(256, device="meta")
    types = {"dresidual_dtype": dy.dtype, "dx_dtype": dy.dtype}
    outputs = []
    counts = count(lambda: outputs.extend(residual_norm_backward(dy, xhat, rstd, weight, **types)))
    ds, _, sums = outputs  # three kinds of sums, of which the kernel gets where each starts
    assert counts.bytes_moved == sum(t.nbytes for t in (dy, xhat, rstd, weight, ds, sums))


@pytest.mark.interpreter
def test_meta_tensors_give_the_interpreters_numbers():
    assert _norm_step("meta") == _norm_step("cpu")


def test_kernels_and_what_their_launchers_do_around_them_are_counted_on_meta_tensors():
    counts = _norm_step("meta")
    assert counts.launches["layer_norm_backward_kernel"] == 1
    without_copy = 2 * 4 * 30 * 64 * 4 + 2 * 120 * 4 + 2 * 64 * 4  # x, y, statistics, parameters
    with use_backend(layer_norm="triton"):
        forward = count(nn_layer_norm, torch.zeros(4, 30, 64, device="meta"), torch.zeros(64, device="meta"))
    assert forward.bytes_moved == without_copy


def nn_layer_norm(x, parameter):
    return ops.layer_norm(x, (64,), parameter, parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_meta_tensors_give_the_numbers_of_fake_cuda_tensors(dtype, masked):
    def forward(device):
        layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True, device=device, dtype=dtype)
        mask = torch.zeros(2, 17, dtype=torch.bool, device=device) if masked else None
        with use_backend(layer_norm="triton"):
            x = torch.zeros(2, 17, 64, dtype=dtype, device=device)
            return count(lambda: layer(x, src_key_padding_mask=mask))

    on_meta = forward("meta")
    with FakeTensorMode():
        on_cuda = forward("cuda")
    assert on_meta.launches == on_cuda.launches
    assert on_meta.saved_bytes == on_cuda.saved_bytes
    assert on_meta.bytes_moved == on_cuda.bytes_moved


def test_the_accuracy_rule_sees_a_wrong_scale_and_a_missing_element():
    truth = torch.randn(50, dtype=torch.float64)
    eager = truth.float()
    assert_close_to_truth("same", eager, eager, truth)
    with pytest.raises(AssertionError, match="over 2 × eager's"):
        assert_close_to_truth("scaled", eager * 1.00001, eager, truth)
    hole = eager.clone()
    hole[7] = torch.nan
    with pytest.raises(AssertionError, match="NaN or inf"):
        assert_close_to_truth("hole", hole, eager, truth)
