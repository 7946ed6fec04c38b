"""The doctor finds each kind of damage, counts right, and its repaired copy is healthy and trains."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from detr_fast.data import CocoDetection, CocoFolder, DataError
from detr_fast.data.doctor import KINDS, examine, fix


def found(report):
    """{(split, kind): count} of all but notes."""
    return {(f.split, f.kind): f.count for f in report.findings if f.severity != "note"}


def box(raw, number, **fields):
    raw["annotations"][number].update(fields)


def kind_of(case):
    return case.partition(":")[0]


def picture(root, name):
    return root / "images" / name


# What is done to the small data set, and what must be found then, and nothing else: the kind, and what is behind a colon tells cases apart.
RECORD_DAMAGE = {
    "box without area": lambda raw: box(raw, 1, bbox=[6, 3, 0, 15]),
    "box outside its image": lambda raw: box(raw, 0, bbox=[3, 55, 12, 20]),
    "malformed box": lambda raw: box(raw, 0, bbox=[3, 5, None, 20]),
    "malformed box: no float": lambda raw: box(raw, 0, bbox=[10**400, 5, 12, 20]),
    "box overhangs": lambda raw: box(raw, 0, bbox=[3, 5, 40, 20]),
    "unknown image id": lambda raw: box(raw, 0, image_id=31),
    "unknown category id": lambda raw: box(raw, 0, category_id="zebra"),
    "duplicate box": lambda raw: raw["annotations"].append(dict(raw["annotations"][1], id=9)),
    "malformed image record": lambda raw: raw["images"].append({"id": 40}),
    "malformed category": lambda raw: raw["categories"].append({"id": 40}),
    "duplicate category id": lambda raw: raw["categories"].append({"id": 9, "name": "horse"}),
    "wrong image size": lambda raw: raw["images"][1].update(width=44),
    "wrong image size: no integer": lambda raw: raw["images"][1].update(width=44.5),
    "missing image": lambda raw: raw["images"].append({"id": 40, "file_name": "gone.png", "width": 9, "height": 9}),
}


@pytest.mark.parametrize("case", RECORD_DAMAGE)
def test_damage_in_the_records_is_found_and_repaired(write_coco, tmp_path, case):
    folder = write_coco(edit=RECORD_DAMAGE[case])
    assert found(examine(folder)) == {("train", kind_of(case)): 1}
    fix(folder, tmp_path / "fixed")
    assert found(examine(tmp_path / "fixed")) == {}
    assert len(list(CocoDetection(CocoFolder.open(tmp_path / "fixed"), "train"))) == 3


@pytest.mark.parametrize("case", [case for case in RECORD_DAMAGE if KINDS[kind_of(case)].severity == "error"])
def test_errors_are_what_training_refuses(write_coco, case):
    """Else the doctor would call a data set healthy that does not train, or the reverse."""
    report = examine(write_coco(edit=RECORD_DAMAGE[case]))
    assert not report.healthy
    with pytest.raises(DataError):
        list(CocoDetection(CocoFolder.open(report.folder), "train"))


def test_a_sound_data_set_is_healthy_and_counted_right(write_coco):
    report = examine(write_coco())
    assert report.healthy
    assert found(report) == {}
    (part,) = report.splits
    assert (part.images, part.without_objects, part.boxes, part.crowd) == (3, 1, 3, 1)
    assert part.boxes_by_class == {"zebra": 1, "ant": 1, "bee": 1}
    assert part.boxes_per_image.tolist() == [2, 0, 1]
    assert sorted(part.box_sides**2) == pytest.approx([100, 240, 450])
    assert part.image_sizes == {(30, 60): 1, (40, 40): 1, (50, 30): 1}


def test_a_truncated_image_is_found_and_left_out_with_its_boxes(write_coco, tmp_path):
    folder = write_coco()
    path = picture(folder, "wide.png")
    path.write_bytes(path.read_bytes()[:500])
    report = examine(folder)
    assert found(report) == {("train", "damaged image"): 1}
    assert "wide.png cannot be decoded" in report.findings[0].examples[0]
    assert fix(folder, tmp_path / "fixed") == {"train": {"images": 1, "boxes": 3}}


def test_images_that_share_an_id_are_left_out_since_their_boxes_cannot_be_told_apart(write_coco, tmp_path):
    def edit(raw):
        raw["images"][1]["id"] = 10

    folder = write_coco(edit=edit)
    assert found(examine(folder)) == {("train", "duplicate image id"): 2}
    assert fix(folder, tmp_path / "fixed") == {"train": {"images": 2, "boxes": 3}}


def test_an_image_listed_twice_is_kept_once(write_coco, tmp_path):
    folder = write_coco(edit=lambda raw: raw["images"].append(dict(raw["images"][0])))
    assert found(examine(folder)) == {("train", "duplicate image id"): 1}
    assert fix(folder, tmp_path / "fixed") == {"train": {"images": 1, "boxes": 0}}


def test_a_copy_of_an_image_is_found_by_its_pixels_in_another_format(write_coco, tmp_path):
    def edit(raw):
        raw["images"].append({"id": 40, "file_name": "copy.bmp", "width": 60, "height": 30})

    folder = write_coco(edit=edit)
    Image.open(picture(folder, "wide.png")).save(picture(folder, "copy.bmp"))
    report = examine(folder)
    assert found(report) == {("train", "duplicate image"): 1}
    assert report.findings[0].examples == ("copy.bmp has the pixels of wide.png",)
    assert fix(folder, tmp_path / "fixed")["train"]["images"] == 1


def test_leakage_between_splits_is_cured_in_the_training_split(write_coco, tmp_path):
    def only(name):
        def edit(raw):
            raw["images"] = [image for image in raw["images"] if image["file_name"] == name]
            kept = {image["id"] for image in raw["images"]}
            raw["annotations"] = [a for a in raw["annotations"] if a["image_id"] in kept]

        return edit

    write_coco("train")
    folder = write_coco("test", only("tall.png"))
    report = examine(folder)
    assert found(report) == {("train", "leak between splits"): 1}
    assert report.findings[0].examples == ("tall.png is also in test (tall.png)",)
    removed = fix(folder, tmp_path / "fixed")
    assert removed == {"train": {"images": 1, "boxes": 1}, "test": {"images": 0, "boxes": 0}}
    assert found(examine(tmp_path / "fixed")) == {}


def test_the_repaired_copy_keeps_all_other_fields_and_the_original_stays(write_coco, tmp_path):
    def edit(raw):
        raw["info"] = {"year": 2024}
        raw["categories"][0]["supercategory"] = "animal"
        raw["images"][2]["license"] = 7
        box(raw, 0, segmentation=[[1, 2, 3, 4, 5, 6]])
        box(raw, 1, bbox=[6, 3, 0, 15])

    folder = write_coco(edit=edit)
    before = (folder / "instances_train.json").read_bytes()
    fix(folder, tmp_path / "fixed")
    raw = json.loads((tmp_path / "fixed" / "instances_train.json").read_text())
    assert raw["info"] == {"year": 2024}
    assert raw["categories"][0] == {"id": 9, "name": "zebra", "supercategory": "animal"}
    assert raw["images"][2]["license"] == 7
    assert raw["annotations"][0]["segmentation"] == [[1, 2, 3, 4, 5, 6]]
    assert [a["id"] for a in raw["annotations"]] == [1, 2, 3]
    assert (folder / "instances_train.json").read_bytes() == before


def test_ids_of_any_type_become_integers(write_coco, tmp_path):
    def edit(raw):
        for record in raw["images"]:
            record["id"] = record["file_name"]
        for record in raw["categories"]:
            record["id"] = record["name"]
        names = {10: "wide.png", 30: "tall.png"}
        classes = {9: "zebra", 2: "ant", 5: "bee"}
        for record in raw["annotations"]:
            record.update(image_id=names[record["image_id"]], category_id=classes[record["category_id"]])

    folder = write_coco(edit=edit)
    assert found(examine(folder)) == {("train", "category id no integer"): 1}
    fix(folder, tmp_path / "fixed")
    raw = json.loads((tmp_path / "fixed" / "instances_train.json").read_text())
    assert [image["id"] for image in raw["images"]] == [1, 2, 3]
    assert [(c["id"], c["name"]) for c in raw["categories"]] == [(1, "zebra"), (2, "ant"), (3, "bee")]
    assert [(a["image_id"], a["category_id"]) for a in raw["annotations"]] == [(3, 1), (1, 2), (1, 3), (1, 3)]


def test_two_categories_of_one_name_are_a_warning_and_stay(write_coco, tmp_path):
    """As in exports of Roboflow's, where the first category is the whole project's."""
    folder = write_coco(edit=lambda raw: raw["categories"].append({"id": 0, "name": "zebra"}))
    report = examine(folder)
    assert report.healthy
    assert found(report) == {("train", "categories of one name"): 1}
    assert "'zebra': ids 9, 0" in report.text()
    fix(folder, tmp_path / "fixed")
    assert len(CocoFolder.open(tmp_path / "fixed").categories) == 4


def test_boxes_that_the_polygons_gave_are_written(write_coco, tmp_path):
    def edit(raw):
        raw["annotations"][1] |= {"bbox": None, "segmentation": [[6, 3, 20, 18, 6, 10]], "area": -80}

    folder = write_coco(edit=edit)
    assert found(examine(folder)) == {}
    fix(folder, tmp_path / "fixed")
    raw = json.loads((tmp_path / "fixed" / "instances_train.json").read_text())
    assert [r["bbox"] for r in raw["annotations"] if r["area"] == 14 * 15] == [[6, 3, 14, 15]]


def test_boxes_are_cut_off_at_the_border(write_coco, tmp_path):
    folder = write_coco(edit=lambda raw: box(raw, 0, bbox=[-4, 5, 100, 100]))
    fix(folder, tmp_path / "fixed")
    raw = json.loads((tmp_path / "fixed" / "instances_train.json").read_text())
    assert raw["annotations"][0]["bbox"] == [0, 5, 30, 45]


def test_categories_that_disagree_between_splits_are_found_and_left_to_the_user(write_coco, tmp_path):
    write_coco("train")
    folder = write_coco("val", lambda raw: raw["categories"][0].update(name="horse"))
    picture_names = [image["file_name"] for image in json.loads((folder / "instances_val.json").read_text())["images"]]
    assert len(picture_names) == 3
    assert ("val", "categories disagree") in found(examine(folder))
    with pytest.raises(DataError, match=r"categories disagree .*'zebra' and 'horse'.*give each id one name") as caught:
        fix(folder, tmp_path / "fixed")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fixed").exists()


def test_a_split_without_images_is_found_and_left_to_the_user(write_coco, tmp_path):
    def edit(raw):
        raw["images"].clear()
        raw["annotations"].clear()

    folder = write_coco(edit=edit)
    assert found(examine(folder)) == {("train", "no images"): 1}
    assert "--fix can't repair it" in examine(folder).text()
    with pytest.raises(DataError, match="no images"):
        fix(folder, tmp_path / "fixed")


def test_a_destination_with_contents_is_not_touched(write_coco, tmp_path):
    (tmp_path / "fixed").mkdir()
    (tmp_path / "fixed" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty; give the name of a new folder"):
        fix(write_coco(), tmp_path / "fixed")
    assert [path.name for path in (tmp_path / "fixed").iterdir()] == ["thesis.txt"]


def test_files_of_the_same_name_in_different_splits_stay_apart(write_coco, tmp_path):
    """As in exports with train/0001.jpg and val/0001.jpg."""
    folder = tmp_path / "set"
    for split in ("train", "val"):
        write_coco(split)
        shutil.move(folder / "images", folder / split)
    for image in (folder / "val").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(image))).save(image)
    assert found(examine(folder)) == {}
    fix(folder, tmp_path / "fixed")
    assert found(examine(tmp_path / "fixed")) == {}
    pixels = [CocoDetection(CocoFolder.open(tmp_path / "fixed"), split)[0][0] for split in ("train", "val")]
    assert (pixels[0] == 255 - pixels[1]).all()


def test_the_text_names_classes_counts_examples_and_the_cure(write_coco):
    text = examine(write_coco(edit=lambda raw: box(raw, 1, bbox=[6, 3, 0, 15]))).text()
    assert "error    train: box without area (1)" in text
    assert "annotation 1 of wide.png has no area: [6, 3, 0, 15]" in text
    assert "--fix: left out" in text
    assert "not fit for training" in text
    for name in ("zebra", "ant", "bee"):
        assert name in text


def test_the_figures_are_json(write_coco):
    values = json.loads(json.dumps(examine(write_coco()).to_dict()))
    assert values["healthy"] is True
    assert values["splits"]["train"]["boxes"] == 3
    assert values["splits"]["train"]["largest_number_of_boxes"] == 2
    assert {finding["kind"] for finding in values["findings"]} == {"images without objects"}


def test_the_page_is_drawn_also_of_damaged_data(write_coco, tmp_path):
    def edit(raw):
        raw["categories"][0]["name"] = "$^$"  # no formula
        box(raw, 0, bbox=[3, 5, None, 20], category_id="what")
        box(raw, 1, bbox=[6, 3, 0, 15])
        raw["images"].append({"id": 40, "file_name": "gone.png"})

    examine(write_coco(edit=edit)).draw(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as page:
        assert page.size[0] > 1000
        assert 500 < page.size[1] < 1000  # three charts, and one row for the three images that can be decoded


def test_a_page_that_cannot_be_written_is_a_one_line_error(write_coco, tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        examine(write_coco()).draw(tmp_path / "nowhere" / "page.png")


def test_what_is_no_data_set_cannot_be_examined(tmp_path):
    with pytest.raises(DataError, match="holds no annotations"):
        examine(tmp_path)


def test_progress_counts_the_images_of_all_splits(write_coco):
    write_coco("train")
    seen = []
    examine(write_coco("val"), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 6) for number in range(1, 7)]


def test_the_real_blood_cells_are_healthy(bccd):
    report = examine(bccd)
    assert found(report) == {}
    assert [part.boxes for part in report.splits] == [2804, 1137, 945]
