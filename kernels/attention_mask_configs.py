"""Tiles of a mask's gradient, and of attention's weights, each with the static analysis behind it (`attention_configs.py`)."""

from __future__ import annotations

from dataclasses import replace

from .configs import TileConfig

# The gradient of a mask, in 16 bits. At 32 .112 a score on sm_80 and .109 on sm_90, where 16 by 64 take .191 and .203; at 64 .145 on
# sm_80 (.207 of 32 by 64; with dropout 5 to 17 % fewer), and .119 on sm_90, where tensor cores take 64 rows (.162 with 8 warps). Narrower where rows share the
# mask, as its tiles are few then. Up to 32, registers for three programs a multiprocessor, where those do: ptxas alone aims at four, and spills 16 to 24 bytes on sm_80 and sm_120.
ATTENTION_MASK = {
    16: TileConfig(64, 32, 4, 1, registers=168),
    32: TileConfig(64, 32, 4, 1, registers=168),
    64: TileConfig(64, 32, 4, 1),
}
# What alone takes more than 168 registers with a mask that is loaded one by one: by generation and bytes of its elements. 8 to 16 bytes
# spilled, and in two programs a multiprocessor instead of three a score takes up to 4 % fewer cycles.
ATTENTION_MASK_CROWDED = {
    ("ampere", 2): {"causal", "periodic"},
    ("ampere", 4): {"dropout", "causal", "packed", "periodic"},
    ("hopper", 4): {"padding"},
    ("blackwell", 4): {"padding", "packed"},
}
ATTENTION_SHARED_MASK = TileConfig(16, 32, 4, 1)


def mask_config(
    block: int,
    *,
    dropout: bool,
    causal: bool,
    scattered: bool,
    mask_run: int,
    mask_size: int,
    padding: bool,
    packed: bool,
    periodic: bool,
    generation: str,
) -> TileConfig:
    """Of the gradient of a mask that rows do not share, in 16 bits and up to a head dimension of 64; arguments as `attention_config`'s."""
    config = ATTENTION_MASK[block]
    # On sm_100 and sm_120 of a float32 mask with dropout up to 32 bytes spill of 32 rows: .247 a score by sm_90's rates, for .239.
    tall = generation == "blackwell" and dropout and mask_size == 4 and not (scattered or causal)
    if block == 64 and generation in ("", "blackwell") and not tall:
        config = replace(config, rows=32, columns=64)
    # 198 to 228 on sm_80: 168 spill 8 bytes, and 8 to 16 of masks that are read one by one.
    features = {"dropout": dropout, "causal": causal, "padding": padding, "packed": packed}
    present = {name for name, value in features.items() if value}
    alone = ATTENTION_MASK_CROWDED.get((generation, mask_size), set())
    crowded = scattered and (mask_run == 0 or (periodic and "periodic" in alone) or bool(present & alone))
    if generation == "ampere":
        # Of a float32 mask with dropout 16 bytes spill with 168, of a packed batch with a 16-bit mask in runs of 4 bytes 24.
        wide = (dropout and mask_size == 4) or (packed and (mask_size, mask_run) == (2, 4))
        # At 17 to 32 8 to 24 do with padding, in runs of 4 and 8 bytes, and where masks come again, in as many cycles within 1 %.
        short_runs = mask_run < 16 and not scattered
        crowded = crowded or wide or (block == 32 and (periodic or padding or short_runs))
    if block <= 32 and (len(present) >= 2 or crowded):
        config = replace(config, registers=255)
    if block == 64 and generation == "blackwell":
        # ptxas alone aims at three programs on sm_120, and spills 8 bytes. With 4 warps, 16 to 24 are spilled on sm_100 where most is loaded one by one.
        heavy = scattered and dropout and len(present) >= 2
        config = replace(config, num_warps=8) if heavy else replace(config, registers=255)
    return config


def shared_mask_config(dropout: bool, generation: str) -> TileConfig:
    """Of the gradient of a mask whose rows share it, in 16 bits and up to a head dimension of 32."""
    # ptxas alone takes 64 to 96, for more programs a multiprocessor, and spills 8 bytes: with padding .285 a score on sm_80 in causal
    # order, for .266, and .264 on sm_90, for .248.
    most = 128 if dropout and generation == "hopper" else 168 if generation in ("ampere", "hopper") else 0
    return replace(ATTENTION_SHARED_MASK, registers=most)


def weights_config(
    itemsize: int,
    block: int,
    *,
    dropout: bool,
    masked: bool,
    causal: bool,
    scattered: bool,
    neighbours: bool,
    mask_size: int,
    padding: bool,
    periodic: bool,
    generation: str,
) -> TileConfig:
    """Of the weights; neighbours: whether a row's elements of an attn_mask are, else as `attention_config`'s.

    q and k alone: larger tiles than a mask's gradient, for longer runs of what is stored.
    """
    side = 64 if itemsize == 2 and block <= 128 else 32
    # With 4 warps 16 to 40 bytes spill (on sm_80 .387 to .237 a score; with 8 .382 to .247). Others take up to a fifth more with 8.
    wide = padding and block == 128 and masked and (dropout or mask_size == 4)
    crowded = wide or (dropout and causal and (masked or padding))
    crowded = generation == "blackwell" or (block >= 64 and crowded)
    if scattered and itemsize == 2 and block == 128 and generation in ("ampere", "hopper"):
        # Of a mask that is loaded one by one, 8 to 144 bytes spill with 4 warps, averaged over heads, up to 56 accesses of them in the loop.
        sparse = dropout or (causal and mask_size == 4) if generation == "ampere" else dropout and mask_size == 1
        if neighbours and not (sparse or crowded):
            return TileConfig(
                64, 128, 8, 1
            )  # .164 to .203 a score on sm_80, for .202 to .335; .143 to .211 on sm_90, for .174 to .234
        # .273 a score of a float32 mask in causal order, for .254 to .309, and .227 to .233 of one whose columns are no neighbours and that comes again, for .215 to .240
        crowded = crowded or (generation == "ampere" and (sparse if neighbours else periodic))
    # ptxas alone takes 168 there, for three programs a multiprocessor, and spills 8 bytes: .325 a score, for .252.
    full = padding and dropout and causal and mask_size == 1 and block <= 32 and generation == "ampere"
    return TileConfig(side, side, 8 if side == 64 and crowded else 4, 1, registers=255 if full else 0)
