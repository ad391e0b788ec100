"""Where a run's frozen-pass cache lies, and all that decides what is in it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ....kernels.dispatch import takes_triton
from ...basics.errors import RecipeError, unwritable
from ...basics.files import replacing, user_cache
from ...display.terminal import Terminal
from ...models import Backbone
from ...models.tuning import Tuning
from ...objectives.preference import is_fused
from ...ranks import Ranks
from ...ranks.places import check_place
from ...recipe import Objective, Recipe
from ...shards.manifest import Manifest, manifest_hash
from ...shards.remote.fetch import is_remote
from ..batch import trained_parts
from .cache import FrozenCache
from .segments import FORMAT, RECORD_BYTES

HALF = 2  # bytes of a number of a target
KEY = "speed.frozen_cache_at"


def place_of(recipe: Recipe) -> Path:
    """The folder for all keys: beside the shards, which are copied as they are, not among them."""
    if recipe.speed.frozen_cache_at is not None:
        return Path(recipe.speed.frozen_cache_at).expanduser()
    if is_remote(recipe.shards_at):
        return user_cache() / "frozen"
    shards = recipe.shards_dir.resolve()
    return shards.with_name(f"{shards.name}.frozen")


def make_place(recipe: Recipe) -> None:
    """Make the folder, before a model is loaded. RecipeError, or OutsideError of a full disk, if
    that does not work.
    """
    place = place_of(recipe)
    check_place(place, KEY, is_folder=True)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(f"{place} cannot be made: give {KEY}", KEY, error, RecipeError) from None


def record_bytes(spec: Objective, latent_shape: Sequence[int]) -> int:
    """Bytes of one draw of a pair, on average."""
    share = {"teacher": 1.0, "mixed": 0.25}.get(spec.target, 0.0) if spec.is_consistency else 0.0
    return RECORD_BYTES + int(share * 2 * math.prod(latent_shape) * HALF)


def open_cache(
    recipe: Recipe, backbone: Backbone, tuning: Tuning, manifest: Manifest, ranks: Ranks
) -> FrozenCache:
    """What is kept of the frozen passes of this recipe; to be called when a teacher is loaded."""
    decides = made_of(recipe, backbone, tuning, manifest)
    text = json.dumps(decides, indent=1, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    folder = place_of(recipe) / key[:16]

    def tell() -> None:
        path = folder / "made_of.json"
        if not path.exists():
            with replacing(path) as file:
                file.write(text.encode())

    ranks.on_first(tell)
    return FrozenCache(
        folder,
        key,
        draws=recipe.speed.frozen_cache,
        latent_shape=manifest.latent_shape,
        has_targets=recipe.objective.needs_teacher,
        device=backbone.device,
        whole=tuning.compile != "off",
    )


class Totals(NamedTuple):
    """What a cache was good for, over all ranks."""

    served: int
    """Pairs that were known, of those asked about."""
    asked: int
    written: int
    """Draws of pairs."""
    damaged: int
    """Files, and targets in them."""


def close_cache(cache: FrozenCache, ranks: Ranks, terminal: Terminal) -> Totals:
    """Write down what waits, and warn of what was damaged; on all ranks together."""
    ranks.together(cache.write)
    told = ranks.gather(((cache.served, cache.asked, cache.written), cache.problems))
    problems = sorted({problem for _, own in told for problem in own})
    for problem in problems:
        terminal.warn(f"{problem}; it counts as not kept")
    served, asked, written = (sum(each) for each in zip(*(own for own, _ in told), strict=True))
    return Totals(served, asked, written, len(problems))


def made_of(
    recipe: Recipe, backbone: Backbone, tuning: Tuning, manifest: Manifest
) -> dict[str, Any]:
    """All that decides what frozen networks say of a draw of a pair, and how it is rounded.

    The number of draws does not: draw d is what visit d would be without a cache.
    """
    spec, device = recipe.objective, backbone.device
    on_triton = is_fused(spec) and takes_triton(torch.empty(0, device=device))
    held_to: dict[str, Any] = {"distance": spec.distance}
    if spec.distance == "pseudo_huber":
        held_to["huber_c"] = spec.huber_c
    if spec.is_consistency:
        held_to |= {
            "target": spec.target,
            "guidance_range": list(recipe.model.guidance_range),
            "solver_steps": recipe.model.solver_steps,
        }
    if recipe.model.is_flow:
        held_to["sigmas"] = recipe.model.sigmas
        held_to["embedded_guidance"] = recipe.model.embedded_guidance
    return {
        "format": FORMAT,
        "seed": recipe.seed,
        "parts": trained_parts(backbone),
        "shards": manifest_hash(manifest),
        "posterior": recipe.data.posterior,
        "caption_dropout": recipe.train.caption_dropout,
        "held_to": held_to,
        "precision": recipe.train.precision,
        "tuning": {
            "channels_last": tuning.channels_last,
            "fused_kernels": tuning.fused_kernels,
            "attention": tuning.attention,
            "compile": tuning.compile,
        },
        "errors": "triton" if on_triton else "torch",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
