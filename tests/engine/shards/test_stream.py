import threading
import time

import damage
import numpy as np
import pytest
import shard_sets
import torch
from cdpo.engine.basics.errors import DataError, ShardError
from cdpo.engine.curriculum.pacing import Cursor, Pacing
from cdpo.engine.recipe import Curriculum
from cdpo.engine.shards.manifest import load_manifest
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.stream import PairStream, WaitInterrupted
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused

LANES, GLOBAL_BATCH, TOTAL = 4, 8, 24


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("set")
    small.write_set(path, LANES, [40, 24, 28], 3)
    return path


@pytest.fixture
def open_stream(folder):
    """Streams over one set of three tiers, four steps each, closed after the test."""
    manifest = load_manifest(folder)
    opened = []

    def make(workers=0, where=folder, timeout=600.0, **curriculum):
        plan = shard_sets.plan(manifest, global_batch=GLOBAL_BATCH)
        settings = {"tiers": 3, "steps_per_tier": 4, "cumulative": False} | curriculum
        pacing = Pacing(Curriculum(**settings), TOTAL)
        readers = ShardReaders(where, manifest)
        opened.append(PairStream(plan, readers, pacing, workers=workers, timeout=timeout))
        return opened[-1]

    yield make
    for stream in opened:
        stream.close()


def same(a, b) -> bool:
    return (
        torch.equal(a.images, b.images)
        and a.prompts == b.prompts
        and torch.equal(a.pair_ids, b.pair_ids)
        and torch.equal(a.visits, b.visits)
        and torch.equal(a.tiers, b.tiers)
    )


def run(stream, steps=range(TOTAL), skips=(0, 0, 0)):
    return [stream.next(step, skips) for step in steps]


def test_a_batch_holds_what_the_shards_hold(open_stream, small):
    batch = open_stream().next(0, (0, 0, 0))
    assert len(batch) == len(batch.prompts) == GLOBAL_BATCH
    assert batch.images.dtype == torch.float16
    assert batch.images.shape == (2 * GLOBAL_BATCH, *small.SHAPE)
    assert batch.original_sizes.tolist() == [[16, 16]] * 2 * GLOBAL_BATCH
    assert batch.crops.tolist() == [[0, 0]] * 2 * GLOBAL_BATCH
    for row, prompt in enumerate(batch.prompts):
        meta = small.meta(1, int(prompt.split()[1]))
        assert (meta.prompt, meta.pair_id) == (prompt, batch.pair_ids[row])
        winner, loser = torch.from_numpy(small.latents(meta).astype(np.float16))
        assert torch.equal(batch.images[row], winner)
        assert torch.equal(batch.images[GLOBAL_BATCH + row], loser)


def test_splits_keep_winners_first(open_stream):
    batch = open_stream().next(0, (0, 0, 0))
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 2, 2, 2]
    winners = torch.cat([part.images[:2] for part in parts])
    losers = torch.cat([part.images[2:] for part in parts])
    assert torch.equal(torch.cat([winners, losers]), batch.images)
    assert [prompt for part in parts for prompt in part.prompts] == batch.prompts
    assert torch.equal(torch.cat([part.pair_ids for part in parts]), batch.pair_ids)
    assert same(batch.split(GLOBAL_BATCH)[0], batch)
    with pytest.raises(ValueError, match="micro=3 does not divide the 8 pairs"):
        batch.split(3)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    ("order", "expected"), [("easy_to_hard", [1, 2, 3]), ("hard_to_easy", [3, 2, 1])]
)
def test_a_tier_change_takes_effect_at_its_step(open_stream, workers, order, expected):
    """The fault of a public implementation: its loader notices at the next epoch only."""
    batches = run(open_stream(workers, order=order))
    for step, batch in enumerate(batches):
        assert set(batch.tiers.tolist()) == {expected[min(step // 4, 2)]}


def test_cumulative_stages_hold_the_union_and_random_all(open_stream):
    union = run(open_stream(cumulative=True))
    drawn = [
        {tier for batch in part for tier in batch.tiers.tolist()}
        for part in (union[:4], union[4:8], union[8:])
    ]
    assert drawn == [{1}, {1, 2}, {1, 2, 3}]
    every = open_stream(order="random")
    assert {t for step in range(4) for t in every.next(step, (0,)).tiers.tolist()} == {1, 2, 3}


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_anywhere_equals_running_through(open_stream, workers):
    through = run(open_stream())
    for start in (0, 3, 4, 7, 11, 23):
        resumed = run(open_stream(workers), range(start, TOTAL))
        assert all(map(same, resumed, through[start:]))


def test_no_pair_meets_the_same_visit_twice(open_stream):
    seen = set()
    for batch in run(open_stream(cumulative=True)):
        met = set(zip(batch.pair_ids.tolist(), batch.visits.tolist(), strict=True))
        assert len(met) == GLOBAL_BATCH
        assert not met & seen
        seen |= met
    assert max(visit for _, visit in seen) >= 3


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.booleans(), max_size=30), st.integers(1, 3))
def test_skips_are_followed_whatever_was_read_ahead(open_stream, taken, workers):
    """Any pattern of taken and skipped steps gives what a stream without read-ahead gives, and no
    skipped batch comes back."""
    ahead, inline = open_stream(workers), open_stream(0)
    cursor, seen = Cursor.start(ahead.pacing), set()
    for good in taken:
        if cursor.step == TOTAL:
            break
        batch = ahead.next(cursor.step, cursor.skips)
        assert same(batch, inline.next(cursor.step, cursor.skips))
        met = set(zip(batch.pair_ids.tolist(), batch.visits.tolist(), strict=True))
        assert not met & seen
        seen |= met
        cursor = cursor.advanced() if good else cursor.skipped(ahead.pacing)
    ahead.close()
    inline.close()


def test_a_skip_inside_a_stage_uses_what_was_read_ahead(open_stream, monkeypatch):
    stream, fetched = open_stream(1), []
    fetch = stream.fetch
    monkeypatch.setattr(stream, "fetch", lambda at: fetched.append(at) or fetch(at))
    stream.next(0, (0, 0, 0))
    stream.next(0, (1, 0, 0))
    stream.next(1, (1, 0, 0))
    assert len(fetched) == len(set(fetched))


def test_what_was_read_ahead_in_vain_is_dropped(open_stream):
    """Skips at the end of a stage renumber the visits of the next one."""
    stream = open_stream(2)
    for skipped in (0, 9, 18):
        stream.next(3, (skipped, 0, 0))
        due = {stream.position(step, (skipped, 0, 0)) for step in range(4, 8)}
        assert set(stream._ahead) == due


def test_what_a_thread_raises_comes_out_of_next(open_stream, small, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    victims = sorted(tmp_path.glob("tier-2-*.tar"))
    for victim in victims:
        damage.flip_a_bit(victim)
    stream = open_stream(2, where=tmp_path)
    stream.check_present()
    run(stream, range(4))
    with refused(ShardError, "damaged") as told:
        stream.next(4, (0, 0, 0))
    assert told.value.shard in map(str, victims)
    for victim in victims:
        victim.unlink()
    with refused(ShardError, "missing"):
        stream.check_present()


def test_shards_of_tiers_that_a_short_run_never_reaches_may_be_absent(
    open_stream, folder, tmp_path
):
    for file in folder.glob("tier-1-*.tar"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    open_stream(where=tmp_path, steps_per_tier=TOTAL).check_present()


def test_a_stalled_read_is_bounded(open_stream, monkeypatch):
    stream, release = open_stream(1, timeout=0.05), threading.Event()
    monkeypatch.setattr(stream, "fetch", lambda position: release.wait(10))
    start = time.perf_counter()
    with refused(DataError, "timeout"):
        stream.next(3, (0, 0, 0))
    stream.close()
    assert time.perf_counter() - start < 5
    release.set()


def test_a_wait_ends_when_asked_to_and_costs_nothing(open_stream, monkeypatch):
    """What was being read comes out of the next call for the same step."""
    stream, release, looks = open_stream(1), threading.Event(), []
    fetch = stream.fetch
    monkeypatch.setattr(stream, "fetch", lambda position: release.wait(10) and fetch(position))

    def interrupted():
        looks.append(time.perf_counter())
        return len(looks) == 2

    start = time.perf_counter()
    with pytest.raises(WaitInterrupted):
        stream.next(3, (0, 0, 0), interrupted)
    assert time.perf_counter() - start < 5
    release.set()
    assert same(stream.next(3, (0, 0, 0), lambda: True), open_stream(0).next(3, (0, 0, 0)))


def test_a_wait_in_which_shards_come_is_not_cut_short(open_stream, monkeypatch):
    """A first window of many shards over a slow line takes longer than any one of them may."""
    stream = open_stream(1, timeout=0.3)
    fetch = stream.fetch

    def slowly(position):
        for _ in range(8):
            time.sleep(0.1)
            stream.readers.num_opened += 1
        return fetch(position)

    monkeypatch.setattr(stream, "fetch", slowly)
    assert len(stream.next(3, (0, 0, 0))) == GLOBAL_BATCH


def test_closing_twice_is_fine_and_nothing_is_read_past_the_end(open_stream):
    stream = open_stream(2)
    stream.next(TOTAL - 1, (0, 0, 0))
    assert not stream._ahead
    stream.close()
    stream.close()
