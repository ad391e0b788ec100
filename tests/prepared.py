"""Stage 1 run in this process, and what it wrote."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import preferences
import pyarrow.parquet as pq
import webdataset
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.preparing.preparation import Preparation
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.shards.sample import PairMeta
from PIL import Image

ROWS = [preferences.judged(number) for number in range(60)]
DECIDED = [row for row in ROWS if row.label_0 != 0.5]
OVERRIDES = {
    "sampled": (),
    "masked": (
        "prepare.source.type=masked",
        "prepare.source.fractions=[0.9, 0.5, 0.1]",
        "prepare.candidates_per_prompt=4",
        "curriculum.pairs_per_prompt_per_tier=3",
        "reward.path=nowhere",  # it is not loaded
    ),
    "paired": (
        "prepare.source.type=paired",
        "curriculum.difficulty=score_gap",
        "curriculum.binning=quantile",
        "prepare.source.on_disagreement=swap",
    ),
}
"""Of the tiny recipe, by the kind of source."""


def prepare(recipe: Recipe, ranks: Ranks, terminal: Terminal | None = None) -> Path:
    """Run stage 1; returns the folder of shards."""
    preparation = Preparation(ranks, recipe, terminal or Terminal(enabled=False))
    assert not preparation.is_finished
    preparation.run()
    return preparation.shards_dir


def is_finished(recipe: Recipe, ranks: Ranks) -> bool:
    return bool(Preparation(ranks, recipe, Terminal(enabled=False)).is_finished)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def named(run_dir: Path) -> list[dict[str, str]]:
    """The lines of the run's list of what is not used as it stands."""
    with (run_dir / "left_out.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def pairs_of(shards: Path) -> list[tuple[PairMeta, np.ndarray]]:
    """Everything in the shards, through webdataset's own reader."""
    found = []
    for path in sorted(shards.glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False):
            meta = PairMeta.model_validate_json(sample["json"])
            found.append((meta, np.load(io.BytesIO(sample["latents.npy"]))))
    return found


def scores_of(run_dir: str | Path) -> dict[str, np.ndarray]:
    """Scores by prompt, as stage 1 wrote them."""
    found: dict[str, list[float]] = {}
    for row in pq.read_table(Path(run_dir) / "scores.parquet").to_pylist():
        found.setdefault(row["prompt"], []).append(row["score"])
    return {prompt: np.asarray(values) for prompt, values in found.items()}


def candidates_of(run_dir: str | Path) -> dict[str, list[Image.Image]]:
    """The images that were sampled, by prompt, through webdataset's own reader."""
    found: dict[str, list[Image.Image]] = {}
    for path in sorted((Path(run_dir) / "candidates").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"):
            found.setdefault(sample["json"]["prompt"], []).append(sample["png"])
    return found


def candidate_of(image: str) -> int:
    return int(image.rpartition("-")[2])
