"""Launch configurations of attention's kernels: frozen data, each with the static analysis or the measurement behind it (`configs.py`)."""

from __future__ import annotations

from dataclasses import replace

from .attention_mask_configs import mask_config, shared_mask_config, weights_config
from .configs import TileConfig
from .launch import older_compiler

# Keyed by kernel, bytes an element, and the larger head dimension rounded up to a power of two. At most 99 KB of shared
# memory, which is what sm_86, sm_89 and sm_120 have.
ATTENTION = {
    ("forward", 2, 16): TileConfig(128, 64, 4, 3),
    ("forward", 2, 32): TileConfig(128, 64, 4, 3),
    ("forward", 2, 64): TileConfig(128, 64, 4, 3),
    ("forward", 2, 128): TileConfig(128, 32, 8, 3),
    ("forward", 2, 256): TileConfig(64, 32, 8, 2),
    ("forward", 4, 16): TileConfig(64, 32, 4, 2),
    ("forward", 4, 32): TileConfig(64, 32, 4, 2),
    ("forward", 4, 64): TileConfig(32, 32, 4, 2),
    ("forward", 4, 128): TileConfig(32, 32, 4, 2),
    ("forward", 4, 256): TileConfig(32, 16, 4, 1),
    ("queries", 2, 16): TileConfig(128, 32, 4, 3),
    ("queries", 2, 32): TileConfig(128, 32, 4, 3),
    ("queries", 2, 64): TileConfig(64, 64, 4, 2),
    ("queries", 2, 128): TileConfig(128, 32, 8, 2),
    ("queries", 2, 256): TileConfig(32, 32, 4, 1),
    ("queries", 4, 16): TileConfig(32, 32, 4, 2),
    ("queries", 4, 32): TileConfig(32, 32, 4, 2),
    ("queries", 4, 64): TileConfig(32, 32, 4, 2),
    ("queries", 4, 128): TileConfig(32, 32, 4, 1),
    ("queries", 4, 256): TileConfig(16, 16, 4, 1),
    ("keys", 2, 16): TileConfig(32, 128, 4, 3),
    ("keys", 2, 32): TileConfig(32, 128, 4, 3),
    ("keys", 2, 64): TileConfig(64, 32, 4, 2),
    ("keys", 2, 128): TileConfig(16, 128, 8, 2),
    # 8 warps spill 756 bytes on AMD
    ("keys", 2, 256): TileConfig(32, 32, 4, 1),
    ("keys", 4, 16): TileConfig(32, 32, 4, 2),
    ("keys", 4, 32): TileConfig(32, 32, 4, 2),
    ("keys", 4, 64): TileConfig(32, 32, 4, 2),
    ("keys", 4, 128): TileConfig(32, 32, 4, 1),
    ("keys", 4, 256): TileConfig(16, 16, 4, 1),
}

# On sm_90 in 16 bits, without an attn_mask, keyed by kernel, head dimension, and what is in its loop: keys from a list, dropout, or
# neither. The fastest of 4 to 17 tiles that spill nothing in any 16-bit form, each kernel alone in a CUDA graph on an H200 (bf16, triton 3.6), 4 images
# of 1,000 queries and keys, 256 columns. Behind them: microseconds, and those of what static analysis had chosen.
ATTENTION_HOPPER = {
    ("forward", 32, "listed"): TileConfig(128, 64, 4, 5),  # 22.2, 29.0
    ("forward", 32, "plain"): TileConfig(128, 64, 4, 3),  # 20.9, 28.9
    ("forward", 32, "dropout"): TileConfig(128, 64, 4, 3),  # 29.0
    ("forward", 64, "listed"): TileConfig(64, 128, 4, 3),  # 18.4, 19.8
    ("forward", 64, "plain"): TileConfig(64, 64, 4, 3),  # 17.7, 18.9
    ("forward", 64, "dropout"): TileConfig(64, 64, 4, 3),  # 21.8, 22.1
    ("forward", 128, "listed"): TileConfig(64, 64, 4, 3),  # 29.0, 30.9
    ("forward", 128, "plain"): TileConfig(64, 64, 4, 2),  # 24.6, 26.7
    ("forward", 128, "dropout"): TileConfig(64, 64, 4, 2),  # 29.5, 34.6
    ("queries", 32, "listed"): TileConfig(128, 64, 4, 5),  # 20.6
    ("queries", 32, "plain"): TileConfig(128, 64, 4, 3),  # 20.4
    ("queries", 32, "dropout"): TileConfig(128, 32, 4, 3),  # 29.9, 34.1
    ("queries", 64, "listed"): TileConfig(64, 64, 4, 5),  # 19.1, 22.6
    ("queries", 64, "plain"): TileConfig(64, 64, 4, 3),  # 16.8, 21.6
    ("queries", 64, "dropout"): TileConfig(64, 64, 4, 3),  # 22.8, 47.3
    ("queries", 128, "listed"): TileConfig(64, 64, 4, 2),  # 29.1, 39.7
    ("queries", 128, "plain"): TileConfig(64, 64, 4, 2),  # 26.0, 36.9
    ("queries", 128, "dropout"): TileConfig(128, 64, 8, 2),  # 33.9, 80.1
    ("keys", 32, "plain"): TileConfig(32, 128, 4, 3),  # 32.9
    ("keys", 32, "dropout"): TileConfig(32, 128, 4, 1),  # 46.4, 73.6
    ("keys", 64, "plain"): TileConfig(64, 64, 4, 1),  # 24.6, 34.8
    ("keys", 64, "dropout"): TileConfig(32, 64, 4, 3),  # 42.6, 88.2
    ("keys", 128, "plain"): TileConfig(32, 128, 8, 2),  # 46.6
    ("keys", 128, "dropout"): TileConfig(32, 64, 4, 1),  # 57.5, 162.3
    ("keys", 128, "packed dropout"): TileConfig(16, 128, 8, 2),  # 72.3, not packed
    ("atomics", 32, "plain"): TileConfig(32, 128, 4, 1),  # 63.1, 71.6
    ("atomics", 32, "dropout"): TileConfig(32, 128, 4, 1),  # 80.2, 115.7
    ("atomics", 64, "plain"): TileConfig(32, 128, 8, 2),  # 62.8, 63.2
    ("atomics", 64, "dropout"): TileConfig(32, 128, 8, 2),  # 76.1, 78.2
}
# The same where tiles of 128 queries, or keys, are fewer than an H200 has multiprocessors, measured with 1 image of 850, and with 100
# queries, and 100 or 1,000 keys of 2 and 8 images. Behind them: at 1 x 850, beside the above.
FEW_TILES = 132
ATTENTION_HOPPER_FEW = {
    ("forward", 32, "listed"): TileConfig(64, 64, 4, 5),  # 9.2, 12.2
    ("forward", 32, "plain"): TileConfig(64, 64, 4, 3),  # 8.9
    ("forward", 32, "dropout"): TileConfig(32, 64, 2, 3),  # 10.5, 13.8
    ("queries", 32, "listed"): TileConfig(64, 64, 4, 5),  # 8.6, 11.1
    ("queries", 32, "plain"): TileConfig(64, 64, 4, 3),  # 8.1
    ("queries", 32, "dropout"): TileConfig(64, 64, 4, 3),  # 10.1
    ("keys", 32, "plain"): TileConfig(64, 32, 2, 2),  # 13.1, 21.0
    ("keys", 32, "dropout"): TileConfig(64, 32, 2, 2),  # 18.9, 31.0
    ("atomics", 32, "plain"): TileConfig(64, 32, 2, 2),  # 26.4, 30.2
    ("atomics", 32, "dropout"): TileConfig(32, 64, 4, 2),  # 42.8, 52.4
}

# Up to a head dimension of 32, what two tiles of 64 take more instructions than one of 128 in the queries' kernel with dropout: 12,500 for 10,270 with 850
# keys, 14,800 for 12,300 with 1,050. In the loop 12.0 a score for 10.7; the rest is in front of it and behind it, and in a last block of 64 keys.
HALVES_COST = 1.22


def halves_end_sooner(tiles: int, halves: int) -> bool:
    """Whether the busiest of FEW_TILES multiprocessors has at least 5 % less to do with so many halves than with whole tiles.

    Two tiles of 128 rows on a multiprocessor take it nearly twice as long as one does: 13.8 us for one with 14 blocks of keys, 29.0 for two with 16
    (the forward with dropout on an H200). So time goes by the busiest: 2 x 1,050 tokens are 144 tiles, 2 on that one for 1.1 on average, or 3 halves for 2.1.
    """
    return HALVES_COST * 1.05 * -(-halves // FEW_TILES) <= 2 * -(-tiles // FEW_TILES)


# The keys' kernel where it adds up dq, too, keyed by bytes an element and head dimension: five products and one more tile of
# operands. 64 queries a tile: of 32 rows of dq, two warps of four would compute the same.
ATTENTION_ATOMICS = {
    (2, 16): TileConfig(32, 64, 4, 2),
    (2, 32): TileConfig(64, 64, 4, 2),
    (2, 64): TileConfig(32, 64, 4, 2),
    (4, 16): TileConfig(32, 32, 4, 2),
    (4, 32): TileConfig(32, 32, 4, 2),
    (4, 64): TileConfig(32, 16, 4, 2),
}
# Of a mask whose elements are loaded one by one, as rows start anywhere, each row of a tile has an address: 8 to 16 elements a lane, in a single stage.
# Where a row's elements are no neighbours each has one, and lanes 4 of them, or as many as others where that spills nothing.
# Behind them: cycles a score without other masks on sm_80 / sm_90. 4 a lane, which shared memory binds, took .578 to 1.05.
ATTENTION_SCATTERED = TileConfig(32, 32, 8, 1)
ATTENTION_SCATTERED_ROWS = {
    ("forward", 32): TileConfig(64, 32, 4, 1),  # .149 / .151
    ("forward", 64): TileConfig(64, 16, 4, 1),  # .233 / .225
    ("queries", 32): TileConfig(64, 32, 4, 1),  # .142 / .136
    ("queries", 64): TileConfig(64, 32, 4, 1),  # .188 / .160
    ("keys", 32): TileConfig(32, 64, 4, 1),  # .181 / .181
    ("keys", 64): TileConfig(16, 64, 4, 1),  # .254 / .200; 32 rows spill on sm_120
    ("atomics", 32): TileConfig(32, 64, 4, 1),  # .254 / .207
    ("atomics", 64): TileConfig(16, 64, 4, 1),  # .539 / .277
}
# At 65 to 128. Cycles a score of a float32 mask with dropout and padding, and those of 4 a lane. Keys on sm_80 spill 32 to 96 bytes in larger tiles, and
# what was compiled for sm_120 8 to 200.
ATTENTION_SCATTERED_WIDE = {
    ("ampere", "forward"): TileConfig(128, 32, 8, 1),  # .310, for 1.30
    ("ampere", "queries"): TileConfig(128, 16, 8, 1),  # .401, for 1.14; 64 rows in 4 warps spill 8 bytes and take .883
    ("hopper", "forward"): TileConfig(64, 32, 4, 1),  # .277, for 1.23
    ("hopper", "queries"): TileConfig(64, 32, 4, 1),  # .269, for 1.07
    ("hopper", "keys"): TileConfig(16, 64, 4, 1),  # .342, for .977
}


def attention_config(
    kernel: str,
    itemsize: int,
    block: int,
    *,
    dropout: bool,
    masked: bool,
    listed: bool,
    causal: bool,
    scattered: bool,
    mask_run: int,
    mask_size: int,
    padding: bool,
    packed: bool,
    partial: bool,
    periodic: bool,
    short: bool,
    few: bool,
    uneven: bool,
    generation: str,
) -> TileConfig:
    """The configuration of an attention kernel for elements of `itemsize` bytes and head dimensions up to `block`.

    In 16 bits and up to a head dimension of 128, what spills a register is listed in docs/attention.md.
    dropout, masked (with an attn_mask), causal: their tiles need registers of their own. listed: keys are read through a list,
    whose loads take stages of their own. scattered: an attn_mask is loaded one by one; mask_run: bytes of one that are loaded at once, 0 where a row's elements are no neighbours;
    mask_size: bytes of its elements. padding: with a key padding mask. packed: a packed batch. partial: rows fill no block. periodic: the mask's batch elements come again.
    short: up to 64 queries. few: tiles of 128 are under FEW_TILES. uneven: halves of them
    end sooner.
    generation: see `launch.generation`.
    """
    if kernel == "mask" and itemsize == 2 and block <= 64:
        return mask_config(
            block,
            dropout=dropout,
            causal=causal,
            scattered=scattered,
            mask_run=mask_run,
            mask_size=mask_size,
            padding=padding,
            packed=packed,
            periodic=periodic,
            generation=generation,
        )
    if kernel == "shared_mask" and itemsize == 2 and block <= 32:
        return shared_mask_config(dropout, generation)
    if kernel in ("mask", "shared_mask"):
        # ptxas alone takes 96 or 128 there, for more programs a multiprocessor, and spills 8 to 32 bytes (.814 a score for .795).
        limit = 255 if kernel == "shared_mask" and itemsize == 2 and block == 64 and generation == "hopper" else 0
        return replace(ATTENTION["forward", itemsize, block], rows=32, columns=16, num_stages=1, registers=limit)
    if kernel == "weights":
        return weights_config(
            itemsize,
            block,
            dropout=dropout,
            masked=masked,
            causal=causal,
            scattered=scattered,
            neighbours=mask_run > 0,
            mask_size=mask_size,
            padding=padding,
            periodic=periodic,
            generation=generation,
        )
    if scattered and itemsize == 2 and block <= 128:
        count = sum((dropout, causal, padding))
        return _scattered_config(kernel, max(32, block), bool(mask_run), generation, partial, packed, count)
    if generation == "hopper" and itemsize == 2 and not masked:
        content = "packed dropout" if dropout and packed else "dropout" if dropout else "listed" if listed else "plain"
        key = kernel, max(32, block), content
        if key not in ATTENTION_HOPPER:
            key = kernel, max(32, block), "dropout" if dropout else "plain"
        if key in ATTENTION_HOPPER and not (causal and kernel in ("keys", "atomics")):  # two loops
            halves = uneven and kernel == "queries" and content == "dropout" and not causal
            return ((few or halves) and ATTENTION_HOPPER_FEW.get(key)) or ATTENTION_HOPPER[key]
    if kernel == "atomics":
        config = _atomics_config(itemsize, block, dropout, masked or causal, generation)
        if generation == "ampere" and itemsize == 2 and block == 64 and (masked or (partial and dropout)):
            # .516 a score with a mask, .369 with dropout at 48; 2 stages spill 16 bytes and take .543 and .391.
            return replace(config, num_stages=1)
        if itemsize > 2 or block > 32:
            return config
        if generation == "ampere" and mask_size == 4 and not dropout:
            return replace(config, rows=16)
        if masked:
            return config
        if generation == "blackwell":
            if dropout and packed and not causal:
                # Of 168, for three programs a multiprocessor of sm_120, 8 bytes spill.
                return replace(config, registers=255)
            # Two loops spill 24 bytes in one stage.
            return replace(config, num_stages=2) if dropout and causal else config
        plain = generation == "ampere" and block == 32 and not (dropout or listed or partial)
        # In 2 stages 8 bytes spill, and of a head dimension of 24 in 3; .161 a score in both, causal .219 for .201 on the diagonal.
        return replace(config, num_stages=3) if plain and (packed or not causal) else config
    heavy = dropout or masked
    config = ATTENTION[kernel, itemsize, block]
    short = short and masked and itemsize == 2 and block <= 32 and mask_run >= 4
    if short and kernel == "forward":
        # Half of 128 rows would be of no query. .119 to .126 a score of a float32 mask, for .103 to .110 of twice as many; .182 for .158 on sm_120 with dropout.
        return TileConfig(64, 32 if generation == "blackwell" else 64, 4, 3)
    if kernel == "forward" and itemsize == 4 and 64 <= block <= 128 and not heavy:
        # On sm_80 3.39 a score at 64, where 32 columns spill 208 bytes and take 3.30; at 128 7.09 (8.33, 1.7 KB; with dropout or a mask 6.06 for 5.05).
        config = replace(config, columns=16)
    if kernel == "forward" and (generation, itemsize, block) == ("ampere", 2, 128) and mask_size == 4 and not causal:
        # Of 32 columns in 3 stages 8 bytes spill of parts of 48 and 96: .196 a score, for .188; others .165 to .25 for .188 to .31.
        return replace(config, columns=64, num_stages=2)
    if listed and kernel != "keys" and config.num_stages > 1:
        config = replace(config, num_stages=2 * config.num_stages - 1)
    if kernel == "queries" and dropout and not masked and (generation, itemsize) == ("ampere", 2) and block <= 32:
        return config  # .094 a score, and .116 of 64 rows, whose threads use half of dropout's calls
    if kernel == "queries" and masked and (generation, itemsize, block) == ("hopper", 2, 64):
        # .112 to .235 a score, for .162 to .306 of 32 rows, of which sm_90 makes no product of a whole warp group.
        if dropout and causal and (mask_size, mask_run) == (4, 8):
            return replace(config, columns=32)  # of 64 8 to 16 bytes spill: .236 to .244 a score, for .227 to .281
        return config
    if kernel == "queries" and (dropout or (masked and (itemsize > 2 or block > 32 or short))):
        return replace(config, rows=max(16, config.rows // 2))
    if kernel == "queries" and itemsize == 2 and generation == "blackwell":  # 8 bytes spill on sm_120; as many cycles
        if block == 64:
            return replace(config, columns=32)
        if block == 128 and causal:
            return replace(config, rows=64, num_warps=4)
    if kernel == "keys" and itemsize == 2 and block == 128 and (heavy or causal) and generation:
        # Where keys are fewer than columns of dk or dv, Triton lays warps along queries, of which 16 are too few, so that all warps compute the
        # same scores: of 64 keys 1.25 a score on sm_80, for .50. See docs/attention.md for what spills.
        runs_of_two = (mask_size, mask_run) == (4, 8) and not (padding or packed)
        if runs_of_two and dropout and causal and generation == "hopper":
            return TileConfig(16, 64, 4, 1)  # 16 bytes spill otherwise: .332 a score, for .314
        return config if not heavy and generation != "blackwell" else replace(config, num_stages=1)
    if kernel == "keys" and itemsize == 2 and block == 256 and generation in ("ampere", "hopper"):
        # .71 to 1.22 a score, where one stage takes 1.18 to 2.19 for shared memory; up to 72 bytes are kept over the loops, and none of them moved there.
        config = replace(config, num_stages=2)
    if heavy and kernel == "keys":
        # Of 128 keys a thread of four warps has four that share dropout's calls: .14 a score, where 64 take .21.
        shared = generation == "ampere" and itemsize == 2 and block <= 32
        if shared and not (masked or causal):
            # By triton 3.6 two stages spill 16 bytes at 32 (.168 a score packed, for .142; .159 and .146 with padding).
            return replace(config, num_stages=1 if block == 32 and older_compiler() else 2)
        config = replace(config, columns=max(16, config.columns // 2))
        if dropout and mask_size in (1, 4) and itemsize == 2 and block <= 32 and generation:
            # .240 a score of a float32 mask, where 3 stages spill and take .298; .311 for .363 of a bool one in causal order
            config = replace(config, num_stages=1)
        rigid = generation == "hopper" and mask_run >= 8 and (causal or mask_size == 4)
        if rigid and not dropout and itemsize == 2 and block <= 32:
            # .153 to .171 a score in 12 to 16 warps a multiprocessor, for .188 to .263 in 8; of a float32 mask packed and causal 32 to 40 bytes spill.
            config = replace(config, num_stages=1)
    if (
        kernel == "keys"
        and padding
        and not (heavy or causal or partial)
        and (generation, itemsize, block) == ("ampere", 2, 32)
    ):
        if older_compiler():  # triton 3.6 spills 16 bytes in three stages; as many cycles
            config = replace(config, num_stages=2)
    if itemsize == 2 and block <= 64:
        config = _of_64_columns(config, kernel, block, heavy, causal, mask_run, generation)
        if kernel == "forward" and dropout and not masked and block == 64 and generation == "ampere":
            return replace(config, columns=32)  # of 64 columns 16 to 48 bytes spill; as many cycles
        if kernel == "forward" and mask_size == 4 and block == 64 and generation == "ampere":
            return _of_64_with_a_float32_mask(config, causal, padding, dropout or mask_run <= 8)
        if kernel == "forward" and dropout and block == 64 and generation == "ampere":
            # Of a bool mask with padding 32 bytes spill with 4 warps (.243 a score, for .226 here), of a 16-bit one 8 in 3 stages (.179 for .175)
            # and 32 with padding (.182 here).
            narrow = mask_size == 2 and (padding or causal or packed)
            columns = 32 if narrow else config.columns
            wide = mask_size == 1 and padding
            return replace(config, num_warps=8) if wide else replace(config, columns=columns, num_stages=2)
        if dropout and masked and block <= 32:
            config = _of_32_with_a_mask(config, kernel, block, causal, padding, packed, mask_size, mask_run, generation)
    return config


def _of_64_columns(
    config: TileConfig,
    kernel: str,
    block: int,
    heavy: bool,
    causal: bool,
    mask_run: int,
    generation: str,
) -> TileConfig:
    """What 16 bits and head dimensions up to 64 need not to spill, beyond that; heavy: dropout or an attn_mask."""
    if kernel == "keys":
        if causal and not heavy and (block <= 32 or generation in ("hopper", "ampere")):
            # Two loops. On sm_80 at 64 8 to 64 bytes spill of 64 rows where v is wider, in .375 a score for .188; as wide .250 in both. On sm_90 .091 a score at 32, where 32 rows take .111, and .165 and .125 at 64, where 32 keys take .195.
            config = replace(config, rows=64 if generation == "hopper" and block <= 32 else 32, columns=64)
            if generation == "ampere" and block == 64 and older_compiler():
                return replace(config, num_stages=1)  # triton 3.6 spills 32 to 88 bytes in two; as many cycles
        if mask_run <= 4:
            rows = 16 if generation == "blackwell" and block <= 32 else config.rows
            config = replace(config, rows=rows, num_stages=2)
        return config
    if kernel == "forward":
        # On sm_100, where accumulators come a whole row to a lane, and sm_120, up to 304 bytes a thread spill with 4 warps.
        crowded = generation == "blackwell" or (block == 64 and generation == "hopper")
        short = mask_run <= (4 if block == 64 else 2)
        if (heavy and crowded) or short or (block == 64 and generation == "blackwell"):
            config = replace(config, num_warps=8)
        if generation == "blackwell" and heavy and (block == 64 or mask_run <= 4):
            config = replace(config, columns=32)
    return config


def _of_64_with_a_float32_mask(config: TileConfig, causal: bool, padding: bool, crowded: bool) -> TileConfig:
    """The forward's on sm_80, sm_86 and sm_89; crowded: with dropout, or in runs of 8 bytes.

    64 columns in 3 stages take 112 KB of shared memory where there is no padding: more than sm_86 and sm_89 have, and one program a multiprocessor of sm_80.
    """
    if crowded or padding:
        # With 4 warps 8 to 56 bytes spill, which the loop reads: .144 to .177 a score in runs of 8 bytes, for .158 to .206; of 16 .142 for .141, causal .161 for .185.
        return replace(config, num_warps=8, num_stages=2)
    # In two programs a multiprocessor .173 a score in causal order, for .155 in one; others .131 to .133, for .134.
    return replace(config, columns=32) if causal else replace(config, num_stages=2)


def _of_32_with_a_mask(
    config: TileConfig,
    kernel: str,
    block: int,
    causal: bool,
    padding: bool,
    packed: bool,
    mask_size: int,
    mask_run: int,
    generation: str,
) -> TileConfig:
    """What 16 bits with dropout and an attn_mask, in runs, need up to a head dimension of 32 not to spill, beyond that."""
    causal_fp32 = causal and mask_size == 4
    if kernel == "forward" and generation == "hopper" and (mask_run <= 2 * mask_size or causal_fp32):
        # With 4 warps 8 to 32 bytes spill: .164 a score of a float32 mask and .207 of a 16-bit one with padding, for .158 and .178; causal .234 and .269 for .164 and .207.
        return replace(config, num_warps=8)
    if kernel == "forward" and generation == "hopper" and causal and (mask_size, mask_run) == (2, 16):
        # Of 64 columns in 4 warps 8 bytes spill at 24 and 32 in fp16: .150 a score in both. With padding or in packed batches none does.
        alone = block == 32 and not (padding or packed)
        return replace(config, columns=128, num_warps=8) if alone else config
    if kernel == "forward" and generation == "hopper" and causal and (mask_size, mask_run) == (1, 4):
        # Of 64 columns, .181 to .334 a score for .180 to .201, comparisons are packed into registers, and in bf16 8 bytes spill.
        return replace(config, columns=32)
    if kernel == "forward" and generation == "ampere" and causal_fp32 and padding and mask_run == 8:
        # Of 64 columns 8 bytes spill, one access in the loop: .239 a score, for .188.
        return replace(config, columns=32)
    if kernel == "keys" and (mask_size, mask_run) == (2, 16):
        # In 3 stages 8 to 24 bytes spill, most in the loop: .227 a score on sm_80, for .212, and causal packed .246 on sm_90, for .230.
        crowded = generation == "ampere" or (generation == "hopper" and causal and packed)
        return replace(config, num_stages=2) if crowded else config
    return config


def _atomics_config(itemsize: int, block: int, dropout: bool, masked: bool, generation: str) -> TileConfig:
    """masked: causal, too, whose two loops need more registers than one."""
    config = ATTENTION_ATOMICS[itemsize, block]
    if not (dropout or masked or generation == "blackwell"):
        return config
    if itemsize > 2:
        return replace(config, columns=16)
    if block == 64 and dropout and masked:
        if generation in ("ampere", "hopper"):
            # .58 to .82 a score on sm_80, where 32 by 32 in 8 warps take .91 to 1.25, and .28 to .46 on sm_90, for 1.19. Of 32 rows .39 to .45 and
            # .31 to .35, but up to 48 bytes spill.
            return replace(config, rows=16, num_stages=1)
        return replace(config, columns=32, num_warps=8, num_stages=1)
    if block <= 32 and dropout and masked and generation in ("ampere", "blackwell"):
        # On sm_80 .320 a score for a head dimension of 24, where 16 rows in 2 stages spill and take .547.
        return replace(config, rows=32, columns=64, num_stages=1)
    return replace(config, rows=16 if masked and (dropout or block == 64) else 32)


def _scattered_config(
    kernel: str, block: int, neighbours: bool, generation: str, partial: bool, packed: bool, features: int
) -> TileConfig:
    """Of a 16-bit call with a mask that is loaded one by one; neighbours: whether a row's elements are; features: how many of dropout, causal order, padding."""
    atomics = kernel == "atomics"
    config = ATTENTION_SCATTERED_ROWS.get((kernel, block), ATTENTION_SCATTERED)
    if not neighbours:
        # .22 to .32 a score of a float32 mask with dropout and padding, for .55 to 1.08
        others = atomics or partial or packed or features > 2 or generation not in ("ampere", "hopper")
    elif block == 128:
        config = ATTENTION_SCATTERED_WIDE.get((generation, kernel), ATTENTION_SCATTERED)
        # 8 bytes spilled
        others = (kernel == "keys" and partial and features > 1) or (kernel == "queries" and features > 2)
    elif atomics and block == 32 and generation == "ampere" and features > 2:
        return TileConfig(16, 64, 4, 1)  # .578 a score, where 32 rows take .373 and spill 16 bytes
    elif kernel == "forward" and block == 64 and features <= 1 and generation in ("ampere", "hopper"):
        return TileConfig(64, 32, 4, 1)  # .195 / .187, with up to 248 registers
    else:
        # On sm_120 16 bytes would spill of rows that fill no block, in as many cycles.
        others = not generation or (atomics and block == 64 and generation == "blackwell")
    return ATTENTION_SCATTERED if others else config
