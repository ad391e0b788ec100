"""Images of strangers: bounded before they are decoded, brought to the recipe's resolution."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import Image, ImageOps

from .rows import UnreadableImage

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 4096 * 4096
MAX_ASPECT = 16  # a strip of 1 x 16,000,000 pixels would be resized to gigabytes
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Picture:
    """An RGB image at the recipe's resolution.

    ``original`` is (height, width) before; ``crop`` (top, left) of what was cut out of the resized
    image: what Stable Diffusion XL is told.
    """

    image: Image.Image
    original: Size
    crop: Size


def read_picture(data: bytes, resolution: Size) -> Picture:
    """Decode and fit an image to ``resolution`` (height, width): its shorter side, relative to
    that, is resized and the middle kept.

    Raises UnreadableImage, without decoding what is over :data:`MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.width, image.height)  # from the header, nothing is decoded yet
        upright = ImageOps.exif_transpose(image)
        rgb = _on_white(upright)
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImage(f"has over {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        what = f"is no image of {', '.join(FORMATS)}" if data else "is empty"
        raise UnreadableImage(what) from None
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise UnreadableImage(f"is damaged ({error})") from None
    return _fitted(rgb, resolution)


def _check_size(width: int, height: int) -> None:
    size = f"{width}x{height} pixels"
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{size}, at most {MAX_PIXELS} in all are taken")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImage(f"{size}, at most {MAX_ASPECT} times as long as wide are taken")


def _fitted(image: Image.Image, resolution: Size) -> Picture:
    height, width = resolution
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cut = resized.crop((left, top, left + width, top + height))
    return Picture(cut, (image.height, image.width), (top, left))


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; behind what is transparent there may be any colour, so white is put there."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    white = Image.new("RGBA", with_alpha.size, "white")
    return Image.alpha_composite(white, with_alpha).convert("RGB")
