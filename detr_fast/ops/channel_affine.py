"""ReLU of a scale and a shift for each channel, and of a residual: the contract, its eager reference, its Triton kernel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import channel_affine as kernels
from detr_fast.kernels.launch import compile_launches
from detr_fast.kernels.rows import MAX_BLOCK
from detr_fast.ops.boundary import SEVERAL_DEVICES, define, on_one_device, wants_grad
from detr_fast.ops.layouts import Layouts, aligned, key, layouts, rehearsed
from detr_fast.ops.pixels import images_of, rows_of


def channel_affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
) -> Tensor:
    """relu(x * scale + shift + residual * residual_scale): what follows a convolution in a ResNet of frozen batch norms.

    Shapes: x and residual (B, C, H, W), scale, shift and residual_scale (C,); without a residual_scale the residual is added
    as it is. Returns (B, C, H, W) in x's dtype, channels last. Computed in fp32 (fp64 for fp64).
    Raises ValueError where the shapes do not fit; BackendError as `use_backend` says.
    Sources: He et al., 2015, arXiv:1512.03385; Carion et al., 2020, arXiv:2005.12872, section A.4 (frozen batch norms).
    """
    per_channel = [t for t in (scale, shift, residual_scale) if t is not None]
    if (
        x.ndim != 4
        or any(t.shape != x.shape[1:2] for t in per_channel)
        or (residual is not None and residual.shape != x.shape)
        or (residual is None and residual_scale is not None)
    ):
        raise ValueError(
            f"got x {tuple(x.shape)}, {', '.join(str(tuple(t.shape)) for t in per_channel)} for its channels and residual "
            f"{None if residual is None else tuple(residual.shape)}; expected (B, C, H, W), (C,) for each, and a residual "
            "like x, or neither residual nor its scale"
        )
    if not (dispatch.intervening or x.is_cuda):
        return _eager(x, scale, shift, residual, residual_scale)
    return CHANNEL_AFFINE(x, scale, shift, residual, residual_scale)


@dataclass(frozen=True)
class ChannelAffineCall(Call):
    images: torch.Size
    dtypes: tuple[torch.dtype | None, ...]  # of x, the residual and the residual's scale
    wanted: tuple[bool, bool]  # which of x and the residual need a gradient
    parameter_grad: bool
    one_device: bool
    layouts: Layouts  # of all tensors

    def shapes(self) -> str:
        return f"{tuple(self.images)} {str(self.dtype).removeprefix('torch.')}"


def _signature(*tensors: Any) -> tuple[Any, ...]:
    return tuple(map(key, tensors))


def _describe(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    *,
    situation: Situation,
) -> ChannelAffineCall:
    return ChannelAffineCall(
        device=x.device,
        architecture=dispatch.architecture(x.device),
        dtype=x.dtype,
        tensor_type=dispatch.tensor_type((x, scale, shift, residual, residual_scale)),
        needs_grad=wants_grad(x, residual),
        situation=situation,
        images=x.shape,
        dtypes=tuple(None if t is None else t.dtype for t in (x, residual, residual_scale)),
        wanted=(wants_grad(x), wants_grad(residual)),
        parameter_grad=wants_grad(scale, shift, residual_scale),
        one_device=on_one_device(x, scale, shift, residual, residual_scale),
        layouts=layouts(situation, x, scale, shift, residual, residual_scale),
    )


class TritonChannelAffine(TritonImplementation):
    def why_not(self, call: ChannelAffineCall) -> str | None:
        if not call.one_device:
            return SEVERAL_DEVICES
        if call.parameter_grad:
            return "a scale or shift needs a gradient: only eager gives one"
        if not 1 <= call.images[1] <= MAX_BLOCK:
            return f"{call.images[1]} channels: it takes 1 to {MAX_BLOCK}"
        if call.dtypes[1] not in (None, call.dtype):
            return f"a residual of {call.dtypes[1]} beside {call.dtype}: it takes one dtype for both"
        return None

    def advice(self, call: ChannelAffineCall) -> str | None:
        if call.situation.regime == "compiled":
            return "under torch.compile Inductor fuses it by itself"
        return None  # one pass: on an H200 109 MB take 58.7 µs, as long as a copy; eager makes three passes or more

    def compiled_key(self, call: ChannelAffineCall) -> Any:
        return call.device, call.images[1], call.dtypes, call.wanted, aligned(call.layouts)

    def prepare(self, call: ChannelAffineCall) -> None:
        compile_launches(lambda: self.rehearse(call), call.device)

    def rehearse(self, call: ChannelAffineCall) -> None:
        """Forward, and backward where a gradient is needed, of such a call on meta tensors."""
        x, scale, shift, residual, residual_scale = _with_fp32_scales(*rehearsed(call.layouts))
        y = _run_forward(x, scale, shift, residual, residual_scale)
        if call.needs_grad:
            _run_backward(y, y, scale, residual_scale, call.wanted)

    def run(self, *tensors: Any) -> Tensor:
        return _forward(*_with_fp32_scales(*tensors))


def _with_fp32_scales(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, residual_scale: Tensor | None
) -> tuple[Any, ...]:
    return x, scale.float(), shift.float(), residual, None if residual_scale is None else residual_scale.float()


class EagerChannelAffine(Implementation):
    name = "eager"

    def run(self, *tensors: Any) -> Tensor:
        return _eager(*tensors)


CHANNEL_AFFINE = Op(
    "channel_affine",
    signature=_signature,
    describe=_describe,
    implementations=(TritonChannelAffine(), EagerChannelAffine()),
)


def _eager(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, residual_scale: Tensor | None = None
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale, shift = (t.to(dtype)[:, None, None] for t in (scale, shift))
    y = torch.addcmul(shift, x.to(dtype), scale)
    if residual is not None and residual_scale is not None:
        y = torch.addcmul(y, residual.to(dtype), residual_scale.to(dtype)[:, None, None])
    elif residual is not None:
        y = y + residual
    return channels_last(y.relu(), x.dtype)


def gradient_inside(dy: Tensor, y: Tensor, scale: Tensor, scaled: bool, kernel: bool) -> Tensor:
    """What arrives for y = relu(…), a call's result, where y > 0, and with `scaled` times the scale: in memory of its own.

    kernel: by the kernel that the call ran on. Not to be differentiated.
    """
    if kernel:
        return channel_affine_backward.below(dy, y, scale.float(), None, [scaled, not scaled])[0 if scaled else 1]
    inside = dy.masked_fill(y <= 0, 0.0)
    return channels_last(inside * scale[:, None, None] if scaled else inside, y.dtype)


def rehearse_gradients(channels: Iterable[int], dtype: torch.dtype) -> None:
    """`gradient_inside` of so many channels, with and without the scale, on meta tensors."""
    for number in channels:
        y = torch.empty(1, number, 1, 1, dtype=dtype, device="meta")
        for scaled in (False, True):
            _run_backward(y, y, y.new_empty(number, dtype=torch.float32), None, [scaled, not scaled])


# ---------------------------------------------------------------------------------------------------------------------
# Registration: forward and backward are ops of their own, channels last inside.


def channels_last(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images in `dtype`, channels last, also inside vmap, where no memory format of four dimensions may be asked for."""
    return images_of(rows_of(images).to(dtype, memory_format=torch.contiguous_format).contiguous())


def _run_forward(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, residual_scale: Tensor | None
) -> Tensor:
    return images_of(kernels.channel_affine_forward(rows_of(x), scale, shift, rows_of(residual), residual_scale))


def _fake_forward(x: Tensor, *_: Any) -> Tensor:
    return images_of(x.new_empty(rows_of(x).shape))


def _run_backward(
    dy: Tensor, y: Tensor, scale: Tensor, residual_scale: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    kinds = {"with_dx": wanted[0], "with_dresidual": wanted[1]}
    found = kernels.channel_affine_backward(rows_of(dy), rows_of(y), scale, residual_scale, **kinds)
    dx, dresidual = (y.new_empty(0) if g is None else images_of(g) for g in found)
    return dx, dresidual


def _fake_backward(
    dy: Tensor, y: Tensor, scale: Tensor, residual_scale: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    dx, dresidual = (images_of(y.new_empty(rows_of(y).shape)) if want else y.new_empty(0) for want in wanted)
    return dx, dresidual


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, residual_scale: Tensor | None
    ) -> Tensor:
        y = _forward.below(x, scale, shift, residual, residual_scale)
        ctx.save_for_backward(y, scale, residual_scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[3]]
        found = channel_affine_backward(dy, *ctx.saved_tensors, wanted)
        dx, dresidual = (g if want else None for g, want in zip(found, wanted))
        return dx, None, None, dresidual, None


class _Backward(torch.autograd.Function):
    """The first backward, which is linear in dy; its own backward is eager."""

    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, y: Tensor, scale: Tensor, residual_scale: Tensor | None, wanted: list[bool]
    ) -> Any:
        ctx.save_for_backward(y, scale, residual_scale)
        ctx.dtype, ctx.wanted = dy.dtype, wanted
        ctx.set_materialize_grads(False)
        return channel_affine_backward.below(dy, y, scale, residual_scale, wanted)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        y, *scales = ctx.saved_tensors
        total = torch.zeros_like(y, dtype=torch.float32)
        for arriving, scale, want in zip(upstream, scales, ctx.wanted):
            if arriving is not None and want:
                total = total + (arriving.float() if scale is None else arriving * scale[:, None, None])
        return total.masked_fill(y <= 0, 0.0).to(ctx.dtype), None, None, None, None


def _autograd_forward(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, *rest: Any) -> Any:
    if wants_grad(x, residual):
        return _Forward.apply(x, scale, shift, residual, *rest)
    return _forward.below(x, scale, shift, residual, *rest)


def _autograd_backward(dy: Tensor, *rest: Any) -> Any:
    return _Backward.apply(dy, *rest) if wants_grad(dy) else channel_affine_backward.below(dy, *rest)


_forward = define(
    "channel_affine(Tensor x, Tensor scale, Tensor shift, Tensor? residual, Tensor? residual_scale) -> Tensor",
    run=_run_forward,
    fake=_fake_forward,
    autograd=_autograd_forward,
)
channel_affine_backward = define(
    "channel_affine_backward(Tensor dy, Tensor y, Tensor scale, Tensor? residual_scale, bool[2] wanted) -> (Tensor, Tensor)",
    run=_run_backward,
    fake=_fake_backward,
    autograd=_autograd_backward,
)
