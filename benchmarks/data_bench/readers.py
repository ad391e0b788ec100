"""Ways to read the same pair shards whole, and the shards: what `bench_data.py` compares.

Each reader hands over every pair's record and arrays, and returns how many there were.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset
from cdpo.engine.basics.keyed import content_id
from cdpo.engine.curriculum.pacing import Pacing
from cdpo.engine.recipe import Curriculum
from cdpo.engine.shards.contents import contents_of
from cdpo.engine.shards.lanes import LanePlan
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
from cdpo.engine.shards.stream import PairStream
from cdpo.engine.shards.writer import write_shard

SHAPE, PIXELS = (4, 64, 64), (512, 512)  # of Stable Diffusion 1.5: 64 KiB a pair
LANES, BATCH = 2, 32
Sample = tuple[PairMeta, np.ndarray]


def samples(first: int, count: int) -> Iterator[Sample]:
    """Pairs with records as `prepare` writes them, and latents that are noise."""
    draw = np.random.default_rng(first)
    for meta in records(first, count):
        yield meta, draw.standard_normal((2, *SHAPE), dtype=np.float32).astype(np.float16)


def records(first: int, count: int) -> Iterator[PairMeta]:
    for number in range(first, first + count):
        prompt = f"a photograph of an astronaut riding a horse, number {number}, highly detailed"
        yield PairMeta(
            pair_id=content_id(prompt),
            prompt=prompt,
            tier=1,
            scores=(0.3125, 0.25),
            ranks=(1, 7),
            images=(f"{number:016x}-0001", f"{number:016x}-0002"),
            original_size=(PIXELS, PIXELS),
            crop=((0, 0), (0, 0)),
        )


def write_set(folder: Path, num_shards: int, pairs_a_shard: int) -> Manifest:
    """A set of one tier."""
    contents = contents_of("latents", SHAPE, PIXELS)
    shards = tuple(
        write_shard(
            folder / f"tier-1-{index:06d}.tar",
            samples(index * pairs_a_shard, pairs_a_shard),
            contents,
        )
        for index in range(num_shards)
    )
    return save_set(folder, shards, LANES)


def write_alike(folder: Path, num_shards: int, pairs_a_shard: int, lanes: int) -> Manifest:
    """A set whose shards hold the same latents under other records, for what goes by their number
    and size: gigabytes of noise would take minutes to draw.
    """
    contents = contents_of("latents", SHAPE, PIXELS)
    latents = [drawn for _, drawn in samples(0, pairs_a_shard)]
    shards = []
    for index in range(num_shards):
        pairs = zip(records(index * pairs_a_shard, pairs_a_shard), latents, strict=True)
        shards.append(write_shard(folder / f"tier-1-{index:06d}.tar", pairs, contents))
    return save_set(folder, tuple(shards), lanes)


def save_set(folder: Path, shards: tuple[ShardEntry, ...], lanes: int) -> Manifest:
    """The manifest of shards of one tier."""
    source = {"path": "none", "fingerprint": "none"}
    manifest = Manifest(
        created_by="bench_data",
        fingerprint="none",
        seed=0,
        lanes=lanes,
        tiers=1,
        resolution=PIXELS,
        latent_shape=SHAPE,
        model=ModelSource(**source),
        vae=VaeSource(**source, scaling_factor=0.18215),
        reward=RewardSource(**source, type="none"),
        shards=shards,
    )
    save_manifest(folder, manifest)
    return manifest


def read_tars(folder: Path, manifest: Manifest) -> int:
    """A plain loop over each tar with the standard library, json and numpy."""
    count = 0
    for entry in manifest.shards:
        with tarfile.open(folder / entry.name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".json"):
                    json.loads(file.read())
                else:
                    np.load(io.BytesIO(file.read()), allow_pickle=False)
                    count += 1
    return count


def read_webdataset(folder: Path, manifest: Manifest) -> int:
    """webdataset, in one process, decoding what it knows by name."""
    urls = [str(folder / entry.name) for entry in manifest.shards]
    found = webdataset.WebDataset(urls, shardshuffle=False).decode()
    return sum(1 for sample in found if sample["latents.npy"].shape and sample["json"])


def stream_of(
    folder: Path, manifest: Manifest, workers: int, readers: ShardReaders | None = None
) -> PairStream:
    """Our batches of one rank; with the same ``readers`` shards stay open and verified."""
    plan = LanePlan(manifest, seed=0, world_size=1, rank=0, global_batch=BATCH, shuffle_shards=8)
    pacing = Pacing(Curriculum(tiers=1, order="random"), 10**9)
    return PairStream(plan, readers or ShardReaders(folder, manifest), pacing, workers=workers)


def read_stream(stream: PairStream, num_pairs: int, first_step: int = 0) -> int:
    """As many batches as ``num_pairs`` fill, in the order that training takes them."""
    steps = range(first_step, first_step + num_pairs // BATCH)
    return sum(len(stream.next(step, (0,))) for step in steps)


def write_webdataset(folder: Path, pairs: list[Sample]) -> None:
    """The same shard by webdataset's own writer, which neither checks, hashes nor flushes."""
    with webdataset.TarWriter(str(folder / "plain.tar")) as tar:
        for meta, latents in pairs:
            record = meta.model_dump(mode="json")
            tar.write({"__key__": f"{meta.pair_id:016x}", "json": record, "latents.npy": latents})
