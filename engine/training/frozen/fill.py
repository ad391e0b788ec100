"""Filling the frozen-pass cache ahead of training."""

from __future__ import annotations

from pathlib import Path

from ...basics.errors import RecipeError
from ...curriculum.pacing import Cursor, Pacing
from ...display.terminal import Terminal
from ...models import load_backbone
from ...models.tuning import order_weights
from ...objectives import build_objective
from ...ranks import Ranks
from ...recipe import Recipe
from ...shards.remote.store import open_store
from ..batch import (
    BatchMaker,
    open_stored_prompts,
    open_stream,
    ranked_candidates,
    refuse_foreign_shards,
)
from ..checkpoint.store import CheckpointStore
from ..deepspeed_config import build_deepspeed_config, plan_batches
from ..micro_batch import settle_micro_batch
from ..networks import build_networks
from .place import close_cache, make_place, open_cache


def fill(ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
    """Ask the frozen networks about every draw that the recipe's steps will meet and nobody keeps.

    In the micro-batches of its steps, so that a run which is filled ahead rounds as one that fills
    as it goes. Raises RecipeError without `speed.frozen_cache`, and what `train` raises.
    """
    if not recipe.speed.frozen_cache:
        raise RecipeError(
            "speed.frozen_cache=0 keeps nothing: give it the draws a pair, e.g. 4",
            "speed.frozen_cache",
            "no-effect",
        )
    folder = Path(recipe.run_dir) / "checkpoints"
    checkpoints = CheckpointStore(folder, ranks, recipe, keep=recipe.checkpoint.keep)
    recipe, _ = settle_micro_batch(recipe, ranks, checkpoints.last_batches(), trains=True)
    micro = plan_batches(recipe, ranks.world_size).micro_batch
    build_deepspeed_config(recipe, ranks.world_size, recipe.run_dir)  # which may refuse it
    ranks.on_first(lambda: make_place(recipe))
    shards = open_store(recipe.shards_at, recipe.data, ranks.local_size)
    manifest = ranks.on_first(shards.manifest)
    pacing = Pacing(recipe.curriculum, recipe.train.steps)
    stream = open_stream(recipe, ranks, shards, manifest, pacing)

    prompts = open_stored_prompts(recipe, ranks)
    backbone = load_backbone(recipe.model, ranks.device, recipe.train.precision, prompts)
    backbone.fingerprints()  # as it was loaded
    refuse_foreign_shards(recipe, manifest, backbone)
    networks = build_networks(recipe, backbone, build_objective(recipe.objective))
    order_weights(networks.tuning, networks.policy, *networks.frozen)
    cache = open_cache(recipe, backbone, networks.tuning, manifest, ranks)
    of = manifest.resolution, ranks.device, manifest.kind, ranked_candidates(recipe, manifest)
    maker = BatchMaker(recipe, backbone, *of)
    maker.cache = cache

    steps, skips = recipe.train.steps, Cursor.start(pacing).skips
    rows = [("kept", f"{len(cache)} draws of pairs in {cache.folder}")]
    terminal.header(f"cache fill  {recipe.run_dir}", rows)
    with terminal.progress("fill", steps, 0, "steps") as progress:
        for step in ranks.until_stopped(range(steps)):
            for pairs in stream.next(step, skips).split(micro):
                if cache.lacks(pairs.pair_ids, pairs.visits):
                    networks.ask_frozen(maker.make(pairs))
            progress.advance(1)
    totals = close_cache(cache, ranks, terminal)
    stream.close()
    ranks.meet()
    terminal.line(f"{totals.written} draws of pairs asked for: {cache.folder}")
