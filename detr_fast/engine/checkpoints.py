"""Checkpoints: written whole or not at all, read without executing code.

A checkpoint is a dict of plain data and tensors: `format`, `version`, `detr_fast` (the library's version), `config` (TrainConfig.to_dict()),
`names` and `category_ids` by label, `model`, `ema`, `optimizer`, `scheduler`, `scaler`, `rng`, `epoch`, `step`, `metrics` and `evaluated` (the last
evaluation's figures and step). A checkpoint to predict with holds only the weights: `optimizer`, `scheduler`, `scaler` and `rng` are absent.
"""

from __future__ import annotations

import os
import random
import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr_fast import __version__
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.errors import CheckpointError
from detr_fast.engine.run_folder import CHECKPOINT, RunFolder, atomic_write
from detr_fast.models.convert import RUN_FILES
from detr_fast.models.weight_files import WeightsError, list_problems, unpickle, write_checkpoint

FORMAT = "detr-fast"
VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any], remedy: str = "") -> None:
    """Write `state` atomically: after a crash or on a full disk the previous file stands unchanged (RunFolderError tells)."""

    content = {"format": FORMAT, "version": VERSION, "detr_fast": __version__, **state}
    atomic_write(path, lambda file: write_checkpoint(content, file), remedy)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of this library onto the CPU; raises CheckpointError where there is none."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no checkpoint {path}; give a run folder or a checkpoint file that exists")
    try:
        state = read(path)
    except WeightsError as error:
        raise CheckpointError(str(error)) from None
    if not is_checkpoint(state):
        raise CheckpointError(
            f"{path} is not a checkpoint of a detr-fast run; to fine-tune from it: detr-fast train --weights {shlex.quote(str(path))}"
        )
    return checked(state, path)


def read(path: Path) -> Any:
    """What `unpickle` reads; where that fails, its WeightsError also names the run's other checkpoint, if that one is sound."""
    try:
        return unpickle(path)
    except WeightsError as error:
        for other in (path.with_name(name) for name in RUN_FILES if name != path.name):
            found: Any = None
            with suppress(WeightsError):
                found = unpickle(other)
            if is_checkpoint(found):
                what = f"{other}, of step {found['step']}, is sound: evaluate, predict and train --weights take it"
                raise WeightsError(f"{error}; {what}") from None
        raise


def is_checkpoint(content: Any) -> bool:
    """Whether that is what `save_checkpoint` writes."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def checked(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """The checkpoint itself; raises CheckpointError where a newer version wrote it."""
    if state["version"] > VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {state['version']}, this is detr-fast {__version__} which reads up to {VERSION}; upgrade detr-fast"
        )
    return state


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Copy `weights` into `model`; raises CheckpointError if a name or a shape differs."""
    own = model.state_dict()
    shapes = {name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape}
    problems = [
        list_problems("lacks", own.keys() - weights.keys(), own),
        list_problems("also has", weights.keys() - own.keys(), weights),
        list_problems(
            "has other shapes for", shapes, own, lambda n: f"{tuple(weights[n].shape)}, not {tuple(own[n].shape)}"
        ),
    ]
    if any(problems):
        raise CheckpointError(
            f"{path} is of another model: it {'; it '.join(filter(None, problems))}; use the data and settings that it was "
            "trained with"
        )
    model.load_state_dict(weights)


def latest_run(path: str | os.PathLike[str]) -> tuple[RunFolder, dict[str, Any]]:
    """The run folder and the state to resume from; `path` is the folder, or a checkpoint in it."""
    path = Path(path)
    run = RunFolder(path if path.is_dir() or path.suffix != ".pt" else path.parent)
    if run.config.exists() and not run.checkpoint.exists():
        raise CheckpointError(
            f"no checkpoint {run.checkpoint}: the run stopped before its first checkpoint; start again with --overwrite"
        )
    file = path if path.is_file() else run.checkpoint
    state = load_checkpoint(file)
    if "optimizer" not in state:
        raise CheckpointError(f"{file} holds weights only; resume from the {CHECKPOINT} of a training run")
    return run, state


def require_same_classes(names: Sequence[str], found: Sequence[str], config: TrainConfig) -> None:
    """Raise CheckpointError where a run's data set has other classes now than the run's checkpoint knows."""
    if tuple(names) != tuple(found):
        raise CheckpointError(
            f"{config.data} has the classes {', '.join(found)}, but the run {config.run} knows {', '.join(names)}; restore the "
            f"data, or start a new run from these weights: detr-fast train --data {shlex.quote(config.data)} "
            f"--weights {shlex.quote(f'{config.run}/{CHECKPOINT}')}"
        )


def rng_state() -> dict[str, Any]:
    """The states of all random generators, as plain data and tensors."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """The inverse of `rng_state`. States of CUDA devices that are not here are left out."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
