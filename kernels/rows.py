# mypy: allow-incomplete-defs
"""What row-wise kernels share: blocks of rows and columns, pointers that move 16 bytes at a time, sums of partial sums.

Such a kernel works on a (ROWS, BLOCK_C) tile of a (rows, C) tensor whose rows lie at a constant distance. BLOCK_C is C
rounded up to a power of two; FULL says that they are equal; VEC is the number of neighbouring elements that all tensors
keep together at a multiple of 16 bytes (1 where some tensor does not).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .configs import RowConfig
from .launch import Variant, at_compile_time, empty, jit, launch, pointer, tl
from .overlap import wait_for_previous

MAX_BLOCK = 8192  # columns that a program holds at once; wide_rows.py goes over more in a loop
MAX_COLUMNS = 1 << 24
MAX_ROW_STRIDE = 1 << 23  # so that offsets inside a tile of up to 256 rows fit 32 bits
# Beyond, `sum_rows` shares rows out over programs: one would go over all for longer than a launch takes.
MANY_ROWS = 8192
MAX_PARTS = 65_535  # programs that share rows out: the grid's second dimension has no more
MAX_PLANS = 4096  # of each kind that are kept; shapes that vary for ever must not fill the memory


class Plan(NamedTuple):
    """A launch as far as shapes, strides, alignment and dtypes decide it: worked out once, and kept."""

    variant: Variant
    grid: tuple[int, ...]
    sizes: tuple[int, ...]  # the arguments behind the tensors


@at_compile_time
def is_scattered(block: int, vector: int) -> bool:
    """Whether 512 threads read a row one element at a time."""
    return vector == 1 and block == MAX_BLOCK


@jit
def scattered_columns(BLOCK_C: tl.constexpr):
    """Where a scattered block's parts of 512 neighbours start, (BLOCK_C // 512, 1), and each thread's column in them, (1, 512)."""
    # As one number, LLVM takes (thread & 511) | 512 for thread | 512, and no longer for a sum: every second element would have an
    # address of its own to work out, of two registers. Numbers of two widths Triton adds one after the other.
    return 512 * tl.arange(0, BLOCK_C // 512).to(tl.int64)[:, None], tl.arange(0, 512)[None, :]


@jit
def existing_columns(C, BLOCK_C: tl.constexpr, VEC: tl.constexpr):
    """Which columns of a block exist, (1, BLOCK_C): whole runs of VEC do, so accesses stay vectors."""
    if is_scattered(BLOCK_C, VEC):
        # By the parts that a thread has, one number: so many masks would take registers, or be packed and unpacked.
        start, column = scattered_columns(BLOCK_C)
        inside = tl.reshape(start.to(tl.int32) // 512 < (C - column + 511) // 512, (1, BLOCK_C))
    else:
        inside = tl.arange(0, BLOCK_C)[None, :] // VEC < C // VEC
    return inside


@jit
def column_block(C, BLOCK_C: tl.constexpr, FULL: tl.constexpr, VEC: tl.constexpr):
    """Column numbers (1, BLOCK_C), which of them exist, and 1 / C."""
    column = tl.arange(0, BLOCK_C)[None, :]
    if FULL:
        return column, tl.full((1, BLOCK_C), True, tl.int1), 1.0 / BLOCK_C
    # Plain division is approximate on GPUs, up to two units off: x of a large mean would inherit them.
    return column, existing_columns(C, BLOCK_C, VEC), tl.div_rn(1.0, C.to(tl.float32))


@jit
def run_pointers(base, start, column, VEC: tl.constexpr):
    """base + start + column, a block whose runs of VEC elements each start at a multiple of their size or of 16 bytes."""
    if is_scattered(column.shape[1], VEC):
        part, thread = scattered_columns(column.shape[1])
        pointers = tl.reshape(base + start + thread + part, column.shape)
    else:
        pointers = base + (start + column)
    if VEC > 1:
        run: tl.constexpr = VEC * ((base.dtype.element_ty.primitive_bitwidth + 7) // 8)
        pointers = tl.multiple_of(pointers, (1, 16 if run > 16 else run))
    return pointers


@jit
def load_parameters(base, column, inside, VEC: tl.constexpr):
    """A weight or bias as fp32 (1, BLOCK_C)."""
    return tl.load(run_pointers(base, 0, column, VEC), mask=inside, other=0.0).to(tl.float32)


@jit
def row_statistics(x, inside, C, inverse_c, eps, FULL: tl.constexpr):
    """x (ROWS, BLOCK_C), fp32, 0 outside, without its mean; the mean and 1 / sqrt(var + eps), both (ROWS,)."""
    # Two passes over registers: the variance of large values with a small spread would drown in sum(x * x).
    if FULL:
        mean = tl.sum(x, axis=1) * inverse_c  # exact: a power of two
    else:
        mean = tl.div_rn(tl.sum(x, axis=1), C.to(tl.float32))
    centred = x - mean[:, None]
    if not FULL:
        centred = tl.where(inside, centred, 0.0)
    return centred, mean, tl.rsqrt(tl.sum(centred * centred, axis=1) * inverse_c + eps)


@jit
def root_mean_square(x, inverse_c, eps):
    """1 / sqrt(mean(x * x) + eps), (ROWS,), of x (ROWS, BLOCK_C), fp32, 0 outside."""
    return tl.rsqrt(tl.sum(x * x, axis=1) * inverse_c + eps)


@jit
def tile_range(rows, ROWS: tl.constexpr, CUT: tl.constexpr):
    """Which tiles of ROWS rows this program takes, as a range: of the full ones, or with CUT of the cut one behind them."""
    full = (rows // ROWS).to(tl.int32)  # 2**31 tiles fit no memory
    if CUT:
        is_mine = (tl.program_id(0) == tl.num_programs(0) - 1) & (rows % ROWS > 0)
        begin, end, step = 0, is_mine.to(tl.int32), 1
    else:
        begin, end, step = tl.program_id(0), full, tl.num_programs(0)
    return begin, end, step


@jit
def load_where(pointers, mask, MASKED: tl.constexpr):
    """What lies there; where the mask says that nothing does, 0, or with MASKED False all the same."""
    if MASKED:
        found = tl.load(pointers, mask=mask, other=0.0)
    else:
        found = tl.load(pointers)
    return found


@jit
def scaled_gradient(dy, rstd, weight):
    """dy * rstd * weight, rounded: the `g` of `norm_gradient`; weight is fp32, or None."""
    # The last product is an explicit multiply-add, which no subtraction swallows: that would leave the product's rounding
    # error, and in rows of one element that is all there is.
    if weight is not None:
        g = tl.fma(dy * rstd[:, None], weight, 0.0)
    else:
        g = tl.fma(dy, rstd[:, None], 0.0)
    return g


@jit
def norm_gradient(g, x, rstd, inverse_c, CENTRED: tl.constexpr):
    """The gradient for a norm's input, of g = dy * rstd * weight, 0 outside, and x - mean, both (ROWS, BLOCK_C).

    Without rstd, x is (x - mean) * rstd. RMSNorm's, which is not CENTRED, has no mean.
    """
    slope = tl.sum(g * x, axis=1) * inverse_c
    if rstd is not None:
        slope = slope * rstd * rstd
    if CENTRED:
        mean_g = tl.sum(g, axis=1) * inverse_c
        dx = g - (x * slope[:, None] + mean_g[:, None])
    else:
        dx = g - x * slope[:, None]
    return dx


@jit
def add_rows(total, tile, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, GROUPS: tl.constexpr):
    """total (GROUPS, BLOCK_C) plus the sum of each group of a tile's rows; see `read_ahead.backward_constants`."""
    return total + (tile if GROUPS == ROWS else tl.sum(tl.reshape(tile, (ROWS // GROUPS, GROUPS, BLOCK_C)), axis=0))


@jit
def sum_partials_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    first_total_ptr,
    second_total_ptr,
    third_total_ptr,
    first_row_stride: tl.int32,
    second_row_stride: tl.int32,
    third_row_stride: tl.int32,
    first_rows: tl.int32,
    second_rows: tl.int32,
    third_rows: tl.int32,
    first_columns: tl.int32,
    second_columns: tl.int32,
    third_columns: tl.int32,
    share: tl.int32,
    BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Sum first (first_rows, first_columns) over its rows, always in one order; so second and third, or None.

    The grid's second dimension shares rows out, `share` a program, which has a row of the totals.
    """
    wait_for_previous()
    block = tl.program_id(0)
    blocks = tl.cdiv(first_columns, BLOCK_C)
    begin = tl.program_id(1) * share
    if block < blocks:
        end = tl.minimum(begin + share, first_rows)
        _sum_columns(
            *(first_ptr, first_total_ptr, first_row_stride, begin, end, first_columns, block),
            *(BLOCK_C, LOADS, LANES, ALIGNED),
        )
    elif second_ptr is not None:
        if third_ptr is None or block < blocks + tl.cdiv(second_columns, BLOCK_C):
            end = tl.minimum(begin + share, second_rows)
            _sum_columns(
                *(second_ptr, second_total_ptr, second_row_stride, begin, end, second_columns, block - blocks),
                *(BLOCK_C, LOADS, LANES, ALIGNED),
            )
        else:
            end = tl.minimum(begin + share, third_rows)
            block -= blocks + tl.cdiv(second_columns, BLOCK_C)
            _sum_columns(
                *(third_ptr, third_total_ptr, third_row_stride, begin, end, third_columns, block),
                *(BLOCK_C, LOADS, LANES, ALIGNED),
            )


@jit
def _sum_columns(
    ptr,
    total_ptr,
    row_stride,
    begin,
    end,
    C,
    block,
    BLOCK_C: tl.constexpr,
    LOADS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    VEC: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    GROUPS: tl.constexpr = LANES * VEC // BLOCK_C  # rows that all lanes load at once
    ROWS: tl.constexpr = LOADS * GROUPS
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = column // VEC < C // VEC
    total = tl.zeros((GROUPS, BLOCK_C), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        pointers = run_pointers(ptr, row.to(tl.int64) * row_stride, column, VEC)
        tile = tl.load(pointers, mask=(row < end) & inside, other=0.0).to(tl.float32)
        total = add_rows(total, tile, ROWS, BLOCK_C, GROUPS)
    sums = tl.sum(total, axis=0)[None, :].to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + tl.program_id(1).to(tl.int64) * C + column, sums, mask=column < C)


def sum_partials(*given: tuple[Tensor, torch.dtype] | None, parts: int = 1) -> tuple[Tensor, ...]:
    """The sums over rows of one to three tensors (rows, C), None left out, each as (C,) of the dtype beside it. Deterministic.

    In fp32. With more parts as (parts, C): the sum of each of so many shares of the rows.
    """
    tensors, forms, addresses = [], [], 0
    for tensor, dtype in filter(None, given):
        tensor, stride = as_rows(tensor)
        tensors.append(tensor)
        forms.append((tensor.dtype, *tensor.shape, stride, dtype))
        addresses |= tensor.data_ptr()
    plan = _plan_sums(tuple(forms), parts, addresses % 16)
    shapes = [(columns,) if parts == 1 else (parts, columns) for _, _, columns, *_ in forms]
    totals = [empty(shape, form[-1], tensors[0].device) for shape, form in zip(shapes, forms)]
    alone = (None,) * (3 - len(tensors))
    launch(plan.variant, plan.grid, *tensors, *alone, *totals, *alone, *plan.sizes)
    return tuple(totals)


def sum_rows(x: Tensor) -> Tensor:
    """The sum of x (..., C) over its rows, (C,), in x's dtype; taken in fp32. Deterministic."""
    x, _ = arriving_rows(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
    parts = min(-(-len(x) // MANY_ROWS), MAX_PARTS)
    total = (x, x.dtype) if parts <= 1 else (sum_partials((x, torch.float32), parts=parts)[0], x.dtype)
    return sum_partials(total)[0]


@lru_cache(maxsize=MAX_PLANS)
def _plan_sums(forms: tuple[tuple[Any, ...], ...], parts: int, offset: int) -> Plan:
    """forms: each tensor's dtype, rows, columns, distance of rows and dtype of the total."""
    read, rows, columns, strides, totals = zip(*forms)
    aligned = all(
        run_length(dtype.itemsize, C | stride, offset) > 1 for dtype, C, stride in zip(read, columns, strides)
    )
    variant = _sums_variant(sum(columns), aligned, read, totals)
    blocks = sum(-(-C // variant.constants["BLOCK_C"]) for C in columns)
    three = [n for sizes in (strides, rows, columns) for n in (*sizes, *sizes[-1:] * (3 - len(sizes)))]
    return Plan(variant, (blocks, parts), (*three, -(-max(rows) // parts)))


def sum_partials_variant(columns: int, *totals: torch.dtype) -> Variant:
    """The program that adds up partial sums, fp32, of `columns` columns each into totals of these dtypes."""
    return _sums_variant(columns * len(totals), columns % 4 == 0, (torch.float32,) * len(totals), totals)


@cache
def _sums_variant(
    columns: int, aligned: bool, read: tuple[torch.dtype, ...], totals: tuple[torch.dtype, ...]
) -> Variant:
    """columns: of all tensors together."""
    alone = (None,) * (3 - len(read))
    types = (*map(pointer, (*read, *alone, *totals, *alone)), *["i32"] * 10)
    # Time goes by what follows one another: a program's rounds of loads, each as long as the L2 cache takes, and the cache
    # lines that its multiprocessor looks up, one a row. Few columns a program spread the rows' lines over multiprocessors,
    # and all loads of 1,024 partial sums are one round: an encoder layer's 567 x 768 and 107 x 2,048 are 176 programs of
    # one round, 16 bytes a load. 16-bit rows share no sector of 32 bytes between programs.
    block = 64 if columns > 4096 else 16 if columns > 1024 or min(dtype.itemsize for dtype in read) == 2 else 8
    constants = {"BLOCK_C": block, "LOADS": min(block, 16), "LANES": 256, "ALIGNED": aligned}
    # Of 8 columns a program there are at most 128. For six on one multiprocessor ptxas would spill 8 bytes on sm_90; with 64 it takes 56.
    return Variant(sum_partials_kernel, types, constants, num_warps=8, registers=64 if block == 8 else 0)


class ParameterSums:
    """The weight's and the bias's gradient: first each program's sums (fp32, one row a program), then their total."""

    def __init__(self, with_dw: bool, with_db: bool, programs: int, columns: int, device: torch.device) -> None:
        shape = (programs, columns)
        self.dw = empty(shape, torch.float32, device) if with_dw else None
        self.db = empty(shape, torch.float32, device) if with_db else None

    def total(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Launch the sum over programs: dweight and dbias (C,), None where not wanted."""
        if self.dw is not None and self.db is not None:
            return sum_partials((self.dw, dtype), (self.db, dtype))  # type: ignore[return-value]
        dw, db = (None if partial is None else sum_partials((partial, dtype))[0] for partial in (self.dw, self.db))
        return dw, db


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x and the distance of its rows in elements; a contiguous copy where rows lie at no constant distance.

    Also where the distance is over MAX_ROW_STRIDE.
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


def arriving_rows(gradient: Tensor) -> tuple[Tensor, int]:
    """`as_rows` of a gradient, of whose place nothing was known when its call's programs were compiled: they are for new memory.

    So it is copied where its rows start beside multiples of 16 bytes, and those of new memory would not.
    """
    gradient, distance = as_rows(gradient)
    columns = gradient.shape[-1]
    apart = distance != columns and distance % 8  # of 2 bytes, the shortest elements
    if (apart or gradient.data_ptr() % 16) and columns * gradient.element_size() % 16 == 0:
        return gradient.clone(memory_format=torch.contiguous_format), columns
    return gradient, distance


def statistics_of(rows: int, centred: bool, device: torch.device) -> tuple[Tensor | None, Tensor]:
    """Where a norm's forward writes mean, which RMSNorm has none of, and rstd: fp32 (rows,)."""
    mean = empty((rows,), torch.float32, device) if centred else None
    return mean, empty((rows,), torch.float32, device)


def packed(parameter: Tensor | None) -> Tensor | None:
    """A weight or bias (C,) as kernels read it, element beside element; a copy where it lies otherwise."""
    return None if parameter is None else parameter.contiguous()


def run_length(element_size: int, strides: int, addresses: int) -> int:
    """Elements a run: 16 bytes of the narrowest tensor where all runs are aligned, else 1.

    strides, addresses: all of them or-ed together, which is a multiple of a power of two where each of them is.
    """
    vector = 16 // element_size
    return vector if addresses % 16 == 0 and strides % vector == 0 else 1


def aligned_run(columns: int, dtypes: Iterable[torch.dtype | None]) -> int:
    """`run_length` of tensors of these dtypes, whose addresses and strides allow runs as far as C does."""
    vector = 16 // min(dtype.itemsize for dtype in dtypes if dtype is not None)
    return vector if columns % vector == 0 else 1


def address_of(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def block_of(columns: int) -> int:
    if not 1 <= columns <= MAX_BLOCK:
        raise ValueError(f"rows of {columns} columns: these kernels take 1 to {MAX_BLOCK}")
    return max(16, 1 << (columns - 1).bit_length())


def row_constants(columns: int, config: RowConfig, vector: int) -> dict[str, int | bool]:
    block = block_of(columns)
    # Without vectors each element has an address and a mask of its own, and full tiles spill.
    rows = config.rows if vector > 1 else max(1, config.rows // 2)
    return {"ROWS": rows, "BLOCK_C": block, "FULL": columns == block, "VEC": vector}


def persistent_programs(tiles: int, multiprocessors: int, most: int) -> int:
    """How many programs share `tiles`, at most `most` a multiprocessor, or one where tiles are few.

    A program more means a row of partial sums more. So each takes two tiles, and eight before more than half of `most` run.
    """
    few, half, all_ = multiprocessors, multiprocessors * most // 2, multiprocessors * most
    return evenly(tiles, max(min(tiles, few), min(-(-tiles // 2), half), min(-(-tiles // 8), all_)))


def evenly(tiles: int, programs: int) -> int:
    """The fewest programs that are done as soon as so many: each takes as many tiles, or one less."""
    return -(-tiles // -(-tiles // programs)) if tiles else 0


def dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def tile_elements(variant: Variant) -> int:
    """Elements of one program's tile."""
    return int(variant.constants.get("ROWS", 1)) * int(variant.constants["BLOCK_C"])
