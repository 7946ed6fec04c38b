"""Checks around Triton's interpreter: what a GPU would do silently wrong raises here.

Inside `checked_interpreter()`, for every kernel that `detr_fast.kernels.launch` launches on CPU tensors:

* each load, store and atomic must hit an element of a tensor passed to that launch, exactly (strides count, reads too);
* outputs start as NaN (integers as their largest value), so an element never written is seen;
* 32-bit arithmetic may not pass a small limit, so an offset that would overflow on a large tensor is seen on a small one;
* an alignment stated by `tl.multiple_of` must hold: on a GPU, a vector access at another address ends the process;
* programs run in a shuffled order, so a kernel that depends on the order is seen;
* rounding to bf16 is to nearest even, as on GPUs (the interpreter by itself truncates);
* the smaller and the larger of NaN and a number are the number, as on GPUs (triton 3.6's interpreter gives NaN);
* launches are counted.

Needs TRITON_INTERPRET=1 to be set before Python starts.
"""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from detr_fast.kernels import launch

from .quick_interpreter import quick_interpreter

INT32_LIMIT = 1 << 14


class OutsideTensors(AssertionError):
    """A kernel touched memory that belongs to none of the tensors passed to it."""


class Misaligned(AssertionError):
    """A kernel stated an alignment that its pointers or integers do not have."""


class Overflow32(AssertionError):
    """A kernel computed in 32 bits what could pass 2**31 on a large tensor."""


@dataclass
class InterpreterChecks:
    """What happened inside `checked_interpreter`.

    launches: every launch, in order, without its arguments. int32_limit: the largest absolute value that 32-bit arithmetic
    may reach.
    """

    int32_limit: int
    launches: list[launch.Launch] = field(default_factory=list)
    tensors: dict[str, weakref.ref[Tensor]] = field(default_factory=dict, repr=False)  # of the last launch, by argument

    def observe(self, launched: launch.Launch) -> None:
        """Keeps no tensor alive: autograd would copy gradients that someone else holds."""
        self.launches.append(replace(launched, arguments=()))
        named = zip(launched.variant.kernel.arg_names, launched.arguments)
        self.tensors = {name: weakref.ref(argument) for name, argument in named if isinstance(argument, Tensor)}
        reached = launch.reached(launched.arguments)
        self.tensors |= {f"tensor {i} of a table": weakref.ref(tensor) for i, tensor in enumerate(reached)}

    def counts(self) -> Counter[str]:
        """Number of launches by kernel name."""
        return Counter(one.variant.name for one in self.launches)


@contextmanager
def checked_interpreter(
    *, seed: int = 0, int32_limit: int = INT32_LIMIT, ordered: bool = False
) -> Iterator[InterpreterChecks]:
    """Run kernels inside the block under all checks of this module.

    seed: of the order in which programs run. int32_limit: at least the elements of a tile, well under those of the test's
    tensors. ordered: matrix products in fp32 add up in the order of K, as a GPU's multiply-adds do, which is slower: BLAS's
    order depends on the shapes, so that a backward recomputes other scores than the forward had. Raises RuntimeError where kernels are not interpreted.
    """
    if launch.triton is None or not launch.triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are not interpreted: set TRITON_INTERPRET=1 before Python starts")
    from triton.runtime import interpreter as module

    checks = InterpreterChecks(int32_limit)
    patches = {**_memory_patches(checks), **_arithmetic_patches(checks), **_order_patches(random.Random(seed))}
    if ordered:
        patches["create_dot"] = _ordered_dot
    with ExitStack() as stack:
        stack.enter_context(quick_interpreter())
        for name, patch in patches.items():
            original = getattr(module.InterpreterBuilder, name)
            stack.enter_context(mock.patch.object(module.InterpreterBuilder, name, patch(original)))
        state = _checked_hint(checks, module.TensorHandle.set_attr)
        stack.enter_context(mock.patch.object(module.TensorHandle, "set_attr", state))
        stack.enter_context(launch.allocating_with(poisoned))
        stack.enter_context(np.errstate(all="ignore"))  # kernels compute with NaN and inf, as GPUs do
        launch.observers.append(checks.observe)
        stack.callback(launch.observers.remove, checks.observe)
        yield checks


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of NaN, or of the largest integer (True for bool)."""
    if dtype.is_floating_point:
        value: float = float("nan")
    else:
        value = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    with _disable_current_modes():  # no operation of the kernel's: counters don't see it
        return torch.full(shape, value, dtype=dtype, device=device)


Patch = Callable[[Callable[..., Any]], Callable[..., Any]]


def _memory_patches(checks: InterpreterChecks) -> dict[str, Patch]:
    """Range checks in front of all accesses; unmasked loads and stores arrive as masked ones."""

    def checked(verb: str, pointers: int, mask: int | None) -> Patch:
        def patch(original: Callable[..., Any]) -> Callable[..., Any]:
            def access(builder: Any, *arguments: Any) -> Any:
                addresses = np.atleast_1d(arguments[pointers].data)
                if mask is not None:
                    addresses = addresses[np.broadcast_to(arguments[mask].data, addresses.shape)]
                _check_addresses(checks, verb, addresses.ravel())
                return original(builder, *arguments)

            return access

        return patch

    return {
        "create_masked_load": checked("loads", 0, 1),
        "create_masked_store": checked("stores", 0, 2),
        "create_atomic_rmw": checked("atomically updates", 1, 3),
        "create_atomic_cas": checked("atomically swaps", 0, None),
    }


def _arithmetic_patches(checks: InterpreterChecks) -> dict[str, Patch]:
    """A limit on signed 32-bit results, and rounding to bf16 and comparing with NaN as hardware does it."""

    def limited(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute(builder: Any, *operands: Any) -> Any:
            result = original(builder, *operands)
            if result.data.dtype == np.int32 and result.data.size:
                largest = max(int(result.data.max()), -int(result.data.min()))
                if largest > checks.int32_limit:
                    raise Overflow32(
                        f"32-bit arithmetic reached {largest} (limit {checks.int32_limit}) in {_name(checks)}: "
                        "offsets that grow with the number of rows need .to(tl.int64)"
                    )
            return result

        return compute

    def rounded(original: Callable[..., Any]) -> Callable[..., Any]:
        def cast(builder: Any, source: Any, target: Any, *rounding: Any) -> Any:
            if source.dtype.scalar.name == "fp32" and target.scalar.name == "bf16":
                bits = np.ascontiguousarray(source.data).view(np.uint32)
                nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
                nearest = np.where(np.isnan(source.data), 0x7FFF, nearest).astype(np.uint16)
                return type(source)(nearest, target.scalar)
            return original(builder, source, target, *rounding)

        return cast

    def chosen(choose: Any) -> Patch:
        return lambda original: lambda builder, one, other: builder.binary_op(one, other, choose)

    return {
        **dict.fromkeys(("create_add", "create_sub", "create_mul", "create_shl"), limited),
        "create_minnumf": chosen(np.fmin),
        "create_maxnumf": chosen(np.fmax),
        "cast_impl": rounded,
        "create_fp_to_fp": rounded,
    }


def _ordered_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(builder: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        if a.data.dtype != np.float32 or a.data.ndim != 2:
            return original(builder, a, b, accumulator, *options)
        total = accumulator.data.copy()
        for column, row in zip(a.data.T, b.data):
            total += column[:, None] * row
        return type(accumulator)(total, accumulator.dtype.scalar)

    return dot


def _order_patches(order: random.Random) -> dict[str, Patch]:
    """Run the programs of a grid in a shuffled order."""
    places: list[tuple[int, int, int]] = []

    def shuffle(original: Callable[..., Any]) -> Callable[..., Any]:
        def set_grid_dim(builder: Any, *sizes: int) -> None:
            places[:] = [(x, y, z) for x in range(sizes[0]) for y in range(sizes[1]) for z in range(sizes[2])]
            order.shuffle(places)
            original(builder, *sizes)

        return set_grid_dim

    def redirect(original: Callable[..., Any]) -> Callable[..., Any]:
        def set_grid_idx(builder: Any, x: int, y: int, z: int) -> None:
            _, height, depth = builder.grid_dim
            original(builder, *places[(x * height + y) * depth + z])

        return set_grid_idx

    return {"set_grid_dim": shuffle, "set_grid_idx": redirect}


def _checked_hint(checks: InterpreterChecks, original: Callable[..., Any]) -> Callable[..., Any]:
    """Check `tl.multiple_of` along the last dimension: each run of neighbours must start at a multiple."""

    def set_attr(handle: Any, name: str, values: Any) -> None:
        original(handle, name, values)
        if name != "tt.divisibility":
            return
        step = max(1, handle.get_element_ty().primitive_bitwidth // 8) if handle.dtype.scalar.is_ptr() else 1
        numbers = np.atleast_1d(handle.data).astype(np.int64)
        starts = np.ones(numbers.shape, bool)
        starts[..., 1:] = np.diff(numbers) != step
        wrong = numbers[starts] % values[-1] != 0
        if wrong.any():
            raise Misaligned(
                f"{_name(checks)} states multiples of {values[-1]}, and has {numbers[starts][wrong][0]} "
                f"({int(wrong.sum())} of {wrong.size} runs): its launcher must check addresses, strides and sizes"
            )

    return set_attr


def _check_addresses(checks: InterpreterChecks, verb: str, addresses: np.ndarray) -> None:
    tensors = {name: tensor for name, reference in checks.tensors.items() if (tensor := reference()) is not None}
    remaining = addresses
    for tensor in tensors.values():
        belongs = _belongs(remaining, tensor)
        if belongs.all():
            return
        if belongs.any():
            remaining = remaining[~belongs]
    if remaining.size:
        raise OutsideTensors(
            f"{_name(checks)} {verb} {remaining.size} elements outside its tensors, the first {_place(remaining[0], tensors)}"
        )


def _belongs(addresses: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Which addresses are those of the tensor's elements; its strides are taken to be non-overlapping, or 0."""
    if tensor.numel() == 0:
        return np.zeros(addresses.shape, bool)
    distances = addresses.astype(np.int64) - tensor.data_ptr()
    size = tensor.element_size()  # a power of 2
    if tensor.is_contiguous():
        inside = (distances >= 0) & (distances < tensor.numel() * size)
        return inside & (distances & (size - 1) == 0) if size > 1 else inside
    inside, offsets = (distances >= 0) & (distances & (size - 1) == 0), distances // size
    for stride, length in sorted(zip(tensor.stride(), tensor.shape), reverse=True):
        if stride > 0:
            offsets = offsets - np.clip(offsets // stride, 0, length - 1) * stride
    return inside & (offsets == 0)


def _place(address: int, tensors: dict[str, Tensor]) -> str:
    """Where an address lies from the nearest tensor's start."""
    distances = {name: int(address) - tensor.data_ptr() for name, tensor in tensors.items()}
    name = min(distances, key=lambda name: abs(distances[name]))
    shape, strides = tuple(tensors[name].shape), tensors[name].stride()
    return f"{distances[name]} bytes from the start of {name} (shape {shape}, strides {strides})"


def _name(checks: InterpreterChecks) -> str:
    return checks.launches[-1].variant.name
