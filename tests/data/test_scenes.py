"""The generated data set: the same each time, true to its annotations, and safe to interrupt."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from detr_fast.data import CocoDetection, CocoFolder, DataError, generate_scenes
from detr_fast.data.scenes import CATEGORIES, draw_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generate_scenes(tmp_path_factory.mktemp("scenes") / "set", train=60, val=12)


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_files_and_another_one_others(folder, tmp_path):
    again = generate_scenes(tmp_path / "again", train=60, val=12)
    other = generate_scenes(tmp_path / "other", train=60, val=12, seed=1)
    assert contents(again) == contents(folder)
    assert contents(other)["images/000000.png"] != contents(folder)["images/000000.png"]


def test_it_is_an_ordinary_coco_data_set(folder):
    opened = CocoFolder.open(folder)
    train, val = CocoDetection(opened, "train"), CocoDetection(opened, "val")
    assert (len(train), len(val)) == (60, 12)
    assert train.names == tuple(CATEGORIES.values())
    assert 0 not in train.category_ids
    assert len(set(np.diff(train.category_ids))) > 1  # gaps
    assert not set(train.image_ids) & set(val.image_ids)
    assert len(set(train.image_sizes)) > 30
    assert {len(target["boxes"]) for _, target in train} == {1, 2, 3, 4, 5}


def test_objects_are_large_enough_to_be_learnt_on_a_cpu(folder):
    dataset = CocoDetection(CocoFolder.open(folder), "train")
    for index, (height, width) in enumerate(dataset.image_sizes):
        longer = dataset.annotations.boxes[dataset.annotations.of_image(index), 2:].max(axis=1)
        assert (longer >= 0.2 * min(height, width)).all()
        assert (longer <= 0.6 * min(height, width)).all()


def test_boxes_are_tight_around_what_can_be_seen(monkeypatch):
    """Seen from outside: a scene's picture differs from the same scene without one object exactly within its box."""
    from detr_fast.data import scenes

    masks = []
    original = scenes._object

    def keep(category, mask):
        masks.append(mask)
        return original(category, mask)

    monkeypatch.setattr(scenes, "_object", keep)
    for seed in range(20):
        masks.clear()
        picture, objects = draw_scene(np.random.default_rng(seed), 96)
        assert not (np.sum(masks, axis=0) > 1).any()  # each pixel belongs to one object: what is hidden is not counted
        for mask, (_, (x, y, width, height), area) in zip(masks, objects):
            rows, columns = np.nonzero(mask)
            assert [columns.min() / 4, rows.min() / 4] == [x, y]
            assert [(columns.max() + 1) / 4, (rows.max() + 1) / 4] == [x + width, y + height]
            assert area == pytest.approx(mask.sum() / 16, abs=0.01)
            assert 0 <= x < x + width <= picture.width
            assert 0 <= y < y + height <= picture.height


def test_colour_says_nothing_about_the_class(folder):
    """Mean hue of each class: none stands apart, so shape must be learnt."""
    dataset = CocoDetection(CocoFolder.open(folder), "train")
    reds = {label: [] for label in range(6)}
    for image, target in dataset:
        height, width = image.shape[1:]
        for label, (x, y, _, _) in zip(target["labels"].tolist(), target["boxes"].tolist()):
            reds[label].append(float(image[0, int(y * height), int(x * width)]))
    assert all(np.std(values) > 50 for label, values in reds.items() if dataset.names[label] != "ring")


def test_a_complete_folder_is_left_as_it_is(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    generate_scenes(folder, train=60, val=12)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_settings_make_it_anew(tmp_path):
    generate_scenes(tmp_path / "set", train=3, val=1)
    generate_scenes(tmp_path / "set", train=2, val=1)
    assert len(json.loads((tmp_path / "set" / "instances_train.json").read_text())["images"]) == 2
    assert len(list((tmp_path / "set" / "images").iterdir())) == 3


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_scenes(tmp_path / "set", train=3, val=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is there already, and not empty"):
        generate_scenes(tmp_path, train=1, val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_unwritable_place_is_a_one_line_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        generate_scenes(tmp_path / "file" / "set", train=1, val=1)


def test_progress_counts_to_the_end(tmp_path):
    seen = []
    generate_scenes(tmp_path / "set", train=3, val=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_pictures_are_plain_rgb_pngs(folder):
    with Image.open(folder / "images" / "000000.png") as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
