"""Pairs of candidates that the recipe's model draws: a record is a prompt, and so is a part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..basics.errors import DataError
from ..basics.keyed import Stream, content_id
from ..curriculum.labelled import UNSCORED
from ..display.terminal import Terminal
from ..models import Backbone
from ..ranks import Ranks
from ..recipe import Recipe
from ..rewards import Identity
from ..shards.manifest import RewardSource
from ..sources.left_out import KeptLeftOut, LeftOut
from ..sources.pictures import Loaded, Picture, Size, Tolerance
from ..sources.prompts import read_prompts
from .candidate_files import image_id
from .candidates import CandidateSampler, CandidateSet, drawn_by
from .parts import FoundScores, Outcome, Ranked
from .rankers import make_ranker
from .shard_set import TierShards

SCORES = pa.schema(
    [
        ("prompt_id", pa.uint64()),
        ("prompt", pa.string()),
        ("candidate", pa.int32()),
        ("score", pa.float32()),
        ("source", pa.string()),
    ]
)


class CandidateParts:
    """The candidates of some prompts."""

    def __init__(self, prompts: Sequence[str], images: CandidateSet, resolution: Size) -> None:
        self.prompts = prompts
        self.images = images
        self.resolution = resolution
        self.each = int(images.meta["count"])
        self.starts = np.arange(len(prompts) + 1)
        self.content = images.fingerprint
        self.captions = self.starts[:-1]
        self._records = {prompt: record for record, prompt in enumerate(prompts)}

    def caption(self, record: int) -> str:
        return self.prompts[record]

    def image_name(self, image: int) -> str:
        record, place = divmod(image, self.each)
        return image_id(self.prompts[record], place)

    def file_name(self, part: int) -> str:
        return f"{content_id(self.prompts[part]):016x}"

    def describe(self, part: int) -> str:
        return repr(self.prompts[part])

    def load(self, part: int, records: Sequence[int]) -> Iterator[Loaded]:
        images = self.images.read(self.prompts[part])
        pictures = tuple(Picture(image, self.resolution, (0, 0)) for image in images)
        yield Loaded(0, self.prompts[part], pictures)

    def score_table(
        self, records: range, scores: np.ndarray, problems: Sequence[str | None], source: str
    ) -> pa.Table:
        prompts = [self.prompts[record] for record in records for _ in range(self.each)]
        columns = {
            "prompt_id": pa.array([content_id(prompt) for prompt in prompts], pa.uint64()),
            "prompt": prompts,
            "candidate": pa.array(list(range(self.each)) * len(records), pa.int32()),
            "score": scores.reshape(-1),
            "source": [source] * len(prompts),
        }
        return pa.table(columns, schema=SCORES)

    def scores_in(self, table: pa.Table, source: str) -> FoundScores:
        """Whatever prompts it is of. A prompt without any score is asked for again: what failed
        is rarely its images.
        """
        if table.schema != SCORES:
            raise ValueError("it is no table of scores")
        found: dict[str, list[float]] = {}
        for row in table.to_pylist():
            if row["source"] == source:
                own = found.setdefault(row["prompt"], [])
                if row["candidate"] != len(own):
                    raise ValueError(f"candidate {len(own)} of {row['prompt']!r} is missing")
                own.append(row["score"])
        mine = [p for p in found if p in self._records and np.isfinite(found[p]).any()]
        records = np.array([self._records[p] for p in mine], np.int64)
        scores = np.array([found[p] for p in mine], np.float32).reshape(len(mine), self.each)
        return records, scores, [None] * len(mine)


class SampledPairs:
    """`prepare.source` of type `generate` or `masked`."""

    def __init__(self, ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
        self.ranks = ranks
        self.recipe = recipe
        self.terminal = terminal
        self.rows: int | None = None
        self.prompts_left_out = KeptLeftOut()
        self.prompts = read_prompts(recipe.prompts, recipe.seed, self.prompts_left_out).train
        self.ranker = make_ranker(recipe, ranks, terminal)

    def describe(self) -> list[tuple[str, str]]:
        sampler = self.recipe.prepare.sampler
        images, ranked_by = self.ranker.describe()
        return [
            (
                "sample",
                f"{len(self.prompts)} prompts x {images}, "
                f"{sampler.steps} steps, guidance {sampler.guidance:g}",
            ),
            ("rank by", ranked_by),
        ]

    def inputs(self) -> dict[str, Any]:
        decisive = {"candidates_per_prompt", "sampler", "precision"}
        return {
            "prompts": self.prompts,
            "prepare": self.recipe.prepare.model_dump(mode="json", include=decisive),
            **self.ranker.inputs(),
        }

    def ranked_by(self) -> RewardSource:
        return self.ranker.source()

    def prompts_used(self) -> Sequence[str]:
        return self.prompts

    def reward(self) -> Identity | None:
        return self.ranker.reward()

    def rank(self, backbone: Backbone, tolerance: Tolerance) -> Ranked:
        images = self._sample(backbone)
        parts = CandidateParts(self.prompts, images, self.recipe.model.resolution)
        scores, made = self.ranker.rank(parts)
        if dropped := made.counts[UNSCORED]:
            self.terminal.warn(f"{dropped} candidates had no finite reward and were dropped")
        if made.tied:
            first = parts.caption(made.tied[0] // parts.each)
            self.terminal.warn(
                f"{len(made.tied)} prompts gave no pair: their candidates all tie, e.g. {first!r}"
            )
        if not len(made.pairs):
            raise DataError(
                f"no pairs in {len(self.prompts)} prompts: all candidates tie, have no finite "
                f"reward or differ by less than curriculum.min_score_gap="
                f"{self.recipe.curriculum.min_score_gap}",
                "curriculum.min_score_gap",
                "empty",
            )
        return Ranked(parts, scores, made)

    def _sample(self, backbone: Backbone) -> CandidateSet:
        recipe = self.recipe
        sampler = CandidateSampler(
            backbone,
            backbone.denoiser,
            Path(recipe.run_dir) / "candidates",
            seed=recipe.seed,
            stream=Stream.CANDIDATE_NOISE,
            count=self.ranker.count,
            sampler=recipe.prepare.sampler,
            resolution=recipe.model.resolution,
            batch_size=recipe.prepare.batch_size,
            made_by={
                **drawn_by(recipe.model, backbone),
                "precision": recipe.prepare.precision,
                **self.ranker.made_by,
            },
            starts=self.ranker.starts,
        )
        sampler.run(self.prompts, self.ranks, self.terminal, "sample")
        return sampler.images

    def name_left_out(self, outcome: Outcome, left_out: LeftOut) -> None:
        """There are no data but the prompts."""

    def sheet_rows(
        self, ranked: Ranked, pairs: np.ndarray, fills: Sequence[TierShards], count: int
    ) -> Iterator[tuple[int, list[int]]]:
        """The first prompts."""
        records = pairs["winner"] // ranked.parts.each
        prompts, firsts = np.unique(records, return_index=True)
        for prompt, first in zip(prompts[:count], firsts, strict=False):
            yield int(first), self.ranker.shown(ranked.scores, pairs[records == prompt])
