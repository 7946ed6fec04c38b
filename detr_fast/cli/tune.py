"""`detr-fast tune`: measure this machine, so that `auto` knows which implementation is faster where."""

from __future__ import annotations


def tune() -> None:
    """Measure this machine (a minute or two) and remember what is faster where: kernels, where there is a GPU, or PyTorch.

    Without a GPU: from which size on assignment problems are worth several threads.
    """
    import torch

    from detr_fast import native
    from detr_fast.engine.errors import ConfigError
    from detr_fast.nn import layer_cases
    from detr_fast.ops import regimes
    from detr_fast.ops.tuning import tune as measure

    path = regimes.cache_file()
    try:
        regimes.save([])  # a folder that can't be written is found now rather than after a minute of measuring
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror or error}; set DETR_FAST_CACHE to a folder that you may write to"
        ) from None
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    if not gpu:
        print("PyTorch sees no GPU here: kernels are measured where there is one, and only assignment on this CPU")
    else:
        print("compiling the host's part, which takes half a minute the first time")
        native.make()
        print(f"the host's part is {native.status}")
    for regime in measure(device, more=layer_cases.GROUPS):  # whoever is interrupted keeps what there is
        path = regimes.save([regime])
    print(f"wrote {path}; every program of this user on this machine reads it from now on")
