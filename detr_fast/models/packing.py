"""The encoder on real tokens only: those of a padded batch, one image behind the other, without what lies between.

Images of different sizes share a batch by padding, and the encoder would work on padding as on anything else. Where the
sizes are known on the host, as after putting a batch together, tokens are packed before the encoder and stay packed
as the decoder's keys and values. A captured step takes the packing as tensors of one of few shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detr_fast import dispatch, nn
from detr_fast.dispatch import Call, Implementation, Op, Situation
from detr_fast.nn.casts import cast_of
from detr_fast.ops.attention_varlen import attention_varlen

CAPACITIES = 8  # numbers of tokens that captured steps of one batch size and padded size may have


@dataclass(frozen=True)
class Packing:
    """Where the real tokens of a padded batch of feature maps lie.

    Attributes:
        index: (T,) int64, each token's place in the flattened (B * H * W) batch; surplus tokens repeat the first.
        cu_seqlens: (B + 1,) int32: 0, then the end of each image's tokens.
        longest: the largest number of tokens that an image can have.
    """

    index: Tensor
    cu_seqlens: Tensor
    longest: int

    @classmethod
    def of_images(
        cls,
        sizes: Sequence[tuple[int, int]],
        padded_size: tuple[int, int],
        map_size: tuple[int, int],
        device: torch.device | str = "cpu",
        capacity: int | None = None,
    ) -> Packing:
        """The packing of images in the upper left corners of a batch.

        Args:
            sizes: height and width of each image in pixels.
            padded_size: of the batch.
            map_size: height and width of the feature maps.
            device: of the result; what moves there does so without waiting.
            capacity: T, a fixed number of tokens for a static shape; by default as many as there are.

        Raises:
            ValueError: more tokens than `capacity`.
        """
        rows = _visible([height for height, _ in sizes], padded_size[0], map_size[0])
        columns = _visible([width for _, width in sizes], padded_size[1], map_size[1])
        counts = rows * columns
        ends = np.concatenate(([0], counts.cumsum()))
        tokens = int(ends[-1])
        if capacity is not None and tokens > capacity:
            raise ValueError(
                f"the batch has {tokens} tokens but the capacity is {capacity}; raise it or take fewer images"
            )
        image = np.repeat(np.arange(len(counts)), counts)
        row, column = np.divmod(np.arange(tokens) - ends[image], columns[image])
        index = np.zeros(capacity or tokens, dtype=np.int64)
        index[:tokens] = (image * map_size[0] + row) * map_size[1] + column
        longest = map_size[0] * map_size[1] if capacity is not None else int(counts.max())
        return cls(
            torch.from_numpy(index).to(device, non_blocking=True),
            torch.from_numpy(ends.astype(np.int32)).to(device, non_blocking=True),
            longest,
        )

    @staticmethod
    def capacity(sizes: Sequence[tuple[int, int]], padded_size: tuple[int, int], map_size: tuple[int, int]) -> int:
        """How many tokens a captured step has for images of these sizes: theirs, rounded up to an eighth of the padded batch."""
        rows = _visible([height for height, _ in sizes], padded_size[0], map_size[0])
        columns = _visible([width for _, width in sizes], padded_size[1], map_size[1])
        room = len(sizes) * map_size[0] * map_size[1]
        step = -(-room // CAPACITIES)
        return min(room, -(-int((rows * columns).sum()) // step) * step)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packing:
        index, ends = (t.to(device, non_blocking=non_blocking) for t in (self.index, self.cu_seqlens))
        return Packing(index, ends, self.longest)

    def pin_memory(self) -> Packing:
        return Packing(self.index.pin_memory(), self.cu_seqlens.pin_memory(), self.longest)

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (1, T, C); of (1, L, C), the same for all images, each image gets its own tokens."""
        if x.shape[0] == 1 and len(self.cu_seqlens) > 2:
            return x[0].index_select(0, self.index % x.shape[1])[None]
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def heads(self, attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What `attention`'s output projection gets, shaped as the query.

        Packed keys and values (1, T, C) are attended to by the keys themselves, or by (B, Q, C), some for each image.
        """
        batch = len(self.cu_seqlens) - 1
        if query is key:
            ends, longest = self.cu_seqlens, self.longest
        else:
            longest = query.shape[1]
            ends = torch.arange(0, (batch + 1) * longest, longest, dtype=torch.int32, device=query.device)
        weights = cast_of(attention.in_proj_weight).chunk(3)
        biases = cast_of(attention.in_proj_bias).chunk(3)
        q, k, v = (
            nn.functional.linear(x.flatten(0, 1), weight, bias).unflatten(-1, (attention.num_heads, -1))
            for x, weight, bias in zip((query, key, value), weights, biases)
        )
        dropout_p = attention.dropout if attention.training else 0.0
        y = attention_varlen(q, k, v, ends, self.cu_seqlens, longest, self.longest, dropout_p=dropout_p)
        return y.flatten(1).view(query.shape)


def _visible(lengths: Sequence[int], padded: int, mapped: int) -> np.ndarray:
    """How many of the `mapped` features of a side each image covers: those that the downsampled mask shows."""
    # As torch's nearest neighbour computes it, in float32.
    source = np.floor(np.arange(mapped, dtype=np.float32) * (np.float32(padded) / np.float32(mapped)))
    return (source[None] < np.array(lengths)[:, None]).sum(1)


@dataclass(frozen=True)
class PackingCall(Call):
    """padded: something may be. known: where real tokens lie is known on the host, or was when the batch was made."""

    images: int
    padded: bool
    known: bool

    def shapes(self) -> str:
        return f"{self.images} images"


class RealTokens(Implementation):
    """The encoder on real tokens only."""

    name = "packed"

    def run(self, tensors: Tensor, padded: bool, known: bool) -> bool:
        return True

    def why_not(self, call: PackingCall) -> str | None:
        if not call.padded:
            return "nothing is padded"
        return None if call.known else "the mask exists only on the device: no packing"


class AllTokens(Implementation):
    """The encoder on the padded batch, with a mask."""

    name = "padded"

    def run(self, tensors: Tensor, padded: bool, known: bool) -> bool:
        return False


def _describe(tensors: Tensor, padded: bool, known: bool, *, situation: Situation) -> PackingCall:
    return PackingCall(
        device=tensors.device,
        architecture=dispatch.architecture(tensors.device),
        dtype=tensors.dtype,
        tensor_type=dispatch.tensor_type((tensors,)),
        needs_grad=False,
        situation=situation,
        images=tensors.shape[0],
        padded=padded,
        known=known,
    )


PACKING = Op(
    "packing",
    signature=lambda tensors, padded, known: (tensors.shape[0], tensors.device, padded, known),
    describe=_describe,
    implementations=(RealTokens(), AllTokens()),
)
