"""A labelled grid of images, e.g. a row a prompt and a column a training step."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from .drawing import INK, MUTED, WHITE, fit_image, line_height, padded, text_block, wrap_text

_GAP = 6
_MARGIN = 16
_LABEL_WIDTH = 168
_LABEL_SIZE = 14
_COLUMN_SIZE = 13


def image_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """One picture of ``rows`` of images on white, labels in grey, row labels at the left.

    Small images grow to 96 pixels or a little more and large ones shrink to 256. Rows may differ in
    length. Labels wrap, and what does not fit ends in ``...``.
    """
    if not any(rows):
        raise ValueError("an image grid needs at least one image, got none")
    cells = [[fit_image(image) for image in row] for row in rows]
    num_columns = max(len(row) for row in cells)
    widths = [max(r[c].width for r in cells if c < len(r)) for c in range(num_columns)]
    heights = [max((cell.height for cell in row), default=1) for row in cells]
    left = _LABEL_WIDTH + 2 * _GAP if any(row_labels) else 0
    heads = [
        text_block(wrap_text(label, _COLUMN_SIZE, width, 2), _COLUMN_SIZE, MUTED, width=width)
        for label, width in zip(column_labels, widths, strict=False)
    ]
    top = max(head.height for head in heads) + _GAP if heads else 0
    size = (
        left + sum(widths) + _GAP * (num_columns - 1),
        top + sum(heights) + _GAP * (len(cells) - 1),
    )
    canvas = Image.new("RGB", size, WHITE)
    x = left
    for width, head in zip(widths, heads, strict=False):
        canvas.paste(head, (x, top - _GAP - head.height))
        x += width + _GAP
    y = top
    for index, (row, height) in enumerate(zip(cells, heights, strict=True)):
        if index < len(row_labels) and row_labels[index]:
            label = _row_label(row_labels[index], height)
            canvas.paste(label, (0, y + max(0, (height - label.height) // 2)))
        x = left
        for cell, width in zip(row, widths, strict=False):
            canvas.paste(cell, (x, y))
            x += width + _GAP
        y += height + _GAP
    return padded(canvas, _MARGIN)


def _row_label(label: str, height: int) -> Image.Image:
    max_lines = max(1, height // line_height(_LABEL_SIZE))
    return text_block(wrap_text(label, _LABEL_SIZE, _LABEL_WIDTH, max_lines), _LABEL_SIZE, INK)
