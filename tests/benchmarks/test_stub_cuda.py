from __future__ import annotations

import inspect

import pytest
import torch

from tests.stub_cuda import stubs


def parameters(function):
    return [p.name for p in inspect.signature(function).parameters.values() if p.name != "self"]


@pytest.mark.parametrize("name", [name for name, stub in stubs().items() if inspect.isfunction(stub)])
def test_a_stub_takes_no_argument_that_pytorchs_own_function_does_not_take(name):
    assert set(parameters(stubs()[name])) <= set(parameters(getattr(torch.cuda, name)))


@pytest.mark.parametrize("name", ["CUDAGraph", "Event", "Stream"])
def test_a_stubs_methods_are_pytorchs_own(name):
    real, stub = getattr(torch.cuda, name), stubs()[name]
    own = {method: function for method, function in vars(stub).items() if inspect.isfunction(function)}
    for method, function in own.items():
        if method.startswith("__") or (name == "CUDAGraph" and method == "restore"):
            continue
        assert set(parameters(function)) <= set(parameters(getattr(real, method))), method
    if name != "CUDAGraph":  # which is also a mode of the dispatcher
        assert set(parameters(own["__init__"])) <= set(parameters(real.__new__)), name


def test_what_the_engine_passes_when_it_captures_is_what_pytorch_takes():
    assert set(parameters(torch.cuda.graph.__init__)) >= {"cuda_graph", "pool", "capture_error_mode"}
