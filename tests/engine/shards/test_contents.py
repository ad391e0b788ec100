"""Moments and raw images in shards: back as they were written, and refused when they lie."""

import io
import struct
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import shard_sets
import torch
import webdataset
from cdpo.engine.basics.errors import ShardError
from cdpo.engine.curriculum.pacing import Pacing
from cdpo.engine.recipe import Curriculum
from cdpo.engine.shards import webp
from cdpo.engine.shards.contents import ImageContents, contents_of
from cdpo.engine.shards.manifest import load_manifest
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.stream import PairStream
from cdpo.engine.shards.webp import decode_webp, encode_webp
from cdpo.engine.shards.writer import write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import refused

RESOLUTION = (16, 24)
KINDS = ("latents", "moments", "raw")


@pytest.fixture(scope="module", params=KINDS)
def pair_set(request, small, tmp_path_factory) -> SimpleNamespace:
    """Four lanes of two shards with three pairs, of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    small.write_kind(folder, request.param, 4, 8, 3, RESOLUTION)
    return SimpleNamespace(folder=folder, kind=request.param, manifest=load_manifest(folder))


def test_a_claimed_shape_takes_no_memory():
    """A manifest may come from anywhere, and readers ask for the contents before they read."""
    tracemalloc.start()
    contents = contents_of("moments", (4, 2048, 2048), RESOLUTION)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**16 and b"(2, 8, 2048, 2048)" in contents.header


def stream_of(pair_set, world_size=1, rank=0, workers=0) -> PairStream:
    plan = shard_sets.plan(pair_set.manifest, world_size=world_size, rank=rank, global_batch=8)
    readers = ShardReaders(pair_set.folder, pair_set.manifest, image_workers=workers)
    return PairStream(plan, readers, Pacing(Curriculum(tiers=1), 12), workers=workers)


def test_every_kind_comes_back_as_written(pair_set, small):
    readers, seen = ShardReaders(pair_set.folder, pair_set.manifest), set()
    for entry in pair_set.manifest.shards:
        for index, key in enumerate(readers.keys(entry)):
            sample = readers.read(entry, index)
            images = small.images(sample.meta, pair_set.kind, RESOLUTION)
            assert np.array_equal(sample.images, images) and sample.images.dtype == images.dtype
            assert (f"{sample.pair_id:016x}", sample.tier) == (key, 1)
            assert sample.meta == small.meta(1, int(sample.prompt.split()[1]))
            seen.add(key)
    assert len(seen) == 24


def test_a_batch_holds_winners_first(pair_set, small):
    batch = stream_of(pair_set).next(0, (0,))
    for row, prompt in enumerate(batch.prompts):
        winner, loser = small.images(
            small.meta(1, int(prompt.split()[1])), pair_set.kind, RESOLUTION
        )
        if pair_set.kind == "raw":  # channels first, as a VAE takes them
            winner, loser = winner.transpose(2, 0, 1), loser.transpose(2, 0, 1)
        assert torch.equal(batch.images[row], torch.from_numpy(winner))
        assert torch.equal(batch.images[8 + row], torch.from_numpy(loser))


def test_ranks_joined_are_the_global_batch_and_resume_anywhere(pair_set):
    alone = stream_of(pair_set)
    ranks = [stream_of(pair_set, 2, rank, workers=1) for rank in range(2)]
    for step in (0, 1, 2, 3, 7, 11):
        whole = alone.next(step, (0,))
        parts = [rank.next(step, (0,)) for rank in ranks]
        winners = torch.cat([part.images.chunk(2)[0] for part in parts])
        losers = torch.cat([part.images.chunk(2)[1] for part in parts])
        assert torch.equal(torch.cat([winners, losers]), whole.images)
        assert torch.equal(torch.cat([part.visits for part in parts]), whole.visits)
    for stream in (alone, *ranks):
        stream.close()


def test_plain_webdataset_and_pillow_read_the_images(small, tmp_path):
    meta = small.meta(1, 0)
    pair = small.images(meta, "raw", RESOLUTION)
    write_shard(tmp_path / "a.tar", [(meta, pair)], ImageContents(RESOLUTION))
    [sample] = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    for member, pixels in zip(("w.webp", "l.webp"), pair, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample[member]))), pixels)


def test_what_has_another_size_or_type_is_not_written(small, tmp_path):
    meta = small.meta(1, 0)
    pixels = small.images(meta, "raw", RESOLUTION)
    for contents, pair in (
        (ImageContents((16, 16)), pixels),
        (ImageContents(RESOLUTION), pixels.astype(np.float32)),
    ):
        with refused(ShardError, "mismatch"):
            write_shard(tmp_path / "a.tar", [(meta, pair)], contents)
    assert list(tmp_path.iterdir()) == []


def test_shards_of_another_kind_than_the_manifest_says(pair_set):
    other = {"latents": "moments", "moments": "raw", "raw": "latents"}[pair_set.kind]
    manifest = pair_set.manifest.model_copy(update={"kind": other})
    with refused(ShardError, "unknown"):
        ShardReaders(pair_set.folder, manifest).read(manifest.shards[0], 0)


# Images that lie

IMAGE = np.random.default_rng(0).integers(0, 256, (*RESOLUTION, 3), dtype=np.uint8)
GOOD = encode_webp(IMAGE)


def resized(height: int, width: int) -> bytes:
    """The file with a header that claims another size."""
    return GOOD[:21] + struct.pack("<I", (height - 1) << 14 | (width - 1)) + GOOD[25:]


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "WEBP", "lossless": True, **options})
    return buffer.getvalue()


PICTURE = Image.fromarray(IMAGE)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a WebP file"),
        (saved(PICTURE, format="PNG"), "not a WebP file"),
        (saved(PICTURE, lossless=False), "not a lossless WebP of one image"),
        (saved(PICTURE, exif=b"Exif\0\0x"), "not a lossless WebP of one image without metadata"),
        (saved(PICTURE, save_all=True, append_images=[PICTURE.rotate(180)]), "not a lossless"),
        (resized(16383, 16383), r"is 16383x16383 pixels \(height x width\), expected 16x24"),
        (resized(24, 16), "is 24x16 pixels"),
        (GOOD[:-2], "its header says"),
        (GOOD + b"\0\0", "its header says"),
        (GOOD[:30] + bytes(len(GOOD) - 30), "not a readable image|has mode"),
        (saved(PICTURE.convert("RGBA").rotate(5)), "has mode RGBA|without metadata"),
    ],
)
def test_images_that_lie(data, reason):
    with pytest.raises(ValueError, match=reason):
        decode_webp(data, RESOLUTION)
    with refused(ShardError, "damaged", "k") as told:
        ImageContents(RESOLUTION).decode([GOOD, data], "x.tar", "k")
    assert (told.value.shard, told.value.member) == ("x.tar", "l.webp")
    assert "\n" not in str(told.value)


def test_a_decompression_bomb_never_reaches_the_decoder(monkeypatch):
    monkeypatch.setattr(webp.Image, "open", lambda *args, **kwargs: pytest.fail("was opened"))
    with pytest.raises(ValueError, match="16383x16383"):
        decode_webp(resized(16383, 16383), RESOLUTION)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4))
def test_any_damage_is_a_value_error_or_an_image_of_the_right_size(changes):
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    try:
        image = decode_webp(bytes(data), RESOLUTION)
    except ValueError:
        return
    assert image.shape == (*RESOLUTION, 3) and image.dtype == np.uint8


def test_noise_fits_the_bound_on_files():
    for size in ((1, 1), (8, 8), (64, 200)):
        noise = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
        data = encode_webp(noise)
        assert len(data) <= ImageContents(size).max_bytes
        assert np.array_equal(decode_webp(data, size), noise)


@pytest.mark.parametrize("kind", ["raw", "latents", "moments"])
def test_what_is_the_same_twice_is_no_pair(kind):
    contents = contents_of(kind, (4, 2, 2), (16, 16))
    pair = np.ones(contents.shape, contents.dtype)
    with refused(ShardError, "no-preference"):
        contents.encode(pair, "x.tar", "0123")
    pair[1].flat[-1] = 2
    assert contents.encode(pair, "x.tar", "0123")
