"""Once an implementation is chosen nothing compiles any more: whatever lies where, a call launches what was compiled before it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from detr_fast.kernels import launch, layer_norm
from torch import Tensor

from detr_fast import dispatch, implementation, ops, use_backend
from detr_fast.ops import boundary
from detr_fast.ops.attention import attention_with_weights
from detr_fast.ops.attention_packed import run_packed
from detr_fast.ops.attention_triton import TritonAttention
from detr_fast.ops.bottlenecks_autograd import Chain
from detr_fast.ops.channel_affine import channel_affine
from tests.bottleneck_inputs import make_blocks, make_input

pytestmark = pytest.mark.offline
bf16, fp32 = torch.bfloat16, torch.float32


class Compilations:
    """What was compiled while an implementation was chosen, what later, and what was launched."""

    def __init__(self) -> None:
        self.choosing = False
        self.before: set[launch.Variant] = set()
        self.late: list[launch.Variant] = []
        self.launched: set[launch.Variant] = set()

    def clear(self) -> None:
        launch.forget_programs()
        dispatch.forget_decisions()
        self.before.clear(), self.late.clear(), self.launched.clear()


@pytest.fixture
def compilations(stub_gpu, monkeypatch):
    """The CPU as a GPU whose machine code is made at once: it does nothing."""
    from triton.runtime.jit import JITFunction

    seen = Compilations()
    stub = SimpleNamespace(run=lambda *_: None, function=None, packed_metadata=None, _init_handles=lambda: None)
    made = []
    monkeypatch.setattr(JITFunction, "warmup", lambda *_, **__: made.append(stub) or stub)
    program, prepare = launch.Variant.program, dispatch.Op._prepare

    def compiled(variant: launch.Variant, device: torch.device) -> Any:
        count = len(made)
        found = program(variant, device)
        if len(made) > count:
            seen.before.add(variant) if seen.choosing else seen.late.append(variant)
        return found

    def choosing(*arguments: Any, **options: Any) -> Any:
        seen.choosing = True
        try:
            return prepare(*arguments, **options)
        finally:
            seen.choosing = False

    monkeypatch.setattr(launch.Variant, "program", compiled)
    monkeypatch.setattr(dispatch.Op, "_prepare", choosing)
    for module in (implementation, boundary):
        monkeypatch.setattr(module, "INTERPRETING", True)
    for name, module in list(sys.modules.items()):
        if name.startswith("detr_fast") and hasattr(module, "compile_variant"):
            monkeypatch.setattr(module, "compile_variant", compiled)
    monkeypatch.setattr(launch, "observers", [lambda one: seen.launched.add(one.variant)])
    seen.clear()
    yield seen
    seen.clear()


class Case(NamedTuple):
    """shapes: of the tensors that `call` takes; exact: nothing else is compiled than what is launched; halves: it takes 16 bits."""

    op: str
    call: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    backend: str = "triton"
    exact: bool = True
    halves: bool = True


def packed(qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    from detr_fast.ops.attention import ATTENTION

    chosen = ATTENTION.choose(q, k, v, None, None, False, 0.0, None)
    assert isinstance(chosen, TritonAttention)
    return run_packed(chosen, [qkv], None, None, False, 0.0)


def varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    ends = torch.tensor([0, 5, 16], dtype=torch.int32)
    return ops.attention_varlen(q, k, v, ends, ends, 11, 11, **options)


def deformable(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return ops.deformable_attention(value, [(1, 2), (2, 2)], locations, weights, [1, 3])


def from_offsets(value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
    shapes = torch.tensor([(1, 2), (2, 2)])
    return ops.deformable_attention_from_offsets(value, shapes, references, offsets, logits, [1, 3])


def heads(x: Tensor, *layers: Tensor) -> Any:
    w1, b1, w2, b2, w3, b3, *classes = layers
    return ops.prediction_heads(x, (w1, w2, w3), (b1, b2, b3), *classes, sigmoid=True)


def two_layers(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return ops.prediction_heads(x, (w1, w2), (b1, b2))[0]


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return ops.attention(q, k, v, attn_mask=mask, key_padding_mask=torch.zeros(2, 16, dtype=torch.bool))


QKV = ((2, 8, 2, 16), (2, 16, 2, 16), (2, 16, 2, 16))
ROWS, LINE = (6, 5, 64), (64,)
HEADS = ((64, 64), LINE, (64, 64), LINE, (4, 64), (4,), (92, 64), (92,))
BLOCK = (ROWS, (128, 64), (128,), (64, 128), LINE, LINE, LINE)
CASES = {
    "layer_norm": Case("layer_norm", lambda *t: ops.layer_norm(t[0], LINE, *t[1:]), (ROWS, LINE, LINE)),
    "layer_norm, alone": Case("layer_norm", lambda x: ops.layer_norm(x, LINE), (ROWS,)),
    "layer_norm, two dimensions": Case(
        "layer_norm", lambda *t: ops.layer_norm(t[0], (5, 64), *t[1:]), (ROWS, (5, 64), (5, 64))
    ),
    "layer_norm, wide": Case(
        "layer_norm", lambda *t: ops.layer_norm(t[0], (8256,), *t[1:]), ((3, 8256), (8256,), (8256,))
    ),
    "add_layer_norm": Case("add_layer_norm", partial(ops.add_layer_norm, dropout_p=0.1), (ROWS, ROWS, LINE, LINE)),
    "add_layer_norm, one gradient for both": Case("add_layer_norm", ops.add_layer_norm, (ROWS, ROWS, LINE)),
    "add_layer_norm, wide": Case("add_layer_norm", ops.add_layer_norm, ((3, 8256), (3, 8256), (8256,))),
    "add_layer_norm, sum": Case(
        "add_layer_norm", partial(ops.add_layer_norm, return_sum=True), (ROWS, ROWS, LINE, LINE), exact=False
    ),
    "rms_norm": Case("rms_norm", lambda *t: ops.rms_norm(t[0], LINE, *t[1:]), (ROWS, LINE)),
    "rms_norm, alone, wide": Case("rms_norm", lambda x: ops.rms_norm(x, (8256,)), ((3, 8256),)),
    "add_rms_norm": Case("add_rms_norm", partial(ops.add_rms_norm, dropout_p=0.1), (ROWS, ROWS, LINE)),
    "channel_affine": Case(
        "channel_affine", lambda x, r: channel_affine(x, *torch.rand(2, 64), r), ((2, 64, 3, 5), (2, 64, 3, 5))
    ),
    "gated_activation": Case("gated_activation", ops.gated_activation, (ROWS, ROWS)),
    "gated_activation, halves": Case("gated_activation", ops.gated_activation, ((6, 5, 128),)),
    "prediction_heads": Case("prediction_heads", heads, (ROWS, *HEADS), halves=False),
    "prediction_heads, two layers": Case("prediction_heads", two_layers, (ROWS, *HEADS[:2], *HEADS[4:6]), halves=False),
    "deformable_attention": Case("deformable_attention", deformable, ((2, 6, 2, 16), (2, 5, 2, 4, 2), (2, 5, 2, 4))),
    "deformable_attention, from offsets": Case(
        "deformable_attention", from_offsets, ((2, 6, 2, 16), (2, 5, 2, 4), (2, 5, 2, 4, 2), (2, 5, 2, 4))
    ),
    "linear_add_layer_norm": Case(
        "linear_add_layer_norm",
        partial(ops.linear_add_layer_norm, dropout_p=0.1),
        (ROWS, (64, 64), LINE, ROWS, LINE, LINE),
    ),
    "linear_add_layer_norm, sum": Case(
        "linear_add_layer_norm",
        partial(ops.linear_add_layer_norm, return_sum=True),
        (ROWS, (64, 64), LINE, ROWS, LINE, LINE),
        exact=False,
    ),
    "qkv_projection": Case(
        "qkv_projection", partial(ops.qkv_projection, position_columns=128), (ROWS, (192, 64), (192,), (5, 64))
    ),
    "feed_forward": Case("feed_forward", ops.feed_forward, BLOCK[:5]),
    "feed_forward, dropout": Case("feed_forward", partial(ops.feed_forward, dropout_p=0.1), BLOCK[:5]),
    "feed_forward, residual": Case(
        "feed_forward",
        lambda *t: ops.feed_forward(*t[:5], "gelu", 0.0, t[5], 0.1),
        (*BLOCK[:5], ROWS),
    ),
    **{
        f"feed_forward_add_layer_norm, {backend}, {drops}": Case(
            "feed_forward",
            partial(ops.feed_forward_add_layer_norm, dropout_p=drops[0], output_dropout_p=drops[1]),
            BLOCK,
            backend,
        )
        for backend in ("triton", "triton_recompute", "triton_one_kernel")
        for drops in ((0.0, 0.0), (0.1, 0.0), (0.1, 0.1))
    },
    "attention": Case("attention", partial(ops.attention, dropout_p=0.1), QKV),
    "attention, atomics": Case("attention", ops.attention, QKV, "triton_atomics"),
    "attention, split keys": Case("attention", ops.attention, ((1, 8, 1, 16), (1, 400, 1, 16), (1, 400, 1, 16))),
    "attention, mask": Case("attention", masked, (*QKV, (2, 8, 16))),
    "rotary_embedding": Case(
        "rotary_embedding",
        lambda q, k: ops.rotary_embedding(q, k, *torch.rand(2, 8, 16)),
        ((2, 8, 3, 16), (2, 8, 1, 16)),
    ),
    "rotary_embedding, partial and interleaved": Case(
        "rotary_embedding",
        lambda q: ops.rotary_embedding(q, None, *torch.rand(2, 8, 12), interleaved=True)[0],
        ((2, 8, 3, 20),),
    ),
    "attention, one row of a mask": Case("attention", masked, (*QKV, (16,))),
    "attention, a mask that many share": Case(
        "attention", lambda q, k, v, m: ops.attention(q, k, v, attn_mask=m), (*((33, 8, 1, 16),) * 3, (8, 8))
    ),
    "attention, log-sum-exp": Case("attention", partial(ops.attention, return_lse=True), QKV, exact=False),
    "attention, weights": Case("attention", attention_with_weights, QKV),
    "attention, packed projections": Case("attention", packed, ((2, 16, 3, 2, 16),)),
    "attention_varlen": Case("attention_varlen", partial(varlen, dropout_p=0.1), ((16, 2, 16),) * 3),
    "attention_varlen, atomics": Case("attention_varlen", varlen, ((16, 2, 16),) * 3, "triton_atomics"),
    "attention_varlen, mask": Case(
        "attention_varlen", lambda q, k, v, m: varlen(q, k, v, attn_mask=m), (*((16, 2, 16),) * 3, (2, 11, 11))
    ),
    "attention_varlen, log-sum-exp": Case(
        "attention_varlen", partial(varlen, return_lse=True), ((16, 2, 16),) * 3, exact=False
    ),
}


def lying(tensor: Tensor, how: str) -> Tensor:
    """A copy that lies aligned, one element further, in rows that are one element apart, or with rows across."""
    if how == "further":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if how == "apart":
        return torch.cat([tensor, tensor[..., :1]], -1)[..., :-1]
    if how == "across" and tensor.ndim > 2:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor.clone()


def run(case: Case, dtype: torch.dtype, places: list[str], dy_place: str, frozen: int = 0) -> None:
    """Forward and backward of each result; frozen: how many tensors, from the last on, need no gradient."""
    tensors = [
        lying(torch.randn(shape).to(dtype), place).requires_grad_(number < len(places) - frozen)
        for number, (shape, place) in enumerate(zip(case.shapes, places))
    ]
    with use_backend(**{case.op: case.backend}):
        found = case.call(*tensors)
    results = found if isinstance(found, tuple) else (found,)
    for number, y in enumerate(results):
        if not y.requires_grad:  # what it comes from is frozen
            continue
        dy = y.new_ones(()).expand(y.shape) if dy_place == "expanded" else lying(torch.randn_like(y), dy_place)
        last = number == len(results) - 1
        torch.autograd.grad(y, [t for t in tensors if t.requires_grad], dy, retain_graph=not last, allow_unused=True)


@pytest.mark.parametrize("name", CASES)
def test_nothing_compiles_after_the_decision_wherever_tensors_and_gradients_lie(compilations, name):
    case = CASES[name]
    count = len(case.shapes)
    first_further, last_further = ["further"] + ["aligned"] * (count - 1), ["aligned"] * (count - 1) + ["further"]
    for dtype, places, dy_place in (
        (bf16, ["aligned"] * count, "aligned"),
        (bf16, ["aligned"] * count, "apart"),
        (fp32, ["aligned"] * count, "further"),
        (bf16, first_further, "across"),
        (bf16, last_further, "expanded"),
        (fp32, ["apart"] * count, "aligned"),
        (bf16, ["across"] * count, "further"),
    ):
        compilations.clear()
        run(case, dtype if case.halves else fp32, places, dy_place)
        assert compilations.launched
        assert compilations.late == [], (dtype, places, dy_place)
        if case.exact:
            assert compilations.before == compilations.launched, (dtype, places, dy_place)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("place", ["aligned", "apart"])
def test_nothing_compiles_after_the_decision_under_autocast_and_with_frozen_parameters(compilations, name, place):
    case = CASES[name]
    count = len(case.shapes)
    run(case, bf16 if case.halves else fp32, [place] * count, "aligned", frozen=count - 1)
    assert compilations.launched
    assert compilations.late == []
    if not case.halves:
        return
    compilations.clear()
    with torch.autocast("cpu", bf16):
        run(case, fp32, [place] * count, "aligned")
    assert compilations.launched
    assert compilations.late == []


@pytest.mark.parametrize(
    ("places", "dy_place"),
    [
        (["aligned"] * 3, "apart"),
        (["further", "aligned", "aligned"], "across"),
        (["aligned", "aligned", "apart"], "expanded"),
    ],
)
def test_of_a_product_with_what_follows_it_nothing_compiles_after_the_decision(compilations, places, dy_place):
    shapes = (2, 64, 3, 5), (72, 64, 1, 1), (2, 72, 3, 5)

    def call(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return ops.pointwise_affine(x, weight, *torch.rand(2, 72), residual)

    case = Case("pointwise_affine", call, shapes, exact=False)
    run(case, bf16, places, dy_place)
    with torch.autocast("cpu", bf16):
        x, weight, residual = (lying(torch.randn(shape), place) for shape, place in zip(shapes, places))
        with use_backend(pointwise_affine="triton"):
            call(x.requires_grad_(), weight.requires_grad_(), residual.to(bf16)).sum().backward()
    assert len({one.name for one in compilations.launched}) == 2
    assert compilations.late == []


@pytest.mark.parametrize("dy_place", ["aligned", "further", "across"])
@pytest.mark.parametrize("kind", ["kernels", "one_node"])
def test_of_bottlenecks_that_are_one_node_nothing_compiles_after_the_decision(compilations, dy_place, kind):
    blocks = make_blocks(count=2, dtype=bf16)
    with use_backend(channel_affine="triton", bottlenecks=kind):
        y = Chain().one_node(make_input(blocks).requires_grad_(), blocks)
    y.backward(lying(torch.randn_like(y), dy_place))
    assert len({one.name for one in compilations.launched}) == (4 if kind == "kernels" else 2)
    assert compilations.late == []


def test_programs_of_equal_variants_are_compiled_once(compilations):
    one, other = (launch.Variant(*norm_variant()) for _ in range(2))
    device = torch.device("cpu")
    assert one.program(device) is other.program(device)
    assert len(compilations.late) == 1


def norm_variant() -> tuple[Any, ...]:
    variant = layer_norm.forward_variant(64, bf16, None, None, bf16, 8)
    return variant.kernel, variant.types, variant.constants, variant.num_warps, variant.num_stages
