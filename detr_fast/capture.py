"""A capture in a CUDA graph which, where it fails, leaves PyTorch as it was before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_failed: list[Any] = []  # graphs whose capture failed: PyTorch's allocator goes on asking them


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
    """`torch.cuda.graph(graph, pool)` for this thread: another, say a data loader's that pins memory, is none of its business.

    After one that failed, PyTorch's own leaves its stream the current one, and its generator refuses to draw outside of graphs
    ("Offset increment outside graph capture"): both are put right. Raises what went wrong first.
    """
    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            yield
    except Exception as error:
        _failed.append(graph)
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())
        raise (error.__context__ or error) from None  # the end of a failed capture fails, too
