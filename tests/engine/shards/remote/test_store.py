"""Shards over real sockets, through the cache, into the reader and the stream."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Semaphore

import damage
import numpy as np
import pytest
import shard_sets
from cdpo.engine.basics.errors import DataError, OutsideError, RecipeError, ShardError
from cdpo.engine.curriculum.pacing import Pacing
from cdpo.engine.recipe import Curriculum, Data, Fetch
from cdpo.engine.shards.manifest import Manifest
from cdpo.engine.shards.reader import ShardReaders
from cdpo.engine.shards.remote.prefetch import Prefetch
from cdpo.engine.shards.remote.store import RemoteStore, default_cache, open_store
from cdpo.engine.shards.store import LocalStore
from cdpo.engine.shards.stream import PairStream
from pydantic import ValidationError
from refusals import refused
from shard_server import ShardServer, serving

SOON = Fetch(retries=2, backoff=0.01, stall=10.0, budget=30.0, threads=0)


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two lanes, two tiers of 12 shards, four pairs in each."""
    folder = tmp_path_factory.mktemp("set")
    small.write_set(folder, 2, [48, 48], 4)
    return folder


@pytest.fixture
def web(folder: Path):
    with serving(folder) as web:
        yield web


@pytest.fixture
def store(web: ShardServer, tmp_path: Path) -> RemoteStore:
    return make_store(web, tmp_path)


def make_store(web: ShardServer, tmp_path: Path, gib: float = 1.0, **fetch: float) -> RemoteStore:
    spec = SOON.model_copy(update=fetch)
    data = Data(cache=str(tmp_path / "cache"), cache_gib=gib, fetch=spec)
    store = open_store(web.url + "/", data)
    assert isinstance(store, RemoteStore)
    return store


make_plan = partial(shard_sets.plan, global_batch=4)


def pacing(steps: int = 60, steps_per_tier: int = 20) -> Pacing:
    return Pacing(Curriculum(tiers=2, steps_per_tier=steps_per_tier), steps)


def test_everything_is_as_in_the_folder(store, web, folder):
    local = LocalStore(folder)
    manifest = store.manifest()
    assert manifest == local.manifest()
    far, near = ShardReaders(store, manifest), ShardReaders(local, manifest)
    far.check_present(manifest.shards)
    for entry in manifest.shards:
        for index in range(entry.count):
            one, other = far.read(entry, index), near.read(entry, index)
            assert one.meta == other.meta and np.array_equal(one.images, other.images)
    assert all(web.count(entry.name) == 1 for entry in manifest.shards)


@pytest.mark.parametrize("fault", ["corrupt", "short", "long", "500", "drop"])
def test_what_arrives_damaged_is_fetched_once_more(store, web, fault):
    manifest = store.manifest()
    entry = manifest.shards[0]
    web.faults[entry.name] = [fault]
    ShardReaders(store, manifest).read(entry, 0)
    assert web.count(entry.name) == 2


@pytest.mark.parametrize(
    ("fault", "kind", "requests"),
    [
        ("corrupt", "damaged", 2),
        ("short", "truncated", 2),
        ("long", "mismatch", 2),
        ("404", "missing", 1),
        ("pointer", "unreadable", 1),
    ],
)
def test_a_shard_that_is_bad_at_its_source_is_named(store, web, fault, kind, requests):
    manifest = store.manifest()
    entry = manifest.shards[0]
    web.faults[entry.name] = [f"{fault}*"]
    with refused(ShardError, kind) as told:
        ShardReaders(store, manifest).read(entry, 0)
    assert told.value.shard == f"{web.url}/{entry.name}" and told.value.exit_code == 3
    assert web.count(entry.name) == requests
    assert not [*store.cache.folder.glob("*.tar"), *store.cache.folder.glob("*.part")]


def test_a_copy_that_went_bad_in_the_cache_is_fetched_again(store, web):
    manifest = store.manifest()
    entry = manifest.shards[0]
    ShardReaders(store, manifest).read(entry, 0)
    damage.flip_a_bit(store.cache.folder / f"{entry.sha256}.tar")
    ShardReaders(store, manifest).read(entry, 0)
    assert web.count(entry.name) == 2


def test_threads_that_wait_for_one_shard_share_its_failure(store, web, monkeypatch):
    """However long one of them takes to come: here the first waits for all of them."""
    entry = store.manifest().shards[0]
    web.faults[entry.name] = ["403*"]
    waiting, bring = Semaphore(0), store._folder.bring

    class Flights(dict):
        def setdefault(self, key, own):
            waiting.release()
            return super().setdefault(key, own)

    def bring_late(*arguments: object) -> None:
        assert all(waiting.acquire(timeout=60) for _ in range(4))
        bring(*arguments)

    def read(_: int) -> OutsideError:
        with refused(OutsideError, "refused", f"{web.url}/{entry.name}") as told:
            store.open(entry)
        return told.value

    monkeypatch.setattr(store, "_flights", Flights())
    monkeypatch.setattr(store._folder, "bring", bring_late)
    with ThreadPoolExecutor(4) as pool:
        assert len({id(error) for error in [*pool.map(read, range(4))]}) == 1
    assert web.count(entry.name) == 1


def test_a_manifest_that_is_missing_or_wrong(tmp_path):
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as web:
        store = make_store(web, tmp_path)
        with refused(DataError, "missing", f"{web.url}/manifest.json"):
            store.manifest()
        (tmp_path / "served" / "manifest.json").write_text('{"format_version": 9}')
        with refused(DataError, "unsupported", f"{web.url}/manifest.json"):
            store.manifest()


@pytest.mark.parametrize("far", [False, True])
def test_a_manifest_may_be_pinned(folder, web, tmp_path, far):
    """Shards are vouched for by it, and nothing else vouches for it."""
    sha256 = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    place, cache = web.url if far else str(folder), str(tmp_path / "cache")

    def manifest(pin: str) -> Manifest:
        return open_store(place, Data(cache=cache, manifest_sha256=pin)).manifest()

    assert manifest(sha256) == LocalStore(folder).manifest()
    wording = None if far else "another-manifest"
    with refused(DataError, "mismatch", "data.manifest_sha256", wording=wording) as told:
        manifest("0" * 64)
    assert f"{place}/manifest.json: its sha256 is {sha256}, not" in str(told.value)
    with pytest.raises(ValidationError, match="manifest_sha256"):
        manifest(sha256.upper())


def test_names_that_lead_elsewhere_are_refused(tmp_path, folder):
    text = (folder / "manifest.json").read_text()
    name = LocalStore(folder).manifest().shards[0].name
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as web:
        for bad in ("../../etc/x.tar", "/etc/x.tar", "http://elsewhere/x.tar", "a.tar?b.tar"):
            (tmp_path / "served" / "manifest.json").write_text(text.replace(name, bad, 1))
            with refused(DataError, "damaged", "shards.0.name"):
                make_store(web, tmp_path).manifest()


def test_the_cache_lies_where_caches_do(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "cdpo" / "shards"
    assert isinstance(open_store(f"file://{tmp_path}", Data()), LocalStore)


# --------------------------------------------------------------------------------------------------
# The stream


def batches(stream: PairStream, steps: range, skips: tuple[int, ...] = (0, 0)) -> list[list[int]]:
    found = [stream.next(step, skips).pair_ids.tolist() for step in steps]
    stream.close()
    return found


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("shards", [7, 10, 100])
def test_a_small_cache_evicts_and_the_batches_stay_the_same(folder, web, tmp_path, shards, threads):
    manifest = LocalStore(folder).manifest()
    largest = max(entry.bytes for entry in manifest.shards)
    limit = shards * largest
    store = make_store(web, tmp_path, limit / 2**30, threads=threads)
    readers = ShardReaders(store, manifest)
    stream = PairStream(make_plan(manifest), readers, pacing(), workers=2, timeout=60)
    most = 0

    def watched(step: int) -> list[int]:
        nonlocal most
        with store.cache._exclusive():
            most = max(most, sum(size for _, size, _ in store.cache._files()))
        return stream.next(step, (0, 0)).pair_ids.tolist()

    far = [watched(step) for step in range(60)]
    stream.close()
    near = PairStream(make_plan(manifest), ShardReaders(folder, manifest), pacing(), workers=0)
    assert far == batches(near, range(60))
    assert most <= limit
    asked = [web.count(entry.name) for entry in manifest.shards]
    assert min(asked) >= 1 and (max(asked) == 1) == (shards == 100)


def test_what_is_fetched_ahead_is_what_will_be_read(folder, web, tmp_path):
    """From any step on, shards are first read in about the order in which they are fetched: none is
    read before all of the window before its own are on the list.
    """
    manifest, steps, skips = LocalStore(folder).manifest(), 60, (2, 1)
    plan = make_plan(manifest)
    ahead = Prefetch(make_store(web, tmp_path), plan, pacing(steps))
    assert ahead.shards_in_turns == 6
    for start in (0, 5, 17, 19, 20, 33, 59):
        read: list[str] = []
        for step in range(start, steps):
            position = pacing(steps).position(step, skips, plan.passes_begun)
            shards = plan.locate(position).shards.tolist()
            read += [manifest.shards[i].name for i in shards]
        first_reads = list(dict.fromkeys(read))
        listed = [entry.name for entry in ahead.upcoming(start, skips)]
        assert set(first_reads) <= set(listed)
        for place, name in enumerate(first_reads):
            assert listed.index(name) < place + 2 * ahead.shards_in_turns


def test_fetching_ahead_overlaps_reading(folder, web, tmp_path):
    store = make_store(web, tmp_path, threads=2)
    manifest = store.manifest()
    stream = PairStream(make_plan(manifest), ShardReaders(store, manifest), pacing(), workers=1)
    stream.next(0, (0, 0))
    wanted = {entry.sha256 for entry in manifest.shards}
    for _ in range(500):
        if all(store.cache.holds(key) for key in wanted):
            break
        web.closing.wait(0.02)
    assert all(store.cache.holds(key) for key in wanted)  # after a single step
    web.faults["*"] = ["500*"]
    assert len(batches(stream, range(60))) == 60


def test_a_cache_too_small_for_a_window_is_refused(folder, web, tmp_path):
    manifest = LocalStore(folder).manifest()
    store = make_store(web, tmp_path, 5 * manifest.shards[0].bytes / 2**30)
    with refused(RecipeError, "out-of-range", "data.cache_gib", wording="cache-too-small"):
        PairStream(make_plan(manifest), ShardReaders(store, manifest), pacing())
