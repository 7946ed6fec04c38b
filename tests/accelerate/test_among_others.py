"""Accelerating and restoring where others have a hand in it: registries, wrappers, errors, libraries of another version."""

from __future__ import annotations

import copy
import pickle
import re
from abc import ABCMeta
from typing import ClassVar

import pytest
import torch
from torch import nn

import detr_fast
from detr_fast import acceleration, adapters
from detr_fast import nn as ours
from detr_fast.adapters import torch_nn as torch_nn_adapter
from detr_fast.adapters.base import Mark


class Registry:
    """Refuses a second class of the same name, and would build ours in place of the first."""

    classes: ClassVar[dict] = {}

    def __init_subclass__(cls):
        if cls.__name__ in Registry.classes:
            raise ValueError(f"{cls.__name__} is registered")
        Registry.classes[cls.__name__] = cls


class Registered(Registry, nn.TransformerEncoderLayer):
    pass


def test_users_registries_of_subclasses_do_not_hear_of_ours():
    model = Registered(16, 2, 24)
    report = detr_fast.accelerate(model)
    assert report.switched[0].name == ""
    assert Registry.classes == {"Registered": Registered}
    detr_fast.restore(model)
    assert type(model) is Registered


class RegistryByMetaclass(ABCMeta):
    """Does so for classes, and asks for a name."""

    names: ClassVar[list] = []

    def __new__(cls, kind, bases, body, *, name):
        RegistryByMetaclass.names.append(name)
        return super().__new__(cls, kind, bases, body)

    def __init__(cls, *args, name):
        super().__init__(*args)


class Named(nn.LayerNorm, metaclass=RegistryByMetaclass, name="named"):
    pass


def test_users_metaclasses_do_not_hear_of_ours():
    model = nn.Sequential(Named(8))
    detr_fast.accelerate(model)
    assert isinstance(model[0], ours.LayerNorm)
    assert isinstance(model[0], Named)
    assert not isinstance(Named(8), type(model[0]))
    assert RegistryByMetaclass.names == ["named"]
    detr_fast.restore(model)
    assert type(model[0]) is Named


class Rebuilt(nn.LayerNorm):
    def __reduce__(self):
        return _rebuilt, (self.normalized_shape, self.state_dict())


def _rebuilt(shape, state):
    module = Rebuilt(shape)
    module.load_state_dict(state)
    return module


def test_a_class_that_says_how_it_is_copied_and_pickled_is():
    model = nn.Sequential(Rebuilt(8))
    detr_fast.accelerate(model)
    assert isinstance(model[0], ours.LayerNorm)
    nn.init.uniform_(model[0].weight)
    x = torch.randn(2, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is Rebuilt
        torch.testing.assert_close(twin(x), model(x))


def test_an_error_in_between_leaves_nothing_switched(monkeypatch):
    def fail(module):
        raise RuntimeError("spoilt")

    model = nn.Sequential(nn.LayerNorm(8), nn.MultiheadAttention(8, 2))
    monkeypatch.setattr(torch_nn_adapter, "why_not_fuse", lambda module, parts: fail(module) if parts else None)
    with pytest.raises(RuntimeError, match="spoilt"):
        detr_fast.accelerate(model)
    assert type(model[0]) is nn.LayerNorm


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_a_signal_while_modules_are_switched_leaves_none_switched(monkeypatch, calls):
    marks = iter([Mark] * calls)

    def interrupted(*args):
        return next(marks, _interrupt)(*args)

    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8))
    monkeypatch.setattr(acceleration, "Mark", interrupted)
    with pytest.raises(KeyboardInterrupt):
        detr_fast.accelerate(model)
    assert {type(one) for one in model} == {nn.LayerNorm}


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_module_whose_forward_was_wrapped_since_is_not_restored_under_the_wrapper():
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True), nn.LayerNorm(16))
    x = torch.randn(2, 3, 16)
    expected = 2 * model(x)
    detr_fast.accelerate(model)
    wrapped = model[0].forward  # as accelerate's hooks for offloading do
    model[0].forward = lambda *inputs: wrapped(*inputs)
    model[1].weight.data.mul_(2), model[1].bias.data.mul_(2)
    (left,) = detr_fast.restore(model).left
    assert (left.name, left.reason.partition(",")[0]) == ("0", "its forward was replaced on the instance since")
    torch.testing.assert_close(model(x), expected)
    del model[0].forward
    assert not detr_fast.restore(model).left
    assert type(model[0]) is nn.TransformerEncoderLayer
    torch.testing.assert_close(model(x), expected)


def test_a_library_that_lacks_what_its_adapter_needs_is_left_alone_and_the_rest_is_switched(monkeypatch):
    monkeypatch.setitem(adapters._ADAPTERS, "detr_fast.adapters.of_another_torch.Torch", "torch")
    model = nn.Sequential(nn.LayerNorm(8))
    report = detr_fast.accelerate(model)
    assert type(model[0]) is ours.LayerNorm
    (left,) = report.left
    assert left.kind == "torch"
    assert re.match(
        r"this version of torch lacks what its adapter needs \(No module named .*\): use a newer", left.reason
    )
