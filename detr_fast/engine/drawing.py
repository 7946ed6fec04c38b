"""Pictures of detections: boxes on images, and a grid of images with predicted and true boxes."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, QUIET = (28, 30, 34), (255, 255, 255), (110, 114, 122)
PALETTE = (  # told apart by colour-blind readers too, and bright enough for photographs
    (255, 127, 14),
    (31, 119, 210),
    (44, 170, 70),
    (214, 39, 60),
    (148, 88, 200),
    (0, 178, 190),
    (227, 80, 170),
    (190, 160, 0),
    (120, 76, 55),
    (90, 100, 220),
)
Rectangle = tuple[float, float, float, float]


@dataclass(frozen=True)
class Box:
    """A box to draw: (x0, y0, x1, y1) in pixels of its image; true boxes have no score."""

    label: int
    xyxy: Rectangle
    score: float | None = None


@dataclass(frozen=True)
class Picture:
    """An image with what was found in it and what is in it, and a caption."""

    image: Image.Image
    predicted: Sequence[Box]
    true: Sequence[Box] = ()
    caption: str = ""


def colour(label: int) -> tuple[int, int, int]:
    """The colour of a class: the palette first, then hues a golden section apart."""
    if label < len(PALETTE):
        return PALETTE[label]
    hue = (label * 0.61803398875) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.75, 0.85)
    return round(red * 255), round(green * 255), round(blue * 255)


def font(size: int, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own letters, which are ASCII's alone; for other texts DejaVu Sans, which comes with matplotlib."""
    return _font(size, text.isascii())


@lru_cache(maxsize=32)
def _font(size: int, ascii_only: bool) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    if ascii_only:
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def draw_boxes(picture: Picture, names: Sequence[str], longest_side: int | None = None) -> Image.Image:
    """The picture's image, enlarged or reduced to `longest_side` pixels, with its boxes.

    Predicted boxes are solid with name and score on a tab in the class's colour; true boxes are dashed.
    """
    image = picture.image.convert("RGB")
    scale = (longest_side or max(image.size)) / max(image.size)
    if scale != 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image, "RGBA")
    unit = max(image.size) / 320  # line widths and letters grow with the picture
    width = max(2, round(2 * unit))

    for box in picture.true:
        _dashed(draw, _scaled(box.xyxy, scale), colour(box.label), width, dash=max(4, round(5 * unit)))
    for box in picture.predicted:
        draw.rectangle(_outline(_scaled(box.xyxy, scale), image.size), outline=colour(box.label), width=width)
    tabs: list[Rectangle] = []
    for box in sorted(picture.predicted, key=lambda b: -(b.score or 0)):
        text = names[box.label] if box.score is None else f"{names[box.label]} {box.score:.2f}"
        letters = font(max(11, round(11 * unit)), text)
        tabs.append(_tab(draw, _scaled(box.xyxy, scale), text, colour(box.label), letters, image.size, tabs))
    return image


def draw_grid(
    pictures: Sequence[Picture], names: Sequence[str], title: str, columns: int = 4, cell: int = 384
) -> Image.Image:
    """One page: a title, a legend of classes and line styles, and the pictures in rows of `columns`."""
    margin, gap, caption = 28, 18, 26
    columns = max(1, min(columns, len(pictures)))
    drawn = [draw_boxes(p, names, cell) for p in pictures]
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    width = 2 * margin + columns * cell + (columns - 1) * gap
    used = sorted({b.label for p in pictures for b in (*p.predicted, *p.true)})
    legend = _legend_lines([(names[i], colour(i)) for i in used], width - 2 * margin)
    top = margin + 44 + 26 * len(legend) + 12
    heights = [max(i.height for i in row) + caption for row in rows]
    page = Image.new("RGB", (width, top + sum(heights) + gap * max(0, len(rows) - 1) + margin), PAPER)
    draw = ImageDraw.Draw(page, "RGBA")
    draw.text((margin, margin - 6), title, INK, font(27, title))
    _draw_legend(draw, legend, margin, margin + 44)
    y = top
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            x = margin + c * (cell + gap)
            page.paste(image, (x + (cell - image.width) // 2, y))
            text = pictures[r * columns + c].caption
            draw.text((x + cell / 2, y + heights[r] - caption + 5), text, QUIET, font(14, text), anchor="ma")
        y += heights[r] + gap
    return page


def _scaled(xyxy: Rectangle, scale: float) -> Rectangle:
    x0, y0, x1, y1 = (v * scale for v in xyxy)
    return x0, y0, x1, y1


def _outline(xyxy: Rectangle, size: tuple[int, int]) -> Rectangle:
    """The box kept inside the image, so that each of its sides stays visible."""
    x0, x1 = (min(max(v, 0), size[0] - 1) for v in (xyxy[0], xyxy[2]))
    y0, y1 = (min(max(v, 0), size[1] - 1) for v in (xyxy[1], xyxy[3]))
    return x0, y0, max(x0, x1), max(y0, y1)


def _dashed(draw: ImageDraw.ImageDraw, xyxy: Rectangle, ink: tuple[int, int, int], width: int, dash: int) -> None:
    """Dashes in the class's colour on white, which stay visible beside a solid line of the same colour."""
    x0, y0, x1, y1 = xyxy
    for ax, ay, bx, by in ((x0, y0, x1, y0), (x1, y0, x1, y1), (x1, y1, x0, y1), (x0, y1, x0, y0)):
        draw.line((ax, ay, bx, by), (255, 255, 255, 210), width)
        length = max(abs(bx - ax), abs(by - ay))
        steps = max(1, round(length / (2 * dash)))
        for i in range(steps):
            s, e = i / steps, (i + 0.5) / steps
            draw.line((ax + (bx - ax) * s, ay + (by - ay) * s, ax + (bx - ax) * e, ay + (by - ay) * e), ink, width)


def _tab(
    draw: ImageDraw.ImageDraw,
    xyxy: Rectangle,
    text: str,
    ink: tuple[int, int, int],
    letters: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
    taken: Sequence[Rectangle],
) -> Rectangle:
    """Draw `text` on a filled tab at a corner of the box, inside the image and beside the tabs before where possible."""
    _, _, right, bottom = draw.textbbox((0, 0), text, letters)
    width, height = right + 6, bottom + 4
    x0, y0, x1, y1 = xyxy
    corners = [
        (x0, y0 - height),
        (x1 - width, y0 - height),
        (x0, y1),
        (x1 - width, y1),
        (x0, y0),
        (x1 - width, y1 - height),
    ]
    places = []
    for x, y in corners:
        x, y = min(max(x, 0), size[0] - width), min(max(y, 0), size[1] - height)
        places.append((x, y, x + width, y + height))
    place = min(places, key=lambda p: sum(_overlap(p, t) for t in taken))
    draw.rectangle(place, fill=(*ink, 235))
    draw.text((place[0] + 3, place[1] + 1), text, _readable_on(ink), letters)
    return place


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _readable_on(ink: tuple[int, int, int]) -> tuple[int, int, int]:
    luminance = 0.299 * ink[0] + 0.587 * ink[1] + 0.114 * ink[2]
    return INK if luminance > 150 else PAPER


Entry = tuple[str, tuple[int, int, int]]


def _legend_lines(classes: Sequence[Entry], width: int) -> list[list[Entry]]:
    """Legend entries, the two line styles first, broken into lines of at most `width` pixels."""
    lines: list[list[Entry]] = [[]]
    used = 0.0
    for entry in (("predicted", QUIET), ("true", QUIET), *classes):
        needed = 36 + font(16, entry[0]).getlength(entry[0]) + 24
        if lines[-1] and used + needed > width:
            lines.append([])
            used = 0.0
        lines[-1].append(entry)
        used += needed
    return lines


def _draw_legend(draw: ImageDraw.ImageDraw, lines: Sequence[Sequence[Entry]], left: int, top: int) -> None:
    for row, line in enumerate(lines):
        x: float = left
        y = top + 26 * row
        for column, (name, ink) in enumerate(line):
            swatch = (x, y + 2, x + 24, y + 16)
            if row == 0 and column == 0:
                draw.rectangle(swatch, outline=ink, width=2)
            elif row == 0 and column == 1:
                _dashed(draw, swatch, ink, 2, 3)
            else:
                draw.rectangle(swatch, fill=ink)
            draw.text((x + 32, y), name, INK, font(16, name))
            x += 36 + font(16, name).getlength(name) + 24
