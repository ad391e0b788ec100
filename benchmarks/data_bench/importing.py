"""Importing an existing set of pairs, beside a loop that reads, encodes and writes the same images.

The loop does what the shards need and nothing else: Parquet by pyarrow, pictures by Pillow, latents
by diffusers' VAE in the same batches, tars by webdataset. The import also pairs, tiers, shuffles,
checks, hashes, keeps what it has done so that it can be killed, and draws no contact sheet here.
"""

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import webdataset
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.models import Backbone, load_backbone
from cdpo.engine.preparing.preparation import Preparation
from cdpo.engine.ranks.launch import joined_ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.shards.manifest import load_manifest
from PIL import Image

ROOT = Path(__file__).parents[2]
SIDE = 48  # pixels of a picture, which both scale to the model's 32


class _Loaded(Preparation):
    """With its model in memory already: loading one is not importing."""

    backbone: Backbone

    def _load_backbone(self) -> Backbone:
        return self.backbone


def write_table(path: Path, rows: int) -> None:
    """Rows of two pictures that are smooth noise, with a label and scores that agree."""
    draw = np.random.default_rng(0)

    def picture() -> bytes:
        small = draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        return buffer.getvalue()

    columns = {
        "jpg_0": [picture() for _ in range(rows)],
        "jpg_1": [picture() for _ in range(rows)],
        "caption": [f"a picture of number {row}" for row in range(rows)],
        "label_0": [1.0] * rows,
        "score_0": [0.5 + row / rows for row in range(rows)],
        "score_1": [0.25] * rows,
    }
    pq.write_table(pa.table(columns), path)


def recipe_of(folder: Path, table: Path) -> Recipe:
    """The small world's recipe, importing a table."""
    small = ROOT / "recipes" / "emoji_cdpo.yaml"
    plain = load_recipe(small)
    changes = {
        "run_dir": folder / "run",
        "model.path": ROOT / plain.model.path,
        "prompts.train": "null",
        "prompts.heldout": ROOT / str(plain.prompts.heldout),
        "prepare.source.type": "paired",
        "prepare.source.path": table,
        "prepare.source.scores": "[score_0, score_1]",
        "prepare.contact_sheet_prompts": 0,
        "curriculum.difficulty": "score_gap",
        "curriculum.tiers": 1,
    }
    return load_recipe(small, [f"{key}={value}" for key, value in changes.items()])


@contextmanager
def importers(folder: Path, rows: int) -> Iterator[dict[str, Callable[[], int]]]:
    """What turns the table into shards, by name; each returns how many pairs it wrote."""
    table = folder / "table.parquet"
    write_table(table, rows)
    recipe = recipe_of(folder, table)
    with joined_ranks() as ranks:
        backbone = load_backbone(recipe.model, ranks.device, recipe.prepare.precision)

        def ours() -> int:
            shutil.rmtree(recipe.run_dir, ignore_errors=True)
            Path(recipe.run_dir).mkdir()
            importing = _Loaded(ranks, recipe, Terminal(enabled=False))
            importing.backbone = backbone
            importing.run()
            return load_manifest(recipe.shards_dir).num_pairs

        yield {"bare loop": lambda: bare_loop(folder, table, recipe, backbone), "ours": ours}


def bare_loop(folder: Path, table: Path, recipe: Recipe, backbone: Backbone) -> int:
    """See the module."""
    height, width = recipe.model.resolution
    count, size = 0, recipe.prepare.batch_size // 2
    with webdataset.TarWriter(str(folder / "plain.tar")) as tar:
        for batch in pq.ParquetFile(table).iter_batches(batch_size=size):
            rows = batch.to_pylist()
            files = [row["jpg_0"] for row in rows] + [row["jpg_1"] for row in rows]
            pictures = [Image.open(io.BytesIO(file)).resize((width, height)) for file in files]
            with torch.inference_mode():
                latents = backbone.encode_images(pictures).half().numpy()
            for row, winner, loser in zip(rows, latents, latents[len(rows) :], strict=False):
                record = {"prompt": row["caption"], "scores": [row["score_0"], row["score_1"]]}
                pair = np.stack([winner, loser])
                tar.write({"__key__": f"{count:016x}", "json": record, "latents.npy": pair})
                count += 1
    return count
