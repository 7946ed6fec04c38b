"""Rotary position embedding of queries and keys: the contract, its eager reference, its Triton kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import rotary as kernels
from detr_fast.kernels.launch import compile_launches
from detr_fast.kernels.rotary import MAX_COLUMNS, MAX_PROGRAMS, Turn, most_programs
from detr_fast.ops import regimes
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, on_one_device, wants_grad
from detr_fast.ops.layouts import Layouts, key, layouts, rehearsed


def rotary_embedding(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    per_pair: bool = False,
    first: int = 0,
    sorts: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Turn each pair (a, b) of channels of queries and keys to (a cos - b sin, b cos + a sin).

    Shapes: q (B, L, H, E), k (B, L, Hk, E) or None, cos and sin (L, R), (1, L, R) or (B, L, R), R even and at most E: channels from R
    on are left as they are. Pairs are channels p and R / 2 + p, as in Llama; interleaved: 2 p and 2 p + 1, as in RoFormer and GPT-J.
    The two of a pair may have angles of their own. per_pair: cos and sin have one number a pair, and are R / 2 wide. first: tokens
    before it are left as they are, and cos and sin have L - first. sorts: neighbours, with one number a pair, come as halves, as in DeepSeek's models.
    Returns both, turned, in their own dtypes: computed in fp32 by the kernel, and in what they and cos promote to by PyTorch, and rounded to that
    at the end. Autocast changes nothing.
    Raises ValueError where the shapes do not fit; BackendError as `use_backend` says.
    Source: Su et al., 2021, arXiv:2104.09864 (RoFormer).
    """
    arguments = (q, k, _table(cos), _table(sin), Turn(interleaved, per_pair, False, first, sorts), None)
    if (misfit := _misfit(*arguments[:5])) is not None:
        raise ValueError(misfit)
    if sorts and not (interleaved and per_pair and first == 0):
        raise ValueError(
            f"got sorts=True with interleaved={interleaved}, per_pair={per_pair} and first={first}; expected it with True, True and 0: it is "
            "for all tokens of neighbours with one number a pair"
        )
    if not (dispatch.intervening or q.is_cuda):
        return eager(*arguments)
    found: tuple[Tensor, Tensor | None] = ROTARY_EMBEDDING(*arguments)
    return found


def _table(angles: Tensor) -> Tensor:
    return angles[None] if angles.ndim == 2 else angles


def _misfit(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, turn: Turn) -> str | None:
    """Why the shapes do not fit, in words."""
    rotated = (2 if turn.per_pair else 1) * cos.shape[-1] if cos.ndim else 0
    fits = q.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape and turn.first >= 0
    if (
        fits
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1] == q.shape[1] - turn.first
        and 0 < rotated <= q.shape[3]
        and rotated % 2 == 0
        and (k is None or (k.ndim == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]))
    ):
        return None
    return (
        f"got q {tuple(q.shape)}, k {None if k is None else tuple(k.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)}, "
        f"with {'one number a pair' if turn.per_pair else 'one number a channel'} from token {turn.first} on; expected q (B, L, H, E), k (B, L, Hk, E) "
        f"or None, and cos and sin (L, R), (1, L, R) or (B, L, R) of the tokens that are turned, for an even number of channels up to E"
    )


@dataclass(frozen=True)
class RotaryEmbeddingCall(Call):
    size: int  # bytes of q and k
    misfit: str | None
    shape: tuple[int, ...]
    k_heads: int
    dtypes: tuple[torch.dtype, ...]  # of k and the angles
    turn: Turn
    out_dtype: torch.dtype | None
    wanted: tuple[bool, bool]  # which of q and k need a gradient
    table_grad: bool
    one_device: bool
    layouts: Layouts

    def shapes(self) -> str:
        batch, tokens, heads, dim = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        return f"B {batch} L {tokens} H {heads}/{self.k_heads} hd {dim} {dtype}"


def _signature(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *settings: Any) -> tuple[Any, ...]:
    return key(q), key(k), key(cos), key(sin), *settings


def _describe(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    turn: Turn,
    out_dtype: torch.dtype | None,
    *,
    situation: Situation,
) -> RotaryEmbeddingCall:
    return RotaryEmbeddingCall(
        device=q.device,
        architecture=dispatch.architecture(q.device),
        dtype=q.dtype,
        tensor_type=dispatch.tensor_type((q, k, cos, sin)),
        needs_grad=wants_grad(q, k),
        situation=situation,
        size=_work(q, k),
        misfit=_misfit(q, k, cos, sin, turn),
        shape=tuple(q.shape),
        k_heads=0 if k is None or k.ndim != 4 else k.shape[2],
        dtypes=tuple(t.dtype for t in (k, cos, sin) if t is not None),
        turn=turn,
        out_dtype=out_dtype,
        wanted=(wants_grad(q), wants_grad(k)),
        table_grad=wants_grad(cos, sin),
        one_device=on_one_device(q, k, cos, sin),
        layouts=layouts(situation, q, k, cos, sin),
    )


def _work(q: Tensor, k: Tensor | None, *_: Any) -> int:
    # not `nbytes`, which has no answer in sizes of torch.compile's
    return sum(t.numel() * t.itemsize for t in (q, k) if t is not None)


class TritonRotaryEmbedding(TritonImplementation):
    def why_not(self, call: RotaryEmbeddingCall) -> str | None:
        if call.misfit is not None:
            return call.misfit
        if not call.one_device:
            return SEVERAL_DEVICES
        if call.table_grad:
            return "cos or sin needs a gradient: only eager gives one"
        if call.shape[3] > MAX_COLUMNS:
            return f"head_dim {call.shape[3]} is over {MAX_COLUMNS}"
        tokens, heads = call.shape[0] * call.shape[1], (call.shape[2], call.k_heads)
        if most_programs(tokens, *heads) > MAX_PROGRAMS:
            return (
                f"{tokens:,} tokens of {heads[0]} and {heads[1]} heads: tokens, times heads in fours, are over 2^31 - 1"
            )
        for dtype in call.dtypes:
            if dtype not in self.dtypes:
                return f"keys or angles of {dtype}: it takes float32, bfloat16 and float16"
        if call.out_dtype is not None and call.k_heads and call.dtypes[0] != call.dtype:
            return f"queries of {call.dtype} and keys of {call.dtypes[0]}, where both are wanted in one dtype"
        return None

    def advice(self, call: RotaryEmbeddingCall) -> str | None:
        if call.situation.regime == "compiled":
            return "under torch.compile Inductor fuses it by itself"
        if call.situation.regime == "layer":
            return None
        return regimes.advice("rotary_embedding", call, call.size)

    def least(self, architecture: str | None, *kind: Any) -> int:
        return regimes.least("rotary_embedding", architecture)

    def note(self, call: RotaryEmbeddingCall) -> str | None:
        return regimes.note("rotary_embedding", call)

    def compiled_key(self, call: RotaryEmbeddingCall) -> Any:
        kinds = (call.dtype, *call.dtypes, call.out_dtype), call.turn._replace(first=0), call.wanted
        return call.device, call.shape[2:], call.k_heads, kinds, call.layouts

    def prepare(self, call: RotaryEmbeddingCall) -> None:
        compile_launches(lambda: self.rehearse(call), call.device)

    def rehearse(self, call: RotaryEmbeddingCall) -> None:
        """Forward, and backward where a gradient is needed, of such a call on meta tensors."""
        q, k, cos, sin = rehearsed(call.layouts)
        firsts = _heads_first(q, k)
        outputs = kernels.rotary_embedding(q, k, cos, sin, call.turn, firsts, call.out_dtype)
        if call.needs_grad:
            dq, dk, firsts = _of_wanted(outputs, firsts, call.wanted)
            own = None if call.out_dtype is None else call.dtype
            kernels.rotary_embedding(dq, dk, cos, sin, call.turn._replace(back=True), firsts, own)

    def run(
        self,
        q: Tensor,
        k: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        turn: Turn,
        out_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:
        turned, other = _turned(q, k, cos, sin, *turn, list(_heads_first(q, k)), out_dtype)
        return turned, None if k is None else other


class EagerRotaryEmbedding(Implementation):
    name = "eager"

    def run(self, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        return eager(*arguments)


# `out_dtype`, which adapters give, is the results' dtype where a library's own function has another than q and k.
ROTARY_EMBEDDING = Op(
    "rotary_embedding",
    signature=_signature,
    describe=_describe,
    implementations=(TritonRotaryEmbedding(), EagerRotaryEmbedding()),
    work=_work,
)


def eager(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    turn: Turn,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same by PyTorch's operations; cos and sin (B or 1, L - turn.first, R), or R / 2 wide."""
    if turn.per_pair:
        cos, sin = (t.repeat_interleave(2, -1) if turn.interleaved else torch.cat((t, t), -1) for t in (cos, sin))
    rest = cos.unsqueeze(2), sin.unsqueeze(2), turn, out_dtype
    return _eager(q, *rest), None if k is None else _eager(k, *rest)


def _eager(x: Tensor, cos: Tensor, sin: Tensor, turn: Turn, dtype: torch.dtype | None) -> Tensor:
    rotated, first, dtype = cos.shape[-1], turn.first, dtype or x.dtype
    part = x[:, first:, :, :rotated]
    y = (part * cos + _partners(part, turn.interleaved) * sin).to(dtype)
    if turn.sorts:
        y = torch.cat((y[..., ::2], y[..., 1::2]), -1)
    if rotated < x.shape[-1]:
        y = torch.cat((y, x[:, first:, :, rotated:].to(dtype)), -1)
    return y if first == 0 else torch.cat((x[:, :first].to(dtype), y), 1)


def _partners(x: Tensor, interleaved: bool) -> Tensor:
    """What each channel's sine is multiplied by: (-b, a) of a pair (a, b)."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


# ---------------------------------------------------------------------------------------------------------------------
# Registration: one op, as the gradient of a turn is a turn back, and that one's gradient a turn.


def _heads_first(q: Tensor, k: Tensor | None) -> tuple[bool, bool]:
    """Whether heads lie further apart than tokens in q and in k: so will the results, and the gradients."""
    one, two = (t is not None and t.stride(2) > t.stride(1) for t in (q, k))
    return one, two


def _of_wanted(
    gradients: Sequence[Tensor], heads_first: Sequence[bool], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor | None, tuple[bool, bool]]:
    """The one or two that are wanted, in the places of q and k, and which of them have heads first."""
    found: list[Any] = [both[:2] for both in zip(gradients, heads_first, wanted) if both[2]]
    (dq, one), (dk, two) = (*found, (None, False))[:2]
    return dq, dk, (one, two)


def _run(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    per_pair: bool,
    back: bool,
    first: int,
    sorts: bool,
    heads_first: list[bool],
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    turn = Turn(interleaved, per_pair, back, first, sorts)
    if back:
        q, k = kernels.arriving(q), None if k is None else kernels.arriving(k)
    turned, other = kernels.rotary_embedding(q, k, cos, sin, turn, (heads_first[0], heads_first[1]), out_dtype)
    return turned, q.new_empty(0) if other is None else other


def _fake(q: Tensor, k: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, heads_first, out_dtype = rest
    return _new(q, heads_first[0], out_dtype), q.new_empty(0) if k is None else _new(k, heads_first[1], out_dtype)


def _new(x: Tensor, heads_first: bool, dtype: torch.dtype | None) -> Tensor:
    if heads_first:
        return x.new_empty_strided(x.shape, kernels.heads_first_strides(x.shape), dtype=dtype)
    return x.new_empty(x.shape, dtype=dtype)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *rest: Any) -> Any:
        ctx.save_for_backward(cos, sin)
        ctx.rest, ctx.dtype = rest, q.dtype
        turned, other = _turned.below(q, k, cos, sin, *rest)
        ctx.mark_non_differentiable(*(y for y, learns in zip((turned, other), ctx.needs_input_grad) if not learns))
        return turned, other

    @staticmethod
    def backward(ctx: Any, *arriving: Tensor) -> Any:
        *turn, heads_first, out_dtype = ctx.rest
        turn = Turn(*turn)
        wanted = ctx.needs_input_grad[:2]
        dq, dk, firsts = _of_wanted(arriving, heads_first, wanted)
        own = None if out_dtype is None else ctx.dtype
        found = iter(_turned(dq, dk, *ctx.saved_tensors, *turn._replace(back=not turn.back), list(firsts), own))
        return *(next(found) if want else None for want in wanted), *(None,) * 9


def _autograd(q: Tensor, k: Tensor | None, *rest: Any) -> Any:
    return _Turned.apply(q, k, *rest) if wants_grad(q, k) else _turned.below(q, k, *rest)


_turned = define(
    "rotary_embedding(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool per_pair, bool back, SymInt first, "
    "bool sorts, bool[2] heads_first, ScalarType? out_dtype) -> (Tensor, Tensor)",
    run=_run,
    fake=_fake,
    autograd=_autograd,
    together=2,
)
