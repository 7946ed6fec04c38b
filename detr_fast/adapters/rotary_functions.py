"""The functions by which transformers' attentions turn queries and keys, and what takes their place: `ops.rotary_embedding`.

Known by all of their code (`base.fingerprint`), and that of the function they call. They write each step to memory, in the dtype of queries or
in fp32; the kernel does so in one launch and rounds once, at the end, to the dtype that theirs come to. Where no kernel takes the call,
theirs is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from detr_fast.adapters.base import fingerprint, names_used
from detr_fast.adapters.blocks import is_dispatched
from detr_fast.kernels.rotary import Turn
from detr_fast.ops.rotary_embedding import ROTARY_EMBEDDING

Rotary = Callable[..., Any]


@dataclass(frozen=True)
class Form:
    """How a function turns, besides how its arguments lie.

    interleaved: pairs are neighbours. per_pair: cos and sin have one number a pair. first_half: of theirs the first half are read, one number a
    pair. sorts: neighbours come as halves. partial: channels beyond those of cos are copied. trailing: those before the last ones are. reverse: the
    other way. casts: the results have q's dtype, and not what q and cos promote to.
    """

    interleaved: bool = False
    per_pair: bool = False
    first_half: bool = False
    partial: bool = False
    casts: bool = False
    sorts: bool = False
    trailing: bool = False
    reverse: bool = False


def turned(
    form: Form, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, heads_first: bool, first: int = 0
) -> tuple[Any, Any] | None:
    """q and k, (B, H, L, E) or with tokens first, turned by cos and sin (B or 1, L - first, R); None where no kernel does it."""
    if form.reverse:
        sin = -sin
    if q.ndim != 4 or cos.ndim != 3 or (k is not None and (k.ndim != 4 or k.dtype != q.dtype)):
        return None
    if form.first_half:
        cos, sin = (t[..., : t.shape[-1] // 2] for t in (cos, sin))
    per_pair = form.per_pair or form.first_half
    if not form.partial and cos.shape[-1] * (2 if per_pair else 1) != q.shape[-1]:
        return None
    dtype = q.dtype if form.casts else torch.promote_types(q.dtype, torch.promote_types(cos.dtype, sin.dtype))
    if heads_first:
        q, k = q.transpose(1, 2), None if k is None else k.transpose(1, 2)
    arguments = (q, k, cos, sin, Turn(form.interleaved, per_pair, False, first, form.sorts), dtype)
    kernel = ROTARY_EMBEDDING.kernel(*arguments)
    if kernel is None:
        return None
    q, k = kernel.run(*arguments)
    return (q.transpose(1, 2), None if k is None else k.transpose(1, 2)) if heads_first else (q, k)


def _of_both(form: Form, theirs: Rotary, q: Any, k: Any, cos: Any, sin: Any, *rest: Any, **named: Any) -> Any:
    """Llama's, and most: cos (B or 1, L, R), seen by all heads of (B, H, L, E), or where unsqueeze_dim is 2 of (B, L, H, E)."""
    found = None
    if is_dispatched(q) and not rest and named.keys() <= {"unsqueeze_dim"}:
        dim = named.get("unsqueeze_dim", 1)
        found = turned(form, q, k, cos, sin, dim == 1) if dim in (1, 2) else None
    return theirs(q, k, cos, sin, *rest, **named) if found is None else found


def _of_one(form: Form, theirs: Rotary, x: Any, cos: Any, sin: Any, *rest: Any, **named: Any) -> Any:
    """Gemma's since its third, of queries or keys; DeepSeek's since its fourth, of the last channels."""
    found = None
    if is_dispatched(x) and len(rest) + len(named) < 2 and named.keys() <= {"unsqueeze_dim"}:
        dim = (*rest, *named.values(), 1)[0]
        before, part = _split(x, cos.shape[-1] * (2 if form.per_pair else 1)) if form.trailing else (None, x)
        found = turned(form, part, None, cos, sin, dim == 1) if dim in (1, 2) else None
        if found is not None and before is not None:
            found = torch.cat((before, found[0]), -1), None
    return theirs(x, cos, sin, *rest, **named) if found is None else found[0]


def _split(x: Tensor, last: int) -> tuple[Tensor | None, Tensor]:
    """The channels before the last ones, None where there are none, and those."""
    before = x.shape[-1] - last
    return (None, x) if before <= 0 else x.split((before, last), -1)


def _of_some(
    form: Form, theirs: Rotary, q: Any, k: Any = None, cos: Any = None, sin: Any = None, unsqueeze_dim: int = 1
) -> Any:
    """Qwen 4's, of queries and keys, or of one."""
    found = None
    if is_dispatched(q) and unsqueeze_dim in (1, 2):
        found = turned(form, q, k, cos, sin, unsqueeze_dim == 1)
    if found is None:
        return theirs(q, k, cos, sin, unsqueeze_dim)
    return found[0] if k is None else found


def _of_packed(form: Form, theirs: Rotary, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    """Qwen2-VL's for images, whose tokens are packed: q (L, H, E), cos (L, E); or (B, L, H, E)."""
    found = None
    if is_dispatched(q) and not (form.partial and cos.ndim == 3):  # which MiniMax's reads otherwise
        if q.ndim == 3 and cos.ndim == 2:
            found = turned(form, q[None], k[None], cos[None], sin[None], False)
            found = None if found is None else (found[0][0], found[1][0])
        else:
            found = turned(form, q, k, cos[None] if cos.ndim == 2 else cos, sin[None] if cos.ndim == 2 else sin, False)
    return theirs(q, k, cos, sin) if found is None else found


def _of_patches(form: Form, theirs: Rotary, q: Any, k: Any, cos: Any, sin: Any, **named: Any) -> Any:
    """DINOv3's: q (B, H, L, E), cos (patches, E); what comes before the patches is left as it is."""
    found = None
    if is_dispatched(q) and cos.ndim == 2 and q.ndim == 4:
        first = q.shape[2] - cos.shape[0]
        found = turned(form, q, k, cos[None], sin[None], True, first) if first >= 0 else None
    return theirs(q, k, cos, sin, **named) if found is None else found


def _of_pixels(form: Form, theirs: Rotary, q: Any, k: Any, cos: Any, sin: Any) -> Any:
    """SAM 3's: q (B, H, L, E), and cos is broadcast to that."""
    found = None
    if is_dispatched(q) and (cos.ndim == 2 or (cos.ndim == 3 and cos.shape[0] == 1)):
        found = turned(form, q, k, cos.view(1, *cos.shape[-2:]), sin.view(1, *sin.shape[-2:]), True)
    return theirs(q, k, cos, sin) if found is None else found


def _of_memory(
    form: Form,
    theirs: Rotary,
    q: Any,
    k: Any,
    cos: Any,
    sin: Any,
    num_k_exclude_rope: int = 0,
    repeat_freqs_k: bool = False,
) -> Any:
    """That of SAM 2's memory: q (B, H, L, E) and several times L keys that are turned, behind them others."""
    found, tokens = None, 0
    if (
        is_dispatched(q)
        and q.ndim == k.ndim == 4
        and math.prod(cos.shape[:-2]) == 1
        and cos.shape[-2] == q.shape[2] > 0
    ):
        tokens = k.shape[2] - num_k_exclude_rope
        times = tokens // q.shape[2]
        if num_k_exclude_rope >= 0 and times * q.shape[2] == tokens and (times == 1 or (times > 1 and repeat_freqs_k)):
            cos_, sin_ = (t.reshape(1, *t.shape[-2:]) for t in (cos, sin))
            # Each time is some heads more, with the same angles.
            keys = k[:, :, :tokens].unflatten(2, (times, -1)).flatten(1, 2)
            found = turned(form, q, keys, cos_, sin_, True)
    if found is None:
        return theirs(q, k, cos, sin, num_k_exclude_rope, repeat_freqs_k)
    keys = found[1].unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    return found[0], keys if tokens == k.shape[2] else torch.cat((keys, k[:, :, tokens:]), 2)


def _of_complex(form: Form, theirs: Rotary, xq: Any, xk: Any, freqs_cis: Any, *, heads_first: bool) -> Any:
    """By complex numbers (B or 1, L, E / 2): DeepSeek V2's of (B, H, L, E), Llama 4's of (B, L, H, E)."""
    found = None
    if is_dispatched(xq) and freqs_cis.ndim == 3 and freqs_cis.is_complex() and not freqs_cis.is_conj():
        found = turned(form, xq, xk, freqs_cis.real, freqs_cis.imag, heads_first)
    return theirs(xq, xk, freqs_cis) if found is None else found


def _of_complex_patches(form: Form, theirs: Rotary, query: Any, key: Any, freqs_ci: Any) -> Any:
    """By complex numbers of L patches, of any shape: that of Llama 4's vision model, of (B, L, H, E)."""
    if is_dispatched(query) and query.ndim == 4 and 2 * freqs_ci.numel() == query.shape[1] * query.shape[3]:
        turns = freqs_ci.reshape(1, query.shape[1], -1)
        return _of_complex(form, lambda q, k, _: theirs(q, k, freqs_ci), query, key, turns, heads_first=False)
    return theirs(query, key, freqs_ci)


_HALVES, _NEIGHBOURS = "f440c0abc8d5bfe8", ("e3d30feb4fab3da7", "fbcbbb283b0cd463")  # of `rotate_half`
_COMPLEX = Form(interleaved=True, per_pair=True, casts=True)
# By the fingerprints of a function and of the one that it calls: what takes its place, given it, and how it turns.
_CODE: dict[tuple[str | None, str | None], tuple[Rotary, Form]] = {
    ("5fe8b7e25b5ac124", _HALVES): (_of_both, Form()),  # Llama's
    ("4eca5292590d82ac", _HALVES): (_of_both, Form(casts=True)),  # OLMo's
    ("442dfc6c8a09e005", _HALVES): (_of_both, Form(casts=True)),  # ModernBERT's
    ("ca8590fd621c390d", _HALVES): (_of_both, Form(partial=True)),  # GPT-NeoX's
    ("165f9ef58e96cdb9", _HALVES): (_of_both, Form(partial=True)),
    ("8d86bd0d0836b764", _HALVES): (_of_both, Form(partial=True)),  # Nemotron's
    ("d98b6f65225f1d05", _HALVES): (_of_both, Form(partial=True)),  # Phi-3's
    ("e8d5b6bb94508421", _HALVES): (_of_one, Form()),
    ("38f36d6f6103ec2f", _HALVES): (_of_packed, Form(casts=True)),
    ("2e9786170858b213", _HALVES): (_of_patches, Form()),
    ("96a5efa05da97819", "4c2c1c5ff8d6b4e7"): (_of_pixels, Form(interleaved=True, casts=True)),
    ("e656a8d3f4ab6019", "cea45ee427d0c1f0"): (_of_both, Form(per_pair=True)),  # gpt-oss'
    ("3c3cd7decc4f5720", "fbcbbb283b0cd463"): (_of_both, Form(interleaved=True, partial=True)),  # GLM-4V's
    ("fc909b247d80cace", "fbcbbb283b0cd463"): (_of_both, Form(interleaved=True, casts=True)),  # ERNIE-VL's
    ("091446e49c71eab1", None): (_of_both, Form(interleaved=True, first_half=True, sorts=True)),  # DeepSeek's
    ("0f7d4d8a9f3ff357", None): (_of_both, Form(interleaved=True, first_half=True, sorts=True)),  # Mistral's
    ("c6d70a104e41aa21", None): (partial(_of_complex, heads_first=True), _COMPLEX),  # DeepSeek V2's
    ("f38bc721847238e2", None): (partial(_of_complex, heads_first=False), _COMPLEX),  # Llama 4's
    ("bde596a54ddd5f2e", "75452e6615392a72"): (_of_complex_patches, _COMPLEX),
    ("135c7958fee892e8", "fbcbbb283b0cd463"): (_of_one, replace(_COMPLEX, trailing=True)),  # DeepSeek V4's
    ("1adc81a37f6907ea", "4c2c1c5ff8d6b4e7"): (_of_memory, Form(interleaved=True, casts=True)),  # SAM 2's memory
    ("242dff6ee0425ee3", _HALVES): (_of_some, Form(partial=True)),  # Qwen 4's
    ("5fe8b7e25b5ac124", "23b82ca4103dcd0d"): (_of_both, Form(reverse=True)),  # nanochat's
    ("7b90fd47bc72fde7", "d7f89fab96d12e19"): (_of_both, Form(interleaved=True, first_half=True)),  # PE's for sound
    ("8e037e040c825c47", _HALVES): (_of_both, Form(casts=True)),  # HunYuan-VL's
    ("38a5695541259491", "cd4c99510c392595"): (_of_packed, Form(interleaved=True, casts=True)),  # Inkling's
    ("2c4a52c01c493f0a", _HALVES): (_of_packed, Form(partial=True)),  # MiniMax-VL's
    ("e656a8d3f4ab6019", "77a05ad01b7ab841"): (_of_both, Form(interleaved=True, per_pair=True)),  # privacy filter's
    **{("5fe8b7e25b5ac124", code): (_of_both, Form(interleaved=True)) for code in _NEIGHBOURS},  # BLT's
    **{("f5d527b081d635c5", code): (_of_both, Form(interleaved=True, casts=True)) for code in _NEIGHBOURS},  # Cohere's
    **{  # GLM's, ERNIE's, Helium's
        (function, code): (_of_both, Form(interleaved=True, first_half=True, partial=partial_, casts=casts))
        for code in _NEIGHBOURS
        for function, partial_, casts in (
            ("a0ee769881476e10", True, False),
            ("0b81936a18edfb01", False, True),
            ("8015268fec35be38", False, False),
        )
    },
}
_PAIRS = (
    "rotate_half",
    "rotate_pairwise",
    "rotate_half_llm",
    "rotate_half_text",
    "_apply_rotary_emb",
    "reshape_for_broadcast",
    "stack_freqs",
)  # what such functions call


def place_of(function: Any) -> Rotary | None:
    """What takes a function's place, or None where its code is not known."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__") or function.__closure__:
        return None
    called = [function.__globals__.get(name) for name in _PAIRS if name in names_used(function)]
    if (
        len(called) > 1
        or not all(isinstance(one, FunctionType) for one in called)
        or function.__globals__.get("torch") is not torch
    ):
        return None
    return _place_of(function, *called)


@cache
def _place_of(function: FunctionType, called: FunctionType | None = None) -> Rotary | None:
    found = _CODE.get((fingerprint(function), None if called is None else fingerprint(called)))
    return None if found is None else partial(found[0], found[1], function)
