"""Images of strangers: bounded before they are decoded, at the recipe's resolution, loaded ahead of
need by a few threads; and how many unreadable ones are left out before that is an error.
"""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ..basics.errors import DataError, told_by
from ..basics.files import LFS_REMEDY, lfs_pointer
from .index import Part
from .rows import RowReader, UnreadableImage, describe

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # decoders that are open to strangers: no more
MAX_ENLARGED = 2  # times; what is smaller still is remarked on, as it will look soft
FIRST_FRAME, ENLARGED = "first frames of animations", f"images enlarged over {MAX_ENLARGED} times"
MAX_PIXELS = 4096 * 4096
MAX_ASPECT = 16  # a strip of 1 x 16,000,000 pixels would be resized to gigabytes
Size = tuple[int, int]
_SRGB = ImageCms.createProfile("sRGB")


@dataclass(frozen=True, slots=True)
class Picture:
    """An RGB image at the recipe's resolution.

    ``original`` is (height, width) before; ``crop`` (top, left) of what was cut out of the resized
    image: what Stable Diffusion XL is told. ``remarks`` say, each with a detail, what of the
    image's file is not in it.
    """

    image: Image.Image
    original: Size
    crop: Size
    remarks: tuple[tuple[str, str], ...] = ()


def read_picture(data: bytes, resolution: Size) -> Picture:
    """Decode and fit an image to ``resolution`` (height, width): its shorter side, relative to
    that, is resized and the middle kept.

    Raises UnreadableImage, without decoding what is over :data:`MAX_PIXELS`.
    """
    try:
        if lfs_pointer(data):
            raise UnreadableImage(LFS_REMEDY, kind="unreadable")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        # A phone's JPEG may have further pictures behind it, which are no frames.
        is_first = image.format != "MPO" and getattr(image, "is_animated", False)
        _check_size(image.width, image.height)  # from the header, nothing is decoded yet
        if image.format == "JPEG" and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
            # Pillow sees a file that was cut, not one whose tail was never written and is zeros.
            raise UnreadableImage("is damaged (its end is missing)", kind="damaged")
        upright = ImageOps.exif_transpose(image)
        rgb = _on_white(_in_srgb(_in_eight_bits(upright)))
    except UnreadableImage:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImage(f"has over {MAX_PIXELS} pixels", kind="too-large") from None
    except Image.UnidentifiedImageError:
        if not data:
            raise UnreadableImage("is empty", kind="empty") from None
        told = f"is no image of {', '.join(FORMATS)}: convert it"
        raise UnreadableImage(told, kind="unsupported") from None
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise UnreadableImage(f"is damaged ({told_by(error)})", kind="damaged") from None
    picture = _fitted(rgb, resolution)
    remarks = [(FIRST_FRAME, "")] if is_first else []
    if max(resolution[0] / rgb.height, resolution[1] / rgb.width) > MAX_ENLARGED:
        remarks.append((ENLARGED, f"{rgb.width}x{rgb.height} pixels"))
    return replace(picture, remarks=tuple(remarks))


def _check_size(width: int, height: int) -> None:
    size = f"{width}x{height} pixels"
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{size}, at most {MAX_PIXELS} in all are taken", kind="too-large")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnreadableImage(
            f"{size}, at most {MAX_ASPECT} times as long as wide are taken", kind="out-of-range"
        )


def _fitted(image: Image.Image, resolution: Size) -> Picture:
    height, width = resolution
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cut = resized.crop((left, top, left + width, top + height))
    return Picture(cut, (image.height, image.width), (top, left))


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits as grey of 8: Pillow would cut all above 255 off, which is white."""
    if not image.mode.startswith("I"):
        return image
    levels = (np.asarray(image).astype(np.uint64) * 255 + 32767) // 65535
    grey = Image.fromarray(levels.astype(np.uint8))
    grey.info = image.info
    if "transparency" in image.info:  # the level that is not shown, which one of 8 bits may share
        clear = np.asarray(image) == image.info["transparency"]
        grey.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return grey


def _in_srgb(image: Image.Image) -> Image.Image:
    """Colours as sRGB has them, which networks were trained on, where a profile says otherwise.

    A profile that cannot be used, being damaged or of other channels, counts as none, as it does in
    browsers.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode in ("P", "1"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    opaque = image.convert(image.mode.removesuffix("A")) if alpha else image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found = ImageCms.profileToProfile(opaque, source, _SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    if found is None:
        return image
    if alpha is not None:
        found.putalpha(alpha)
    return found


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; behind what is transparent there may be any colour, so white is put there."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    with_alpha = image.convert("RGBA")
    white = Image.new("RGBA", with_alpha.size, "white")
    return Image.alpha_composite(white, with_alpha).convert("RGB")


MOST_THREADS = 8  # Pillow decodes outside Python's lock


@dataclass(frozen=True, slots=True)
class Loaded:
    """The pictures of a record, or why one cannot be read; ``index`` is that in its part."""

    index: int
    caption: str
    pictures: tuple[Picture, ...]
    problem: str | None = None


def load_records(
    reader: RowReader, part: Part, wanted: Sequence[int], resolution: Size
) -> Iterator[Loaded]:
    """The records ``wanted``, indices into ``part`` in rising order. At most twice as many records
    as there are threads are in memory.
    """
    threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 2))

    def decode(index: int, data: tuple[bytes | UnreadableImage, ...]) -> Loaded:
        try:
            named = zip(reader.images, data, strict=True)
            pictures = tuple(_picture(name, item, resolution) for name, item in named)
            return Loaded(index, part.captions[index], pictures)
        except UnreadableImage as error:
            where = describe(reader.files, part.file, part.places[index].where)
            return Loaded(index, part.captions[index], (), f"{where}: {error}")

    places = [part.places[index] for index in wanted]
    waiting: deque[Future[Loaded]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        found = 0
        for index, data in zip(wanted, reader.load(part.file, part.group, places), strict=False):
            found += 1
            waiting.append(pool.submit(decode, index, data))
            if len(waiting) >= 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if found < len(wanted):
            raise DataError(
                f"{reader.files.paths[part.file]}: has fewer rows than when it was indexed: it has "
                "changed; start again",
                str(reader.files.paths[part.file]),
                "changed",
            )


def _picture(column: str, data: bytes | UnreadableImage, resolution: Size) -> Picture:
    if isinstance(data, UnreadableImage):
        raise UnreadableImage(f"{column}: {data}", column, data.kind)
    try:
        return read_picture(data, resolution)
    except UnreadableImage as error:
        raise UnreadableImage(f"{column}: {error}", column, error.kind) from None


class Tolerance:
    """Records whose images cannot be read, as many as ``prepare.source.max_unreadable`` allows;
    ``problems`` says why of each.
    """

    def __init__(self, most: int, problems: Mapping[int, str] | None = None) -> None:
        self.most = most
        self.problems = dict(problems or {})

    def note(self, record: int, problem: str) -> None:
        """Leave a record out; DataError with the first one's problem if they are too many."""
        self.problems[record] = problem
        if len(self.problems) <= self.most:
            return
        if self.most:
            remedy = f"the first of over prepare.source.max_unreadable={self.most} such rows"
        else:
            remedy = "prepare.source.max_unreadable=N leaves out up to N such rows"
        raise DataError(
            f"{self.problems[min(self.problems)]} ({remedy})",
            "prepare.source.max_unreadable",
            "unreadable",
        )

    def copy(self) -> Tolerance:
        """For one rank's share of a pass: what all ranks met is noted after it."""
        return Tolerance(self.most, self.problems)
