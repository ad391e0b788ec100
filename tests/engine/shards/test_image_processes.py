"""Processes that decode: the same images and errors, and nothing left of them."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cdpo.engine.basics.errors import ShardError
from cdpo.engine.shards.contents import ImageContents
from cdpo.engine.shards.image_processes import ImageProcesses
from cdpo.engine.shards.webp import encode_webp
from refusals import refused

SIZE = (16, 24)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, *SIZE, 3), dtype=np.uint8)
FILES = [encode_webp(image) for image in IMAGES]


@pytest.fixture(scope="module")
def decode():
    made = ImageProcesses(2)
    yield made
    made.close()
    made.close()


def is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(processes: set[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(is_running, processes)):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.02)


def test_threads_share_the_processes(decode):
    assert len(decode.process_ids) == 2
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda data: decode(data, SIZE), FILES * 3))
    assert np.array_equal(np.stack(found), np.concatenate([IMAGES] * 3))


def test_what_is_wrong_is_said_as_by_the_reading_thread(decode):
    for data, reason in ((b"x", "not a WebP file"), (encode_webp(IMAGES[0][:8]), "is 8x24 pixels")):
        with pytest.raises(ValueError, match=reason):
            decode(data, SIZE)
    pair = ImageContents(SIZE, decode).decode(FILES[:2], "x.tar", "k7")
    assert np.array_equal(pair, IMAGES[:2])


def test_killed_processes_are_replaced(decode):
    before = decode.process_ids
    for process in before:
        os.kill(process, signal.SIGKILL)
    for data, image in zip(FILES, IMAGES, strict=True):
        assert np.array_equal(decode(data, SIZE), image)
    assert len(decode.process_ids) == 2 and not before & decode.process_ids


def test_an_image_that_kills_its_process_is_named(decode, monkeypatch):
    """As one does that takes more memory than there is."""
    ask = "cdpo.engine.shards.image_processes._ask"
    with monkeypatch.context() as patch, refused(ShardError, "damaged", "k7") as told:
        patch.setattr(ask, lambda process, *_: process.kill() or process.stdout.read(1) or eof())
        ImageContents(SIZE, decode).decode(FILES[:2], "x.tar", "k7")
    assert told.value.member == "w.webp"
    assert np.array_equal(decode(FILES[0], SIZE), IMAGES[0])


def eof():
    raise EOFError


def test_a_wait_is_bounded(decode, monkeypatch):
    for process in decode.process_ids:
        os.kill(process, signal.SIGSTOP)
    monkeypatch.setattr(decode, "_timeout", 0.2)
    with pytest.raises(ValueError, match=r"was not decoded within 0\.2 s"):
        decode(FILES[0], SIZE)
    monkeypatch.undo()
    for process in decode.process_ids:
        os.kill(process, signal.SIGCONT)
    for data, image in zip(FILES, IMAGES, strict=True):
        assert np.array_equal(decode(data, SIZE), image)


def test_a_request_to_stop_the_run_leaves_them_at_work(decode):
    processes = decode.process_ids
    for data in FILES[:4]:
        decode(data, SIZE)  # they are up
    for process in processes:
        assert os.getpgid(process) != os.getpgrp()
        os.kill(process, signal.SIGTERM)
        os.kill(process, signal.SIGINT)
    for data, image in zip(FILES, IMAGES, strict=True):
        assert np.array_equal(decode(data, SIZE), image)
    assert decode.process_ids == processes


PARENT = """
import fcntl, os, sys
from cdpo.engine.shards.image_processes import ImageProcesses
lock = open(sys.argv[1], "w")
os.set_inheritable(lock.fileno(), True)
fcntl.flock(lock, fcntl.LOCK_EX)
made = ImageProcesses(2)
print(*made.process_ids, flush=True)
sys.stdin.read()
"""


def test_they_end_with_a_process_that_was_killed_and_never_hold_its_locks(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", PARENT, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        orphans = {int(number) for number in parent.stdout.readline().split()}
        parent.kill()
        parent.wait()
        with path.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        wait_until_gone(orphans)
    assert len(orphans) == 2


def test_closing_ends_them():
    made = ImageProcesses(1)
    processes = made.process_ids
    made.close()
    wait_until_gone(processes)
    with pytest.raises(ValueError, match="the reader was closed"):
        made(FILES[0], SIZE)
    made.close()
