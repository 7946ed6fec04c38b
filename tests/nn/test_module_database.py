"""PyTorch's own database of modules, constructor arguments and inputs, with our classes in place of its own."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch

from detr_fast import use_backend
from detr_fast.nn.replacements import REPLACEMENTS

common_modules = pytest.importorskip("torch.testing._internal.common_modules", reason="PyTorch's tests need expecttest")
INFOS = [info for info in common_modules.module_db if info.module_cls in REPLACEMENTS]


def test_the_database_has_all_modules_that_matter():
    assert {info.module_cls.__name__ for info in INFOS} >= {
        "LayerNorm",
        "MultiheadAttention",
        "TransformerEncoderLayer",
        "TransformerEncoder",
        "TransformerDecoderLayer",
        "Transformer",
    }


def flat(output):
    return [y for y in (output if isinstance(output, tuple) else (output,)) if y is not None]


def cases(info, training, dtype):
    """(our module, torch's with the same parameters, the entry) of each entry; without dropout.

    Random numbers are drawn in the order of a tensor's layout, which is free to differ.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in info.module_inputs_func(info, "cpu", dtype, requires_grad=False, training=training):
            arguments, keywords = entry.constructor_input.args, entry.constructor_input.kwargs
            original = info.module_cls(*arguments, **keywords).to(dtype).train(training)
            ours = REPLACEMENTS[info.module_cls](*arguments, **keywords).to(dtype).train(training)
            ours.load_state_dict(original.state_dict())
            for module in (*ours.modules(), *original.modules()):
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                elif isinstance(module, torch.nn.MultiheadAttention):
                    module.dropout = 0.0
            yield ours, original, entry


def leaf(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.detach().clone().requires_grad_() if floating else value


def outputs_and_gradients(module, forward_input):
    arguments = [leaf(value) for value in forward_input.args]
    keywords = {name: leaf(value) for name, value in forward_input.kwargs.items()}
    outputs = flat(module(*arguments, **keywords))
    sum((y * torch.arange(y.numel()).view(y.shape).cos()).sum() for y in outputs).backward()
    leaves = [t for t in (*arguments, *keywords.values()) if isinstance(t, torch.Tensor) and t.requires_grad]
    return [*outputs, *(t.grad for t in leaves), *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_entries_give_torch_nns_outputs_and_gradients(info, training):
    for ours, original, entry in cases(info, training, torch.float64):
        expected = outputs_and_gradients(original, entry.forward_input)
        with use_backend(attention="sdpa"):  # over our ops; the other tests run what auto chooses
            found = outputs_and_gradients(ours, entry.forward_input)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_entries_agree_with_the_databases_own_references(info, training):
    for ours, _, entry in cases(info, training, torch.float32):
        if entry.reference_fn is not None:
            arguments, keywords = entry.forward_input.args, entry.forward_input.kwargs
            expected = entry.reference_fn(ours, *arguments, **keywords)
            torch.testing.assert_close(ours(*arguments, **keywords), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_entries_survive_pickling(info):
    for ours, _, entry in cases(info, False, torch.float32):
        twin = pickle.loads(pickle.dumps(ours))
        assert repr(twin) == repr(ours)
        assert type(twin) is type(ours)
        found, expected = (flat(m(*entry.forward_input.args, **entry.forward_input.kwargs)) for m in (twin, ours))
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
def test_gradients_pass_gradcheck(info):
    ours, _, entry = next(iter(cases(info, True, torch.float64)))
    arguments = [leaf(value) for value in entry.forward_input.args]

    def call(*tensors):
        return tuple(flat(ours(*tensors, **entry.forward_input.kwargs)))

    with use_backend(attention="sdpa"):
        assert torch.autograd.gradcheck(call, arguments, fast_mode=True)
