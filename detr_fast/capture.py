"""A capture in a CUDA graph which, where it fails, leaves PyTorch as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

FAR = 1 << 40  # random numbers of a thread, in fours: more than all replays of older graphs draw
_failed: list[Any] = []  # graphs whose capture failed: PyTorch's allocator goes on asking them
_streams: dict[
    int, Any
] = {}  # what captures run on, by device: PyTorch's own is one for all, of the device of the first


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

    After one that failed, PyTorch's own leaves its stream the current one, and its generator refuses to draw outside of graphs
    ("Offset increment outside graph capture"): both are put right. Raises what went wrong first.

    To draw again a generator takes a new state, of the same seed and far behind the old one in its numbers. Graphs captured before
    keep the old state: they go on drawing by it, other numbers than what comes after, and `torch.manual_seed` no longer
    reaches them.
    """
    device = torch.cuda.current_device()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream()
    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, stream=_streams[device], capture_error_mode="thread_local"),
        ):
            yield
    except Exception as error:
        _failed.append(graph)
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())
            generator.set_offset(generator.get_offset() + FAR)
        raise (error.__context__ or error) from None  # the end of a failed capture fails, too
