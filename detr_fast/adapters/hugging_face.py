"""Hugging Face transformers: attention by its own registry, and masks by its mask registry.

Importing this module registers both under the name "detr_fast". A model's configuration then asks for it by that name, as
for "sdpa", and modules that `accelerate` has marked run on `ops.attention`; all others that share the configuration run on
transformers' SDPA as before. The mask registry matters as much: for a name without an entry there, transformers passes no
mask at all and padding would be attended to.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from types import CodeType
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Module
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from detr_fast import dispatch
from detr_fast.adapters.base import MARK, Adapter, names_used, why_not_switch
from detr_fast.dispatch import BackendError
from detr_fast.ops.attention import ATTENTION, Sdpa

NAME = "detr_fast"
_PADDING = "_detr_fast_padding"
_PADDING_IN_ORDER = "_detr_fast_padding_in_order"
# Arguments besides those of `attention` that change nothing in what is computed here, and are passed by encoders, or that are known here.
_HARMLESS = {"output_hidden_states", "use_cache", "return_dict", "position_ids", "cache_position", "num_items_in_batch"}
_HARMLESS |= {"sliding_window"}  # which the mask has
if "position_bias" in inspect.signature(sdpa_attention_forward).parameters:  # transformers 5.23 has it
    _HARMLESS |= {"position_bias"}


class HuggingFaceAttention(Adapter):
    """Attention modules that ask transformers' registry, in models that run on its SDPA."""

    @classmethod
    def consider(cls, module: Module) -> type[Module] | str | None:
        config: Any = getattr(module, "config", None)
        forward = inspect.unwrap(type(module).forward)
        if not hasattr(config, "_attn_implementation") or not hasattr(forward, "__code__"):
            return None
        if "ALL_ATTENTION_FUNCTIONS" not in names_used(forward):
            return None
        if (reason := why_not_switch(module)) is not None:
            return reason
        return cls.why_never(type(module)) or _why_not_implementation(config) or type(module)

    @classmethod
    def why_never(cls, kind: type[Module]) -> str | None:
        """A reason against all modules of a class, whatever their model is set to."""
        if (reason := why_not_masks()) is not None:
            return reason
        if any(map(_compares_with_sdpa, {one.__module__ for one in kind.__mro__})):
            return "its model's code asks whether attention is 'sdpa', and computes something else under another name"
        return None

    @classmethod
    def describe(cls, replacement: type[Module]) -> str:
        return "detr_fast.ops.attention (transformers' registry)"

    @classmethod
    def switched(cls, module: Module) -> None:
        module.config._attn_implementation_internal = NAME  # type: ignore[union-attr]

    @classmethod
    def again(cls, module: Module) -> str | None:
        reason = cls.why_never(type(module)) or _why_not_implementation(module.config)
        if reason is None:
            cls.switched(module)
        return reason

    @classmethod
    def restored(cls, module: Module) -> None:
        config: Any = module.config
        if config._attn_implementation == NAME:  # else somebody has set another one since
            config._attn_implementation_internal = "sdpa"


def why_not_masks() -> str | None:
    """Why masks can't be made as transformers asks for them."""
    given = tuple(inspect.signature(sdpa_mask).parameters)[:5]
    if given == ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset"):
        return None
    return f"transformers {transformers.__version__} asks for masks differently ({', '.join(given)}): use a newer one"


def _why_not_implementation(config: Any) -> str | None:
    if config._attn_implementation in ("sdpa", NAME):
        return None
    return (
        f"its model runs on {config._attn_implementation!r} attention, which returns or needs what SDPA does not; "
        "call model.set_attn_implementation('sdpa') first"
    )


@cache
def _compares_with_sdpa(file: str) -> bool:
    """Whether code of a Python module compares something with "sdpa", as models do that hide keys by themselves."""
    defined = [value for value in vars(sys.modules[file]).values() if getattr(value, "__module__", None) == file]
    members = [member for one in defined if isinstance(one, type) for member in vars(one).values()]
    codes = (getattr(inspect.unwrap(one), "__code__", None) for one in [*defined, *members] if callable(one))
    return file != __name__ and any(_compares(inner) for code in codes if code is not None for inner in _nested(code))


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _compares(code: CodeType) -> bool:
    if "_attn_implementation" not in code.co_names:
        return False
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG")]
    return any(
        isinstance(known := first.argval, (str, tuple, frozenset))
        and first.opname.startswith("LOAD_CONST")
        and "sdpa" in ((known,) if isinstance(known, str) else known)
        and second.opname in ("COMPARE_OP", "CONTAINS_OP")
        for first, second in pairwise(steps)
    )


def attention(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query, key, value (B, H, L, E), the result (B, L, H, E) and no weights.

    A `position_bias`, which broadcasts to (B, H, L, S), is added to the scores: T5's, say.
    """
    arguments = (module, query, key, value, attention_mask, dropout, scaling, is_causal)
    if MARK not in module.__dict__ or not (dispatch.intervening or query.is_cuda):
        return sdpa_attention_forward(*arguments, **kwargs)
    requested = ATTENTION.requested
    by_name = requested not in (None, "sdpa")
    grouped = key.shape[1] != query.shape[1]
    reason = _why_theirs(query, key, kwargs)
    if reason is not None and by_name:
        raise BackendError(
            f"attention was asked to run on {requested!r} but {type(module).__name__} {reason}, which only transformers' SDPA "
            "takes. Leave the choice to the dispatcher with use_backend(attention='auto')."
        )
    if reason is None and grouped and not by_name:
        reason = (
            "has fewer heads of keys than of queries: unmeasured, use_backend(attention='triton') asks for the kernel"
        )
    if reason is not None:
        _explain_theirs(query, key, requested, reason)
        return sdpa_attention_forward(*arguments, **kwargs)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    padding, mask = split(attention_mask)
    ordered = _remembered(attention_mask, _PADDING_IN_ORDER)
    if ordered is not None:
        padding, mask, causal = ordered, None, True
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    bias = kwargs.get("position_bias")
    if bias is None and ordered is None:
        return ATTENTION(q, k, v, padding, mask, causal, dropout, scaling, grouped).contiguous(), None
    if bias is not None:
        if ordered is None and causal and k.shape[1] > q.shape[1]:  # what a static cache has no keys for yet
            k, v, bias = k[:, : q.shape[1]], v[:, : q.shape[1]], bias[..., : q.shape[1]]
        mask = _biased(bias, mask, key.dtype)
    given = (q, k, v, padding, mask, causal, dropout, scaling, grouped)
    chosen = ATTENTION.choose(*given)
    if isinstance(chosen, Sdpa):  # theirs then, to the bit
        return sdpa_attention_forward(*arguments, **kwargs)
    return chosen.run(*given).contiguous(), None


def _biased(bias: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The bias with what a mask (True = may attend, or numbers that are added) hides, as transformers' SDPA joins them.

    Padding and causal order stay apart from it, so that nothing becomes larger than the bias is.
    """
    if mask is not None:
        bias = torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else bias + mask
    return bias if bias.stride(-1) == 1 else bias.contiguous()  # T5 looks its bias up with the heads last


def _why_theirs(query: Tensor, key: Tensor, given: dict[str, Any]) -> str | None:
    """What a module does that `ops.attention` knows nothing of, in words."""
    if unknown := unknown_of(given):
        return f"gives it {', '.join(unknown)}"
    return None if key.shape[0] == query.shape[0] else "has queries of another batch size than its keys"


def unknown_of(given: dict[str, Any]) -> list[str]:
    """Names of arguments that may change what an attention computes."""
    return [name for name, value in given.items() if value is not None and value is not False and name not in _HARMLESS]


class _TransformersSdpa(Sdpa):
    """Stands in a record where transformers' own function runs."""

    name = "transformers' sdpa"


def _explain_theirs(query: Tensor, key: Tensor, requested: str | None, reason: str) -> None:
    if dispatch._recorders and not torch.compiler.is_compiling():
        batch, heads, queries, dim = query.shape
        dtype = str(query.dtype).removeprefix("torch.")
        shapes = f"B {batch} H {heads}/{key.shape[1]} {queries}×{key.shape[2]} hd {dim} {dtype}"
        against = "sdpa was asked for by name" if requested == "sdpa" else f"the module {reason}"
        reasons = dict.fromkeys(sorted(ATTENTION.names - {"sdpa"}), against)
        ATTENTION._record(dispatch._Decision(_TransformersSdpa(), reasons, None, shapes))


def split(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A mask (B, 1, L, S), True = may attend, as padding (B, S), True = padding, where it is one for all queries."""
    if mask is None:
        return None, None
    padding = padding_of(mask)
    if padding is None and mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1] == 1 and mask.stride(2) == 0:
        padding = ~mask[:, 0, 0]
    return (None, mask) if padding is None else (padding, None)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function: bool (B, 1, L, S), True = may attend, or None where nothing is hidden.

    Padding of a bidirectional model stays as small as it is, (B, S), seen through strides of 0, and is inverted once for
    all layers. Everything else is transformers' own for SDPA; one of causal order and padding remembers its padding.
    """
    padded = mask_function is bidirectional_mask_function and not use_vmap and attention_mask is not None
    if padded and attention_mask.shape == (batch_size, kv_length) and kv_offset == 0:  # type: ignore[union-attr]
        visible: Tensor = attention_mask.to(torch.bool)  # type: ignore[union-attr]
        if allow_is_bidirectional_skip and not _must_not_look(visible) and visible.all():
            return None
        return with_padding(visible[:, None, None].expand(batch_size, 1, q_length, kv_length), ~visible)
    options = {"allow_is_bidirectional_skip": allow_is_bidirectional_skip, "use_vmap": use_vmap, **kwargs}
    if mask_function is not None:
        options["mask_function"] = mask_function
    found: Any = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, **options
    )
    first = isinstance(q_offset, int) and q_offset == kv_offset == 0 and q_length == kv_length > 1
    if found is None or use_vmap or not first or mask_function is not causal_mask_function:
        return found
    if attention_mask is not None and attention_mask.shape == (batch_size, kv_length):
        _remember(found, _PADDING_IN_ORDER, ~attention_mask.to(torch.bool))
    return found


def with_padding(mask: Tensor | None, padding: Tensor | None) -> Any:
    """A mask that remembers the padding (B, S), True = padding, that it is made of, except where Dynamo traces."""
    if padding is not None:
        _remember(mask, _PADDING, padding)
    return mask


def padding_of(mask: Tensor | None) -> Tensor | None:
    """The padding that a mask remembers."""
    return _remembered(mask, _PADDING)


def _remember(mask: Tensor | None, what: str, padding: Tensor) -> None:
    if not torch.compiler.is_compiling():
        setattr(mask, what, padding)


def _remembered(mask: Tensor | None, what: str) -> Tensor | None:
    return None if torch.compiler.is_compiling() else getattr(mask, what, None)


def _must_not_look(visible: Tensor) -> bool:
    """Whether looking into a mask would break a graph. Elsewhere it is worth the wait, as for transformers' SDPA."""
    traced = isinstance(visible, FakeTensor) or torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced or (visible.is_cuda and torch.cuda.is_current_stream_capturing())


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)
