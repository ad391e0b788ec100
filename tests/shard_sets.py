"""Small shard sets: real ones in a folder, and manifests of sets that exist on paper only.

Tests of engine/ take this module as the fixture `small`.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from cdpo.engine.basics.keyed import content_id
from cdpo.engine.shards.contents import ArrayContents, Kind, contents_of
from cdpo.engine.shards.lanes import LanePlan
from cdpo.engine.shards.manifest import (
    Manifest,
    ModelSource,
    RewardSource,
    ShardEntry,
    VaeSource,
    save_manifest,
)
from cdpo.engine.shards.sample import PairMeta
from cdpo.engine.shards.writer import ShardFill, plan_shards, write_shard

SHAPE = (4, 2, 2)
CONTENTS = ArrayContents("latents", SHAPE)


def meta(tier: int, number: int) -> PairMeta:
    """A record that tells its pair."""
    prompt = f"prompt {number} of tier {tier}"
    return PairMeta(
        pair_id=content_id(prompt, "0", "1"),
        prompt=prompt,
        tier=tier,
        scores=(0.75, 0.25),
        ranks=(1, 2),
        images=(f"{content_id(prompt):016x}-0000", f"{content_id(prompt):016x}-0001"),
        original_size=((16, 16), (16, 16)),
        crop=((0, 0), (0, 0)),
    )


def latents(of: PairMeta) -> np.ndarray:
    """Latents that tell their pair: float32 (2, C, h, w)."""
    return np.random.default_rng(of.pair_id).normal(size=(2, *SHAPE)).astype(np.float32)


def images(of: PairMeta, kind: Kind, resolution: tuple[int, int]) -> np.ndarray:
    """What a set of a kind holds of a pair, such that it tells the pair: (2, ...)."""
    contents = contents_of(kind, SHAPE, resolution)
    draw = np.random.default_rng(of.pair_id)
    if kind == "raw":
        return draw.integers(0, 256, contents.shape, dtype=np.uint8)
    return draw.normal(size=contents.shape).astype(np.float16)


def manifest(shards: list[ShardEntry], lanes: int, tiers: int, **changes: object) -> Manifest:
    return Manifest(
        **{
            "created_by": "test",
            "fingerprint": "f",
            "seed": 3,
            "lanes": lanes,
            "tiers": tiers,
            "resolution": (16, 16),
            "latent_shape": SHAPE,
            "model": ModelSource(path="m", fingerprint="a"),
            "vae": VaeSource(path="v", fingerprint="b", scaling_factor=0.5),
            "reward": RewardSource(path="r", fingerprint="c", type="clip_score"),
            "shards": tuple(shards),
        }
        | changes
    )


def paper(lanes: int, tiers: dict[int, tuple[int, int]]) -> Manifest:
    """A manifest without files: {tier: (shards, pairs in each)}."""
    shards = [
        ShardEntry(
            name=f"tier-{tier}-{i:06d}.tar", tier=tier, count=count, bytes=1, sha256="0" * 64
        )
        for tier, (num_shards, count) in tiers.items()
        for i in range(num_shards)
    ]
    return manifest(shards, lanes, len(tiers))


def write_set(folder: Path, lanes: int, pairs_by_tier: list[int], pairs_per_shard: int) -> Manifest:
    """A whole set on disk, with its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for tier, num_pairs in enumerate(pairs_by_tier, 1):
        metas = [meta(tier, number) for number in range(num_pairs)]
        plan = plan_shards(tier, num_pairs, lanes, pairs_per_shard)
        fill = ShardFill(plan, np.array([one.pair_id for one in metas]), seed=3)
        for index in range(plan.num_shards):
            chosen = [metas[member] for member in fill.members(index)]
            samples = ((one, latents(one)) for one in chosen)
            entries.append(write_shard(folder / plan.name(index), samples, CONTENTS))
    made = manifest(entries, lanes, len(pairs_by_tier))
    save_manifest(folder, made)
    return made


def plan(of: Manifest, **changes: int) -> LanePlan:
    """What one rank reads of a set, a rank alone unless ``changes`` say otherwise."""
    usual = {"seed": 3, "world_size": 1, "rank": 0, "global_batch": of.lanes, "shuffle_shards": 2}
    return LanePlan(of, **usual | changes)


def write_kind(
    folder: Path, kind: Kind, lanes: int, num_shards: int, pairs: int, resolution: tuple[int, int]
) -> Manifest:
    """A whole set of one tier and of any kind, ``pairs`` in each shard."""
    contents = contents_of(kind, SHAPE, resolution)
    metas = [meta(1, number) for number in range(num_shards * pairs)]
    entries = [
        write_shard(
            folder / f"tier-1-{index:06d}.tar",
            ((one, images(one, kind, resolution)) for one in metas[index::num_shards]),
            contents,
        )
        for index in range(num_shards)
    ]
    made = manifest(entries, lanes, 1, kind=kind, resolution=resolution)
    save_manifest(folder, made)
    return made


def tar(members: list[tuple[str, bytes]], **attributes: object) -> bytes:
    """A tar of what is given, in order; ``attributes`` are set on every header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
