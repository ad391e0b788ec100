"""The port at which ranks meet, when it is somebody else's."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist
from cdpo.engine.basics.errors import OutsideError
from cdpo.engine.ranks import launch
from launching import KILLED, World
from refusals import refused


@contextmanager
def program(kind: str) -> Iterator[int]:
    """Something that listens: in silence, or as a server of another protocol does."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:

        def answer() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                with peer:
                    peer.recv(64)
                    peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        if kind == "talks":
            threading.Thread(target=answer, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.fixture
def store() -> dist.TCPStore:
    """Another run's, both of whose ranks have come."""
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    for key in ("cdpo/rank/0", "cdpo/rank/1"):
        store.set(key, "taken")
    store.set("cdpo/ranks", "2")
    return store


def join(monkeypatch: pytest.MonkeyPatch, port: int, rank: int, world_size: int = 2) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(launch, "SECONDS_TO_ANSWER", 0.5)
    started = time.monotonic()
    with refused(OutsideError, "in-use", "MASTER_PORT") as told:
        launch._common_store(rank, world_size, timedelta(minutes=5))
    assert f"MASTER_PORT={port} " in str(told.value)
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["silent", "talks"])
def test_of_another_program(monkeypatch, kind, rank):
    with program(kind) as port:
        join(monkeypatch, port, rank)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 2), (1, 2), (3, 4)])
def test_of_another_run_whose_store_is_left_as_it_was(monkeypatch, store, rank, world_size):
    """Or its ranks would hear that one of them has failed."""
    keys = store.num_keys()
    join(monkeypatch, store.port, rank, world_size)
    assert store.num_keys() <= keys + 1  # PyTorch's own count of who came


def test_of_nobody(monkeypatch):
    with program("silent") as port:
        pass
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with refused(OutsideError, "timeout", "MASTER_PORT"):
        launch._common_store(1, 2, timedelta(seconds=0.2))


@pytest.mark.slow
def test_two_ranks_end_at_once(world: World, tmp_path):
    """The second cannot know what a silent program is: whoever started both ends it, too."""
    with program("silent") as port:
        started = time.monotonic()
        env = {"MASTER_PORT": str(port)}
        outcome = world.train(tmp_path / "run", ranks=2, env=env)
        assert outcome.code == 6 and f"MASTER_PORT={port} " in outcome.output[0]
        assert outcome.codes[1] in (6, KILLED) and "Traceback" not in outcome.text
        assert time.monotonic() - started < 30
    assert not (tmp_path / "run").exists()
