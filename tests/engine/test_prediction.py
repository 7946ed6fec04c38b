from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_fast.data.coco import CocoFolder
from detr_fast.engine.config import TrainConfig
from detr_fast.engine.demo import compare_with_torch, use_torch_layers
from detr_fast.engine.drawing import Box, Picture, draw_boxes
from detr_fast.engine.errors import PredictionError
from detr_fast.engine.prediction import find_images, predict_images, write_predictions
from detr_fast.engine.trained import TrainedModel
from detr_fast.models.build import build_model


@pytest.fixture
def trained(tiny: Callable[..., TrainConfig], scenes: Path) -> TrainedModel:
    config = tiny()
    categories = CocoFolder.open(scenes).categories
    model = build_model(replace(config.model, num_classes=len(categories))).eval()
    names, ids = zip(*((c.name, c.id) for c in categories))
    return TrainedModel(model, config, names, ids, Path("untrained"))


def test_predictions_are_json_and_pictures_in_pixels_of_the_file(
    trained: TrainedModel, scenes: Path, tmp_path: Path
) -> None:
    paths = find_images([scenes / "images"])[:3]
    records = write_predictions(predict_images(trained, paths, threshold=0.0, batch_size=2), trained, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert content["images"] == records
    for path, record in zip(paths, records):
        assert record["file"] == str(path)
        assert (tmp_path / "out" / record["picture"]).is_file()
        assert len(record["detections"]) == 6
        scores = [d["score"] for d in record["detections"]]
        assert scores == sorted(scores, reverse=True)
        for detection in record["detections"]:
            assert detection["name"] in trained.names
            assert detection["category_id"] in trained.category_ids
            assert all(math.isfinite(v) for v in detection["bbox"])
            assert detection["bbox"][2] <= record["width"] + 0.01


def test_a_batch_finds_what_single_images_do(trained: TrainedModel, scenes: Path) -> None:
    paths = find_images([scenes / "images"])[:4]
    together = list(predict_images(trained, paths, threshold=0, batch_size=4))
    alone = list(predict_images(trained, [str(path) for path in paths], threshold=0, batch_size=1))
    assert [p.path for p in alone] == paths
    for a, b in zip(together, alone):
        boxes = [torch.tensor([x.xyxy for x in p.boxes]) for p in (a, b)]
        # Padding is masked in the transformer, but a convolution's last column sees it rather than the border.
        torch.testing.assert_close(boxes[0], boxes[1], rtol=0.05, atol=1.0)


def test_pictures_of_large_photos_are_reduced_while_boxes_stay_in_the_files_pixels(
    trained: TrainedModel, tmp_path: Path
) -> None:
    Image.new("RGB", (3200, 800)).save(tmp_path / "photo.png")
    (record,) = write_predictions(
        predict_images(trained, [tmp_path / "photo.png"], threshold=0.0), trained, tmp_path / "out"
    )
    assert Image.open(tmp_path / "out" / "photo.png").size == (1600, 400)
    assert (record["width"], record["height"]) == (3200, 800)
    assert max(d["bbox"][0] + d["bbox"][2] for d in record["detections"]) > 1600


def test_class_names_are_drawn_in_their_own_letters() -> None:
    """Pillow's own font has the same empty box for all of these."""
    picture = Picture(Image.new("RGB", (80, 60)), [Box(0, (5, 20, 70, 55))])
    assert len({draw_boxes(picture, [name]).tobytes() for name in "öéłкλ"}) == 5


def test_what_is_no_image_is_named(tmp_path: Path, trained: TrainedModel) -> None:
    with pytest.raises(PredictionError, match="does not exist"):
        find_images([tmp_path / "none.png"])
    with pytest.raises(PredictionError, match="holds no images"):
        find_images([tmp_path])
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG but no more")
    with pytest.raises(PredictionError, match=r"bad\.png: cannot be decoded"):
        list(predict_images(trained, [bad]))


def test_the_plain_model_of_the_comparison_holds_only_torchs_layers(tiny: Callable[..., TrainConfig]) -> None:
    torch.manual_seed(0)
    ours = build_model(tiny().model).eval()
    torch.manual_seed(0)
    plain = build_model(tiny().model).eval()
    use_torch_layers(plain)
    assert any(type(m).__module__.startswith("detr_fast.nn") for m in ours.modules())
    assert not any(type(m).__module__.startswith("detr_fast.nn") for m in plain.modules())
    images = torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(ours(images)["pred_boxes"], plain(images)["pred_boxes"])


def test_the_comparison_says_plainly_what_a_cpu_can_show(tiny: Callable[..., TrainConfig]) -> None:
    comparison = compare_with_torch(tiny(), "cpu", rounds=1)
    assert comparison.ours > 0
    assert "about 1.0 is expected on a CPU" in str(comparison)
