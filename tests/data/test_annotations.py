"""What the reader accepts as one and the same data set, and what it refuses and how."""

from __future__ import annotations

import json

import numpy as np
import pytest

from detr_fast.data import CocoDetection, CocoFolder, DataError


def set_value(key, position, field, value):
    """An edit of one field of one record."""

    def edit(raw):
        raw[key][position][field] = value

    return edit


def test_labels_are_positions_in_order_of_category_id(write_coco):
    dataset = CocoDetection(CocoFolder.open(write_coco()), "train")
    assert dataset.names == ("ant", "bee", "zebra")
    assert dataset.category_ids == (2, 5, 9)
    assert [target["labels"].tolist() for _, target in dataset] == [[0, 1], [], [2]]


@pytest.mark.parametrize("convert", [str, float, lambda value: f"{value:05d}"])
def test_ids_of_another_type_make_no_difference(write_coco, convert):
    def edit(raw):
        for annotation in raw["annotations"][::2]:  # half of them: types are often mixed
            annotation["image_id"] = convert(annotation["image_id"])
            annotation["category_id"] = convert(annotation["category_id"])
        for record in raw["categories"]:
            record["id"] = convert(record["id"])

    plain, converted = (
        CocoFolder.open(write_coco(edit=edit, folder=name)).annotations("train")
        for name, edit in (("plain", None), ("converted", edit))
    )
    assert converted.categories == plain.categories
    assert converted.image_ids == plain.image_ids
    for field in ("boxes", "category_ids", "areas", "crowd", "offsets"):
        np.testing.assert_array_equal(getattr(converted, field), getattr(plain, field))


def test_image_ids_that_are_names_become_numbers(write_coco):
    def edit(raw):
        for record in raw["images"]:
            record["id"] = f"picture-{record['id']}"
        for record in raw["annotations"]:
            record["image_id"] = f"picture-{record['image_id']}"

    part = CocoFolder.open(write_coco(edit=edit)).annotations("train")
    assert part.image_ids == (1, 2, 3)
    assert part.original_image_ids == ("picture-10", "picture-20", "picture-30")
    assert part.offsets.tolist() == [0, 3, 3, 4]


BAD = [
    (set_value("annotations", 0, "image_id", 77), "annotation 0 names image_id 77"),
    (set_value("annotations", 1, "category_id", 4), "annotation 1 names category_id 4"),
    (set_value("annotations", 1, "bbox", [6, 3, 0, 15]), r"'wide.png': its bbox has no area: \[6, 3, 0, 15\]"),
    (set_value("annotations", 1, "bbox", [6, 3, 5, -1]), "has no area"),
    (set_value("annotations", 0, "bbox", [30, 5, 12, 20]), "lies outside its 30×50 image"),
    (set_value("annotations", 0, "bbox", [-12, 5, 12, 20]), "lies outside its 30×50 image"),
    (set_value("annotations", 0, "bbox", [1, 2, 3]), r"expected \[x, y, width, height\]"),
    (set_value("annotations", 0, "bbox", [float("nan"), 5, 12, 20]), "expected four finite numbers"),
    (set_value("annotations", 0, "bbox", ["3", 5, 12, 20]), "expected four finite numbers"),
    (set_value("images", 1, "id", 10), "image id 10 appears twice: 'wide.png' and 'empty.png'"),
    (set_value("images", 1, "id", "10"), "image id '10' appears twice"),
    (set_value("images", 1, "file_name", None), r"images\[1\] has id 20 and file_name None"),
    (set_value("images", 0, "width", -60), "has size -60×30"),
    (set_value("categories", 0, "id", "zebra"), "has id 'zebra', expected an integer"),
    (set_value("categories", 0, "id", 2), "category id 2 appears twice: 'zebra' and 'ant'"),
    (set_value("categories", 0, "name", ""), "category 9 has name ''"),
    (lambda raw: raw["images"].clear(), "lists no images"),
    (lambda raw: raw["categories"].clear(), "lists no categories, expected at least one"),
]


@pytest.mark.parametrize(("edit", "message"), BAD)
def test_a_bad_record_is_a_one_line_error_with_file_value_and_remedy(write_coco, edit, message):
    with pytest.raises(DataError, match=message) as caught:
        CocoFolder.open(write_coco(edit=edit))
    text = str(caught.value)
    assert "\n" not in text
    assert "instances_train.json: " in text
    assert "detr-fast doctor" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a list; expected a COCO instances file"),
        ("{}", "has no 'images'"),
        ('{"images": [], "annotations": {}}', "'annotations' is a dict"),
        ('{"images": [], "annotations": []}', "has no 'categories'"),
        ('{"images": [7], "annotations": [], "categories": []}', r"images\[0\] is 7; expected an object"),
        ("", "is not JSON"),
        ('{"images": [', "is not JSON"),
        ('{"images": ' + "9" * 5000 + "}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\xff\xfe", "is not JSON"),
    ],
)
def test_a_file_that_is_not_coco_is_named_as_such(tmp_path, content, message):
    (tmp_path / "instances_train.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=message) as caught:
        CocoFolder.open(tmp_path)
    assert "\n" not in str(caught.value)
    assert "instances_train.json" in str(caught.value)


def test_no_categories_and_no_annotations_is_an_error(write_coco):
    def edit(raw):
        raw["annotations"].clear()
        raw["categories"].clear()

    with pytest.raises(DataError, match="lists no categories"):
        CocoFolder.open(write_coco(edit=edit))


def test_bad_boxes_can_be_dropped_as_the_original_does(write_coco):
    def edit(raw):
        raw["annotations"][1]["bbox"] = [6, 3, 0, 15]
        raw["annotations"][0]["bbox"] = [30, 5, 12, 20]

    part = CocoFolder.open(write_coco(edit=edit), bad_boxes="drop").annotations("train")
    assert part.boxes.tolist() == [[40, 10, 10, 10], [0, 0, 60, 30]]


def test_a_split_without_any_objects_is_legal(write_coco):
    dataset = CocoDetection(CocoFolder.open(write_coco(edit=lambda raw: raw["annotations"].clear())), "train")
    assert dataset.max_boxes == 0
    assert dataset[0][1]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("area", [None, "240", float("nan"), -240, True])
def test_area_falls_back_on_the_box_where_it_is_none_that_a_segment_can_have(write_coco, area):
    edit = set_value("annotations", 0, "area", area)
    assert CocoFolder.open(write_coco(edit=edit)).annotations("train").areas.tolist() == [450, 100, 1800, 240]


@pytest.mark.parametrize(("value", "crowd"), [("0", False), ("1", True), (0.0, False), (None, False), (True, True)])
def test_a_crowd_is_told_whatever_the_type_of_its_mark(write_coco, value, crowd):
    part = CocoFolder.open(write_coco(edit=set_value("annotations", 1, "iscrowd", value))).annotations("train")
    assert part.crowd.tolist() == [crowd, False, True, False]


@pytest.mark.parametrize("bbox", ["absent", None, []])
def test_an_annotation_without_a_box_gets_the_one_around_its_polygons(write_coco, bbox):
    def edit(raw):
        record = raw["annotations"][1]
        record["segmentation"] = [[6, 3, 20, 18, 6, 10], [30, 4, 36, 9, 31, 9]]
        record["bbox"] = bbox
        if bbox == "absent":
            del record["bbox"]

    assert CocoFolder.open(write_coco(edit=edit)).annotations("train").boxes[0].tolist() == [6, 3, 30, 15]


@pytest.mark.parametrize("segmentation", [{"counts": "b", "size": [9, 9]}, [[1, 2, 3]], [["a", "b"]], [], None])
def test_what_is_no_polygon_gives_no_box(write_coco, segmentation):
    def edit(raw):
        raw["annotations"][1].update(bbox=None, segmentation=segmentation)

    with pytest.raises(DataError, match=r"its bbox is None, expected \[x, y, width, height\]"):
        CocoFolder.open(write_coco(edit=edit))


def test_json_keeps_what_pycocotools_reads(write_coco):
    """The reader agrees with pycocotools' own on the boxes of each image."""
    from pycocotools.coco import COCO

    folder = write_coco()
    raw = json.loads((folder / "instances_train.json").read_text())
    theirs = COCO()
    theirs.dataset = raw
    theirs.createIndex()
    part = CocoFolder.open(folder).annotations("train")
    for index, image_id in enumerate(part.image_ids):
        expected = [annotation["bbox"] for annotation in theirs.loadAnns(theirs.getAnnIds([image_id]))]
        assert part.boxes[part.of_image(index)].tolist() == expected
