"""One call of attention on the host: what its programs depend on, and the arguments of every launch.

All scores, and the log-sum-exp, are in base 2: scaled by log2(e) once, here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import dropout, launch
from .attention_configs import FEW_TILES, attention_config, halves_end_sooner
from .configs import TileConfig
from .launch import empty
from .rows import MAX_PLANS

MAX_HEAD_DIM = 256
MAX_TILE_STRIDE = 1 << 24  # of rows and columns inside a tile, in elements
LOG2_E = 1.4426950408889634
SHORT = 64  # queries of a window, of which a tile of 128 would be half empty


@dataclass(frozen=True)
class Form:
    """What the machine programs of a call depend on, besides the configuration of tiles.

    head_dim, value_dim: whole runs of 16 bytes. mask_vector: neighbouring elements of a mask that stay together at a multiple of 16
    bytes or of their size, 1 where some do not, 0 where they are no neighbours. mask: dtype of attn_mask, or None. few_queries, few_keys: too few for large tiles, where that was measured.
    short: at most SHORT queries, where there is a mask. uneven: see `halves_end_sooner`, where that decides. generation: of the GPU, see `launch.generation`. periodic: whether the mask's batch elements come again, see `Problem`.
    """

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    padding: bool = False
    mask: torch.dtype | None = None
    causal: bool = False
    dropout: bool = False
    tf32: bool = False
    packed: bool = False
    mask_vector: int = 1
    few_queries: bool = False
    few_keys: bool = False
    generation: str = ""
    periodic: bool = False
    short: bool = False
    uneven: bool = False

    @property
    def listed(self) -> bool:
        """Whether visible keys are read through a list: not where a key's position decides on masks or dropout."""
        return self.padding and self.mask is None and not self.causal and not self.dropout

    @property
    def paired(self) -> bool:
        """Whether dropout is applied to pairs of elements, by NVIDIA's assembly."""
        return (
            self.dropout and self.dtype.itemsize == 2 and self.generation != "" and self._precision() != "interpreted"
        )

    def spread_over(self, kernel: str) -> int:
        """The warps of a kernel whose tiles have their rows, or keys, in an order that dropout is cheaper in (`dropout.spread`), or 0."""
        return self.config(kernel).num_warps if self.dropout and self.mask is None and self.generation else 0

    @property
    def one_choice(self) -> bool:
        """Whether the kernel of the keys chooses once an element what dropout keeps: 2 to 7 % fewer instructions in its loop at head dimensions
        of 24 to 128 on sm_90. On sm_80 16 bytes spill with padding; with a mask or in causal order it was not looked at.
        """
        plain = self.dropout and self.dtype.itemsize == 2 and self.mask is None and not self.causal
        return plain and self.generation == "hopper"

    @property
    def uniform(self) -> bool:
        """Whether a loop's bounds that come from memory are shown to be the same in all lanes: what tensor cores of sm_90 gain by."""
        return self.generation == "hopper" and self.dtype.itemsize == 2 and (self.padding or self.packed)

    @property
    def uniform_keys(self) -> bool:
        """The same in the kernel of the keys, whose bounds depend on its keys; causal or with dropout only where it gains and spills nothing.

        Causal with dropout at 128 it saves what else spills: on sm_90 8 bytes of full batches, for 3 % of the cycles below the diagonal, on sm_120 16 of any.
        """
        if self._crowded_by_mask or self._crowded_in_packs:
            return True
        dim = max(self.blocks)
        small = self.dtype.itemsize == 2 and self.mask is None and dim <= 128
        hopper = self.generation == "hopper"
        if self.causal:
            scarce = self.generation == "blackwell" or (hopper and not (self.padding or self.packed))
            return small and scarce and self.dropout and dim == 128
        return small and hopper and not (self.dropout and dim != 64)

    @property
    def partial(self) -> bool:
        """Whether rows fill no block, so that columns are masked."""
        return self.blocks != (self.head_dim, self.value_dim)

    def frugal_keys(self, atomics: bool) -> bool:
        """Whether the kernel of the keys keeps as little as possible over its loops: only where it spills, as others take up to 5 % more
        instructions.
        """
        if self.dtype.itemsize > 2 or (self._crowded_keys and not atomics):
            return False
        if self.packed and not atomics:
            return max(self.blocks) == 128 and (self.causal or self.dropout or self.mask is not None)
        wide = self.dropout and max(self.blocks) == 128
        masked = self.mask is not None and (atomics or (wide and self.generation == "hopper"))
        # On sm_80 8 bytes spill with padding, and 16 to 40 of a mask.
        whole = self.padding if self.mask is None else self.mask_vector > 1
        masked = masked or (wide and whole and self.generation == "ampere")
        return masked or self.causal or self.partial or (self.packed and self.generation == "blackwell")

    def counted_keys(self, atomics: bool) -> bool:
        """Whether the kernel of the keys, where it is frugal, takes a head's row of statistics from its loop's number: not where 8 to 24 bytes spill with it.

        On sm_120 causal with dropout at 128; on sm_80 16 bytes with atomics of a mask that is loaded one by one, with dropout and padding, and 8 at 48 and 96 with
        these, causal order and a float32 mask in runs of 8 bytes; on sm_90 8 at 128 of a packed batch in causal order with dropout and a 16-bit mask in runs of 4 or 8
        bytes, all in as many cycles.
        """
        single = atomics and self.generation == "ampere" and self.mask is not None and self.mask_vector == 1
        crowded = single and self.padding
        if self.causal and self.padding and not atomics and self.generation == "ampere" and max(self.blocks) == 128:
            crowded = self.partial and self.mask == torch.float32 and self.mask_vector == 2
        if self.packed and not atomics and self.generation == "hopper" and max(self.blocks) == 128:
            crowded = (
                self.causal and self._has_short_runs and not launch.older_compiler()
            )  # by triton 3.6 32 bytes for 16
        return self.generation != "blackwell" and not (self.dropout and crowded)

    @property
    def _has_short_runs(self) -> bool:
        """Whether a 16-bit mask is loaded in runs of 4 or 8 bytes."""
        return self.mask is not None and self.mask.itemsize == 2 and 1 < self.mask_vector <= 4

    @property
    def _crowded_keys(self) -> bool:
        """Whether the kernel of the keys, frugal, spills 8 to 24 bytes on sm_120, and nothing where it only loads dropout's seed once."""
        wide = self.generation == "blackwell" and max(self.blocks) == 128 and self.mask_vector > 1
        return wide and self.causal and self.dropout and self.mask == torch.float32

    @property
    def _crowded_by_mask(self) -> bool:
        """Whether the kernel of the keys spills 8 bytes on sm_90 in causal order with dropout, and nothing in 3 % fewer cycles with one seed in uniform registers."""
        wide = self.generation == "hopper" and self.dtype.itemsize == 2 and max(self.blocks) == 128
        wide = wide and (self._has_short_runs or (self.mask == torch.float32 and self.mask_vector == 4))
        return wide and self.causal and self.dropout and not (self.padding or self.packed)

    @property
    def _crowded_in_packs(self) -> bool:
        """Whether the kernel of the keys spills 8 bytes on sm_90 at 96 of a packed batch in causal order with dropout and a 16-bit mask in runs of 4 bytes."""
        odd = self.generation == "hopper" and self.blocks == (128, 128) and 128 not in (self.head_dim, self.value_dim)
        runs = self._has_short_runs and self.mask_vector == 2
        return odd and runs and self.dtype.itemsize == 2 and self.packed and self.causal and self.dropout

    def one_seed(self, frugal: bool) -> bool:
        """Whether the kernel of the keys loads dropout's seed once, where it is frugal or as above: on sm_90 that takes up to 6 % more cycles, and is done
        where it spills otherwise.
        """
        small = self.dropout and self.dtype.itemsize == 2 and max(self.blocks) == 128 and (frugal or self._crowded_keys)
        causal = self.causal and (self.mask is None or self._crowded_by_mask)
        return small and (self.generation != "hopper" or causal)

    @property
    def vector(self) -> int:
        """Elements of a run of 16 bytes, which q, k, v and all that is as wide consist of."""
        return 16 // self.dtype.itemsize

    @property
    def blocks(self) -> tuple[int, int]:
        """E and Ev, rounded up to what a tensor core takes."""
        return block_of(self.head_dim), block_of(self.value_dim)

    def config(self, kernel: str) -> TileConfig:
        return _config(self, kernel)

    def masks(self) -> tuple[torch.dtype | None, ...]:
        """Dtypes of `Problem.tensors`."""
        return torch.bool if self.padding else None, self.mask, torch.int64 if self.dropout else None

    def ends(self) -> tuple[torch.dtype | None, ...]:
        """Dtypes of a packed batch's ends of queries and of keys."""
        return (torch.int32, torch.int32) if self.packed else (None, None)

    def constants(self) -> dict[str, int | bool | str]:
        """The constants that all attention kernels have in common."""
        block_e, block_ev = self.blocks
        return {
            "E": self.head_dim,
            "EV": self.value_dim,
            "BLOCK_E": block_e,
            "BLOCK_EV": block_ev,
            "CAUSAL": self.causal,
            "PRECISION": self._precision(),
            "VEC": self.vector,
            "MASK_VEC": self.mask_vector,
            "PERIODIC": self.periodic,
        }

    def _precision(self) -> str:
        if launch.triton is not None and launch.triton.knobs.runtime.interpret:
            return "interpreted"
        return "tf32" if self.tf32 and self.dtype == torch.float32 else "ieee"


def block_of(dim: int) -> int:
    return max(16, 1 << (_taken(dim) - 1).bit_length())


def whole_runs(dim: int, dtype: torch.dtype) -> int:
    """The head dimension of what is copied: `dim` if it fills runs of 16 bytes, else the next that does.

    Up to 32 a power of two: at 24 more programs spill than at 32, which whoever calls with other dimensions has, too.
    """
    run = 16 // dtype.itemsize
    if _taken(dim) % run == 0:
        return dim
    return block_of(dim) if dim < 32 else -(-dim // run) * run


def _taken(dim: int) -> int:
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"head dimension {dim}: the kernels take 1 to {MAX_HEAD_DIM}; use eager")
    return dim


class Sequences(NamedTuple):
    """A packed batch: the ends of its sequences' queries and keys, int32 (B + 1,) from 0 on, and their largest lengths."""

    ends_q: Tensor
    ends_k: Tensor
    max_q: int
    max_k: int


class Problem:
    """One call, ready for kernels: tensors that they can read, the form, and the arguments of every launch.

    q (B, L, H, E), k (B, S, H / group, E), v (B, S, H / group, Ev), of one dtype. padding: (B, S) bool, True = hidden.
    mask: bool (True = may attend) or float, broadcasts to (B, H, L, S), or to (1, n, H, L, S) for n that divides B: the masks of n batch
    elements, which come again in the next n. seed: int64 (1,), where dropout_p > 0.
    given, given_mask: q, k and v, and the mask as they came. Those that are not `readable` have memory for a copy, which is
    filled by `copy_rows`; copies: of such tensors, with it. head_dim, value_dim: in whole runs of 16 bytes.
    sequences: of a packed batch, whose q, k and v have a batch of 1, and which has no padding. What lies behind the
    last sequence is not read, and results there are zero. batch, queries and keys are then the number of sequences and the
    largest lengths, which the mask is for, and lse is (B, H, max_q), -inf where a sequence has ended.
    period: n where a mask's batch elements come again, else 0.
    generation: of the GPU that it is for; None: of q's device.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        scale: float | None = None,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
        offset: int = 0,
        tf32: bool = False,
        sequences: Sequences | None = None,
        generation: str | None = None,
    ) -> None:
        self.given = q, k, v
        self.q = q if readable(q) else memory_for(q)
        self.k = k if readable(k) else memory_for(k)
        self.v = self.k if v is k else v if readable(v) else memory_for(v)
        self.copies: list[tuple[Tensor, Tensor]] = []
        if self.q is not q or self.k is not k or self.v is not v:
            pairs = ((q, self.q), (k, self.k), (v, self.v))[: 2 if v is k else 3]
            self.copies = [(tensor, copy) for tensor, copy in pairs if copy is not tensor]
        self.batch, self.queries, self.heads, self.head_dim = self.q.shape
        self.keys, self.value_dim, self.group = k.shape[1], self.v.shape[3], self.heads // max(1, k.shape[2])
        if padding is not None and padding.stride(1) > MAX_TILE_STRIDE // 16:  # 1,024 keys are read at once
            padding = padding.contiguous()
        self.padding, self.given_mask = padding, mask
        self.period = 0
        self.sequences = sequences
        if sequences is not None:
            self.batch = len(sequences.ends_q) - 1
            # At least a tile each: its program writes the zeros of what is surplus.
            self.queries, self.keys = max(1, sequences.max_q), max(1, sequences.max_k)
        if mask is not None:
            if mask.ndim == 5:
                # Also where they come in no batch element at all, of which they get a gradient of zero.
                self.period = mask.shape[1] if 1 < mask.shape[1] != self.batch else 0
                mask = mask[0]
            mask = mask.expand(self.period or self.batch, self.heads, self.queries, self.keys)
            if mask.stride(2) + mask.stride(3) > MAX_TILE_STRIDE:
                mask = mask.contiguous()
        self.mask = mask
        self.seed, self.offset = (seed, offset) if dropout_p > 0.0 else (None, 0)
        self.scale = q.shape[3] ** -0.5 if scale is None else scale
        self.dropout_p = dropout_p
        self.causal, self.tf32 = causal, tf32
        self.generation = launch.generation(q.device) if generation is None else generation

    @property
    def cut(self) -> bool:
        """Whether Ev is no whole number of runs, so that what there is of it besides is cut off."""
        return self.value_dim != self.given[2].shape[3]

    def form(self) -> Form:
        """The form of its launches."""
        return _form(
            self.q.dtype,
            self.head_dim,
            self.value_dim,
            self.padding is not None,
            None if self.mask is None else self.mask.dtype,
            self.causal,
            self.seed is not None,
            self.tf32,
            self.sequences is not None,
            1 if self.mask is None else mask_run(self.mask),
            self.generation == "hopper" and self.tiles(128) < FEW_TILES,
            self.generation == "hopper" and -(-self.keys // 128) * self.batch * self.heads < FEW_TILES * self.group,
            self.generation,
            self.period > 0,
            self.mask is not None and self.queries <= SHORT,
            self._uneven(),
        )

    def _uneven(self) -> bool:
        known = self.generation == "hopper" and self.seed is not None and self.mask is None
        return known and halves_end_sooner(self.tiles(128), self.tiles(64))

    def tiles(self, rows: int) -> int:
        """Tiles of so many queries, over all heads of all batch elements."""
        return -(-self.queries // rows) * self.batch * self.heads

    def key_list(self) -> Tensor | None:
        """Memory for the visible keys' numbers, or the padding mask as int32: what kernels want instead of the mask."""
        return None if self.padding is None else empty((self.batch, self.keys), torch.int32, self.q.device)

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.padding, self.mask, self.seed

    def packed(
        self, tensor: Tensor, split: bool = False
    ) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, int]]:
        """A packed batch's ends, how many tokens there are as in `tensor`, and how many sequences; of another batch, how many of its
        elements have masks of their own where these come again.

        split: no tokens, so that no surplus is cleared where parts are written, which have none.
        """
        if self.sequences is None:
            return (None, None), (0, self.period)
        return (self.sequences.ends_q, self.sequences.ends_k), (0 if split else tensor.shape[1], self.batch)

    def sizes(self) -> tuple[int | float, ...]:
        """What the kernels take after the strides of their own tensors: see COMMON_TYPES."""
        padding = (0, 0) if self.padding is None else self.padding.stride()
        mask = (0, 0, 0, 0) if self.mask is None else self.mask.stride()
        numbers = (self.queries, self.keys, self.heads, self.group, self.scale * LOG2_E)
        return *padding, *mask, *numbers, self.offset, *_threshold_and_scale(self.dropout_p)


@cache
def _config(form: Form, kernel: str) -> TileConfig:
    return attention_config(
        kernel,
        form.dtype.itemsize,
        max(form.blocks),
        dropout=form.dropout,
        masked=form.mask is not None,
        listed=form.listed,
        causal=form.causal,
        scattered=form.mask is not None and form.mask_vector <= 1,
        mask_run=16 if form.mask is None else form.mask_vector * form.mask.itemsize,
        mask_size=0 if form.mask is None else form.mask.itemsize,
        padding=form.padding,
        packed=form.packed,
        partial=form.partial,
        periodic=form.periodic,
        short=form.short,
        few=form.few_keys if kernel in ("keys", "atomics") else form.few_queries,
        uneven=form.uneven,
        generation=form.generation,
    )


# Calls are alike: what follows from a few numbers is remembered, as to work it out takes the host longer than to look it up.
_form = lru_cache(maxsize=MAX_PLANS)(Form)


@lru_cache(maxsize=MAX_PLANS)
def _threshold_and_scale(dropout_p: float) -> tuple[int, float]:
    return (dropout.threshold(dropout_p), dropout.scale(dropout_p)) if dropout_p > 0.0 else (0, 1.0)


PACKED_TYPES = ("i32", "i32")  # tokens, batches
PLACE_TYPES = ("i64", "i64", "i32")
COMMON_TYPES = ("i64", "i32", "i64", "i64", "i32", "i32", "i32", "i32", "i32", "i32", "fp32", "i32", "i32", "fp32")


def readable(tensor: Tensor) -> bool:
    """Whether kernels can read tiles over dimensions 1 and 3 in place: of rows that start at multiples of 16 bytes, in whole runs."""
    strides = tensor.stride()
    together = strides[1] | _together(tensor.shape, strides)  # a tile has other rows even where L is 1
    aligned = not together % (16 // tensor.element_size()) and not tensor.data_ptr() % 16
    return strides[3] == 1 and strides[1] <= MAX_TILE_STRIDE and aligned


def memory_for(tensor: Tensor) -> Tensor:
    """An empty (B, L, H, whole runs) for a copy of the tensor."""
    batch, length, heads, dim = tensor.shape
    return empty((batch, heads, length, whole_runs(dim, tensor.dtype)), tensor.dtype, tensor.device).transpose(1, 2)


def places(tensor: Tensor | None) -> tuple[int, int, int]:
    """Strides over batch, heads and rows of a (B, L, H, E) tensor; zeros where there is none."""
    if tensor is None:
        return 0, 0, 0
    batch, row, head, _ = tensor.stride()
    return batch, head, row


def mask_run(mask: Tensor) -> int:
    """The longest run, up to 16 bytes, at whose multiples all rows of the mask (B, H, L, S) start and end; 0: a row's elements are no neighbours."""
    strides = mask.stride()
    if strides[3] != 1 and mask.shape[3] > 1:
        return 0
    size = mask.element_size()
    together = mask.data_ptr() // size | strides[2] | _together(mask.shape, strides)
    return min(16 // size, together & -together)


@lru_cache(maxsize=4 * MAX_PLANS)
def _together(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """What a power of two divides where it divides the strides of all dimensions but the last, and that one's size."""
    a, b, c, _ = (0 if size == 1 else stride for size, stride in zip(shape, strides))
    return a | b | c | shape[3]
