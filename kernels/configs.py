"""Launch configurations: frozen data, each with the static analysis or the measurement behind it. Attention's: `attention_configs.py`.

Figures come from machine code compiled offline (`kernels/analysis.py`), or, where it says so, from an H200.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockConfig:
    """A kernel that goes over rows by blocks of columns; programs: per multiprocessor, where it loops over rows."""

    rows: int
    columns: int
    num_warps: int
    programs: int = 0


@dataclass(frozen=True)
class RowConfig:
    """How a row-wise kernel lies on the machine.

    rows: rows a tile; num_warps: warps a program; programs: programs per multiprocessor of a persistent kernel; registers:
    the most that a thread may take where it reads a tile ahead (0: nothing is read ahead).
    """

    rows: int
    num_warps: int
    programs: int = 0
    registers: int = 0


@dataclass(frozen=True)
class CastConfig:
    """chunk: elements a program, block: of these at once; rows, tile: the same of what is read in tiles, of so many positions."""

    chunk: int
    block: int
    rows: int
    tile: int
    positions: int
    num_warps: int


@dataclass(frozen=True)
class AdamConfig:
    """chunk: elements a program; block: of these at once, of each of the four tensors."""

    chunk: int
    block: int
    num_warps: int


# In fp32 a chunk is 112 KB read and written. 1,024 elements at once are 8 a thread of each tensor: 16 KB on their way a program, of which DRAM at
# an H200's 4.1 TB/s needs two a multiprocessor and registers leave room for eight. Of DETR-R50's 41.5 million parameters there are 10,300 programs,
# ten times as many as run at once, so that the end, in which some multiprocessors have none left, is short. Not timed yet.
ADAM = AdamConfig(chunk=4096, block=1024, num_warps=4)

# 48 registers a thread leave room for ten programs a multiprocessor of an sm_90, which have 8 KB of fp32 each on their way, or 2.3 of 3x3 weights; with
# tiles of 128 rows a thread takes 114. All 41.5 million parameters of DETR-R50 are 12,100 programs, some nine times as many as run at once. Not timed yet.
CAST = CastConfig(chunk=4096, block=2048, rows=256, tile=64, positions=16, num_warps=4)

# Both are keyed by BLOCK_C, the number of columns rounded up to a power of two; add_layer_norm.py's forward is LayerNorm's.

# 64 elements a lane and one warp up to C = 1,024, so that reductions need shuffles and no barrier: at C = 256, 8 rows a
# warp take 12.6 instructions an element on sm_80 and sm_90, 4 rows 13.2 to 13.5. Beyond, a row spreads over warps.
LAYER_NORM_FORWARD = {
    16: RowConfig(rows=64, num_warps=1),
    32: RowConfig(rows=64, num_warps=1),
    64: RowConfig(rows=32, num_warps=1),
    128: RowConfig(rows=16, num_warps=1),
    256: RowConfig(rows=8, num_warps=1),
    512: RowConfig(rows=4, num_warps=1),
    1024: RowConfig(rows=2, num_warps=1),
    2048: RowConfig(rows=1, num_warps=2),
    4096: RowConfig(rows=1, num_warps=4),
    8192: RowConfig(rows=1, num_warps=8),
}

# Whole 16-bit rows by warps in turn (`warp_rows.py`), of LayerNorm, RMSNorm and both with a residual, without dropout: 8 rows of 256 by
# two warps. When parameters still went through shared memory, that took 12.7 us for 13.7 at (32,768, 256) on an H200. Left to ptxas, a
# warp that has eight rows waits for the first one or two before it asks for the rest, so that 24 to 28 warps a multiprocessor have
# 14 to 24 KB on their way, and one that has four does so, too, to take 48 registers. With 64 it asks for all four at once: 32 warps, 64 KB.
BY_WARPS = {256: RowConfig(rows=8, num_warps=2, registers=64)}

# With a residual and without dropout, whole 16-bit rows by twice the warps, where not by warps in turn: weight and bias reach the second one
# through shared memory, and yet, in bf16 on an H200 with an empty L2 cache, (6,800, 256) takes 7.5 us for 8.1, (32,768, 256) 17.2 for 18.8, (262,144, 256)
# 97.9 for 100.6 and (32,768, 1024) 53.1 for 54.2.
ADD_LAYER_NORM_FORWARD = {256: RowConfig(rows=8, num_warps=2), 1024: RowConfig(rows=2, num_warps=2)}

# The backward sums the weight's and the bias's gradient in registers over its loop, and adds up its warps' sums once, at the
# end, through shared memory: of two warps, not more. On an H200, 425 programs of one tile (8, 256) take 6.6 us with two warps,
# 13.6 with four and 22.5 with eight. With one of (4, 256), the sums' total included and with an empty L2 cache, (6,800, 256) takes
# 11.4 us for 13.7 with two of (8, 256), (32,768, 256) 21.9 for 24.8, (262,144, 256) 106.5 for 108.7, and two of (2, 1024) take 59.1
# for 63.3 with four of (4, 1024); one warp gains 2 % at 64 and 128, nothing at 512, and is slower at 1,024. 16-bit rows of whole runs are read a tile ahead, while the tile before is worked on, within
# `registers`: 168 leave 12 warps a multiprocessor, which then have 48 KB on their way at all times at C = 256 (beside what DRAM
# needs, about 22), 128 leave 16. 32 elements a lane take 17.9 instructions an element there on sm_90.
# `programs` is for what is not read ahead, and many rows, see `rows.persistent_programs`. Without reading ahead, on an H200 in
# bf16, (524,288, 256) took 205 to 211 us, where copying as many bytes takes 191 to 196, (131,072, 512) 102 (98), (32,768, 1024)
# 56 (50 to 53), (32,768, 2048) 115 (98), and with half the warps (16,384, 4096) 128 (98) and (8,192, 8192) 146 (98).
LAYER_NORM_BACKWARD = {
    16: RowConfig(rows=64, num_warps=2, programs=8, registers=168),
    32: RowConfig(rows=64, num_warps=2, programs=8, registers=168),
    64: RowConfig(rows=16, num_warps=1, programs=16, registers=168),
    128: RowConfig(rows=8, num_warps=1, programs=16, registers=168),
    256: RowConfig(rows=4, num_warps=1, programs=16, registers=168),
    512: RowConfig(rows=4, num_warps=2, programs=8, registers=168),
    1024: RowConfig(rows=2, num_warps=2, programs=6, registers=168),
    2048: RowConfig(rows=2, num_warps=4, programs=3, registers=168),
    4096: RowConfig(rows=1, num_warps=8, programs=2, registers=128),
    8192: RowConfig(rows=1, num_warps=16, programs=2, registers=128),
}

# 16 elements a lane: x, the residual and dropout's mask live beside the gradients, and 32 spill in fp32. At 256 of one warp: on an H200
# (6,800, 256) takes 13.4 us for 16.5 with two of (4, 256), with dropout 14.2 for 15.9, (32,768, 256) 31.5 for 34.5 and 32.5 for 33.0,
# (262,144, 256) 174 for 175 and 177 for 172, all with an empty L2 cache and the sums' total included. LayerNorm's own
# backward takes these, too, where fp32 or masks of columns need registers. Read ahead with 128 registers, with dropout 168, up to
# C = 1,024; beyond, that spills. Without reading ahead, on an H200 in bf16, (524,288, 256) took 258 us
# (copying as many bytes 259), with dropout 355 to 378 (326), (131,072, 512) 139 (129), (32,768, 1024) 69 (65 to 69),
# (32,768, 2048) 141 (129), (16,384, 4096) 147 (129) and (8,192, 8192) 160 (129).
ADD_LAYER_NORM_BACKWARD = {
    16: RowConfig(rows=32, num_warps=2, programs=8, registers=128),
    32: RowConfig(rows=32, num_warps=2, programs=8, registers=128),
    64: RowConfig(rows=16, num_warps=2, programs=8, registers=128),
    128: RowConfig(rows=8, num_warps=2, programs=8, registers=128),
    256: RowConfig(rows=2, num_warps=1, programs=20, registers=128),
    512: RowConfig(rows=2, num_warps=2, programs=8, registers=128),
    1024: RowConfig(rows=2, num_warps=4, programs=6, registers=128),
    2048: RowConfig(rows=1, num_warps=4, programs=4),
    4096: RowConfig(rows=1, num_warps=8, programs=2),
    8192: RowConfig(rows=1, num_warps=16, programs=2),
}

# 16 elements a lane: an H200 copies 109 MB in 58.8 µs, scales and shifts them so in 58.7, and in 62.5 with 32 a lane.
CHANNEL_AFFINE = {
    block: RowConfig(rows=max(1, 2048 // block), num_warps=4 if block <= 2048 else 8)
    for block in (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
}

# 16 elements a lane, as of CHANNEL_AFFINE, a pass over memory, too. Rows of more columns take several programs.
GATED = BlockConfig(rows=2, columns=1024, num_warps=4)
# Of halves of one tensor: longer pieces of a row. On an H200 a backward of (4,096, 11,008) takes 112.6 us so, 115.1 by GATED, of
# (5,476, 4,096) 57.3 for 59.6; copying as many bytes takes 108.4 and 56.8.
GATED_HALVES = BlockConfig(rows=1, columns=4096, num_warps=8)

# 16 elements a lane.
WIDE_ROWS = BlockConfig(rows=1, columns=4096, num_warps=8)
WIDE_PARAMETERS = BlockConfig(rows=8, columns=256, num_warps=4, programs=4)

# Warps a program, keyed by the columns of a problem rounded up to a power of two. One warp needs no barrier in its
# reductions; a lane holds at most 8 columns, beyond which fp64 distances and duals take over 128 registers.
ASSIGNMENT_WARPS = {32: 1, 64: 1, 128: 1, 256: 1, 512: 2, 1024: 4}


@dataclass(frozen=True)
class TileConfig:
    """How attention, or a block of feed-forward, lies on the machine: queries and keys (rows and hidden units) a tile, warps a
    program, stages of its pipeline.

    registers: the most that a thread may take on NVIDIA's GPUs; 0: the compiler decides.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    registers: int = 0


@dataclass(frozen=True)
class MatmulConfig:
    """How a matrix product lies on the machine: the tile of the result, the step along K, warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Keyed by the bytes of an element, and whether a program does much besides its product (a position to add, an activation
# to differentiate), where 64 accumulators a lane would make it spill. Two or three
# programs fit a multiprocessor, so that one's epilogue hides another's loads. On an H200, µs at 6,800, 3,400 and 800 rows of 256
# to 2,048 columns beside 128 x 128 x 32 in 8 warps, 4 stages: forward with dropout 30.8, 18.0, 6.5 (32.7, 18.3, 7.6), backward
# 40.7, 21.0, 7.2 (41.7, 21.7, 8.7); with a position to 768 columns 17.4, 10.8, 5.3 (64 x 128 x 32: 19.2, 12.9, 5.7).
LINEAR = {
    (2, False): MatmulConfig(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3),
    (2, True): MatmulConfig(block_m=64, block_n=128, block_k=64, num_warps=8, num_stages=3),
    (4, False): MatmulConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3),
    (4, True): MatmulConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3),
}
# Elements of 16 bits with an address of their own, which take registers.
LINEAR_SCATTERED = MatmulConfig(block_m=64, block_n=128, block_k=32, num_warps=8, num_stages=4)

# Products of pixels and channels, keyed by whether the result has at most 64 columns, and whether the product is long. They move more than
# they multiply, and what lies beside a product (a residual, or two tensors in the backward) is on its way to registers while the product
# runs. So registers count: with a residual, tiles of 8,192 in 4 warps take 166 to 168 on sm_90, of which three programs fit a multiprocessor, with
# 16 KB of the residual each on their way, 104 KB with x and w at K = 64, and 12.9 instructions an element (13.9 at K = 256; scaled: 176, two
# programs). 128 x 128 in 8 warps take 192, of which one fits, and spill at 128; 64 x 64 take 21.8 instructions, and w from the L2 cache twice as
# often. A step of 32 leaves registers that the addresses of one of 64 take. Not timed yet.
POINTWISE = {
    (False, False): MatmulConfig(block_m=64, block_n=128, block_k=32, num_warps=4, num_stages=4),
    (False, True): MatmulConfig(block_m=64, block_n=128, block_k=64, num_warps=4, num_stages=3),
    (True, False): MatmulConfig(block_m=128, block_n=64, block_k=32, num_warps=4, num_stages=4),
    (True, True): MatmulConfig(block_m=128, block_n=64, block_k=64, num_warps=4, num_stages=3),
}
# Elements with an address of their own, 16 a lane.
POINTWISE_SCATTERED = MatmulConfig(block_m=64, block_n=64, block_k=32, num_warps=8, num_stages=3)
POINTWISE_LONG = (
    192  # between 128 and 256 terms, where ResNets' products begin to take as long as what they read and write
)

# Whole rows of 256 columns, keyed by the bytes of an element and whether rows are few. 64 rows and 8 warps leave 64
# registers a lane to the accumulators; tiles of 16 rows spread a decoder's queries over more multiprocessors.
LINEAR_NORM = {
    (2, False): MatmulConfig(block_m=64, block_n=256, block_k=32, num_warps=8, num_stages=4),
    (2, True): MatmulConfig(block_m=16, block_n=256, block_k=32, num_warps=4, num_stages=4),
    (4, False): MatmulConfig(block_m=32, block_n=256, block_k=32, num_warps=8, num_stages=2),
    (4, True): MatmulConfig(block_m=16, block_n=256, block_k=32, num_warps=4, num_stages=2),
}
FEW_ROWS = 4096  # up to here, tiles of 64 rows would leave half of an H100's multiprocessors without any

# The whole feed-forward block: rows and hidden units a step, keyed as LINEAR_NORM. Beside the rows of x, two stages of
# both weights' steps must fit the 99 KB of the smallest GPUs.
FEED_FORWARD = {
    (2, False): TileConfig(rows=64, columns=32, num_warps=8, num_stages=2),
    (2, True): TileConfig(rows=16, columns=32, num_warps=4, num_stages=2),
    (4, False): TileConfig(rows=16, columns=16, num_warps=4, num_stages=1),
    (4, True): TileConfig(rows=16, columns=16, num_warps=4, num_stages=1),
}

# Heads of fp32 by products of split factors, keyed by whether rows move 16 bytes at a time: tiles of rows, which go through all layers, and of
# weights, with steps of rows. 2,400 rows, DETR's of four images, are 75 programs of 32, and as many beside them for the linear map. At 256 columns on
# sm_90 a step of 32 columns takes 32 x 128 in 8 warps 696 cycles of the busiest pipe forward and 888 backward, 32 x 64 in 4 twice 396 and
# twice 492, 16 x 128 in 4 540 and 732 for half the rows; 64 x 64 of a weight 608, by 64 x 32 twice 480. Element by element more would spill.
MLP_ROWS = {
    True: MatmulConfig(block_m=32, block_n=128, block_k=32, num_warps=8, num_stages=3),
    False: MatmulConfig(block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=3),
}
MLP_WEIGHTS = {
    True: MatmulConfig(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3),
    False: MatmulConfig(block_m=64, block_n=32, block_k=32, num_warps=4, num_stages=3),
}
# Rows that a program of a weight adds up: fewer are not worth its sums' way to memory, more would add up rounding errors (tensor
# cores cut off what they cannot hold).
MLP_SHARES = (256, 1024)

# Queries of all heads and images under which a block of 32 for each 4 warps would leave some of 132 multiprocessors with fewer than 16.
DEFORMABLE_FEW = 32 * 4 * 132


def deformable_config(channels: int, vector: int, few: bool) -> BlockConfig:
    """Of deformable attention: queries a program, channels of a head rounded up to a power of two, and warps.

    Eight channels a lane, which are one load of 16 bits: a warp reads a corner of as many queries as fill it. few: one warp a program.
    """
    block = max(16, 1 << (channels - 1).bit_length())
    warps = 1 if few else 4
    rows = max(1, warps * 32 * 8 // block)
    return BlockConfig(rows=rows if vector > 1 else max(1, rows // 2), columns=block, num_warps=warps)


@dataclass(frozen=True)
class RotaryConfig:
    """Of rotary embedding: tokens and heads a program, pairs of channels rounded up to a power of two, and warps."""

    tokens: int
    heads: int
    pairs: int
    num_warps: int


ROTARY_HEADS = 4  # of a program, at most


def rotary_config(pairs: int, rest: int, heads: int, vector: int, interleaved: bool) -> RotaryConfig:
    """A run of `vector` elements, or one of each half, a lane, for four heads of the same tokens: their warps find the angles in the L1 cache.

    On an H200, in bf16 and with an empty L2 cache, (1, 16,384, 32 + 8, 128) takes 98 us, and 130 where a lane has four heads and their
    angles once (a copy: 82), (8, 512, 12 + 12, 64) 11.6 for 12.9, (4, 1,024, 16 + 16, 128) 22.4 for 26.8.

    rest: channels that are copied, rounded up to a power of two.
    """
    block, warps = max(4, 1 << (pairs - 1).bit_length()), 4
    heads = min(ROTARY_HEADS, 1 << max(heads - 1, 0).bit_length())
    tokens = max(1, warps * 32 * max(vector, 2) // max(2 * block if interleaved else block, rest) // heads)
    return RotaryConfig(tokens, heads, block, warps)
