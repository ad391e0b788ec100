"""Writing shards: how many, which pair goes where, and one tar at a time.

The three are apart so that several ranks can each write some shards: every rank plans and fills
alike, and writes the shards that are its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset

from ..basics.errors import DataError, ShardError
from ..basics.failpoints import failpoint
from ..basics.files import NewFile, replacing
from ..basics.keyed import Permutation, Stream
from .contents import Contents
from .manifest import ShardEntry
from .sample import PairMeta, encode_sample, sample_key


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A tier cut into ``num_shards`` (a multiple of the lanes) of ``count`` pairs each.

    ``dropped`` pairs are left out, fewer than one for every shard that they would need.
    """

    tier: int
    num_shards: int
    count: int
    dropped: int

    def name(self, index: int) -> str:
        """File name of shard ``index`` of the tier."""
        return f"tier-{self.tier}-{index:06d}.tar"


def plan_shards(tier: int, num_pairs: int, lanes: int, pairs_per_shard: int) -> ShardPlan:
    """Equal shards of at most ``pairs_per_shard`` that fill every lane and leave out few pairs.

    Raises DataError when the tier has fewer pairs than there are lanes.
    """
    if num_pairs < lanes:
        raise DataError(
            f"tier {tier} has {num_pairs or 'no'} pairs, but each of data.lanes={lanes} needs one: "
            "lower data.lanes or curriculum.tiers or curriculum.min_score_gap, raise "
            "curriculum.pairs_per_prompt_per_tier, or give more prompts or candidates",
            f"tier {tier}",
            "too-few",
        )
    full = num_pairs // (lanes * pairs_per_shard)
    rows = -(-num_pairs // (lanes * pairs_per_shard))
    evenly = num_pairs // (lanes * rows)
    # Either spread the pairs over one more shard a lane, or leave the last ones out.
    if full * pairs_per_shard > rows * evenly:
        rows, evenly = full, pairs_per_shard
    num_shards = lanes * rows
    return ShardPlan(tier, num_shards, evenly, num_pairs - num_shards * evenly)


class ShardFill:
    """Which pairs of a tier go into which shard: a keyed permutation of the pairs sorted by id.

    It depends on the set of pairs and the seed, not on the order of prompts or on who asks.
    """

    def __init__(self, plan: ShardPlan, pair_ids: np.ndarray, seed: int) -> None:
        """``pair_ids`` (P,) int64 of all pairs of the tier, in any order, without repeats."""
        pair_ids = np.asarray(pair_ids, dtype=np.int64)
        self._sorted = np.argsort(pair_ids, kind="stable")
        same = np.flatnonzero(np.diff(pair_ids[self._sorted]) == 0)
        if len(same):
            key = sample_key(int(pair_ids[self._sorted[same[0]]]))
            what = f"pair {key} of tier {plan.tier} comes up twice: is a prompt repeated?"
            raise DataError(what, key, "duplicate")
        self.plan = plan
        self._shuffle = Permutation(len(pair_ids), seed, Stream.SHARD_FILL, plan.tier, 0)

    def members(self, index: int) -> np.ndarray:
        """Indices (count,) into ``pair_ids`` of the pairs of shard ``index``, in their order."""
        if not 0 <= index < self.plan.num_shards:
            raise IndexError(
                f"tier {self.plan.tier} has {self.plan.num_shards} shards, not {index}"
            )
        first = index * self.plan.count
        return self._sorted[self._shuffle.at(np.arange(first, first + self.plan.count))]


def write_shard(
    path: str | Path,
    samples: Iterable[tuple[PairMeta, np.ndarray]],
    contents: Contents,
) -> ShardEntry:
    """Write one tar of (record, images (2, ...)), all of one tier, and return its entry.

    ``contents`` says what the images are: latents, moments or pixels.

    The file appears under ``path`` when it is whole and on disk. The same samples give the same
    bytes: no times, no owners. Raises ShardError for images that ``contents`` cannot hold
    (latents that are not finite in float16), a repeated pair or a mixture of tiers, DataError when
    the disk is full.
    """
    path = Path(path)
    tiers, keys = set(), set()
    with replacing(path) as file, tar_writer(file) as tar:
        for meta, images in samples:
            key = sample_key(meta.pair_id)
            if key in keys:
                raise ShardError(str(path), "pair comes up twice", key, kind="duplicate")
            tiers.add(meta.tier)
            keys.add(key)
            members = encode_sample(meta, images, contents, str(path))
            tar.write({"__key__": key, **members})
            failpoint("shard.write")
        if len(tiers) != 1:
            reason = f"a shard holds pairs of one tier, got {sorted(tiers)}"
            raise ShardError(str(path), reason, kind="mismatch")
    return ShardEntry(
        name=path.name, tier=tiers.pop(), count=len(keys), bytes=file.bytes, sha256=file.sha256
    )


def tar_writer(file: NewFile) -> webdataset.TarWriter:
    """A webdataset writer of bytes, to use in a `with`: no times and no owners, so that the same
    samples give the same file.
    """
    return webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False)
