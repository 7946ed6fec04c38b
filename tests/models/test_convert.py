"""Weights travel between the original's checkpoints, Hugging Face folders and safetensors, and misfits are explained."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detr_fast.models import ModelConfig, build_model
from detr_fast.models.convert import (
    FORMATS,
    Weights,
    WeightsError,
    convert_weights,
    load_weights,
    read_weights,
    write_weights,
)

pytest.importorskip("torchvision")
pytest.importorskip("safetensors")

SMALL = ModelConfig(
    backbone="resnet18", num_classes=4, num_queries=6, d_model=32, heads=4, encoder_layers=2, decoder_layers=2,
    feedforward=48, dropout=0.0,
)  # fmt: skip


def random_weights(config: ModelConfig = SMALL) -> Weights:
    torch.manual_seed(0)
    state = {
        name: torch.randn_like(t) if t.is_floating_point() else t
        for name, t in build_model(config).state_dict().items()
    }
    return Weights(state, config.to_dict(), ("cat", "dog", "fish", "owl")[: config.num_classes])


def assert_same_weights(own: Weights, other: Weights) -> None:
    assert own.state.keys() == other.state.keys()
    assert [name for name in own.state if not torch.equal(own.state[name], other.state[name])] == []


def path_for(folder: Path, name: str, format: str) -> Path:
    return folder / (name + {"original": ".pth", "safetensors": ".safetensors", "huggingface": ""}[format])


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FORMATS, 2)))
def test_conversions_there_and_back_are_exact(first, second, tmp_path):
    weights = random_weights()
    start, middle, end = (
        path_for(tmp_path, name, format) for name, format in (("a", first), ("b", second), ("c", first))
    )
    write_weights(weights, start, first)
    convert_weights(start, middle, second)
    converted = convert_weights(middle, end, first)
    for read in (read_weights(start), read_weights(middle), read_weights(end)):
        assert_same_weights(read, weights)
        assert read.names == weights.names
        assert read.config == replace(SMALL, aux_loss=read.config.aux_loss)
    assert_same_weights(converted, weights)
    assert sorted(tmp_path.iterdir()) == sorted((start, middle, end))  # nothing partial is left


@pytest.mark.parametrize(("backbone", "dilation"), [("resnet18", False), ("resnet50", True)])
def test_hugging_face_loads_the_folder_that_is_written(backbone, dilation, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    config = replace(SMALL, backbone=backbone, dilation=dilation)
    model = build_model(config).eval()
    write_weights(Weights(model.state_dict(), config.to_dict()), tmp_path / "folder", "huggingface")
    peer, report = transformers.DetrForObjectDetection.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        theirs = peer.eval()(images, pixel_mask=torch.ones(2, 64, 96, dtype=torch.long))
        own = model(images)
    torch.testing.assert_close(own["pred_logits"], theirs.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own["pred_boxes"], theirs.pred_boxes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own_resnet", [False, True])
def test_folders_that_hugging_face_writes_are_read(own_resnet, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("timm")
    kind = (
        {"use_timm_backbone": False, "backbone_config": transformers.ResNetConfig(out_features=["stage4"])}
        if own_resnet
        else {"backbone": "resnet50", "use_pretrained_backbone": False}
    )
    peer = transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            **kind, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=6, num_labels=3, id2label={0: "a", 1: "b", 2: "c"},
        )
    ).eval()  # fmt: skip
    peer.save_pretrained(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.config.heads == 2
    assert weights.names == ("a", "b", "c")
    model = build_model(weights.config).eval()
    load_weights(model, weights)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images)["pred_logits"], peer(images).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as-torch-1.5-wrote-it"])
def test_the_originals_checkpoint_with_a_pickled_command_line_loads(zipped, tmp_path):
    weights = random_weights()
    arguments = argparse.Namespace(nheads=4, dilation=False, dropout=0.0, aux_loss=True, lr=1e-4, output_dir="runs")
    content = {"model": weights.state, "optimizer": {"state": {}}, "epoch": 3, "args": arguments}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights(tmp_path / "a.pth")
    assert_same_weights(read, weights)
    assert read.config == SMALL
    model = build_model(read.config)
    report = load_weights(model, tmp_path / "a.pth")
    assert report.loaded == len(weights.state)
    assert report.skipped == ()
    assert all(torch.equal(tensor, weights.state[name]) for name, tensor in model.state_dict().items())


def test_checkpoints_saved_from_distributed_training_load(tmp_path):
    weights = random_weights()
    torch.save({"model": {f"module.{name}": t for name, t in weights.state.items()}}, tmp_path / "a.pth")
    assert_same_weights(read_weights(tmp_path / "a.pth"), weights)


@pytest.mark.parametrize("hide", [lambda payload: payload, lambda payload: argparse.Namespace(lr=payload)])
def test_loading_never_executes_code(hide, tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": random_weights().state, "args": hide(Payload())}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"evil\.pth: it contains .*, and loading never executes code"):
        read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def test_another_number_of_classes_loads_everything_but_the_head_and_says_so():
    model = build_model(replace(SMALL, num_classes=2))
    head = model.class_embed.weight.detach().clone()
    weights = random_weights()
    report = load_weights(model, weights)
    assert report.skipped == ("class_embed.bias", "class_embed.weight")
    assert "the file has 4 classes, the model 2" in str(report)
    assert torch.equal(model.class_embed.weight, head)
    assert torch.equal(model.query_embed.weight, weights.state["query_embed.weight"])


def test_weights_that_do_not_fit_are_listed_in_groups_and_nothing_is_loaded():
    model = build_model(replace(SMALL, encoder_layers=3, num_queries=7))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = random_weights()
    weights.state["mask_head.lay1.weight"] = torch.zeros(3)
    del weights.state["input_proj.bias"]
    with pytest.raises(WeightsError) as error:
        load_weights(model, weights)
    message = str(error.value)
    assert "it lacks input_proj.bias (1 tensor), transformer.encoder.layers.2 (12 tensors)" in message
    assert "it also has mask_head (1 tensor)" in message
    assert "other shapes for query_embed (1 tensor: (6, 32), not (7, 32))" in message
    assert "\n" not in message
    assert len(message) < 600
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_plain_resnets_weights_are_refused_in_few_words(tmp_path):
    import torchvision

    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(WeightsError) as error:
        load_weights(build_model(SMALL), tmp_path / "resnet18.pth")
    assert "lacks backbone (100 tensors)" in str(error.value)
    assert len(str(error.value)) < 700
    with pytest.raises(WeightsError, match=r"has no query_embed\.weight; is it a DETR's"):
        _ = read_weights(tmp_path / "resnet18.pth").config


@pytest.mark.parametrize(
    ("setting", "other", "message"), [("heads", 8, "8 attention heads, not 4"), ("dilation", True, "DC5")]
)
def test_settings_that_no_shape_shows_are_compared_too(setting, other, message):
    weights = random_weights()
    with pytest.raises(WeightsError, match=message):
        load_weights(build_model(SMALL), Weights(weights.state, {setting: other}))


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, backbone="conv", backbone_width=8),
        replace(SMALL, backbone="conv", backbone_width=8, backbone_stride=32),
        replace(SMALL, pre_norm=True, position="learned"),
        replace(SMALL, backbone="resnet34", backbone_norm="batch"),
        replace(SMALL, backbone="resnet50", encoder_layers=0),
        replace(SMALL, backbone="resnet101", d_model=64, decoder_layers=1),
    ],
    ids=["conv", "conv-stride-32", "pre-norm-learned", "resnet34-batch-norm", "no-encoder", "resnet101"],
)
def test_the_configuration_follows_from_the_weights(config):
    assert Weights(build_model(config).state_dict(), {"heads": 4, "dropout": 0.0}).config == config


def test_a_given_configuration_wins_over_what_the_weights_imply(tmp_path):
    config = replace(SMALL, backbone="resnet50", dilation=True)
    torch.save({"model": build_model(config).state_dict()}, tmp_path / "dc5.pth")
    convert_weights(tmp_path / "dc5.pth", tmp_path / "folder", "huggingface", config)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["dilation"] is True
    assert read_weights(tmp_path / "folder").config.dilation


def test_what_hugging_face_cannot_hold_is_refused_and_leaves_no_files(tmp_path):
    for config, message in (
        (replace(SMALL, backbone="conv"), "conv backbone"),
        (replace(SMALL, pre_norm=True), "pre_norm"),
    ):
        with pytest.raises(WeightsError, match=message):
            write_weights(random_weights(config), tmp_path / "folder", "huggingface")
    assert list(tmp_path.iterdir()) == []


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 166618694\n"


def hugging_face_folder(folder: Path, content: str) -> Path:
    return [write(folder / "x" / name, content).parent for name in ("model.safetensors", "config.json")][-1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "absent.pth", r"no weights at .*absent\.pth; give"),
        (lambda folder: write(folder / "a.pth", "<html>not here"), r"a\.pth as a checkpoint: it begins with b'<html>not here'"),
        (lambda folder: write(folder / "a.pth", LFS_POINTER), r"a\.pth is not the file, but Git LFS's pointer to it"),
        (lambda folder: write(folder / "a.safetensors", LFS_POINTER), r"a\.safetensors is not the file, but Git LFS's"),
        (lambda folder: write(folder / "a.pth", b"PK\3\4."), r"cannot read .*a\.pth as a checkpoint \([^.]*\); take a complete"),
        (lambda folder: write(folder / "a.pth", b""), r"cannot read .*a\.pth as a checkpoint: it is empty"),
        (lambda folder: write(folder / "a.safetensors", b"nonsense"), r"a\.safetensors is not a safetensors file"),
        (lambda folder: folder, r"is neither a Hugging Face folder nor a run's; expected config\.json"),
        (
            lambda folder: hugging_face_folder(folder, "{"),
            r"config\.json is not JSON",
        ),
        (
            lambda folder: hugging_face_folder(folder, '{"model_type": "bert"}'),
            r"describes a 'bert' model",
        ),
        (lambda folder: torch.save([1, 2], folder / "a.pth") or folder / "a.pth", "holds no weights"),
    ],
    ids=["absent", "page", "pointer", "pointer-safetensors", "damaged", "empty", "nonsense-safetensors", "empty-folder", "damaged-config", "other-model", "no-weights"],
)  # fmt: skip
def test_files_that_are_no_weights_get_one_line_that_names_them(make, message, tmp_path):
    with pytest.raises(WeightsError, match=message) as error:
        read_weights(make(tmp_path))
    assert "\n" not in str(error.value)


def test_existing_files_are_not_overwritten(tmp_path):
    write(tmp_path / "a.pth", b"precious")
    with pytest.raises(WeightsError, match=r"a\.pth exists already"):
        write_weights(random_weights(), tmp_path / "a.pth", "original")
    assert (tmp_path / "a.pth").read_bytes() == b"precious"


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="got format 'onnx'; expected one of original, huggingface, safetensors"):
        write_weights(random_weights(), tmp_path / "a", "onnx")  # type: ignore[arg-type]


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("format", FORMATS)
def test_files_are_readable_to_whom_the_users_new_files_are(format, umask, tmp_path):
    before = os.umask(umask)
    try:
        write_weights(random_weights(), path_for(tmp_path, "a", format), format)
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~umask}
