"""Lossless WebP, one image a file, and nothing else that passes for WebP.

Pillow makes room for the size that a header claims as soon as a file is opened, so the header is
read here first. Animations, metadata and lossy images have other headers and are refused.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

from ..basics.errors import told_by

MAX_HEADER = 64 * 1024  # header, and the codes of the symbols: bounded whatever the image
_HEADER_BYTES = 25


def encode_webp(image: np.ndarray) -> bytes:
    """The file of an image, uint8 (height, width, 3)."""
    buffer = io.BytesIO()
    # Method 0 writes 15 % more than method 4 in half the time; training reads either as fast.
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, method=0, quality=0, exact=True)
    return buffer.getvalue()


def decode_webp(data: bytes | memoryview, resolution: tuple[int, int]) -> np.ndarray:
    """The image of (height, width) pixels in a file, uint8 (height, width, 3).

    ValueError says what is wrong; an image of another size is refused before it is decoded.
    """
    height, width = _size_in_header(data)
    if (height, width) != resolution:
        wanted = f"{resolution[0]}x{resolution[1]}"
        raise ValueError(f"is {height}x{width} pixels (height x width), expected {wanted}")
    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
            if image.mode != "RGB":
                raise ValueError(f"has mode {image.mode}, expected RGB")
            return np.asarray(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"is not a readable image ({told_by(error)})") from None


def _size_in_header(data: bytes | memoryview) -> tuple[int, int]:
    """Height and width that the header of a simple lossless file claims.

    RIFF, size, WEBP, VP8L, size, 0x2f, and 14 bits each of width - 1 and height - 1:
    https://developers.google.com/speed/webp/docs/webp_lossless_bitstream_specification
    """
    if len(data) < _HEADER_BYTES or data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("is not a WebP file")
    if data[12:16] != b"VP8L" or data[20] != 0x2F:
        raise ValueError("is not a lossless WebP of one image without metadata")
    riff, chunk = struct.unpack_from("<I", data, 4)[0], struct.unpack_from("<I", data, 16)[0]
    if riff + 8 != len(data) or chunk + chunk % 2 + 20 != len(data):
        raise ValueError(f"holds {len(data)} bytes, its header says {riff + 8}")
    bits = struct.unpack_from("<I", data, 21)[0]
    return ((bits >> 14) & 0x3FFF) + 1, (bits & 0x3FFF) + 1
