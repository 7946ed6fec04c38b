"""Published weights as they are: the original's checkpoints, Hugging Face folders and safetensors files."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from detr_fast.data.batching import build_loader
from detr_fast.data.coco import CocoDetection, CocoFolder
from detr_fast.data.coco_eval import CocoEvaluator
from detr_fast.data.transforms import TransformConfig, eval_transforms
from detr_fast.engine.errors import CheckpointError, ConfigError
from detr_fast.engine.evaluation import evaluate_model
from detr_fast.engine.prediction import find_images, predict_images
from detr_fast.engine.trained import COCO_NAMES, TrainedModel, load_trained_model, match_labels
from detr_fast.models.build import ModelConfig, build_model
from detr_fast.models.convert import Weights, WeightsError, write_weights

SMALL = ModelConfig(
    backbone="resnet18", num_classes=3, num_queries=6, d_model=32, heads=4, encoder_layers=1, decoder_layers=1,
    feedforward=48, dropout=0.0,
)  # fmt: skip
NAMES = ("cat", "dog", "fish")


def model_of(config: ModelConfig) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config).eval()


def write(folder: Path, kind: str, model: nn.Module, config: ModelConfig) -> Path:
    """Weights as they are published, and what is given to the command line."""
    weights = Weights(model.state_dict(), config.to_dict(), NAMES, size=(64, 96))
    if kind == "original":  # as its training writes them
        arguments = argparse.Namespace(nheads=config.heads, dilation=False, lr=1e-4)
        torch.save({"model": weights.state, "optimizer": {}, "args": arguments, "epoch": 3}, folder / "w.pth")
        return folder / "w.pth"
    path = folder / ("w.safetensors" if kind == "safetensors" else "w")
    write_weights(weights, path, "safetensors" if kind == "safetensors" else "huggingface")
    return path / "model.safetensors" if kind == "a file of the folder" else path


@pytest.mark.parametrize("kind", ["original", "safetensors", "huggingface", "a file of the folder"])
def test_published_weights_predict_as_the_model_that_they_are_of(kind, scenes, tmp_path):
    model = model_of(SMALL)
    trained = load_trained_model(write(tmp_path, kind, model, SMALL))
    assert trained.config.model.heads == 4
    assert (trained.named, trained.names) == (
        (False, ("category 0", "category 1", "category 2")) if kind == "original" else (True, NAMES)
    )
    if kind == "original":  # which says nothing of sizes
        trained.config = replace(trained.config, transforms=TransformConfig(max_size=96, eval_size=64))
    assert (trained.config.transforms.eval_size, trained.config.transforms.max_size) == (64, 96)
    expected = TrainedModel(model, trained.config, NAMES, (0, 1, 2), tmp_path)
    paths = find_images([scenes / "images"])[:2]
    found, wanted = (list(predict_images(one, paths, threshold=0.0)) for one in (trained, expected))
    for one, other in zip(found, wanted, strict=True):
        assert [box.label for box in one.boxes] == [box.label for box in other.boxes]
        torch.testing.assert_close(
            *(torch.tensor([b.xyxy for b in p.boxes]) for p in (one, other)), rtol=1e-4, atol=1e-3
        )


def test_weights_alone_are_of_coco_where_they_have_its_classes(tmp_path):
    config = replace(SMALL, backbone="conv", num_classes=91, heads=8)
    torch.save({"model": model_of(config).state_dict()}, tmp_path / "w.pth")
    trained = load_trained_model(tmp_path / "w.pth")
    assert trained.names == COCO_NAMES
    assert (len(COCO_NAMES), COCO_NAMES[1], COCO_NAMES[17], COCO_NAMES[90]) == (91, "person", "cat", "toothbrush")
    assert not trained.model.training
    assert (trained.config.transforms.eval_size, trained.config.transforms.max_size) == (800, 1333)


@pytest.mark.parametrize(("name", "dilation"), [("detr-r50-dc5-f0fb7ef5.pth", True), ("detr-r50-e632da11.pth", False)])
def test_dc5_is_told_from_the_published_files_name_which_alone_says_it(name, dilation, tmp_path):
    config = replace(SMALL, backbone="resnet50", dilation=dilation)
    torch.save({"model": model_of(config).state_dict()}, tmp_path / name)
    assert load_trained_model(tmp_path / name).config.model.dilation is dilation


def published(names, ids, named, path=Path("w.pth")):
    return TrainedModel(nn.Identity(), None, names, ids, path, published=True, named=named)  # type: ignore[arg-type]


def test_labels_are_matched_by_name_else_by_category_id():
    named = published(("N/A", "cat", "dog"), (0, 1, 2), named=True)
    assert match_labels(named, ("dog", "cat"), (7, 9), "data") == [-1, 1, 0]
    assert match_labels(named, named.names, (7, 8, 9), "data") is None
    nameless = published(("category 0", "category 1", "category 2"), (0, 1, 2), named=False)
    assert match_labels(nameless, ("dog", "cat"), (1, 2), "data") == [-1, 0, 1]
    with pytest.raises(ConfigError, match=r"data has the classes owl, which w\.pth does not know \(by name\)"):
        match_labels(named, ("dog", "owl"), (1, 2), "data")
    with pytest.raises(ConfigError, match=r"owl, which w\.pth does not know \(category ids up to 2\)"):
        match_labels(nameless, ("dog", "owl"), (1, 3), "data")
    run = TrainedModel(nn.Identity(), None, ("a", "b", "c"), (1, 2, 3), Path("run"))  # type: ignore[arg-type]
    assert match_labels(run, ("c", "a"), (1, 2), "data") == [1, -1, 0]
    with pytest.raises(ConfigError, match=r"data has the classes owl, which run does not know \(by name\)"):
        match_labels(run, ("a", "b", "c", "owl"), (1, 2, 3, 4), "data")


@pytest.mark.parametrize(("known", "names"), [(("a", "a", "b"), ("a", "b")), (("a", "b"), ("b", "a", "a"))])
def test_classes_that_share_a_name_are_not_matched_by_it(known, names):
    run = TrainedModel(nn.Identity(), None, known, tuple(range(len(known))), Path("run"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"which 'a' is which can't be told; .* same classes in the same order"):
        match_labels(run, names, tuple(range(len(names))), "data")
    assert match_labels(run, known, tuple(range(len(known))), "data") is None


class Oracle(nn.Module):
    """Finds what is there, one image a batch, and calls it by its category id."""

    def __init__(self, dataset):
        super().__init__()
        self.items = list(dataset)
        self.category_ids = torch.tensor(dataset.category_ids)

    def forward(self, images):
        target = next(t for image, t in self.items if torch.equal(image, images.tensors[0]))
        logits = torch.full((1, len(target["labels"]), 91 + 1), -10.0)
        logits[0, torch.arange(len(target["labels"])), self.category_ids[target["labels"]]] = 10.0
        return {"pred_logits": logits, "pred_boxes": target["boxes"][None]}


def test_a_model_that_answers_in_category_ids_is_judged_by_them(scenes):
    dataset = CocoDetection(CocoFolder.open(scenes), "val", eval_transforms(TransformConfig(eval_size=40)))
    trained = published(COCO_NAMES, tuple(range(91)), named=False)
    labels = match_labels(trained, dataset.names, dataset.category_ids, scenes)
    found = []
    for translation in (labels, None):
        loader = build_loader(dataset, 1, shuffle=False)
        figures = evaluate_model(Oracle(dataset), loader, CocoEvaluator(dataset), "cpu", labels=translation)
        found.append(figures["AP"])
    assert found[0] == pytest.approx(1.0)
    assert found[1] < 0.5


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_what_is_no_detr_is_refused_and_never_executed(tmp_path, capsys):
    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    (tmp_path / "empty").mkdir()
    for name, error, message in (
        ("evil.pth", WeightsError, "loading never executes code"),
        ("other.pth", WeightsError, "has no query_embed.weight; is it a DETR's"),
        ("empty", CheckpointError, "holds neither best.pt nor checkpoint.pt nor a Hugging Face model"),
        ("nowhere", CheckpointError, "no checkpoint"),
    ):
        with pytest.raises(error, match=message):
            load_trained_model(tmp_path / name)
    assert capsys.readouterr().out == ""
