"""Small shard sets: real ones in a folder, and manifests of sets that exist on paper only."""

import hashlib
import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from cdpo.engine.basics.errors import ShardError
from cdpo.engine.basics.keyed import content_id
from cdpo.engine.shards.contents import ArrayContents
from cdpo.engine.shards.manifest import (
    Manifest,
    ModelSource,
    RewardSource,
    ShardEntry,
    VaeSource,
    save_manifest,
)
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.sample import PairMeta
from cdpo.engine.shards.writer import ShardFill, plan_shards, write_shard
from refusals import refused

SHAPE = (4, 2, 2)
CONTENTS = ArrayContents("latents", SHAPE)


def make_meta(tier: int, number: int) -> PairMeta:
    prompt = f"prompt {number} of tier {tier}"
    return PairMeta(
        pair_id=content_id(prompt, "0", "1"),
        prompt=prompt,
        tier=tier,
        scores=(0.75, 0.25),
        ranks=(1, 2),
        images=(f"{prompt}, 0", f"{prompt}, 1"),
        original_size=((16, 16), (16, 16)),
        crop=((0, 0), (0, 0)),
    )


def make_latents(meta: PairMeta, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """Latents that tell their pair: float32 (2, C, h, w)."""
    return np.random.default_rng(meta.pair_id).normal(size=(2, *shape)).astype(np.float32)


def make_manifest(shards: list[ShardEntry], lanes: int, tiers: int, **changes: object) -> Manifest:
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


def paper_manifest(lanes: int, tiers: dict[int, tuple[int, int]]) -> Manifest:
    """A manifest without files: {tier: (shards, pairs in each)}."""
    shards = [
        ShardEntry(
            name=f"tier-{tier}-{i:06d}.tar", tier=tier, count=count, bytes=1, sha256="0" * 64
        )
        for tier, (num_shards, count) in tiers.items()
        for i in range(num_shards)
    ]
    return make_manifest(shards, lanes, len(tiers))


def write_set(folder: Path, lanes: int, pairs_by_tier: list[int], pairs_per_shard: int) -> Manifest:
    """A whole set on disk, with its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for tier, num_pairs in enumerate(pairs_by_tier, 1):
        metas = [make_meta(tier, number) for number in range(num_pairs)]
        plan = plan_shards(tier, num_pairs, lanes, pairs_per_shard)
        fill = ShardFill(plan, np.array([meta.pair_id for meta in metas]), seed=3)
        for index in range(plan.num_shards):
            chosen = [metas[member] for member in fill.members(index)]
            samples = ((meta, make_latents(meta)) for meta in chosen)
            entries.append(write_shard(folder / plan.name(index), samples, CONTENTS))
    manifest = make_manifest(entries, lanes, len(pairs_by_tier))
    save_manifest(folder, manifest)
    return manifest


def make_tar(members: list[tuple[str, bytes]], **attributes: object) -> bytes:
    """A tar of what is given, in order; ``attributes`` are set on every header."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def small() -> SimpleNamespace:
    """The builders of this file."""
    return SimpleNamespace(
        shape=SHAPE,
        contents=CONTENTS,
        meta=make_meta,
        latents=make_latents,
        manifest=make_manifest,
        paper=paper_manifest,
        write_set=write_set,
        tar=make_tar,
    )


@pytest.fixture
def read_bytes(tmp_path):
    """Read all of a tar of ``count`` samples whose size and sha256 are as declared."""

    def read(data: bytes, count: int = 2):
        (tmp_path / "x.tar").write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        entry = ShardEntry(
            name="x.tar", tier=1, count=count, bytes=max(1, len(data)), sha256=sha256
        )
        other = entry.model_copy(update={"name": "y.tar"})
        readers = ShardReaders(tmp_path, make_manifest([entry, other], 2, 1))
        return [readers.read(entry, index) for index in range(count)]

    return read


@pytest.fixture
def good():
    """Members (name, bytes) of a sound tar of two samples: json, latents, json, latents."""
    members = []
    for number in range(2):
        meta = make_meta(1, number)
        buffer = io.BytesIO()
        np.save(buffer, make_latents(meta).astype(np.float16))
        key = f"{meta.pair_id:016x}"
        members.append((f"{key}.json", meta.model_dump_json().encode()))
        members.append((f"{key}.latents.npy", buffer.getvalue()))
    return members


@pytest.fixture
def refuse(read_bytes):
    """Check that a tar gives one line of ShardError of this kind, about this key and member."""

    def check(data: bytes, kind: str, key: str | None = None, member: str | None = None):
        with refused(ShardError, kind) as told:
            read_bytes(data)
        assert "\n" not in str(told.value)
        assert "x.tar" in told.value.shard
        assert (told.value.key, told.value.member) == (key, member)

    return check
