"""Weights in and out: the original repository's checkpoints, Hugging Face folders, safetensors, and our own checkpoints.

Loading never executes code from a file. Inside, weights always have the original repository's names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from detr_fast.models.backbone import ResNetBackbone
from detr_fast.models.build import ModelConfig
from detr_fast.models.detr import Detr
from detr_fast.models.weight_files import (
    CONFIG_KEY,
    WeightsError,
    list_problems,
    read_safetensors,
    unpickle,
    write_checkpoint,
    write_safetensors,
)
from detr_fast.models.weight_names import StateDict, from_huggingface, infer_config, is_huggingface, to_huggingface

Format = Literal["original", "huggingface", "safetensors"]
FORMATS: tuple[Format, ...] = ("original", "huggingface", "safetensors")
NOT_FETCHED = "addresses and names of a hub are not downloaded"
RUN_FILES = ("best.pt", "checkpoint.pt")  # of a folder of our runs, likewise
PROCESSOR = "preprocessor_config.json"  # of a Hugging Face folder, beside them
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face folder, the first that is there


@dataclass(frozen=True)
class Weights:
    """A detector's weights and what else their file says.

    Attributes:
        state: names of the original repository -> tensors, on the CPU.
        settings: the ModelConfig entries that the file states; the others follow from the weights' shapes.
        names: of the classes by label, if the file has them.
        source: where they come from, for messages.
        size: pixels of the shorter side that images are resized to, and the most of the longer, if the file has them.
    """

    state: StateDict = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] | None = None
    source: str = "the state_dict"
    size: tuple[int, int] | None = None

    @property
    def config(self) -> ModelConfig:
        """Builds the model that fits; the number of heads (8) and dilation (no) are guesses where the file is silent.

        Raises:
            WeightsError: the weights are not a DETR's.
        """
        try:
            return infer_config(self.state, **self.settings)
        except KeyError as error:
            raise WeightsError(f"{self.source} has no {error.args[0]}; is it a DETR's?") from None
        except ValueError as error:
            raise WeightsError(f"{self.source}: {error}") from None


@dataclass(frozen=True)
class LoadReport:
    """What load_weights did.

    Attributes:
        source: the file.
        loaded: number of tensors copied into the model.
        skipped: names of those that were left as they were: the class head's, if the number of classes differs.
        classes: the file's number of classes and the model's.
    """

    source: str
    loaded: int
    skipped: tuple[str, ...]
    classes: tuple[int, int]

    def __str__(self) -> str:
        text = f"loaded {self.loaded} tensors from {self.source}"
        if self.skipped:
            theirs, own = self.classes
            text += (
                f"; left out the class head ({', '.join(self.skipped)}): the file has {theirs} classes, the model {own}"
            )
        return text


def load_weights(model: Detr, source: str | Path | Weights) -> LoadReport:
    """Copy weights into a model: all of them, or none if they don't fit.

    The class head alone may differ in its number of classes; it is then left as it was, and the report says so.

    Args:
        model: its parameters and buffers are written in place, on whatever device they are.
        source: what read_weights reads, or returned.

    Raises:
        WeightsError: not readable, or names or shapes differ; these are listed in groups.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    own = model.state_dict()
    # Frozen norms don't count batches and real ones need not know how many there were.
    state = {name: t for name, t in weights.state.items() if name in own or not name.endswith("num_batches_tracked")}
    missing = {name for name in own.keys() - state.keys() if not name.endswith("num_batches_tracked")}
    wrong = {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    head = {name for name in wrong if name.startswith("class_embed.") and own[name].shape[1:] == state[name].shape[1:]}
    problems = [
        list_problems("lacks", missing, own),
        list_problems("also has", state.keys() - own.keys(), state),
        list_problems(
            "has other shapes for", wrong - head, own, lambda n: f"{tuple(state[n].shape)}, not {tuple(own[n].shape)}"
        ),
        *_contradictions(model, weights.settings),
    ]
    if any(problems):
        raise WeightsError(
            f"{weights.source} does not fit this model: it {'; it '.join(filter(None, problems))}. Build the model that "
            "fits (read_weights(...).config says which) or take other weights"
        )
    fitting = {name: tensor for name, tensor in state.items() if name not in head}
    model.load_state_dict(fitting, strict=False)
    theirs = state["class_embed.weight"].shape[0] - 1
    return LoadReport(weights.source, len(fitting), tuple(sorted(head)), (theirs, model.num_classes))


def _contradictions(model: Detr, settings: Mapping[str, Any]) -> Iterable[str]:
    """Settings that no shape shows, so that a wrong one would only give wrong detections."""
    heads = model.transformer.heads
    if settings.get("heads", heads) != heads:
        yield f"was trained with {settings['heads']} attention heads, not {heads}"
    backbone = model.backbone[0]
    if isinstance(backbone, ResNetBackbone) and settings.get("dilation", backbone.dilation) != backbone.dilation:
        yield f"was trained {'with' if settings['dilation'] else 'without'} dilation (DC5)"


def convert_weights(
    source: str | Path, destination: str | Path, format: Format, config: ModelConfig | None = None
) -> Weights:
    """Read weights of any known kind and write them as `format`; see read_weights and write_weights.

    Args:
        source: a file or folder.
        destination: must not exist yet.
        format: "original", "huggingface" or "safetensors".
        config: where the file doesn't state the number of heads or dilation (the published DC5 checkpoints don't), the
            full configuration; by default what the weights imply.

    Returns:
        what was written
    """
    weights = read_weights(source)
    if config is not None:
        weights = replace(weights, settings=config.to_dict())
    write_weights(weights, destination, format)
    return weights


def read_weights(path: str | Path) -> Weights:
    """Read a checkpoint of the original repository, a Hugging Face folder, a safetensors file, our own checkpoint or run folder.

    Raises:
        WeightsError: missing, damaged, of an unknown kind, or it wants code executed.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise WeightsError(
            f"no weights at {path}; give a checkpoint file, a safetensors file or a Hugging Face folder ({NOT_FETCHED})"
        )
    if path.name in FOLDER_FILES and _is_huggingface_config(path.with_name("config.json")):
        return _read_folder(path.parent)  # the file alone does not say how many heads there are
    if path.suffix == ".safetensors":
        state, about = read_safetensors(path)
        return _weights(state, about, path)
    return weights_in(unpickle(path), path)


def _weights(state: Mapping[str, Tensor], about: Mapping[str, Any], path: Path) -> Weights:
    if is_huggingface(state):
        state = from_huggingface(state)
    names, size = about.get("names"), about.get("size")
    settings = about.get("config") or {}
    return Weights(dict(state), settings, tuple(names) if names else None, str(path), tuple(size) if size else None)


def _is_huggingface_config(file: Path) -> bool:
    with suppress(OSError, ValueError):
        return "model_type" in json.loads(file.read_text(encoding="utf-8"))
    return False


def _read_folder(folder: Path) -> Weights:
    config_file = folder / "config.json"
    files = [folder / name for name in FOLDER_FILES if (folder / name).is_file()]
    for file in () if files else [folder / name for name in RUN_FILES]:
        if file.is_file():
            return read_weights(file)
    if not config_file.is_file() or not files:
        raise WeightsError(
            f"{folder} is neither a Hugging Face folder nor a run's; expected config.json and model.safetensors, or {RUN_FILES[0]}"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{config_file} is not JSON ({error}); take a complete copy") from None
    if not isinstance(config, dict) or config.get("model_type") != "detr":
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise WeightsError(f"{config_file} describes a {kind!r} model; only 'detr' can be read")
    state = read_safetensors(files[0])[0] if files[0].suffix == ".safetensors" else unpickle(files[0])
    backbone = config.get("backbone_config") or {}
    stride = backbone.get("output_stride") or (config.get("backbone_kwargs") or {}).get("output_stride")
    settings = {
        "heads": config.get("encoder_attention_heads", 8),
        "dilation": bool(config.get("dilation")) or stride == 16,
    }
    settings["dropout"] = config.get("dropout", 0.1)
    labels = {int(label): name for label, name in (config.get("id2label") or {}).items()}
    names = [labels[label] for label in sorted(labels)]
    return _weights(state, {"config": settings, "names": names, "size": _huggingface_size(folder)}, folder)


def _huggingface_size(folder: Path) -> tuple[int, int] | None:
    """What the folder's image processor resizes to, where that is a shorter and a longest side."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        size = json.loads((folder / PROCESSOR).read_text(encoding="utf-8"))["size"]
        return int(size["shortest_edge"]), int(size["longest_edge"])
    return None


def weights_in(content: Any, path: Path) -> Weights:
    """The weights in what torch.save wrote into `path`; raises WeightsError where there are none."""
    about: dict[str, Any] = {}
    state = content
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        state = content["model"]
        if content.get("format") == "detr-fast":
            state = content.get("ema") or state
            size = [content["config"]["transforms"][name] for name in ("eval_size", "max_size")]
            about = {"config": content["config"]["model"], "names": content.get("names"), "size": size}
        elif CONFIG_KEY in content:
            about = content[CONFIG_KEY]
        else:
            about = {"config": _original_settings(content.get("args"), path)}
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no weights; expected a state_dict, alone or under the key 'model'")
    if all(name.startswith("module.") for name in state):  # saved from a DistributedDataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return _weights(state, about, path)


def _original_settings(arguments: argparse.Namespace | None, path: Path) -> dict[str, Any]:
    """What the original's command line says beyond the weights' shapes; of published files, which lack it, the name."""
    if arguments is None:
        return {"dilation": True} if "dc5" in path.stem.lower() else {}
    names = {"nheads": "heads", "dilation": "dilation", "dropout": "dropout", "aux_loss": "aux_loss"}
    return {own: getattr(arguments, name) for name, own in names.items() if hasattr(arguments, name)}


def write_weights(weights: Weights, destination: str | Path, format: Format) -> None:
    """Write weights where nothing is yet.

    Args:
        weights: what read_weights returned, or Weights(model.state_dict(), config.to_dict()).
        destination: a file; for "huggingface" a folder, which `DetrForObjectDetection.from_pretrained` loads.
        format: "original" is a checkpoint {"model": state_dict} as the original repository loads it.

    Raises:
        WeightsError: the destination exists or cannot be written, or the format cannot hold such a model.
    """
    if format not in FORMATS:
        raise WeightsError(f"got format {format!r}; expected one of {', '.join(FORMATS)}")
    destination = Path(destination)
    if destination.exists():
        raise WeightsError(f"{destination} exists already; choose another place or remove it")
    config = weights.config
    about = {"config": config.to_dict(), "names": weights.names and list(weights.names), "size": weights.size}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.state.items()}
    # Under another name until it is complete.
    partial = destination.with_name(f".{destination.name}.partial-{os.getpid()}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if format == "original":
            with open(partial, "wb") as file:
                write_checkpoint({"model": state, CONFIG_KEY: about}, file)
        elif format == "safetensors":
            write_safetensors(state, partial, {CONFIG_KEY: json.dumps(about)})
        else:
            partial.mkdir()
            write_safetensors(to_huggingface(state), partial / "model.safetensors", {})
            text = json.dumps(_huggingface_config(config, weights.names), indent=2)
            (partial / "config.json").write_text(text + "\n", encoding="utf-8")
            if weights.size is not None:
                shorter, longest = weights.size
                processor = {
                    "image_processor_type": "DetrImageProcessor",
                    "size": {"shortest_edge": shorter, "longest_edge": longest},
                }
                (partial / PROCESSOR).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
        partial.replace(destination)
    except OSError as error:
        reason = error.strerror or error
        raise WeightsError(
            f"cannot write {destination}: {reason}; free some space or choose a folder that you may write to"
        ) from None
    finally:
        with suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _huggingface_config(config: ModelConfig, names: tuple[str, ...] | None) -> dict[str, Any]:
    if config.backbone == "conv" or config.pre_norm:
        what = "the conv backbone" if config.backbone == "conv" else "pre_norm"
        raise WeightsError(f"transformers' DETR has no counterpart of {what}; write format 'safetensors' or 'original'")
    labels = names or tuple(f"LABEL_{label}" for label in range(config.num_classes))
    if len(labels) != config.num_classes:
        raise WeightsError(f"got {len(labels)} class names for {config.num_classes} classes; expected one each")
    return {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        "backbone": config.backbone,
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "dilation": config.dilation,
        "position_embedding_type": config.position,
        "num_queries": config.num_queries,
        "d_model": config.d_model,
        "encoder_layers": config.encoder_layers,
        "decoder_layers": config.decoder_layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": config.feedforward,
        "decoder_ffn_dim": config.feedforward,
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": config.dropout,
        "auxiliary_loss": False,
        "id2label": {str(label): name for label, name in enumerate(labels)},
        "label2id": {name: label for label, name in enumerate(labels)},
    }
