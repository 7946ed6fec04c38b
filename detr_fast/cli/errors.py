"""What the user reads when something goes wrong: one line, and the exit status."""

from __future__ import annotations

USER_ERROR = 2
EXTRA_PACKAGES = (
    "torchvision",
    "scipy",
    "pycocotools",
    "matplotlib",
    "safetensors",
    "accelerate",
    "PIL",
    "numpy",
    "yaml",
)


def explain_error(error: Exception) -> tuple[str, int] | None:
    """The line to print and the exit status of an error that a user can act on; None for any other, which is a bug."""
    if isinstance(error, ModuleNotFoundError):
        if (error.name or "").split(".")[0] in EXTRA_PACKAGES:
            remedy = "run in a clone of detr-fast: pip install '.[train]'"
            return f"Error: {error.name} is not installed; {remedy}", USER_ERROR
        return None

    import torch

    from detr_fast import BackendError
    from detr_fast.data.errors import DataError
    from detr_fast.engine.errors import EngineError, Interrupted
    from detr_fast.models.structures import TargetError
    from detr_fast.models.weight_files import WeightsError

    if isinstance(error, Interrupted):
        return str(error), 128 + error.signum
    if isinstance(error, torch.OutOfMemoryError):
        return "Error: the GPU's memory is full; lower --batch-size or --image-size", USER_ERROR
    if isinstance(error, (EngineError, DataError, TargetError, WeightsError, BackendError)):
        return f"Error: {error}", USER_ERROR
    if isinstance(error, OSError) and error.filename is not None:
        return f"Error: {error.filename}: {error.strerror}; check the path, its permissions and the disk", USER_ERROR
    return None
