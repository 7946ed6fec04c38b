"""Models to predict and evaluate with: those of runs, and published weights of the original repository and Hugging Face."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from detr_fast.data.transforms import TransformConfig
from detr_fast.engine.checkpoints import checked, is_checkpoint, load_weights, read
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.errors import CheckpointError, ConfigError
from detr_fast.models import convert
from detr_fast.models.build import build_model
from detr_fast.models.detr import Detr

# By category id, as instances_val2017.json has them; "-" where that has none.
_COCO = """
-,person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,-,stop sign,parking meter,bench,
bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,-,backpack,umbrella,-,-,handbag,tie,suitcase,frisbee,skis,
snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,-,wine glass,cup,fork,
knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,-,
dining table,-,-,toilet,-,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,-,book,
clock,vase,scissors,teddy bear,hair drier,toothbrush"""
COCO_NAMES = tuple(_COCO.replace("\n", "").split(","))


@dataclass
class TrainedModel:
    """A model in eval mode with what its labels mean and how its images are prepared.

    Attributes:
        names, category_ids: by label.
        published: it comes from no run folder: `config` says nothing of data, and images have COCO's sizes unless the file says others.
        named: the file itself names the labels; published weights may leave it open what their labels, category ids in
            the original repository, are called.
    """

    model: Detr
    config: TrainConfig
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    path: Path
    published: bool = False
    named: bool = True


def load_trained_model(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> TrainedModel:
    """The model of a run folder or checkpoint, with its averaged weights where it has them, or of published weights.

    Published weights are the original repository's checkpoints, Hugging Face folders of DETR, and safetensors files.

    Raises:
        CheckpointError: nothing is there, or it is damaged.
        WeightsError: what is there holds no DETR's weights.
    """
    file = _find(Path(path))
    if file.is_dir() or file.suffix == ".safetensors" or file.name in convert.FOLDER_FILES:
        trained = _published(convert.read_weights(file), file)
    else:
        content = read(file)
        trained = (
            _of_run(checked(content, file), file)
            if is_checkpoint(content)
            else _published(convert.weights_in(content, file), file)
        )
    trained.model.to(device).eval().requires_grad_(False)
    return trained


def _find(path: Path) -> Path:
    """`path` itself, or what to use of the folder `path`: a run's best checkpoint, else its last; a Hugging Face folder."""
    if not path.exists():
        raise CheckpointError(
            f"no checkpoint {path}; give a run folder, a checkpoint or published weights ({convert.NOT_FETCHED})"
        )
    if not path.is_dir():
        return path
    for name in convert.RUN_FILES:
        if (path / name).exists():
            return path / name
    if any((path / name).exists() for name in convert.FOLDER_FILES):
        return path
    raise CheckpointError(
        f"{path} holds neither {' nor '.join(convert.RUN_FILES)} nor a Hugging Face model; give the folder of a run that has saved one"
    )


def _of_run(state: dict[str, Any], file: Path) -> TrainedModel:
    config = TrainConfig.from_dict(state["config"])
    model = build_model(config.model)
    load_weights(model, state["ema"] or state["model"], file)
    return TrainedModel(model, config, tuple(state["names"]), tuple(state["category_ids"]), file)


def _published(weights: convert.Weights, path: Path) -> TrainedModel:
    config = weights.config
    model = build_model(config)
    convert.load_weights(model, weights)
    named = weights.names is not None and len(weights.names) == config.num_classes
    if named and not all(name.startswith("LABEL_") for name in weights.names or ()):  # Hugging Face's default
        names = weights.names or ()
    elif config.num_classes == len(COCO_NAMES) and "heads" not in weights.settings:  # nothing but weights, as published
        names, named = COCO_NAMES, False
    else:
        names, named = tuple(f"category {number}" for number in range(config.num_classes)), False
    ids = tuple(range(config.num_classes))
    transforms = TransformConfig()
    if weights.size is not None:
        transforms = replace(transforms, eval_size=weights.size[0], max_size=weights.size[1])
    about = TrainConfig("", "", config, transforms)
    return TrainedModel(model, about, names, ids, path, published=True, named=named)


def match_labels(
    trained: TrainedModel, names: Sequence[str], category_ids: Sequence[int], where: Any
) -> list[int] | None:
    """For each of the model's labels the data set's, -1 for none; None where both are the same.

    Classes are matched by name; where published weights have no names, labels are category ids.

    Args:
        names, category_ids: the data set's, by label.
        where: the data set, for messages.

    Raises:
        ConfigError: the data set has a class that the model does not know, or two of its classes have one name.
    """
    names = tuple(names)
    if trained.named and names == trained.names:
        return None
    keys: Sequence[Any] = names if trained.named else category_ids
    known: Sequence[Any] = trained.names if trained.named else trained.category_ids
    twice = sorted({key for classes in (keys, known) for key in classes if list(classes).count(key) > 1})
    if trained.named and set(twice) & set(keys):
        raise ConfigError(
            f"{where} has the classes {', '.join(names)}, the model {', '.join(trained.names)}: which {twice[0]!r} is which "
            "can't be told; evaluate on data with the same classes in the same order"
        )
    strange = [name for name, key in zip(names, keys) if key not in known]
    if strange:
        how = "by name" if trained.named else f"category ids up to {len(known) - 1}"
        raise ConfigError(
            f"{where} has the classes {', '.join(strange)}, which {trained.path} does not know ({how}); "
            "fine-tune it on them first: detr-fast train --weights"
        )
    position = {key: label for label, key in enumerate(keys)}
    return [position.get(key, -1) for key in known]
