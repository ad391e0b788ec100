"""What the samples of a set hold beside their records: latents, moments or images.

The manifest's ``kind`` says which, and a trainer takes what it says:

    latents   `KEY.latents.npy`: float16 (2, C, h, w), scaled latents, the posterior's mean
    moments   `KEY.moments.npy`: float16 (2, 2C, h, w), mean and log variance as the VAE gives them
    raw       `KEY.w.webp`, `KEY.l.webp`: images of (height, width) pixels, lossless

The winner comes first everywhere. Whatever it is, a sample's arrays are one array of two rows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from ..basics.errors import ShardError, told_by
from .webp import MAX_HEADER, decode_webp, encode_webp

Kind = Literal["latents", "moments", "raw"]
Buffer = bytes | memoryview
DecodeImage = Callable[[Buffer, tuple[int, int]], np.ndarray]

MAX_NPY_HEADER = 1024
# Scaled latents of the VAEs that there are have a variance of about one, and 4 to 8 at the most in
# single places; their moments are unscaled, up to some fifty, and log variances from -30 to 20.
FARTHEST = 1000.0
_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']{1,16})', 'fortran_order': (True|False), "
    rb"'shape': \(([0-9, ]{0,64})\), \}[ ]*\n"
)


class Contents(Protocol):
    """How the two images of a pair are written and read."""

    @property
    def members(self) -> tuple[str, ...]:
        """Their files in a sample, in the order they are written."""
        ...

    @property
    def max_bytes(self) -> int:
        """The most that one of these files may take."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """(2, ...) of a pair as an array."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of a pair as an array."""
        ...

    @property
    def header(self) -> bytes | None:
        """What stands before the array where a pair is one file that otherwise holds its bytes."""
        ...

    def check(self, pair: np.ndarray, shard: str, key: str) -> None:
        """ShardError where a pair (2, ...) of the right shape holds what none can hold."""
        ...

    def encode(self, pair: np.ndarray, shard: str, key: str) -> list[bytes]:
        """The files of a pair, in the order of ``members``. ShardError for what they cannot hold
        or what has another shape.
        """
        ...

    def decode(self, files: Sequence[Buffer], shard: str, key: str) -> np.ndarray:
        """The pair (2, ...) in its files; ShardError naming the member that is not as declared."""
        ...


def contents_of(
    kind: Kind,
    latent_shape: tuple[int, int, int],
    resolution: tuple[int, int],
    decode_image: DecodeImage = decode_webp,
) -> Contents:
    """The contents of a set.

    Args:
        kind: as the manifest says.
        latent_shape: (C, h, w) of one image's latents.
        resolution: height and width of an image in pixels.
        decode_image: what decodes the file of an image; ValueError says what is wrong with it.
    """
    channels, *size = latent_shape
    if kind == "raw":
        return ImageContents(resolution, decode_image)
    if kind == "moments":
        return ArrayContents("moments", (2 * channels, *size))
    return ArrayContents("latents", latent_shape)


class ArrayContents:
    """One float16 array (2, *shape) for both images, in numpy's own format."""

    dtype = np.dtype("<f2")

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name = name
        self.members = (f"{name}.npy",)
        self.shape = (2, *shape)
        self.num_bytes = 2 * int(np.prod(self.shape))
        self.max_bytes = self.num_bytes + MAX_NPY_HEADER
        # Of an array that is not made: a manifest may claim any shape.
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, about)
        self.header = header.getvalue()

    def encode(self, pair: np.ndarray, shard: str, key: str) -> list[bytes]:
        """``pair`` of any float type; what float16 cannot hold (NaN, infinity, |x| > 65504) is
        refused instead of becoming infinity.
        """
        if pair.shape != self.shape:
            reason = f"{self.name} have shape {pair.shape}, expected {self.shape}"
            raise ShardError(shard, reason, key, self.members[0], "mismatch")
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(pair, dtype=self.dtype)
        if not np.isfinite(half).all():
            worst = float(np.abs(pair).max())
            reason = f"{self.name} do not fit float16 (|x| up to {worst:g})"
            raise ShardError(shard, reason, key, self.members[0], "non-finite")
        self.check(half, shard, key)
        return [self.header + half.tobytes()]

    def decode(self, files: Sequence[Buffer], shard: str, key: str) -> np.ndarray:
        """A view of the file: the header is never evaluated, and nothing is allocated for the
        shape that it claims.
        """
        (data,) = files
        start = self._data_offset(data, shard, key)
        if len(data) - start != self.num_bytes:
            reason = f"holds {len(data) - start} bytes of data, expected {self.num_bytes}"
            raise ShardError(shard, reason, key, self.members[0], "mismatch")
        pair = np.frombuffer(data, dtype=self.dtype, offset=start).reshape(self.shape)
        self.check(pair, shard, key)
        return pair

    def check(self, pair: np.ndarray, shard: str, key: str) -> None:
        for side, half in zip(("winner", "loser"), pair, strict=True):
            if flaw := flaw_of(half):
                kind, reason = flaw
                reason = f"{self.name} of the {side} {reason}"
                raise ShardError(shard, reason, key, self.members[0], kind)
        refuse_equal(*pair, shard=shard, key=key, member=self.members[0])

    def _data_offset(self, data: Buffer, shard: str, key: str) -> int:
        """Where the array starts, after a version 1.0 header of float16 and the shape."""

        def wrong(reason: str, kind: str) -> ShardError:
            return ShardError(shard, reason, key, self.members[0], kind)

        if data[:8] != b"\x93NUMPY\x01\x00" or len(data) < 10:
            raise wrong("is not a .npy file of version 1.0", "unsupported")
        start = 10 + int.from_bytes(data[8:10], "little")
        match = _NPY_HEADER.fullmatch(data[10:start]) if start <= MAX_NPY_HEADER else None
        if match is None:
            raise wrong("has a .npy header that numpy would not write", "damaged")
        dtype, fortran, claimed = (part.decode() for part in match.groups())
        if dtype != "<f2" or fortran != "False":
            order = "Fortran" if fortran == "True" else "C"
            raise wrong(f"is {dtype} in {order} order, expected <f2 in C", "wrong-type")
        if [part.strip() for part in claimed.split(",")] != [str(size) for size in self.shape]:
            raise wrong(f"has shape ({claimed}), expected {self.shape}", "mismatch")
        return start


class ImageContents:
    """A lossless WebP for each image; as an array uint8 (2, height, width, 3)."""

    members = ("w.webp", "l.webp")
    dtype = np.dtype(np.uint8)
    header = None

    def __init__(
        self, resolution: tuple[int, int], decode_image: DecodeImage = decode_webp
    ) -> None:
        self.resolution = resolution
        self.shape = (2, *resolution, 3)
        self._decode_image = decode_image
        # Noise takes as much as its pixels and the codes of its 256 x 3 symbols.
        self.max_bytes = 4 * resolution[0] * resolution[1] + MAX_HEADER

    def encode(self, pair: np.ndarray, shard: str, key: str) -> list[bytes]:
        if pair.shape != self.shape or pair.dtype != self.dtype:
            reason = f"images are {pair.dtype} {pair.shape}, expected uint8 {self.shape}"
            raise ShardError(shard, reason, key, self.members[0], "mismatch")
        self.check(pair, shard, key)
        return [encode_webp(image) for image in pair]

    def decode(self, files: Sequence[Buffer], shard: str, key: str) -> np.ndarray:
        pair = []
        for member, data in zip(self.members, files, strict=True):
            try:
                pair.append(self._decode_image(data, self.resolution))
            except ValueError as error:
                raise ShardError(shard, told_by(error), key, member, "damaged") from None
        both = np.stack(pair)
        self.check(both, shard, key)
        return both

    def check(self, pair: np.ndarray, shard: str, key: str) -> None:
        """Any pixels are an image; but two are to be two."""
        refuse_equal(*pair, shard=shard, key=key, member=self.members[0])


def flaw_of(half: np.ndarray) -> tuple[str, str] | None:
    """Kind of error and reason where float16, contiguous, are those of no image.

    By their bits, for numpy's isfinite converts float16 in software and costs more than reading the
    sample: positive ones rise as signed integers, infinity is 0x7C00; negative ones, which are
    negative as such, as unsigned, from 0x8000, which is -0, to infinity at 0xFC00.
    """
    positive, negative = int(half.view(np.int16).max()), int(half.view(np.uint16).max()) - 0x8000
    if positive >= 0x7C00 or negative >= 0x7C00:
        return "non-finite", "hold NaN or infinity"
    if positive > _FARTHEST_BITS or negative > _FARTHEST_BITS:
        return "out-of-range", f"are no VAE's: beyond {FARTHEST:g}"
    if positive <= 0 and negative <= 0:
        return "out-of-range", "are all zero"
    return None


_FARTHEST_BITS = int(np.float16(FARTHEST).view(np.int16))


def refuse_equal(
    winner: np.ndarray, loser: np.ndarray, *, shard: str, key: str, member: str
) -> None:
    """ShardError where both are the same: nobody prefers an image to itself."""
    if winner.flat[0] == loser.flat[0] and np.array_equal(winner, loser):
        reason = "winner and loser are the same"
        raise ShardError(shard, reason, key, member, "no-preference")
