import hashlib
from collections import Counter
from functools import partial

import numpy as np
import pytest
import shard_sets
from cdpo.engine.basics.errors import DataError, RecipeError
from cdpo.engine.curriculum.pacing import Pacing, Position, Stage
from cdpo.engine.recipe import Curriculum
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

ALL = Stage(2, (1, 2), 0, 100)


plan_of = partial(shard_sets.plan, seed=9, shuffle_shards=3)


def places(plan, batch, stage=ALL, visit_base=0):
    """[(shard, sample, visit)] of one batch."""
    found = plan.locate(Position(stage, batch, visit_base))
    columns = (found.shards, found.samples, found.visits)
    assert all(column.dtype == np.int64 for column in columns)
    return list(zip(*(column.tolist() for column in columns), strict=True))


SETS = st.tuples(
    st.integers(1, 4),  # lanes
    st.integers(1, 4),  # shards of tier 1 in a lane
    st.integers(1, 7),  # pairs in each
    st.integers(1, 3),  # the same of tier 2
    st.integers(1, 5),
    st.integers(1, 5),  # shuffle_shards
    st.integers(1, 6),  # pairs of a lane in a batch
)


@settings(deadline=None, max_examples=60)
@given(SETS, st.sampled_from([(1,), (2,), (1, 2)]))
def test_every_pair_exactly_once_a_pass(small, numbers, tiers):
    lanes, shards_1, count_1, shards_2, count_2, shuffle, per_lane = numbers
    manifest = small.paper(lanes, {1: (lanes * shards_1, count_1), 2: (lanes * shards_2, count_2)})
    plan = plan_of(manifest, global_batch=lanes * per_lane, shuffle_shards=shuffle)
    stage = Stage(0, tiers, 0, 1000)
    whole = {
        (number, sample)
        for number, entry in enumerate(manifest.shards)
        if entry.tier in tiers
        for sample in range(entry.count)
    }
    assert plan.lane_pairs(stage) * lanes == len(whole)
    batches = -(-3 * plan.lane_pairs(stage) // per_lane)
    seen = Counter(place for b in range(batches) for place in places(plan, b, stage, 5))
    for number in range(5, 8):
        assert {(shard, sample) for shard, sample, visit in seen if visit == number} == whole
    assert max(seen.values()) == 1  # so a traversal meets no pair twice
    assert plan.passes_begun(stage, batches) == max(visit for *_, visit in seen) - 4


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_any_world_size_sees_the_same_global_batches(small, world_size):
    manifest = small.paper(8, {1: (16, 5), 2: (8, 3)})
    alone = plan_of(manifest, global_batch=32)
    ranks = [
        plan_of(manifest, world_size=world_size, rank=rank, global_batch=32)
        for rank in range(world_size)
    ]
    assert {len(places(rank, 0)) for rank in ranks} == {32 // world_size}
    for batch in (0, 1, 2, 3, 7, 100):
        joined = [place for rank in ranks for place in places(rank, batch)]
        assert joined == places(alone, batch)
    entries = [entry for rank in ranks for entry in rank.rank_entries([ALL])]
    assert sorted(entry.name for entry in entries) == sorted(e.name for e in manifest.shards)


def test_a_rank_reads_only_shards_of_its_lanes(small):
    manifest = small.paper(4, {1: (8, 5), 2: (4, 3)})
    plan = plan_of(manifest, world_size=2, rank=1, global_batch=8)
    own = {entry.name for entry in plan.rank_entries([ALL])}
    read = {manifest.shards[shard].name for b in range(20) for shard, *_ in places(plan, b)}
    assert read == own
    assert len(own) == 6


def test_passes_stages_lanes_and_seeds_have_orders_of_their_own(small):
    manifest = small.paper(2, {1: (8, 20), 2: (8, 20)})
    plan = plan_of(manifest, global_batch=2 * 160)  # a pass is a batch
    one_pass = [place[:2] for place in places(plan, 0)]
    assert one_pass != [place[:2] for place in places(plan, 1)]
    assert one_pass != [place[:2] for place in places(plan, 0, Stage(1, (1, 2), 0, 9))]
    assert one_pass != [
        place[:2] for place in places(plan_of(manifest, global_batch=320, seed=8), 0)
    ]
    lane_0, lane_1 = (
        [(shard // 2, sample) for shard, sample in lane]
        for lane in (one_pass[:160], one_pass[160:])
    )
    assert lane_0 != lane_1


def test_the_order_never_changes(small):
    """A run resumed by a later version must go on where this one stopped."""
    manifest = small.paper(4, {1: (16, 300), 2: (8, 70)})
    plan = plan_of(manifest, global_batch=16)
    assert places(plan, 5)[:3] == [(0, 57, 0), (0, 81, 0), (0, 116, 0)]
    columns = [np.array(places(plan, batch)) for batch in range(700)]
    digest = hashlib.sha256(np.concatenate(columns).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "3d53146ecbfd66df"


def test_tiers_of_a_stage_are_mixed(small):
    """A union of tiers is drawn from uniformly: the hard tier does not wait for the easy one."""
    manifest = small.paper(1, {1: (16, 50), 2: (16, 50)})
    plan = plan_of(manifest, global_batch=400, shuffle_shards=8)
    first = [manifest.shards[shard].tier for shard, *_ in places(plan, 0)]
    assert 50 <= Counter(first)[2] <= 350
    shards = {shard for shard, *_ in places(plan, 0)}
    assert len(shards) == 8  # a window


def test_a_window_is_mixed_whole(small):
    manifest = small.paper(1, {1: (4, 100), 2: (4, 100)})
    plan = plan_of(manifest, global_batch=100, shuffle_shards=8)
    shards = Counter(shard for shard, *_ in places(plan, 0))
    assert len(shards) == 8
    assert max(shards.values()) < 30


def test_what_does_not_divide_is_one_line(small):
    manifest = small.paper(4, {1: (4, 5), 2: (4, 3)})
    for key, changes, wording in (
        ("data.lanes", {"world_size": 3}, "ranks-and-lanes"),
        ("data.lanes", {"world_size": 8}, None),
        ("train.global_batch", {"global_batch": 6}, None),
    ):
        with refused(RecipeError, "mismatch", key, wording=wording):
            plan_of(manifest, **changes)


@pytest.mark.parametrize("tiers", [1, 3])
def test_a_curriculum_of_other_tiers_is_refused(small, tiers):
    manifest = small.paper(4, {1: (4, 5), 2: (4, 3)})
    stages = Pacing(Curriculum(tiers=tiers), 5000).stages
    with refused(DataError, "mismatch", "curriculum.tiers"):
        plan_of(manifest).check_stages(stages)
