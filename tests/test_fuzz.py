"""Mutated tars, manifests and recipes: a typed error in a line a problem, or what was declared."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cdpo.engine.basics.errors import DataError, RecipeError, ShardError
from cdpo.engine.recipe.identity import recipe_hash, save_resolved
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.shards.manifest import (
    Manifest,
    ShardEntry,
    load_manifest,
    manifest_hash,
    save_manifest,
)
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.sample import sample_key
from fuzzing import JSON_TOKENS, YAML_TOKENS, Edit, apply, edits, fuzz, mend_tar
from hypothesis import given
from hypothesis import strategies as st
from shard_sets import write_kind

ROOT = Path(__file__).parents[1]
COUNT = 3
MEMORY = 16 * 2**20  # bytes, for files of some kilobytes


@pytest.fixture(scope="module", params=["latents", "moments", "raw"])
def real(request, tmp_path_factory) -> Path:
    """A set of two shards of three pairs, as `prepare` writes it."""
    folder = tmp_path_factory.mktemp("real")
    write_kind(folder, request.param, 2, 2, COUNT, (16, 16))
    return folder


def read_all(folder: Path, manifest: Manifest, entry: ShardEntry) -> None:
    """Every sample of a shard; what is read must be what was declared."""
    readers = ShardReaders(folder, manifest)
    channels, *size = manifest.latent_shape
    shape, dtype = {
        "latents": ((2, channels, *size), np.float16),
        "moments": ((2, 2 * channels, *size), np.float16),
        "raw": ((2, *manifest.resolution, 3), np.uint8),
    }[manifest.kind]
    try:
        for index in range(entry.count):
            sample = readers.read(entry, index)
            assert (sample.images.shape, sample.images.dtype) == (shape, dtype)
            assert np.isfinite(sample.images).all()
            assert sample.tier == entry.tier
            assert sample_key(sample.pair_id) == readers.keys(entry)[index]
            assert np.isfinite(sample.meta.scores).all()
    finally:
        readers.close()


@fuzz(350)
@given(changes=edits(JSON_TOKENS), mended=st.booleans())
def test_a_mutated_tar_whose_checksum_matches(
    real: Path, tmp_path: Path, changes: list[Edit], mended: bool
):
    """Signed by a manifest, as a broken writer would leave it: nothing but a ShardError."""
    data = apply((real / "tier-1-000000.tar").read_bytes(), changes)
    data = mend_tar(data) if mended else data
    (tmp_path / "x.tar").write_bytes(data)
    entry = ShardEntry(
        name="x.tar",
        tier=1,
        count=COUNT,
        bytes=max(1, len(data)),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    tracemalloc.start()
    try:
        read_all(tmp_path, load_manifest(real), entry)
    except ShardError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


@fuzz(350)
@given(changes=edits(JSON_TOKENS))
def test_a_mutated_manifest(real: Path, tmp_path: Path, changes: list[Edit]):
    """What passes for a manifest can be hashed, saved and read back, and finds its shards or says
    which one is wrong.
    """
    (tmp_path / "manifest.json").write_bytes(apply((real / "manifest.json").read_bytes(), changes))
    try:
        manifest = load_manifest(tmp_path)
    except DataError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
        return
    save_manifest(tmp_path, manifest)
    assert load_manifest(tmp_path) == manifest
    assert manifest_hash(load_manifest(tmp_path)) == manifest_hash(manifest)
    for entry in manifest.shards:
        try:
            read_all(real, manifest, entry)
        except ShardError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["emoji_cdpo", "pickapic_sd15_cdpo"])
@fuzz(60)
@given(changes=edits(YAML_TOKENS))
def test_a_mutated_recipe(tmp_path: Path, name: str, changes: list[Edit]):
    """What passes for a recipe can be hashed, saved and read back; else each problem has a line."""
    path = tmp_path / "fuzzed.yaml"
    path.write_bytes(apply((ROOT / "recipes" / f"{name}.yaml").read_bytes(), changes))
    try:
        recipe = load_recipe(path)
    except RecipeError as error:
        lines = str(error).splitlines()
        assert all(str(path) in line and len(line) < 1000 for line in lines), lines
        return
    save_resolved(recipe, tmp_path / "resolved.yaml")
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_the_mutations_reach_behind_the_checksums(real: Path):
    """A flipped bit of a member's name is found by the name, once the header's sum fits again."""
    whole = (real / "tier-1-000000.tar").read_bytes()
    assert mend_tar(whole) == whole
    changed = bytearray(whole)
    changed[3] ^= 1
    assert mend_tar(bytes(changed))[:148] == bytes(changed[:148])
    assert mend_tar(bytes(changed)) != bytes(changed)
    assert json.loads((real / "manifest.json").read_text())["lanes"] == 2
