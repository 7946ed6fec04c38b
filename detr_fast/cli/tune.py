"""`detr-fast tune`: measure the kernels on this machine's GPU, so that `auto` knows where they win."""

from __future__ import annotations


def tune() -> None:
    """Measure the kernels on this machine's GPU (about a minute) and remember where each one is faster than PyTorch."""
    import torch

    from detr_fast.engine.errors import EngineError
    from detr_fast.ops import regimes
    from detr_fast.ops.tuning import tune_layer_norm

    if not torch.cuda.is_available():
        raise EngineError(
            "PyTorch sees no GPU here, so there is nothing to measure; run 'detr-fast tune' on the machine with the GPU"
        )
    path = regimes.save([tune_layer_norm(torch.device("cuda", torch.cuda.current_device()))])
    print(f"wrote {path}; every program of this user on this GPU reads it from now on")
