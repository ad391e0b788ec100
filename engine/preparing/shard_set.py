"""From pairs in tiers to the shards of a set: which pair goes where, written by all ranks; what the
manifest says, and whether a set is still the one that is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import __version__
from ..basics.errors import DataError, RecipeError
from ..basics.failpoints import failpoint
from ..display.terminal import Terminal
from ..models import Backbone
from ..ranks import Ranks
from ..recipe import Recipe
from ..shards.contents import Contents
from ..shards.manifest import (
    Manifest,
    ModelSource,
    RewardSource,
    ShardEntry,
    Statistics,
    VaeSource,
    load_manifest,
    manifest_hash,
    save_manifest,
)
from ..shards.reader import ShardReaders
from ..shards.remote.fetch import is_remote
from ..shards.sample import PairMeta
from ..shards.writer import ShardFill, ShardPlan, plan_shards, write_shard

PAIR_KEYS = {"tiers", "difficulty", "binning", "min_score_gap", "pairs_per_prompt_per_tier"}
"""Keys of a recipe's curriculum that decide the pairs; the others order them."""
SHARD_KEYS = {"lanes", "pairs_per_shard", "format"}
"""Keys of a recipe's data that decide the shards of given pairs."""
PROMPTS = "prompts"  # begins the names of files of stored prompts


@dataclass(frozen=True)
class TierShards:
    """The pairs of a tier, by their number among all pairs, and how they fill its shards."""

    plan: ShardPlan
    fill: ShardFill
    pairs: np.ndarray

    @property
    def written(self) -> np.ndarray:
        """The pairs that are in a shard: those that are over when all shards are equal are not."""
        return np.concatenate(
            [self.pairs[self.fill.members(shard)] for shard in range(self.plan.num_shards)]
        )


def fill_tiers(ids: np.ndarray, tiers: np.ndarray, recipe: Recipe) -> list[TierShards]:
    """Which of the pairs (P,) goes into which shard; every rank finds the same.

    Raises DataError when a tier has too few pairs for the lanes.
    """
    fills = []
    for tier in range(1, recipe.curriculum.tiers + 1):
        pairs = np.flatnonzero(tiers == tier)
        plan = plan_shards(tier, len(pairs), recipe.data.lanes, recipe.data.pairs_per_shard)
        fills.append(TierShards(plan, ShardFill(plan, ids[pairs], recipe.seed), pairs))
    return fills


def folder_of_set(recipe: Recipe) -> Path:
    """The folder that a recipe's shards are written to; RecipeError where it names a URL."""
    if is_remote(recipe.shards_at):
        raise RecipeError(
            f"data.path={recipe.shards_at}: prepare writes into a folder; give it one, "
            "copy that folder there, and give train the URL",
            "data.path",
            "unsupported",
        )
    return recipe.shards_dir


def set_in(folder: Path, terminal: Terminal) -> Manifest | None:
    """The manifest of a set that is all there, else None."""
    if not (folder / "manifest.json").exists():
        return None
    try:
        manifest = load_manifest(folder)
        ShardReaders(folder, manifest).check_present(manifest.shards)
    except DataError as error:  # its remedy is to prepare again, which is what we are here for
        terminal.warn(f"the shards are written again: {error}")
        return None
    return manifest


def refuse_to_replace(manifest: Manifest, recipe: Recipe, others: str) -> None:
    """RecipeError if checkpoints in the run folder were trained on a set that was made with
    ``others``: they could not be resumed on another.
    """
    folder = Path(recipe.run_dir) / "checkpoints"
    for path in sorted(folder.glob("step-*/MANIFEST.json")):
        try:
            trained_on = json.loads(path.read_bytes()).get("data")
        except (OSError, ValueError, AttributeError):
            continue
        if trained_on == manifest_hash(manifest):
            raise RecipeError(
                f"the shards in {recipe.shards_dir} were made with {others}, and {path.parent} was "
                "trained on them: give another run_dir, or remove that folder of checkpoints to "
                "prepare here again",
                "run_dir",
                "in-use",
            )


def manifest_of(
    recipe: Recipe,
    inputs: str,
    backbone: Backbone,
    parts: Mapping[str, str],
    ranked_by: RewardSource,
    statistics: Statistics,
    shards: Sequence[ShardEntry],
) -> Manifest:
    """The manifest of a recipe's set; ``inputs`` is the hash of the choices that decided its
    content, ``parts`` are the fingerprints of what it was made with.
    """
    model, made_by = recipe.model, backbone.fingerprints()
    return Manifest(
        kind=recipe.data.format,
        created_by=__version__,
        fingerprint=inputs,
        seed=recipe.seed,
        lanes=recipe.data.lanes,
        tiers=recipe.curriculum.tiers,
        resolution=model.resolution,
        latent_shape=backbone.latent_shape(model.resolution),
        model=ModelSource(path=model.path, fingerprint=made_by["model"]),
        vae=VaeSource(
            path=model.vae or model.path,
            fingerprint=made_by["vae"],
            scaling_factor=backbone.scaling_factor,
        ),
        reward=ranked_by,
        parts=dict(parts),
        statistics=statistics,
        shards=tuple(shards),
    )


def write_tiers(
    folder: Path,
    fills: Sequence[TierShards],
    sample: Callable[[int], tuple[PairMeta, np.ndarray]],
    contents: Contents,
    ranks: Ranks,
) -> list[ShardEntry]:
    """Write this rank's shards; returns everybody's entries in the order of tier and number.

    ``sample`` gives record and images, as ``contents`` takes them, of the pair of a number. What
    the folder held before goes.
    """
    ranks.on_first(lambda: _clear(folder))
    shards = [(fill, index) for fill in fills for index in range(fill.plan.num_shards)]
    own = []
    for fill, index in ranks.until_stopped(ranks.share(shards)):
        failpoint("prepare.shard")
        members = fill.pairs[fill.fill.members(index)]
        samples = (sample(number) for number in members.tolist())
        own.append(write_shard(folder / fill.plan.name(index), samples, contents))
    ranks.meet()
    entries = {entry.name: entry for part in ranks.gather(own) for entry in part}
    return [entries[fill.plan.name(index)] for fill, index in shards]


def _clear(folder: Path) -> None:
    """Remove the manifest and the shards of other inputs, manifest first: it would name them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    _remove(folder, "tier-*.tar*")
    _remove(folder, f"{PROMPTS}-*.safetensors*")


def remove_prompts(folder: Path, manifest: Manifest) -> None:
    """Remove stored prompts, after what names them."""
    save_manifest(folder, manifest.model_copy(update={"text": None}))
    _remove(folder, f"{PROMPTS}-*.safetensors*")


def _remove(folder: Path, pattern: str) -> None:
    for old in folder.glob(pattern):  # ours only: data.path may name any folder
        old.unlink()
