"""Scores in parquet, resumable: a file a part while scoring, one table when all is scored."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow.parquet as pq

from ..basics.errors import DataError, told_by
from ..basics.failpoints import failpoint
from ..basics.files import replacing
from ..display.terminal import Terminal
from ..ranks import Ranks
from ..rewards import RewardModel, checked_scores
from ..sources.pictures import Tolerance
from .parts import Parts, do_missing

RECORDS_AT_ONCE = 4096  # written to the table together
Item = TypeVar("Item")


class Scoring:
    """Scores every image of some parts with one reward.

    A part is on disk whole or not at all. ``source`` names what the scores are of (reward and
    images); those of another source are ignored on resume and replaced.
    """

    def __init__(self, run_dir: Path, source: str, parts: Parts, ranks: Ranks) -> None:
        self.table_path = run_dir / "scores.parquet"
        self.folder = run_dir / "scores"
        self.source = source
        self.parts = parts
        self.ranks = ranks

    def run(
        self, reward: RewardModel, images_per_call: int, tolerance: Tolerance, terminal: Terminal
    ) -> np.ndarray:
        """Scores (N, K) float32 of the images of all records, on every rank, NaN where there is
        none. What is on disk is not computed again.

        Raises:
            DataError: for a damaged file of scores, for what a reward must not return, and when
                more records are unreadable than ``tolerance`` allows.
        """
        missing = self.ranks.on_first(self._missing)
        sizes = np.diff(self.parts.starts) * self.parts.each
        own = tolerance.copy()

        def score(part: int) -> None:
            self._score_part(part, reward, images_per_call, own)
            failpoint("prepare.part")

        images = dict(enumerate(sizes.tolist()))
        do_missing("score", images, missing, score, self.ranks, terminal)
        scores, problems = self.ranks.on_first(self._merge)
        for record, problem in problems.items():
            tolerance.note(record, problem)
        failpoint("prepare.scored")
        return np.asarray(scores)

    def _missing(self) -> list[int]:
        starts = self.parts.starts
        _, known, _ = self._read()
        return [n for n in range(len(starts) - 1) if not known[starts[n] : starts[n + 1]].all()]

    def _score_part(
        self, part: int, reward: RewardModel, images_per_call: int, tolerance: Tolerance
    ) -> None:
        first, end = self.parts.starts[part : part + 2].tolist()
        scores = np.full((end - first, self.parts.each), np.nan, np.float32)
        problems: list[str | None] = [None] * (end - first)
        loaded = self.parts.load(part, range(end - first))
        for batch in batches(loaded, max(1, images_per_call // self.parts.each)):
            for record in batch:
                if record.problem is not None:
                    problems[record.index] = record.problem
                    tolerance.note(first + record.index, record.problem)
            good = [record for record in batch if record.problem is None]
            images = [picture.image for record in good for picture in record.pictures]
            prompts = [record.caption for record in good for _ in record.pictures]
            if images:
                found = checked_scores(reward.score(images, prompts), len(images))
                scores[[record.index for record in good]] = found.reshape(len(good), -1)
                failpoint("prepare.scoring")
        table = self.parts.score_table(range(first, end), scores, problems, self.source)
        with replacing(self.folder / f"{self.parts.file_name(part)}.parquet") as file:
            pq.write_table(table, file)

    def _merge(self) -> tuple[np.ndarray, dict[int, str]]:
        """All scores as one table, in the order of the records."""
        scores, _, problems = self._read()
        every = range(len(scores))
        with replacing(self.table_path) as file:
            writer = None
            for start in range(0, len(scores), RECORDS_AT_ONCE):
                some = every[start : start + RECORDS_AT_ONCE]
                why = [problems.get(record) for record in some]
                own = scores[some.start : some.stop]
                table = self.parts.score_table(some, own, why, self.source)
                writer = writer or pq.ParquetWriter(file, table.schema)
                writer.write_table(table)
            if writer is not None:
                writer.close()
        shutil.rmtree(self.folder, ignore_errors=True)  # with half a part of a run that was killed
        return scores, dict(sorted(problems.items()))

    def _read(self) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Scores (N, K), which records (N,) have been scored, and why some could not be."""
        count = int(self.parts.starts[-1])
        scores = np.full((count, self.parts.each), np.nan, np.float32)
        known, problems = np.zeros(count, bool), {}
        for path in [self.table_path, *sorted(self.folder.glob("*.parquet"))]:
            if not path.exists():
                continue
            try:
                records, found, why = self.parts.scores_in(pq.read_table(path), self.source)
                scores[records] = found
            except (ValueError, OSError) as error:  # pyarrow's own errors are one or the other
                raise DataError(
                    f"scores: {path} cannot be read ({told_by(error)}): remove it",
                    str(path),
                    "damaged",
                ) from None
            known[records] = True
            named = zip(records.tolist(), why, strict=True)
            problems.update({record: problem for record, problem in named if problem is not None})
        return scores, known, problems


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items in lists of ``size``."""
    batch: list[Item] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
