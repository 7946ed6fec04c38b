"""Conversions keep images, classes and boxes, whichever way they go, and name the line that can't be read."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from detr_fast.data import CocoDetection, CocoFolder, DataError, generate_scenes
from detr_fast.data.formats import convert, detect_format

FORMATS = ("coco", "yolo", "voc")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes") / "set", train=12, val=5)


def contents(folder):
    """{(split, pixels): sorted (class name, box)}: all that a conversion must keep."""
    opened = CocoFolder.open(folder)
    out = {}
    for split in opened.splits:
        dataset = CocoDetection(opened, split)
        part = dataset.annotations
        names = {category.id: category.name for category in opened.categories}
        for index in range(len(dataset)):
            own = part.of_image(index)
            keep = ~part.crowd[own]
            boxes = zip(part.category_ids[own][keep].tolist(), part.boxes[own][keep].tolist())
            key = (split, dataset.images[index].numpy().tobytes())
            out[key] = sorted((names[number], *box) for number, box in boxes)
    return out


@pytest.mark.parametrize("way", list(itertools.product(FORMATS, repeat=2)), ids="-".join)
def test_round_trips_through_any_formats_keep_all_boxes_exactly(scenes, tmp_path, way):
    """coco -> first -> second -> coco."""
    steps = ["coco", *way, "coco"]
    folder = scenes
    for number, (source, target) in enumerate(itertools.pairwise(steps)):
        convert(folder, tmp_path / str(number), source, target)
        folder = tmp_path / str(number)
    assert contents(folder) == contents(scenes)


def test_coco_keeps_crowds_and_the_others_say_how_many_they_dropped(write_coco, tmp_path):
    folder = write_coco()
    kept = convert(folder, tmp_path / "coco", "coco", "coco")
    assert (kept.boxes, kept.crowds_dropped) == ({"train": 4}, 0)
    assert CocoFolder.open(tmp_path / "coco").annotations("train").crowd.sum() == 1
    dropped = convert(folder, tmp_path / "yolo", "coco", "yolo")
    assert (dropped.images, dropped.boxes, dropped.crowds_dropped) == ({"train": 3}, {"train": 3}, 1)


@pytest.mark.parametrize("file_name", ["sub\\wide.png", "images/wide.png"], ids=["windows", "label-studio"])
@pytest.mark.parametrize("name", ["yolo", "voc"])
def test_images_in_folders_of_any_tool_come_through(write_coco, tmp_path, name, file_name):
    folder = write_coco(edit=lambda raw: raw["images"][0].update(file_name=file_name))
    place = folder / "images" / file_name.replace("\\", "/")
    place.parent.mkdir()
    (folder / "images" / "wide.png").rename(place)
    convert(folder, tmp_path / "there", "coco", name)
    assert convert(tmp_path / "there", tmp_path / "back", name, "coco").boxes == {"train": 3}


def test_yolo_files_are_as_ultralytics_reads_them(write_coco, tmp_path):
    convert(write_coco(), tmp_path / "yolo", "coco", "yolo")
    root = tmp_path / "yolo"
    assert (root / "data.yaml").read_text() == "train: images/train\nnames:\n  0: ant\n  1: bee\n  2: zebra\n"
    assert (root / "labels/train/wide.txt").read_text().splitlines() == [
        "0 0.350000000 0.350000000 0.500000000 0.500000000",
        "1 0.750000000 0.500000000 0.166666667 0.333333333",
    ]
    assert (root / "labels/train/empty.txt").read_text() == ""
    assert (root / "images/train/wide.png").is_file()


def test_voc_files_are_as_the_challenge_had_them(write_coco, tmp_path):
    """torchvision's reader finds its way, and corners count from 1 with both included."""
    from torchvision.datasets.voc import VOCDetection

    folder = write_coco(edit=lambda raw: raw["images"][0].update(file_name="wide.jpg"))
    Image.open(folder / "images" / "wide.png").save(folder / "images" / "wide.jpg")
    convert(folder, tmp_path / "VOCdevkit" / "VOC2007", "coco", "voc")
    dataset = VOCDetection(str(tmp_path), year="2007", image_set="train")
    (_, tree) = dataset[0]
    first, second = tree["annotation"]["object"]
    assert tree["annotation"]["size"] == {"width": "60", "height": "30", "depth": "3"}
    assert (first["name"], first["bndbox"]) == ("ant", {"xmin": "7", "ymin": "4", "xmax": "36", "ymax": "18"})
    assert second["bndbox"] == {"xmin": "41", "ymin": "11", "xmax": "50", "ymax": "20"}


def write_yolo(root, config="train: images\nnames: [cat, dog]\n", labels="1 0.5 0.5 0.5 0.25\n"):
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    Image.fromarray(np.zeros((40, 80, 3), dtype=np.uint8)).save(root / "images" / "a.png")
    (root / "labels" / "a.txt").write_text(labels, errors="surrogateescape")
    (root / "data.yaml").write_text(config)
    return root


def boxes_of(folder, split="train"):
    raw = json.loads((folder / f"instances_{split}.json").read_text())
    names = {category["id"]: category["name"] for category in raw["categories"]}
    return [(names[a["category_id"]], a["bbox"]) for a in raw["annotations"]]


@pytest.mark.parametrize(
    "config",
    [
        "train: images\nnames: [cat, dog]\n",
        "path: /home/someone/else\ntrain: images\nval:\nnames: {0: cat, 1: dog}\n",
        "train: ../images\nnames: [cat, dog]\n",  # Roboflow
        "train: [images]\nnames: [cat, dog]\n",
        "train: list.txt\nnames: [cat, dog]\n",
        "train: windows.txt\nnames: [cat, dog]\n",
    ],
)
def test_the_usual_ways_to_write_data_yaml_are_read(tmp_path, config):
    root = write_yolo(tmp_path / "yolo", config)
    (root / "list.txt").write_text("./images/a.png\n")
    (root / "windows.txt").write_text(".\\images\\a.png\n")
    (root / "images" / "._a.png").write_bytes(b"left by macOS")
    convert(root, tmp_path / "coco", "yolo", "coco")
    assert boxes_of(tmp_path / "coco") == [("dog", [20, 15, 40, 10])]


def test_the_mark_that_editors_on_windows_begin_a_file_with_is_no_number(tmp_path):
    root = write_yolo(tmp_path / "yolo", labels="\ufeff1 0.5 0.5 0.5 0.25\r\n")
    convert(root, tmp_path / "coco", "yolo", "coco")
    assert boxes_of(tmp_path / "coco") == [("dog", [20, 15, 40, 10])]


def test_polygons_count_by_the_box_around_them(tmp_path):
    root = write_yolo(tmp_path / "yolo", labels="0 0.25 0.25 0.5 0.125 0.75 0.5\n")
    convert(root, tmp_path / "coco", "yolo", "coco")
    assert boxes_of(tmp_path / "coco") == [("cat", [20, 5, 40, 15])]


def test_yolo_boxes_are_on_the_picture_as_exif_turns_it(tmp_path):
    root = write_yolo(tmp_path / "yolo")
    exif = Image.Exif()
    exif[0x0112] = 6
    (root / "images" / "a.png").unlink()
    Image.new("RGB", (40, 80)).save(root / "images" / "a.jpg", exif=exif)
    convert(root, tmp_path / "coco", "yolo", "coco")
    assert boxes_of(tmp_path / "coco") == [("dog", [20, 15, 40, 10])]
    assert CocoDetection(CocoFolder.open(tmp_path / "coco"), "train")[0][0].shape == (3, 40, 80)


def box_of_white(pixels):
    """(x, y, width, height) around what is white in (H, W, 3)."""
    rows, columns = np.nonzero(np.asarray(pixels).min(axis=2) > 127)
    x, y = int(columns.min()), int(rows.min())
    return [x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1]


@pytest.mark.parametrize("size", [(40, 64), (64, 64)], ids=["wide", "square"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_stay_on_their_objects_however_exif_turns_a_picture(tmp_path, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[8:24, 30:60] = 255
    (tmp_path / "stored").mkdir()
    Image.fromarray(pixels).save(tmp_path / "stored" / "a.png", exif=exif)
    raw = {
        "images": [{"id": 1, "file_name": "a.png", "height": size[0], "width": size[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [30, 8, 30, 16]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "stored" / "train.json").write_text(json.dumps(raw))
    convert(tmp_path / "stored", tmp_path / "yolo", "coco", "yolo")
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "yolo" / "images" / "train" / "a.png"))
    x, y, w, h = box_of_white(turned)
    fractions = [(x + w / 2) / turned.width, (y + h / 2) / turned.height, w / turned.width, h / turned.height]
    found = (tmp_path / "yolo" / "labels" / "train" / "a.txt").read_text().split()
    assert [float(value) for value in found] == pytest.approx([0, *fractions])
    convert(tmp_path / "yolo", tmp_path / "voc", "yolo", "voc")
    convert(tmp_path / "voc", tmp_path / "coco", "voc", "coco")
    image, _ = CocoDetection(CocoFolder.open(tmp_path / "coco"), "train")[0]
    assert boxes_of(tmp_path / "coco") == [("cat", box_of_white(image.permute(1, 2, 0)))]


@pytest.mark.parametrize(
    ("config", "labels", "message"),
    [
        (None, "2 0.5 0.5 0.1 0.1", r"a.txt: line 1 has label 2, expected 0 to 1"),
        (None, "0 0.5 0.5 0.1 0.1\n0 0.5 x 0.1 0.1", r"a.txt: line 2 is '0 0.5 x 0.1 0.1', expected numbers"),
        (None, "0 0.5 0.5 0.1", r"a.txt: line 1 has 3 values after the label"),
        (None, "0 40 20 10 10", r"a.txt: line 1 is '0 40 20 10 10', expected fractions of .*, not pixels"),
        (None, "0 nan 0.5 0.1 0.1", r"a.txt: line 1 is '0 nan 0.5 0.1 0.1', expected fractions"),
        (None, "0 0.5 0.5 0.1 \udcff", r"a.txt: line 1 is .*, expected numbers"),  # a byte that is no UTF-8
        (None, "", r"data.yaml: none of its images has a label; put label files into labels/"),
        ("train: labels\nnames: [cat]\n", "", r"labels: holds no images, but data.yaml names it"),
        ("train: nowhere\nnames: [cat]\n", "", r"data.yaml: 'nowhere' is neither a folder nor a list"),
        ("names: [cat]\n", "", r"data.yaml: names no 'train', 'val' or 'test' images"),
        ("train: images\nnames: 5\n", "", r"data.yaml: 'names' is 5"),
        ("names: [cat\n", "", r"data.yaml: is not YAML"),
    ],
)
def test_a_bad_line_of_yolo_is_named(tmp_path, config, labels, message):
    root = write_yolo(tmp_path / "yolo", *([config] if config else []), labels=labels)
    with pytest.raises(DataError, match=message) as caught:
        convert(root, tmp_path / "coco", "yolo", "coco")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "coco").exists()


def write_voc(root, xml, image="a.jpg"):
    (root / "Annotations").mkdir(parents=True)
    (root / "JPEGImages").mkdir()
    Image.fromarray(np.zeros((40, 80, 3), dtype=np.uint8)).save(root / "JPEGImages" / image)
    (root / "Annotations" / "a.xml").write_text(xml)
    return root


OBJECT = "<object><name>cat</name><bndbox><xmin>{}</xmin><ymin>4</ymin><xmax>36</xmax><ymax>18</ymax></bndbox></object>"


def test_voc_without_lists_of_images_is_one_training_split(tmp_path):
    root = write_voc(tmp_path / "voc", f"<annotation>{OBJECT.format(7)}</annotation>")
    (root / "Annotations" / "._a.xml").write_bytes(b"left by macOS")
    result = convert(root, tmp_path / "coco", "voc", "coco")
    assert result.images == {"train": 1}
    assert boxes_of(tmp_path / "coco") == [("cat", [6, 3, 30, 15])]


@pytest.mark.parametrize(
    ("xml", "image", "message"),
    [
        ("<annotation>", "a.jpg", r"a.xml: is not XML"),
        ('<?xml version="1.0" encoding="gbk"?><annotation/>', "a.jpg", r"a.xml: is not XML \(.*\); .*, as UTF-8"),
        (f"<annotation>{OBJECT.format('seven')}</annotation>", "a.jpg", r"bndbox of object 'cat' lacks a number"),
        ("<annotation><object><name>cat</name></object></annotation>", "a.jpg", "lacks a number"),
        (f"<annotation>{OBJECT.format(7)}</annotation>", "b.jpg", r"a.xml: its image is missing"),
        ("<annotation></annotation>", "a.jpg", "holds no objects"),
    ],
)
def test_a_bad_file_of_voc_is_named(tmp_path, xml, image, message):
    root = write_voc(tmp_path / "voc", xml, image)
    with pytest.raises(DataError, match=message) as caught:
        convert(root, tmp_path / "coco", "voc", "coco")
    assert "\n" not in str(caught.value)


def test_a_listed_file_that_is_missing_is_named(tmp_path):
    root = write_voc(tmp_path / "voc", f"<annotation>{OBJECT.format(7)}</annotation>")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "train.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"b.xml: no such annotations file"):
        convert(root, tmp_path / "coco", "voc", "coco")


def test_lists_of_a_single_class_are_read_too(tmp_path):
    root = write_voc(tmp_path / "voc", f"<annotation>{OBJECT.format(7)}</annotation>")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "val.txt").write_text("a  -1\n")
    assert convert(root, tmp_path / "coco", "voc", "coco").images == {"val": 1}


def test_images_that_differ_in_suffix_only_keep_their_own_labels(write_coco, tmp_path):
    def edit(raw):
        raw["images"][1]["file_name"] = "wide.bmp"
        raw["images"][2]["file_name"] = "WIDE.tif"  # the same file as wide.tif, for some file systems

    folder = write_coco(edit=edit)
    Image.open(folder / "images" / "empty.png").save(folder / "images" / "wide.bmp")
    Image.open(folder / "images" / "tall.png").save(folder / "images" / "WIDE.tif")
    for name in ("yolo", "voc"):
        convert(folder, tmp_path / name, "coco", name)
        convert(tmp_path / name, tmp_path / f"{name}-coco", name, "coco")
        assert contents(tmp_path / f"{name}-coco") == contents(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_told_apart(scenes, tmp_path, name):
    convert(scenes, tmp_path / name, "coco", name)
    assert detect_format(tmp_path / name) == name


def test_a_folder_of_no_format_an_unknown_format_and_a_full_destination_are_refused(scenes, tmp_path):
    with pytest.raises(DataError, match=r"holds no annotations.* data\.yaml.* Annotations/"):
        detect_format(tmp_path)
    with pytest.raises(DataError, match="format 'csv' is unknown; choose one of coco, yolo, voc"):
        convert(scenes, tmp_path / "new", "coco", "csv")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not empty"):
        convert(scenes, tmp_path, "coco", "yolo")


def test_the_real_blood_cells_survive_a_round_trip(bccd, tmp_path):
    convert(bccd, tmp_path / "yolo", "coco", "yolo")
    convert(tmp_path / "yolo", tmp_path / "voc", "yolo", "voc")
    convert(tmp_path / "voc", tmp_path / "coco", "voc", "coco")
    for split in ("train", "val", "test"):
        before, after = (CocoFolder.open(folder).annotations(split) for folder in (bccd, tmp_path / "coco"))
        boxes = dict(zip(before.file_names, (before.boxes[before.of_image(i)] for i in range(len(before.file_names)))))
        for i, name in enumerate(after.file_names):
            np.testing.assert_array_equal(after.boxes[after.of_image(i)], boxes[name])
