"""From pairs of a shard to the batch of a training step: noise, target, captions, weights.

Everything random is a function of the pair and its visit (:mod:`~cdpo.engine.basics.keyed`), so
a pair meets the same noise whatever batch, rank or restart it comes in; winner and loser share it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..basics import keyed
from ..basics.errors import DataError
from ..basics.keyed import Stream
from ..basics.phases import phase
from ..basics.transfer import send
from ..curriculum.pacing import Pacing
from ..models import DTYPES, Backbone, Framing
from ..models.fingerprints import changed_parts, named
from ..models.tuning import is_on
from ..objectives import TrainingBatch, rank_weights, timestep_weights
from ..ranks import Ranks
from ..recipe import Objective, Recipe
from ..shards.batch import PairBatch
from ..shards.contents import Kind
from ..shards.lanes import LanePlan
from ..shards.manifest import Manifest, shards_by_tier
from ..shards.prompts import PromptFiles, stored_in
from ..shards.reader import ShardReaders
from ..shards.remote.store import open_store
from ..shards.store import ShardStore
from ..shards.stream import BATCH_TIMEOUT, PairStream
from ..sources.prompts import evaluation_prompts, sample_prompts
from .frozen.cache import FrozenCache


class BatchMaker:
    """Corrupts and conditions micro-batches as a recipe says."""

    def __init__(
        self,
        recipe: Recipe,
        backbone: Backbone,
        resolution: tuple[int, int],
        device: torch.device,
        kind: Kind = "latents",
        candidates: int | None = None,
    ) -> None:
        """``kind`` is what the shards hold of an image; ``resolution`` its height and width;
        ``candidates`` how many of a prompt are ranked, where ranks are to count.
        """
        self.recipe = recipe
        self.backbone = backbone
        self.resolution = resolution
        self.device = device
        self.kind = kind
        self.cache: FrozenCache | None = None
        """Of frozen passes, if the recipe wants one; given when there is one."""
        self._dtype = DTYPES[recipe.train.precision]
        # As the networks are tuned: targets then lie as predictions do, and the loss copies neither
        channels_last = is_on(recipe.speed.channels_last, device.type == "cuda")
        channels_last &= not recipe.model.is_flow  # a transformer's predictions are rows of tokens
        self._order = torch.channels_last if channels_last else torch.contiguous_format
        self._weights = timestep_weights(recipe.objective, backbone.noise, device)
        self._shares = None if candidates is None else rank_weights(candidates)

    def make(self, pairs: PairBatch) -> TrainingBatch:
        """The batch of B pairs, on the device."""
        kept = None
        if draws := self.recipe.speed.frozen_cache:
            pairs = replace(pairs, visits=pairs.visits % draws)
            if self.cache is not None:
                kept = self.cache.look_up(pairs.pair_ids, pairs.visits)
        with phase("encode_images"):
            latents = self._latents(pairs).contiguous(memory_format=self._order)
        with phase("corrupt"):
            noise = self.backbone.noise
            draw = noise.draw(self.recipe.seed, pairs.pair_ids, pairs.visits)
            noisy, target = noise.corrupt(latents, draw, self._dtype)
        with phase("encode_prompts"):
            framing = Framing(pairs.original_sizes, pairs.crops, self.resolution)
            prompts = self._drop_captions(pairs)
            conditioning = self.backbone.encode_prompts([*prompts, *prompts], framing)
            unconditional = None
            if self.recipe.objective.needs_teacher and (kept is None or kept.missing):
                nothing = [""] * (2 * len(prompts))
                unconditional = self.backbone.encode_prompts(nothing, framing)
        weights = None if self._weights is None else self._weights(draw.timesteps)
        shares = None if self._shares is None else self._shares_of(pairs.ranks)
        return TrainingBatch(
            noisy, target, draw, conditioning, weights, unconditional, shares, kept
        )

    def _shares_of(self, ranks: torch.Tensor) -> torch.Tensor:
        """(B,) how much pairs of ranks (B, 2) count, on the device."""
        assert self._shares is not None
        if (worst := int(ranks.max())) >= len(self._shares):
            raise DataError(
                f"a pair has rank {worst}, but the shards' manifest tells of "
                f"{len(self._shares) - 1} candidates a prompt: were sets of other numbers merged? "
                "Use objective.pair_weighting=uniform",
                "objective.pair_weighting",
                "mismatch",
            )
        winner, loser = ranks.unbind(1)
        return send(self._shares[winner, loser], self.device)

    def _latents(self, pairs: PairBatch) -> torch.Tensor:
        """Scaled latents (2B, C, h, w) on the device, of whatever the shards hold."""
        images = send(pairs.images, self.device)
        if self.kind == "latents":
            return images
        moments = self.backbone.image_moments(images) if self.kind == "raw" else images
        if self.recipe.data.posterior == "mean":
            return self.backbone.latents_of(moments)
        keys = keyed.make_keys(self.recipe.seed, Stream.POSTERIOR, pairs.pair_ids, pairs.visits)
        channels, *size = moments.shape[1:]
        noise = keyed.normal(send(keys, self.device), (2, channels // 2, *size))
        noise = noise.transpose(0, 1).flatten(0, 1)
        return self.backbone.latents_of(moments, noise)

    def _drop_captions(self, pairs: PairBatch) -> list[str]:
        """The prompts of a micro-batch, some of them emptied as train.caption_dropout says."""
        keys = keyed.make_keys(
            self.recipe.seed, Stream.CAPTION_DROPOUT, pairs.pair_ids, pairs.visits
        )
        dropped = (keyed.uniform(keys) < self.recipe.train.caption_dropout).tolist()
        return ["" if drop else p for p, drop in zip(pairs.prompts, dropped, strict=True)]


def open_stream(
    recipe: Recipe, ranks: Ranks, shards: ShardStore, manifest: Manifest, pacing: Pacing
) -> PairStream:
    """The pairs of this rank; DataError on all if a shard is missing for one."""
    plan = LanePlan(
        manifest,
        seed=recipe.seed,
        world_size=ranks.world_size,
        rank=ranks.rank,
        global_batch=recipe.train.global_batch,
        shuffle_shards=recipe.data.shuffle_shards,
    )
    data = recipe.data
    stream = PairStream(
        plan,
        ShardReaders(shards, manifest, image_workers=data.workers),
        pacing,
        workers=data.workers,
        timeout=max(BATCH_TIMEOUT, 3 * data.fetch.budget),
        pin=ranks.device.type == "cuda",
    )
    ranks.together(stream.check_present)  # a shard may be missing for one rank alone
    return stream


def open_stored_prompts(recipe: Recipe, ranks: Ranks) -> PromptFiles | None:
    """What stands in for text encoders, if the recipe says so. DataError on all ranks where it is
    missing, damaged or of another precision, or lacks prompts that are drawn in training.
    """
    if recipe.data.text == "live":
        return None
    store = open_store(recipe.shards_at, recipe.data, ranks.local_size)
    manifest = ranks.on_first(store.manifest)
    stored = stored_in(manifest, store, recipe.train.precision)
    share = ranks.local_rank, ranks.local_size
    found = ranks.together(lambda: PromptFiles(store, stored, *share))
    for prompt in ("", *sample_prompts(recipe), *evaluation_prompts(recipe)):
        found.row(prompt)
    return found


def trained_parts(backbone: Backbone) -> dict[str, str]:
    """Fingerprints of what decides a run's steps: of all parts but how images are sampled, the
    teacher's among them if there is one.
    """
    return {name: own for name, own in backbone.fingerprints().items() if name != "sampler"}


def describe_pairs(recipe: Recipe, manifest: Manifest, pacing: Pacing) -> list[tuple[str, str]]:
    """What a run trains on, for the head of the terminal: a row, and a note for each stage whose
    pairs do not fill a batch.
    """
    stages = f"{len(pacing.stages)} stages, {recipe.curriculum.order}"
    rows = [("pairs", f"{manifest.num_pairs} in {manifest.tiers} tiers; {stages}")]
    shards = shards_by_tier(manifest.shards)
    by_tier = {tier: sum(entry.count for entry in own) for tier, own in shards.items()}
    batch = recipe.train.global_batch
    for stage, pairs in pacing.crowded(by_tier, batch).items():
        text = f"stage {stage.index + 1} has {pairs} pairs for train.global_batch={batch}: "
        rows.append(("note", text + "some come up in a batch twice"))
    return rows


# Of means, for flow models: 10 is DGPO's least, 2000 the default of verl-omni and Flow-Factory;
# recipes that are known to be stable (flow_grpo's, verl-omni's) take 100.
MOST_PUBLISHED_BETA = 2000


def describe_beta(recipe: Recipe, latent_shape: Sequence[int]) -> list[tuple[str, str]]:
    """What a flow model's beta is in both units that trainers give it in, and where it counts; and
    a warning if it is above all that have been published.
    """
    spec = recipe.objective
    if not recipe.model.is_flow or spec.type.endswith("sft"):
        return []
    numbers = math.prod(latent_shape)
    text = f"{spec.beta:g} of means, {spec.beta / numbers:.3g} of sums over {numbers:,} numbers; "
    rows = [("beta", f"{text}{spec.time_weight} in sigma, which is {recipe.model.sigmas}")]
    if spec.beta > MOST_PUBLISHED_BETA:
        told = (
            f"objective.beta={spec.beta:g} is above what is published for flow models, 10 to "
            f"{MOST_PUBLISHED_BETA} of means, where spikes are told of from 500 on: 100 is stable"
        )
        rows.append(("warning", told))
    return rows


def describe_moving(spec: Objective) -> list[tuple[str, str]]:
    """What of the loss moves with training."""
    rows = []
    if spec.target_logit is not None:
        rows.append(
            ("beta", f"{spec.beta:g}, then by the margins: logits of {spec.target_logit:g}")
        )
    if spec.reference_ema:
        rows.append(("reference", f"moving average of the policy, decay {spec.reference_ema:g}"))
    return rows


def describe_stages(pacing: Pacing) -> list[tuple[str, str]]:
    """A note if there are stages that a run does not come to."""
    never = ", ".join(str(stage.index + 1) for stage in pacing.unreached)
    return [("note", f"stages {never} never open: train.steps ends before them")] * bool(never)


def ranked_candidates(recipe: Recipe, manifest: Manifest) -> int | None:
    """How many candidates of a prompt were ranked, where ranks are to count. DataError where they
    were not, or not as many of each.
    """
    if recipe.objective.pair_weighting != "rank":
        return None
    counts = manifest.statistics
    masked = manifest.reward.type == "masked"
    if counts.imported is not None or masked or not counts.prompts:
        what = "masked prompts" if masked else "a data set that was read"
        reason = f"the pairs are of {what}, not of one ranking of a prompt's candidates"
    elif counts.candidates % counts.prompts:
        reason = (
            f"the shards are of {counts.candidates} candidates for {counts.prompts} prompts, not "
            "as many of each"
        )
    else:
        return counts.candidates // counts.prompts
    raise DataError(
        f"objective.pair_weighting=rank, but {reason}: use uniform",
        "objective.pair_weighting",
        "unsupported",
    )


def refuse_foreign_shards(recipe: Recipe, manifest: Manifest, backbone: Backbone) -> None:
    """DataError where a run cannot train on what the shards hold."""
    if manifest.kind == "latents" and recipe.data.posterior == "sampled":
        raise DataError(
            "data.posterior=sampled, but the shards hold the mean alone: use mean, or prepare "
            "again with data.format=moments or raw",
            "data.posterior",
            "contradiction",
        )
    only = backbone.noise.resolution
    if only is not None and only != manifest.resolution:
        height, width = manifest.resolution
        raise DataError(
            f"the shards hold images of {height}x{width}, and this model's noise levels hang on "
            f"the size: give model.resolution=[{height},{width}]",
            "model.resolution",
            "mismatch",
        )
    parts, made_with = backbone.fingerprints(), manifest.vae
    # Sets that are too old to tell the config are held to the weights.
    config = (manifest.parts or parts)["vae_config"]
    own = {name: parts[name] for name in ("vae", "vae_config")}
    others = changed_parts({"vae": made_with.fingerprint, "vae_config": config}, own)
    if manifest.kind != "raw" and others:
        raise DataError(
            f"the shards were made with another {named(others)} ({made_with.path}, "
            f"{made_with.fingerprint[:12]}) than the model's own ({own['vae'][:12]}): run prepare "
            "again with this model, or name that VAE as model.vae",
            "model.vae",
            "mismatch",
        )
