from __future__ import annotations

from pathlib import Path

import pytest
import torch

from detr_fast.engine import run_folder
from detr_fast.engine.checkpoints import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from detr_fast.engine.errors import CheckpointError, RunFolderError


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 1})

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.os, "fsync", full)
    with pytest.raises(RunFolderError, match="No space left on device; free some space"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_or_foreign_file_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.pt"):
        load_checkpoint(path)
    torch.save({"model": {}}, path)
    with pytest.raises(CheckpointError, match="--weights"):
        load_checkpoint(path)


def test_an_exported_program_is_none(tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.rand(1, 2),))
    torch.export.save(program, tmp_path / "detector.pt2")
    with pytest.raises(
        CheckpointError, match=r"it is an exported program.*; give the checkpoint that it was exported from"
    ):
        load_checkpoint(tmp_path / "detector.pt2")


def test_a_bit_that_flipped_is_found_and_the_other_checkpoint_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"step": 9, "model": {"weight": torch.rand(1000)}})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt as a checkpoint \(Bad CRC-32 .*; take a complete copy$"):
        load_checkpoint(path)
    save_checkpoint(tmp_path / "best.pt", {"step": 7})
    with pytest.raises(CheckpointError, match=r"best\.pt, of step 7, is sound: evaluate, predict and train --weights"):
        load_checkpoint(path)


def test_loading_executes_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    torch.save({"format": "detr-fast", "version": 1, "model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


def test_random_states_survive_a_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", {"rng": rng_state()})
    first = torch.rand(3)
    set_rng_state(load_checkpoint(tmp_path / "c.pt")["rng"])
    assert torch.equal(torch.rand(3), first)
