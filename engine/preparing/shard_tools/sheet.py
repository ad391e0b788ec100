"""The pairs of a set as pictures: raw ones, or decoded by the VAE that made their latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ...basics.errors import OutsideError
from ...display.contact_sheet import ContactPair, ContactRow, draw_contact_sheet
from ...models import fingerprint
from ...models.autoencoder import Autoencoder
from ...models.pretrained import read_network, reading
from ...recipe.family import FAMILIES
from ...shards.contents import Kind
from ...shards.manifest import Manifest, VaeSource, shards_by_tier
from ...shards.reader import ShardReaders
from ...shards.sample import PairSample
from .show import pairs_of

Pictures = Callable[[PairSample], list[Image.Image]]  # winner, loser
LOOKED_AT = 200  # pairs of a tier among which prompts with pairs in several tiers are looked for


def draw_sheet(folder: str | Path, manifest: Manifest, path: str | Path, num_prompts: int) -> None:
    """Write a PNG of ``num_prompts`` prompts, each with a pair of every tier that was found.

    Raises OutsideError when the VAE is not in a folder of this machine or has other weights now,
    ShardError for a bad shard.
    """
    pictures = _pixels
    if manifest.kind != "raw":
        pictures = partial(_decoded, load_vae(manifest.vae), manifest.kind)
    chosen = choose(folder, manifest, num_prompts)
    draw_contact_sheet(path, [_row(pairs, pictures) for pairs in chosen])


def choose(folder: str | Path, manifest: Manifest, num_prompts: int) -> list[list[PairSample]]:
    """Pairs of ``num_prompts`` prompts, one of a tier; the prompts with most tiers come first."""
    readers = ShardReaders(folder, manifest)
    by_prompt: dict[str, dict[int, PairSample]] = {}
    for tier, entries in sorted(shards_by_tier(manifest.shards).items()):
        for sample in pairs_of(readers, entries, max(LOOKED_AT, num_prompts)):
            by_prompt.setdefault(sample.prompt, {}).setdefault(tier, sample)
    readers.close()
    fullest = sorted(by_prompt.values(), key=len, reverse=True)  # stable: else in order of reading
    return [list(pairs.values()) for pairs in fullest[:num_prompts]]


def load_vae(source: VaeSource) -> Autoencoder:
    """The VAE of a set, if it is at hand."""
    folder = Path(source.path)
    if not folder.is_dir():
        raise OutsideError(
            f"a sheet is decoded by the VAE of the set, {source.path}, and that is no folder here: "
            "run where it is one, or show the set without --sheet",
            str(source.path),
            "missing",
        )
    inner = folder / "vae" if (folder / "vae").is_dir() else folder
    with reading(f"vae={inner}", "VAE", str(inner)) as place:
        found = AutoencoderKL.load_config(place).get("_class_name")
    of_families = {family.vae for family in FAMILIES.values()}
    network = getattr(diffusers, found) if found in of_families else AutoencoderKL
    vae = read_network(network, str(inner), torch.float32, key="vae", kind="VAE")
    autoencoder = Autoencoder(vae.eval().requires_grad_(False))
    if fingerprint(vae) != source.fingerprint:
        raise OutsideError(
            f"the VAE in {inner} has other weights than the one that made the set: its pictures "
            "would not be those that were ranked",
            str(inner),
            "mismatch",
        )
    return autoencoder


def _row(pairs: Sequence[PairSample], pictures: Pictures) -> ContactRow:
    shown = [ContactPair(p.tier, pictures(p), p.meta.ranks, p.meta.scores) for p in pairs]
    return ContactRow(prompt=pairs[0].prompt, images=[], scores=[], pairs=shown)


def _pixels(pair: PairSample) -> list[Image.Image]:
    return [Image.fromarray(image) for image in pair.images]


def _decoded(autoencoder: Autoencoder, kind: Kind, pair: PairSample) -> list[Image.Image]:
    images = torch.from_numpy(np.array(pair.images))  # a copy: the reader's is not writable
    return autoencoder.decode(autoencoder.latents(images) if kind == "moments" else images)
