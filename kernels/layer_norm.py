# mypy: allow-incomplete-defs
"""Row-wise LayerNorm, forward and backward.

    y = (x - mean(x)) * rstd(x) * weight + bias,   rstd = 1 / sqrt(var(x) + eps)

    g = dy * weight,   xhat = (x - mean) * rstd
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),   dweight = sum over rows of dy * xhat,   dbias = sum of dy

x is (rows, C); mean and rstd are fp32 (rows,) and are all that the backward keeps besides x.
Source: Ba et al., 2016, arXiv:1607.06450.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .configs import LAYER_NORM_BACKWARD, LAYER_NORM_FORWARD, RowConfig
from .launch import Variant, compile_variant, empty, jit, launch, multiprocessors, pointer, tl

MAX_COLUMNS = 8192


@jit
def _aligned(pointers, VEC: tl.constexpr):
    """State that each run of VEC elements in a (rows, columns) block of pointers starts at a multiple of its size."""
    if VEC > 1:
        run: tl.constexpr = VEC * (pointers.dtype.element_ty.primitive_bitwidth // 8)
        pointers = tl.multiple_of(pointers, (1, 16 if run > 16 else run))
    return pointers


@jit
def _columns(C, BLOCK_C: tl.constexpr, FULL: tl.constexpr, VEC: tl.constexpr):
    """Column numbers (1, BLOCK_C) and which of them exist; whole runs of VEC do, so that accesses stay vectors."""
    column = tl.arange(0, BLOCK_C)[None, :]
    if FULL:
        return column, tl.full((1, BLOCK_C), True, tl.int1)
    return column, column // VEC < C // VEC


@jit
def _row_of_parameters(pointer, column, inside, VEC: tl.constexpr):
    return tl.load(_aligned(pointer + column, VEC), mask=inside, other=0.0).to(tl.float32)


@jit
def layer_norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_row_stride: tl.int64,
    rows: tl.int64,
    C: tl.int32,
    eps: tl.float32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # rows * C can pass 2**31
    column, inside = _columns(C, BLOCK_C, FULL, VEC)
    exists = row < rows
    mask = exists[:, None] & inside

    x = tl.load(_aligned(x_ptr + row[:, None] * x_row_stride + column, VEC), mask=mask, other=0.0).to(tl.float32)
    # Two passes over registers: the variance of large values with a small spread would drown in sum(x * x).
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= _row_of_parameters(weight_ptr, column, inside, VEC)
    if bias_ptr is not None:
        y += _row_of_parameters(bias_ptr, column, inside, VEC)

    tl.store(mean_ptr + row, mean, mask=exists)
    tl.store(rstd_ptr + row, rstd, mask=exists)
    tl.store(_aligned(y_ptr + row[:, None] * C + column, VEC), y.to(y_ptr.dtype.element_ty), mask=mask)


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
    dy_row_stride: tl.int64,
    x_row_stride: tl.int64,
    rows: tl.int64,
    C: tl.int32,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    FULL: tl.constexpr,
    VEC: tl.constexpr,
):
    """dweight and dbias are fp32 (programs, C): each program's sum over the rows that it visited."""
    column, inside = _columns(C, BLOCK_C, FULL, VEC)
    if weight_ptr is not None:
        weight = _row_of_parameters(weight_ptr, column, inside, VEC)
    dweight = tl.zeros((ROWS, BLOCK_C), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), tl.float32)

    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        exists = row < rows
        mask = exists[:, None] & inside
        dy = tl.load(_aligned(dy_ptr + row[:, None] * dy_row_stride + column, VEC), mask=mask, other=0.0).to(tl.float32)
        x = tl.load(_aligned(x_ptr + row[:, None] * x_row_stride + column, VEC), mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=exists, other=0.0)

        # Where there is no element, dy = 0 takes xhat out of every sum.
        xhat = (x - mean[:, None]) * rstd[:, None]
        if dweight_ptr is not None:
            dweight += dy * xhat
        if dbias_ptr is not None:
            dbias += dy
        if dx_ptr is not None:
            g = dy
            if weight_ptr is not None:
                g *= weight
            mean_g = tl.sum(g, axis=1) / C
            mean_gx = tl.sum(g * xhat, axis=1) / C
            dx = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
            tl.store(_aligned(dx_ptr + row[:, None] * C + column, VEC), dx.to(dx_ptr.dtype.element_ty), mask=mask)

    partial = tl.program_id(0).to(tl.int64) * C + column
    if dweight_ptr is not None:
        tl.store(_aligned(dweight_ptr + partial, VEC), tl.sum(dweight, axis=0)[None, :], mask=inside)
    if dbias_ptr is not None:
        tl.store(_aligned(dbias_ptr + partial, VEC), tl.sum(dbias, axis=0)[None, :], mask=inside)


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
    vector = _vector([x], [x_stride, columns], weight, bias)
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

    vector = _vector([x, dy], [x_stride, dy_stride, columns], weight)
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
    types = (*map(pointer, tensors), "i64", "i64", "i32", "fp32")
    return Variant(layer_norm_forward_kernel, types, _constants(columns, config, vector), config.num_warps)


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
    types = (*map(pointer, (*tensors, *sums)), "i64", "i64", "i64", "i32")
    return Variant(layer_norm_backward_kernel, types, _constants(columns, config, vector), config.num_warps)


def sum_partials_variant(columns: int, dtype: torch.dtype) -> Variant:
    """The program that adds up the partial weight and bias gradients."""
    types = (pointer(torch.float32), pointer(dtype), pointer(dtype), "i32", "i32")
    # Narrow blocks spread few columns over many multiprocessors; many columns do so with wide ones.
    block = 32 if columns <= 1024 else 128
    return Variant(sum_partials_kernel, types, {"ROWS": 32, "BLOCK_C": block}, num_warps=4)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x and the distance of its rows in elements; a contiguous copy where rows lie at no constant distance."""
    columns = x.shape[-1]
    if x.is_contiguous():
        return x, columns
    distance = None
    end = 0  # the stride that a further leading dimension must have
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1])):
        if size == 1:
            continue
        if distance is None:
            distance = stride
        elif stride != end:
            return x.contiguous(), columns
        end = size * stride
    if columns > 1 and x.stride(-1) != 1:
        return x.contiguous(), columns
    return x, columns if distance is None else distance


def _vector(tensors: list[Tensor], strides: list[int], *parameters: Tensor | None) -> int:
    """Elements a run: 16 bytes of the narrowest tensor where all runs are aligned, else 1."""
    vector = 16 // min(tensor.element_size() for tensor in tensors)
    addresses = [tensor.data_ptr() for tensor in (*tensors, *parameters) if tensor is not None]
    aligned = all(address % 16 == 0 for address in addresses) and all(stride % vector == 0 for stride in strides)
    return vector if aligned else 1


def _block(columns: int) -> int:
    if not 1 <= columns <= MAX_COLUMNS:
        raise ValueError(f"LayerNorm over {columns} columns: the kernels take 1 to {MAX_COLUMNS}; use eager")
    return max(16, 1 << (columns - 1).bit_length())


def _constants(columns: int, config: RowConfig, vector: int) -> dict[str, int | bool]:
    block = _block(columns)
    return {"ROWS": config.rows, "BLOCK_C": block, "FULL": columns == block, "VEC": vector}


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype
