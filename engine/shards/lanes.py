"""The order of pairs, as a function of position: nothing is replayed, skipped or read twice.

Shard i of a tier belongs to lane i mod L. In every pass over a stage's tiers a lane walks its
shards in a keyed order, cut into windows of ``shuffle_shards``, and inside a window all pairs are
permuted by key, so each pair comes exactly once a pass. Global batch b takes pairs [b g, (b+1) g)
of every lane, g = G / L, lane 0's first. A rank owns a contiguous block of lanes; ranks joined in
order give the same global batch for every world size that divides L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..basics.errors import DataError, RecipeError
from ..basics.keyed import Permutation, Stream
from ..curriculum.pacing import Position, Stage
from .manifest import Manifest, ShardEntry

_WINDOW_BITS, _LANE_BITS = 32, 16
_CHUNK = 512  # positions of a lane located together: 8 times cheaper than 4 at a time


@dataclass(frozen=True, slots=True)
class Places:
    """Where n pairs lie: ``shards`` (n,) indices into the manifest, ``samples`` (n,) inside each
    shard, ``visits`` (n,) the number of the traversal; all int64.
    """

    shards: np.ndarray
    samples: np.ndarray
    visits: np.ndarray


class LanePlan:
    """Which pairs a rank reads for any global batch. Costs O(shards of a lane) a pass."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        seed: int,
        world_size: int,
        rank: int,
        global_batch: int,
        shuffle_shards: int,
    ) -> None:
        """Raises RecipeError when world size, lanes and global batch do not divide one another."""
        lanes = manifest.lanes
        if lanes % world_size:
            raise RecipeError(
                f"{world_size} processes do not divide the {lanes} lanes of the shards: launch a "
                f"divisor of {lanes}, or prepare with another data.lanes",
                "data.lanes",
                "mismatch",
            )
        if global_batch % lanes:
            raise RecipeError(
                f"train.global_batch={global_batch} is not a multiple of the {lanes} lanes of the "
                "shards: every lane gives the same number of pairs to a batch",
                "train.global_batch",
                "mismatch",
            )
        if not 0 <= rank < world_size or shuffle_shards < 1:
            raise ValueError(f"bad rank={rank} of {world_size} or shuffle_shards={shuffle_shards}")
        self.entries: Sequence[ShardEntry] = manifest.shards
        self.num_lanes = lanes
        self.pairs_per_lane = global_batch // lanes
        self.shuffle_shards = shuffle_shards
        self.lanes = range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
        self._seed = seed
        tiers = np.array([entry.tier for entry in manifest.shards])
        self._counts = np.array([entry.count for entry in manifest.shards], dtype=np.int64)
        self._of_tier = {
            tier: np.flatnonzero(tiers == tier) for tier in range(1, manifest.tiers + 1)
        }
        # Two passes of every lane may be in use at once, at the seam between them, and one more is
        # looked into by who fetches ahead.
        self._order = lru_cache(maxsize=3 * len(self.lanes))(self._make_order)

    def check_stages(self, stages: Sequence[Stage]) -> None:
        """Raise DataError when the curriculum asks for a tier that the shards do not have."""
        wanted = {tier for stage in stages for tier in stage.tiers}
        if wanted != set(self._of_tier):
            raise DataError(
                f"the shards have {len(self._of_tier)} tiers, the recipe's curriculum.tiers is "
                f"{max(wanted)}: run prepare again, or set it back",
                "curriculum.tiers",
                "mismatch",
            )

    def lane_pairs(self, stage: Stage) -> int:
        """Pairs of a lane in one pass over the stage's tiers: the same for every lane."""
        shards = [self._of_tier[tier][:: self.num_lanes] for tier in stage.tiers]
        return sum(int(self._counts[ids].sum()) for ids in shards)

    def passes_begun(self, stage: Stage, num_batches: int) -> int:
        """Passes that the first ``num_batches`` batches of a stage have begun."""
        return -(-num_batches * self.pairs_per_lane // self.lane_pairs(stage))

    def rank_entries(self, stages: Sequence[Stage]) -> list[ShardEntry]:
        """The shards that this rank reads in ``stages``."""
        tiers = sorted({tier for stage in stages for tier in stage.tiers})
        ids = [self._of_tier[tier][lane :: self.num_lanes] for tier in tiers for lane in self.lanes]
        return [self.entries[index] for index in np.concatenate(ids)] if ids else []

    def locate(self, position: Position) -> Places:
        """Where this rank's pairs of one global batch lie, lane after lane."""
        first = position.batch * self.pairs_per_lane
        within = np.arange(first, first + self.pairs_per_lane, dtype=np.int64)
        passes, offsets = np.divmod(within, self.lane_pairs(position.stage))
        shards, samples = np.empty((2, len(self.lanes), len(within)), dtype=np.int64)
        for row, lane in enumerate(self.lanes):
            for number in np.unique(passes):
                now = passes == number
                order = self._order(position.stage, lane, int(number))
                shards[row, now], samples[row, now] = order.locate(offsets[now])
        visits = np.tile(position.visit_base + passes, len(self.lanes))
        return Places(shards.ravel(), samples.ravel(), visits)

    def window(self, position: Position) -> tuple[list[ShardEntry], int]:
        """The shards of the windows that this rank's pairs of a global batch lie in, and the first
        later batch in which a lane may read others: for who wants to fetch shards ahead.
        """
        lane_pairs = self.lane_pairs(position.stage)
        number, first = divmod(position.batch * self.pairs_per_lane, lane_pairs)
        last = min(first + self.pairs_per_lane, lane_pairs) - 1
        orders = [self._order(position.stage, lane, number) for lane in self.lanes]
        windows = [order.windows(first, last) for order in orders]
        end = number * lane_pairs + min(end for _, end in windows)
        ids = [int(index) for shards, _ in windows for index in shards]
        return [self.entries[i] for i in ids], max(position.batch + 1, end // self.pairs_per_lane)

    def _make_order(self, stage: Stage, lane: int, number: int) -> _LaneOrder:
        ids = [self._of_tier[tier][lane :: self.num_lanes] for tier in stage.tiers]
        shards = np.concatenate(ids)
        return _LaneOrder(
            shards, self._counts[shards], self.shuffle_shards, self._seed, stage.index, lane, number
        )


class _LaneOrder:
    """The order of one lane's pairs in one pass over one stage."""

    def __init__(
        self,
        shards: np.ndarray,
        counts: np.ndarray,
        shuffle_shards: int,
        seed: int,
        stage: int,
        lane: int,
        number: int,
    ) -> None:
        self._seed, self._number = seed, number
        self._window_shards = shuffle_shards
        self._lane_key = (stage << _LANE_BITS | lane) << _WINDOW_BITS
        order = self._permutation(len(shards), Stream.SHARD_ORDER, 0).at(np.arange(len(shards)))
        self._shards = shards[order]
        self._ends = np.cumsum(counts[order])
        self._starts = self._ends - counts[order]
        self._window_starts = self._starts[::shuffle_shards]
        self._window_ends = np.append(self._window_starts[1:], self._ends[-1])
        self._chunks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def locate(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard indices (n,) and samples in them (n,) of the pass's pairs at ``offsets`` (n,)."""
        shards, samples = np.empty_like(offsets), np.empty_like(offsets)
        numbers, inside = np.divmod(offsets, _CHUNK)
        for number in np.unique(numbers):
            now = numbers == number
            chunk_shards, chunk_samples = self._chunk(int(number))
            shards[now], samples[now] = chunk_shards[inside[now]], chunk_samples[inside[now]]
        return shards, samples

    def windows(self, first: int, last: int) -> tuple[np.ndarray, int]:
        """Shard indices of the windows from offset ``first`` to ``last``, and where they end."""
        low, high = np.searchsorted(self._window_ends, [first, last], side="right")
        shards = self._shards[low * self._window_shards : (high + 1) * self._window_shards]
        return shards, int(self._window_ends[high])

    def _chunk(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The places of neighbouring offsets, found together; only the latest two are kept."""
        chunk = self._chunks.get(number)
        if chunk is None:
            end = min((number + 1) * _CHUNK, int(self._ends[-1]))
            chunk = self._find(np.arange(number * _CHUNK, end))
            self._chunks = dict([*self._chunks.items()][-1:]) | {number: chunk}
        return chunk

    def _find(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        windows = np.searchsorted(self._window_ends, offsets, side="right")
        mixed = np.empty_like(offsets)
        for window in np.unique(windows).tolist():
            inside = windows == window
            start = self._window_starts[window]
            size = int(self._window_ends[window] - start)
            shuffle = self._permutation(size, Stream.PAIR_ORDER, window)
            mixed[inside] = start + shuffle.at(offsets[inside] - start)
        which = np.searchsorted(self._ends, mixed, side="right")
        return self._shards[which], mixed - self._starts[which]

    def _permutation(self, size: int, stream: Stream, window: int) -> Permutation:
        return Permutation(size, self._seed, stream, self._lane_key | window, self._number)
