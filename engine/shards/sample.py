"""One sample of a latents shard: what its two members hold, how they are written and checked.

`KEY.latents.npy` is float16 (2, C, h, w), the winner's scaled latents then the loser's;
`KEY.json` is a :class:`PairMeta`. KEY is the pair's id in 16 hex digits.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..curriculum.pairs import Pair
from ..keyed import content_id
from .shard_error import ShardError

LATENTS = "latents.npy"
META = "json"
MEMBERS = (META, LATENTS)
MAX_META_BYTES = 64 * 1024
MAX_NPY_HEADER = 1024

_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']{1,16})', 'fortran_order': (True|False), "
    rb"'shape': \(([0-9, ]{0,64})\), \}[ ]*\n"
)
_FLOAT16_EXPONENT = np.uint16(0x7C00)

Score = Annotated[float, Field(allow_inf_nan=False)]
Rank = Annotated[int, Field(ge=1)]
Pixels = tuple[Annotated[int, Field(ge=1, le=2**16)], Annotated[int, Field(ge=1, le=2**16)]]
Corner = tuple[Annotated[int, Field(ge=0, le=2**16)], Annotated[int, Field(ge=0, le=2**16)]]


class PairMeta(BaseModel):
    """What a shard says about a pair; wherever there are two values, the winner's comes first."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    pair_id: Annotated[int, Field(ge=0, lt=2**63)]
    prompt: Annotated[str, Field(max_length=16_384)]
    tier: Annotated[int, Field(ge=1)]
    scores: tuple[Score, Score]
    ranks: tuple[Rank, Rank]
    images: tuple[str, str]
    original_size: tuple[Pixels, Pixels]
    """Height and width of each image before it was resized and cropped."""
    crop: tuple[Corner, Corner]
    """Top and left of each crop."""

    @classmethod
    def of_sampled(cls, pair: Pair, resolution: tuple[int, int]) -> PairMeta:
        """The record of a pair of sampled candidates: made at ``resolution``, nothing cropped."""
        return cls(
            pair_id=pair.pair_id,
            prompt=pair.prompt,
            tier=pair.tier,
            scores=(pair.winner_score, pair.loser_score),
            ranks=(pair.winner_rank, pair.loser_rank),
            images=(image_id(pair.prompt, pair.winner), image_id(pair.prompt, pair.loser)),
            original_size=(resolution, resolution),
            crop=((0, 0), (0, 0)),
        )


@dataclass(frozen=True, slots=True)
class PairSample:
    """A pair as it lies in a shard: ``latents`` float16 (2, C, h, w), winner first."""

    meta: PairMeta
    latents: np.ndarray

    @property
    def pair_id(self) -> int:
        """The pair's stable 63-bit id."""
        return self.meta.pair_id

    @property
    def prompt(self) -> str:
        """The caption both images were made for."""
        return self.meta.prompt

    @property
    def tier(self) -> int:
        """Difficulty, 1 the easiest."""
        return self.meta.tier


def image_id(prompt: str, candidate: int) -> str:
    """The name of a candidate image: its prompt's id and its number."""
    return f"{content_id(prompt):016x}-{candidate:04d}"


def sample_key(pair_id: int) -> str:
    """The webdataset key of a pair."""
    return f"{pair_id:016x}"


def encode_sample(
    meta: PairMeta, latents: np.ndarray, latent_shape: tuple[int, int, int], shard: str
) -> dict[str, bytes]:
    """Both members as bytes. ``latents`` (2, C, h, w) of any float type; what float16 cannot hold
    (NaN, infinity, |x| > 65504) raises ShardError instead of becoming infinity.
    """
    key = sample_key(meta.pair_id)
    if latents.shape != (2, *latent_shape):
        reason = f"latents have shape {latents.shape}, expected {(2, *latent_shape)}"
        raise ShardError(shard, reason, key, LATENTS)
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(latents, dtype=np.dtype("<f2"))
    if not_finite(half):
        worst = float(np.abs(latents).max())
        raise ShardError(shard, f"latents do not fit float16 (|x| up to {worst:g})", key, LATENTS)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, half, version=(1, 0), allow_pickle=False)
    text = json.dumps(meta.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
    if len(text.encode()) > MAX_META_BYTES:
        raise ShardError(shard, f"record is over {MAX_META_BYTES} bytes", key, META)
    return {META: text.encode(), LATENTS: buffer.getvalue()}


def decode_latents(
    data: bytes, latent_shape: tuple[int, int, int], shard: str, key: str
) -> np.ndarray:
    """The float16 array (2, C, h, w) in npy bytes, a view of ``data``; the header is never
    evaluated and nothing is allocated for the shape that it claims.
    """
    start = _npy_data_offset(data, (2, *latent_shape), shard, key)
    expected = 4 * int(np.prod(latent_shape))
    if len(data) - start != expected:
        reason = f"holds {len(data) - start} bytes of data, expected {expected}"
        raise ShardError(shard, reason, key, LATENTS)
    latents = np.frombuffer(data, dtype="<f2", offset=start).reshape(2, *latent_shape)
    if not_finite(latents):
        raise ShardError(shard, "latents hold NaN or infinity", key, LATENTS)
    return latents


def decode_meta(data: bytes, shard: str, key: str) -> PairMeta:
    """The record in JSON bytes, with the key that it must belong to."""
    try:
        meta = PairMeta.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "record"
        raise ShardError(shard, f"{where}: {first['msg']}", key, META) from None
    if sample_key(meta.pair_id) != key:
        raise ShardError(shard, f"pair_id {meta.pair_id} is not that of its key", key, META)
    return meta


def not_finite(half: np.ndarray) -> bool:
    """Whether any float16 is NaN or infinite, by its exponent bits: numpy's isfinite converts
    float16 in software and costs more than reading the sample.
    """
    bits = half.view(np.uint16) & _FLOAT16_EXPONENT
    return bool((bits == _FLOAT16_EXPONENT).any())


def _npy_data_offset(data: bytes, shape: tuple[int, ...], shard: str, key: str) -> int:
    """Where the array starts in ``data``, after a version 1.0 header of float16 and ``shape``."""
    if data[:8] != b"\x93NUMPY\x01\x00" or len(data) < 10:
        raise ShardError(shard, "is not a .npy file of version 1.0", key, LATENTS)
    start = 10 + int.from_bytes(data[8:10], "little")
    match = _NPY_HEADER.fullmatch(data[10:start]) if start <= MAX_NPY_HEADER else None
    if match is None:
        raise ShardError(shard, "has a .npy header that numpy would not write", key, LATENTS)
    dtype, fortran, claimed = (part.decode() for part in match.groups())
    if dtype != "<f2" or fortran != "False":
        reason = f"is {dtype} in {'Fortran' if fortran == 'True' else 'C'} order, expected <f2 in C"
        raise ShardError(shard, reason, key, LATENTS)
    if [part.strip() for part in claimed.split(",")] != [str(size) for size in shape]:
        raise ShardError(shard, f"has shape ({claimed}), expected {shape}", key, LATENTS)
    return start
