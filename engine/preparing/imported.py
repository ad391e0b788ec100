"""Pairs of preference data that is already there: a record is a row that says something.

The data set is read in a stream, twice: once for scores (not at all where they come with it), once
for the latents of the images that are in pairs. In between there are numbers on disk and in memory,
some hundred bytes a record; images and captions are never held. Its parts are a function of the
source alone, and so are the shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..curriculum.labelled import PairsMade, labelled_pairs, ranked_pairs
from ..display.terminal import Terminal
from ..models import Backbone
from ..ranks import Ranks
from ..recipe import Generate, Masked, Paired, Recipe
from ..rewards import Identity, RewardModel, known_identity, load_reward
from ..shards.manifest import RewardSource
from ..sources import open_source
from ..sources.index import Index, images_seen, open_index
from ..sources.left_out import NAME, KeptLeftOut, LeftOut
from ..sources.pictures import Loaded, Size, Tolerance, load_records
from ..sources.prompts import read_prompts
from ..sources.rows import RowReader
from .parts import FoundScores, Outcome, Ranked
from .scores import Scoring
from .shard_set import TierShards

UNREADABLE, NOT_TAKEN = "unreadable images", "in no pair that is taken"
SOURCE = b"scores of"  # key of the metadata of a table of scores: which images, which reward


class SourceParts:
    """The images of a source, fitted to ``resolution``: those that are trained on."""

    def __init__(self, index: Index, reader: RowReader, resolution: Size, content: str) -> None:
        self.index = index
        self.reader = reader
        self.resolution = resolution
        self.each = len(reader.images)
        self.starts = index.starts
        self.content = content

    @cached_property
    def captions(self) -> np.ndarray:
        return self.index.prompt_ids()

    def caption(self, record: int) -> str:
        return self.index.caption(record)

    def image_name(self, image: int) -> str:
        """Its id or path, else file, row and place of it."""
        record, place = divmod(image, self.each)
        names = self.index.value(record, "names")
        if names:
            return str(names[place])
        file = self.reader.files.name(self.index.value(record, "file"))
        return f"{file}#{self.index.value(record, 'number')}/{place}"

    def file_name(self, part: int) -> str:
        return f"part-{part:08d}"

    def describe(self, part: int) -> str:
        return self.reader.files.name(self.index.part(part).file)

    def load(self, part: int, records: Sequence[int]) -> Iterator[Loaded]:
        return load_records(self.reader, self.index.part(part), records, self.resolution)

    def score_table(
        self, records: range, scores: np.ndarray, problems: Sequence[str | None], source: str
    ) -> pa.Table:
        own, each = slice(records.start, records.stop), self.each
        files, rows = self._places
        names = [self.reader.files.name(file) for file in files[own].tolist()]
        columns = {
            "file": pa.array([name for name in names for _ in range(each)], pa.string()),
            "row": pa.array(np.repeat(rows[own], each), pa.int64()),
            "image": pa.array(np.tile(np.array(self.reader.images), len(names)), pa.string()),
            "record": pa.array(np.repeat(np.asarray(records), each), pa.int64()),
            "score": pa.array(scores.reshape(-1), pa.float32()),
            # Once a record, at its first image.
            "problem": pa.array(
                [why if place == 0 else None for why in problems for place in range(each)],
                pa.string(),
            ),
        }
        return pa.table(columns).replace_schema_metadata({SOURCE: source})

    def scores_in(self, table: pa.Table, source: str) -> FoundScores:
        if (table.schema.metadata or {}).get(SOURCE) != source.encode():
            return np.zeros(0, np.int64), np.zeros((0, self.each), np.float32), []
        records, problems = table["record"].to_numpy(), table["problem"].to_pylist()
        scores = table["score"].to_numpy().reshape(-1, self.each)
        return records[:: self.each], scores, problems[:: self.each]

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        return self.index.numbers("file"), self.index.numbers("number")


class ImportedPairs:
    """`prepare.source` of type `paired` or `ranked`."""

    def __init__(self, ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
        assert not isinstance(recipe.prepare.source, Generate | Masked)
        self.ranks = ranks
        self.recipe = recipe
        self.terminal = terminal
        self.spec = recipe.prepare.source
        self.prompts_left_out = KeptLeftOut()
        sets = read_prompts(recipe.prompts, recipe.seed, self.prompts_left_out)
        not_trained_on = [*sets.heldout, *sets.validation]
        self.reader = ranks.on_first(lambda: open_source(self.spec))
        self.folder = Path(recipe.run_dir) / "source"
        self.facts = ranks.on_first(
            lambda: open_index(self.folder, self.reader, self.spec, not_trained_on)
        )
        self.rows: int | None = self.facts.rows
        self.index = Index(self.folder, self.facts)
        seen = ranks.on_first(lambda: images_seen(self.index, self.reader.files))
        self.content = hashlib.sha256(f"{self.facts.content} {seen}".encode()).hexdigest()
        self.given = self._given_scores()

    def describe(self) -> list[tuple[str, str]]:
        files = self.reader.files
        scored_by = self.recipe.reward.label
        return [
            (
                "import",
                f"{self.facts.rows} rows of {len(files.paths)} {files.kind} from {self.spec.path}",
            ),
            ("scores", f"given as {self.given}" if self.given else scored_by),
        ]

    def _given_scores(self) -> str | None:
        """The columns of scores that come with the data, None where the reward is to score."""
        if isinstance(self.spec, Paired):
            return ", ".join(self.spec.scores) if self.spec.scores else None
        return self.spec.score

    def inputs(self) -> dict[str, Any]:
        return {
            "source": self.spec.model_dump(mode="json", exclude={"path", "max_unreadable"}),
            "content": self.content,
            "reward": None if self.given else self.recipe.reward.identity(),
        }

    def ranked_by(self) -> RewardSource:
        if self.given:
            return RewardSource(type="given", path=self.given, fingerprint=self.facts.content)
        spec, weights = self.recipe.reward, self._reward.identity["weights"]
        return RewardSource(type=spec.type, path=spec.source, fingerprint=weights)

    def reward(self) -> Identity | None:
        if self.given:
            return None
        known = None if "_reward" in vars(self) else known_identity(self.recipe.reward)
        return known or self._reward.identity

    @cached_property
    def _reward(self) -> RewardModel:
        return load_reward(self.recipe.reward, self.ranks.device)

    def prompts_used(self) -> Iterator[str]:
        parts = (self.index.part(number) for number in range(self.index.num_parts))
        return (caption for part in parts for caption in part.captions)

    def rank(self, backbone: Backbone, tolerance: Tolerance) -> Ranked:
        resolution = self.recipe.model.resolution
        parts = SourceParts(self.index, self.reader, resolution, self.content)
        scores = self._scores(parts, tolerance)
        made = self._pair(parts, scores)
        return Ranked(parts, scores, made)

    def _scores(self, parts: SourceParts, tolerance: Tolerance) -> np.ndarray:
        if self.given:
            return self.index.numbers("scores")
        recipe, (height, width) = self.recipe, parts.resolution
        source = f"{parts.content[:16]} {height}x{width} {self._reward.fingerprint}"
        scoring = Scoring(Path(recipe.run_dir), source, parts, self.ranks)
        return scoring.run(self._reward, recipe.reward.images_per_call, tolerance, self.terminal)

    def _pair(self, parts: SourceParts, scores: np.ndarray) -> PairsMade:
        curriculum, numbers = self.recipe.curriculum, self.index.numbers
        if isinstance(self.spec, Paired):
            asked = self.spec.on_disagreement
            return labelled_pairs(numbers("id"), numbers("winner"), scores, asked, curriculum)
        captions, seed = parts.captions, self.recipe.seed
        return ranked_pairs(captions, scores[:, 0], parts.caption, curriculum, seed)

    def name_left_out(self, outcome: Outcome, left_out: LeftOut) -> None:
        with (self.folder / NAME).open(encoding="utf-8", newline="") as lines:
            next(lines)
            left_out.copy(lines)
        made, each, known = outcome.ranked.made, len(self.reader.images), set(outcome.unreadable)
        for record, problem in sorted(outcome.unreadable.items()):
            file, where = self._place(record)
            column, _, why = problem.partition(f" {where}: ")[2].partition(": ")
            left_out.leave_out(file, where, UNREADABLE, column, why)
        for reason, records in made.lost.items():
            for record in records.tolist():
                if record not in known:
                    detail = _shown(outcome.ranked.scores[record])
                    left_out.leave_out(*self._place(record), reason, detail=detail)
            known.update(records.tolist())
        if outcome.written is None:
            return
        sides = [outcome.written[side] // each for side in ("winner", "loser")]
        used = set(np.unique(np.concatenate(sides)).tolist())
        for record in range(len(self.index)):
            if record not in used and record not in known:
                left_out.leave_out(*self._place(record), NOT_TAKEN)
        for reason, records in made.remarks.items():
            for record in filter(used.__contains__, records.tolist()):
                detail = _shown(outcome.ranked.scores[record])
                left_out.remark(*self._place(record), reason, detail=detail)
        for image, remarks in sorted(outcome.remarks.items()):
            record, place = divmod(image, each)
            for reason, detail in remarks if record in used else ():
                column = self.reader.images[place]
                left_out.remark(*self._place(record), reason, column, detail)

    def _place(self, record: int) -> tuple[str, str]:
        """File and row, as people are told."""
        file = self.reader.files.name(self.index.value(record, "file"))
        return file, self.index.value(record, "where")

    def sheet_rows(
        self, ranked: Ranked, pairs: np.ndarray, fills: Sequence[TierShards], count: int
    ) -> Iterator[tuple[int, list[int]]]:
        """From each tier in turn, as they lie in its first shard; a caption may have thousands of
        images.
        """
        firsts = [fill.pairs[fill.fill.members(0)] for fill in fills]
        turns = ((firsts[turn % len(firsts)], turn // len(firsts)) for turn in range(count))
        return ((int(own[place]), []) for own, place in turns if place < len(own))


def _shown(scores: np.ndarray) -> str:
    return " ".join(f"{score:g}" for score in scores.tolist())


def listed(counts: Mapping[str, int]) -> str:
    """``12 ties, 3 held-out prompt``."""
    return ", ".join(f"{n} {reason}" for reason, n in counts.items() if n) or "none left out"
