# mypy: allow-incomplete-defs
"""Adam and AdamW of all parameters, with their gradients clipped to a norm, in three launches.

    n = sqrt(sum of g²),  g ← ± g · min(1, max_norm / (n + 1e-6)) + l2 · p,  p ← p - lr · decay · p
    m ← β₁ m + (1 - β₁) g,  v ← β₂ v + (1 - β₂) g²,  p ← p - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps)

A program takes a chunk of a tensor, whose place a table in the GPU's memory says (see `tensor_table`), so that the number of tensors
has no limit. The first launch leaves each chunk's sum of g², the second adds these up in a fixed order, counts steps and works out what is one number for a tensor, and the third updates. Gradients are only read. Arithmetic is
fp32, and fp64 where it is one number for a tensor.
Sources: Kingma and Ba, 2015, arXiv:1412.6980; Loshchilov and Hutter, 2019, arXiv:1711.05101; Pascanu et al., 2013, arXiv:1211.5063 (clipping).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .configs import ADAM
from .entry import Budget, Entry
from .launch import Variant, compile_variant, empty, jit, launch, leads_to, pointer, tl
from .overlap import wait_for_previous
from .tensor_table import TensorTable, addresses, distances, pieces

# Rows of tables are whole 64 bytes. Of a chunk: where its parameters, gradients, first and second moments begin, its tensor's number and
# its elements. Of a tensor: where its step and its learning rate lie, β₁, β₂, eps, decay, l2 and gradients' sign, each an fp64's bits.
CHUNK_COLUMNS = TENSOR_COLUMNS = 8
SCALARS = 16  # fp32 that the second launch leaves of a tensor for the third, of which ten are used


class Settings(NamedTuple):
    """Of a tensor: decay is AdamW's weight decay and l2 Adam's; sign is -1 to maximise."""

    beta1: float
    beta2: float
    eps: float
    decay: float
    l2: float
    sign: float


@jit
def gradient_squares_kernel(chunks_ptr, g_ptr, squares_ptr, CHUNK: tl.constexpr, VEC: tl.constexpr):
    """squares (chunks,): each chunk's sum of g²."""
    wait_for_previous()
    chunk = tl.program_id(0).to(tl.int64)
    row = chunks_ptr + chunk * 8
    g = _load(g_ptr + tl.load(row + 1), 0, tl.load(row + 5).to(tl.int32), CHUNK, VEC)
    tl.store(squares_ptr + chunk, tl.sum(g * g, axis=0))


@jit
def adam_scalars_kernel(
    tensors_ptr,
    step_ptr,
    rate_ptr,
    squares_ptr,
    factor_ptr,
    scalars_ptr,
    tensors: tl.int32,
    chunks: tl.int32,
    max_norm: tl.float32,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Counts steps; scalars (tensors, 16) of the update; factor (1,) that gradients are multiplied by."""
    wait_for_previous()
    if squares_ptr is not None:
        if tl.program_id(0) == 0:
            total = tl.zeros((BLOCK_C,), tl.float64)
            for start in range(0, chunks, BLOCK_C):
                chunk = start + tl.arange(0, BLOCK_C)
                total += tl.load(squares_ptr + chunk, mask=chunk < chunks, other=0.0).to(tl.float64)
            norm = tl.sqrt_rn(tl.sum(total, axis=0).to(tl.float32))
            factor = tl.div_rn(max_norm, norm + 1e-6)
            tl.store(factor_ptr, tl.where(factor > 1.0, 1.0, factor))  # NaN stays NaN, as in clip_grad_norm_
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = tensor < tensors
    row = tensors_ptr + tensor.to(tl.int64) * 8
    step_place = step_ptr + tl.load(row, mask=exists, other=0)
    step = tl.load(step_place, mask=exists, other=0.0) + 1.0
    tl.store(step_place, step, mask=exists)
    rate = tl.load(rate_ptr + tl.load(row + 1, mask=exists, other=0), mask=exists, other=0.0).to(tl.float64)
    beta1, beta2 = _setting(row + 2, exists), _setting(row + 3, exists)
    power1, power2, square1, square2 = beta1 * 0.0 + 1.0, beta2 * 0.0 + 1.0, beta1, beta2
    bits = step.to(tl.int32)
    for _ in range(25):  # fp32 counts up to 2**24
        power1, power2 = (
            tl.where(bits & 1 == 1, power1 * square1, power1),
            tl.where(bits & 1 == 1, power2 * square2, power2),
        )
        square1, square2, bits = square1 * square1, square2 * square2, bits >> 1
    own = scalars_ptr + tensor.to(tl.int64) * 16
    tl.store(own, (rate / (1.0 - power1)).to(tl.float32), mask=exists)
    tl.store(own + 1, tl.sqrt_rn((1.0 - power2).to(tl.float32)), mask=exists)
    tl.store(own + 2, (rate * _setting(row + 5, exists)).to(tl.float32), mask=exists)
    tl.store(own + 3, beta1.to(tl.float32), mask=exists)
    tl.store(own + 4, (1.0 - beta1).to(tl.float32), mask=exists)
    tl.store(own + 5, beta2.to(tl.float32), mask=exists)
    tl.store(own + 6, (1.0 - beta2).to(tl.float32), mask=exists)
    tl.store(own + 7, _setting(row + 4, exists).to(tl.float32), mask=exists)
    tl.store(own + 8, _setting(row + 6, exists).to(tl.float32), mask=exists)
    tl.store(own + 9, _setting(row + 7, exists).to(tl.float32), mask=exists)


@jit
def adam_update_kernel(
    chunks_ptr,
    scalars_ptr,
    factor_ptr,
    p_ptr,
    g_ptr,
    m_ptr,
    v_ptr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    wait_for_previous()
    row = chunks_ptr + tl.program_id(0).to(tl.int64) * 8
    p_ptr += tl.load(row)
    g_ptr += tl.load(row + 1)
    m_ptr += tl.load(row + 2)
    v_ptr += tl.load(row + 3)
    own = scalars_ptr + tl.load(row + 4) * 16
    count = tl.load(row + 5).to(tl.int32)
    step_size, correction, decay = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    beta1, rest1, beta2, rest2 = tl.load(own + 3), tl.load(own + 4), tl.load(own + 5), tl.load(own + 6)
    eps, l2, factor = tl.load(own + 7), tl.load(own + 8), tl.load(own + 9)
    if factor_ptr is not None:
        factor *= tl.load(factor_ptr)
    for start in range(0, count, BLOCK):
        p, g = _load(p_ptr, start, count, BLOCK, VEC), _load(g_ptr, start, count, BLOCK, VEC)
        m, v = _load(m_ptr, start, count, BLOCK, VEC), _load(v_ptr, start, count, BLOCK, VEC)
        # Without decay, an infinite parameter stays what it is, as PyTorch's.
        g = g * factor + tl.where(l2 == 0.0, 0.0, l2 * p)
        p -= tl.where(decay == 0.0, 0.0, decay * p)
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        p -= tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)
        _store(p_ptr, start, count, p, BLOCK, VEC)
        _store(m_ptr, start, count, m, BLOCK, VEC)
        _store(v_ptr, start, count, v, BLOCK, VEC)


@jit
def _setting(place, exists):
    """(T,) fp64 that lie in a table of int64."""
    return tl.load(place, mask=exists, other=0).to(tl.float64, bitcast=True)


@jit
def _places(base, start, count, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Pointers (BLOCK,) from element `start` on, and which lie in front of `count`, in whole runs of VEC elements, which are 16 bytes."""
    place = tl.arange(0, BLOCK)
    if VEC == 1:
        return base + (start + place), place < count - start
    # The same for all of a run, so that the compiler reads and writes it at once.
    return tl.multiple_of(base + (start + place), 16), place // VEC < (count - start) // VEC


@jit
def _load(base, start, count, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """(BLOCK,) as fp32, 0 behind `count`."""
    pointers, inside = _places(base, start, count, BLOCK, VEC)
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@jit
def _store(base, start, count, x, BLOCK: tl.constexpr, VEC: tl.constexpr):
    pointers, inside = _places(base, start, count, BLOCK, VEC)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside)


class AdamTables(TensorTable):
    """Where the tensors of an optimizer's step lie, in the GPU's memory, for `adam_step`.

    Of each parameter its gradient, moments (all of one dtype and layout, without gaps), step and learning rate (fp32, without
    dimensions; a rate may be many parameters'), and settings. Nothing is copied before `fill`, which a launch must come behind;
    a CUDA graph's replays read the tables, too. Addresses must stay: the tensors are not kept alive. allocate: gives so many int64 for
    the tables, at most `table_size`.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        first_moments: Sequence[Tensor],
        second_moments: Sequence[Tensor],
        steps: Sequence[Tensor],
        rates: Sequence[Tensor],
        settings: Sequence[Settings],
        allocate: Callable[[int], Tensor] | None = None,
    ) -> None:
        kinds = parameters, gradients, first_moments, second_moments
        self.bases = [tensors[0].detach() for tensors in kinds]
        self.step, self.rate = steps[0], rates[0]
        self.tensors = len(parameters)
        device, self.dtype = parameters[0].device, parameters[0].dtype
        # Bookkeeping on the host, whatever the default device, which counters and emulated graphs are not to see.
        with _disable_current_modes(), torch.device("cpu"):
            whole, rest = _chunks(kinds, self.bases)
            one = torch.stack([distances(steps, self.step), distances(rates, self.rate)], 1)
            numbers = torch.tensor(settings, dtype=torch.float64).view(torch.int64)
            host = torch.cat([whole.flatten(), rest.flatten(), torch.cat([one, numbers], 1).flatten()])
        super().__init__(host, device, allocate)
        ends = [len(whole) * CHUNK_COLUMNS, (len(whole) + len(rest)) * CHUNK_COLUMNS]
        # Those that are read in runs of 16 bytes, and those that are read one by one.
        memory = self.memory
        self.whole, self.rest = memory[: ends[0]].view(whole.shape), memory[ends[0] : ends[1]].view(rest.shape)
        self.table = memory[ends[1] :].view(self.tensors, TENSOR_COLUMNS)
        for chunks in (self.whole, self.rest):
            leads_to(chunks, [t for tensors in kinds for t in tensors])
        leads_to(self.table, [*steps, *rates])


def table_size(parameters: Sequence[Tensor]) -> int:
    """How many int64 the tables of these parameters take at most."""
    chunks = sum(-(-p.numel() // ADAM.chunk) + 1 for p in parameters)
    return chunks * CHUNK_COLUMNS + len(parameters) * TENSOR_COLUMNS


def _chunks(kinds: Sequence[Sequence[Tensor]], bases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two tables (chunks, 8): of runs of 16 bytes, and of what can't be read so: the last few elements, and tensors that start elsewhere."""
    sizes = torch.tensor([t.numel() for t in kinds[0]])
    vector = 16 // kinds[0][0].element_size()
    starts = torch.stack([addresses(tensors) for tensors in kinds])
    aligned = torch.where((starts % 16 == 0).all(0), sizes // vector * vector, 0)
    begins = torch.stack([distances(tensors, base) for tensors, base in zip(kinds, bases)], 1)
    return _cut(begins, torch.zeros_like(sizes), aligned), _cut(begins, aligned, sizes - aligned)


def _cut(begins: Tensor, first: Tensor, counts: Tensor) -> Tensor:
    """The table of chunks of each tensor's `counts` elements from `first` on. begins: (tensors, 4)."""
    size = ADAM.chunk
    tensor, start = pieces(counts, size)
    rows = torch.zeros(len(tensor), CHUNK_COLUMNS, dtype=torch.int64)
    rows[:, :4] = begins[tensor] + (first[tensor] + start)[:, None]
    rows[:, 4], rows[:, 5] = tensor, (counts[tensor] - start).clamp(max=size)
    return rows


def adam_step(tables: AdamTables, max_norm: float = 0.0) -> None:
    """One step of all parameters, in place; max_norm: the gradients' largest norm, over all tensors together, or 0 for any."""
    device, vector = tables.whole.device, 16 // tables.dtype.itemsize
    parts = [(chunks, vec) for chunks, vec in ((tables.whole, vector), (tables.rest, 1)) if len(chunks)]
    count = sum(len(chunks) for chunks, _ in parts)
    squares = factor = None
    if max_norm:
        squares, factor = (empty((n,), torch.float32, device) for n in (count, 1))
        first = 0
        for chunks, vec in parts:
            launch(squares_variant(tables.dtype, vec), (len(chunks),), chunks, tables.bases[1], squares[first:])
            first += len(chunks)
    scalars = empty((tables.tensors, SCALARS), torch.float32, device)
    variant = scalars_variant(bool(max_norm))
    grid = (-(-tables.tensors // int(variant.constants["BLOCK"])),)
    given = tables.table, tables.step, tables.rate, squares, factor, scalars
    launch(variant, grid, *given, tables.tensors, count, float(max_norm))
    for chunks, vec in parts:
        launch(
            update_variant(tables.dtype, bool(max_norm), vec), (len(chunks),), chunks, scalars, factor, *tables.bases
        )


def compile_adam(dtype: torch.dtype, clips: bool, device: torch.device) -> None:
    """Compile what `adam_step` launches for parameters of `dtype`, wherever they begin."""
    variants = [scalars_variant(clips)]
    for vector in (16 // dtype.itemsize, 1):
        variants += [update_variant(dtype, clips, vector), *([squares_variant(dtype, vector)] if clips else [])]
    for variant in variants:
        compile_variant(variant, device)


@cache
def squares_variant(dtype: torch.dtype, vector: int) -> Variant:
    """The program that sums squares of gradients of `dtype`, read in runs of `vector`."""
    types = tuple(map(pointer, (torch.int64, dtype, torch.float32)))
    constants = {"CHUNK": ADAM.chunk, "VEC": vector}
    return Variant(gradient_squares_kernel, types, constants, ADAM.num_warps)


@cache
def scalars_variant(clips: bool) -> Variant:
    """The program of what is one number for a tensor."""
    fp32, clipped = torch.float32, torch.float32 if clips else None
    types = (*map(pointer, (torch.int64, fp32, fp32, clipped, clipped, fp32)), "i32", "i32", "fp32")
    # 4,096 sums of squares at once: of DETR-R50's 41.5 million parameters there are 10,300. A tensor a thread: were there fewer, two would
    # read a step that one of them writes.
    return Variant(adam_scalars_kernel, types, {"BLOCK": 256, "BLOCK_C": 4096}, num_warps=8)


@cache
def update_variant(dtype: torch.dtype, clips: bool, vector: int) -> Variant:
    """The program that updates parameters of `dtype`, read and written in runs of `vector`."""
    fp32 = torch.float32
    types = tuple(map(pointer, (torch.int64, fp32, fp32 if clips else None, *[dtype] * 4)))
    return Variant(adam_update_kernel, types, {"BLOCK": ADAM.block, "VEC": vector}, ADAM.num_warps)


def catalog_entries() -> Iterator[Entry]:
    fp32 = torch.float32
    budget, example = Budget(80, 256, 64, 256), partial(_example, fp32)
    named = {
        "squares_fp32": (squares_variant(fp32, 4), budget),
        "scalars": (scalars_variant(True), Budget(128, 512, 128, 512)),
        "update_fp32": (update_variant(fp32, True, 4), budget),
    }
    for name, (variant, most) in named.items():
        elements = int(variant.constants.get("CHUNK") or variant.constants["BLOCK"])
        yield Entry("optimizer_step", f"adam_{name}", variant, elements, most, example)


def _example(dtype: torch.dtype, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
    """A tensor of more than a chunk, one that ends within a run, a few numbers, and one that begins off 16 bytes."""
    sizes = ADAM.chunk + 24, 71, 1, 40
    draws = [[torch.randn(n + 1, device=device).to(dtype)[n == 40 :][:n] for n in sizes] for _ in range(4)]
    steps = [torch.full((), 3.0, device=device) for _ in sizes]
    rate = torch.full((), 1e-2, device=device)
    settings = [Settings(0.9, 0.999, 1e-8, 0.1, 0.0, 1.0)] * 3 + [Settings(0.8, 0.95, 1e-6, 0.0, 0.1, -1.0)]
    p, g, m, v = draws
    v = [one.abs() for one in v]
    before = [t.clone() for t in (*p, *m, *v)]
    tables = AdamTables(p, g, m, v, steps, [rate] * len(sizes), settings)
    tables.fill()

    def call() -> tuple[Tensor, ...]:
        for step in steps:
            step.fill_(3.0)
        for now, was in zip((*p, *m, *v), before):
            now.copy_(was)
        adam_step(tables, 1.0)
        return *p, *g, *m, *v, *steps  # all that the tables lead to is kept alive

    return call
