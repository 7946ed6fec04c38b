"""Finding the files of a data set, and the samples that come out of it."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data import CocoDetection, CocoFolder, DataError, TransformConfig, build_loader, train_transforms
from detr_fast.data.doctor import examine, fix


@pytest.mark.parametrize(
    ("json_file", "images"),
    [
        ("instances_train.json", "images"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train.json", "images/train"),
        ("train.json", "."),
        ("annotations/train.json", "train"),
        ("train/_annotations.coco.json", "train"),
        ("annotations/instances_Train.json", "images/Train"),  # CVAT's
    ],
)
def test_the_usual_layouts_are_found(write_coco, json_file, images):
    folder = write_coco()
    (folder / json_file).parent.mkdir(parents=True, exist_ok=True)
    (folder / "instances_train.json").rename(folder / json_file)
    (folder / images).mkdir(parents=True, exist_ok=True)
    for image in list((folder / "images").glob("*.png")):
        image.rename(folder / images / image.name)
    dataset = CocoDetection(CocoFolder.open(folder), "train")
    assert len(dataset) == 3
    assert dataset[0][0].shape == (3, 30, 60)


def test_of_several_files_for_a_split_instances_and_the_later_year_count(write_coco):
    folder = write_coco()
    names = ["train.json", "instances_train2014.json", "instances_train2017.json"]
    for name in names:
        (folder / name).write_bytes((folder / "instances_train.json").read_bytes())
    (folder / "instances_train.json").unlink()
    for expected in reversed(names):
        assert CocoFolder.open(folder).splits["train"].annotations.name == expected
        (folder / expected).unlink()


def test_file_names_may_hold_folders(write_coco):
    def edit(raw):
        for record in raw["images"]:
            record["file_name"] = f"images/{record['file_name']}"

    assert len(CocoDetection(CocoFolder.open(write_coco(edit=edit)), "train")) == 3


@pytest.mark.parametrize("literal", [False, True])
def test_backslashes_part_folders_unless_a_file_is_called_so(write_coco, tmp_path, literal):
    def edit(raw):
        for record in raw["images"]:
            record["file_name"] = f"sub\\{record['file_name']}"

    folder = write_coco(edit=edit)
    (folder / "images" / "sub").mkdir()
    for image in list((folder / "images").glob("*.png")):
        image.rename(folder / "images" / (f"sub\\{image.name}" if literal else f"sub/{image.name}"))
    assert len(list(CocoDetection(CocoFolder.open(folder), "train"))) == 3
    assert examine(folder).healthy
    fix(folder, tmp_path / "fixed")
    assert (tmp_path / "fixed" / "images" / "train" / "sub" / "wide.png").is_file()


def test_files_can_be_named(write_coco):
    folder = write_coco()
    (folder / "instances_train.json").rename(folder / "mine.json")
    (folder / "images").rename(folder / "pictures")
    opened = CocoFolder.open(folder, annotations={"train": "mine.json"}, images="pictures")
    assert len(CocoDetection(opened, "train")) == 3


def test_splits_share_the_categories_of_all(write_coco):
    write_coco("train", lambda raw: raw["categories"].append({"id": 1, "name": "first"}))
    folder = CocoFolder.open(write_coco("val"))
    assert list(folder.splits) == ["train", "val"]
    val = CocoDetection(folder, "val")
    assert val.names == ("first", "ant", "bee", "zebra")
    assert val[2][1]["labels"].tolist() == [3]


def test_splits_that_disagree_about_a_category_are_refused(write_coco):
    write_coco("train")
    with pytest.raises(DataError, match=r"category 9 is 'horse', but 'zebra' in instances_train.json"):
        CocoFolder.open(write_coco("val", lambda raw: raw["categories"][0].update(name="horse")))


def test_a_missing_folder_a_file_and_an_empty_folder_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        CocoFolder.open(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file, expected a folder"):
        CocoFolder.open(tmp_path / "file")
    with pytest.raises(DataError, match=r"holds no annotations; expected instances_train.json"):
        CocoFolder.open(tmp_path)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_default.json").touch()
    with pytest.raises(DataError, match=r"after a split, only annotations/instances_default.json; expected"):
        CocoFolder.open(tmp_path)
    with pytest.raises(DataError, match=r"mine.json: no such annotations file"):
        CocoFolder.open(tmp_path, annotations={"train": "mine.json"})


def test_a_missing_split_names_those_that_are_there(write_coco):
    folder = CocoFolder.open(write_coco())
    with pytest.raises(DataError, match=r"has no split 'test', only train; add instances_test.json"):
        CocoDetection(folder, "test")
    with pytest.raises(DataError, match="has no split 'valid', only train; choose one of these"):
        CocoDetection(folder, "valid")


def test_missing_images_are_counted_before_training(write_coco):
    folder = write_coco()
    (folder / "images" / "tall.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images are missing, first .*tall.png"):
        CocoDetection(CocoFolder.open(folder), "train")


def test_a_missing_image_of_an_absolute_name_is_not_to_be_put_into_the_folder(write_coco):
    folder = write_coco(edit=lambda raw: raw["images"][0].update(file_name="/elsewhere/wide.png"))
    with pytest.raises(DataError, match=r"first /elsewhere/wide.png; make file_name relative to .*images, or run"):
        CocoDetection(CocoFolder.open(folder), "train")


def test_targets_are_relative_and_without_crowds(write_coco):
    dataset = CocoDetection(CocoFolder.open(write_coco()), "train")
    image, target = dataset[0]
    assert type(image) is torch.Tensor
    assert image.dtype == torch.uint8
    assert type(target["boxes"]) is torch.Tensor
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.35, 0.35, 0.5, 0.5], [0.75, 0.5, 1 / 6, 1 / 3]]))
    assert target["image_id"].item() == 10
    assert target["orig_size"].tolist() == target["size"].tolist() == [30, 60]
    assert dataset.max_boxes == 2
    assert dataset.image_sizes == [(30, 60), (40, 40), (50, 30)]


def test_boxes_that_overhang_are_clamped(write_coco):
    folder = write_coco(edit=lambda raw: raw["annotations"][1].update(bbox=[-10, 3, 90, 60]))
    _, target = CocoDetection(CocoFolder.open(folder), "train")[0]
    torch.testing.assert_close(target["boxes"][0], torch.tensor([0.5, 0.55, 1.0, 0.9]))


def test_sizes_that_the_json_lacks_come_from_the_files(write_coco):
    def edit(raw):
        for record in raw["images"]:
            del record["width"], record["height"]

    dataset = CocoDetection(CocoFolder.open(write_coco(edit=edit)), "train")
    assert dataset.image_sizes == [(30, 60), (40, 40), (50, 30)]


def test_pixels_are_those_of_the_file_cached_or_not(write_coco):
    folder = write_coco()
    expected = np.asarray(Image.open(folder / "images" / "tall.png")).transpose(2, 0, 1)
    for cache_bytes in (0, 2**20):
        dataset = CocoDetection(CocoFolder.open(folder), "train", cache_bytes=cache_bytes)
        for _ in range(2):
            np.testing.assert_array_equal(dataset[2][0].numpy(), expected)


def test_a_small_data_set_is_read_once_and_a_large_one_each_time(write_coco):
    folder = write_coco()
    cached = CocoDetection(CocoFolder.open(folder), "train", cache_bytes=3 * (60 * 30 + 40 * 40 + 30 * 50))
    streamed = CocoDetection(CocoFolder.open(folder), "train", cache_bytes=3 * (60 * 30 + 40 * 40 + 30 * 50) - 1)
    cached.images.preload()
    streamed.images.preload()
    for image in (folder / "images").iterdir():
        image.unlink()
    assert len(list(cached)) == 3
    with pytest.raises(DataError, match="no such image"):
        streamed[0]


def test_augmentation_does_not_write_into_the_cache(write_coco):
    config = TransformConfig(sizes=(30,), max_size=60, eval_size=30, color_jitter=0.5)
    dataset = CocoDetection(CocoFolder.open(write_coco()), "train", train_transforms(config))
    before = dataset.images[0].clone()
    for seed in range(20):
        dataset[0, seed]
    assert torch.equal(dataset.images[0], before)


def test_a_pickled_data_set_leaves_its_decoded_images_behind(write_coco):
    dataset = CocoDetection(CocoFolder.open(write_coco()), "train")
    small = len(pickle.dumps(dataset))
    dataset.images.preload()
    assert len(pickle.dumps(dataset)) == small
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0][0], dataset[0][0])


def damage(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_a_one_line_error_also_from_a_worker(write_coco, workers):
    folder = write_coco()
    damage(folder / "images" / "wide.png")
    dataset = CocoDetection(CocoFolder.open(folder), "train", cache_bytes=0)
    with pytest.raises(DataError, match=r"wide.png: cannot be decoded") as caught:
        list(build_loader(dataset, 3, shuffle=False, workers=workers))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def test_a_truncated_image_of_a_cached_data_set_is_met_when_the_loader_is_built(write_coco):
    folder = write_coco()
    damage(folder / "images" / "wide.png")
    with pytest.raises(DataError, match=r"wide.png: cannot be decoded"):
        build_loader(CocoDetection(CocoFolder.open(folder), "train"), 3, shuffle=False)


def test_an_image_file_that_is_no_image_is_named(write_coco):
    folder = write_coco()
    (folder / "images" / "wide.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"wide.png: cannot be decoded"):
        CocoDetection(CocoFolder.open(folder), "train")[0]


def test_an_image_too_large_for_pillow_is_to_be_cut_into_tiles(write_coco, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match=r"wide.png: cannot be decoded \(.*exceeds limit.*\); cut it into tiles or run"):
        CocoDetection(CocoFolder.open(write_coco()), "train")[0]


def test_an_image_of_another_size_than_annotated_is_refused(write_coco):
    folder = write_coco(edit=lambda raw: raw["images"][0].update(width=61))
    with pytest.raises(DataError, match=r"wide.png: is 60×30 pixels, but its annotations say 61×30"):
        CocoDetection(CocoFolder.open(folder), "train")[0]


def test_a_picture_is_turned_by_exif_where_its_annotations_are(write_coco):
    folder = write_coco(edit=lambda raw: raw["images"][0].update(file_name="turned.jpg"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    Image.new("RGB", (30, 60), "red").save(folder / "images" / "turned.jpg", exif=exif)
    assert CocoDetection(CocoFolder.open(folder), "train")[0][0].shape == (3, 30, 60)


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_is_read_without_a_warning(write_coco):
    folder = write_coco(edit=lambda raw: raw["images"][0].update(file_name="palette.png"))
    picture = Image.new("RGB", (60, 30), (10, 20, 30)).quantize(4)
    picture.save(folder / "images" / "palette.png", transparency=bytes([128]))
    image, _ = CocoDetection(CocoFolder.open(folder), "train")[0]
    assert image[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "F", "F from 0 to 1"])
def test_pictures_of_any_mode_become_rgb(write_coco, mode):
    folder = write_coco(edit=lambda raw: raw["images"][0].update(file_name="other.tif"))
    if mode == "I;16":
        picture = Image.fromarray(np.full((30, 60), 128 * 256, dtype=np.uint16))
    elif mode == "F from 0 to 1":
        picture = Image.fromarray(np.full((30, 60), 0.5, dtype=np.float32))
    else:
        picture = Image.new("RGB", (60, 30), (128, 128, 128)).convert(mode)
    picture.save(folder / "images" / "other.tif")
    image, _ = CocoDetection(CocoFolder.open(folder), "train")[0]
    assert image.shape == (3, 30, 60)
    if mode != "1":
        assert abs(float(image.float().mean()) - 128) < 3


def test_the_real_blood_cells_are_read_whole(bccd):
    folder = CocoFolder.open(bccd)
    assert list(folder.splits) == ["train", "val", "test"]
    assert [category.name for category in folder.categories] == ["RBC", "WBC", "Platelets"]
    boxes = {split: len(folder.annotations(split).boxes) for split in folder.splits}
    assert boxes == {"train": 2804, "val": 1137, "test": 945}
    dataset = CocoDetection(folder, "val")
    raw = json.loads((bccd / "instances_val.json").read_text())
    image, target = dataset[5]
    assert image.shape == (3, 480, 640)
    assert len(target["boxes"]) == sum(a["image_id"] == raw["images"][5]["id"] for a in raw["annotations"])
