# mypy: allow-incomplete-defs
"""Fused attention, backward, in two deterministic launches, and the gradient of a float mask in a third.

    w = exp(scale * q @ k^T + mask) / 2^lse,   d = dropout's factor (0 or 1 / (1 - p); 1 without dropout)
    dv = (w * d)^T @ dout,   dw = d * (dout @ v^T),   ds = w * (dw - delta),   delta = sum over Ev of dout * out - log2(e) * dlse
    dq = scale * ds @ k,   dk = scale * ds^T @ q,   dmask = sum of ds over the dimensions that the mask is broadcast over

The kernel of the queries owns BLOCK_M queries, passes over the keys as the forward does, and writes dq and the rows' statistics
(lse and delta), which the kernel of the keys reads: it owns BLOCK_N keys and passes over the queries. There, rows of hidden
keys are zero on loading and on storing, and need no mask in between: a key's row of dk and dv meets no other key.
Source: Dao, 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .attention import cut_rows, empty_rows
from .attention_backward_keys import attention_backward_keys_kernel
from .attention_backward_mask import attention_backward_mask_kernel
from .attention_backward_queries import attention_backward_queries_kernel
from .attention_copies import copy_rows, copy_variants
from .attention_problem import COMMON_TYPES, PACKED_TYPES, PLACE_TYPES, Form, Problem, places
from .attention_split import Parts, combine_variant, key_parts
from .launch import Variant, empty, launch, multiprocessors, pointer
from .rows import sum_partials, sum_partials_variant

# Heads of batch elements that a program of the mask's gradient passes over, where several share a tile.
LEAST_SHARED = 8


def attention_backward(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None = None,
    *,
    with_mask: bool = False,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk and dv, laid out over batch and rows as q, k and v are, in rows of whole runs, and with_mask dmask, contiguous, else None.

    out, lse: what the forward returned; dout, dlse: the gradients that arrive for them, in any layout.
    into: where to write dq, dk and dv, in rows of whole runs.
    """
    form = problem.form()
    out, dout, dlse, statistics, (dq, dk, dv) = ready(problem, form, out, lse, dout, dlse, into)
    rows = form.config("queries").rows
    parts = key_parts(problem, rows, dq.device)
    split = Parts(parts, problem, dq) if parts > 1 else None
    tensors = (problem.q, problem.k, problem.v, out, dout, dq if split is None else split.tensor)
    strides = [stride for tensor in tensors for stride in places(tensor)]
    of_rows = (lse, dlse, statistics, problem.key_list())
    packed, counts = problem.packed(problem.q, parts > 1)
    inputs = (*of_rows, *problem.tensors(), *packed)
    arguments = (*tensors, *inputs, *strides, *problem.sizes(), problem.scale, *counts)
    exact = with_mask and parts == 1 and form.dtype != torch.float32  # where shared, no program sees a row whole
    launch(queries_variant(form, dlse is not None, parts > 1, exact), (problem.tiles(rows), parts), *arguments)
    if split is not None:
        split.combine(form)

    launch_keys(problem, form, dout, statistics, dk, dv)
    return *cut_gradients(problem, dq, dk, dv), _mask_gradient(problem, form, statistics, dout) if with_mask else None


def ready(
    problem: Problem,
    form: Form,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    into: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, tuple[Tensor, ...]]:
    """What a backward's launches read and write: out, dout and dlse as they can be read, statistics, (dq, dk, dv)."""
    dims = (problem.head_dim, problem.head_dim, problem.value_dim)
    gradients = into or (empty_rows(t, dim) for t, dim in zip(problem.given, dims))
    statistics = empty((2, *lse.shape), torch.float32, lse.device)
    out, dout = copy_rows(problem, out, dout)
    return out, dout, None if dlse is None else dlse.contiguous(), statistics, tuple(gradients)


def cut_gradients(problem: Problem, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With as many columns as q, k and v have."""
    q, k, v = problem.given
    return cut_rows(dq, q.shape[3]), cut_rows(dk, k.shape[3]), cut_rows(dv, v.shape[3])


def launch_keys(
    problem: Problem,
    form: Form,
    dout: Tensor,
    statistics: Tensor,
    dk: Tensor,
    dv: Tensor,
    sums: Tensor | None = None,
) -> None:
    """Launch the kernel that writes dk and dv, and adds dq to fp32 sums where there are some."""
    variant = keys_variant(form, sums is not None)
    tensors = (problem.q, problem.k, problem.v, dout, dk, dv, sums)
    strides = [stride for tensor in tensors for stride in places(tensor)]
    grid = (-(-problem.keys // variant.constants["BLOCK_N"]) * problem.batch * problem.k.shape[2],)
    packed, counts = problem.packed(problem.k)
    inputs = (statistics, *problem.tensors(), *packed)
    launch(variant, grid, *tensors, *inputs, *strides, *problem.sizes(), problem.scale, *counts)


def _mask_gradient(problem: Problem, form: Form, statistics: Tensor, dout: Tensor) -> Tensor:
    assert problem.given_mask is not None
    shape, dtype = problem.given_mask.shape, problem.given_mask.dtype
    variant, grid = _mask_launch(problem, form, shape, dout.device)
    split = grid[1] > 1
    dmask = empty((grid[1], shape.numel()) if split else shape, torch.float32 if split else dtype, dout.device)
    tensors = (problem.q, problem.k, problem.v, dout)
    strides = [stride for tensor in tensors for stride in places(tensor)]
    sizes = (*problem.sizes(), problem.batch, *_four(shape)[:2])
    packed, _ = problem.packed(problem.q)
    launch(variant, grid, *tensors, dmask, statistics, *problem.tensors(), *packed, *strides, *sizes)
    if split:
        (dmask,) = sum_partials((dmask, dtype))  # type: ignore[assignment]
    return dmask.view(shape)


def _four(shape: Sequence[int]) -> tuple[int, ...]:
    """A mask's batch elements, heads, rows and columns."""
    return ((1,) * 4 + tuple(shape))[-4:]


def _mask_launch(
    problem: Problem, form: Form, shape: Sequence[int], device: torch.device
) -> tuple[Variant, tuple[int, int]]:
    """The program that takes the gradient of a mask of that shape, and its grid: tiles, and programs that share each.

    Several do where tiles are few and shared by many heads or batch elements: of the bias that all of Swin's windows share, there are
    a few tiles for each head, whose programs would pass over thousands of windows one by one.
    """
    batches, heads, rows, columns = _four(shape)
    # A dimension of size 1 is not shared, but summing over it is the same.
    shared = rows == 1, columns == 1
    variant = mask_variant(form, *shared)
    tiles = batches * heads
    for size, block in ((rows, "BLOCK_M"), (columns, "BLOCK_N")):
        tiles *= 1 if size == 1 else -(-size // int(variant.constants[block]))
    sharing = problem.batch // max(1, batches) * (1 if heads > 1 else problem.heads)
    # Two of the three programs that a multiprocessor has room for.
    parts = max(1, min(2 * multiprocessors(device) // max(1, tiles), sharing // LEAST_SHARED))
    return variant if parts == 1 else mask_variant(form, *shared, split=True), (tiles, parts)


def backward_variants(
    problem: Problem, device: torch.device, with_dlse: bool = False, with_mask: bool = False
) -> list[Variant]:
    """All that `attention_backward` launches on `device`, but the gradient of a mask; with_dlse: with dlse or without."""
    form = problem.form()
    split = key_parts(problem, form.config("queries").rows, device) > 1
    exact = with_mask and not split and form.dtype != torch.float32
    variants = [queries_variant(form, dlse, split, exact) for dlse in ((False, True) if with_dlse else (False,))]
    if split:
        variants.append(combine_variant(form, problem.head_dim, False))
    return [*copy_variants(problem, backward=True), *variants, keys_variant(form)]


@cache
def queries_variant(form: Form, with_dlse: bool = False, split: bool = False, exact: bool = False) -> Variant:
    """The program that takes dq and the rows' statistics; split: with parts of dq as its result; exact: see the kernel."""
    fp32, listed = torch.float32, torch.int32 if form.padding else None
    rows = (fp32, fp32 if with_dlse else None, fp32, listed)
    tensors = (*(form.dtype,) * 5, fp32 if split else form.dtype)
    more, warps = {"UNIFORM": form.uniform, "PAIRED": form.paired, "EXACT": exact}, form.spread_over("queries")
    return _variant(attention_backward_queries_kernel, "queries", form, tensors, rows, **more, WARPS=warps)


@cache
def keys_variant(form: Form, atomics: bool = False) -> Variant:
    """The program that takes dk and dv; atomics: and adds up dq."""
    tensors = (*(form.dtype,) * 6, torch.float32 if atomics else None)
    kernel = "atomics" if atomics else "keys"
    frugal = form.frugal_keys(atomics)
    more = {"UNIFORM": form.uniform_keys, "PAIRED": form.paired, "ONE_CHOICE": form.one_choice}
    more |= {"FRUGAL": frugal, "ONE_SEED": form.one_seed(frugal)}
    more["COUNTED"] = frugal and form.counted_keys(atomics)
    return _variant(
        attention_backward_keys_kernel, kernel, form, tensors, (torch.float32,), **more, WARPS=form.spread_over(kernel)
    )


def _variant(
    kernel: object,
    name: str,
    form: Form,
    tensors: tuple[torch.dtype | None, ...],
    rows: tuple[torch.dtype | None, ...],
    **more: int,
) -> Variant:
    """tensors: dtypes of those that have a place; rows: of what has an element for each row."""
    config = form.config(name)
    dtypes = (*tensors, *rows, *form.masks(), *form.ends())
    types = (*map(pointer, dtypes), *PLACE_TYPES * len(tensors), *COMMON_TYPES, "fp32", *PACKED_TYPES)
    constants = {"BLOCK_M": config.rows, "BLOCK_N": config.columns, **form.constants(), **more}
    return Variant(kernel, types, constants, config.num_warps, config.num_stages, config.registers)


def mask_variants(problem: Problem, shape: Sequence[int], device: torch.device) -> list[Variant]:
    """All that the gradient of a mask of that shape launches on `device`."""
    form = problem.form()
    variant, (_, parts) = _mask_launch(problem, form, shape, device)
    if parts == 1:
        return [variant]
    assert form.mask is not None
    return [variant, sum_partials_variant(math.prod(shape), form.mask)]


@cache
def mask_variant(form: Form, shared_rows: bool, shared_columns: bool, split: bool = False) -> Variant:
    """The program that takes the gradient of a float mask; split: with parts of it as its result."""
    config = form.config("shared_mask" if shared_rows else "mask")
    result = torch.float32 if split else form.mask
    tensors = (*(form.dtype,) * 4, result, torch.float32, *form.masks(), *form.ends())
    types = (*map(pointer, tensors), *PLACE_TYPES * 4, *COMMON_TYPES, "i32", "i32", "i32")
    shared = {"SHARED_ROWS": shared_rows, "SHARED_COLUMNS": shared_columns}
    constants = {**shared, "BLOCK_M": config.rows, "BLOCK_N": config.columns, **form.constants(), "PAIRED": form.paired}
    tile = config.num_warps, config.num_stages, config.registers
    return Variant(attention_backward_mask_kernel, types, constants, *tile)
