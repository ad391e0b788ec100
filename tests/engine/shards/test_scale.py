"""A hundred million pairs on paper: what a rank holds and computes follows its shards alone."""

import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import shard_sets
from cdpo.engine.curriculum.pacing import Cursor, Pacing, Position, Stage
from cdpo.engine.recipe import Curriculum
from cdpo.engine.shards.manifest import load_manifest, save_manifest

LANES, TIERS = 512, 5
SHARDS = TIERS * 39 * LANES  # 99,840
STEPS = 200_000


@pytest.fixture(scope="module")
def manifests(small):
    """1e6 and 1e8 pairs in as many shards."""
    return {
        pairs: small.paper(LANES, dict.fromkeys(range(1, TIERS + 1), (39 * LANES, pairs // SHARDS)))
        for pairs in (10**6, 10**8)
    }


plan_of = partial(shard_sets.plan, world_size=128, rank=77, global_batch=1024, shuffle_shards=8)


def resume(manifest) -> np.ndarray:
    """Plan, take up a run late in its last stage, and find the next batches of one rank."""
    plan = plan_of(manifest)
    pacing = Pacing(Curriculum(tiers=TIERS, steps_per_tier=1000), STEPS)
    plan.check_stages(pacing.stages)
    cursor = Cursor(STEPS - 10, (3,) * TIERS)
    found = []
    for step in range(cursor.step, STEPS):
        places = plan.locate(pacing.position(step, cursor.skips, plan.passes_begun))
        found.append(places.samples)
    return np.concatenate(found)


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_bytes(work: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_time_and_memory_do_not_grow_with_the_pairs(manifests):
    few, many = manifests.values()
    assert (few.num_pairs, many.num_pairs) == (998_400, 99_939_840)
    for manifest in (few, many):
        resume(manifest)  # imports, caches
    turns = [(seconds(lambda: resume(few)), seconds(lambda: resume(many))) for _ in range(5)]
    taken = np.median([after / before for before, after in turns])
    assert taken < 2, turns
    held = peak_bytes(lambda: resume(few)), peak_bytes(lambda: resume(many))
    assert held[1] < 1.2 * held[0], held
    assert held[1] < 64 * 2**20


def test_resuming_takes_as_long_anywhere(manifests):
    plan = plan_of(manifests[10**8])
    stage = Stage(TIERS - 1, tuple(range(1, TIERS + 1)), 0, 10**9)
    plan.locate(Position(stage, 0, 0))

    def at(batch: int) -> float:
        # Fastest of three passes, none of which has been planned before.
        passes = [batch + turn * 10**6 for turn in range(3)]
        return min(seconds(lambda b=b: plan.locate(Position(stage, b, 0))) for b in passes)

    near, far = at(10**6), at(10**9)
    assert far < 3 * near + 0.005, (near, far)


def test_a_manifest_of_a_hundred_thousand_shards_loads_in_seconds(manifests, tmp_path):
    """Some 17 MB of JSON: 0.7 s of processor time where this was written."""
    save_manifest(tmp_path, manifests[10**8])
    found = []
    assert seconds(lambda: found.append(load_manifest(tmp_path))) < 5
    assert found == [manifests[10**8]]


def test_128_ranks_cover_a_pass_exactly_once_in_equal_parts(small):
    """Of unequal tiers: every batch whole, no rank a batch ahead of another."""
    lanes = 128
    manifest = small.paper(lanes, {1: (4 * lanes, 400), 2: (2 * lanes, 177)})
    stage = Stage(0, (1, 2), 0, 10**6)
    starts = np.cumsum([0, *(entry.count for entry in manifest.shards)])
    each = 128  # pairs of a rank in a batch
    plans = [plan_of(manifest, rank=rank, global_batch=each * lanes) for rank in range(lanes)]
    lane = plans[0].lane_pairs(stage)
    assert lane * lanes == manifest.num_pairs == 250_112
    batches = -(-lane // each)  # the last one may reach into the next pass
    seen = np.zeros(manifest.num_pairs, dtype=np.int64)
    own = []
    for plan in plans:
        found = [plan.locate(Position(stage, batch, 0)) for batch in range(batches)]
        assert {len(places.samples) for places in found} == {each}
        shards, samples, visits = (
            np.concatenate([getattr(places, name) for places in found])
            for name in ("shards", "samples", "visits")
        )
        first = visits == 0
        pairs = starts[shards[first]] + samples[first]
        np.add.at(seen, pairs, 1)
        own.append(len(pairs))
    assert (seen == 1).all()
    assert max(own) - min(own) <= each
