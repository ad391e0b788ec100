"""Scores of candidates in parquet, resumable: parts while scoring, one table when all is scored.

First pass over an imported data set: the reward scores its images, a part on disk at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..basics.errors import DataError
from ..basics.failpoints import failpoint
from ..basics.files import replacing
from ..basics.keyed import content_id
from ..display.terminal import Terminal
from ..ranks import Ranks
from ..rewards import RewardModel, checked_scores
from ..sources.index import Index
from ..sources.pictures import Loaded, Size, Tolerance, load_records
from ..sources.rows import RowReader
from .candidates import CandidateSet

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.uint64()),
        ("prompt", pa.string()),
        ("candidate", pa.int32()),
        ("score", pa.float32()),
        ("source", pa.string()),
    ]
)
PROMPTS_PER_PART = 256


class Scoring:
    """Scores every candidate of some prompts with one reward.

    ``source`` names what the scores are of (reward and candidates); rows of another source are
    ignored on resume and replaced.
    """

    def __init__(self, run_dir: Path, source: str, ranks: Ranks) -> None:
        self.table_path = run_dir / "scores.parquet"
        self.parts = run_dir / "scores"
        self.source = source
        self.ranks = ranks

    def done(self) -> dict[str, np.ndarray]:
        """Scores (M,) float32 by prompt, of everything scored so far."""
        found: dict[str, np.ndarray] = {}
        for path in [self.table_path, *sorted(self.parts.glob("*.parquet"))]:
            if path.exists():
                found.update(self._read(path))
        return found

    def run(
        self, reward: RewardModel, images: CandidateSet, prompts: Sequence[str], terminal: Terminal
    ) -> dict[str, np.ndarray]:
        """Scores of all prompts, on every rank; those already on disk are not computed again,
        unless the reward failed on all images of a prompt.
        """
        done = self.ranks.on_first(self.done)
        missing = [p for p in prompts if p not in done or not np.isfinite(done[p]).any()]
        per_prompt = images.meta["count"]
        total = len(prompts) * per_prompt
        self.parts.mkdir(parents=True, exist_ok=True)
        mine = list(self.ranks.share(missing))
        scores: dict[str, np.ndarray] = {}
        with terminal.progress("score", total, total - len(missing) * per_prompt) as progress:
            for prompt in self.ranks.until_stopped(mine):
                own = images.read(prompt)
                scores[prompt] = checked_scores(reward.score(own, [prompt] * len(own)), len(own))
                progress.advance(per_prompt * self.ranks.world_size)
                if len(scores) == PROMPTS_PER_PART:
                    self._write_part(scores)
                    scores = {}
                failpoint("prepare.scoring")
        if scores:
            self._write_part(scores)
        self.ranks.meet()
        return self.ranks.on_first(lambda: self._merge(prompts))

    def _write_part(self, scores: dict[str, np.ndarray]) -> None:
        name = f"part-{self.ranks.rank:04d}-{content_id(*scores):016x}.parquet"
        self._write(self.parts / name, scores)

    def _merge(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        scores = self.done()
        scores = {prompt: scores[prompt] for prompt in prompts}
        self._write(self.table_path, scores)
        shutil.rmtree(self.parts)  # whole: a run that was killed may have left half a part
        return scores

    def _read(self, path: Path) -> Iterable[tuple[str, np.ndarray]]:
        try:
            table = pq.read_table(path)
            if table.schema != SCHEMA:
                raise ValueError("it is no table of scores")
            by_prompt: dict[str, list[float]] = {}
            for row in table.to_pylist():
                if row["source"] == self.source:
                    scores = by_prompt.setdefault(row["prompt"], [])
                    if row["candidate"] != len(scores):
                        raise ValueError(f"candidate {len(scores)} of {row['prompt']!r} is missing")
                    scores.append(row["score"])
        except (ValueError, OSError) as error:  # pyarrow's own errors are one or the other
            raise DataError(f"scores: {path} cannot be read ({error}): remove it") from None
        for prompt, scores in by_prompt.items():
            yield prompt, np.asarray(scores, dtype=np.float32)

    def _write(self, path: Path, scores: dict[str, np.ndarray]) -> None:
        prompts = [prompt for prompt, values in scores.items() for _ in values]
        table = pa.table(
            {
                "prompt_id": pa.array([content_id(p) for p in prompts], pa.uint64()),
                "prompt": prompts,
                "candidate": pa.array(
                    [i for v in scores.values() for i in range(len(v))], pa.int32()
                ),
                "score": np.concatenate([*scores.values(), np.zeros(0, np.float32)]),
                "source": pa.array([self.source] * len(prompts), pa.string()),
            },
            schema=SCHEMA,
        )
        with replacing(path) as file:
            pq.write_table(table, file)


SOURCE = b"scores of"  # key of the table's metadata: which images, which reward


class ImportScoring:
    """Scores every image of a source; a part (some hundred records) is on disk whole or not at all.

    ``source`` names what the scores are of; tables of another source are made again.
    """

    def __init__(
        self, run_dir: Path, source: str, index: Index, reader: RowReader, ranks: Ranks
    ) -> None:
        self.table_path = run_dir / "scores.parquet"
        self.parts = run_dir / "scores"
        self.source = source
        self.index = index
        self.reader = reader
        self.ranks = ranks
        self.images_each = len(reader.images)

    def run(
        self,
        reward: RewardModel,
        resolution: Size,
        batch_size: int,
        tolerance: Tolerance,
        terminal: Terminal,
    ) -> np.ndarray:
        """Scores (N, K) float32 of the images of all records, on every rank, NaN where there is
        none. The images are those that are trained on: fitted to ``resolution``.
        """
        if not self.ranks.on_first(lambda: self._is_of_source(self.table_path)):
            self._score_missing(reward, resolution, batch_size, tolerance.copy(), terminal)
            self.ranks.meet()
            self.ranks.on_first(self._merge)
        table = pq.read_table(self.table_path, columns=["score", "problem"])
        for problem in table.column("problem").drop_null().to_pylist():
            tolerance.note(problem)
        return table.column("score").to_numpy().reshape(len(self.index), self.images_each)

    def _score_missing(
        self,
        reward: RewardModel,
        resolution: Size,
        batch_size: int,
        tolerance: Tolerance,
        terminal: Terminal,
    ) -> None:
        self.parts.mkdir(parents=True, exist_ok=True)
        numbers = range(self.index.num_parts)
        missing = self.ranks.on_first(
            lambda: [n for n in numbers if not self._is_of_source(self._path(n))]
        )
        sizes = np.diff(self.index.starts) * self.images_each
        total, done = int(sizes.sum()), int(sizes.sum() - sizes[missing].sum())
        with terminal.progress("score", total, done, "images") as progress:
            for number in self.ranks.until_stopped(self.ranks.share(missing)):
                self._score_part(number, reward, resolution, batch_size, tolerance)
                failpoint("prepare.part")
                scored = int(sizes[number]) * self.ranks.world_size
                progress.advance(min(scored, total - progress.done))

    def _score_part(
        self,
        number: int,
        reward: RewardModel,
        resolution: Size,
        batch_size: int,
        tolerance: Tolerance,
    ) -> None:
        part = self.index.part(number)
        count = len(part.captions)
        scores = np.full((count, self.images_each), np.nan, np.float32)
        problems: list[str | None] = [None] * count
        loaded = load_records(self.reader, part, range(count), resolution)
        for batch in batches(loaded, max(1, batch_size // self.images_each)):
            for record in batch:
                if record.problem is not None:
                    problems[record.index] = record.problem
                    tolerance.note(record.problem)
            good = [record for record in batch if record.problem is None]
            images = [picture.image for record in good for picture in record.pictures]
            prompts = [record.caption for record in good for _ in record.pictures]
            if images:
                found = checked_scores(reward.score(images, prompts), len(images))
                rows = [record.index for record in good]
                scores[rows] = found.reshape(len(good), self.images_each)
        self._write(number, part.file, scores, problems)

    def _write(
        self, number: int, file: int, scores: np.ndarray, problems: list[str | None]
    ) -> None:
        """A row an image: for people too, who may want to see which image got which score."""
        each, first = self.images_each, int(self.index.starts[number])
        rows = len(problems)
        places = self.index.part(number).places
        columns = {
            "file": pa.array([self.reader.files.name(file)] * (rows * each), pa.string()),
            "row": pa.array(np.repeat([place.number for place in places], each), pa.int64()),
            "image": pa.array(np.tile(np.array(self.reader.images), rows), pa.string()),
            "record": pa.array(np.repeat(np.arange(first, first + rows), each), pa.int64()),
            "score": pa.array(scores.reshape(-1), pa.float32()),
            # Once a record, at its first image: they are counted.
            "problem": pa.array(
                [problem if place == 0 else None for problem in problems for place in range(each)],
                pa.string(),
            ),
        }
        table = pa.table(columns).replace_schema_metadata({SOURCE: self.source})
        with replacing(self._path(number)) as out:
            pq.write_table(table, out)

    def _merge(self) -> None:
        """All parts as one table, in the order of the source, a part in memory at a time."""
        schema = pq.read_schema(self._path(0))
        with replacing(self.table_path) as file, pq.ParquetWriter(file, schema) as writer:
            for number in range(self.index.num_parts):
                writer.write_table(pq.read_table(self._path(number)))
        shutil.rmtree(self.parts)

    def _is_of_source(self, path: Path) -> bool:
        try:
            metadata = pq.read_schema(path).metadata or {}
        except (OSError, pa.ArrowException):
            return False
        return bool(metadata.get(SOURCE) == self.source.encode())

    def _path(self, number: int) -> Path:
        return self.parts / f"part-{number:08d}.parquet"


def batches(loaded: Iterator[Loaded], size: int) -> Iterator[list[Loaded]]:
    """Records in lists of ``size``."""
    batch: list[Loaded] = []
    for record in loaded:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
