"""The path of a CUDA launch, with a stub behind Triton's driver."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
import triton
from detr_fast.kernels import launch, layer_norm, offline, rows

from detr_fast.testing import count

pytestmark = pytest.mark.offline


@pytest.fixture
def call():
    x = torch.randn(100, 256).bfloat16()
    weight, bias = torch.randn(2, 256).bfloat16()
    return x, weight, bias


def step(x, weight, bias):
    y, mean, rstd = layer_norm.layer_norm_forward(x, weight, bias, 1e-5)
    layer_norm.layer_norm_backward(y, x, weight, mean, rstd)


def test_a_launch_runs_the_catalogs_machine_code_with_the_calls_arguments(stub_gpu, call, monkeypatch, tmp_path):
    # In the user's cache, one of the two may come from another checkout: debug information names the source's folder.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    y, mean, rstd = layer_norm.layer_norm_forward(*call, 1e-5)
    variant = layer_norm.forward_variant(256, *[torch.bfloat16] * 4, vector=8)
    assert stub_gpu.loaded == [offline.compile_variant(variant, "sm_90")[0]]
    ((grid, arguments),) = stub_gpu.launched
    assert grid == (13, 1, 1)
    assert all(passed is given for passed, given in zip(arguments, (*call, y, mean, rstd)))
    assert arguments[6:10] == (256, 100, 256, 1e-5)


def test_compiling_ahead_loads_all_that_the_step_launches_and_launches_nothing(stub_gpu, call):
    launch.compile_launches(lambda: step(*(t.to("meta") for t in call)), torch.device("cuda"))
    assert len(stub_gpu.loaded) == 3
    assert stub_gpu.launched == []
    step(*call)
    assert len(stub_gpu.loaded) == 3
    assert len(stub_gpu.launched) == 3


def test_other_sizes_and_strides_reuse_the_program(stub_gpu, call):
    x, weight, bias = call
    for view in (x, x[:1], x[::2], x[:0], x[3:19], x[:1].expand(50, 256)):
        layer_norm.layer_norm_forward(view, weight, bias, 1e-5)
    assert len(stub_gpu.loaded) == 1
    assert len(stub_gpu.launched) == 5  # no rows, no launch


def test_a_launch_goes_straight_to_its_compiled_program(stub_gpu, monkeypatch):
    x, weight = torch.zeros(4, 256), torch.zeros(256)
    layer_norm.layer_norm_forward(x, weight, weight, 1e-5)

    def looked_up(*_, **__):
        raise AssertionError("Triton looked the program up again")

    monkeypatch.setattr(triton.JITFunction, "run", looked_up)
    layer_norm.layer_norm_forward(x, weight, weight, 1e-5)
    (first, *_), (second, *_) = stub_gpu.launched[0], stub_gpu.launched[1]
    assert first == second
    assert len(stub_gpu.loaded) == 1


@pytest.mark.parametrize(
    ("given", "received"),
    [(torch.zeros(256), "a tensor of torch.float32"), (None, "None")],
    ids=["another dtype", "no tensor"],
)
def test_a_tensor_that_the_program_would_misread_is_refused(stub_gpu, given, received):
    variant = layer_norm.forward_variant(256, *[torch.bfloat16] * 4, vector=8)
    x = torch.zeros(2, 256, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=f"layer_norm_forward_kernel got {received} as weight_ptr; .*torch.bfloat16"):
        launch.launch(variant, (1,), x, given, x[0], x, torch.zeros(2), torch.zeros(2), 256, 2, 256, 1e-5)
    assert stub_gpu.launched == []


def test_a_rehearsal_is_its_threads_own_and_hides_no_other_launch_from_observers(stub_gpu, call, monkeypatch):
    seen = []
    monkeypatch.setattr(launch, "observers", [lambda launched: seen.append(launched.arguments[0].device.type)])

    def rehearsal():
        other = threading.Thread(target=layer_norm.layer_norm_forward, args=(*call, 1e-5))
        other.start()
        other.join()
        layer_norm.layer_norm_forward(*(t.to("meta") for t in call), 1e-5)

    launch.compile_launches(rehearsal, torch.device("cuda"))
    assert seen == ["cpu"]
    assert len(stub_gpu.loaded) == 1
    layer_norm.layer_norm_forward(*(t.to("meta") for t in call), 1e-5)
    assert seen == ["cpu", "meta"]


def test_every_observer_sees_a_launch_during_which_another_leaves(call, monkeypatch):
    """Two threads record what they launch, as autograd's for two GPUs do: a launch that one misses is missing in its program."""
    seen, observers = [], []
    observers += [lambda _: observers.clear(), seen.append]
    monkeypatch.setattr(launch, "observers", observers)
    layer_norm.layer_norm_forward(*(t.to("meta") for t in call), 1e-5)
    assert len(seen) == 1


def test_what_is_rehearsed_is_not_counted():
    x = torch.empty(2, device="meta")
    assert count(lambda: launch.compile_launches(lambda: x + x, torch.device("meta"))).total_launches == 0


def test_a_failing_compilation_raises_before_anything_runs(stub_gpu, call, monkeypatch):
    variant = rows.sum_partials_variant(256, torch.bfloat16, torch.bfloat16)
    broken = dataclasses.replace(variant, constants={**variant.constants, "BLOCK_C": 33})
    monkeypatch.setattr(rows, "_plan_sums", lambda *_: rows.Plan(broken, (64, 1), (256, 256, 1, 1, 256, 256, 1)))
    with pytest.raises(Exception, match="block < blocks") as failure:
        launch.compile_launches(lambda: step(*(t.to("meta") for t in call)), torch.device("cuda"))
    assert "power of 2" in str(failure.value.__cause__)
    assert stub_gpu.launched == []
