"""Drawing, grids and contact sheets."""

from collections.abc import Callable

import numpy as np
import pytest
from cdpo.engine.display import drawing
from cdpo.engine.display.contact_sheet import ContactPair, ContactRow, draw_contact_sheet
from cdpo.engine.display.grids import image_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

Picture = Callable[..., Image.Image]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80), st.integers(30, 300), st.integers(1, 4))
def test_wrapped_text_fits(text, width, max_lines):
    lines = drawing.wrap_text(text, 14, width, max_lines)
    assert len(lines) <= max_lines
    assert all(drawing.text_width(line, 14) <= width for line in lines)
    drawing.text_block(lines, 14)


def test_wrapping_keeps_all_words_or_says_so():
    text = "a photo of a cat riding a bike"
    assert " ".join(drawing.wrap_text(text, 14, 100, 9)) == text
    cut = drawing.wrap_text(text, 14, 100, 2)
    assert len(cut) == 2 and cut[-1].endswith("...")


def test_accents_are_drawn_and_not_boxes():
    shapes = {np.asarray(drawing.text_block([c], 16)).tobytes() for c in "éüñжλ"}
    assert len(shapes) == 5


def test_small_images_grow_with_hard_pixels_and_large_ones_shrink(picture):
    small = picture(32)
    grown = drawing.fit_image(small)
    assert grown.size == (96, 96)
    assert np.array_equal(np.asarray(grown)[::3, ::3], np.asarray(small))
    assert drawing.fit_image(picture(1024)).size == (256, 256)
    assert drawing.fit_image(picture(200)).size == (200, 200)
    assert drawing.fit_image(Image.new("RGB", (512, 256))).size == (256, 128)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_any_mode_becomes_rgb_on_white(mode):
    image = drawing.to_rgb(Image.new(mode, (4, 4)))
    assert image.mode == "RGB"
    if mode in ("RGBA", "LA"):  # wholly transparent
        assert image.getpixel((0, 0)) == (255, 255, 255)


def test_grid_holds_every_image(picture):
    rows = [[picture(32, hue=10 * r + c) for c in range(3)] for r in range(2)]
    grid = image_grid(rows, ["a very long prompt " * 9, "b"], ["step 0", "step 10", "step 20"])
    pixels = np.asarray(grid)
    for row in rows:
        for image in row:
            grown = np.asarray(drawing.fit_image(image))
            first = (pixels[: -96 + 1, : -96 + 1] == grown[0, 0]).all(axis=2)
            found = any(
                np.array_equal(pixels[y : y + 96, x : x + 96], grown)
                for y, x in zip(*np.nonzero(first), strict=True)
                if np.array_equal(pixels[y + 48, x : x + 96], grown[48])
            )
            assert found


def test_grid_takes_ragged_rows_no_labels_and_large_images(picture):
    grid = image_grid([[picture(512)], [picture(512), picture(300)]])
    assert grid.size == (2 * 256 + 6 + 32, 2 * 256 + 6 + 32)
    with pytest.raises(ValueError, match="at least one image"):
        image_grid([[]])


def contact_row(picture: Picture, count: int, size: int, tiers: int) -> ContactRow:
    images = [picture(size, hue=i) for i in range(count)]
    scores = [1 - i / count for i in range(count)]
    pairs = [
        ContactPair(
            tier, (images[0], images[-tier]), (1, count + 1 - tier), (scores[0], scores[-tier])
        )
        for tier in range(1, tiers + 1)
    ]
    return ContactRow("a café on the moon " * 8, images, scores, pairs)


@pytest.mark.parametrize(("count", "size", "tiers"), [(12, 32, 5), (50, 512, 7), (2, 64, 1)])
def test_contact_sheet(tmp_path, picture, count, size, tiers):
    path = tmp_path / "new" / "sheet.png"
    rows = [contact_row(picture, count, size, tiers) for _ in range(2)]
    draw_contact_sheet(path, rows)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG" and sheet.width < 2000
        colors = {color for _, color in sheet.convert("RGB").getcolors(1 << 24)}
    assert {(0x1A, 0x7F, 0x37), (0xD1, 0x57, 0x1B)} <= colors
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


def test_contact_sheet_without_candidates_or_pairs(tmp_path, picture):
    rows = [ContactRow("all tied", [picture()], [0.5]), ContactRow("nothing", [], [])]
    draw_contact_sheet(tmp_path / "sheet.png", rows)
    with pytest.raises(ValueError, match="at least one prompt"):
        draw_contact_sheet(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()
