"""One rule for every kernel: at most twice the error that eager PyTorch itself makes in the same dtype.

Both errors are measured against the same computation in fp64 on the same (already rounded) inputs, as the largest and as
the root-mean-square error, over outputs and gradients. A few units in the last place of the largest value are the floor,
for where eager happens to be exact.

Over a handful of elements eager's error is luck: two columns of LayerNorm have a gradient of rounding alone, and there one
row in six of a kernel that is twice as accurate as eager on average has over twice eager's error. So where a small tensor
is over the bound, eager is also run on neighbours of the inputs, each against its own truth: the same numbers up to a unit
in the last place, rounded otherwise. Its largest error then counts. (Of the same rows one in a thousand remains, and none
with eight columns.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

FLOOR_ULPS = 4.0
FEW_ELEMENTS = 1024
NEIGHBOURS = 16


def assert_as_accurate_as_eager(
    function: Callable[..., Any],
    *,
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype | Sequence[torch.dtype],
    grad: bool = True,
    upstream: Callable[[Tensor], Tensor] = torch.randn_like,
) -> None:
    """Assert that `function(*inputs)` is at most twice as wrong as `reference(*inputs)`, both in `dtype`.

    inputs: floating-point tensors are rounded to `dtype` (one for all, or one per input) and, with `grad`, differentiated;
    everything else is passed as it is. upstream: makes the gradient that arrives at an output (say, an expanded one).
    """
    dtypes = [dtype] * len(inputs) if isinstance(dtype, torch.dtype) else list(dtype)
    rounded = [_rounded(value, kind) for value, kind in zip(inputs, dtypes)]
    exact = [value.double() if _is_float(value) else value for value in rounded]
    with torch.no_grad():
        arriving = [upstream(y) for y in _flat(reference(*rounded))]
    truth = _run(reference, exact, [g.double() for g in arriving], grad)
    eager = _run(reference, rounded, arriving, grad)
    ours = _run(function, rounded, arriving, grad)

    @cache
    def neighbours() -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(NEIGHBOURS):
            near = [_neighbour(value, generator) for value in rounded]
            near_arriving = [_neighbour(g, generator) for g in arriving]
            near_exact = [value.double() if _is_float(value) else value for value in near]
            near_truth = _run(reference, near_exact, [g.double() for g in near_arriving], grad)
            found.append((_run(reference, near, near_arriving, grad), near_truth))
        return found

    def near(name: str) -> list[tuple[Tensor, Tensor]]:
        return [(eagers[name], truths[name]) for eagers, truths in neighbours()]

    for name, expected in truth.items():
        assert_close_to_truth(name, ours[name], eager[name], expected, partial(near, name))


def assert_close_to_truth(
    name: str,
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    neighbours: Callable[[], Iterable[tuple[Tensor, Tensor]]] = tuple,
) -> None:
    """The rule itself, for one tensor; neighbours: eager's results and the truth for inputs a unit in the last place away."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert ours.dtype == eager.dtype, f"{name}: dtype {ours.dtype}, expected {eager.dtype}"
    if truth.numel() == 0:
        return
    finite = torch.isfinite(truth)
    assert torch.equal(torch.isfinite(ours) | ~finite, torch.ones_like(finite)), (
        f"{name}: NaN or inf where {truth.dtype} is finite"
    )
    floor = FLOOR_ULPS * torch.finfo(ours.dtype).eps * truth[finite].abs().max().item() if finite.any() else 0.0
    for measure, reduce in (("largest", torch.amax), ("root-mean-square", _root_mean_square)):
        error, allowed = (reduce((t.double() - truth)[finite].abs()).item() for t in (ours, eager))
        if error > 2.0 * allowed + floor and truth.numel() < FEW_ELEMENTS:
            near = [(e.double() - t)[torch.isfinite(t)].abs() for e, t in neighbours()]
            allowed = max([allowed, *(reduce(one).item() for one in near if one.numel())])
        bound = 2.0 * allowed + floor
        assert error <= bound, (
            f"{name}: {measure} error {error:.3e} is over 2 × eager's {allowed:.3e} + {FLOOR_ULPS:g} ulps = {bound:.3e}"
        )


def _run(
    function: Callable[..., Any], inputs: Sequence[Any], arriving: Sequence[Tensor], grad: bool
) -> dict[str, Tensor]:
    leaves = [_leaf(value) if grad and _is_float(value) else value for value in inputs]
    outputs = _flat(function(*leaves))
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    sources = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad}
    if sources:
        upstream = [g.to(y.dtype) for g, y in zip(arriving, outputs)]
        gradients = torch.autograd.grad(outputs, list(sources.values()), upstream, allow_unused=True)
        found |= {f"gradient of input {i}": g for i, g in zip(sources, gradients) if g is not None}
    return found


def _leaf(tensor: Tensor) -> Tensor:
    """A differentiable twin with the same strides (an expanded or transposed input must stay one)."""
    return tensor.detach().requires_grad_()


def _neighbour(value: Any, generator: torch.Generator) -> Any:
    """Each element, with a chance of one half, about a unit in the last place nearer to zero."""
    if not _is_float(value):
        return value
    moved = torch.randint(2, value.shape, generator=generator).to(value.device) * torch.finfo(value.dtype).eps
    return (value.detach().double() * (1.0 - moved)).to(value.dtype)


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    return value.detach().to(dtype) if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [y for y in outputs if isinstance(y, Tensor)]


def _root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
