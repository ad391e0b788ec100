"""Scores of candidates in parquet, resumable: parts while scoring, one table when all is scored."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .basics.errors import DataError
from .basics.failpoints import failpoint
from .basics.files import atomic_file
from .basics.keyed import content_id
from .candidates import CandidateSet
from .display.terminal import Terminal
from .ranks import Ranks
from .rewards import RewardModel, checked_scores

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
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer)
        with atomic_file(path) as file:
            file.write(buffer.getvalue().to_pybytes())
