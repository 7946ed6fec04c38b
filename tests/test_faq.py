"""What DETR's users stumble over, one test for each answer in docs/faq.md."""

from __future__ import annotations

import json
import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")

from detr_fast.data import CocoDetection, CocoEvaluator, CocoFolder, DataError, GroupedBatchSampler, collate
from detr_fast.data.doctor import examine
from detr_fast.data.images import read_image
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.errors import TrainingDiverged
from detr_fast.engine.reporter import Reporter
from detr_fast.engine.trained import load_trained_model
from detr_fast.engine.trainer import train
from detr_fast.models import ModelConfig, TargetError, Targets, build_criterion, build_model
from detr_fast.models.convert import Weights, write_weights
from detr_fast.testing.counters import count

FAQ = Path(__file__).parents[1] / "docs" / "faq.md"
MODEL = ModelConfig(
    backbone="conv", num_classes=3, num_queries=6, d_model=32, heads=4, encoder_layers=1, decoder_layers=2,
    feedforward=32, dropout=0.0, backbone_width=8,
)  # fmt: skip
ANSWERS: dict[str, Callable[..., None]] = {}


def answers(title: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(test: Callable[..., None]) -> Callable[..., None]:
        ANSWERS[title] = test
        return test

    return register


def test_every_answer_has_a_test_and_every_test_an_answer():
    assert re.findall(r"^## (.+)$", FAQ.read_text(encoding="utf-8"), re.MULTILINE) == list(ANSWERS)


def write_data(folder: Path, categories: dict[Any, str], image_id: Callable[[int], Any] = int, empty: int = 0) -> Path:
    """Six images of 40×40 with a box of each category; the last `empty` of them have none."""
    raw: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }
    (folder / "images").mkdir(parents=True)
    for index in range(6):
        name = f"{index}.png"
        Image.fromarray(np.full((40, 40, 3), 40 * index, dtype=np.uint8)).save(folder / "images" / name)
        raw["images"].append({"id": image_id(index), "file_name": name, "height": 40, "width": 40})
        for position, number in enumerate(categories if index < 6 - empty else ()):
            box = [3 + 8 * position, 4, 10, 12 + index]
            raw["annotations"].append(
                {"id": len(raw["annotations"]), "image_id": image_id(index), "category_id": number, "bbox": box}
            )
    for split in ("train", "val"):
        (folder / f"instances_{split}.json").write_text(json.dumps(raw))
    return folder


def settings(data: Path, run: Path, **changes: Any) -> TrainConfig:
    from detr_fast.data import TransformConfig

    values: dict[str, Any] = {
        "model": MODEL,
        "transforms": TransformConfig(sizes=(32,), max_size=48, crop=False, eval_size=32),
        "epochs": 1,
        "batch_size": 3,
        "device": "cpu",
        "workers": 0,
    }
    return TrainConfig(data=str(data), run=str(run), **(values | changes))


def outputs_for(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pred_logits": logits, "pred_boxes": torch.full((*logits.shape[:2], 4), 0.5, requires_grad=True)}


@answers("The number of classes is off by one")
def test_a_label_beyond_the_classes_is_named_and_training_counts_them_itself(tmp_path):
    targets = [{"boxes": torch.full((1, 4), 0.3), "labels": torch.tensor([3]), "image_id": torch.tensor(17)}]
    with pytest.raises(
        TargetError, match=r"image 17 has label 3; expected 0 to 2 \(num_classes = 3\): renumber .* raise"
    ):
        build_criterion(MODEL)(outputs_for(torch.zeros(1, 6, 4)), targets)
    data = CocoDetection(CocoFolder.open(write_data(tmp_path / "data", {1: "a", 2: "b", 90: "c"})), "train")
    assert data.names == ("a", "b", "c")
    assert data[0][1]["labels"].tolist() == [0, 1, 2]


@answers("class_error stays at 100")
def test_class_error_is_100_without_objects_or_hits_and_falls_with_each_hit():
    criterion = build_criterion(MODEL)
    boxes = torch.tensor([[0.25, 0.25, 0.2, 0.2], [0.75, 0.75, 0.2, 0.2]])
    target = {"boxes": boxes, "labels": torch.tensor([0, 2])}
    empty = {"boxes": boxes[:0], "labels": target["labels"][:0]}
    safe = outputs_for(torch.tensor([0.0, 0, 0, 9]).repeat(1, 6, 1))  # all say "no object"
    losses = criterion(safe, [empty])
    assert losses["class_error"] == 100
    assert criterion.weighted_sum(losses).isfinite()
    assert criterion(safe, [target])["class_error"] == 100
    for hits in (1, 2):
        found = outputs_for(torch.tensor([0.0, 0, 0, 9]).repeat(1, 6, 1))
        found["pred_boxes"] = torch.cat([boxes, torch.full((4, 4), 0.1)])[None]
        for query, label in enumerate((0, 2)[:hits]):
            found["pred_logits"][0, query, label] = 20
        assert criterion(found, [target])["class_error"] == 100 - 50 * hits


@answers("mAP is 0 though the pictures look right")
@pytest.mark.parametrize(
    "image_id", [int, str, lambda i: f"{i}.0", lambda i: f"picture {i}"], ids=["0", "text", "float", "name"]
)
@pytest.mark.parametrize("ids", [(0, 1), (1, 2), ("1", "2"), (7.0, "90")], ids=["from 0", "from 1", "text", "gaps"])
def test_the_truth_has_an_ap_of_1_whatever_the_ids_are(ids, image_id, tmp_path):
    folder = write_data(tmp_path / "data", dict(zip(ids, ("a", "b"))), image_id)
    data = CocoDetection(CocoFolder.open(folder), "val")
    evaluator = CocoEvaluator(data)
    for _, target in data:
        x, y, w, h = (target["boxes"] * 40).unbind(1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
        found = {"scores": torch.ones(2), "labels": target["labels"], "boxes": corners}
        evaluator.update({int(target["image_id"]): found})
    figures = evaluator.summarize()
    assert figures["AP"] == figures["AP50/a"] == figures["AP50/b"] == 1
    assert data.category_ids == tuple(int(float(number)) for number in ids)


@answers("Memory explodes in mid-epoch")
def test_a_wide_and_a_tall_image_keep_no_more_for_backward_than_two_wide_ones():
    def sample(height: int, width: int) -> tuple[torch.Tensor, dict[str, Any]]:
        size = torch.tensor([height, width])
        target = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": torch.tensor(0)}
        return torch.rand(3, height, width), target | {"orig_size": size, "size": size}

    def kept(batch: Any) -> int:
        return count(build_model(MODEL), batch.images).saved_bytes

    wide, tall = sample(64, 192), sample(192, 64)
    alike = kept(collate([wide, wide], size=(64, 193)))  # a column of padding, as a mask costs memory too
    assert kept(collate([wide, tall])) > 2.5 * alike
    assert kept(collate([wide, tall], max_area=64 * 192)) < 1.1 * alike
    # Such a batch is rare: only what is left over after the batches of like aspect ratio is mixed.
    sampler = GroupedBatchSampler([(64, 192), (192, 64)] * 9, 4, shuffle=True)
    mixed = [batch for batch in sampler if len({index % 2 for index, _ in batch}) == 2]
    assert len(list(sampler)) == 5
    assert len(mixed) <= 1


@answers("NaN boxes fail in the matcher")
def test_a_diverged_model_ends_training_in_one_line_and_keeps_the_checkpoint(tmp_path):
    data = write_data(tmp_path / "data", {1: "a"})
    first = train(settings(data, tmp_path / "run"))
    with pytest.raises(TrainingDiverged, match=r"the loss .*steps? .* is not finite.*lower --lr \(it was 1e\+30\)"):
        train(settings(data, tmp_path / "other", epochs=9, lr=1e30, lr_backbone=1e30, clip_norm=1e30))
    assert first.run.checkpoint.exists()
    logits = torch.zeros(1, 6, 4)
    broken = outputs_for(logits) | {"pred_boxes": torch.full((1, 6, 4), float("nan"))}
    losses = build_criterion(MODEL)(broken, [{"boxes": torch.full((2, 4), 0.3), "labels": torch.tensor([0, 1])}])
    assert losses["loss_giou"].isnan()  # and no assertion before it
    for box in ([float("nan"), 0.3, 0.1, 0.1], [0.3, 0.3, 0.0, 0.1], [1.3, 0.3, 0.1, 0.1]):
        with pytest.raises(TargetError, match="image 0 of the batch has the box"):
            Targets.from_list([{"boxes": torch.tensor([box]), "labels": torch.tensor([0])}])


@answers("An image that is all padding")
def test_an_image_that_is_all_padding_breaks_neither_itself_nor_the_others():
    model = build_model(MODEL)
    images = torch.rand(2, 3, 64, 64)
    mask = torch.zeros(2, 64, 64, dtype=torch.bool)
    mask[1] = True
    outputs = model((images, mask))
    criterion = build_criterion(MODEL)
    target = {"boxes": torch.full((1, 4), 0.3), "labels": torch.tensor([0])}
    criterion.weighted_sum(criterion(outputs, [target, target])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    model.eval()
    torch.testing.assert_close(model((images, mask))["pred_logits"][0], model(images[:1])["pred_logits"][0])


@answers("Fine-tuning on a few classes")
def test_weights_of_another_number_of_classes_give_all_but_the_head_and_a_line_says_so(tmp_path):
    class Listener(Reporter):
        def message(self, text: str) -> None:
            heard.append(text)

    heard: list[str] = []
    torch.manual_seed(3)
    weights = Weights(build_model(MODEL).state_dict(), MODEL.to_dict())
    write_weights(weights, tmp_path / "published.safetensors", "safetensors")
    data = write_data(tmp_path / "data", {1: "a"})
    start = settings(data, tmp_path / "run", weights=str(tmp_path / "published.safetensors"), lr=1e-12, lr_backbone=0.0)
    train(start, reporter=Listener())
    assert any("left out the class head" in text and "the file has 3 classes, the model 1" in text for text in heard)
    trained = load_trained_model(tmp_path / "run").model.state_dict()
    assert trained["class_embed.weight"].shape == (2, 32)
    for name in (
        "query_embed.weight",
        "transformer.encoder.layers.0.linear1.weight",
        "backbone.0.body.stages.0.0.weight",
    ):
        torch.testing.assert_close(trained[name], weights.state[name], rtol=0, atol=1e-6)


@answers("One process has no objects")
def test_two_processes_of_which_one_has_no_objects_train_to_the_end(tmp_path):
    data = write_data(tmp_path / "data", {1: "a"}, empty=5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "detr_fast", "train", "--data", str(data), "--run", str(tmp_path / "run")]
    command += [
        "--model",
        "small",
        "--image-size",
        "32",
        "--batch-size",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--epochs",
        "1",
    ]
    processes = []
    for rank in ("0", "1"):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        processes.append(
            subprocess.Popen(command, env={**os.environ, **environment, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
        )
    try:
        errors = [process.communicate(timeout=240)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 3  # six images, one each process and step
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


@answers("COCO 2017 itself is refused")
def test_boxes_without_height_are_refused_unless_dropping_them_is_asked_for(tmp_path):
    folder = write_data(tmp_path / "data", {1: "a"})
    raw = json.loads((folder / "instances_train.json").read_text())
    raw["annotations"][0]["bbox"] = [296.65, 388.33, 1.03, 0.0]
    (folder / "instances_train.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=r"annotation 0 of image '0.png': its bbox has no area.*detr-fast doctor"):
        CocoFolder.open(folder)
    assert len(CocoFolder.open(folder, bad_boxes="drop").annotations("train").boxes) == 5


@answers("Pictures of 12 bits are nearly black")
def test_twelve_bits_are_read_as_the_file_says_and_where_it_does_not_the_doctor_reports_them(tmp_path):
    folder = write_data(tmp_path / "data", {1: "a"})
    pictures = sorted((folder / "images").iterdir())
    values = {path: np.full((40, 40), 600 * number, dtype=np.uint16) for number, path in enumerate(pictures, start=1)}
    for path, samples in values.items():
        Image.fromarray(samples).save(path)
    report = examine(folder)
    found = {finding.kind: finding for finding in report.findings}["dark images"]
    assert (found.severity, found.count) == ("warning", 6)
    assert found.examples[0] == "0.png: no image needs over 12 of 16 bits"
    for path in pictures:
        Image.fromarray(np.asarray(Image.open(path)) << 4).save(path)
    assert "dark images" not in {finding.kind for finding in examine(folder).findings}  # though the first still is dark
    assert [read_image(path).max() for path in pictures] == [600 * number >> 4 for number in range(1, 7)]
    # Two samples in three bytes, as TIFF packs 12 bits: width, height, bits, no compression, gray, where, rows, bytes.
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 278: 1, 279: 3}
    directory = b"".join(struct.pack("<HHII", tag, 4 if tag == 273 else 3, 1, value) for tag, value in tags.items())
    header = struct.pack("<2sHI", b"II", 42, 12) + b"\x80\x0f\xff\x00"
    (tmp_path / "12.tif").write_bytes(header + struct.pack("<H", len(tags)) + directory + bytes(4))
    assert read_image(tmp_path / "12.tif")[0, :, 0].tolist() == [0x80, 0xFF]
