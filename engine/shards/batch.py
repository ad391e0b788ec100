"""A batch of pairs as training takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from .sample import PairMeta


@dataclass(frozen=True)
class PairBatch:
    """n pairs. What has a row an image is ``[winners; losers]``, 2n rows.

    ``images`` are what the shards hold of them: scaled latents (2n, C, h, w) float16, moments
    (2n, 2C, h, w) float16, or pixels (2n, 3, H, W) uint8; ``prompts`` n captions; ``pair_ids``,
    ``visits`` and ``tiers`` (n,) int64; ``ranks`` (n, 2) int64, the winner's first;
    ``original_sizes`` and ``crops`` (2n, 2) int64, (height, width) and (top, left) in pixels, which
    SDXL is conditioned on.
    """

    images: torch.Tensor
    prompts: list[str]
    pair_ids: torch.Tensor
    visits: torch.Tensor
    tiers: torch.Tensor
    ranks: torch.Tensor
    original_sizes: torch.Tensor
    crops: torch.Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def collate(
        cls, metas: Sequence[PairMeta], images: np.ndarray, visits: np.ndarray
    ) -> PairBatch:
        """Put n pairs together: their records, ``images`` (2, n, ...), winners first, and the
        numbers of their traversals, ``visits`` (n,).
        """
        rows = torch.from_numpy(images).flatten(0, 1)
        return cls(
            images=rows if rows.is_floating_point() else rows.permute(0, 3, 1, 2),
            prompts=[meta.prompt for meta in metas],
            pair_ids=torch.tensor([meta.pair_id for meta in metas], dtype=torch.int64),
            visits=torch.from_numpy(np.array(visits, dtype=np.int64)),
            tiers=torch.tensor([meta.tier for meta in metas], dtype=torch.int64),
            ranks=torch.tensor([meta.ranks for meta in metas], dtype=torch.int64),
            original_sizes=_winners_first([meta.original_size for meta in metas]),
            crops=_winners_first([meta.crop for meta in metas]),
        )

    def split(self, micro: int) -> list[PairBatch]:
        """Consecutive parts of ``micro`` pairs, each winners first."""
        if micro < 1 or len(self) % micro:
            raise ValueError(f"micro={micro} does not divide the {len(self)} pairs of the batch")
        return [self._part(slice(at, at + micro)) for at in range(0, len(self), micro)]

    def pinned(self) -> PairBatch:
        """The same with its images in memory that a GPU copies from while the host goes on."""
        return replace(self, images=self.images.pin_memory())

    def _part(self, rows: slice) -> PairBatch:
        def images(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(0, (2, len(self)))[:, rows].flatten(0, 1)

        part = images(self.images)

        return PairBatch(
            images=part.pin_memory() if self.images.is_pinned() else part,
            prompts=self.prompts[rows],
            pair_ids=self.pair_ids[rows],
            visits=self.visits[rows],
            tiers=self.tiers[rows],
            ranks=self.ranks[rows],
            original_sizes=images(self.original_sizes),
            crops=images(self.crops),
        )


def _winners_first(values: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> torch.Tensor:
    """(2n, 2) int64 from n times (winner's, loser's)."""
    return torch.tensor(values, dtype=torch.int64).transpose(0, 1).flatten(0, 1)
