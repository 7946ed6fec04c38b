"""What of a model a captured graph is bound to, looked at by value and, in C++, by identity first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detr_fast import native
from detr_fast.engine.bound import Bound


class Part(nn.Module):
    """Holds what modules hold."""

    rate = 1.0

    def __init__(self):
        super().__init__()
        self.linear, self.more = nn.Linear(2, 2, bias=False), nn.ModuleList()
        self.drop, self.norm = nn.Dropout(0.1), nn.BatchNorm1d(2)
        self.window, self.sizes, self.name = 7, [1, (2, [3])], "a"
        self.config, self.weights = SimpleNamespace(width=2, heads=[1, 2]), {"a": 1.0, "b": {"c": [1]}}
        self.cache = torch.zeros(1)

    def forward(self, x):
        return self.linear(x)


def set_data(model):
    model.linear.weight.data = torch.ones(2, 2)


def hold_gradients(model):
    return model.linear.weight.register_hook(lambda grad: grad)


def hold_gradients_after(model):
    return model.linear.weight.register_post_accumulate_grad_hook(lambda one: None)


def patch_a_class(model):
    model.more.__class__.forward = lambda self, x: x


CHANGES = {
    "a part of an empty list": lambda model: model.more.append(nn.ReLU()),
    "a parameter": lambda model: model.linear.register_parameter("bias", nn.Parameter(torch.ones(2))),
    "a buffer": lambda model: model.linear.register_buffer("scale", torch.ones(2)),
    "another part": lambda model: setattr(model, "linear", nn.Linear(2, 2, bias=False)),
    "another parameter": lambda model: setattr(model.linear, "weight", nn.Parameter(torch.ones(2, 2))),
    "other memory": set_data,
    "a probability": lambda model: setattr(model.drop, "p", 0.2),
    "an integer": lambda model: setattr(model, "window", 8),
    "a text": lambda model: setattr(model, "name", "b"),
    "an entry of a list": lambda model: model.sizes.append(4),
    "an entry of a list in a tuple": lambda model: model.sizes[1][1].append(4),
    "an entry of a dictionary": lambda model: model.weights.update(a=2.0),
    "an entry of a list in a dictionary": lambda model: model.weights["b"]["c"].append(2),
    "a slice of a parameter": lambda model: setattr(model.linear.weight, "data", model.linear.weight.data[:1]),
    "a config's number": lambda model: setattr(model.config, "width", 3),
    "a config's list": lambda model: model.config.heads.append(3),
    "another config": lambda model: setattr(model, "config", SimpleNamespace(width=2, heads=[1, 2])),
    "what was of the class": lambda model: setattr(model, "rate", 1.0),
    "something that is gone": lambda model: delattr(model, "window"),
    "the mode": lambda model: model.drop.eval(),
    "a class": lambda model: setattr(model.drop, "__class__", nn.AlphaDropout),
    "a forward": lambda model: setattr(model.drop, "forward", lambda x: x),
    "a hook": lambda model: model.drop.register_forward_hook(lambda *_: None),
    "a hook before backward": lambda model: model.drop.register_full_backward_pre_hook(lambda *_: None),
    "a parameter's hook": hold_gradients,
    "a parameter's hook after": hold_gradients_after,
    "what is trained": lambda model: model.linear.requires_grad_(False),
    "a class's forward": patch_a_class,
}
# Two that come back, with what was before.
RETURNS = {
    "a probability": (lambda model: setattr(model.drop, "p", 0.2), lambda model: setattr(model.drop, "p", 0.1)),
    "the mode": (nn.Module.eval, nn.Module.train),
    "what is trained": (lambda m: m.linear.requires_grad_(False), lambda m: m.linear.requires_grad_(True)),
}


HANDLES = {
    "of a part": lambda model: model.drop.register_forward_hook(lambda *_: None),
    "of a gradient": hold_gradients,
    "behind a gradient": hold_gradients_after,
}


@pytest.fixture(params=["Python", "C++"])
def way(request):
    if request.param == "C++":
        request.getfixturevalue("host")
        yield request.param
    else:
        before = native.host
        native.use(None)
        yield request.param
        native.use(before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_is_not_bound_to_a_model_of_which_something_changed(way, change, monkeypatch):
    monkeypatch.setattr(nn.ModuleList, "forward", nn.ModuleList.forward, raising=False)  # put back behind a patch
    model = Part()
    bound = Bound(model)
    before = bound()
    assert [bound() for _ in range(3)] == [before] * 3
    CHANGES[change](model)
    after = bound()
    assert after != before
    assert [bound() for _ in range(3)] == [after] * 3


@pytest.mark.parametrize("change", RETURNS)
def test_what_was_there_before_is_known(way, change):
    model = Part()
    bound = Bound(model)
    numbers = [bound()]
    for _ in range(2):
        for set_it in RETURNS[change]:
            set_it(model)
            numbers.append(bound())
    assert numbers == [numbers[0], numbers[1]] * 2 + [numbers[0]]
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize("add", HANDLES.values(), ids=HANDLES)
def test_a_hook_that_is_gone_leaves_what_there_was(way, add):
    model = Part()
    bound = Bound(model)
    before = bound()
    handle = add(model)
    assert before not in [bound() for _ in range(2)]
    handle.remove()
    assert [bound() for _ in range(2)] == [before] * 2


def test_other_objects_of_the_same_value_change_nothing(way):
    model = Part()
    bound = Bound(model)
    before = bound()
    model.drop.p = float("0.1")
    model.sizes = [1, (2, [3])]
    model.cache = torch.ones(1)
    assert bound() == before


def test_all_modules_of_the_process_may_get_hooks(way):
    bound = Bound(Part())
    before = bound()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert bound() != before
    handle.remove()
    assert bound() == before


def test_in_cpp_nothing_is_read_by_value_as_long_as_nothing_changes(host, monkeypatch):
    model = Part()
    bound = Bound(model)
    before = bound()
    found = []
    monkeypatch.setattr(Bound, "_found", lambda self, told: found.append(told) or ())
    assert [bound(), bound(told=True)] == [before] * 2
    assert found == []
    lazy = nn.LazyLinear(2)  # lies nowhere yet
    monkeypatch.undo()
    bound = Bound(lazy)
    assert bound() == bound()


def test_cpp_takes_lists_of_dicts_entries_and_tensors_alone(host):
    lists = [[] for _ in range(6)]
    assert host.untouched(*lists)
    with pytest.raises(TypeError, match="six lists"):
        host.untouched(*lists[:5])
    with pytest.raises(TypeError, match="takes dicts"):
        host.untouched([1], [[]], *lists[:4])
    with pytest.raises(TypeError, match="takes tensors"):
        host.untouched(*lists[:4], [1], [0, 0, 0])
    assert not host.untouched([{}], [], *lists[:4])
