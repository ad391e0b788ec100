"""Charts in the report's look, as SVG that follows its theme, and pictures as data URIs.

SVG comes with its colours as CSS variables (``var(--chart-ink, #1f2328)``), so that inside the
report it follows the light or dark theme and on its own it is a light chart.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, features

from ...display.drawing import to_rgb

# Names are CSS variables of the report. The hues are told apart by readers with colour blindness.
COLORS = {
    "ink": "#1f2328",
    "muted": "#6e7782",
    "rule": "#d8dee4",
    "shade": "#f3f5f8",
    "accent": "#0969da",
    "winner": "#1a7f38",
    "loser": "#d1571c",
    "q1": "#9ec5fe",
    "q2": "#5b9df9",
    "q3": "#2f6fde",
    "q4": "#1b3f94",
}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "cdpo",
    "axes.edgecolor": COLORS["rule"],
    "axes.labelcolor": COLORS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 4),
    "grid.color": COLORS["rule"],
    "grid.linewidth": 0.6,
    "text.color": COLORS["ink"],
    "xtick.color": COLORS["rule"],
    "ytick.color": COLORS["rule"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": COLORS["muted"],
}


def render(draw: Callable[[Figure], None], size: tuple[float, float]) -> Markup:
    """What ``draw`` puts on a figure of this size in inches; matplotlib escapes the texts in it."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_themed(buffer.getvalue().decode()))


def _themed(svg: str) -> str:
    """Only the <svg> element, colours as CSS variables with the light colour as fallback."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--chart-{name}, {color})")
    return svg


_LARGEST = 256  # CSS shows at most about 150 px; this is for dense screens
_LOSSLESS_UP_TO = 128  # px: a photograph this size is small anyhow, pixel art must stay crisp


@dataclass(frozen=True)
class Embedded:
    """A picture ready for `<img src>`; width and height let a browser lay out before decoding."""

    uri: str
    width: int
    height: int


def embed(
    image: Image.Image, largest: int | None = _LARGEST, lossless: bool | None = None
) -> Embedded:
    """Shrink to ``largest`` if need be and encode.

    Lossless (the default for small images) is PNG or WebP, whichever is smaller; otherwise WebP at
    a quality whose loss is not seen at this size.
    """
    image = to_rgb(image)
    if largest is not None and max(image.size) > largest:
        scale = largest / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    if lossless is None:
        lossless = max(image.size) <= _LOSSLESS_UP_TO
    kind, data = _lossless(image) if lossless else _lossy(image)
    encoded = base64.b64encode(data).decode()
    return Embedded(f"data:image/{kind};base64,{encoded}", image.width, image.height)


def _lossless(image: Image.Image) -> tuple[str, bytes]:
    candidates = [("png", _encode(image, format="PNG", optimize=True))]
    if features.check("webp"):
        candidates.append(("webp", _encode(image, format="WEBP", lossless=True, method=4)))
    return min(candidates, key=lambda candidate: len(candidate[1]))


def _lossy(image: Image.Image) -> tuple[str, bytes]:
    if features.check("webp"):
        return "webp", _encode(image, format="WEBP", quality=84, method=3)
    return "jpeg", _encode(image, format="JPEG", quality=88)


def _encode(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()
