"""The one place that compiles and launches kernels.

A `Variant` is one machine program: a Triton function, the type of each run-time argument, the value of each constant
and the warps. Launchers and the catalog build variants by the same functions, integer arguments have declared widths,
and no argument is specialised on its value: what the catalog compiles offline is exactly what runs.

Importing this module needs no triton; launching and compiling do.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from detr_fast.kernels import driver
from torch.utils._python_dispatch import _disable_current_modes

try:
    import triton
    import triton.language as tl
except ImportError:  # kernel files import all the same: annotations stay strings, and bodies run in launches only
    triton = tl = None

TRITON_MISSING = (
    "triton is not installed, and detr-fast's kernels need it: install triton >= 3.6 (it comes with torch on Linux), "
    "or use the eager implementations"
)

TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}
TORCH_TYPES = {name: dtype for dtype, name in TRITON_TYPES.items()}


def pointer(dtype: torch.dtype | None) -> str | None:
    """Triton's type of a pointer to `dtype`, such as `*bf16`; None (an absent tensor) stays None."""
    return None if dtype is None else "*" + TRITON_TYPES[dtype]


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit` that specialises no run-time argument on its value or alignment; needs no triton to decorate."""
    if triton is None:
        return function
    parameters = inspect.signature(function).parameters.values()
    run_time = [p.name for p in parameters if "constexpr" not in str(p.annotation)]
    return triton.jit(function, do_not_specialize=run_time)


def at_compile_time(function: Callable[..., Any]) -> Any:
    """`triton.constexpr_function`: a function of constants for kernels; needs no triton to decorate."""
    return function if triton is None else triton.constexpr_function(function)


@dataclass(frozen=True)
class Variant:
    """One machine program of a kernel.

    types: one entry per run-time argument, in order: `*bf16`, `i64`, `fp32`, ..., or None for a tensor left out.
    constants: the kernel's `tl.constexpr` arguments by name.
    """

    kernel: Any
    types: tuple[str | None, ...]
    constants: Mapping[str, Any] = field(hash=False)
    num_warps: int = 4
    num_stages: int = 1
    registers: int = 0  # the most that a thread may take on NVIDIA's GPUs, where the compiler is not to decide
    # Loaded programs by driver and device: Triton's own look-up on every launch takes several times as long as the rest.
    _programs: dict[Any, Program] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @cached_property
    def dtypes(self) -> tuple[tuple[int, torch.dtype], ...]:
        """Index and dtype of each tensor that the program takes."""
        return tuple((i, TORCH_TYPES[kind[1:]]) for i, kind in enumerate(self.types) if kind and kind[0] == "*")

    def options(self) -> dict[str, int]:
        limit = {"maxnreg": self.registers} if self.registers and torch.version.hip is None else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}

    def signature(self) -> dict[str, str]:
        """Triton's signature of all arguments: run-time types, and `constexpr` for constants and absent tensors."""
        names = self.kernel.arg_names
        types = [kind or "constexpr" for kind in self.types]
        return dict(zip(names, types + ["constexpr"] * (len(names) - len(types))))

    @cached_property
    def compiled(self) -> bool:
        """Whether it is compiled, and not run by Triton's interpreter."""
        return isinstance(self.kernel, triton.JITFunction)

    def program(self, device: torch.device) -> Program:
        """The compiled program, loaded, on `device`, the current one."""
        key = triton.runtime.driver.active, device.index
        if (found := self._programs.get(key)) is not None:
            return found
        with _compiling:
            if (found := self._programs.get(key)) is None:
                # Caches make two of one, as of an argument that is left out and its default.
                same = _variants.setdefault(self, self)
                found = same._programs.get(key) or self._compile(overlapped(device))
                for variant in (self, same):
                    variant._programs[key] = found
                    _compiled.append(variant)
        return found

    def _compile(self, overlapping: bool) -> Program:
        kernel = self.kernel.warmup(*map(_stand_in, self.types), grid=(1,), **self.constants, **self.options())
        # Triton loads lazily. What is met first in a CUDA graph that is being captured is loaded all the same.
        with driver.relaxed_captures():
            kernel._init_handles()
        return Program(kernel, self.types, tuple(self.constants.values()), overlapping)

    def all_constants(self) -> dict[str, Any]:
        """The constants, with None for each absent tensor."""
        absent = {name: None for name, kind in zip(self.kernel.arg_names, self.types) if kind is None}
        return {**absent, **self.constants}


class Program:
    """A compiled kernel, loaded: launched by the call that Triton's own launch ends in, without what leads to it."""

    def __init__(
        self, kernel: Any, types: tuple[str | None, ...], constants: tuple[Any, ...], overlapping: bool = False
    ) -> None:
        self.kernel, self.types = kernel, types
        driver.overlap(kernel, overlapping)
        self.constants = constants  # arguments of the kernel, too, with no effect on its program
        self.run, self.function, self.metadata = kernel.run, kernel.function, kernel.packed_metadata

    def __call__(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Launch on the current device's current stream."""
        x, y, z = (*grid, 1, 1)[:3]
        hooks = triton.knobs.runtime
        enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler of Triton's listens
            self.kernel[x, y, z](*arguments, *self.constants)
            return
        handles = (current_stream(), self.function, self.metadata, None, None, None)
        self.run(x, y, z, *handles, *arguments, *self.constants)

    @cached_property
    def entry(self) -> driver.Entry | None:
        """How CUDA's driver launches it without Triton; None where only Triton knows how."""
        return driver.entry(self.kernel, self.types)


@dataclass(frozen=True)
class Launch:
    """What an observer sees of one launch, before it happens."""

    variant: Variant
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


observers: list[Callable[[Launch], None]] = []
_rehearsal = threading.local()  # `variants`: what the thread's rehearsal has launched
_compiling = threading.Lock()  # Python 3.11's parser, which Triton calls, fails at times in two threads at once
_compiled: list[Variant] = []
_variants: dict[Variant, Variant] = {}  # the first of all that are equal
forgetting: list[Callable[[], object]] = []  # what else holds on to programs
_allocate: Callable[..., torch.Tensor] = torch.empty
_reached: dict[int, list[weakref.ref[torch.Tensor]]] = {}  # by a table's id


def overlapped(device: torch.device) -> bool:
    """Whether a device's launches may start before those ahead of them end (see `overlap`); whoever replaces this forgets programs."""
    return False


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Allocate a kernel's output or scratch tensor, uninitialised; tests poison it (see `allocating_with`)."""
    return _allocate(tuple(shape), dtype=dtype, device=device)  # torch.empty takes twice as long to read a torch.Size


def empty_strided(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The same, laid out by strides without gaps; no view, as autograd lets nobody write to what a function returns as one."""
    if _allocate is torch.empty:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)
    memory = _allocate((prod(shape),), dtype=dtype, device=device)
    return memory.new_empty(0).set_(memory.untyped_storage(), memory.storage_offset(), shape, strides)


@contextmanager
def allocating_with(allocate: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Use `allocate(shape, dtype=, device=)` for kernels' outputs inside the block."""
    global _allocate
    before, _allocate = _allocate, allocate
    try:
        yield
    finally:
        _allocate = before


def leads_to(table: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Say which tensors' places a table of addresses or distances holds: a kernel that is given it reads and writes those, too."""
    _reached[id(table)] = [weakref.ref(t) for t in tensors]
    weakref.finalize(table, _reached.pop, id(table), None)


def reached(arguments: Iterable[Any]) -> list[torch.Tensor]:
    """The tensors that a launch's arguments lead to, besides those that are arguments."""
    found = (reference() for argument in arguments for reference in _reached.get(id(argument), ()))
    return [tensor for tensor in found if tensor is not None]


def launch(variant: Variant, grid: tuple[int, ...], *arguments: Any) -> None:
    """Launch `variant` over `grid` on the device of its first tensor; an empty grid launches nothing.

    Launches on meta tensors are shown to observers, and not run. Raises TypeError where a tensor's dtype is another than the
    program reads: it would read past the end.
    """
    if 0 in grid:
        return
    try:
        for index, dtype in variant.dtypes:
            if arguments[index].dtype is not dtype:
                raise TypeError(_misfit(variant, index, arguments[index], dtype))
        device = arguments[0].device
    except AttributeError:  # no tensor
        raise TypeError(_misfit(variant, index, arguments[index], dtype)) from None
    kind = device.type
    if kind == "meta" and (rehearsed := getattr(_rehearsal, "variants", None)) is not None:
        rehearsed.setdefault(variant)
        return
    for observer in tuple(observers):  # another thread's may leave meanwhile
        observer(Launch(variant, grid, arguments))
    if kind == "meta":
        return
    require_triton()
    if not variant.compiled:
        with _disable_current_modes():  # the interpreter copies tensors by PyTorch's operations, which nobody is to see
            variant.kernel[grid](*arguments, **variant.constants, **variant.options())
    elif kind == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            variant.program(device)(grid, arguments)
    else:
        variant.program(device)(grid, arguments)


def current_stream() -> int:
    """The current device's current stream, as `Program.run` takes it."""
    active = triton.runtime.driver.active
    return int(active.get_current_stream(active.get_current_device()))


def watched() -> bool:
    """Whether somebody is told of launches: our observers, or a profiler of Triton's."""
    if observers or triton is None:
        return bool(observers)
    hooks = triton.knobs.runtime
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _misfit(variant: Variant, index: int, argument: Any, dtype: torch.dtype) -> str:
    received = f"a tensor of {argument.dtype}" if isinstance(argument, torch.Tensor) else repr(argument)
    name = list(inspect.signature(getattr(variant.kernel, "fn", variant.kernel)).parameters)[index]
    return f"{variant.name} got {received} as {name}; expected one of {dtype}: convert it before the call"


def forget_programs() -> None:
    """Drop all compiled programs: those of a driver that goes away must not outlive it."""
    for variant in _compiled:
        variant._programs.clear()
    _compiled.clear()
    for forget in forgetting:
        forget()


def compile_variant(variant: Variant, device: torch.device) -> None:
    """Compile and load `variant` for `device` without running it, so that a failure is seen before any work.

    Under Triton's interpreter, and for meta tensors, there is nothing to compile.
    """
    require_triton()
    if device.type != "cuda":
        return
    with nullcontext() if device.index is None else torch.cuda.device(device):
        variant.program(device)


def compile_launches(rehearsal: Callable[[], object], device: torch.device) -> None:
    """Compile for `device` all that `rehearsal` launches, which is to do on meta tensors what is to come."""
    variants: dict[Variant, None] = {}
    outer = getattr(_rehearsal, "variants", None)
    _rehearsal.variants = variants
    try:
        with _disable_current_modes():  # nobody is to see, or count, what is only rehearsed
            rehearsal()
    finally:
        _rehearsal.variants = outer
    for variant in variants:
        compile_variant(variant, device)


def rehearsing(device: torch.device) -> bool:
    """Whether launches are only noted, for `compile_launches`: then products beside them need not be, either."""
    return device.type == "meta" and getattr(_rehearsal, "variants", None) is not None


@lru_cache(maxsize=64)
def generation(device: torch.device) -> str:
    """Of NVIDIA's GPUs: "ampere" (sm_80 to sm_89), "hopper" (sm_90), "blackwell" (sm_100, sm_120), and "" for all else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    return {8: "ampere", 9: "hopper", 10: "blackwell", 12: "blackwell"}.get(
        torch.cuda.get_device_capability(device)[0], ""
    )


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors (compute units on AMD); 2 on the CPU, where the interpreter wants small grids.

    On meta tensors, whose launches are only counted, those of an H100.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 2


def _stand_in(kind: str | None) -> Any:
    """An argument of type `kind` for a compilation without running."""
    if kind is None:
        return None
    if kind.startswith("*"):
        return TORCH_TYPES[kind[1:]]
    return 1.0 if kind == "fp32" else 1


def older_compiler() -> bool:
    """Whether triton is older than 3.8, of which configurations, budgets and documented figures are; 3.6 needs somewhat more registers."""
    return triton is not None and tuple(int(number) for number in triton.__version__.split(".")[:2]) < (3, 8)


def require_triton() -> None:
    """Raise ImportError with the remedy where triton is not installed."""
    if triton is None:
        raise ImportError(TRITON_MISSING)
