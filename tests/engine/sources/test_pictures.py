"""Images of strangers: what is decoded and how it is cut, and what is refused before it is."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import preferences
import pytest
from cdpo.engine.sources import pictures
from cdpo.engine.sources.pictures import ENLARGED, FIRST_FRAME, read_picture
from cdpo.engine.sources.rows import UnreadableImage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from refusals import refused

GREY = Image.new("L", (8, 8), 128)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        checksum = zlib.crc32(name + data)
        parts.append(struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum))
    return b"".join(parts)


@pytest.mark.parametrize(
    ("size", "crop"),
    [((16, 16), (0, 0)), ((32, 48), (0, 4)), ((40, 16), (12, 0)), ((10, 20), (0, 8))],
)
def test_the_shorter_side_is_resized_and_the_middle_kept(size, crop):
    found = read_picture(preferences.picture(1, size), (16, 16))
    assert found.image.size == (16, 16) and found.image.mode == "RGB"
    assert (found.original, found.crop) == (size, crop)


def test_what_is_cut_out_is_what_resizing_and_cropping_give():
    data = preferences.picture(2, (40, 64))
    whole = Image.open(io.BytesIO(data)).resize((32, 20), Image.Resampling.LANCZOS)
    found = read_picture(data, (20, 24))
    assert found.crop == (0, 4)
    np.testing.assert_array_equal(np.asarray(found.image), np.asarray(whole.crop((4, 0, 28, 20))))


def test_an_image_of_the_right_size_is_not_touched():
    data = preferences.picture(3, (16, 24))
    image = np.asarray(read_picture(data, (16, 24)).image)
    np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(data))))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.integers(1, 20))
def test_any_size_fills_any_resolution(height, width, to_height, to_width):
    image = Image.new("RGB", (width, height), "red")
    if max(height, width) > 16 * min(height, width):
        with refused(UnreadableImage, "out-of-range"):
            read_picture(encoded(image), (to_height, to_width))
        return
    found = read_picture(encoded(image), (to_height, to_width))
    assert found.image.size == (to_width, to_height)
    assert found.original == (height, width) and min(found.crop) >= 0
    assert (np.asarray(found.image) == (255, 0, 0)).all()


def test_a_camera_that_was_held_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image = Image.new("RGB", (32, 16), "blue")
    assert read_picture(encoded(image, "JPEG", exif=exif), (16, 16)).original == (32, 16)


def test_transparency_shows_white_and_other_modes_become_rgb():
    clear = Image.new("RGBA", (16, 16), (200, 0, 0, 0))
    assert read_picture(encoded(clear), (8, 8)).image.getpixel((4, 4)) == (255, 255, 255)
    for mode in ("L", "P", "1", "LA", "CMYK"):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        assert read_picture(encoded(Image.new(mode, (16, 16)), kind), (8, 8)).image.mode == "RGB"


def test_grey_of_sixteen_bits_keeps_its_greys():
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    found = read_picture(encoded(Image.fromarray(levels)), (64, 64)).image
    exact = levels[..., None].astype(np.float64) / 257
    assert np.abs(np.asarray(found, np.float64) - exact).max() <= 0.5 + 1e-6
    clear = encoded(Image.fromarray(levels), transparency=int(levels[0, 7]))
    shown = np.asarray(read_picture(clear, (64, 64)).image)
    assert (shown[0, 7] == 255).all() and (shown[0, [6, 8]] < 10).all()


def exchanged() -> bytes:
    """sRGB's profile with the primaries of red and blue exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = int.from_bytes(profile[128:132], "big")
    tags = {bytes(profile[at : at + 4]): at + 4 for at in range(132, 132 + 12 * count, 12)}
    red, blue = (slice(tags[name], tags[name] + 8) for name in (b"rXYZ", b"bXYZ"))
    profile[red], profile[blue] = profile[blue], profile[red]
    return bytes(profile)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_colours_are_those_that_a_profile_says(kind):
    options = {"quality": 100} if kind != "PNG" else {}
    data = encoded(Image.new("RGB", (16, 16), "red"), kind, icc_profile=exchanged(), **options)
    shown = np.asarray(read_picture(data, (16, 16)).image, int)
    assert np.abs(shown - (0, 0, 255)).max() <= 4


def test_a_profile_leaves_transparency_and_srgb_alone():
    half = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    found = read_picture(encoded(half, icc_profile=exchanged()), (16, 16)).image
    assert found.getpixel((8, 8)) == (255, 255, 255)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    for profile in (srgb, b"no profile", exchanged()[:200]):
        found = read_picture(encoded(noise, icc_profile=profile), (16, 16)).image
        assert np.array_equal(np.asarray(found), np.asarray(noise))
    for mode in ("L", "LA", "P", "1", "CMYK"):  # of other channels than the profile's
        kind = "JPEG" if mode == "CMYK" else "PNG"
        data = encoded(Image.new(mode, (16, 16)), kind, icc_profile=exchanged())
        assert read_picture(data, (16, 16)).image.mode == "RGB"


def zero_filled(share: float) -> bytes:
    """A JPEG whose last part was never written, as a full disk or a broken download leaves it; so
    large that Pillow, which stumbles over it in small ones, takes it as it is.
    """
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    data = encoded(Image.fromarray(noise), "JPEG", quality=90)
    kept = int(len(data) * share)
    return data[:kept] + bytes(len(data) - kept)


def test_what_follows_the_end_of_a_jpeg_does_not_matter():
    data = preferences.picture(1, (64, 64), "JPEG")
    assert read_picture(data + bytes(512) + b"a trailer of some camera", (16, 16))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "empty"),
        (zero_filled(0.5), "damaged"),
        (zero_filled(0.9), "damaged"),
        (b"GIF89a no image", "unsupported"),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), "unsupported"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "unreadable"),
        (encoded(Image.new("RGB", (8, 8)), "PPM"), "unsupported"),
        (preferences.picture(1, (64, 64))[:-900], "damaged"),
        (preferences.picture(1, (64, 64), "JPEG")[:-300], "damaged"),
        (png_header(0, 5), "unsupported"),
        (png_header(5000, 5000), "too-large"),
        (png_header(2**31 - 1, 2**31 - 1), "too-large"),
        (png_header(1, 16_000_000), "out-of-range"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(data, kind):
    with refused(UnreadableImage, kind) as caught:
        read_picture(data, (16, 16))
    assert "\n" not in str(caught.value)


def test_nothing_is_decoded_before_its_size_is_known(monkeypatch):
    monkeypatch.setattr(pictures, "_on_white", lambda image: pytest.fail("decoded"))
    with pytest.raises(UnreadableImage):
        read_picture(png_header(5000, 5000), (16, 16))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 500), st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_damage_gives_a_picture_or_an_unreadable_image(noise, place, kind):
    data = bytearray(preferences.picture(4, (20, 24), kind))
    data[place : place + len(noise)] = noise
    with contextlib.suppress(UnreadableImage):
        assert read_picture(bytes(data), (8, 8)).image.size == (8, 8)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read_and_that_is_said(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
    picture = read_picture(data, (8, 8))
    assert picture.image.getpixel((4, 4)) == (255, 0, 0)
    assert picture.remarks == ((FIRST_FRAME, ""),)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "JPEG", "MPO"])
def test_there_is_nothing_to_say_of_a_still_picture(kind):
    """The pictures behind a phone's JPEG are no frames of it."""
    options = {"save_all": True, "append_images": [GREY]} if kind == "MPO" else {}
    assert read_picture(encoded(GREY, kind, **options), (8, 8)).remarks == ()


@pytest.mark.parametrize(("size", "is_soft"), [((8, 9), False), ((7, 90), True), ((90, 7), True)])
def test_a_picture_that_is_enlarged_a_lot_is_told_of(size, is_soft):
    remarks = read_picture(preferences.picture(1, size), (16, 16)).remarks
    assert remarks == (((ENLARGED, f"{size[1]}x{size[0]} pixels"),) if is_soft else ())


def test_the_committed_readme_picture_is_read():
    """A real file, not of our own making."""
    path = next(Path(__file__).parents[3].glob("assets/readme/*.png"))
    assert read_picture(path.read_bytes(), (32, 32)).image.size == (32, 32)
