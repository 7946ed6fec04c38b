# mypy: allow-incomplete-defs
"""Row-wise LayerNorm, forward and backward.

    y = (x - mean(x)) * rstd(x) * weight + bias,   rstd = 1 / sqrt(var(x) + eps)

    g = dy * weight,   xhat = (x - mean) * rstd
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),   dweight = sum over rows of dy * xhat,   dbias = sum of dy

x is (rows, C); mean and rstd are fp32 (rows,) and are all that the backward keeps besides x.
Source: Ba et al., 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .configs import LAYER_NORM_BACKWARD, LAYER_NORM_FORWARD, RowConfig
from .launch import Variant, compile_variant, empty, jit, launch, multiprocessors, pointer, tl

MAX_COLUMNS = 8192
MAX_ROW_STRIDE = 1 << 24


@jit
def _columns(C, BLOCK_C: tl.constexpr, FULL: tl.constexpr, VEC: tl.constexpr):
    """Column numbers (1, BLOCK_C), which of them exist (whole runs of VEC do, so accesses stay vectors), and 1 / C."""
    column = tl.arange(0, BLOCK_C)[None, :]
    if FULL:
        return column, tl.full((1, BLOCK_C), True, tl.int1), 1.0 / BLOCK_C
    return column, column // VEC < C // VEC, 1.0 / C


@jit
def _pointers(base, start, column, VEC: tl.constexpr):
    """base + start + column, a block whose runs of VEC elements each start at a multiple of their size or of 16 bytes."""
    pointers = base + (start + column)
    if VEC > 1:
        run: tl.constexpr = VEC * (base.dtype.element_ty.primitive_bitwidth // 8)
        pointers = tl.multiple_of(pointers, (1, 16 if run > 16 else run))
    return pointers


@jit
def _parameters(base, column, inside, VEC: tl.constexpr):
    """A weight or bias as fp32 (1, BLOCK_C)."""
    return tl.load(_pointers(base, 0, column, VEC), mask=inside, other=0.0).to(tl.float32)


@jit
def layer_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_stride: tl.int32,
    rows: tl.int64,
    C: tl.int32,
    eps: tl.float32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS  # rows * C can pass 2**31; offsets from the first row cannot
    row = tl.arange(0, ROWS)
    exists = row < tl.minimum(rows - first, ROWS).to(tl.int32)
    column, inside, inverse_c = _columns(C, BLOCK_C, FULL, VEC)
    mask = exists[:, None] & inside
    # Parameters come before x: the compiler then gives everything the layout of x, with whole rows in a warp.
    if weight_ptr is not None:
        weight = _parameters(weight_ptr, column, inside, VEC)
    if bias_ptr is not None:
        bias = _parameters(bias_ptr, column, inside, VEC)

    x_start = row[:, None] * x_row_stride
    x = tl.load(_pointers(x_ptr + first * x_row_stride, x_start, column, VEC), mask=mask, other=0.0).to(tl.float32)
    # Two passes over registers: the variance of large values with a small spread would drown in sum(x * x).
    mean = tl.sum(x, axis=1) * inverse_c
    centred = x - mean[:, None]
    if not FULL:
        centred = tl.where(inside, centred, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) * inverse_c + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= weight
    if bias_ptr is not None:
        y += bias

    y_stride = BLOCK_C if FULL else C
    y_start = row[:, None] * y_stride
    tl.store(_pointers(y_ptr + first * y_stride, y_start, column, VEC), y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + first + row, mean, mask=exists)
    tl.store(rstd_ptr + first + row, rstd, mask=exists)


@jit
def layer_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dy_row_stride: tl.int32,
    x_row_stride: tl.int32,
    rows: tl.int64,
    C: tl.int32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    """dweight and dbias are fp32 (programs, C): each program's sum over the rows that it visited."""
    row = tl.arange(0, ROWS)
    column, inside, inverse_c = _columns(C, BLOCK_C, FULL, VEC)
    dy_start, x_start = row[:, None] * dy_row_stride, row[:, None] * x_row_stride
    dx_stride = BLOCK_C if FULL else C
    if weight_ptr is not None:
        weight = _parameters(weight_ptr, column, inside, VEC)
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)

    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        first = tl.cast(tile, tl.int64) * ROWS
        exists = row < tl.minimum(rows - first, ROWS).to(tl.int32)
        mask = exists[:, None] & inside
        dy = tl.load(_pointers(dy_ptr + first * dy_row_stride, dy_start, column, VEC), mask=mask, other=0.0)
        x = tl.load(_pointers(x_ptr + first * x_row_stride, x_start, column, VEC), mask=mask, other=0.0)
        mean = tl.load(mean_ptr + first + row, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + first + row, mask=exists, other=0.0)

        # Where there is no element, dy = 0 takes xhat out of every sum.
        xhat = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        dy = dy.to(tl.float32)
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            g = dy
            if weight_ptr is not None:
                g *= weight
            # rstd goes into the two means: two multiply-adds an element remain.
            mean_g = tl.sum(g, axis=1) * (inverse_c * rstd)
            mean_gx = tl.sum(g * xhat, axis=1) * (inverse_c * rstd)
            dx = g * rstd[:, None] - (xhat * mean_gx[:, None] + mean_g[:, None])
            dx_pointers = _pointers(dx_ptr + first * dx_stride, row[:, None] * dx_stride, column, VEC)
            tl.store(dx_pointers, dx.to(dx_ptr.dtype.element_ty), mask=mask)

    partial = tl.program_id(0).to(tl.int64) * dx_stride
    if dweight_ptr is not None:
        tl.store(_pointers(dweight_ptr + partial, 0, column, VEC), tl.sum(dweight, axis=0)[None, :], mask=inside)
    if dbias_ptr is not None:
        tl.store(_pointers(dbias_ptr + partial, 0, column, VEC), tl.sum(dbias, axis=0)[None, :], mask=inside)


@jit
def sum_partials_kernel(
    partial_ptr,
    first_ptr,
    second_ptr,
    programs: tl.int32,
    C: tl.int32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum partial (1 or 2, programs, C), fp32, over programs, always in one order, into first and second (C,)."""
    which = tl.program_id(1)
    total_ptr = first_ptr
    if which == 1:
        total_ptr = second_ptr
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)[:, None]
        partial = partial_ptr + (which.to(tl.int64) * programs + program) * C + column
        total += tl.load(partial, mask=(program < programs) & (column < C), other=0.0)
    total = tl.sum(total, axis=0)[None, :].to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + column, total, mask=column < C)


def layer_norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last dimension of x (..., C), 1 <= C <= 8,192.

    weight, bias: (C,) in fp32 or x's dtype, or None. out_dtype: of y; x's where None (autocast wants fp32).
    Returns y (..., C), contiguous, and mean and rstd, fp32 (rows,). Raises ValueError for another number of columns.
    """
    x, x_stride = as_rows(x)
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    y = empty(x.shape, out_dtype or x.dtype, x.device)
    mean = empty((rows,), torch.float32, x.device)
    rstd = empty((rows,), torch.float32, x.device)
    vector = _vector(x.element_size(), x_stride | columns, x.data_ptr() | _address(weight) | _address(bias))
    variant = forward_variant(columns, x.dtype, _dtype(weight), _dtype(bias), y.dtype, vector)
    grid = (-(-rows // variant.constants["ROWS"]),)
    launch(variant, grid, x, weight, bias, y, mean, rstd, x_stride, rows, columns, eps)
    return y, mean, rstd


def layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    with_dx: bool = True,
    with_dw: bool = True,
    with_db: bool = True,
    parameter_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `layer_norm_forward`: dx (..., C) in x's dtype, dweight and dbias (C,).

    dy, x: (..., C), any layout. mean, rstd: what the forward returned. parameter_dtype: of dweight and dbias; weight's
    where None. Deterministic: sums are always taken in the same order on the same GPU.
    """
    if not (with_dx or with_dw or with_db):
        return None, None, None
    dy, dy_stride = as_rows(dy)
    x, x_stride = as_rows(x)
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    parameter_dtype = parameter_dtype or (x.dtype if weight is None else weight.dtype)

    addresses = x.data_ptr() | dy.data_ptr() | _address(weight)
    vector = _vector(min(x.element_size(), dy.element_size()), x_stride | dy_stride | columns, addresses)
    variant = backward_variant(columns, dy.dtype, x.dtype, _dtype(weight), with_dx, with_dw, with_db, vector)
    tiles = -(-rows // variant.constants["ROWS"])
    programs = min(tiles, multiprocessors(x.device) * LAYER_NORM_BACKWARD[_block(columns)].programs)

    dx = empty(x.shape, x.dtype, x.device) if with_dx else None
    sums = [empty((columns,), parameter_dtype, x.device) for wanted in (with_dw, with_db) if wanted]
    partial = empty((len(sums), programs, columns), torch.float32, x.device) if sums else None
    dw_partial = partial[0] if partial is not None and with_dw else None
    db_partial = partial[-1] if partial is not None and with_db else None
    sizes = (dy_stride, x_stride, rows, columns)
    launch(variant, (programs,), dy, x, weight, mean, rstd, dx, dw_partial, db_partial, *sizes)
    if partial is not None:
        variant = sum_partials_variant(columns, parameter_dtype)
        grid = (-(-columns // variant.constants["BLOCK_C"]), len(sums))
        launch(variant, grid, partial, sums[0], sums[-1], programs, columns)
    return dx, sums[0] if with_dw else None, sums[-1] if with_db else None


def compile_layer_norm(
    columns: int,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    has_bias: bool,
    needs_grad: bool,
    device: torch.device,
    out_dtype: torch.dtype | None = None,
    aligned: bool = True,
) -> None:
    """Compile what `layer_norm_forward`, and with needs_grad the full backward, launches for such tensors.

    aligned: every tensor and row starts at a multiple of 16 bytes. A failing compilation raises here, before any work.
    """
    out_dtype = out_dtype or x_dtype
    bias_dtype = (weight_dtype or x_dtype) if has_bias else None
    vector = 16 // x_dtype.itemsize
    vector = vector if aligned and columns % vector == 0 else 1
    compile_variant(forward_variant(columns, x_dtype, weight_dtype, bias_dtype, out_dtype, vector), device)
    if needs_grad:
        affine = weight_dtype is not None
        backward = backward_variant(columns, out_dtype, x_dtype, weight_dtype, True, affine, has_bias, vector)
        compile_variant(backward, device)
        if affine or has_bias:
            compile_variant(sum_partials_variant(columns, weight_dtype or x_dtype), device)


@cache
def forward_variant(
    columns: int,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    vector: int,
) -> Variant:
    """The program that normalises rows of `columns` columns, read in runs of `vector` elements."""
    config = LAYER_NORM_FORWARD[_block(columns)]
    tensors = (x_dtype, weight_dtype, bias_dtype, out_dtype, torch.float32, torch.float32)
    types = (*map(pointer, tensors), "i32", "i64", "i32", "fp32")
    return Variant(layer_norm_forward_kernel, types, _constants(columns, config, vector), config.num_warps)


@cache
def backward_variant(
    columns: int,
    dy_dtype: torch.dtype,
    x_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    with_dx: bool,
    with_dw: bool,
    with_db: bool,
    vector: int,
) -> Variant:
    """The program that takes all gradients in one pass over dy and x."""
    config = LAYER_NORM_BACKWARD[_block(columns)]
    fp32 = torch.float32
    tensors = (dy_dtype, x_dtype, weight_dtype, fp32, fp32, x_dtype if with_dx else None)
    sums = (fp32 if with_dw else None, fp32 if with_db else None)
    types = (*map(pointer, (*tensors, *sums)), "i32", "i32", "i64", "i32")
    return Variant(layer_norm_backward_kernel, types, _constants(columns, config, vector), config.num_warps)


@cache
def sum_partials_variant(columns: int, dtype: torch.dtype) -> Variant:
    """The program that adds up the partial weight and bias gradients."""
    types = (pointer(torch.float32), pointer(dtype), pointer(dtype), "i32", "i32")
    # Narrow blocks spread few columns over many multiprocessors; many columns do so with wide ones.
    block = 32 if columns <= 1024 else 128
    return Variant(sum_partials_kernel, types, {"ROWS": 32, "BLOCK_C": block}, num_warps=4)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x and the distance of its rows in elements; a contiguous copy where rows lie at no constant distance.

    Also where the distance is over 2**24, so that offsets inside a tile of up to 128 rows fit 32 bits.
    """
    columns = x.shape[-1]
    if x.is_contiguous():
        return x, columns
    distance = columns if x.shape[:-1].numel() == 1 else None
    end = 0  # the stride that a further leading dimension must have
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if distance is None:
            distance = stride
        elif stride != end:
            return x.contiguous(), columns
        end = size * stride
    assert distance is not None  # a tensor without rows is contiguous
    if distance > MAX_ROW_STRIDE or (columns > 1 and x.stride(-1) != 1):
        return x.contiguous(), columns
    return x, distance


def _vector(element_size: int, strides: int, addresses: int) -> int:
    """Elements a run: 16 bytes of the narrowest tensor where all runs are aligned, else 1.

    strides, addresses: all of them or-ed together, which is a multiple of a power of two where each of them is.
    """
    vector = 16 // element_size
    return vector if addresses % 16 == 0 and strides % vector == 0 else 1


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _block(columns: int) -> int:
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"LayerNorm over {columns} columns: the kernels take 1 to {MAX_COLUMNS}; use eager")
    return max(16, 1 << (columns - 1).bit_length())


def _constants(columns: int, config: RowConfig, vector: int) -> dict[str, int | bool]:
    block = _block(columns)
    # Without vectors each element has an address and a mask of its own, and full tiles spill.
    rows = config.rows if vector > 1 else max(1, config.rows // 2)
    return {"ROWS": rows, "BLOCK_C": block, "FULL": columns == block, "VEC": vector}


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype
