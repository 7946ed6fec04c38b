"""What a decision reads besides the arguments: PyTorch's state, the GPU's architecture, the tensors' type."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

PLAIN_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor})
ASSUMED_ARCHITECTURE = "sm_90"  # of fake CUDA tensors on a machine without a GPU

_architectures: dict[int | None, str] = {}


class Situation(NamedTuple):
    """What a decision reads besides the arguments."""

    # "eager", "captured" (in a CUDA graph: launches are free), "compiled" (Inductor could fuse instead) or "layer" (part of
    # a layer that runs on kernels as a whole: no part has a say)
    regime: str
    grad: bool
    autocast: torch.dtype | None
    deterministic: bool
    transform: str | None  # what only eager code can follow: vmap, forward-mode, export, …


@torch.compiler.assume_constant_result
def _architecture(device_type: str, index: int | None) -> str | None:
    if device_type != "cuda":
        return None
    if (known := _architectures.get(index)) is not None:
        return known
    if not torch.cuda.is_available():
        return ASSUMED_ARCHITECTURE
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    if torch.version.hip:
        name = str(properties.gcnArchName).split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    if index is not None:
        _architectures[index] = name
    return name


def architecture(device: torch.device) -> str | None:
    """The GPU's architecture ("sm_90", "gfx942"), or None for a device that is not a GPU."""
    return _architecture(device.type, device.index)


_tracing = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack


def _transform(compiling: bool) -> str | None:
    # not is_exporting(): in torch 2.11 Dynamo takes that for true under torch.compile, too
    if torch.compiler._is_exporting_flag:
        return "torch.export and ONNX take PyTorch's own ops"
    if not compiling and _tracing() is not None:  # as ONNX's older export does, too
        return "TorchScript takes PyTorch's own ops"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is only eager"
    if not compiling and _transforms() is not None:
        return "torch.func transforms (vmap, grad, jvp, …) are only eager"
    return None


def capturing(device_type: str) -> bool:
    """Whether calls on such a device become part of a CUDA graph."""
    return device_type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class _Thread(threading.local):
    in_layer = False


_thread = _Thread()


@contextmanager
def layer_regime() -> Iterator[None]:
    """Inside the block ops are parts of a layer that is to run on kernels as a whole."""
    outer, _thread.in_layer = _thread.in_layer, True
    try:
        yield
    finally:
        _thread.in_layer = outer


def in_layer() -> bool:
    """Whether this is inside `layer_regime`."""
    return not torch.compiler.is_compiling() and _thread.in_layer


def situation(device_type: str) -> Situation:
    """The state of PyTorch that decisions read."""
    autocasting = device_type != "meta" and torch.is_autocast_enabled(device_type)  # meta tensors have no autocast
    autocast = torch.get_autocast_dtype(device_type) if autocasting else None
    compiling = torch.compiler.is_compiling()
    regime = "compiled" if compiling else "eager"
    if not compiling and capturing(device_type):
        regime = "captured"
    if not compiling and _thread.in_layer:
        regime = "layer"
    deterministic = torch.are_deterministic_algorithms_enabled()
    return Situation(regime, torch.is_grad_enabled(), autocast, deterministic, _transform(compiling))


def tensor_type(tensors: Iterable[torch.Tensor | None]) -> type:
    """The one type that matters among the tensors: the first that is no plain tensor, else that of the first."""
    first: type | None = None
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TENSORS:
            return type(tensor)
        if type(tensor) is FakeTensor:
            first = FakeTensor
        first = first or torch.Tensor
    return first or torch.Tensor
