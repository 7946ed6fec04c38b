from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn as torch_nn

from detr_fast import dispatch, use_backend
from detr_fast.dispatch import BackendError, TritonImplementation
from detr_fast.explanation import explaining
from detr_fast.ops.attention import ATTENTION, EagerAttention

ROUNDING = 1e-11  # in fp64
BACKENDS = [None, {"attention": "sdpa"}, {"attention": "eager"}]


def inputs(shape, options, dtype=torch.float64):
    """query, key, value as `options` describe them: which are one tensor, batched or not, batch first or not."""
    batch, queries, keys, embed, kdim, vdim = shape
    same = options["same"]
    if same in ("all", "qk"):
        keys = queries

    def tensor(length, width):
        if not options["batched"]:
            return torch.randn(length, width, dtype=dtype)
        first, second = (batch, length) if options["batch_first"] else (length, batch)
        return torch.randn(first, second, width, dtype=dtype)

    query = tensor(queries, embed)
    key = query if same in ("all", "qk") else tensor(keys, kdim)
    value = query if same == "all" else key if same == "kv" else tensor(keys, vdim)
    return query, key, value


def masks(options, batch, heads, queries, keys):
    """Masks in torch.nn's polarity; the first key stays visible to all, since rows without any differ knowingly."""
    padding = attention = None
    if options["padding"]:
        shape = (batch, keys) if options["batched"] else (keys,)
        padding = torch.rand(shape) < 0.4
        padding[..., 0] = False
        if options["padding"] == "float":
            padding = torch.where(padding, -math.inf, torch.randn(shape)).double()
    if options["mask"]:
        kind, dims = options["mask"]
        batch = batch if options["batched"] else 1
        shape = (queries, keys) if dims == 2 else (batch * heads, queries, keys)
        attention = torch.rand(shape) < 0.4
        attention[..., 0] = False
        if kind == "float":
            attention = torch.where(attention, -math.inf, torch.randn(shape)).double()
    return padding, attention


OPTIONS = st.fixed_dictionaries(
    {
        "batched": st.booleans(),
        "batch_first": st.booleans(),
        "same": st.sampled_from(["all", "qk", "kv", "none"]),
        "bias": st.booleans(),
        "add_bias_kv": st.booleans(),
        "add_zero_attn": st.booleans(),
        "widths": st.sampled_from([(None, None), (6, 10), (None, 4)]),
        "padding": st.sampled_from([None, "bool", "float"]),
        "mask": st.sampled_from([None, ("bool", 2), ("bool", 3), ("float", 2), ("float", 3)]),
        "need_weights": st.booleans(),
        "average_attn_weights": st.booleans(),
        "training": st.booleans(),
        "heads": st.sampled_from([1, 2, 4]),
        "lengths": st.tuples(st.integers(1, 5), st.integers(1, 6)),
        "batch": st.integers(1, 3),
    }
)


def call_of(options, twins):
    """Both modules, the inputs and the keyword arguments that the options describe."""
    kdim, vdim = options["widths"]
    if options["same"] != "none":
        kdim = vdim = None
    names = ("bias", "add_bias_kv", "add_zero_attn", "batch_first")
    constructor = {name: options[name] for name in names}
    ours, original = twins("MultiheadAttention", 8, options["heads"], kdim=kdim, vdim=vdim, **constructor)
    queries, keys = options["lengths"]
    q, k, v = inputs((options["batch"], queries, keys, 8, kdim or 8, vdim or 8), options)
    axis = 0 if not options["batched"] else 1 if options["batch_first"] else 0
    padding, mask = masks(options, options["batch"], options["heads"], q.shape[axis], k.shape[axis])
    for module in (ours, original):
        module.train(options["training"])
    kwargs = {name: options[name] for name in ("need_weights", "average_attn_weights")}
    return ours, original, (q, k, v), {**kwargs, "key_padding_mask": padding, "attn_mask": mask}


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(options=OPTIONS)
def test_outputs_weights_and_gradients_are_torch_nns(backend, twins, assert_same_step, options):
    ours, original, tensors, kwargs = call_of(options, twins)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # masks of mixed types are deprecated in torch.nn, and meant here
        assert_same_step(ours, original, tensors, rtol=ROUNDING, exact=backend is None, backend=backend, **kwargs)


@pytest.mark.parametrize(
    "constructor", [{}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str
)
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_causal_hint_acts_as_in_torch_nn(backend, padded, need_weights, constructor, twins, assert_same_step):
    ours, original = twins("MultiheadAttention", 8, 2, **constructor)
    x = torch.randn(3, 3, 8, dtype=torch.float64)
    mask = torch_nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    padding = torch.zeros(3, 3, dtype=torch.float64)
    padding[1, 1:] = -math.inf
    kwargs = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights}
    if padded:
        kwargs["key_padding_mask"] = padding
    assert_same_step(ours, original, (x, x, x), rtol=ROUNDING, backend=backend, **kwargs)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_query_that_sees_no_key_gets_zeros_and_gives_zero_gradients(backend, need_weights, twins):
    ours, _ = twins("MultiheadAttention", 8, 2, batch_first=True)
    x = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(2, 4, dtype=torch.bool)
    padding[1] = True
    with use_backend(attention=backend):
        y, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    y.sum().backward()
    assert torch.equal(y[1], ours.out_proj.bias.expand(4, 8))
    assert weights is None or (weights[1] == 0).all()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[1] == 0).all()


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("backend", BACKENDS[:2], ids=str)  # eager drops what the kernels drop
def test_the_same_seed_drops_the_same_weights(backend, need_weights, twins, assert_same_step):
    ours, original = twins("MultiheadAttention", 8, 2, dropout=0.5)
    x = torch.randn(6, 2, 8, dtype=torch.float64)

    class Seeded(torch_nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            torch.manual_seed(7)
            return self.module(*args, **kwargs)

    step = {"rtol": ROUNDING, "backend": backend, "need_weights": need_weights}
    assert_same_step(Seeded(ours), Seeded(original), (x, x, x), **step)


def test_output_and_weights_are_dropped_alike_by_the_eager_twin(twins):
    ours, _ = twins("MultiheadAttention", 8, 2, dropout=0.5, batch_first=True)
    x = torch.randn(3, 20, 8, dtype=torch.float64)
    with use_backend(attention="eager"):
        torch.manual_seed(7)
        y, weights = ours(x, x, x, average_attn_weights=False)
        torch.manual_seed(7)
        assert torch.equal(y, ours(x, x, x, need_weights=False)[0])
    share = (weights == 0).double().mean()
    assert 0.4 < share < 0.6
    value = torch_nn.functional.linear(x, ours.in_proj_weight[16:], ours.in_proj_bias[16:]).unflatten(-1, (2, 4))
    heads = torch.einsum("bhls,bshe->blhe", weights, value).flatten(2)
    torch.testing.assert_close(ours.out_proj(heads), y)


def test_a_projection_of_inputs_that_are_one_tensor_is_one_matrix_product(twins):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
            return function(*args, **(kwargs or {}))

    ours, _ = twins("MultiheadAttention", 8, 2, batch_first=True)
    a, b, c = (torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(3))
    for arguments, expected in [((a, a, a), 1), ((a, a, b), 2), ((a, b, b), 2), ((a, b, c), 3)]:
        with use_backend(attention="sdpa"), torch.no_grad(), Products() as products:
            ours(*arguments, need_weights=False)
        assert products.count == expected + 1  # the out-projection


class Fused(TritonImplementation):
    """Stands for a Triton kernel on a machine without a GPU: takes what kernels take, keeps what it was given."""

    dtypes = frozenset({torch.float64, torch.float32, torch.bfloat16})

    def __init__(self):
        self.given = []
        self.asked = []

    def refusal(self, call, by_name):
        return None

    def why_not(self, call):
        self.asked.append(call)
        return None

    def run(self, q, k, v, *rest):
        self.given.append((q, k, v, *rest))
        return EagerAttention().run(q, k, v, *rest)


@pytest.fixture
def fused(monkeypatch):
    """A kernel that `auto` chooses."""
    kernel = Fused()
    monkeypatch.setattr(ATTENTION, "implementations", (kernel, *ATTENTION.implementations[-2:]))
    ATTENTION.forget()
    yield kernel
    ATTENTION.forget()


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=OPTIONS)
def test_the_choice_is_made_on_what_the_kernel_then_gets(fused, twins, options):
    ours, _, tensors, kwargs = call_of({**options, "need_weights": False}, twins)
    ATTENTION.forget()
    fused.given.clear()
    with warnings.catch_warnings(), explaining(ours) as records:
        warnings.simplefilter("ignore")
        ours(*tensors, **kwargs)
    assert [r.chosen for r in records] == ["triton"]
    (given,) = fused.given
    assert ATTENTION._describe(*given, situation=fused.asked[-1].situation) == fused.asked[-1]
    for stand_in, tensor in zip(ours._stand_ins(*tensors, torch.float64), given):
        assert [appearance(stand_in)] == [appearance(tensor)]


def appearance(tensor):
    """What a decision can read of a tensor; the stride of a dimension of size 1 means nothing."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]
    return tensor.shape, strides, tensor.dtype, tensor.device, tensor.requires_grad


@pytest.mark.parametrize("needs", ["position", "memory_key"])
def test_the_kernel_is_chosen_for_a_backward_where_only_positions_need_it(fused, twins, needs):
    ours, _ = twins("MultiheadAttention", 8, 2, batch_first=True)
    ours.requires_grad_(False)
    x, memory, position, memory_key = (torch.randn(3, 5, 8, dtype=torch.float64) for _ in range(4))
    {"position": position, "memory_key": memory_key}[needs].requires_grad_()
    with explaining():
        y, _ = ours.heads(x, memory, position=position, memory_key=memory_key)
        assert y.requires_grad
        ours.heads(x, memory)
    assert [call.needs_grad for call in fused.asked] == [True, False]


def test_masks_reach_the_kernel_as_small_as_they_were_given(fused, twins):
    ours, _ = twins("MultiheadAttention", 8, 2, batch_first=True)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    padding, mask = torch.zeros(3, 5, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool).triu(1)
    with explaining():
        ours(x, x, x, key_padding_mask=padding, attn_mask=mask, is_causal=True, need_weights=False)
        ours(x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=False)
        ours(x, x, x, key_padding_mask=padding.double(), need_weights=False)
    hinted, masked, floating = (call[3:6] for call in fused.given)
    assert hinted[0] is masked[0] is padding
    assert hinted[1:] == (None, True)
    assert torch.equal(masked[1], ~mask)
    assert masked[2] is False
    assert floating[0] is None
    assert floating[1].shape == (3, 1, 1, 5)


def test_a_call_that_does_not_fit_gets_torch_nns_own_error_before_anything_is_chosen(fused, twins):
    ours, _ = twins("MultiheadAttention", 8, 2, batch_first=True)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with explaining(), pytest.raises(AssertionError, match=r"key_padd\w+_mask"):
        ours(x, x, x, key_padding_mask=torch.zeros(3, 4, dtype=torch.bool))
    assert not fused.asked


def test_stand_ins_hold_no_memory_and_are_made_once(twins):
    ours, _ = twins("MultiheadAttention", 8, 2, batch_first=True)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    first, second = (ours._stand_ins(x, x, x, torch.float64) for _ in range(2))
    assert all(a is b for a, b in zip(first, second))
    assert all(t.untyped_storage().nbytes() == 0 for t in first)


def test_nested_tensors_run_on_torch_nns_fast_path_and_nowhere_else(twins):
    ours, original = (m.eval() for m in twins("MultiheadAttention", 8, 2, batch_first=True, dtype=torch.float32))
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with torch.no_grad():
        expected = original(x, x, x, need_weights=False)[0]
        with explaining():
            found = ours(x, x, x, need_weights=False)[0]
        for mine, theirs in zip(found.unbind(), expected.unbind(), strict=True):
            assert torch.equal(mine, theirs)
        with use_backend(attention="sdpa"), pytest.raises(BackendError, match="nested tensors"):
            ours(x, x, x, need_weights=False)


def test_a_call_that_nothing_intervenes_in_is_not_dispatched_on_the_cpu(fused, twins):
    ours, _ = twins("MultiheadAttention", 8, 2)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    assert not dispatch.intervening
    ours(x, x, x)
    assert not fused.asked


@pytest.mark.parametrize("need_weights", [False, True])
def test_what_was_asked_for_by_name_and_can_not_run_raises(need_weights, monkeypatch, twins):
    class Unable(Fused):
        def why_not(self, call):
            return "it is a stand-in"

    monkeypatch.setattr(ATTENTION, "implementations", (Unable(), *ATTENTION.implementations[-2:]))
    ATTENTION.forget()
    ours, _ = twins("MultiheadAttention", 8, 2)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with use_backend(attention="triton"), pytest.raises(BackendError, match="it is a stand-in"):
        ours(x, x, x, need_weights=need_weights)
    ATTENTION.forget()


def test_a_lone_bias_k_is_refused_as_by_torch_nn(twins):
    ours, original = twins("MultiheadAttention", 8, 2, add_bias_kv=True)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    for module in (ours, original):
        module.bias_v = None
        with use_backend(attention="eager"), pytest.raises(AssertionError, match="bias_k"):
            module(x, x, x)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_acts_in_training_only(need_weights, backend, twins):
    ours, _ = twins("MultiheadAttention", 8, 2, dropout=0.5)
    x = torch.randn(6, 2, 8, dtype=torch.float64)

    def call():
        with use_backend(attention=backend):
            return ours(x, x, x, need_weights=need_weights)[0]

    assert not torch.equal(call(), call())
    ours.eval()
    assert torch.equal(call(), call())


def test_torch_nns_own_forward_runs_where_auto_chooses_pytorch(monkeypatch, twins):
    ours, _ = twins("MultiheadAttention", 8, 2)
    x = torch.randn(6, 2, 8, dtype=torch.float64)
    calls = []
    original = torch.nn.functional.multi_head_attention_forward
    monkeypatch.setattr(
        torch.nn.functional, "multi_head_attention_forward", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    with explaining(ours) as records:
        ours(x, x, x)
    assert [r.chosen for r in records] == ["sdpa"]
    assert calls == [1]


@pytest.mark.interpreter
@pytest.mark.parametrize("options", [{"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
@pytest.mark.parametrize("average", [True, False])
def test_the_kernels_output_and_weights_are_torch_nns(options, average, twins, assert_same_step):
    ours, original = twins("MultiheadAttention", 8, 2, dtype=torch.float32, **options)
    x = torch.randn(3, 4, 8)
    shape = (3, 4) if options.get("batch_first") else (4, 3)
    padding = torch.zeros(shape, dtype=torch.bool)
    padding[0, -1] = True
    kwargs = {"average_attn_weights": average, "key_padding_mask": padding, "backend": {"attention": "triton"}}
    assert_same_step(ours, original, (x, x, x), rtol=1e-4, **kwargs)
    with use_backend(attention="triton"), explaining(ours) as records:
        ours(x, x, x)
    assert [(r.op, r.chosen) for r in records] == [("attention", "triton")]
    assert "weights" in records[0].shapes
