"""Dropout's seeds, and its masks as the kernels draw them, in plain PyTorch.

A kernel that drops elements takes a seed, one int64 on the device, and an offset. `next_seed` gives both: the seed comes
from torch's generator, so that `torch.manual_seed` repeats it, a CUDA graph's replays each draw a new one, and activation
checkpointing, which restores the generator, draws the same again when it recomputes. Inside `shared_seed()` one draw
serves many ops, told apart by their offsets.

`keep_mask` is the twin of `kernels/dropout.py`, bit for bit.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from detr_fast.kernels.dropout import FACTORS, ODD_ROW_FACTOR, kept_steps, tile_bound

_LOW = 0xFFFFFFFF
# The first offset: `keep_tile` counts it where `keep_rows` counts 0, and of one seed the two would share calls.
_FIRST = 1


def check_probability(p: float, name: str = "dropout_p") -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1]; got {p}")


def shared_seed() -> AbstractContextManager[None]:
    """Ops inside the block share one seed, drawn by the first of them; a layer's or a model's forward is such a block.

    A region that is checkpointed (`torch.utils.checkpoint`) inside the block draws its own seeds, as its recomputation
    must, which runs outside; a block inside such a region shares again. Under `torch.compile` each op draws, and Inductor
    draws all of them in one launch.
    """
    # Where a graph breaks inside a block of a class that Dynamo does not know, nothing of the function around it is compiled.
    return nullcontext() if torch.compiler.is_compiling() else _SharedSeed()


class _SharedSeed:
    def __enter__(self) -> None:
        self._outer = getattr(_local, "scope", None)
        # A block within a block has nothing to add.
        _local.scope = self._outer if self._outer is not None and self._outer.holds() else _Scope()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _local.scope is not self._outer:
            _local.scope.casts.clear()  # what their tensors' ends would do leads back to them: they would wait for the garbage collector
        _local.scope = self._outer


@contextmanager
def given_seed(seed: Tensor | None, offset: int) -> Iterator[_Scope]:
    """Inside the block ops take this seed, drawn before, from that offset on; the scope's offset is that of the last one."""
    outer = getattr(_local, "scope", None)
    scope = _local.scope = _Scope()
    scope.offset = offset - 1
    if seed is not None:
        scope.seeds[seed.device] = seed
    try:
        yield scope
    finally:
        scope.casts.clear()
        _local.scope = outer


def reserve(device: torch.device, offsets: int) -> tuple[Tensor, int]:
    """The seed and the first of so many offsets, for ops that take them by themselves; as `next_seed` where it is one."""
    seed, first = next_seed(device)
    scope = getattr(_local, "scope", None)
    if scope is not None and scope.holds():
        scope.offset += offsets - 1
    return seed, first


def next_seed(device: torch.device) -> tuple[Tensor, int]:
    """The seed (1,) int64 on `device`, and the offset, of the next op that drops elements."""
    if not torch.compiler.is_compiling():
        scope = getattr(_local, "scope", None)
        if scope is not None and scope.holds():
            return scope.next(device)
    return _draw(device), _FIRST


def held() -> dict[int, Any] | None:
    """What ops of this block have cast (see `rounded`); None outside, and in a region that is recomputed without the block."""
    scope = getattr(_local, "scope", None)
    return scope.casts if scope is not None and scope.holds() else None


class _Scope:
    def __init__(self) -> None:
        self.seeds: dict[torch.device, Tensor] = {}
        self.offset = _FIRST - 1
        self.entered = recording()
        self.casts: dict[int, Any] = {}  # see `rounded`

    def holds(self) -> bool:
        """Whether what runs now will be recomputed, if at all, together with the block."""
        return recording() == self.entered

    def next(self, device: torch.device) -> tuple[Tensor, int]:
        if (seed := self.seeds.get(device)) is None:
            seed = self.seeds[device] = _draw(device)
        self.offset += 1
        return seed, self.offset


def recording() -> tuple[bool, object]:
    """What differs inside a region that is to be recomputed.

    Checkpointing runs its region without gradients, or under hooks of its own on what is saved for backward.
    """
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


def _draw(device: torch.device) -> Tensor:
    return torch.randint(0, 2**63 - 1, (1,), device=device)


_local = threading.local()


def keep_mask(
    seed: Tensor, offset: int, p: float, heads: int, rows: int, columns: int, *, tiles: bool = False
) -> Tensor:
    """Which elements the kernels keep: bool (heads, rows, columns) on the seed's device.

    seed, offset: from `next_seed`. tiles: as `keep_tile` draws (attention, matmuls), else as `keep_rows` (row-wise ops,
    one head). The draws are 16 bits wide: p is rounded to a multiple of 2**-16.
    """
    if tiles:
        words = _tile_words(seed, offset, heads, rows, columns)
    else:
        group, row = (torch.arange(size, device=seed.device) for size in (-(-columns // 8), rows))
        words = torch.stack(_philox(seed, group, row[:, None], torch.zeros_like(group), offset), -1)
    draws = torch.stack([words << 16 & _LOW, words], -1)  # (…, word, half)
    if tiles:  # a draw counts as a float of 16 bits
        bound, keeps = tile_bound(p)
        under = ((draws >> 16 ^ 0x8000) - 0x8000).to(torch.int16).view(torch.float16) < bound
        kept = under if keeps else ~under
        #  head, row // 16, row // 2 % 4, column // 16, column // 2 % 4, row // 8 % 2, column // 8 % 2, row % 2, column % 2
        kept = kept.permute(0, 1, 5, 2, 7, 3, 6, 4, 8)
        kept = kept.reshape(heads, words.shape[1] * 16, words.shape[3] * 16)
    else:  # as the high half of an int32
        kept = ((draws ^ 1 << 31) >> 16 < kept_steps(p)).flatten(1)[None]
    return kept[:, :rows, :columns]


def _tile_words(seed: Tensor, offset: int, heads: int, rows: int, columns: int) -> Tensor:
    """(heads, row // 16, row // 2 % 4, column // 16, column // 2 % 4, row // 8 % 2, column // 8 % 2, row % 2): the word that holds an element's draw."""

    def places(size: int) -> Tensor:
        """All numbers whose bits 0 and 3 are 0."""
        number = torch.arange(-(-size // 16) * 4, device=seed.device)
        return number // 4 * 16 + number % 4 * 2

    head, row, column = torch.arange(heads, device=seed.device)[:, None, None], places(rows)[:, None], places(columns)
    upper, left = row & 16 != 0, column & 16 == 0
    one, other = torch.where(left, FACTORS[0], FACTORS[1]), torch.where(left, FACTORS[2], FACTORS[3])
    sixth = torch.where(upper, other, one), torch.where(upper, one, other)
    groups = (x // 32 * 4 + x % 8 // 2 for x in (column, row))
    even = torch.stack(_philox(seed, head, next(groups), torch.full_like(head, offset), next(groups), sixth), -1)
    odd = even + even.roll(1, -1) * ODD_ROW_FACTOR & _LOW
    words = torch.stack([even, odd], -1)
    return words.view(heads, row.shape[0] // 4, 4, column.shape[0] // 4, 4, 2, 2, 2)


def _philox(
    seed: Tensor,
    c0: Tensor,
    c1: Tensor,
    c2: Tensor,
    c3: Tensor | int,
    sixth: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Philox4x32 with 7 rounds: four words of 32 bits, in int64. sixth: the factors of the sixth round, where they are not Philox's."""
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    words = torch.broadcast_tensors(c0, c1, c2, torch.as_tensor(c3, device=seed.device))
    for i in range(7):
        c0, c1, c2, c3 = words
        first, second = sixth if sixth is not None and i == 5 else (FACTORS[0], FACTORS[2])
        a, b = c0 * first, c2 * second  # 64 bits of product, in int64's two's complement
        words = (b >> 32 & _LOW ^ c1 ^ k0, b & _LOW, a >> 32 & _LOW ^ c3 ^ k1, a & _LOW)
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return tuple(words)
