"""Stage 1 over preference data that is already there: read, score, pair, encode, write.

The data set is read in a stream, twice: once for scores (not at all where they come with it), once
for the latents of the images that are in pairs. In between there are numbers on disk and in memory,
some hundred bytes a record; images and captions are never held. Work is divided over the ranks by
parts of the source, which are a function of the source alone, and so are the shards.

The contact sheet of an import: some captions with the pairs that training will see.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import __version__
from ..basics.errors import DataError
from ..basics.failpoints import failpoint
from ..curriculum.labelled import UNSCORED, PairsMade, labelled_pairs, ranked_pairs
from ..display.contact_sheet import ContactPair, ContactRow, draw_contact_sheet
from ..display.terminal import Terminal
from ..models import Backbone, load_backbone
from ..models.tuning import tune_for_sampling
from ..ranks import Ranks
from ..recipe import Generate, Masked, Paired, Recipe
from ..recipe.identity import save_resolved
from ..rewards import RewardModel, load_reward
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
from ..sources import open_source
from ..sources.index import Index, open_index
from ..sources.pictures import Size, Tolerance, load_records
from ..sources.prompts import read_prompts
from ..sources.rows import RowReader
from .latents import PictureLatents
from .scores import ImportScoring
from .shard_set import (
    PAIR_KEYS,
    SHARD_KEYS,
    TierShards,
    fill_tiers,
    finished_set,
    folder_of_set,
    write_tiers,
)


def chosen_pairs(pairs: np.ndarray, fills: list[TierShards], count: int) -> list[int]:
    """Numbers of ``count`` pairs, from each tier in turn, as they lie in its first shard."""
    firsts = [fill.pairs[fill.fill.members(0)] for fill in fills]
    turns = ((firsts[turn % len(firsts)], turn // len(firsts)) for turn in range(count))
    return [int(members[place]) for members, place in turns if place < len(members)]


def draw_import_sheet(
    path: Path,
    index: Index,
    reader: RowReader,
    pairs: np.ndarray,
    chosen: list[int],
    resolution: Size,
) -> None:
    """A row for the caption of each chosen pair: that pair, and one of each other tier it has."""
    each = len(reader.images)
    captions = index.numbers("caption_id")[pairs["winner"] // each]

    def picture(image: int) -> Image.Image:
        record, place = divmod(image, each)
        part = index.part(index.part_of(record))
        [loaded] = load_records(reader, part, [record - part.first], resolution)
        return loaded.pictures[place].image

    rows = []
    for number in chosen:
        same = pairs[captions == captions[number]]
        by_tier = {int(pair["tier"]): pair for pair in same[::-1]}
        by_tier[int(pairs[number]["tier"])] = pairs[number]
        shown = [by_tier[tier] for tier in sorted(by_tier)]
        scores = {
            int(pair[side]): float(pair["scores"][place])
            for pair in shown
            for place, side in enumerate(("winner", "loser"))
        }
        images = {image: picture(image) for image in scores}
        ranked = sorted(scores, key=lambda image: -scores[image])
        caption = index.caption(int(pairs[number]["winner"]) // each)
        rows.append(
            ContactRow(
                prompt=caption,
                images=[images[image] for image in ranked],
                scores=[scores[image] for image in ranked],
                pairs=[_contact_pair(pair, images) for pair in shown],
            )
        )
    if rows:
        draw_contact_sheet(path, rows)


def _contact_pair(pair: np.void, images: dict[int, Image.Image]) -> ContactPair:
    return ContactPair(
        tier=int(pair["tier"]),
        winner_image=images[int(pair["winner"])],
        loser_image=images[int(pair["loser"])],
        winner_rank=int(pair["ranks"][0]),
        loser_rank=int(pair["ranks"][1]),
        winner_score=float(pair["scores"][0]),
        loser_score=float(pair["scores"][1]),
    )


UNREADABLE = "unreadable images"


class Importing:
    """Stage 1 of one recipe with `prepare.source` of type `paired` or `ranked`, on all ranks."""

    def __init__(self, ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
        assert not isinstance(recipe.prepare.source, Generate | Masked)
        self.ranks = ranks
        self.recipe = recipe
        self.terminal = terminal
        self.spec = recipe.prepare.source
        self.run_dir = Path(recipe.run_dir)
        self.shards_dir = folder_of_set(recipe)
        _, heldout = read_prompts(recipe.prompts, recipe.seed)
        self.reader = ranks.on_first(lambda: open_source(self.spec))
        folder = self.run_dir / "source"
        self.facts = ranks.on_first(lambda: open_index(folder, self.reader, self.spec, heldout))
        self.index = Index(folder, self.facts)
        self.given = self._given_scores()
        self.inputs = self._inputs_hash()
        self.is_finished = ranks.on_first(self._already_done)

    def describe(self) -> list[tuple[str, str]]:
        """What will be done, for the head of the terminal."""
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

    def _inputs_hash(self) -> str:
        """Of every choice the shards are a function of; another hash means other shards."""
        recipe = self.recipe
        reward = None if self.given else recipe.reward.identity()
        inputs: dict[str, Any] = {
            "seed": recipe.seed,
            "source": self.spec.model_dump(mode="json", exclude={"path", "max_unreadable"}),
            "content": self.facts.content,
            "model": recipe.model.model_dump(mode="json"),
            "reward": reward,
            "curriculum": recipe.curriculum.model_dump(include=PAIR_KEYS),
            "data": recipe.data.model_dump(include=SHARD_KEYS),
        }
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _already_done(self) -> bool:
        manifest = finished_set(self.shards_dir, self.inputs, self.terminal)
        return manifest is not None and self._is_of_these_weights(manifest)

    def _is_of_these_weights(self, manifest: Manifest) -> bool:
        """Whether VAE and reward still hold what made the shards."""
        backbone, reward = self._load()
        changed = []
        if manifest.vae.fingerprint != backbone.fingerprints()["vae"]:
            changed.append("vae")
        if reward is not None and manifest.reward.fingerprint != reward.fingerprint:
            changed.append("reward")
        if changed:
            self.terminal.warn(
                f"the shards are written again: the weights of {', '.join(changed)} have changed"
            )
        return not changed

    def _load(self) -> tuple[Backbone, RewardModel | None]:
        recipe, device = self.recipe, self.ranks.device
        backbone = load_backbone(recipe.model, device, recipe.prepare.precision)
        return backbone, None if self.given else load_reward(recipe.reward, device)

    def run(self) -> None:
        """Do what is not done yet. DataError if no shards can be made of this data."""
        if self.ranks.is_first:
            save_resolved(self.recipe, self.run_dir / "recipe.yaml")
        backbone, reward = self._load()
        fingerprints = backbone.fingerprints()
        tune_for_sampling(self.recipe.speed, backbone)

        tolerance = Tolerance(self.spec.max_unreadable)
        scores = self._score(reward, tolerance)
        made = self._pair(scores)
        made.counts[UNSCORED] -= len(tolerance.problems)
        self._fill(made.pairs)  # too few pairs for the lanes: said before hours of encoding
        latents, pairs = self._encode(backbone, fingerprints["vae"], made.pairs, tolerance)
        made.counts[UNREADABLE] = len(tolerance.problems)
        fills = self._fill(pairs)
        shards = self._write(pairs, fills, latents, backbone)
        manifest = self._manifest(shards, fills, made, scores, backbone, fingerprints, reward)
        self.ranks.on_first(lambda: self._finish(manifest, pairs, fills))

    # Phases

    def _score(self, reward: RewardModel | None, tolerance: Tolerance) -> np.ndarray:
        """(N, K) float32, NaN where there is no score."""
        if reward is None:
            return self.index.numbers("scores")
        height, width = self.recipe.model.resolution
        source = f"{self.facts.content[:16]} {height}x{width} {reward.fingerprint}"
        scoring = ImportScoring(self.run_dir, source, self.index, self.reader, self.ranks)
        recipe = self.recipe
        scores = scoring.run(
            reward, recipe.model.resolution, recipe.reward.images_per_call, tolerance, self.terminal
        )
        failpoint("prepare.scored")
        return scores

    def _pair(self, scores: np.ndarray) -> PairsMade:
        """Every pair with its tier; every rank finds the same. DataError if there is none."""
        curriculum, seed, numbers = self.recipe.curriculum, self.recipe.seed, self.index.numbers
        if isinstance(self.spec, Paired):
            asked = self.spec.on_disagreement
            made = labelled_pairs(numbers("id"), numbers("winner"), scores, asked, curriculum)
        else:
            captions = numbers("caption_id")
            made = ranked_pairs(captions, scores[:, 0], self.index.caption, curriculum, seed)
        if not len(made.pairs):
            raise DataError(
                f"prepare.source.path={self.spec.path}: no pairs in {self.facts.rows} rows: "
                + _listed(self.facts.left_out | made.counts)
            )
        return made

    def _fill(self, pairs: np.ndarray) -> list[TierShards]:
        return fill_tiers(pairs["id"], pairs["tier"], self.recipe)

    def _encode(
        self, backbone: Backbone, vae: str, pairs: np.ndarray, tolerance: Tolerance
    ) -> tuple[PictureLatents, np.ndarray]:
        """Latents of the pairs' images, and those pairs whose images could be read."""
        resolution = self.recipe.model.resolution
        folder = self.run_dir / "latents"
        kind = self.recipe.data.format
        latents = PictureLatents(folder, self.index, self.reader, resolution, vae, kind)
        images = np.unique(np.concatenate([pairs["winner"], pairs["loser"]]))
        batch_size = self.recipe.prepare.batch_size
        lost = latents.run(backbone, images, batch_size, self.ranks, tolerance, self.terminal)
        return latents, pairs[~(np.isin(pairs["winner"], lost) | np.isin(pairs["loser"], lost))]

    def _write(
        self,
        pairs: np.ndarray,
        fills: list[TierShards],
        latents: PictureLatents,
        backbone: Backbone,
    ) -> list[ShardEntry]:
        def sample(number: int) -> tuple[PairMeta, np.ndarray]:
            pair = pairs[number]
            images = int(pair["winner"]), int(pair["loser"])
            winner, loser = (latents.framing(image) for image in images)
            meta = PairMeta(
                pair_id=int(pair["id"]),
                prompt=self.index.caption(images[0] // len(self.reader.images)),
                tier=int(pair["tier"]),
                scores=tuple(pair["scores"].tolist()),
                ranks=tuple(pair["ranks"].tolist()),
                images=(self._name(images[0]), self._name(images[1])),
                original_size=(winner[0], loser[0]),
                crop=(winner[1], loser[1]),
            )
            return meta, np.stack([latents.latents(image) for image in images])

        resolution = self.recipe.model.resolution
        shape = backbone.latent_shape(resolution)
        contents = contents_of(self.recipe.data.format, shape, resolution)
        return write_tiers(self.shards_dir, fills, sample, contents, self.ranks)

    def _name(self, image: int) -> str:
        """An image's id or path, else file, row and place of it."""
        record, place = divmod(image, len(self.reader.images))
        names = self.index.value(record, "names")
        if names:
            return str(names[place])
        file = self.reader.files.name(self.index.value(record, "file"))
        return f"{file}#{self.index.value(record, 'number')}/{place}"

    def _manifest(
        self,
        shards: list[ShardEntry],
        fills: list[TierShards],
        made: PairsMade,
        scores: np.ndarray,
        backbone: Backbone,
        fingerprints: dict[str, str],
        reward: RewardModel | None,
    ) -> Manifest:
        recipe = self.recipe
        by = RewardSource(type="given", path=self.given or "", fingerprint=self.facts.content)
        if reward is not None:
            spec = recipe.reward
            by = RewardSource(type=spec.type, path=spec.source, fingerprint=reward.fingerprint)
        captions = self.index.numbers("caption_id")
        paired = captions[made.pairs["winner"] // len(self.reader.images)]
        prompts = len(np.unique(captions))
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
            reward=by,
            statistics=Statistics(
                prompts=prompts,
                prompts_without_pairs=prompts - len(np.unique(paired)),
                tied_prompts=made.tied_captions,
                candidates=scores.size,
                dropped_candidates=int((~np.isfinite(scores)).sum()),
                eligible_pairs=made.eligible,
                pairs_by_tier=tuple(f.plan.num_shards * f.plan.count for f in fills),
                dropped_remainder_by_tier=tuple(fill.plan.dropped for fill in fills),
                imported={"rows": self.facts.rows} | self.facts.left_out | dict(+made.counts),
            ),
            shards=tuple(shards),
        )

    def _finish(self, manifest: Manifest, pairs: np.ndarray, fills: list[TierShards]) -> None:
        statistics = manifest.statistics
        assert statistics.imported is not None
        fates = {reason: count for reason, count in statistics.imported.items() if reason != "rows"}
        counts = "  ".join(str(len(fill.pairs)) for fill in fills)
        self.terminal.line(f"{self.facts.rows} rows gave {len(pairs)} pairs; {_listed(fates)}")
        self.terminal.line(f"pairs by tier, easiest first: {counts}")
        sheet = self.run_dir / "contact_sheet.png"
        chosen = chosen_pairs(pairs, fills, self.recipe.prepare.contact_sheet_prompts)
        draw_import_sheet(sheet, self.index, self.reader, pairs, chosen, manifest.resolution)
        save_manifest(self.shards_dir, manifest)
        shutil.rmtree(self.run_dir / "latents")
        shutil.rmtree(self.run_dir / "scores", ignore_errors=True)  # of a kill after the merge
        self.terminal.line(f"shards: {self.shards_dir}")
        self.terminal.line(f"look at: {sheet}")


def _listed(counts: Mapping[str, int]) -> str:
    """``12 ties, 3 held-out prompt``."""
    return ", ".join(f"{n} {reason}" for reason, n in counts.items() if n) or "none left out"
