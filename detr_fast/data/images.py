"""Decodes images, and keeps small data sets decoded in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from detr_fast.data.errors import DataError


def image_path(folder: Path, file_name: str) -> Path:
    """The file that an annotation names. Backslashes part folders, as on Windows, unless a file is called so."""
    path = folder / file_name
    return path if "\\" not in file_name or path.is_file() else folder / file_name.replace("\\", "/")


def read_image(path: Path, size: tuple[int, int] | None = None, turned: bool = False) -> np.ndarray:
    """Decode a file to (height, width, 3) uint8 RGB.

    Where `size` (height, width) is given, the image must have it. Pictures whose EXIF orientation gives that size are
    turned, others are not: annotation tools differ in whether they annotate the turned picture. With `turned`, all are.

    Raises:
        DataError: the file is missing, truncated, no image, or of another size.
    """
    try:
        with Image.open(path) as file:
            picture: Image.Image = file
            if turned or (size is not None and (picture.height, picture.width) != size):
                picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip all above 255 to white
                surplus = _bits(file) - 8
                picture = Image.fromarray(
                    (np.asarray(picture).astype(np.int64) >> surplus).clip(0, 255).astype(np.uint8)
                )
            if picture.mode == "F" and (values := np.asarray(picture)).max() <= 1:  # from 0 to 1: black to Pillow
                picture = Image.fromarray((values * 255).clip(0, 255).astype(np.uint8))
            if picture.mode == "P" and "transparency" in picture.info:
                picture = picture.convert(
                    "RGBA"
                )  # what Pillow's warning asks for; transparent pixels keep their colour
            pixels = np.array(picture.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such image; restore it or run 'detr-fast doctor DATA --fix COPY'") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _undecodable(path, error) from None
    if size is not None and pixels.shape[:2] != size:
        raise DataError(
            f"{path}: is {pixels.shape[1]}×{pixels.shape[0]} pixels, but its annotations say {size[1]}×{size[0]}; "
            "correct the sizes or run 'detr-fast doctor DATA --fix COPY'"
        )
    return pixels


def _bits(picture: Image.Image) -> int:
    """How many bits a sample of more than 8 has by its file: 16, but for TIFF's BitsPerSample of 9 to 15.

    Tags of a smallest and a largest value don't count: writers take them from the single picture.
    """
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    return int(bits) if 8 < bits < 16 else 16


def used_bits(path: Path, pixels: np.ndarray) -> tuple[int, int] | None:
    """How many bits a sample of the file has, and how many its `pixels`, as read, need; None where it has 8, colours or floats."""
    try:
        with Image.open(path) as file:
            if not file.mode.startswith("I"):
                return None
            bits = _bits(file)
            return bits, bits - 8 + int(pixels.max(initial=0)).bit_length()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _undecodable(path, error) from None


def _undecodable(path: Path, error: Exception) -> DataError:
    remedy = "cut it into tiles" if isinstance(error, Image.DecompressionBombError) else "replace it"
    return DataError(f"{path}: cannot be decoded ({error}); {remedy} or run 'detr-fast doctor DATA --fix COPY'")


def read_image_size(path: Path, turned: bool = False) -> tuple[int, int]:
    """Height and width from the file's header; with `turned`, of the picture as its EXIF orientation turns it."""
    try:
        with Image.open(path) as file:
            sideways = turned and _orientation(file) >= 5
            return (file.width, file.height) if sideways else (file.height, file.width)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _undecodable(path, error) from None


def read_orientation(path: Path) -> int:
    """EXIF's orientation from the file's header, 1 to 8; 1 is as stored."""
    try:
        with Image.open(path) as file:
            return _orientation(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _undecodable(path, error) from None


def _orientation(picture: Image.Image) -> int:
    value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


class ImageStore:
    """Images by index as (3, H, W) uint8 tensors; kept in memory once decoded when all of them fit in `cache_bytes`.

    Of the 4.7 ms that a sample costs from a 640×480 JPEG, augmented to 160 pixels, 3.1 are saved (measured on one core).
    Each process fills its own cache, so call `preload` before worker processes are forked: they then share the pages.
    """

    def __init__(self, paths: Sequence[Path], sizes: Sequence[tuple[int, int]], cache_bytes: int) -> None:
        self.paths = tuple(paths)
        self.sizes = tuple(sizes)
        self.caches = sum(3 * height * width for height, width in self.sizes) <= cache_bytes
        self._decoded: list[np.ndarray | None] = [None] * len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        pixels = self._decoded[index]
        if pixels is None:
            pixels = read_image(self.paths[index], self.sizes[index])
            if self.caches:
                self._decoded[index] = pixels
        # A view in channels-last order, the order in which torch's uint8 resize is fastest.
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def preload(self) -> None:
        """Decode all images now, on all cores, if they are to be cached; else do nothing."""
        if self.caches:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(self.__getitem__, range(len(self.paths))))

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_decoded": [None] * len(self.paths)}  # a spawned worker decodes what it needs
