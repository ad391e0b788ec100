"""Pictures as data URIs, as small as they can be without looking worse."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image, features

from ..display.drawing import to_rgb

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
