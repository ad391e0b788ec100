from concurrent.futures import ThreadPoolExecutor

import damage
import numpy as np
import pytest
from cdpo.engine.basics.errors import EXIT_DATA, ShardError
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.repeats import PairsMet
from cdpo.engine.shards.sample import sample_key
from cdpo.engine.shards.writer import write_shard
from refusals import refused
from shard_sets import CONTENTS


@pytest.fixture
def shard(small, tmp_path):
    """Two lanes of one shard with four pairs; readers of the folder and its first entry."""
    manifest = small.write_set(tmp_path / "set", 2, [8], 100)
    return manifest, tmp_path / "set", manifest.shards[0]


def test_a_sound_tar_by_another_writer_is_read(read_bytes, good, small):
    assert [sample.pair_id for sample in read_bytes(small.tar(good))] == [
        small.meta(1, number).pair_id for number in range(2)
    ]
    swapped = [good[1], good[0], good[3], good[2]]
    assert len(read_bytes(small.tar(swapped))) == 2


def readers_of(folder, manifest, files: int, indexes: int) -> ShardReaders:
    """Readers that keep little."""
    readers = ShardReaders(folder, manifest)
    readers.keep_files(files)
    readers._max_indexes = indexes
    return readers


def test_few_open_files_and_indexes_are_enough(small, tmp_path):
    manifest = small.write_set(tmp_path, 2, [40], 4)
    readers = readers_of(tmp_path, manifest, 1, 2)
    unbounded = ShardReaders(tmp_path, manifest)
    for index in range(4):
        for entry in manifest.shards:
            assert readers.read(entry, index).pair_id == unbounded.read(entry, index).pair_id
    assert len(readers._files) == 1
    assert len(readers._indexes) == 2
    readers.close()


def test_threads_share_the_readers(small, tmp_path):
    manifest = small.write_set(tmp_path, 2, [40], 4)
    readers = readers_of(tmp_path, manifest, 2, 3)
    places = [(entry, i) for entry in manifest.shards for i in range(entry.count)] * 5
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda place: readers.read(*place), places))
    for sample in found:
        assert np.array_equal(sample.images, small.latents(sample.meta).astype(np.float16))
    assert len({sample.pair_id for sample in found}) == 40


@pytest.mark.parametrize(
    ("change", "kind"), [(None, "missing"), (-1, "truncated"), (512, "mismatch")]
)
def test_a_shard_missing_or_of_another_size_is_found_before_anything_is_read(shard, change, kind):
    manifest, folder, entry = shard
    path = folder / entry.name
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes((data + bytes(512))[: len(data) + change])
    for call in (lambda r: r.read(entry, 0), lambda r: r.check_present(manifest.shards)):
        with refused(ShardError, kind, wording=f"shard-{kind}") as told:
            call(ShardReaders(folder, manifest))
        assert (told.value.shard, told.value.exit_code) == (str(path), EXIT_DATA)


def test_a_flipped_bit(shard):
    manifest, folder, entry = shard
    damage.flip_a_bit(folder / entry.name)
    ShardReaders(folder, manifest).check_present(manifest.shards)
    with refused(ShardError, "damaged", wording="shard-damaged"):
        ShardReaders(folder, manifest).read(entry, 0)


def test_a_shard_changed_during_the_run_is_verified_again(shard):
    manifest, folder, entry = shard
    readers = readers_of(folder, manifest, 1, 2)
    readers.read(entry, 0)
    damage.flip_a_bit(folder / entry.name)
    readers.read(manifest.shards[1], 0)  # closes the first
    with refused(ShardError, "damaged"):
        readers.read(entry, 0)


@pytest.mark.parametrize("both_at_once", [False, True])
def test_a_pair_in_two_shards_is_named_with_both(small, tmp_path, both_at_once):
    first, twin, third = [(small.meta(1, n), small.meta(1, n + 1)) for n in (0, 1, 3)]
    entries = [
        write_shard(tmp_path / f"{name}.tar", [(m, small.latents(m)) for m in metas], CONTENTS)
        for name, metas in {"c": third, "a": first, "b": twin}.items()
    ]
    readers = readers_of(tmp_path, small.manifest(entries, 3, 1), 1, 1)
    key = sample_key(small.meta(1, 1).pair_id)
    wording = None if both_at_once else "pair-in-two-shards"
    with refused(ShardError, "duplicate", key, wording=wording) as told:
        if both_at_once:
            readers.read_batch(entries, [0, 0, 0])
        for entry in [*entries[:2], *entries]:  # one may be opened again
            readers.read(entry, 0)
    assert "a.tar" in str(told.value) and "b.tar" in str(told.value)


def test_pairs_are_looked_for_among_those_of_all_shards():
    """However many shards came before, in few sorted runs."""
    met, ids = PairsMet(), np.random.default_rng(0).permutation(7 * 300)
    for number, own in enumerate(ids.reshape(300, 7)):
        assert not met.add(f"shard-{number}", own)
    assert len(met._runs) <= 12
    for number, own in enumerate(ids.reshape(300, 7)):
        [error] = met.add("twin", np.array([9000 + number, own[3]]))
        assert (error.key, error.shard) == (sample_key(int(own[3])), "twin")
        assert f"shard-{number} as well" in str(error)
    assert len(met.add("again", np.arange(7 * 300))) == 7 * 300


def test_a_disk_that_fails_is_a_shard_error(shard):
    """A folder opens like a file and fails at the first read, as a bad disk does."""
    manifest, folder, entry = shard
    (folder / entry.name).unlink()
    (folder / entry.name).mkdir()
    size = (folder / entry.name).stat().st_size
    with refused(ShardError, "unreadable"):
        ShardReaders(folder, manifest).read(entry.model_copy(update={"bytes": size}), 0)
