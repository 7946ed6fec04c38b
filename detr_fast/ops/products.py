"""What the ops around a matrix product share: autocast, the matmul precision, checks, double backward."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from detr_fast.dispatch import NEVER, Call, TritonImplementation
from detr_fast.kernels import launch, rows
from detr_fast.kernels.dropout import Dropout, scale
from detr_fast.kernels.product_tiles import has_product_in_fp32
from detr_fast.ops import regimes
from detr_fast.ops.boundary import define, wants_grad
from detr_fast.ops.dropout import keep_mask
from detr_fast.ops.layouts import Layouts, aligned

MEASURED_WIDTH, MEASURED_HIDDEN = 256, 2048  # of what `tune` measures, and `auto` takes nothing beyond: DETR's


@dataclass(frozen=True)
class ProductCall(Call):
    """A call around x @ w^T.

    dtypes, layouts: those of all tensors, None where one is left out. misfit: what shapes, devices or dtypes do not fit each
    other.
    """

    rows: int
    width: int  # of x
    columns: int  # of the result
    dtypes: tuple[torch.dtype | None, ...]
    dropout: bool
    exact_fp32: bool
    misfit: str | None
    layouts: Layouts

    def shapes(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return f"({self.rows}, {self.width}) -> {self.columns} {name}" + (" dropout" if self.dropout else "")

    @property
    def widest(self) -> int:
        """The longest row of all matrices."""
        return max(self.width, self.columns)

    @property
    def computed_dtype(self) -> torch.dtype:
        """Of the product: x's, or autocast's."""
        return self.situation.autocast or self.dtype


class TritonProduct(TritonImplementation):
    """What all kernels around a matrix product have in common."""

    op: str

    def why_not(self, call: Any) -> str | None:
        if call.misfit is not None:
            return call.misfit
        if call.computed_dtype not in (self.dtypes or ()):
            return f"autocast to {call.computed_dtype}: it takes bfloat16, float16 and float32"
        if call.rows >= 1 << 31:
            return f"{call.rows} rows: it takes fewer than 2**31"
        if call.widest > rows.MAX_ROW_STRIDE:
            return f"rows of {call.widest} elements: it takes up to {rows.MAX_ROW_STRIDE}"
        return None

    def least(self, architecture: str | None, *kind: Any) -> int:
        return self._least(self.op, architecture)

    def _least(self, regime: str, architecture: str | None) -> int:
        return regimes.least(regime, architecture) if self._measured(regime, architecture) else NEVER

    def _measured(self, regime: str, architecture: str | None) -> bool:
        """Whether on this very architecture: against cuBLAS another one's measurement says nothing."""
        entry = regimes.find(regime, architecture)
        return entry is not None and entry.architecture == architecture

    def regime(self, call: Any) -> str:
        """The name of the measurements that a call goes by."""
        return self.op

    def advice(self, call: Any) -> str | None:
        if call.situation.regime == "compiled":
            return "under torch.compile cuBLAS and Inductor's own fusion do this"
        if call.situation.regime == "layer":
            return None
        if call.computed_dtype == torch.float32:
            how = "exact float32 products" if call.exact_fp32 else "tf32 products, which were never measured"
            return f"{how}: cuBLAS does them (under autocast, or in 16 bits, kernels can be chosen)"
        if not self._measured(self.regime(call), call.architecture):
            return "a matrix product against cuBLAS stays eager until measured: run detr-fast tune"
        return self.beyond_measured(call) or regimes.advice(
            self.regime(call), call, call.rows * call.width * call.computed_dtype.itemsize
        )

    def beyond_measured(self, call: Any) -> str | None:
        """What of a call is larger than what `detr-fast tune` measures."""
        if call.width > MEASURED_WIDTH:
            return f"{call.width} columns: measured, and chosen, up to {MEASURED_WIDTH}; ask for it by name"
        return None

    def prepare(self, call: Any) -> None:
        launch.compile_launches(lambda: self.rehearse(call), call.device)

    @abstractmethod
    def rehearse(self, call: Any) -> None:
        """Forward, and backward where a gradient is needed, of such a call on meta tensors."""

    def note(self, call: Any) -> str | None:
        return regimes.note(self.regime(call), call)

    def compiled_key(self, call: Any) -> Any:
        few = call.rows if call.rows < 1 << 16 else -1
        return (
            call.device,
            call.dtypes,
            few,
            call.width,
            call.columns,
            call.dropout,
            call.needs_grad,
            aligned(call.layouts),
        )


@torch.compiler.assume_constant_result
def exact_fp32() -> bool:
    """Whether float32 products must not round to tf32."""
    # Not `get_float32_matmul_precision`, which raises where the newer setting was used.
    return bool(torch._C._get_fp32_precision_getter("cuda", "matmul") != "tf32")


def shape_misfit(expected: dict[str, tuple[Tensor | None, tuple[int, ...]]], device: torch.device) -> str | None:
    """What shape or device does not fit, of name: (tensor, the shape it must have)."""
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            return f"{name} has shape {tuple(tensor.shape)}; expected {shape}"
        if tensor.device != device:
            return f"{name} is on {tensor.device}; expected {device}, where the input is"
    return None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of products of x, or None where it is off or leaves them alone (float64)."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as torch's own product would take them under autocast; the first one says whether it is on."""
    dtype = autocast_dtype(tensors[0]) if tensors[0] is not None else None
    if dtype is None:
        return tensors
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def adds_in_fp32(x: Tensor | None, cast: Tensor | None) -> bool:
    """Whether a product's gradient for x, cast to 16 bits for it, is best added to x's in fp32, inside that product."""
    given = x is not None and cast is not None and cast is not x and x.dtype == torch.float32
    return given and has_product_in_fp32(cast)  # type: ignore[arg-type]


def meta(dtype: torch.dtype | None, *shape: int) -> Any:
    """A tensor of that shape which holds nothing, or None for no dtype."""
    return None if dtype is None else torch.empty(shape, dtype=dtype, device="meta")


def dropout_of(p: float, seed: Tensor | None, offset: int) -> Dropout | None:
    return None if seed is None else Dropout(seed, offset, p)


def is_batch(*arriving: Tensor | None) -> bool:
    """Whether one is a batch of gradients at once, of `is_grads_batched`: nothing can be written into others by it."""
    return not torch.compiler.is_compiling() and any(t is not None and _is_batch(t) for t in arriving)


_is_batch = torch._C._functorch.is_legacy_batchedtensor


def goes_by_eager_ops(*arriving: Tensor | None) -> bool:
    """Whether a backward must be PyTorch's operations, each with a result of its own: it is differentiated, or of a batch."""
    return torch.is_grad_enabled() or is_batch(*arriving)


def eager_gradients(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of `reference(*inputs)` that can, under `create_graph`, be differentiated again."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # A node of its own for each: the surrounding graph must not be walked here, and can be entered later.
        fresh = [t if t is None else t.view_as(t) if t.requires_grad else t.detach() for t in inputs]
        sources = [t for t, want in zip(fresh, wanted) if want and t is not None]
        if not sources:
            return [None] * len(fresh)
        y = reference(*fresh)
        found = iter(torch.autograd.grad(y, sources, dy.to(y.dtype), create_graph=again))
    return [next(found) if want and t is not None else None for t, want in zip(fresh, wanted)]


def eager_norm_gradients(upstream: Sequence[Tensor | None], xhat: Tensor, rstd: Tensor, weight: Tensor) -> Any:
    """Back through y = xhat * weight + bias, xhat being the sum s (..., C) less its mean times rstd (rows,).

    upstream: what arrives for y, s, xhat and rstd, or None. By operations of PyTorch's, to be differentiated by xhat and
    rstd, which stand for s: no sum need be kept for that. Returns the gradients of s, weight and bias, fp32.
    """
    dy, dsum, dxhat, drstd = (None if t is None else t.float() for t in upstream)
    xhat, row = xhat.float(), rstd.view(*xhat.shape[:-1], 1)
    d_weight, d_bias = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
    arriving = [] if dsum is None else [dsum]
    if dy is not None:
        d_weight, d_bias = flat(dy * xhat).sum(0), flat(dy).sum(0)
        dxhat = dy * weight if dxhat is None else dxhat + dy * weight
    if dxhat is not None:
        mean = dxhat.mean(-1, keepdim=True)
        arriving.append(row * (dxhat - mean - xhat * (dxhat * xhat).mean(-1, keepdim=True)))
    if drstd is not None:
        arriving.append(drstd.view_as(row) * row.square() * xhat / -xhat.shape[-1])
    return torch.stack(arriving).sum(0), d_weight, d_bias


def dropped(x: Tensor, seed: Tensor | None, offset: int, p: float, hidden: bool = False) -> Tensor:
    """What the kernels make of x (..., C) where they drop rows' elements; hidden: the inner dropout of a block."""
    if seed is None or p == 0.0:
        return x
    kept = keep_mask(seed, offset, p, 1 + hidden, prod(x.shape[:-1]), x.shape[-1], tiles=hidden)[-1]
    return torch.where(kept.view(x.shape), x * scale(p), 0.0)


def flat(tensor: Tensor) -> Tensor:
    """(..., C) as (rows, C)."""
    if tensor.ndim == 2:
        return tensor
    columns = tensor.shape[-1]
    rows = -1 if columns else prod(tensor.shape[:-1])  # without columns, nothing says how many
    return tensor.reshape(rows, columns)


def _sum_rows_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[-1])


def _sum_rows_autograd(x: Tensor) -> Tensor:
    return flat(x).sum(0) if wants_grad(x) else sum_rows.below(x)


# A bias's gradient, x (..., C): its sum over rows, (C,). On an H200 PyTorch's own sum of 6,800 x 768 in bf16 takes 15 µs.
sum_rows = define("sum_rows(Tensor x) -> Tensor", run=rows.sum_rows, fake=_sum_rows_fake, autograd=_sum_rows_autograd)
