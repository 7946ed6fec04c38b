"""Functions replayed from CUDA graphs: one graph for each shape of the arguments, all in one memory pool."""

from __future__ import annotations

import dataclasses
import warnings
from collections import OrderedDict, UserDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detr_fast import dispatch
from detr_fast.capture import capture
from detr_fast.engine.bound import Bound

MAX_GRAPHS = 32
MAX_UNUSED = 1000  # calls; a graph that none of so many needed makes room for another
MAX_SHAPES = 4096  # that are remembered


@dataclass(eq=False)
class _Bucket:
    """What belongs to one shape: eager calls so far, from the capture on its inputs, graph and outputs, and the last call's number."""

    calls: int = 0
    inputs: tuple[Any, ...] = ()
    graph: Any = None
    outputs: Any = None
    last: int = 0


class GraphedFunction:
    """Calls `function` on a device, and replays it from a CUDA graph once a shape has come `warmup` times.

    A shape's first calls run eagerly, on a side stream; they are calls like all others, so nothing is computed for
    warming up alone. Outputs of a replay lie in the graphs' shared memory: they hold until the next call. Where no graph
    is possible the function runs eagerly, and `reason` says why.

    Args:
        function: takes what is called with, moved to `device`; looks at no value on the host, where captured.
        device: of the computation.
        reason: why nothing can be captured, known beforehand; None where it can.
        before: called before each eager call and each capture, outside the graph.
        around: entered around each call of `function` that is captured, or that warms up for it.
        bound: gives what graphs are bound to besides the shapes, autocast, the gradient and inference modes, the flags of `torch.backends` that choose kernels (precision,
            determinism, cuDNN, SDPA) and what `use_backend` asks for; where it gives something else, a shape has another graph.
        warmup: eager calls of a shape before it is captured.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        device: torch.device,
        *,
        reason: str | None = None,
        before: Callable[[], None] = lambda: None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        bound: Bound | None = None,
        warmup: int = 2,
    ) -> None:
        self.function = function
        self.device = device
        self.reason = reason
        self.before = before
        self.around = around
        self.bound = bound
        self.warmup = max(1, warmup)
        self._buckets: dict[Hashable, _Bucket] = {}
        self._captured: list[_Bucket] = []
        self._calls = 0
        self._pool: Any = None
        self._stream: Any = None
        self._replaying: Any = None  # the stream of the last replay
        self._full = False
        self._told: set[str] = set()  # of which arguments

    def __call__(self, *arguments: Any) -> Any:
        if self.reason is not None:
            return self._eagerly(arguments)
        with torch.cuda.device(self.device):  # a graph holds what runs on streams of the current device
            return self._call(arguments)

    def _call(self, arguments: tuple[Any, ...]) -> Any:
        given = tensors_of(arguments)
        if _looked_at():
            return self._warm_up(arguments)
        if (other := next(filter(None, map(_why_not, given)), None)) is not None:
            self._tell(other)
            return self._warm_up(arguments)
        key = shapes_of(arguments)
        if len(self._buckets) >= MAX_SHAPES:  # as of a model that lies elsewhere at each call
            self._buckets = {known: bucket for known, bucket in self._buckets.items() if bucket.graph is not None}
        whole = (key, _state(self.device.type), None if self.bound is None else self.bound())
        try:
            bucket = self._buckets.setdefault(whole, _Bucket())
        except TypeError:
            _warn_of_no_hash(key)
            return self._warm_up(arguments)
        self._calls += 1
        bucket.last = self._calls
        if bucket.graph is None and (bucket.calls < self.warmup or not self._capture(bucket, arguments)):
            outputs = self._warm_up(arguments) if self.reason is None else self._eagerly(arguments)
            # And not of one that failed: an optimizer makes its state in the first.
            bucket.calls += self.bound is None or self.bound.left(whole[2])
            return outputs
        self._wait_for_replays()
        for static, one in zip(tensors_of(bucket.inputs), given):
            static.copy_(one, non_blocking=True)
        bucket.graph.replay()
        return _rebuilt(bucket.outputs)

    def _tell(self, argument: str) -> None:
        if argument not in self._told:
            self._told.add(argument)
            warnings.warn(
                f"detr-fast: an argument {argument}: its calls run eagerly. Results stay right, only slower.",
                RuntimeWarning,
                stacklevel=5,
            )

    def _wait_for_replays(self) -> None:
        """Let this call's stream wait for the one before it: all graphs work in one memory."""
        before, self._replaying = self._replaying, torch.cuda.current_stream()
        if before is not None and before != self._replaying:
            self._replaying.wait_stream(before)

    def forget(self) -> None:
        """Drop all graphs: what they were captured with is no more."""
        self._buckets.clear()
        self._captured.clear()
        self._pool = None  # PyTorch does not take up a pool again whose graphs are all gone

    def _drop_unused(self) -> None:
        """Parts, hooks or memory that a graph was bound to may be no more."""
        used = [one for one in self._captured if one.last > self._calls - MAX_UNUSED]
        if len(used) < len(self._captured):
            self._buckets = {key: one for key, one in self._buckets.items() if one.graph is None or one in used}
            self._captured, self._pool = used, self._pool if used else None

    @property
    def graphs(self) -> int:
        """How many shapes are captured."""
        return len(self._captured)

    def __str__(self) -> str:
        if self.reason is not None:
            return f"runs eagerly: {self.reason}"
        seen = len(self._buckets)
        return f"{self.graphs} CUDA graphs for {seen} shapes"

    def _eagerly(self, arguments: tuple[Any, ...]) -> Any:
        self.before()
        return self.function(*moved(arguments, self.device))

    def _warm_up(self, arguments: tuple[Any, ...]) -> Any:
        """One eager call on a side stream, as lazily made handles and workspaces must not be made in a capture."""
        self.before()
        self._stream = stream = self._stream or torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream), self.around():
                outputs = self.function(*moved(arguments, self.device))
        finally:  # as of a batch for which there is no memory
            current.wait_stream(stream)
        for tensor in tensors_of(outputs):
            if tensor.is_cuda and tensor.layout is torch.strided and not tensor.is_nested:
                tensor.record_stream(current)
        return outputs

    def _capture(self, bucket: _Bucket, arguments: tuple[Any, ...]) -> bool:
        """Record the function for one shape; False where there is no graph afterwards. Nothing runs in a capture."""
        if self.graphs >= MAX_GRAPHS:
            self._drop_unused()
        if self.graphs >= MAX_GRAPHS:
            if not self._full:
                self._full = True
                warnings.warn(
                    f"detr-fast: {MAX_GRAPHS} shapes are captured in CUDA graphs, and further ones run eagerly; pad batches "
                    "to fewer sizes (see detr_fast.data.buckets)",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return False
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.inference_mode(False), torch.no_grad():  # later calls write to them, in whatever mode
            inputs = mapped(arguments, lambda tensor: torch.empty_like(tensor, device=self.device).copy_(tensor))
        graph = torch.cuda.CUDAGraph()
        self.before()
        try:
            with self.around(), capture(graph, self._pool):
                outputs = self.function(*inputs)
        except Exception as error:  # whatever CUDA or a model's own code throws: the run must go on
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self.reason = f"the capture failed ({type(error).__name__}: {first[:300]})"
            warnings.warn(
                f"detr-fast: no CUDA graphs, {self.reason}. Results stay right, only slower.",
                RuntimeWarning,
                stacklevel=3,
            )
            self.forget()
            return False
        bucket.inputs, bucket.graph = inputs, graph
        bucket.outputs = _rebuilt(outputs)  # which the function may hold, too
        self._captured.append(bucket)
        return True


def _looked_at() -> bool:
    """Whether somebody is to see each operation: a mode, as that which counts FLOPs, or anomaly detection."""
    return torch.is_anomaly_enabled() or torch._C._len_torch_dispatch_stack() > 0


def _why_not(argument: Tensor) -> str | None:
    """What of an argument a graph can't have: it works on copies."""
    if argument.requires_grad:
        return "requires a gradient, which a CUDA graph would not give it (detach it where none is wanted)"
    if argument.layout is not torch.strided or argument.is_nested:
        return "is sparse or nested, which CUDA graphs do not take"
    return None


# Read as `torch.backends` does, at some 20 ns each; torch 2.11 has no fa3.
_FLAGS = [
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.are_deterministic_algorithms_enabled,
    torch.get_default_dtype,
    torch._C._get_cudnn_enabled,
    torch._C._get_cudnn_benchmark,
    torch._C._get_cudnn_deterministic,
    torch._C._get_cublas_allow_fp16_reduced_precision_reduction,
    torch._C._get_cublas_allow_bf16_reduced_precision_reduction,
    torch._C._get_math_sdp_allow_fp16_bf16_reduction,
    *(
        getattr(torch._C, f"_get_{name}_sdp_enabled")
        for name in ("flash", "mem_efficient", "math", "cudnn", "fa3")
        if hasattr(torch._C, f"_get_{name}_sdp_enabled")
    ),
    torch._C._get_cublas_allow_fp16_accumulation,
]


def _state(kind: str) -> Hashable:
    """What PyTorch's operations and ours go by besides their arguments."""
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    precision = [torch._C._get_fp32_precision_getter("cuda", operation) for operation in ("matmul", "conv", "rnn")]
    order = tuple(torch._C._get_sdp_priority_order())
    return autocast, *precision, order, *[flag() for flag in _FLAGS], frozenset(dispatch._requested.items())


def _warn_of_no_hash(key: Hashable) -> None:
    """Which arguments can't tell calls apart: such calls run eagerly."""

    def strange(part: Any) -> list[str]:
        if isinstance(part, tuple):
            return [name for one in part for name in strange(one)]
        return [] if isinstance(part, Hashable) else [type(part).__name__]

    warnings.warn(
        f"detr-fast: an argument that is a {' or '.join(sorted({*strange(key)})) or type(key).__name__} can't tell apart what was captured for which call, as "
        "such have no hash: these calls run eagerly. Results stay right, only slower. Give tensors, tuples, lists, dictionaries, numbers or strings.",
        RuntimeWarning,
        stacklevel=4,
    )


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with each tensor changed; looks into tuples, lists, dataclasses and mappings.

    Mappings become dicts, but for a UserDict, which keeps its class: transformers' batches are read as `batch.labels`, too.
    """
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: mapped(getattr(value, f.name), change) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, Mapping):
        named = {name: mapped(entry, change) for name, entry in value.items()}
        if not isinstance(value, UserDict):
            return named
        same = copy(value)  # whose class has it copy its entries, too
        same.update(named)
        return same
    if isinstance(value, (tuple, list)):
        entries = [mapped(entry, change) for entry in value]
        # A named tuple takes them one by one.
        return value._make(entries) if hasattr(value, "_make") else type(value)(entries)
    return value


def _rebuilt(value: Any) -> Any:
    """The same tensors in dictionaries, lists and dataclasses of their own, which a caller may change."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)):
        entries = map(_rebuilt, value)
        return value._make(entries) if hasattr(value, "_make") else type(value)(entries)
    if type(value) is dict:
        return {name: _rebuilt(entry) for name, entry in value.items()}
    if isinstance(value, OrderedDict):  # transformers' outputs, whose own copies take 90 µs
        same = type(value).__new__(type(value))
        for name, entry in value.items():
            OrderedDict.__setitem__(same, name, _rebuilt(entry))
        vars(same).update({name: same.get(name, entry) for name, entry in vars(value).items()})
        return same
    is_one = isinstance(value, Mapping) or (dataclasses.is_dataclass(value) and not isinstance(value, type))
    return copy(value) if is_one else value


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in `value`, in order."""
    found: list[Tensor] = []
    mapped(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def moved(value: Any, device: torch.device) -> Any:
    """`value` on a device; from page-locked memory, the host does not wait for the copies."""
    return mapped(value, lambda tensor: tensor.to(device, non_blocking=True))


def shapes_of(value: Any) -> Hashable:
    """What a graph is bound to: the shapes and types of all tensors, and all other values, by their classes, too: 2 is not 2.0."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(shapes_of(getattr(value, f.name)) for f in dataclasses.fields(value))
    if isinstance(value, Mapping):
        return type(value), tuple((name, shapes_of(entry)) for name, entry in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(shapes_of, value))
    return type(value), value
