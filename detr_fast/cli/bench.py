"""`detr-fast bench`: time the kernels beside what they replace."""

from __future__ import annotations

from typing import Annotated

import typer


def bench(
    op: Annotated[
        list[str] | None,
        typer.Option(help="Only what begins with this name, such as attention; may be given several times."),
    ] = None,
) -> None:
    """Time kernels beside PyTorch, forward and backward, at DETR's sizes: eagerly and in a CUDA graph. Writes nothing.

    Each result is checked first; times are medians of 7 rounds in turn, and the factor says how much faster ours is.

    Without a GPU, only assignment in several threads. `make gpu` in a checkout measures far more, other libraries included.
    """
    import torch

    from detr_fast.engine.errors import EngineError
    from detr_fast.nn import layer_cases
    from detr_fast.ops.tuning import measures, source, tune

    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    known = list(measures(device, more=layer_cases.GROUPS))
    only = [name for name in known if op is None or name.startswith(tuple(op))]
    if not only:
        missing = "" if gpu else "; PyTorch sees no GPU here, on which all kernels are measured"
        raise EngineError(f"nothing to time is named {' or '.join(op or [])}: there is {', '.join(known)}{missing}")
    print(f"on {source(device)}")
    if not gpu:
        print("PyTorch sees no GPU here: kernels are timed where there is one, and only assignment on this CPU")
    for _ in tune(device, only=only, more=layer_cases.GROUPS):
        pass
