import json
import time

import numpy as np
import pytest
import webdataset
from cdpo.engine.basics.errors import DataError, ShardError
from cdpo.engine.shards.writer import ShardFill, plan_shards, write_shard
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused


@given(st.integers(0, 50_000), st.integers(1, 64), st.integers(1, 2000))
def test_plans_fill_every_lane_equally(num_pairs, lanes, pairs_per_shard):
    if num_pairs < lanes:
        with refused(DataError, "too-few", "tier 4"):
            plan_shards(4, num_pairs, lanes, pairs_per_shard)
        return
    plan = plan_shards(4, num_pairs, lanes, pairs_per_shard)
    assert plan.num_shards % lanes == 0
    assert 1 <= plan.count <= pairs_per_shard
    assert plan.num_shards * plan.count + plan.dropped == num_pairs
    assert 0 <= plan.dropped < lanes * -(-num_pairs // (lanes * pairs_per_shard))
    assert (plan.num_shards - lanes) * pairs_per_shard < num_pairs


def test_plans_by_hand():
    def plan(*args):
        planned = plan_shards(1, *args)
        return planned.num_shards, planned.count, planned.dropped

    assert plan(1000, 8, 1000) == (8, 125, 0)
    assert plan(1001, 2, 250) == (4, 250, 1)
    assert plan(1101, 2, 250) == (6, 183, 3)
    assert plan(3, 2, 1) == (2, 1, 1)


@given(st.permutations(list(range(100, 140))), st.integers(0, 2**32 - 1))
def test_filling_ignores_the_order_of_pairs_and_uses_each_once(pair_ids, seed):
    plan = plan_shards(2, 40, 3, 5)
    fill, sorted_fill = (
        ShardFill(plan, np.array(ids), seed) for ids in (pair_ids, sorted(pair_ids))
    )
    shards = [np.array(pair_ids)[fill.members(i)].tolist() for i in range(plan.num_shards)]
    same = [np.arange(100, 140)[sorted_fill.members(i)].tolist() for i in range(plan.num_shards)]
    assert shards == same
    used = [pair for shard in shards for pair in shard]
    assert len(used) == len(set(used)) == 40 - plan.dropped


def test_a_repeated_pair_is_refused():
    plan = plan_shards(1, 4, 2, 5)
    with refused(DataError, "duplicate", "0000000000000007"):
        ShardFill(plan, np.array([7, 1, 7, 2]), 0)


def test_same_samples_same_bytes(small, tmp_path, monkeypatch):
    latents = np.arange(-16, 16, dtype=np.float32).reshape(2, *small.SHAPE) / 3
    samples = [(small.meta(1, number), latents) for number in range(5)]
    first = write_shard(tmp_path / "a.tar", samples, small.CONTENTS)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    second = write_shard(tmp_path / "b.tar", samples, small.CONTENTS)
    assert first.sha256 == second.sha256
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert first.bytes == (tmp_path / "a.tar").stat().st_size
    assert (first.name, first.tier, first.count) == ("a.tar", 1, 5)
    # What a shard is made of is fixed; another numpy or tarfile must not change it unseen.
    assert first.sha256[:16] == "9678409f39f5b397"


def test_plain_webdataset_reads_our_shards(small, tmp_path):
    metas = [small.meta(1, number) for number in range(5)]
    write_shard(tmp_path / "a.tar", ((meta, small.latents(meta)) for meta in metas), small.CONTENTS)
    found = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in found] == [f"{meta.pair_id:016x}" for meta in metas]
    for sample, meta in zip(found, metas, strict=True):
        assert sample["latents.npy"].dtype == np.float16
        assert np.array_equal(sample["latents.npy"], small.latents(meta).astype(np.float16))
        assert sample["json"] == json.loads(meta.model_dump_json())


@pytest.mark.parametrize("value", [7e4, np.inf, -np.inf, np.nan, -1e30])
def test_what_float16_cannot_hold_is_refused(small, tmp_path, value):
    meta = small.meta(1, 0)
    latents = small.latents(meta)
    latents[1, 2, 0, 1] = value
    with refused(ShardError, "non-finite", f"{meta.pair_id:016x}") as told:
        write_shard(tmp_path / "a.tar", [(meta, latents)], small.CONTENTS)
    assert told.value.member == "latents.npy"
    assert list(tmp_path.iterdir()) == []


def test_wrong_shape_mixed_tiers_repeats_and_nothing_are_refused(small, tmp_path):
    one, other = small.meta(1, 0), small.meta(2, 0)
    first, second = (one, small.latents(one)), (other, small.latents(other))
    for samples, kind in (
        ([(one, small.latents(one)[:, :, 0])], "mismatch"),
        ([first, second], "mismatch"),
        ([first, first], "duplicate"),
        ([], "mismatch"),
    ):
        with refused(ShardError, kind):
            write_shard(tmp_path / "a.tar", samples, small.CONTENTS)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_dies_leaves_the_old_file(small, tmp_path):
    meta = small.meta(1, 0)
    path = tmp_path / "a.tar"
    entry = write_shard(path, [(meta, small.latents(meta))], small.CONTENTS)

    def dying():
        yield small.meta(1, 1), small.latents(meta)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(path, dying(), small.CONTENTS)
    assert path.stat().st_size == entry.bytes
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_a_full_disk_is_one_line_and_leaves_nothing(small, tmp_path, fill_disk):
    fill_disk()
    meta = small.meta(1, 0)
    with refused(DataError, "unwritable", str(tmp_path / "a.tar"), wording="full-disk"):
        write_shard(tmp_path / "a.tar", [(meta, small.latents(meta))], small.CONTENTS)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_one_line(small, tmp_path):
    meta = small.meta(1, 0)
    (tmp_path / "file").touch()
    with refused(DataError, "unwritable", str(tmp_path / "file" / "a.tar")):
        write_shard(tmp_path / "file" / "a.tar", [(meta, small.latents(meta))], small.CONTENTS)
