"""The one op boundary: low-level `torch.library` registrations, and the way past them where nobody looks.

Every kernel call is an op of the namespace `detr_fast`, so that FakeTensor, dispatch modes, `torch.compile` and selective
checkpointing see it. The low-level `define`/`impl` costs 2 µs a crossing where the `custom_op` decorator costs 10; a forward
with gradients crosses twice (to autograd's kernel and below it), and so does its backward. Where no mode, transform,
compiler or profiler would see the op, what it would have come to is called directly. (An `ExecutionTraceObserver` that runs
alone can't be asked for; beside a profiler it sees the ops.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from detr_fast import native
from detr_fast.dispatch import INTERPRETING
from detr_fast.kernels.repeat import repeated
from detr_fast.ops import flops

_library = torch.library.Library("detr_fast", "DEF")
below_autograd = torch._C._AutoDispatchBelowAutograd
_INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
launchers: dict[str, Callable[..., Any]] = {}  # each op's `run`, which counters call on tensors that hold nothing


def integers(**tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as int64, which kernels and eager operations read; TypeError where one holds no integers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _INTEGERS:
            raise TypeError(f"got {name} of {tensor.dtype}; expected integers: torch.int64 is taken as it is")
    return tuple(tensor.long() for tensor in tensors.values())


_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._is_torch_function_mode_enabled
_transforms = torch._C._functorch.peek_interpreter_stack
_profiling = torch.autograd._profiler_enabled
_tracing = torch._C._get_tracing_state
_profiler = torch.autograd.profiler
_keys = torch._C._dispatch_keys
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def _plain_keys(kind: str) -> frozenset[int]:
    """The dispatch keys of a tensor that is nothing but memory on `kind`, with gradients or from inference mode."""
    names = getattr(torch._C.DispatchKey, kind), getattr(torch._C.DispatchKey, "Autocast" + kind)
    inference = torch._C.DispatchKeySet(names[0]).add(names[1])
    recorded = inference.add(torch._C.DispatchKey.ADInplaceOrView).add(getattr(torch._C.DispatchKey, "Autograd" + kind))
    return frozenset({inference.raw_repr(), recorded.raw_repr()})


_ON_CPU, _ON_GPU = _plain_keys("CPU"), _plain_keys("CUDA")  # AMD's GPUs, too, are CUDA here
_ON_ANY = _ON_CPU | _ON_GPU


def followed() -> bool:
    """Whether a compiler, a mode, a transform, a tracer or forward-mode differentiation follows each op."""
    return (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or _dispatch_modes() > 0
        or _transforms() is not None
        or _function_modes()
        or _tracing() is not None
    )


def seen() -> bool:
    """Whether anybody sees ops: what follows each of them, or a profiler, whose own may be of all threads."""
    return followed() or _profiling() or _profiler._is_profiler_enabled


class _Found(threading.local):
    # Of the op that a thread is in, and need not be looked for twice.
    way: tuple[Boundary, Callable[..., Any]] | None = None


_found = _Found()


def is_memory(tensor: Tensor) -> bool:
    """Whether a tensor is nothing but memory: no subclass, and not negated, conjugated, batched, fake, …"""
    return type(tensor) in _PLAIN and _keys(tensor).raw_repr() in _ON_ANY


ops: list[Boundary] = []
attach: Callable[[Boundary], None] | None = None  # gives an op its `native`, where that is in use


class Boundary:
    """An op: called, it goes the way of PyTorch's dispatcher, or, where nobody looks, straight to where that ends.

    native: what does so in C++ for calls that were made before, where that is in use. offset: the index of the argument that is
    a seed's offset, or -1. together: how many of the first outputs gradients usually arrive for.
    """

    __slots__ = ("_autograd", "_on_cpu", "_op", "_run", "name", "native", "offset", "together")

    def __init__(
        self,
        op: Callable[..., Any],
        run: Callable[..., Any],
        on_cpu: Callable[..., Any],
        autograd: Callable[..., Any],
        offset: int,
        together: int,
    ) -> None:
        self._op, self._run, self._on_cpu, self._autograd = op, run, on_cpu, autograd
        self.offset, self.together = offset, together
        self.native: Callable[..., Any] | None = None
        self.name = op._schema.name  # type: ignore[attr-defined]
        ops.append(self)
        if attach is not None:
            attach(self)

    def __call__(self, *args: Any) -> Any:
        """The op with gradients."""
        known = self.native  # once: another thread may have it left out
        if known is not None and not torch.compiler.is_dynamo_compiling():
            return known(*args)
        return self.python(*args)

    def python(self, *args: Any) -> Any:
        """The op with gradients, by what is written in Python."""
        run = self._shortcut(args)
        if run is None:
            return self._op(*args)
        if run is self._run:
            native.wanted()
        if not torch.is_grad_enabled():
            with below_autograd():
                return run(*args)
        _found.way = self, run
        try:
            return self._autograd(*args)
        finally:
            _found.way = None

    def below(self, *args: Any) -> Any:
        """The op below autograd: what its autograd kernel calls."""
        op, run = _found.way or (None, None)
        if op is not self or run is None:
            run = self._shortcut(args) or self._op
        with below_autograd():
            return run(*args)

    def _shortcut(self, args: tuple[Any, ...]) -> Callable[..., Any] | None:
        """What the op comes to for such a call, or None where the dispatcher must see it."""
        if seen():
            return None
        way: Callable[..., Any] | None = None
        for argument in args:
            kind = type(argument)
            if kind in _PLAIN:
                ways = _keys(argument).raw_repr()
                if ways in _ON_GPU:
                    way = way or self._run
                elif ways in _ON_CPU:
                    way = way or self._on_cpu
                else:  # on no device, negated, batched by the older vmap, …
                    return None
            elif kind is list:  # of tensors, or of numbers, which say nothing
                if not all(map(_is_plain, argument)):
                    return None
                if way is None and argument and type(argument[0]) in _PLAIN:
                    way = self._run if argument[0].is_cuda else self._on_cpu
            elif isinstance(argument, Tensor):
                return None
        return way


def _is_plain(value: Any) -> bool:
    return is_memory(value) or not isinstance(value, Tensor)


def define(
    schema: str,
    *,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any],
    on_cpu: Callable[..., Any] | None = None,
    together: int = 1,
) -> Boundary:
    """Register `detr_fast::<schema>`, whose first argument is a tensor or a list of them, and return its callable.

    `run` launches kernels (on a GPU; on a CPU in Triton's interpreter only, unless `on_cpu` is there to be called),
    `fake` gives the outputs' shapes, strides and dtypes, `autograd` is called where a gradient may be needed. together: of the
    outputs, for how many of the first gradients usually arrive, if they can.
    """
    name = schema.split("(")[0]

    def run_interpreted(*args: Any, **kwargs: Any) -> Any:
        if not INTERPRETING:
            raise RuntimeError(
                f"detr_fast::{name} got CPU tensors; its Triton kernels run on GPUs. Call detr_fast.ops, which chooses "
                "eager PyTorch here, or set TRITON_INTERPRET=1 before Python starts to run kernels in the interpreter."
            )
        return run(*args, **kwargs)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.detr_fast, name).default
    offset = next((i for i, a in enumerate(op._schema.arguments) if a.name == "offset"), -1)
    launchers[name], run = run, repeated(run, offset)
    _library.impl(name, run, "CUDA")
    _library.impl(name, on_cpu or run_interpreted, "CPU")
    torch.library.register_fake(f"detr_fast::{name}", fake, lib=_library)
    _library.impl(name, autograd, "Autograd")
    flops.register(name, op._overloadpacket)
    return Boundary(op, run, on_cpu or run_interpreted, autograd, offset, together)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors must be recorded for backward."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


SEVERAL_DEVICES = "the tensors lie on several devices"


def on_one_device(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all of them lie where x does: a kernel would read another's address as one of its own."""
    return all(t is None or t.device == x.device for t in others)


def isolated(tensor: Tensor) -> Tensor:
    """The tensor as a node of its own, to differentiate by: a graph that it depends on is not walked."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def double_backward(
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    dy: Tensor,
    wanted: Sequence[bool],
    upstream: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The backward of a backward, by recomputing eagerly.

    The first backward gave the gradients of `reference(*inputs)` for those inputs that are `wanted`; `upstream` holds
    the gradients that arrive for them. Returns the gradients for dy and for each of the inputs.
    """

    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # dy may depend on the inputs in the surrounding graph.
        fresh_dy, *fresh = (None if t is None else isolated(t) for t in (dy, *inputs))
        sources = [t for t, want in zip(fresh, wanted) if want and t is not None]
        first = torch.autograd.grad(reference(*fresh), sources, fresh_dy, create_graph=True)
        arriving = [u for u, want, t in zip(upstream, wanted, fresh) if want and t is not None]
        pairs = [(g, u) for g, u in zip(first, arriving) if u is not None and g.requires_grad]
        targets = [t for t in (fresh_dy, *fresh) if t is not None]
        if not pairs:
            return None, [None] * len(fresh)
        found = iter(
            torch.autograd.grad(
                [g for g, _ in pairs], targets, [u for _, u in pairs], create_graph=again, allow_unused=True
            )
        )
    d_dy = next(found)
    return d_dy, [None if t is None else next(found) for t in fresh]
