"""A capture in a CUDA graph which, where it fails, leaves PyTorch as it was before."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_failed: list[Any] = []  # graphs whose capture failed: PyTorch's allocator goes on asking them
_streams: dict[
    int, Any
] = {}  # what captures run on, by device: PyTorch's own is one for all, of the device of the first


class _Thread(threading.local):
    behind: list[Callable[[], None]] | None = None  # the capture that this thread is in

    def __init__(self) -> None:
        self.aside: dict[str, Tensor] = {}


_thread = _Thread()


def recording() -> bool:
    """Whether this thread is in a `capture`."""
    return _thread.behind is not None


def behind_the_capture(action: Callable[[], None]) -> None:
    """Do this once the `capture` that this thread is in has ended well, before the graph's first replay: what a capture would record or
    refuse, such as a copy from the host. The graph keeps the action alive, and with it what that holds.
    """
    assert _thread.behind is not None, "this thread is in no capture: ask recording()"
    _thread.behind.append(action)


@contextmanager
def set_aside(device: torch.device, **elements: int) -> Iterator[None]:
    """Inside the block, a capture may take of so many int64 on the device, each op of what has its name, for what is copied behind it. To
    the graph's own memory, all that is allocated in a capture, each replay writes what was there before, in this graph or in another of the same pool.
    """
    memory = {op: torch.empty(number, dtype=torch.int64, device=device) for op, number in elements.items()}
    before, _thread.aside = _thread.aside, memory
    try:
        yield
    finally:
        _thread.aside = before


def left_aside(op: str) -> int:
    """How many elements of the memory that was set aside for an op there are still to be taken."""
    return _thread.aside[op].numel() if op in _thread.aside else 0


def take_aside(op: str, elements: int) -> Tensor:
    """So much of what was set aside for an op: no more than is left."""
    taken, _thread.aside[op] = _thread.aside[op].split([elements, left_aside(op) - elements])
    return taken


def why_no_table(room: bool) -> str | None:
    """Why tensors' addresses can't come to the GPU behind the CUDA graph that is being captured; room: whether it has memory for them."""
    if not recording():
        return "the CUDA graph is not captured by detr_fast.capture, behind which the tensors' addresses are copied"
    return None if room else "the capture has no memory set aside for the tensors' addresses (see set_aside)"


@contextmanager
def beside_the_default_stream() -> Iterator[None]:
    """A stream of its own for what will be captured after it ran: gradients' nodes that outlive a step, such as a layer's program
    keeps, go on in the stream that they were made in, and the default one can't be part of a capture.
    """
    before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


@contextmanager
def capture(graph: Any, pool: Any = None) -> Iterator[None]:
    """`torch.cuda.graph(graph, pool)` for this thread and the current device: another thread, say a data loader's that pins memory, is
    none of its business.

    After one that failed, PyTorch's own leaves its stream the current one, and before torch 2.12 or so its generator refuses to draw outside
    of graphs, older graphs' replays included ("Offset increment outside graph capture"): both are put right, the latter by another
    capture, whose end a generator waits for. Raises what went wrong first.
    """
    device = torch.cuda.current_device()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream()
    before, _thread.behind = _thread.behind, []
    try:
        with _begun(graph, pool):
            yield
        graph.behind = _thread.behind
    except Exception as error:
        _failed.append(graph)
        another = torch.cuda.CUDAGraph()
        try:
            with warnings.catch_warnings(), _begun(another, None):
                warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        except RuntimeError:  # where CUDA is broken, the first error tells
            _failed.append(another)
        raise (error.__context__ or error) from None  # the end of a failed capture fails, too
    finally:
        _thread.behind = before
    for action in graph.behind:
        action()


@contextmanager
def _begun(graph: Any, pool: Any) -> Iterator[None]:
    stream = _streams[torch.cuda.current_device()]
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        yield
