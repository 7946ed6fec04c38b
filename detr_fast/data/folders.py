"""Writes folders in one move, and copies images into them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

from detr_fast.data.errors import DataError


@contextmanager
def new_folder(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to write into; it becomes `folder` when the block ends, and vanishes when it fails.

    Raises:
        DataError: `folder` has contents and `replace` is False, or it cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and (replace or not any(folder.iterdir()))):
        raise DataError(f"{folder}: is there already, and not empty; give the name of a new folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); free space or give another folder") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class ImageCopies:
    """Copies images into a folder, under their own names where these are unique.

    Unique without their suffix, and whatever the case: label files are named after images, and some file systems don't
    tell case apart.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._taken: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, source: Path, file_name: str) -> str:
        """Copy `source` and return its name below the folder."""
        pure = PurePath(file_name.replace("\\", "/"))
        safe = pure.name if pure.is_absolute() or ".." in pure.parts else str(pure)
        name, number = safe, 1
        while (key := str(PurePath(name).with_suffix("")).casefold()) in self._taken:
            number += 1
            name = str(PurePath(safe).with_stem(f"{PurePath(safe).stem}_{number}"))
        self._taken.add(key)
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return name
