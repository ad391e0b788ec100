"""Charts in the report's look: SVG that follows its theme, or PNG.

SVG comes with its colours as CSS variables (``var(--chart-ink, #1f2328)``), so that inside the
report it follows the light or dark theme and on its own it is a light chart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure

Format = Literal["svg", "png"]

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


def render(draw: Callable[[Figure], None], size: tuple[float, float], fmt: Format) -> bytes:
    """What ``draw`` puts on a figure of this size in inches."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        if fmt == "png":
            figure.savefig(buffer, format="png", dpi=160, facecolor="white")
            return buffer.getvalue()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _themed(buffer.getvalue().decode()).encode()


def _themed(svg: str) -> str:
    """Only the <svg> element, colours as CSS variables with the light colour as fallback."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--chart-{name}, {color})")
    return svg
