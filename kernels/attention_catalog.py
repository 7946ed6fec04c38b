"""The attention variants that ship: see `catalog`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .attention import attention_forward, forward_variant
from .attention_backward import attention_backward, keys_variant, mask_variant, queries_variant
from .attention_backward_atomics import attention_backward_atomics, rows_variant
from .attention_copies import copy_variant
from .attention_problem import Form, Problem, Sequences
from .attention_split import combine_variant
from .attention_weights import attention_weights, weights_run, weights_variant
from .entry import TARGETS, Budget, Entry
from .launch import Variant

EXAMPLE_KEYS = 72
GENERATIONS = {
    "sm_80": "ampere",
    "sm_86": "ampere",
    "sm_89": "ampere",
    "sm_90": "hopper",
    "sm_100": "blackwell",
    "sm_120": "blackwell",
}
SPLIT, SPLIT_KEYS = "hd128_fp16_split", 200  # the form whose example has too few programs, and keys enough to share


def catalog_entries() -> Iterator[Entry]:
    """The forms that a DETR's layers have, and the extremes of head dimensions, dtypes and masks."""
    fp16, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
    padded = Form(bf16, 32, 32, padding=True)
    forms = {
        "hd32_bf16_padding": padded,
        "hd32_fp16_padding_dropout": replace(padded, dtype=fp16, dropout=True, generation="ampere"),
        "hd32_fp16_packed_dropout": Form(fp16, 32, 32, dropout=True, packed=True, generation="ampere"),
        "hd32_bf16_float_mask": replace(padded, padding=False, mask=bf16, mask_vector=8),
        "hd32_bf16_padding_hopper": replace(padded, few_queries=True, few_keys=True, generation="hopper"),
        "hd64_bf16_float_mask_dropout_blackwell": Form(
            bf16, 64, 64, padding=True, mask=bf16, dropout=True, mask_vector=8, generation="blackwell"
        ),
        "hd64_bf16_causal_hopper": Form(
            bf16, 64, 64, causal=True, few_queries=True, few_keys=True, generation="hopper"
        ),
        SPLIT: Form(fp16, 128, 128),
        "hd256_bf16": Form(bf16, 256, 256),
        "hd20_fp32_bool_mask": Form(fp32, 20, 40, padding=True, mask=torch.bool),
    }
    # One tile fills the registers on purpose: two programs of four warps a multiprocessor.
    budget = Budget(255, 99 << 10, 512, 64 << 10, large_shared=113 << 10)
    # fp32 products by multiply-adds: 16 bytes on sm_120. On sm_80 to sm_90 keys at 256 are in two stages, and not among these: see docs/attention.md.
    wide = replace(budget, spills=16)
    # Neighbours of these cover what they have: the catalog is kept short.
    left_out = {
        "keys_hd32_fp16_padding_dropout",
        "queries_hd32_fp16_packed_dropout",
        "queries_hd64_bf16_float_mask_dropout_blackwell",
        "keys_hd64_bf16_float_mask_dropout_blackwell",
        "queries_hd32_bf16_padding_hopper",
        "keys_hd32_bf16_padding_hopper",
        "queries_hd32_bf16_float_mask",
        "keys_hd32_bf16_float_mask",
        "queries_hd64_bf16_causal_hopper",
        "keys_hd128_fp16_split",
        "forward_hd256_bf16",
        "queries_hd256_bf16",
        "queries_hd20_fp32_bool_mask",
    }
    for name, form in forms.items():
        split = name == SPLIT
        example = partial(_example, form, SPLIT_KEYS if split else EXAMPLE_KEYS)
        builds: dict[str, Callable[[Form], Variant]] = {
            "forward": partial(forward_variant, split=split),
            "queries": partial(queries_variant, split=split, exact=form.mask == bf16),
            "keys": keys_variant,
        }
        for kind, build in builds.items():
            variant = build(form)
            tile = int(variant.constants["BLOCK_M"]) * int(variant.constants["BLOCK_N"])
            limit = wide if form.dtype == fp32 else budget
            if f"{kind}_{name}" not in left_out:
                targets = _targets(build, form)
                yield Entry("attention", f"attention_{kind}_{name}", variant, tile, limit, example, targets)
        if form.dtype == fp32:
            variant = copy_variant(fp32, 3, max(form.blocks))
            yield Entry("attention", f"attention_copy_{name}", variant, 4096, budget, example)
        if split:
            variant = combine_variant(form, form.value_dim, True)
            yield Entry("attention", f"attention_combine_{name}", variant, 16 * form.value_dim, budget, example)
        if form.mask == bf16 and not form.dropout:
            variant = mask_variant(form, False, False)
            tile = int(variant.constants["BLOCK_M"]) * int(variant.constants["BLOCK_N"])
            yield Entry("attention", f"attention_mask_{name}", variant, tile, budget, example)
        if form.dropout and form.dtype == fp16 and not form.packed:
            run = weights_run(EXAMPLE_KEYS, form.dtype)
            of_weights = partial(weights_variant, averaged=True, dtype=form.dtype, run=run)
            targets = _targets(of_weights, form)
            variant = of_weights(form)
            yield Entry("attention", f"attention_weights_{name}", variant, 64 * 64, budget, example, targets)
            example = partial(_example, form, EXAMPLE_KEYS, atomics=True)
            builds = {"rows": rows_variant, "atomics": partial(keys_variant, atomics=True)}
            for kind, build in builds.items():
                variant, targets = build(form), _targets(build, form)
                tile = variant.constants["BLOCK_M"] * variant.constants.get("BLOCK_N", form.value_dim)
                yield Entry("attention", f"attention_{kind}_{name}", variant, tile, budget, example, targets)


def _targets(build: Callable[[Form], Variant], form: Form) -> tuple[str, ...] | None:
    """The targets whose launches take the form's variant; None: all."""
    variant = build(form)
    found = tuple(t for t in TARGETS if build(_on(form, GENERATIONS.get(t, ""))) == variant)
    return None if len(found) == len(TARGETS) else found


def _on(form: Form, generation: str) -> Form:
    """The form of the example, which is small, on a GPU of that generation."""
    few = generation == "hopper"
    return replace(form, few_queries=few, few_keys=few, generation=generation)


def _example(form: Form, keys: int, device: torch.device, atomics: bool = False) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of 72 queries and some keys; in fp32 rows start anywhere, and are copied."""
    gap = 1 if form.dtype == torch.float32 else 0
    dims = ((72, form.head_dim), (keys, form.head_dim), (keys, form.value_dim), (72, form.value_dim))
    q, k, v, dout = (torch.randn(1, n, 1, dim + gap, device=device).to(form.dtype)[..., :dim] for n, dim in dims)
    padding = mask = None
    if form.padding:
        padding = (torch.arange(keys, device=device) > 50)[None]
    if form.mask is not None:
        mask = torch.randn(72, keys + gap, device=device)
        mask = mask > 0 if form.mask == torch.bool else mask.to(form.mask)
        mask = mask[:, :keys]
    problem = Problem(
        q,
        k,
        v,
        padding,
        mask,
        causal=form.causal,
        dropout_p=0.1 if form.dropout else 0.0,
        seed=torch.zeros(1, dtype=torch.int64, device=device),
        tf32=form.tf32,
        sequences=_sequences(device) if form.packed else None,
        generation=form.generation,
    )

    def call() -> tuple[Tensor, ...]:
        out, lse = attention_forward(problem)
        if atomics:
            return out, lse, *attention_backward_atomics(problem, out, lse, dout)
        float_mask = form.mask is not None and form.mask.is_floating_point
        gradients = attention_backward(problem, out, lse, dout, with_mask=float_mask)
        with_weights = form.dropout and not form.packed
        weights = [attention_weights(problem, lse, True, form.dtype)] if with_weights else []
        kept = [] if form.packed else [lse]  # -inf behind the end of a sequence
        return (out, *kept, *weights, *(gradient for gradient in gradients if gradient is not None))

    return call


def _sequences(device: torch.device) -> Sequences:
    """Two sequences among the example's 72 queries and EXAMPLE_KEYS keys, and some tokens behind them."""
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in ([0, 10, 35], [0, 40, 60]))
    return Sequences(ends_q, ends_k, 25, 40)
