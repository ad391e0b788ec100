"""Pictures out of pictures: text, captions and layout with Pillow alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

from PIL import Image, ImageDraw, ImageFont

from ..basics.files import replacing

WHITE = "#ffffff"
INK = "#1f2328"
MUTED = "#6e7781"
WINNER = "#1a7f37"
LOSER = "#d1571b"

_SMALLEST = 96  # pixels
_FRAME = 3

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@functools.cache
def _load_font(size: int, ascii_only: bool) -> Font:
    # Pillow's built-in font draws nothing but boxes outside ASCII; matplotlib, which we need for
    # the curves anyway, brings one that knows accents, Greek and Cyrillic.
    if not ascii_only:
        import matplotlib

        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
        return ImageFont.truetype(path, round(size * 0.92))
    return ImageFont.load_default(size)


def font_for(text: str, size: int) -> Font:
    """A font that can draw ``text``."""
    return _load_font(size, text.isascii())


def text_width(text: str, size: int) -> int:
    """Width in pixels."""
    return math.ceil(font_for(text, size).getlength(text))


def line_height(size: int) -> int:
    """Distance between baselines."""
    return math.ceil(size * 1.35)


def ellipsise(text: str, size: int, width: int) -> str:
    """``text``, shortened with ``...`` at the end until it fits ``width``."""
    if text_width(text, size) <= width:
        return text
    while text and text_width(text + "...", size) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def wrap_text(text: str, size: int, width: int, max_lines: int) -> list[str]:
    """Lines no wider than ``width``; what does not fit ``max_lines`` ends in ``...``."""
    words = " ".join(text.split()).split(" ")
    lines: list[str] = [""]
    for index, word in enumerate(words):
        joined = f"{lines[-1]} {word}".strip()
        if text_width(joined, size) <= width or not lines[-1]:
            lines[-1] = joined
        elif len(lines) < max_lines:
            lines.append(word)
        else:
            lines[-1] = ellipsise(" ".join([lines[-1], *words[index:]]), size, width)
            break
    return [ellipsise(line, size, width) for line in lines if line]


def text_block(
    lines: Sequence[str], size: int, color: str = MUTED, width: int | None = None
) -> Image.Image:
    """Lines of text on white, left-aligned, or centred in ``width``."""
    needed = max((text_width(line, size) for line in lines), default=0)
    block = Image.new("RGB", (width or max(1, needed), line_height(size) * len(lines) or 1), WHITE)
    draw = ImageDraw.Draw(block)
    for index, line in enumerate(lines):
        x = 0 if width is None else max(0, (width - text_width(line, size)) // 2)
        draw.text((x, index * line_height(size)), line, fill=color, font=font_for(line, size))
    return block


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB, transparency on white."""
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, WHITE)
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def fit_image(image: Image.Image, largest: int = 256) -> Image.Image:
    """An RGB copy at a size fit for viewing.

    Small images grow by a whole factor with hard pixels to 96 pixels or a little more, since a
    blurred 32-pixel image hides what the model drew; large ones shrink to ``largest``.
    """
    image = to_rgb(image)
    side = max(image.size)
    grow = math.ceil(_SMALLEST / side)
    scale = grow if grow > 1 else min(1.0, largest / side)
    if scale == 1:
        return image.copy()
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def framed(image: Image.Image, color: str) -> Image.Image:
    """The image with a coloured frame around it."""
    return padded(image, _FRAME, color)


def captioned(image: Image.Image, caption: str, color: str = MUTED) -> Image.Image:
    """The image with one centred line beneath it."""
    line = ellipsise(caption, 12, image.width)
    return stack([image, text_block([line], 12, color, width=image.width)], gap=4)


def stack(images: Sequence[Image.Image], gap: int = 0, horizontal: bool = False) -> Image.Image:
    """Images beneath each other (or beside each other), aligned at the top left."""
    widths, heights = [image.width for image in images], [image.height for image in images]
    gaps = gap * (len(images) - 1)
    size = (sum(widths) + gaps, max(heights)) if horizontal else (max(widths), sum(heights) + gaps)
    canvas = Image.new("RGB", size, WHITE)
    position = 0
    for image in images:
        canvas.paste(image, (position, 0) if horizontal else (0, position))
        position += (image.width if horizontal else image.height) + gap
    return canvas


def flow(tiles: Sequence[Image.Image], width: int, gap: int) -> Image.Image:
    """Tiles in reading order, broken into rows no wider than ``width`` (one tile at least)."""
    rows: list[list[Image.Image]] = [[]]
    used = 0
    for tile in tiles:
        if rows[-1] and used + tile.width > width:
            rows.append([])
            used = 0
        rows[-1].append(tile)
        used += tile.width + gap
    return stack([stack(row, gap, horizontal=True) for row in rows], gap)


def padded(image: Image.Image, margin: int, color: str = WHITE) -> Image.Image:
    """The image with space on all sides."""
    canvas = Image.new("RGB", (image.width + 2 * margin, image.height + 2 * margin), color)
    canvas.paste(image, (margin, margin))
    return canvas


def write_png(image: Image.Image, path: Path | str) -> None:
    """Put a picture on the disk, whole or not at all. Raises OSError."""
    with replacing(path, error=None) as file:
        image.save(cast("IO[bytes]", file), format="PNG", optimize=True)
