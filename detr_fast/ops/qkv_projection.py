"""Queries, keys and values in one product, with a position that only queries and keys see, which is never added up in memory.

The contract, its eager reference, its Triton kernel; and `project`, which layers use.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Implementation, Op, Situation
from detr_fast.kernels import rows as row_kernels
from detr_fast.kernels.linear import linear_forward
from detr_fast.kernels.product_tiles import plus_product
from detr_fast.ops.boundary import define, wants_grad
from detr_fast.ops.layouts import key, layouts, rehearsed
from detr_fast.ops.products import (
    ProductCall,
    TritonProduct,
    adds_in_fp32,
    autocast,
    autocast_dtype,
    exact_fp32,
    flat,
    goes_by_eager_ops,
    shape_misfit,
    sum_rows,
)
from detr_fast.ops.regimes import bytes_of
from detr_fast.ops.rounded import rounded

TILE = 128  # columns that one program of the kernel covers at most


def qkv_projection(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position: Tensor | None = None,
    position_columns: int | None = None,
) -> Tensor:
    """(x + position) @ weight^T + bias in the first `position_columns` columns, x @ weight^T + bias in the others.

    Shapes: x (..., C), weight (N, C), bias (N,), position (..., C), whose rows repeat along those of x ((L, C) or (1, L, C)
    for x (B, L, C)); the result is (..., N) in x's dtype (autocast's under autocast). position_columns: two thirds of N
    where None: queries and keys, for the weight of torch.nn.MultiheadAttention's in_proj_weight, (3 * C, C); the result,
    as (B, L, 3, H, E), is what attention reads in place. Raises ValueError for position_columns outside [0, N],
    RuntimeError where shapes do not fit, with torch's own message; BackendError as `use_backend` says.
    Source: Carion et al., 2020, arXiv:2005.12872, section A.3.
    """
    rows = weight.shape[0]
    columns = rows * 2 // 3 if position_columns is None else position_columns
    if not 0 <= columns <= rows:
        raise ValueError(f"got position_columns {columns}; expected 0 to the {rows} rows of the weight")
    arguments = (x, weight, bias, position, columns)
    return QKV_PROJECTION(*arguments) if dispatch.intervening or x.is_cuda else _eager(*arguments)


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, columns: int) -> Tensor:
    if position is None or columns == 0:
        return F.linear(x, weight, bias)
    if columns == weight.shape[0]:
        return F.linear(x + position, weight, bias)
    sizes = [columns, weight.shape[0] - columns]
    biases = (None, None) if bias is None else bias.split(sizes)
    return torch.cat([F.linear(t, w, b) for t, w, b in zip((x + position, x), weight.split(sizes), biases)], -1)


@dataclass(frozen=True)
class QkvCall(ProductCall):
    position: bool
    position_columns: int
    bias_grad: bool

    def shapes(self) -> str:
        return super().shapes() + (f" position in {self.position_columns}" if self.position else "")


def _signature(x: Tensor, *rest: Any) -> tuple[Any, ...]:
    *tensors, columns = rest
    return (key(x), *map(key, tensors), columns, exact_fp32())


def _describe(
    x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, columns: int, *, situation: Situation
) -> QkvCall:
    width, rows = x.shape[-1], weight.shape[0]
    tensors = (x, weight, bias, position)
    misfit = shape_misfit({"weight": (weight, (rows, width)), "bias": (bias, (rows,))}, x.device)
    if misfit is None and position is not None and not _repeats(position, x):
        misfit = f"position has shape {tuple(position.shape)}: its rows do not repeat along those of {tuple(x.shape)}"
    if misfit is None and autocast_dtype(x) is None:
        given = [t for t in tensors if t is not None]
        misfit = next((f"{t.dtype} beside {x.dtype} inputs" for t in given if t.dtype != x.dtype), None)
    return QkvCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type(tensors),
        needs_grad=wants_grad(*tensors),
        situation=situation,
        rows=prod(x.shape[:-1]),
        width=width,
        columns=rows,
        dtypes=tuple(None if t is None else t.dtype for t in tensors),
        dropout=False,
        exact_fp32=exact_fp32(),
        misfit=misfit,
        layouts=layouts(situation, *tensors),
        position=position is not None,
        position_columns=columns,
        bias_grad=wants_grad(bias),
    )


def _repeats(position: Tensor, x: Tensor) -> bool:
    """Whether position, (..., C), broadcasts to x by repeating its rows one behind the other."""
    shape = tuple(position.shape)
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return len(shape) <= x.ndim and shape == tuple(x.shape[x.ndim - len(shape) :])


class TritonQkvProjection(TritonProduct):
    op = "qkv_projection"

    def why_not(self, call: QkvCall) -> str | None:
        if call.position and call.position_columns not in (0, call.columns) and call.position_columns % TILE:
            return f"a position in {call.position_columns} of {call.columns} columns: it takes a multiple of {TILE}"
        return super().why_not(call)

    def rehearse(self, call: QkvCall) -> None:
        y = _run_forward(*rehearsed(call.layouts, call.computed_dtype), call.position_columns)  # type: ignore[call-arg]
        if call.bias_grad:
            row_kernels.sum_rows(y)

    def compiled_key(self, call: QkvCall) -> Any:
        return super().compiled_key(call), call.position

    def run(self, *arguments: Any) -> Tensor:
        *tensors, columns = arguments
        return _forward(*_cast(*tensors), columns)


class EagerQkvProjection(Implementation):
    name = "eager"

    def run(self, *arguments: Any) -> Tensor:
        return _eager(*arguments)


QKV_PROJECTION = Op(
    "qkv_projection",
    signature=_signature,
    describe=_describe,
    implementations=(TritonQkvProjection(), EagerQkvProjection()),
    work=bytes_of,
)


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None) -> tuple[Any, ...]:
    x, *rest = autocast(rounded(x), weight, bias)  # type: ignore[assignment]
    return x, *rest, None if position is None else rounded(position)


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None = None, columns: int = 0
) -> tuple[Tensor, Tensor] | None:
    """`qkv_projection`, and x to go on with: what arrives for it in the backward is added up inside a product.

    For a residual whose only use is a kernel's (that gradient's memory is written). None where there is no such product:
    a position in some of the columns, without the kernel.
    """
    implementation = QKV_PROJECTION.choose(x, weight, bias, position, columns)
    fused = isinstance(implementation, TritonQkvProjection)
    if not fused and position is not None and columns != weight.shape[0]:
        return None
    cast, w, b, added = _cast(x, weight, bias, position)
    repeats = position is None or _repeats(position, x)  # what the backward takes a position's rows to do
    follows = repeats and wants_grad(x) and (cast is x or adds_in_fp32(x, cast))
    if torch.compiler.is_compiling() or not follows:
        return implementation.run(cast, w, b, added, columns), x
    wide = position if adds_in_fp32(position, added) else None
    return _Projection.apply(x, cast, w, b, wide, added, columns, fused)


# ---------------------------------------------------------------------------------------------------------------------
# Registration. The backward's products are torch's own, in sight of dispatch modes and compilers.


def _run_forward(x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor | None, columns: int) -> Tensor:
    position = position if columns else None
    columns = -(-columns // TILE) * TILE  # whole tiles, where it is all of them
    return linear_forward(x, weight, bias, position=position, position_columns=columns)[0]


def _fake_forward(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _Projection(torch.autograd.Function):
    """With or without the kernel. With an x also returns that, whose gradient is where the product's is added.

    cast, cast_position: what is read; x and position: those in fp32 that were cast, or x itself, else None. Their gradients come in
    fp32 from the products, and the casts get none, but where the backward is differentiated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        cast: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        position: Tensor | None,
        cast_position: Tensor | None,
        columns: int,
        fused: bool,
    ) -> Any:
        arguments = (cast, weight, bias, cast_position, columns)
        if fused:
            y = _forward.below(*arguments)
        else:
            y = _eager(*arguments)
        ctx.save_for_backward(cast, weight, cast_position)
        ctx.columns, ctx.fused = columns if cast_position is not None else 0, fused
        ctx.wide = x is not None and x.dtype != cast.dtype
        ctx.set_materialize_grads(False)
        return y if x is None else (y, x.view_as(x))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, arrived: Tensor | None = None) -> Any:
        if dy is None:
            return (arrived, *(None,) * 7)
        cast, weight, position = ctx.saved_tensors
        taps, wants_cast, wants_weight, wants_bias, widens, wants_position = ctx.needs_input_grad[:6]
        rows = flat(dy)
        eagerly = goes_by_eager_ops(arrived, rows)
        dx = dcast = dw = db = dposition = dcast_position = None
        if taps and not (ctx.wide and eagerly):
            dx = _added(arrived, rows, weight, ctx.wide).view(cast.shape)
        elif wants_cast:
            dx, dcast = arrived, torch.mm(rows, weight).view(cast.shape)
        if wants_weight:
            dw = _weight_gradient(rows, cast, position, ctx.columns)
        if wants_position and ctx.columns:
            period = prod(position.shape[:-1])
            # By views that a batch of gradients knows: not `unflatten`, nor a slice of all there is.
            seen = rows if ctx.columns == rows.shape[1] else rows[:, : ctx.columns]
            seen = seen if period == len(rows) else seen.reshape(-1, period, ctx.columns).sum(0)
            if widens and not eagerly:
                dposition = plus_product(None, seen, weight[: ctx.columns]).view(position.shape)
            else:
                dcast_position = torch.mm(seen, weight[: ctx.columns]).view(position.shape)
        if wants_bias:
            db = sum_rows(rows) if ctx.fused and not eagerly else rows.sum(0)
        return dx, dcast, dw, db, dposition, dcast_position, None, None


def _added(arrived: Tensor | None, rows: Tensor, weight: Tensor, wide: bool) -> Tensor:
    if wide:  # in fp32: neither rounded nor added up once more
        return plus_product(None if arrived is None else flat(arrived.contiguous()), rows, weight)
    if arrived is None:
        return torch.mm(rows, weight)
    if goes_by_eager_ops(arrived, rows) or not arrived.is_contiguous():
        return torch.addmm(flat(arrived), rows, weight)
    return flat(arrived).addmm_(rows, weight)  # in place: out of place, cuBLAS would copy it first


def _weight_gradient(rows: Tensor, x: Tensor, position: Tensor | None, columns: int) -> Tensor:
    if position is None or columns == 0:
        return torch.mm(rows.t(), flat(x))
    positioned = flat(x + position)
    if columns == rows.shape[1]:
        return torch.mm(rows.t(), positioned)
    parts = zip(rows.split([columns, rows.shape[1] - columns], 1), (positioned, flat(x)))
    if goes_by_eager_ops(rows):
        return torch.cat([torch.mm(part.t(), inputs) for part, inputs in parts])
    dw = rows.new_empty(rows.shape[1], x.shape[-1])
    for (part, inputs), out in zip(parts, dw.split([columns, rows.shape[1] - columns])):
        torch.mm(part.t(), inputs, out=out)
    return dw


def _autograd_forward(*arguments: Any) -> Any:
    x, weight, bias, position, columns = arguments
    if wants_grad(*arguments[:4]):
        return _Projection.apply(None, x, weight, bias, None, position, columns, True)
    return _forward.below(*arguments)


_forward = define(
    "qkv_projection(Tensor x, Tensor weight, Tensor? bias, Tensor? position, int position_columns) -> Tensor",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
