"""What an op costs the host, without a GPU: forward and backward of each fused op beside the PyTorch operations that it replaces.

    python -m pytest benchmarks/test_host_time.py -s

Both run on tiny CPU tensors. Our kernels take the whole path of a CUDA launch up to the driver's door, behind which nothing happens
(from Python up to Triton's launcher's, which takes another 2 µs a launch: `tests/native/launch_both.py` times it); PyTorch's operations do their tiny work. So the difference is what remains
when launches themselves, of which PyTorch has more, are left out. Median over rounds that alternate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detr_fast.kernels.driver import FUNCTIONS
from torch import Tensor

from benchmarks.test_overhead import interleaved
from detr_fast import dispatch, implementation, nn, ops, use_backend
from detr_fast.ops import boundary
from tests.conftest import INTERPRETING, StubGPU
from tests.native.stub_driver import StubDriver

ROWS, WIDTH, HIDDEN = 4, 64, 64  # two thirds of 3 * 64 columns are whole tiles
P = 0.1


def eager_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(residual + F.dropout(x, P), (WIDTH,), weight, bias)


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(residual + F.dropout(x, P), (WIDTH,), weight)


def eager_linear_add_layer_norm(
    x: Tensor, w: Tensor, b: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    return F.layer_norm(residual + F.dropout(F.linear(x, w, b), P), (WIDTH,), weight, bias)


def eager_feed_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    y = F.linear(F.dropout(F.linear(x, w1, b1).relu(), P), w2, b2)
    return F.layer_norm(x + F.dropout(y, P), (WIDTH,), weight, bias)


def eager_qkv(x: Tensor, w: Tensor, b: Tensor, position: Tensor) -> Tensor:
    n = 2 * WIDTH
    return torch.cat([F.linear(x + position, w[:n], b[:n]), F.linear(x, w[n:], b[n:])], -1)


LENGTH, HEADS, DIM = 4, 2, 32
PADDING = torch.tensor([[False] * (LENGTH - 1) + [True]])
ENDS = torch.tensor([0, LENGTH - 1], dtype=torch.int32)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As nn.MultiheadAttention computes it, between its projections, where weights are asked for."""
    q, k, v = (t.transpose(1, 2) for t in (q * DIM**-0.5, k, v))
    scores = (q @ k.transpose(2, 3)).masked_fill(PADDING[:, None, None], -torch.inf)
    return (F.dropout(scores.softmax(-1), P) @ v).transpose(1, 2)


LEVELS = [(2, 2), (1, 2), (1, 1), (1, 1)]  # of 8 pixels


def grid_sampling(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """As models that have no kernel for deformable attention do it."""
    grid = 2 * locations - 1
    samples = []
    for level, (one, (height, width)) in enumerate(zip(value.split([4, 2, 1, 1], 1), LEVELS)):
        image = one.flatten(2).transpose(1, 2).reshape(HEADS, DIM, height, width)
        places = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(image, places, align_corners=False))
    share = weights.transpose(1, 2).reshape(HEADS, 1, LENGTH, 16)
    return (torch.stack(samples, -2).flatten(-2) * share).sum(-1).view(1, HEADS * DIM, LENGTH).transpose(1, 2)


Case = tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]
ROW, SQUARE, LINE = (ROWS, WIDTH), (WIDTH, WIDTH), (WIDTH,)
CASES: dict[str, Case] = {
    "layer_norm": (
        lambda x, w, b: ops.layer_norm(x, (WIDTH,), w, b),
        lambda x, w, b: F.layer_norm(x, (WIDTH,), w, b),
        [ROW, LINE, LINE],
    ),
    "add_layer_norm": (
        partial(ops.add_layer_norm, dropout_p=P),
        eager_add_layer_norm,
        [ROW, ROW, LINE, LINE],
    ),
    "rms_norm": (
        lambda x, w: ops.rms_norm(x, (WIDTH,), w),
        lambda x, w: F.rms_norm(x, (WIDTH,), w),
        [ROW, LINE],
    ),
    "add_rms_norm": (
        partial(ops.add_rms_norm, dropout_p=P),
        eager_add_rms_norm,
        [ROW, ROW, LINE],
    ),
    "gated_activation": (ops.gated_activation, lambda gate, up: F.silu(gate) * up, [ROW, ROW]),
    "linear_add_layer_norm": (
        partial(ops.linear_add_layer_norm, dropout_p=P),
        eager_linear_add_layer_norm,
        [ROW, SQUARE, LINE, ROW, LINE, LINE],
    ),
    "feed_forward": (
        partial(ops.feed_forward_add_layer_norm, dropout_p=P, output_dropout_p=P),
        eager_feed_forward,
        [ROW, (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), LINE, LINE, LINE],
    ),
    "attention": (
        partial(ops.attention, key_padding_mask=PADDING),
        partial(sdpa, mask=~PADDING[:, None, None]),
        [(1, LENGTH, HEADS, DIM)] * 3,
    ),
    "attention_dropout": (
        partial(ops.attention, key_padding_mask=PADDING, dropout_p=P),
        eager_attention,
        [(1, LENGTH, HEADS, DIM)] * 3,
    ),
    "attention_varlen": (
        lambda q, k, v: ops.attention_varlen(q, k, v, ENDS, ENDS, LENGTH, LENGTH),
        lambda q, k, v: sdpa(q[None], k[None], v[None])[0],
        [(LENGTH, HEADS, DIM)] * 3,
    ),
    "deformable_attention": (
        lambda value, *rest: ops.deformable_attention(value, LEVELS, *rest),
        grid_sampling,
        [(1, 8, HEADS, DIM), (1, LENGTH, HEADS, 4, 4, 2), (1, LENGTH, HEADS, 4, 4)],
    ),
    "qkv_projection": (ops.qkv_projection, eager_qkv, [ROW, (3 * WIDTH, WIDTH), (3 * WIDTH,), ROW]),
}


class SilentDriver(StubDriver):
    """For the part in C++: launches that return at once."""

    def __init__(self, stub: StubGPU) -> None:
        super().__init__(stub)
        for name in FUNCTIONS:
            setattr(self, name, ctypes.CDLL(None).pthread_condattr_destroy)  # which does nothing, and returns 0


@pytest.fixture
def stub_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels accept CPU tensors and launch on a stub, as in tests/conftest.py."""
    if INTERPRETING:
        pytest.skip("measures launches, which the interpreter has none of: unset TRITON_INTERPRET")
    from detr_fast.kernels.catalog import CATALOG
    from detr_fast.kernels.launch import forget_programs
    from triton.runtime import driver

    class Silent(StubGPU):
        def __init__(self) -> None:
            super().__init__()
            self.launcher_cls = lambda source, metadata: (
                "".format
            )  # takes anything, in less time than a Python function

    silent = Silent()
    monkeypatch.setattr(driver, "_active", silent)
    SilentDriver(silent).use(monkeypatch)
    for module in (implementation, boundary):
        monkeypatch.setattr(module, "INTERPRETING", True)
    kernels = {one.variant.kernel for one in CATALOG}
    for kernel in kernels:
        kernel.device_caches.clear()
    yield
    forget_programs()
    for kernel in kernels:
        kernel.device_caches.clear()
    for op in dispatch._ops.values():
        op.forget()


def _step(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    dy = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, dy)


def _report(name: str, ours: Callable[[], object], theirs: Callable[[], object], capsys: Any) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with use_backend("triton"):
            mine, other, ratio = interleaved(ours, theirs)
    finally:
        torch.set_num_threads(threads)
    with capsys.disabled():
        print(f"\n{name:24} ours {mine * 1e6:7.1f} µs   PyTorch {other * 1e6:7.1f} µs   ratio {ratio:.2f}")


@pytest.mark.parametrize("name", CASES)
def test_host_time(name: str, stub_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    function, original, shapes = CASES[name]
    with use_backend("triton"):
        ours = _step(function, shapes)
    _report(name, ours, _step(original, shapes), capsys)


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_host_time_of_a_layer(name: str, stub_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole layer in training, with dropout and key padding, beside torch.nn's."""
    inputs = [torch.randn(1, ROWS, WIDTH, requires_grad=True) for _ in range(1 + ("Decoder" in name))]
    padding = torch.tensor([[False] * (ROWS - 1) + [True]])
    masks = {"memory_key_padding_mask" if "Decoder" in name else "src_key_padding_mask": padding}
    dy = torch.randn(1, ROWS, WIDTH)

    def step(layer: torch.nn.Module) -> Callable[[], object]:
        leaves = [*inputs, *layer.parameters()]
        return lambda: torch.autograd.grad(layer(*inputs, **masks), leaves, dy)

    ours, theirs = (getattr(library, name)(WIDTH, 2, HIDDEN, P, batch_first=True) for library in (nn, torch.nn))
    _report(name, step(ours), step(theirs), capsys)


def test_host_time_of_attention_with_its_projections(stub_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    """nn.MultiheadAttention in training, with dropout and key padding, beside torch.nn's."""
    x, dy = torch.randn(1, ROWS, WIDTH, requires_grad=True), torch.randn(1, ROWS, WIDTH)
    padding = torch.tensor([[False] * (ROWS - 1) + [True]])

    def step(attention: torch.nn.Module) -> Callable[[], object]:
        leaves = [x, *attention.parameters()]
        settings = {"key_padding_mask": padding, "need_weights": False}
        return lambda: torch.autograd.grad(attention(x, x, x, **settings)[0], leaves, dy)

    ours, theirs = (library.MultiheadAttention(WIDTH, 2, P, batch_first=True) for library in (nn, torch.nn))
    _report("MultiheadAttention", step(ours), step(theirs), capsys)
