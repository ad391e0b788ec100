"""Stage 1 as a sequence of resumable phases: score, pair, encode, write, draw the sheet.

Every phase asks the disk what is done and does the rest, so a killed run started again repeats at
most the parts in flight. Work is divided over the ranks by part and by shard; what pairs are formed
depends on neither.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..basics.errors import DataError, NumericsError
from ..basics.numbers import is_finite
from ..curriculum.labelled import without_equal
from ..display.contact_sheet import ContactPair, ContactRow, draw_contact_sheet
from ..display.terminal import Terminal
from ..models import Backbone, known_fingerprints, load_backbone
from ..models.few_steps import check_guidance
from ..models.fingerprints import changed_parts, named
from ..models.text import told_of_long
from ..models.tuning import tune_for_sampling
from ..ranks import Ranks
from ..ranks.launch import run_lock
from ..recipe import Generate, Masked, Recipe
from ..recipe.identity import MODEL_FILES, save_resolved
from ..shards.contents import contents_of
from ..shards.manifest import Manifest, ShardEntry, Statistics, StoredText, save_manifest
from ..shards.prompts import PromptFiles, write_prompts
from ..shards.sample import PairMeta
from ..shards.store import LocalStore
from ..sources.left_out import NAME, LeftOut, naming
from ..sources.pictures import Tolerance
from ..sources.prompts import evaluation_prompts, sample_prompts
from .imported import ImportedPairs, listed
from .latents import Latents, Pixels
from .parts import Outcome, PairSource, Ranked
from .sampled import SampledPairs
from .shard_set import (
    PAIR_KEYS,
    PROMPTS,
    SHARD_KEYS,
    TierShards,
    fill_tiers,
    folder_of_set,
    manifest_of,
    refuse_to_replace,
    remove_prompts,
    set_in,
    write_tiers,
)

EMBEDDED = 64  # prompts at once that are asked for, which the encoders see in smaller parts


class Preparation:
    """Stage 1 of one recipe, on all ranks together."""

    def __init__(self, ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
        self.ranks = ranks
        self.recipe = recipe
        self.terminal = terminal
        self.run_dir = Path(recipe.run_dir)
        self.shards_dir = folder_of_set(recipe)
        self.is_sampled = isinstance(recipe.prepare.source, Generate | Masked)
        kind = SampledPairs if self.is_sampled else ImportedPairs
        self.source: PairSource = kind(ranks, recipe, terminal)
        self.describe = self.source.describe
        self.inputs = self._inputs_hash()
        self.manifest: Manifest | None = ranks.on_first(self._shards_done)
        """Of the shards, if they are there."""
        self.is_finished = self.manifest is not None and ranks.on_first(self._prompts_done)

    def _inputs_hash(self, *, by_name: bool = False) -> str:
        """Of every choice the shards are a function of; another hash means other shards. Which
        files the recipe names does not count, but what they hold, unless it is to be ``by_name``.
        """
        recipe = self.recipe
        inputs: dict[str, Any] = {
            "seed": recipe.seed,
            "model": recipe.model.model_dump(mode="json"),
            "curriculum": recipe.curriculum.model_dump(include=PAIR_KEYS),
            "data": recipe.data.model_dump(include=SHARD_KEYS),
            **self.source.inputs(),
        }
        if not by_name:
            # What is not given counts no more than a key that came after the set was made.
            given = {k: v for k, v in inputs["model"].items() if v is not None}
            inputs["model"] = {k: v for k, v in given.items() if k not in MODEL_FILES}
            if inputs.get("reward"):
                inputs["reward"] = recipe.reward.knobs()
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def _shards_done(self) -> Manifest | None:
        manifest = set_in(self.shards_dir, self.terminal)
        if manifest is None:
            return None
        if others := self._made_with_others(manifest):
            refuse_to_replace(manifest, self.recipe, others)
            self.terminal.warn(
                f"the shards in {self.shards_dir} are written again: they were made with {others}"
            )
        return None if others else manifest

    def _prompts_done(self) -> bool:
        """Whether every prompt is stored that a run of the recipe asks for, if they are to be."""
        assert self.manifest is not None
        recipe, stored = self.recipe, self.manifest.text
        if recipe.data.text == "live":
            return True
        if stored is None or stored.precision != recipe.train.precision:
            return False
        known = known_fingerprints(recipe.model, recipe.train.precision)
        if stored.fingerprint != (known or self._load_embedder().fingerprints())["text"]:
            return False
        try:
            found = PromptFiles(LocalStore(self.shards_dir), stored)
        except DataError as error:
            self.terminal.warn(f"prompts are embedded again: {error}")
            return False
        return all(prompt in found for prompt in self._prompts())

    def _prompts(self) -> list[str]:
        """All that a run of the recipe asks for: of pairs, of pictures while it trains, and the
        empty one, which guides and stands for dropped captions.
        """
        drawn = [*sample_prompts(self.recipe), *evaluation_prompts(self.recipe)]
        return list(dict.fromkeys(["", *self.source.prompts_used(), *drawn]))

    def _made_with_others(self, manifest: Manifest) -> str:
        """What made the set and is another now; empty if the set is the one that is wanted.

        A set that is too old to tell its parts is known by the names that the recipe gives and by
        the weights of denoiser, VAE and reward.
        """
        if manifest.fingerprint != self._inputs_hash(by_name=manifest.parts is None):
            is_of_seed = manifest.seed == self.recipe.seed
            return "another recipe" if is_of_seed else f"another recipe (seed={manifest.seed})"
        then = manifest.parts
        if then is None:
            sources = {name: getattr(manifest, name) for name in ("model", "vae", "reward")}
            then = {name: source.fingerprint for name, source in sources.items()}
        made_by = known_fingerprints(self.recipe.model, self.recipe.prepare.precision)
        now = self._parts(made_by or self._load_backbone().fingerprints())
        if manifest.parts is None:
            reward = self.source.reward()
            now = {name: now[name] for name in then if name in now}
            now["reward"] = reward["weights"] if reward else self.source.ranked_by().fingerprint
            then = {name: then[name] for name in now}
        changed = changed_parts(then, now)
        return f"another {named(changed)}" if changed else ""

    def _parts(self, made_by: Mapping[str, str]) -> dict[str, str]:
        """What decides the shards, of a backbone's parts and the reward: of pairs that are read the
        model's VAE alone.
        """
        kinds = made_by if self.is_sampled else ("vae", "vae_config")
        reward = self.source.reward()
        return {name: made_by[name] for name in kinds} | (
            {"reward": reward["whole"]} if reward else {}
        )

    def _load_backbone(self) -> Backbone:
        recipe = self.recipe
        check_guidance(recipe)
        return load_backbone(recipe.model, self.ranks.device, recipe.prepare.precision)

    def _load_embedder(self) -> Backbone:
        """With text encoders as training would have them."""
        recipe = self.recipe
        return load_backbone(recipe.model, self.ranks.device, recipe.train.precision)

    def run(self) -> None:
        """Do what is not done yet. DataError if no shards can be made of these images; RecipeError
        while another process prepares the same set.
        """
        with run_lock(self.ranks, self.shards_dir, "data.path"):
            self._run()

    def _run(self) -> None:
        if self.ranks.is_first:
            save_resolved(self.recipe, self.run_dir / "recipe.yaml")
        manifest, backbone = self.manifest, None
        if manifest is None:
            manifest, backbone = self._make_shards()
        if self.recipe.data.text == "stored":
            if self.recipe.train.precision != self.recipe.prepare.precision:
                backbone = None  # its memory, before another is loaded
            if backbone is None:
                backbone = self._load_embedder()
                backbone.fingerprints()  # as it was loaded
                tune_for_sampling(self.recipe.speed, backbone)
            self._store_prompts(manifest, backbone)

    def _make_shards(self) -> tuple[Manifest, Backbone]:
        """The manifest of all shards, and the backbone that made them."""
        ranked_by = self.source.ranked_by()  # what is wrong with a reward is said before all else
        backbone = self._load_backbone()
        made_by = backbone.fingerprints()
        tune_for_sampling(self.recipe.speed, backbone)
        if self.ranks.is_first and (told := told_of_long(backbone, self.source.prompts_used())):
            self.terminal.warn(told)

        tolerance = Tolerance(getattr(self.recipe.prepare.source, "max_unreadable", 0))
        ranked = self.source.rank(backbone, tolerance)
        counts = self._name_left_out(Outcome(ranked, tolerance.problems))
        if not len(ranked.made.pairs):
            raise DataError(
                f"prepare.source: no pairs in {self.source.rows} rows: {listed(counts)} "
                f"(each is named in {self.run_dir / NAME})",
                "prepare.source.path",
                "empty",
            )
        self._fill(ranked.made.pairs)  # too few for the lanes: said before hours of encoding
        images, ranked, pairs = self._encode(backbone, made_by, ranked, tolerance)
        fills = self._fill(pairs)
        written = pairs[np.concatenate([fill.written for fill in fills])]
        counts = self._name_left_out(Outcome(ranked, tolerance.problems, written, images.remarks))
        self._tell(fills, len(written), counts)
        shards = self._write(pairs, fills, images, backbone)
        statistics = _statistics(ranked, fills, self.source.rows, counts)
        manifest = manifest_of(
            self.recipe,
            self.inputs,
            backbone,
            self._parts(made_by),
            ranked_by,
            statistics,
            shards,
        )
        self.ranks.on_first(lambda: self._finish(manifest, ranked, pairs, fills))
        return manifest, backbone

    # Phases

    def _fill(self, pairs: np.ndarray) -> list[TierShards]:
        """Which pair goes into which shard; every rank finds the same."""
        return fill_tiers(pairs["id"], pairs["tier"], self.recipe)

    def _name_left_out(self, outcome: Outcome) -> dict[str, int]:
        """Write the list of all that is not used as it stands, or no file where there is nothing;
        returns, on every rank, how many of the data there are by reason.
        """

        def write() -> dict[str, int]:
            path = self.run_dir / NAME
            with naming(path) as of_prompts:
                of_data = LeftOut(of_prompts.file)
                of_prompts.copy(self.source.prompts_left_out.lines())
                self.source.name_left_out(outcome, of_data)
            if not of_prompts.counts and not of_data.counts:
                path.unlink()
            return of_data.counts

        return dict(self.ranks.on_first(write))

    def _encode(
        self,
        backbone: Backbone,
        made_by: Mapping[str, str],
        ranked: Ranked,
        tolerance: Tolerance,
    ) -> tuple[Latents | Pixels, Ranked, np.ndarray]:
        """What the shards will hold of the pairs' images; without the pairs of equal pictures; and
        those pairs whose images are readable.
        """
        pairs, kind, parts = ranked.made.pairs, self.recipe.data.format, ranked.parts
        images: Latents | Pixels
        if kind == "raw" and self.is_sampled:
            images, readable = Pixels(parts), pairs
        else:
            vae = f"{made_by['vae']} {made_by['vae_config']}"
            images = Latents(self.run_dir / "latents", parts, vae, kind)
            wanted = np.unique(np.concatenate([pairs["winner"], pairs["loser"]]))
            batch_size = self.recipe.prepare.batch_size
            lost = images.run(backbone, wanted, batch_size, self.ranks, tolerance, self.terminal)
            readable = pairs[~(np.isin(pairs["winner"], lost) | np.isin(pairs["loser"], lost))]
        ranked = self._without_equal(ranked, readable, images)
        left = np.isin(ranked.made.pairs["id"], readable["id"])
        return images, ranked, ranked.made.pairs[left]

    def _without_equal(self, ranked: Ranked, pairs: np.ndarray, images: Latents | Pixels) -> Ranked:
        """``pairs`` are those whose images can be looked at."""

        def is_equal(number: int) -> bool:
            both = (images.digests(int(pairs[number][side])) for side in ("winner", "loser"))
            return any(ours == theirs for ours, theirs in zip(*both, strict=True))

        equal = np.array(self.ranks.divided(range(len(pairs)), is_equal), bool)
        if not equal.any():
            return ranked
        parts, gone = ranked.parts, pairs[equal]
        caption = parts.caption(int(gone[0]["winner"]) // parts.each)
        if self.ranks.is_first:
            self.terminal.warn(
                f"{len(gone)} of {len(equal)} pairs are left out, whose winner and loser are one "
                f"picture, e.g. of {caption[:60]!r}"
            )
        of_all = np.isin(ranked.made.pairs["id"], gone["id"])
        return replace(ranked, made=without_equal(ranked.made, of_all, parts.each))

    def _tell(self, fills: list[TierShards], written: int, left_out: dict[str, int]) -> None:
        if self.source.rows is not None:
            told = f"{self.source.rows} rows gave {written} pairs; {listed(left_out)}"
            self.terminal.line(told)
        if prompts := self.source.prompts_left_out.counts:
            self.terminal.line(f"prompts: {listed(prompts)}")
        path = self.run_dir / NAME
        if path.exists():
            self.terminal.line(f"named one by one in {path}")
        counts = "  ".join(str(len(fill.pairs)) for fill in fills)
        self.terminal.line(f"pairs by tier, easiest first: {counts}")

    def _write(
        self,
        pairs: np.ndarray,
        fills: list[TierShards],
        images: Latents | Pixels,
        backbone: Backbone,
    ) -> list[ShardEntry]:
        parts = images.parts

        def sample(number: int) -> tuple[PairMeta, np.ndarray]:
            pair = pairs[number]
            both = int(pair["winner"]), int(pair["loser"])
            (winner, of_winner), (loser, of_loser) = (images.image(image) for image in both)
            meta = PairMeta(
                pair_id=int(pair["id"]),
                prompt=parts.caption(both[0] // parts.each),
                tier=int(pair["tier"]),
                scores=tuple(pair["scores"].tolist()),
                ranks=tuple(pair["ranks"].tolist()),
                images=(parts.image_name(both[0]), parts.image_name(both[1])),
                original_size=(of_winner[0], of_loser[0]),
                crop=(of_winner[1], of_loser[1]),
            )
            return meta, np.stack([winner, loser])

        resolution = self.recipe.model.resolution
        shape = backbone.latent_shape(resolution)
        contents = contents_of(self.recipe.data.format, shape, resolution)
        return write_tiers(self.shards_dir, fills, sample, contents, self.ranks)

    def _store_prompts(self, manifest: Manifest, backbone: Backbone) -> None:
        """Embed all prompts and write that beside the shards, each rank a share."""
        ranks, folder, precision = self.ranks, self.shards_dir, self.recipe.train.precision
        fingerprint = backbone.fingerprints()["text"]
        ranks.on_first(lambda: remove_prompts(folder, manifest))
        prompts = self._prompts()

        def rows() -> Iterator[tuple[str, tuple[Tensor, ...]]]:
            with self.terminal.progress("embed", len(prompts), 0, "prompts") as progress:
                for start in ranks.until_stopped(ranks.share(range(0, len(prompts), EMBEDDED))):
                    some = prompts[start : start + EMBEDDED]
                    for prompt, row in zip(some, backbone.embedded(some), strict=True):
                        _refuse_non_finite(prompt, row, precision)
                        yield prompt, row
                    left = len(prompts) - progress.done
                    progress.advance(min(len(some) * ranks.world_size, left))

        own = ranks.together(lambda: write_prompts(folder, f"{PROMPTS}-{ranks.rank:05d}", rows()))
        ranks.meet()
        files = tuple(file for part in ranks.gather(own) for file in part)
        text = StoredText(fingerprint=fingerprint, precision=precision, files=files)
        ranks.on_first(lambda: save_manifest(folder, manifest.model_copy(update={"text": text})))
        size = sum(file.bytes for file in files) / 2**20
        self.terminal.line(f"prompts: {len(prompts)} are stored, {size:,.1f} MiB in {precision}")

    def _finish(
        self, manifest: Manifest, ranked: Ranked, pairs: np.ndarray, fills: list[TierShards]
    ) -> None:
        sheet = self.run_dir / "contact_sheet.png"
        rows = self._contact_rows(ranked, pairs, fills)
        if rows:
            draw_contact_sheet(sheet, rows)
        save_manifest(self.shards_dir, manifest)
        for folder in ("latents", "scores"):  # scores: of a kill after they were merged
            shutil.rmtree(self.run_dir / folder, ignore_errors=True)
        self.terminal.line(f"shards: {self.shards_dir}")
        self.terminal.line(f"look at: {sheet}")

    def _contact_rows(
        self, ranked: Ranked, pairs: np.ndarray, fills: list[TierShards]
    ) -> list[ContactRow]:
        """A row for the caption of each chosen pair: that pair, and one of each other tier."""
        parts, rows = ranked.parts, []
        captions = parts.captions[pairs["winner"] // parts.each]
        pixels, scores = Pixels(parts), ranked.scores.reshape(-1)
        count = self.recipe.prepare.contact_sheet_prompts
        for number, shown in self.source.sheet_rows(ranked, pairs, fills, count):
            same = pairs[captions == captions[number]]
            by_tier = {int(pair["tier"]): pair for pair in same[::-1]}
            by_tier[int(pairs[number]["tier"])] = pairs[number]
            in_row = [by_tier[tier] for tier in sorted(by_tier)]
            in_pairs = [int(pair[side]) for pair in in_row for side in ("winner", "loser")]
            images = {image: Image.fromarray(pixels.image(image)[0]) for image in shown + in_pairs}
            ordered = sorted(shown or dict.fromkeys(in_pairs), key=lambda image: -scores[image])
            rows.append(
                ContactRow(
                    prompt=parts.caption(int(pairs[number]["winner"]) // parts.each),
                    images=[images[image] for image in ordered],
                    scores=[float(scores[image]) for image in ordered],
                    pairs=[_contact_pair(pair, images) for pair in in_row],
                )
            )
        return rows


def _contact_pair(pair: np.void, images: dict[int, Image.Image]) -> ContactPair:
    both = [images[int(pair[side])] for side in ("winner", "loser")]
    return ContactPair(int(pair["tier"]), both, pair["ranks"].tolist(), pair["scores"].tolist())


def _statistics(
    ranked: Ranked, fills: list[TierShards], rows: int | None, left_out: dict[str, int]
) -> Statistics:
    parts, scores, made = ranked.parts, ranked.scores, ranked.made
    prompts = len(np.unique(parts.captions))
    paired = parts.captions[made.pairs["winner"] // parts.each]
    return Statistics(
        prompts=prompts,
        prompts_without_pairs=prompts - len(np.unique(paired)),
        tied_prompts=len(made.tied),
        candidates=scores.size,
        dropped_candidates=int((~np.isfinite(scores)).sum()),
        eligible_pairs=made.eligible,
        pairs_by_tier=tuple(fill.plan.num_shards * fill.plan.count for fill in fills),
        dropped_remainder_by_tier=tuple(fill.plan.dropped for fill in fills),
        imported=None if rows is None else {"rows": rows} | left_out,
    )


def _refuse_non_finite(prompt: str, row: tuple[Tensor, ...], precision: str) -> None:
    if not all(map(is_finite, row)):
        raise NumericsError(
            f"the text encoders make NaN or infinity of {prompt[:200]!r}: they overflow at "
            f"train.precision={precision}, take bf16 or fp32, or their weights are broken",
            "train.precision",
            "non-finite",
        )
