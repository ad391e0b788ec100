"""What stage 1 works on: records in parts, and where their pairs come from.

Sampled prompts (:mod:`.sampled`) and data sets that are already there (:mod:`.imported`) differ in
what stands here; scores, latents, shards and manifest are made of both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from ..curriculum.labelled import PairsMade
from ..display.terminal import Terminal
from ..models import Backbone
from ..ranks import Ranks
from ..rewards import Identity
from ..shards.manifest import RewardSource
from ..sources.left_out import KeptLeftOut, LeftOut
from ..sources.pictures import Loaded, Size, Tolerance
from .shard_set import TierShards

FoundScores = tuple[np.ndarray, np.ndarray, Sequence[str | None]]
"""Records (n,), their scores (n, K) float32, and why there are none of a record, or None."""


class Parts(Protocol):
    """N records, each a caption with K images, in parts that are scored and encoded whole.

    Image ``k`` of record ``r`` has the number ``r K + k``.
    """

    each: int
    """K."""
    resolution: Size
    """Height and width that all images have or are fitted to."""
    starts: np.ndarray
    """(parts + 1,) first record of each part, and N."""

    @property
    def content(self) -> str:
        """Hash of what the images are a function of: scores and latents are kept under it."""

    @property
    def captions(self) -> np.ndarray:
        """(N,) a number for each record that is the same where the caption is."""

    def caption(self, record: int) -> str:
        """The caption of a record."""

    def image_name(self, image: int) -> str:
        """What shards call an image."""

    def file_name(self, part: int) -> str:
        """What files that are kept of a part are called, but for the ending."""

    def describe(self, part: int) -> str:
        """How messages name a part."""

    def load(self, part: int, records: Sequence[int]) -> Iterator[Loaded]:
        """Some records of a part, given by their index in it in rising order."""

    def score_table(
        self, records: range, scores: np.ndarray, problems: Sequence[str | None], source: str
    ) -> pa.Table:
        """Scores (n, K) as they are kept on disk: a row an image, for people too."""

    def scores_in(self, table: pa.Table, source: str) -> FoundScores:
        """What a table holds of this ``source`` and need not be scored again; ValueError if it is
        no such table.
        """


def part_of(parts: Parts, record: int) -> int:
    """The part that a record is in."""
    return int(np.searchsorted(parts.starts, record, side="right")) - 1


def do_missing(
    label: str,
    images: Mapping[int, int],
    missing: Sequence[int],
    work: Callable[[int], None],
    ranks: Ranks,
    terminal: Terminal,
) -> None:
    """Do the ``missing`` ones of some parts, a share on each rank, until one is asked to stop.

    ``images`` are counted by part, for the progress.
    """
    total = sum(images.values())
    done = total - sum(images[part] for part in missing)
    with terminal.progress(label, total, done) as progress:
        for part in ranks.until_stopped(ranks.share(missing)):
            work(part)
            progress.advance(min(images[part] * ranks.world_size, total - progress.done))
    ranks.meet()


@dataclass(frozen=True)
class Ranked:
    """Parts whose images are scored, (N, K) float32 with NaN for none, and paired."""

    parts: Parts
    scores: np.ndarray
    made: PairsMade


@dataclass(frozen=True)
class Outcome:
    """What became of parts: ``unreadable`` are records, ``written`` the rows of
    :data:`~cdpo.engine.curriculum.pairs.PAIR` that are in shards, None while nobody knows, and
    ``remarks`` what there is to say of images, each with a detail.
    """

    ranked: Ranked
    unreadable: Mapping[int, str]
    written: np.ndarray | None = None
    remarks: Mapping[int, Sequence[tuple[str, str]]] = field(default_factory=dict)


class PairSource(Protocol):
    """What a recipe's `prepare.source` stands for."""

    rows: int | None
    """Of data that were read: their number."""
    prompts_left_out: KeptLeftOut
    """What of the recipe's prompts is not used."""

    def describe(self) -> list[tuple[str, str]]:
        """What will be done, for the head of the terminal."""

    def inputs(self) -> dict[str, Any]:
        """Its choices that the shards are a function of; the keys are part of their hash."""

    def ranked_by(self) -> RewardSource:
        """What the manifest says of the reward, with a hash of the weights that it holds now."""

    def prompts_used(self) -> Iterable[str]:
        """The prompts or captions of its images, which may repeat."""

    def reward(self) -> Identity | None:
        """What the reward that scores is by content, loaded only if that is not known; None where
        none does.
        """

    def rank(self, backbone: Backbone, tolerance: Tolerance) -> Ranked:
        """Images scored and paired, the same on every rank. DataError if they give no pair."""

    def name_left_out(self, outcome: Outcome, left_out: LeftOut) -> None:
        """Note everything of the data that is not used as it stands."""

    def sheet_rows(
        self, ranked: Ranked, pairs: np.ndarray, fills: Sequence[TierShards], count: int
    ) -> Iterator[tuple[int, list[int]]]:
        """``count`` rows of the contact sheet: the number of a pair, for whose caption the row is,
        and the images to show beside those of its pairs.
        """
