"""The CPU in CUDA's place: what tests and benchmarks ask of `torch.cuda`, with the same effects where they have any."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

UNDECLARED = {"running_mean", "running_var"}  # batch norm writes them, and its schema doesn't say so


_conv2d = torch.nn.functional.conv2d


def conv2d(x, weight, bias=None, *args, **kwargs):
    """In 16 bits a CPU without instructions for them takes ten times as long as in fp32, which is computed here."""
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    if dtype.itemsize != 2 or x.dtype == torch.float64 or x.is_meta:
        return _conv2d(x, weight, bias, *args, **kwargs)
    with torch.autocast("cpu", enabled=False):
        bias = None if bias is None else bias.float()
        return _conv2d(x.float(), weight.float(), bias, *args, **kwargs).to(dtype)


def storage(tensor):
    return tensor.untyped_storage()._cdata


class EmulatedGraph(TorchDispatchMode):
    """As a CUDA graph: what is recorded has no effect, replays work on the recorded tensors, and memory stays in place."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.own, self.before = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
        written = [
            tensor
            for argument in func._schema.arguments
            if (argument.alias_info is not None and argument.alias_info.is_write) or argument.name in UNDECLARED
            for tensor in tree_leaves(given.get(argument.name))
            if isinstance(tensor, torch.Tensor)
        ]
        for tensor in written:
            if storage(tensor) not in self.own and storage(tensor) not in self.before:
                self.before[storage(tensor)] = (tensor, tensor.detach().clone())
        out = func(*args, **kwargs)
        known = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        fresh = [t if storage(t) not in known else None for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.own |= {storage(t) for t in fresh if t is not None}
        self.operations.append((func, args, kwargs, fresh, out))
        return out

    def restore(self):
        for tensor, value in self.before.values():
            tensor.detach().copy_(value)

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, fresh, _ in self.operations:
                again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, torch.Tensor)]
                for old, new in zip(fresh, again):
                    if old is not None:
                        old.detach().copy_(new)


class Event:
    """A moment on the host's clock."""

    def __init__(self, enable_timing: bool = False, external: bool = False) -> None:
        self.moment = 0.0

    def record(self) -> None:
        self.moment = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: Event) -> float:
        return (end_event.moment - self.moment) * 1e3


class Stream:
    """The host's only one."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


@contextlib.contextmanager
def captured(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    with cuda_graph:
        yield
    cuda_graph.restore()


def stubs() -> dict[str, Any]:
    """What to put in place of `torch.cuda`'s own, by name."""
    return {
        "CUDAGraph": EmulatedGraph,
        "graph": captured,
        "graph_pool_handle": object,
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "current_device": lambda: 0,
        "device": lambda device: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "set_sync_debug_mode": lambda debug_mode: None,
        "_sleep": lambda cycles: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_device_name": lambda device=None: "Stub GPU",
    }
