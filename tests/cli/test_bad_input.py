"""Bad input through the real command line: one line that names file, value and remedy, status 2, and nothing is lost."""

from __future__ import annotations

import errno
import json
import re
import resource
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")

from detr_fast.cli import main
from detr_fast.engine import run_folder

SMALL = ["--model", "small", "--image-size", "32", "--batch-size", "2", "--workers", "0", "--device", "cpu"]


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in args])
    return int(ended.value.code or 0)


def assert_one_line(capsys: pytest.CaptureFixture[str], pattern: str) -> None:
    error = capsys.readouterr().err
    assert re.search(pattern, error), error
    assert error.startswith("Error: ")
    assert error.count("\n") == 1


def write_data(folder: Path, edit: Callable[[dict[str, Any]], None] = lambda raw: None) -> Path:
    """Four training and two validation images with a box each; `edit` may change the training JSON."""
    (folder / "images").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2)):
        raw: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
        for number in range(1, count + 1):
            name = f"{split}{number}.png"
            pixels = np.random.default_rng(number).integers(256, size=(40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name)
            raw["images"].append({"id": number, "file_name": name, "height": 40, "width": 50})
            box = {"id": number, "image_id": number, "category_id": 1, "bbox": [5, 5, 20, 20]}
            raw["annotations"].append(box)
        if split == "train":
            edit(raw)
        (folder / f"instances_{split}.json").write_text(json.dumps(raw))
    return folder


def box(**fields: Any) -> Callable[[Path], object]:
    """A data set whose second training box has these fields."""
    return lambda folder: write_data(folder, lambda raw: raw["annotations"][1].update(fields))


def text(content: str) -> Callable[[Path], object]:
    """A data set whose training JSON is this text."""
    return lambda folder: (write_data(folder) / "instances_train.json").write_text(content)


def image(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A data set whose second training image was changed."""
    return lambda folder: change(write_data(folder) / "images" / "train2.png")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


DATA = {
    "missing folder": (lambda folder: None, "data: does not exist; give a folder with instances_train.json"),
    "a file": (lambda folder: folder.write_text(""), "data: is a file, expected a folder"),
    "empty folder": (Path.mkdir, "data: holds no annotations; expected instances_train.json"),
    "no training split": (
        lambda folder: (write_data(folder) / "instances_train.json").unlink(),
        "data: has no split 'train', only val; add instances_train.json",
    ),
    "no images": (text('{"images": [], "annotations": [], "categories": []}'), "instances_train.json: lists no images"),
    "not JSON": (text('{"images": ['), r"instances_train.json: is not JSON \(.*\); export"),
    "no object": (text("[1, 2]"), "instances_train.json: holds a list; expected a COCO instances file"),
    "another JSON": (text('{"images": [], "shapes": []}'), "instances_train.json: has no 'annotations'; expected"),
    "image missing": (image(Path.unlink), r"1 of 4 images are missing, first .*train2.png; put them into"),
    "image truncated": (image(truncate), r"train2.png: cannot be decoded \(.*\); replace it or run 'detr-fast doctor"),
    "image empty": (image(lambda path: path.write_bytes(b"")), r"train2.png: cannot be decoded"),
    "image of another size": (
        image(lambda path: Image.new("RGB", (20, 20)).save(path)),
        "train2.png: is 20×20 pixels, but its annotations say 50×40; correct",
    ),
    "unknown image": (box(image_id=9), "annotation 2 names image_id 9, which the file does not list; run 'detr-fast d"),
    "unknown category": (box(category_id=0), "annotation 2 names category_id 0, which the file does not list; run"),
    "box without area": (
        box(bbox=[5, 5, 0, 20]),
        r"annotation 2 of image 'train2.png': its bbox has no area: \[5, 5, 0, 20\]; run 'detr-fast doctor .*data'",
    ),
    "box outside": (box(bbox=[60, 5, 9, 9]), r"'train2.png': its bbox lies outside its 50×40 image: \[60, 5, 9, 9\]"),
    "box not finite": (box(bbox=[5, 5, float("nan"), 9]), r"bbox is \[5, 5, nan, 9\], expected four finite numbers"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_is_refused_before_training_and_an_earlier_run_stays(case, tmp_path, capsys):
    make, expected = DATA[case]
    make(tmp_path / "data")
    before = tmp_path / "run" / "checkpoint.pt"
    before.parent.mkdir()
    before.write_bytes(b"precious")
    assert run("train", "--data", tmp_path / "data", "--run", tmp_path / "run", "--overwrite", *SMALL) == 2
    assert_one_line(capsys, expected)
    assert before.read_bytes() == b"precious"


@pytest.mark.parametrize("case", ["missing folder", "a file", "empty folder", "not JSON", "no object", "another JSON"])
def test_what_is_no_data_set_is_refused_by_doctor_and_convert_too(case, tmp_path, capsys):
    make, expected = DATA[case]
    make(tmp_path / "data")
    assert run("doctor", tmp_path / "data") == 2
    assert_one_line(capsys, expected)
    assert run("convert", tmp_path / "data", tmp_path / "out", "--to", "yolo") == 2
    assert_one_line(capsys, expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "case", ["image missing", "image truncated", "unknown image", "unknown category", "box without area", "box outside"]
)
def test_what_training_refuses_the_doctor_finds_and_repairs(case, tmp_path, capsys):
    DATA[case][0](tmp_path / "data")
    assert run("doctor", tmp_path / "data") == 1
    assert "not fit for training; --fix writes a repaired copy" in capsys.readouterr().out
    assert run("doctor", tmp_path / "data", "--fix", tmp_path / "fixed") == 0
    assert run("doctor", tmp_path / "fixed") == 0


@pytest.mark.parametrize("layout", ["annotations/instances_{}2017.json", "{}/_annotations.coco.json", "{}.json"])
def test_the_doctor_that_is_advised_sees_the_whole_data_set_wherever_its_json_lies(layout, tmp_path, capsys):
    data = box(bbox=[5, 5, 0, 20])(tmp_path / "my data")
    assert isinstance(data, Path)
    for split in ("train", "val"):
        place = data / layout.format(split)
        place.parent.mkdir(exist_ok=True)
        (data / f"instances_{split}.json").rename(place)
    assert run("train", "--data", data, "--run", tmp_path / "run", *SMALL) == 2
    advised = shlex.split(re.search(r"run '(detr-fast doctor '.*')'", capsys.readouterr().err)[1])
    assert run(*advised[1:]) == 1
    findings = capsys.readouterr().out.partition("Findings")[2]
    assert "missing" not in findings
    assert "train: box without area (1)" in findings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("good") / "data")


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", "--data", data, "--run", folder, *SMALL, "--epochs", "1") == 0
    return folder


def test_images_and_whole_batches_without_objects_are_legal(tmp_path, capsys):
    """Batches of two; only the first of four training images has a box."""
    write_data(tmp_path / "data", lambda raw: raw["annotations"].__delitem__(slice(1, None)))
    assert run("train", "--data", tmp_path / "data", "--run", tmp_path / "run", *SMALL, "--epochs", "1") == 0
    assert run("evaluate", tmp_path / "run", "--split", "train", "--device", "cpu") == 0
    assert "nan" not in capsys.readouterr().out
    assert all(np.isfinite(record["loss"]) for record in run_folder.RunFolder(tmp_path / "run").read_metrics())


def test_a_split_without_any_box_is_said_to_have_nothing_to_evaluate(trained, tmp_path, capsys):
    data = write_data(tmp_path / "data", lambda raw: raw["annotations"].clear())
    assert run("evaluate", trained, "--data", data, "--split", "train", "--device", "cpu", "--workers", "0") == 0
    printed = capsys.readouterr().out
    assert "the 4 images have no box: there is nothing to evaluate" in printed
    assert "AP" not in printed


def test_more_images_a_batch_than_there_are_name_the_option_to_lower(data, tmp_path, capsys):
    assert run("train", "--data", data, "--run", tmp_path / "run", *SMALL, "--batch-size", "5") == 2
    assert_one_line(capsys, r"batch_size is 5, but .*data has only 4 training images; lower it \(--batch-size\)")


def test_a_training_split_without_any_object_is_refused(tmp_path, capsys):
    write_data(tmp_path / "data", lambda raw: raw["annotations"].clear())
    assert run("train", "--data", tmp_path / "data", "--run", tmp_path / "run", *SMALL) == 2
    assert_one_line(
        capsys, r"none of the 4 training images of .*data has a box: nothing to learn; run 'detr-fast doctor"
    )


def tampered(source: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    state = torch.load(source, weights_only=True)
    change(state)
    torch.save(state, path)
    return path


def test_a_checkpoint_of_another_shape_is_told_apart_in_groups(data, trained, tmp_path, capsys):
    changes: tuple[tuple[str, Any], ...] = (
        ("lacks transformer", lambda s: [s["model"].pop(k) for k in list(s["model"]) if k.startswith("transformer.en")]),
        (r"has other shapes for query_embed \(1 tensor: \(7, 64\), not \(100, \d+\)\)",
         lambda s: s["model"].update({"query_embed.weight": torch.zeros(7, 64)})),
    )  # fmt: skip
    for expected, change in changes:
        other = tampered(trained / "checkpoint.pt", tmp_path / "other.pt", change)
        assert run("evaluate", other, "--device", "cpu") == 2
        assert_one_line(capsys, rf"other.pt is of another model: it {expected}")
        start = ["train", "--data", data, "--run", tmp_path / "run", *SMALL, "--weights", other]
        assert run(*start, "--epochs", "1") == 2
        assert_one_line(capsys, rf"other.pt does not fit this model: it {expected}")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("rename", "found"), [(False, "cell, rod"), (True, "rod")])
def test_a_run_whose_classes_have_changed_is_not_resumed_and_stays(rename, found, trained, tmp_path, capsys):
    def edit(raw: dict[str, Any]) -> None:
        if rename:
            raw["categories"][0]["name"] = "rod"
        else:
            raw["categories"].append({"id": 2, "name": "rod"})

    changed = tmp_path / "run"
    changed.mkdir()
    config = {"data": str(write_data(tmp_path / "data", edit))}
    (tmp_path / "data" / "instances_val.json").unlink()
    tampered(trained / "checkpoint.pt", changed / "checkpoint.pt", lambda state: state["config"].update(config))
    before = (changed / "checkpoint.pt").read_bytes()
    assert run("train", "--resume", changed, "--epochs", "2") == 2
    assert_one_line(
        capsys, rf"data has the classes {found}, but the run .*run knows cell; restore the data, or start a new"
    )
    assert (changed / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("content", ["empty", "junk", "malicious"])
def test_a_damaged_or_malicious_file_is_no_checkpoint_for_any_command(content, data, tmp_path, capsys):
    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes({"empty": b"", "junk": b"junk"}.get(content, b""))
    if content == "malicious":
        torch.save({"format": "detr-fast", "version": 1, "model": {"conv1.weight": Payload()}}, damaged)
    (tmp_path / "checkpoint.pt").write_bytes(damaged.read_bytes())
    picture = next((data / "images").iterdir())
    start = ["train", "--data", data, "--run", tmp_path / "run", *SMALL]
    for command in (
        ["evaluate", damaged],
        ["predict", damaged, picture],
        ["convert-weights", damaged, tmp_path / "out"],
        [*start, "--weights", damaged],
        [*start, "--model", "resnet18", "--weights-backbone", damaged],
        ["train", "--resume", tmp_path],
    ):
        assert run(*command) == 2, command
        assert_one_line(
            capsys, r"cannot read .*(damaged|checkpoint).pt as a checkpoint|cannot read .*, and loading never"
        )
    assert not (tmp_path / "executed").exists()


def test_places_that_cannot_be_written_are_named(data, trained, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    picture = next((data / "images").iterdir())
    for number, command in enumerate(
        (
            ["train", "--data", data, *SMALL, "--run"],
            ["predict", trained, picture, "--device", "cpu", "--out"],
            ["convert-weights", trained / "checkpoint.pt"],
            ["convert", data],
            ["doctor", data, "--page"],
            ["doctor", data, "--fix"],
        )
    ):
        for place, reason in (
            (tmp_path / "file" / "x", "(Not a directory|File exists)"),
            (Path(f"/proc/x{number}"), "No such file"),
        ):
            assert run(*command, place) == 2, (command, place)
            assert_one_line(capsys, rf"{place}.*{reason}.*; (choose a folder|choose another|free|give another)")
    assert (tmp_path / "file").read_text() == "precious"


def test_a_read_only_disk_is_named(data, tmp_path, capsys, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert run("train", "--data", data, "--run", tmp_path / "run", *SMALL) == 2
    assert_one_line(
        capsys, r"cannot write .*run: Read-only file system; choose a folder that you may write to with --run\n"
    )


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail in this process, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("fits", "file"), [(2, "best"), (4, "checkpoint")])
def test_a_full_disk_in_training_keeps_the_last_checkpoint_and_resume_goes_on(
    fits, file, data, tmp_path, capsys, monkeypatch
):
    # config.json, checkpoint.pt before and after the evaluation, best.pt between them; then the second epoch's.
    fsync, left = run_folder.os.fsync, [fits + 1]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(run_folder.os, "fsync", full)
        assert run("train", "--data", data, "--run", folder, *SMALL, "--epochs", "3") == 2
    advice = rf"No space left on device; free some space, then go on with 'detr-fast train --resume {folder}'"
    assert_one_line(capsys, rf"cannot write .*{file}\.pt: {advice}")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 2
    assert not list(folder.glob(".*"))
    assert run("train", "--resume", folder) == 0
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 6


def test_a_full_disk_leaves_nothing_half_written(data, trained, tmp_path, capsys):
    checkpoint = trained / "checkpoint.pt"
    picture = next((data / "images").iterdir())
    for command in (
        ["convert-weights", checkpoint, tmp_path / "a.safetensors"],
        ["convert-weights", checkpoint, tmp_path / "a.pth", "--to", "original"],
        ["predict", trained, picture, "--device", "cpu", "--out", tmp_path / "predictions"],
        ["convert", data, tmp_path / "yolo", "--to", "yolo"],
        ["doctor", data, "--fix", tmp_path / "fixed"],
        ["doctor", data, "--page", tmp_path / "page.png"],
    ):
        with file_size_limit(1000):
            assert run(*command) == 2, command
        assert_one_line(
            capsys, rf"{command[-1] if command[-1] != 'original' else command[-3]}.*File too large.*; (free|give)"
        )
    assert [path.name for path in tmp_path.rglob("*")] == ["predictions"]


def test_image_files_that_cannot_be_read_are_named(data, trained, tmp_path, capsys):
    picture = tmp_path / "cut.png"
    picture.write_bytes((data / "images" / "train1.png").read_bytes()[:2000])
    (tmp_path / "empty").mkdir()
    for given, expected in (
        (picture, r"cut.png: cannot be decoded \(.*\); give another image"),
        (tmp_path / "absent.png", "absent.png does not exist; give image files or folders"),
        (
            tmp_path / "empty",
            r"empty holds no images \(subfolders and hidden files are left out\); expected files ending",
        ),
    ):
        assert run("predict", trained, given, "--out", tmp_path / "out", "--device", "cpu") == 2
        assert_one_line(capsys, expected)


def test_hidden_files_in_a_folder_are_left_out_and_counted(data, trained, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("a.png", ".trashed.png"):
        (photos / name).write_bytes((data / "images" / "train1.png").read_bytes())
    (photos / "._a.png").write_bytes(b"\x00\x05\x16\x07")
    assert run("predict", trained, photos, "--out", tmp_path / "out", "--device", "cpu") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("1 image (2 hidden files left out): ")
    assert "Warning" not in captured.err


def test_a_diverged_model_is_named_when_it_is_evaluated(trained, tmp_path, capsys):
    broken = tampered(trained / "best.pt", tmp_path / "nan.pt", lambda s: s["model"]["class_embed.bias"].fill_(np.nan))
    assert run("evaluate", broken, "--device", "cpu") == 2
    assert_one_line(capsys, r"the predictions for image \d+ are not finite: the model has diverged; take an earlier")
