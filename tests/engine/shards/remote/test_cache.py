"""The cache is a folder shared by processes: these tests use its own locks from several places."""

import errno
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cdpo.engine.basics.errors import DataError, OutsideError
from cdpo.engine.shards.remote.cache import CacheFull, ShardCache
from refusals import refused

SIZE = 1000
FORK = multiprocessing.get_context("fork")


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def fill(number: int, size: int = SIZE):
    return lambda descriptor: os.pwrite(descriptor, bytes([number]) * size, 0)


def never(descriptor: int) -> None:
    raise AssertionError("it is in the cache")


def put(cache: ShardCache, number: int, **options: bool) -> None:
    os.close(cache.get(key(number), SIZE, fill(number), **options))


def kept(cache: ShardCache) -> set[int]:
    names = {path.name for path in cache.folder.iterdir()} - {"lock"}
    return {number for number in range(20) if f"{key(number)}.tar" in names}


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    """Room for three files and a half."""
    return ShardCache(tmp_path / "cache", 3500, patience=20.0)


def test_a_file_is_filled_once_and_read_from_then_on(cache):
    put(cache, 1)
    descriptor = cache.get(key(1), SIZE, never)
    assert os.read(descriptor, 2 * SIZE) == b"\x01" * SIZE
    os.close(descriptor)


def test_the_least_recently_used_file_goes(cache):
    for number in (1, 2, 3):
        put(cache, number)
    assert cache.holds(key(1)) and not cache.holds(key(9))  # 1 is wanted soon
    put(cache, 4)
    assert kept(cache) == {1, 3, 4}
    os.close(cache.get(key(3), SIZE, never))
    put(cache, 5)
    assert kept(cache) == {3, 4, 5}


def test_files_in_use_stay(cache):
    held = [cache.get(key(number), SIZE, fill(number)) for number in (1, 2)]
    for number in range(3, 9):
        put(cache, number)
        assert kept(cache) >= {1, 2} and len(kept(cache)) <= 3
    held.append(cache.get(key(9), SIZE, fill(9)))
    with pytest.raises(CacheFull):
        put(cache, 10, force=False)
    assert kept(cache) == {1, 2, 9}
    for descriptor in held:
        os.close(descriptor)


def test_when_all_are_in_use_the_reader_keeps_what_it_reads(cache):
    held = {number: cache.get(key(number), SIZE, fill(number)) for number in (1, 2, 3)}
    put(cache, 4)
    assert kept(cache) == {2, 3, 4}
    for number, descriptor in held.items():
        assert os.pread(descriptor, SIZE, 0) == bytes([number]) * SIZE
        os.close(descriptor)


def test_a_fill_that_fails_leaves_nothing(cache):
    def fail(descriptor: int) -> None:
        raise OutsideError("gone")

    with pytest.raises(OutsideError):
        cache.get(key(1), SIZE, fail)
    assert kept(cache) == set() and len(list(cache.folder.iterdir())) == 1
    put(cache, 1)


def test_a_discarded_copy_is_filled_again(cache):
    put(cache, 1)
    cache.discard(key(1))
    cache.discard(key(1))
    put(cache, 1)
    assert kept(cache) == {1}


def test_strangers_files_are_left_alone(cache):
    (cache.folder / "notes.tar").write_bytes(bytes(9000))
    for number in range(5):
        put(cache, number)
    assert (cache.folder / "notes.tar").stat().st_size == 9000


def test_threads_fill_each_file_once(cache):
    filled: list[int] = []

    def get(number: int) -> bytes:
        def slowly(descriptor: int) -> None:
            filled.append(number)
            time.sleep(0.02)
            fill(number)(descriptor)

        descriptor = cache.get(key(number), SIZE, slowly)
        data = os.pread(descriptor, SIZE, 0)
        os.close(descriptor)
        return data

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(get, [1, 2, 3] * 8))
    assert found == [bytes([number]) * SIZE for number in (1, 2, 3)] * 8
    assert sorted(filled) == [1, 2, 3]


def _read_many(folder: Path, seed: int, failures: multiprocessing.SimpleQueue) -> None:
    cache = ShardCache(folder, 3500, patience=30.0)
    for step in range(40):
        number = (step * (2 * seed + 1) + seed) % 7 + 1
        descriptor = cache.get(key(number), SIZE, fill(number))
        if os.pread(descriptor, SIZE + 1, 0) != bytes([number]) * SIZE:
            failures.put((seed, number))
        os.close(descriptor)


def test_processes_share_the_folder_and_its_bound(tmp_path):
    failures = FORK.SimpleQueue()
    workers = [FORK.Process(target=_read_many, args=(tmp_path, n, failures)) for n in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        names = [path.name for path in tmp_path.iterdir() if path.name != "lock"]
        assert len(names) <= 3 + 3  # what is listed while it changes hands, at most one a process
        time.sleep(0.01)
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert failures.empty()
    assert len(list(tmp_path.glob("*.tar"))) <= 3 and not list(tmp_path.glob("*.part"))


def _die_filling(folder: Path) -> None:
    def die(descriptor: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    ShardCache(folder, 3500, patience=5.0).get(key(1), 3000, die)


def test_what_a_killed_process_left_is_reclaimed(tmp_path):
    process = FORK.Process(target=_die_filling, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert [path.stat().st_size for path in tmp_path.glob("*.part")] == [3000]
    cache = ShardCache(tmp_path, 3500, patience=5.0)
    assert not list(tmp_path.glob("*.part"))
    put(cache, 1)
    assert kept(cache) == {1}


def test_another_process_that_never_finishes_is_not_waited_for_for_ever(tmp_path):
    cache, entered, done = ShardCache(tmp_path, 3500, 0.3), threading.Event(), threading.Event()

    def hang(descriptor: int) -> None:
        entered.set()
        done.wait(30)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(cache.get, key(1), SIZE, hang)
        entered.wait(10)
        with refused(OutsideError, "timeout", "data.fetch.budget"):
            cache.get(key(1), SIZE, never)
        done.set()
        os.close(first.result(10))


def test_a_full_disk_takes_room_from_the_cache_then_is_one_error(cache, monkeypatch):
    put(cache, 1)
    put(cache, 2)
    real, full = os.posix_fallocate, [True, True]

    def allocate(descriptor: int, offset: int, size: int) -> None:
        if full:
            full.pop()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    put(cache, 3)
    assert kept(cache) == {3}
    full.extend([True] * 9)
    with refused(DataError, "no-space", str(cache.folder)):
        put(cache, 4)
    assert kept(cache) == set() and not list(cache.folder.glob("*.part"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with refused(DataError, "unwritable", str(tmp_path / "file" / "cache")):
        ShardCache(tmp_path / "file" / "cache", 1, 1.0)
