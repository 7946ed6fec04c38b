"""Where pixels lie, as sines and cosines: the contract, its eager reference, its Triton kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.dispatch import Call, Implementation, Op, Situation, TritonImplementation
from detr_fast.kernels import sine_positions as kernels
from detr_fast.ops.boundary import define


def sine_positions(
    mask: Tensor,
    features: int,
    temperature: float = 10_000.0,
    *,
    normalize: bool = True,
    scale: float = 2 * math.pi,
    shift: float = 0.0,
    padding: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sines and cosines of each pixel's row and column among the visible ones, rows first.

    Of a mask (N, H, W) bool, which is `padding` where pixels are hidden, the row is how many pixels of its column are visible up to here, the column how
    many of its row. normalize: (row + shift) / (rows in all + 1e-6) * scale, else the row as it is. Channel k of `features`
    is the sine (for odd k the cosine) of that over temperature^(2 (k // 2) / features).

    Returns (N, H, W, 2 * features) of `dtype`, computed in fp32 and rounded once. There is no gradient.
    Raises ValueError for another mask, or features that are no even number.
    Sources: arXiv:2005.12872, section A.4; arXiv:2010.04159's code for the shift of -0.5.
    """
    if mask.ndim != 3 or mask.dtype != torch.bool or features < 2 or features % 2:
        raise ValueError(
            f"got a mask {tuple(mask.shape)} of {mask.dtype} and {features} features; expected (N, H, W) of torch.bool and "
            "an even number of features for each axis"
        )
    settings = (features, float(temperature), normalize, float(scale), float(shift), padding, dtype)
    if not (dispatch.intervening or mask.is_cuda):
        return _eager(mask, *settings)
    return SINE_POSITIONS(mask, *settings)


@dataclass(frozen=True)
class SinePositionsCall(Call):
    mask: torch.Size
    features: int
    normalize: bool

    def shapes(self) -> str:
        return f"{(*self.mask, 2 * self.features)} {str(self.dtype).removeprefix('torch.')}"


def _signature(mask: Tensor, *settings: Any) -> tuple[Any, ...]:
    return mask.shape, type(mask), mask.device, *settings


def _describe(
    mask: Tensor, features: int, temperature: float, normalize: bool, *rest: Any, situation: Situation
) -> SinePositionsCall:
    return SinePositionsCall(
        device=mask.device,
        architecture=dispatch.architecture(mask.device),
        dtype=rest[-1],
        tensor_type=dispatch.tensor_type((mask,)),
        needs_grad=False,
        situation=situation,
        mask=mask.shape,
        features=features,
        normalize=normalize,
    )


class TritonSinePositions(TritonImplementation):
    def why_not(self, call: SinePositionsCall) -> str | None:
        return kernels.why_not(tuple(call.mask), call.features)

    def advice(self, call: SinePositionsCall) -> str | None:
        if call.situation.regime == "compiled":
            return "under torch.compile its parts stay what Inductor can see"
        return None  # not timed; but eager's 28 launches took an H200 70 µs of a captured step, for 25 × 34 pixels of 4 images

    def compiled_key(self, call: SinePositionsCall) -> Any:
        return call.device, call.features, call.normalize, call.dtype

    def prepare(self, call: SinePositionsCall) -> None:
        kernels.compile_sine_positions(call.features, call.normalize, call.dtype, call.device)

    def run(self, *arguments: Any) -> Tensor:
        found: Tensor = _sine_positions(*arguments)
        return found


class EagerSinePositions(Implementation):
    name = "eager"

    def run(self, *arguments: Any) -> Tensor:
        return _eager(*arguments)


SINE_POSITIONS = Op(
    "sine_positions",
    signature=_signature,
    describe=_describe,
    implementations=(TritonSinePositions(), EagerSinePositions()),
)


def _eager(
    mask: Tensor,
    features: int,
    temperature: float,
    normalize: bool,
    scale: float,
    shift: float,
    padding: bool,
    dtype: torch.dtype,
) -> Tensor:
    visible = ~mask if padding else mask
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    rows, columns = (visible.cumsum(axis, dtype=computed) for axis in (1, 2))
    if normalize:
        ends = rows[:, -1:, :] + 1e-6, columns[:, :, -1:] + 1e-6
        if shift:
            rows, columns = rows + shift, columns + shift
        rows, columns = rows / ends[0] * scale, columns / ends[1] * scale
    pair = torch.arange(features // 2, dtype=computed, device=mask.device)
    period = temperature ** (2 * pair / features)
    return torch.cat([waves(axis, period) for axis in (rows, columns)], dim=-1).to(dtype)


def waves(position: Tensor, period: Tensor) -> Tensor:
    """position (…), period (K,) -> (…, 2 K): for each period the sine and the cosine of position / period."""
    angle = position[..., None] / period
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Registration. A mask has no gradient.


def _run(*arguments: Any) -> Tensor:
    return kernels.sine_positions(*arguments)


def _fake(mask: Tensor, features: int, *rest: Any) -> Tensor:
    return mask.new_empty((*mask.shape, 2 * features), dtype=rest[-1])


def _autograd(*arguments: Any) -> Any:
    return _sine_positions.below(*arguments)


_sine_positions = define(
    "sine_positions(Tensor mask, int features, float temperature, bool normalize, float scale, float shift, "
    "bool padding, ScalarType dtype) -> Tensor",
    run=_run,
    fake=_fake,
    autograd=_autograd,
)
