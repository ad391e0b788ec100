"""One sample of a shard: its record, and how record and images are written and checked.

`KEY.json` is a :class:`PairMeta`, and :mod:`cdpo.engine.shards.contents` tells what lies beside it.
KEY is the pair's id in 16 hex digits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..basics.errors import ShardError
from .contents import Contents

META = "json"
MAX_META_BYTES = 64 * 1024

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


@dataclass(frozen=True, slots=True)
class PairSample:
    """A pair as it lies in a shard: ``images`` (2, ...), winner first, are what the set holds of
    them: latents, moments or pixels.
    """

    meta: PairMeta
    images: np.ndarray

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


def sample_key(pair_id: int) -> str:
    """The webdataset key of a pair."""
    return f"{pair_id:016x}"


def encode_sample(
    meta: PairMeta, images: np.ndarray, contents: Contents, shard: str
) -> dict[str, bytes]:
    """The members of a sample as bytes; ``images`` (2, ...) as ``contents`` takes them, which
    raises ShardError for what it cannot hold; so does a record that states no preference.
    """
    key = sample_key(meta.pair_id)
    refuse_no_preference(meta, shard, key)
    files = contents.encode(images, shard, key)
    text = json.dumps(meta.model_dump(mode="json"), sort_keys=True, ensure_ascii=False).encode()
    if len(text) > MAX_META_BYTES:
        raise ShardError(shard, f"record is over {MAX_META_BYTES} bytes", key, META, "too-large")
    return {META: text, **dict(zip(contents.members, files, strict=True))}


def decode_meta(data: bytes, shard: str, key: str) -> PairMeta:
    """The record in JSON bytes, with the key that it must belong to."""
    try:
        meta = PairMeta.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "record"
        raise ShardError(shard, f"{where}: {first['msg']}", key, META, "damaged") from None
    if sample_key(meta.pair_id) != key:
        reason = f"pair_id {meta.pair_id} is not that of its key"
        raise ShardError(shard, reason, key, META, "mismatch")
    refuse_no_preference(meta, shard, key)
    return meta


def refuse_no_preference(meta: PairMeta, shard: str, key: str) -> None:
    """ShardError unless the winner is another image, ranked above the loser, with a higher score;
    with a lower one only as the first of two, where a label is kept against the scores.
    """
    (winner, loser), (ours, theirs), ranks = meta.images, meta.scores, meta.ranks
    if winner == loser:
        reason = f"winner and loser are one image, {winner[:80]}"
    elif ranks[0] >= ranks[1]:
        reason = f"the winner's rank {ranks[0]} is not above the loser's {ranks[1]}"
    elif ours == theirs or (ours < theirs and ranks != (1, 2)):
        reason = f"the winner's score {ours:g} is not above the loser's {theirs:g}"
    else:
        return
    raise ShardError(shard, reason, key, META, "no-preference")
