"""Weight files, read without executing code and written with errors that name them; and misfits told in few words."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from detr_fast.models.weight_names import StateDict

CONFIG_KEY = "detr_fast"  # where our files keep {"config": ModelConfig, "names": [...]}, as JSON in safetensors


class WeightsError(ValueError):
    """Weights that can't be read, written or loaded; one line that names the file, what is wrong and the remedy."""


def unpickle(path: Path) -> Any:
    """What torch.save wrote, on the CPU: tensors, plain data, and the argparse.Namespace that the original adds.

    Raises:
        WeightsError: not such a file, damaged, or it wants code executed.
    """
    try:
        _verify_beginning(path)
        _verify_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it contains {wanted[1]}, which is no plain data" if wanted else _first_sentence(error)
        raise WeightsError(
            f"cannot read {path}: {what}, and loading never executes code; save only the state_dict and try again"
        ) from None
    except Exception as error:  # bytes that are no pickle raise whatever the opcodes they happen to spell raise
        text = "" if isinstance(error, KeyError) else str(error)
        reason = _first_sentence(error) if text else "it is none"
        raise WeightsError(f"cannot read {path} as a checkpoint ({reason}); take a complete copy") from None


def _first_sentence(error: Exception) -> str:
    """What went wrong by the first sentence of PyTorch's message, which may go on for a page."""
    return re.split(r"[.!?]\s", str(error).splitlines()[0], maxsplit=1)[0]


def _verify_beginning(path: Path) -> None:
    """Raise WeightsError for a text or a page in the place of a checkpoint: torch.load takes such bytes for opcodes."""
    start = _read_beginning(path)
    if not start.startswith((b"PK", b"\x80")):  # a zip archive; a pickle, as before torch 1.6
        what = f"it begins with {start!r}" if start else "it is empty"
        raise WeightsError(f"cannot read {path} as a checkpoint: {what}; give a file that torch.save wrote")


def _read_beginning(path: Path) -> bytes:
    """The first 32 bytes; WeightsError where they are those of a pointer that Git LFS leaves in a clone."""
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is not the file, but Git LFS's pointer to it; run 'git lfs pull' in its clone")
    return start


def _verify_archive(path: Path) -> None:
    """Raise WeightsError for what torch.export wrote, and BadZipFile where a record's bytes are not those that were written: torch.load does not look (0.1 s for 240 MB)."""
    if not zipfile.is_zipfile(path):  # the format before torch 1.6, which has no checksums
        return
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/archive_format") for name in archive.namelist()):
            raise WeightsError(
                f"cannot read {path} as a checkpoint: it is an exported program, which torch.export.load runs; "
                "give the checkpoint that it was exported from"
            )
        for record in archive.infolist():
            if record.CRC:  # 0 where torch was told to compute none
                with archive.open(record) as content:
                    while content.read(2**20):
                        pass


def write_checkpoint(content: Any, file: BinaryIO) -> None:
    """torch.save, but for a failure to write, which it hides behind one of its own, and which is an OSError here."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def read_safetensors(path: Path) -> tuple[StateDict, Mapping[str, Any]]:
    """The tensors, and what our own files say beside them.

    Raises:
        WeightsError: not such a file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        _read_beginning(path)
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(CONFIG_KEY, "{}"))
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, about
    except WeightsError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a safetensors file ({error}); take a complete copy") from None


def write_safetensors(state: StateDict, path: Path, metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Pieces of one joint projection share storage, which the format refuses.
    state = {name: tensor.clone() for name, tensor in state.items()}
    path.touch()
    mode = path.stat().st_mode  # as the user has it for new files; safetensors' own file is for nobody else to read
    try:
        save_file(state, path, {"format": "pt", **metadata})
        path.chmod(mode)
    except SafetensorError as error:  # it knows no other kind: "… I/O error: No space left on device (os error 28) …"
        reason = re.search(r"I/O error: (.*?) \(os error (\d+)\)", str(error))
        if reason is None:
            raise
        raise OSError(int(reason[2]), reason[1]) from None


def list_problems(verb: str, names: Iterable[str], universe: Iterable[str], detail: Any = None) -> str:
    """ "lacks transformer.encoder.layers.{4,5} (24 tensors), input_proj (2)": whole branches by their common name."""
    names = set(names)
    if not names:
        return ""
    branches: dict[str, tuple[set[tuple[str, ...]], list[str]]] = {}
    for prefix, members in _whole_branches("", names, set(universe)):
        numbers = tuple(re.findall(r"(?<=\.)\d+(?=\.|$)", prefix))
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", prefix)
        entry = branches.setdefault(pattern, (set(), []))
        entry[0].add(numbers)
        entry[1].extend(members)
    texts = []
    for pattern, (numbers_seen, members) in branches.items():
        if pattern.count("*") == 1:
            listed = sorted({int(numbers[0]) for numbers in numbers_seen})
            pattern = pattern.replace(
                "*", str(listed[0]) if len(listed) == 1 else "{" + ",".join(map(str, listed)) + "}"
            )
        count = f"{len(members)} tensor{'s' * (len(members) > 1)}"
        texts.append(f"{pattern} ({count}{': ' + detail(min(members)) if detail else ''})")
    rest = len(texts) - 6
    more = f" and {rest} more group{'s' * (rest > 1)}" if rest > 0 else ""
    return f"{verb} {', '.join(texts[:6])}{more}"


def _whole_branches(prefix: str, names: set[str], universe: set[str]) -> Iterable[tuple[str, list[str]]]:
    """Split `names` into the largest branches of the module tree that consist of nothing else."""
    if names == universe and prefix:
        yield prefix, sorted(names)
        return
    depth = prefix.count(".") + 1 if prefix else 0
    children: dict[str, set[str]] = {}
    for name in universe:
        children.setdefault(".".join(name.split(".")[: depth + 1]), set()).add(name)
    for child in sorted(children):
        inside = names & children[child]
        if inside:
            yield from _whole_branches(child, inside, children[child])
