"""Stage 1 as a sequence of resumable phases: sample, rank, pair, encode, write, draw the sheet.

Every phase asks the disk what is done and does the rest, so a killed run started again repeats at
most the prompts in flight. Work is divided over the ranks by prompt and by shard; what pairs are
formed depends on neither.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..basics.errors import DataError
from ..basics.keyed import Stream
from ..curriculum.pairs import Pair
from ..display.contact_sheet import ContactPair, ContactRow, draw_contact_sheet
from ..display.terminal import Terminal
from ..models import Backbone, load_backbone
from ..models.tuning import tune_for_sampling
from ..ranks import Ranks
from ..recipe import Recipe
from ..recipe.identity import save_resolved
from ..shards.contents import contents_of
from ..shards.manifest import (
    Manifest,
    ModelSource,
    RewardSource,
    ShardEntry,
    Statistics,
    VaeSource,
    save_manifest,
)
from ..shards.sample import PairMeta
from ..sources.prompts import read_prompts
from .candidates import CandidateSampler, CandidateSet, drawn_by
from .latents import LatentStore, PixelStore
from .rankers import RankedPrompt, make_ranker
from .shard_set import (
    PAIR_KEYS,
    SHARD_KEYS,
    TierShards,
    fill_tiers,
    finished_set,
    folder_of_set,
    write_tiers,
)


class Preparation:
    """Stage 1 of one recipe, on all ranks together."""

    def __init__(self, ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
        self.ranks = ranks
        self.recipe = recipe
        self.terminal = terminal
        self.run_dir = Path(recipe.run_dir)
        self.shards_dir = folder_of_set(recipe)
        self.prompts, _ = read_prompts(recipe.prompts, recipe.seed)
        self.ranker = make_ranker(recipe, ranks, terminal)
        self.inputs = self._inputs_hash()
        self.is_finished = ranks.on_first(self._already_done)

    def describe(self) -> list[tuple[str, str]]:
        """What will be done, for the head of the terminal."""
        sampler = self.recipe.prepare.sampler
        images, ranked_by = self.ranker.describe()
        return [
            (
                "sample",
                f"{len(self.prompts)} prompts x {images}, "
                f"{sampler.steps} steps, guidance {sampler.guidance:g}",
            ),
            ("rank by", ranked_by),
        ]

    def _inputs_hash(self) -> str:
        """Of every choice the shards are a function of; another hash means other shards."""
        recipe = self.recipe
        inputs: dict[str, Any] = {
            "seed": recipe.seed,
            "model": recipe.model.model_dump(mode="json"),
            "prompts": self.prompts,
            "prepare": recipe.prepare.model_dump(
                mode="json", include={"candidates_per_prompt", "sampler", "precision"}
            ),
            "curriculum": recipe.curriculum.model_dump(include=PAIR_KEYS),
            "data": recipe.data.model_dump(include=SHARD_KEYS),
            **self.ranker.inputs(),
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _already_done(self) -> bool:
        manifest = finished_set(self.shards_dir, self.inputs, self.terminal)
        return manifest is not None and self._is_of_these_weights(manifest)

    def _is_of_these_weights(self, manifest: Manifest) -> bool:
        """Whether model, VAE and reward still hold what made the shards: paths may stay the same
        while somebody trains on.
        """
        backbone = load_backbone(
            self.recipe.model, self.ranks.device, self.recipe.prepare.precision
        )
        now = {**backbone.fingerprints(), "reward": self.ranker.source().fingerprint}
        made_with = {"model": manifest.model, "vae": manifest.vae, "reward": manifest.reward}
        changed = [name for name, source in made_with.items() if source.fingerprint != now[name]]
        if changed:
            self.terminal.warn(
                f"the shards are written again: the weights of {', '.join(changed)} have changed"
            )
        return not changed

    def run(self) -> None:
        """Do what is not done yet. DataError if no shards can be made of these candidates."""
        if self.ranks.is_first:
            save_resolved(self.recipe, self.run_dir / "recipe.yaml")
        ranked_by = self.ranker.source()  # what is wrong with a reward is said before all else
        backbone = load_backbone(
            self.recipe.model, self.ranks.device, self.recipe.prepare.precision
        )
        fingerprints = backbone.fingerprints()
        tune_for_sampling(self.recipe.speed, backbone)

        images = self._sample(backbone, drawn_by(self.recipe.model, backbone))
        ranked = self.ranker.rank(images, self.prompts)
        pairs, fills = self._fill_shards(ranked)
        latents = self._encode(backbone, fingerprints["vae"], images, pairs)
        shards = self._write(pairs, fills, latents, backbone)
        manifest = self._manifest(shards, fills, ranked, backbone, fingerprints, ranked_by)
        self.ranks.on_first(lambda: self._finish(manifest, ranked, images))

    # Phases

    def _sample(self, backbone: Backbone, made_by: dict[str, str]) -> CandidateSet:
        recipe = self.recipe
        sampler = CandidateSampler(
            backbone,
            backbone.denoiser,
            self.run_dir / "candidates",
            seed=recipe.seed,
            stream=Stream.CANDIDATE_NOISE,
            count=self.ranker.count,
            sampler=recipe.prepare.sampler,
            resolution=recipe.model.resolution,
            batch_size=recipe.prepare.batch_size,
            made_by={
                **made_by,
                "precision": recipe.prepare.precision,
                **self.ranker.made_by,
            },
            starts=self.ranker.starts,
        )
        sampler.run(self.prompts, self.ranks, self.terminal, "sample")
        return sampler.images

    def _fill_shards(self, ranked: dict[str, RankedPrompt]) -> tuple[list[Pair], list[TierShards]]:
        """All pairs, and which goes into which shard; every rank finds the same."""
        formed = {prompt: found.outcome for prompt, found in ranked.items()}
        dropped = sum(outcome.dropped_candidates for outcome in formed.values())
        tied = [prompt for prompt, outcome in formed.items() if outcome.all_tied]
        if dropped:
            self.terminal.warn(f"{dropped} candidates had no finite reward and were dropped")
        if tied:
            self.terminal.warn(
                f"{len(tied)} prompts gave no pair: their candidates all tie, e.g. {tied[0]!r}"
            )
        pairs = [pair for outcome in formed.values() for pair in outcome.pairs]
        if not pairs:
            raise DataError(
                f"no pairs in {len(self.prompts)} prompts: all candidates tie, have no finite "
                f"reward or differ by less than curriculum.min_score_gap="
                f"{self.recipe.curriculum.min_score_gap}"
            )
        ids = np.asarray([pair.pair_id for pair in pairs], dtype=np.int64)
        fills = fill_tiers(ids, np.asarray([pair.tier for pair in pairs]), self.recipe)
        counts = "  ".join(f"{len(fill.pairs)}" for fill in fills)
        self.terminal.line(f"pairs by tier, easiest first: {counts}")
        return pairs, fills

    def _encode(
        self, backbone: Backbone, vae: str, images: CandidateSet, pairs: list[Pair]
    ) -> LatentStore | PixelStore:
        """What the shards will hold of every image that is in a pair."""
        kind = self.recipe.data.format
        if kind == "raw":
            return PixelStore(images)
        store = LatentStore(self.run_dir / "latents", images, vae, kind)
        wanted: dict[str, set[int]] = {}
        for pair in pairs:
            wanted.setdefault(pair.prompt, set()).update((pair.winner, pair.loser))
        total = sum(len(candidates) for candidates in wanted.values())
        with self.terminal.progress("encode", total, 0, "images") as progress:
            for prompt in self.ranks.until_stopped(self.ranks.share(sorted(wanted))):
                chosen = sorted(wanted[prompt])
                store.encode(backbone, prompt, chosen, self.recipe.prepare.batch_size)
                progress.advance(min(len(chosen) * self.ranks.world_size, total - progress.done))
        self.ranks.meet()
        return store

    def _write(
        self,
        pairs: list[Pair],
        fills: list[TierShards],
        images: LatentStore | PixelStore,
        backbone: Backbone,
    ) -> list[ShardEntry]:
        resolution = self.recipe.model.resolution

        def sample(number: int) -> tuple[PairMeta, np.ndarray]:
            pair = pairs[number]
            meta = PairMeta.of_sampled(pair, resolution)
            return meta, images.pair(pair.prompt, pair.winner, pair.loser)

        shape = backbone.latent_shape(resolution)
        contents = contents_of(self.recipe.data.format, shape, resolution)
        return write_tiers(self.shards_dir, fills, sample, contents, self.ranks)

    def _manifest(
        self,
        shards: list[ShardEntry],
        fills: list[TierShards],
        ranked: dict[str, RankedPrompt],
        backbone: Backbone,
        fingerprints: dict[str, str],
        ranked_by: RewardSource,
    ) -> Manifest:
        recipe, outcomes = self.recipe, [found.outcome for found in ranked.values()]
        return Manifest(
            kind=recipe.data.format,
            created_by=__version__,
            fingerprint=self.inputs,
            seed=recipe.seed,
            lanes=recipe.data.lanes,
            tiers=recipe.curriculum.tiers,
            resolution=recipe.model.resolution,
            latent_shape=backbone.latent_shape(recipe.model.resolution),
            model=ModelSource(path=recipe.model.path, fingerprint=fingerprints["model"]),
            vae=VaeSource(
                path=recipe.model.vae or recipe.model.path,
                fingerprint=fingerprints["vae"],
                scaling_factor=backbone.scaling_factor,
            ),
            reward=ranked_by,
            statistics=Statistics(
                prompts=len(ranked),
                prompts_without_pairs=sum(not outcome.pairs for outcome in outcomes),
                tied_prompts=sum(outcome.all_tied for outcome in outcomes),
                candidates=len(ranked) * self.ranker.count,
                dropped_candidates=sum(outcome.dropped_candidates for outcome in outcomes),
                eligible_pairs=sum(outcome.num_eligible for outcome in outcomes),
                pairs_by_tier=tuple(f.plan.num_shards * f.plan.count for f in fills),
                dropped_remainder_by_tier=tuple(fill.plan.dropped for fill in fills),
            ),
            shards=tuple(shards),
        )

    def _finish(
        self, manifest: Manifest, ranked: dict[str, RankedPrompt], images: CandidateSet
    ) -> None:
        shown = [prompt for prompt in self.prompts if ranked[prompt].outcome.pairs]
        rows = [
            _contact_row(prompt, ranked[prompt], images)
            for prompt in shown[: self.recipe.prepare.contact_sheet_prompts]
        ]
        if rows:
            draw_contact_sheet(self.run_dir / "contact_sheet.png", rows)
        save_manifest(self.shards_dir, manifest)
        shutil.rmtree(self.run_dir / "latents", ignore_errors=True)
        self.terminal.line(f"shards: {self.shards_dir}")
        self.terminal.line(f"look at: {self.run_dir / 'contact_sheet.png'}")


def _contact_row(prompt: str, ranked: RankedPrompt, candidates: CandidateSet) -> ContactRow:
    images = candidates.read(prompt)
    by_tier = {pair.tier: pair for pair in reversed(ranked.outcome.pairs)}
    return ContactRow(
        prompt=prompt,
        images=[images[index] for index in ranked.shown],
        scores=[float(ranked.scores[index]) for index in ranked.shown],
        pairs=[
            ContactPair(
                tier=tier,
                winner_image=images[pair.winner],
                loser_image=images[pair.loser],
                winner_rank=pair.winner_rank,
                loser_rank=pair.loser_rank,
                winner_score=pair.winner_score,
                loser_score=pair.loser_score,
            )
            for tier, pair in sorted(by_tier.items())
        ],
    )
