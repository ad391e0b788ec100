"""What ranks tell each other through a real store, from threads that stand for them."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from cdpo.engine.ranks import signals
from cdpo.engine.ranks.signals import STOPPING, Failure, Peers


@pytest.fixture
def store() -> dist.Store:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))


def joined(store: dist.Store, rank: int) -> tuple[Peers, threading.Event, list[int]]:
    """A rank, and what it is made to end with."""
    followed, codes = threading.Event(), list[int]()

    def follow(code: int) -> None:
        codes.append(code)
        followed.set()

    rank_peers = Peers(follow)
    rank_peers.join(rank, 2, store)
    return rank_peers, followed, codes


def test_a_rank_that_is_still_at_work_ends_as_the_one_that_failed(store, monkeypatch):
    monkeypatch.setattr(signals, "SECONDS_TO_FOLLOW", 0.1)
    first, followed, codes = joined(store, 0)
    second, _, own = joined(store, 1)
    assert second.tell(3) == Failure(1, 3)
    assert followed.wait(20) and codes == [3] and first.failure == Failure(1, 3)
    second.close()
    assert own == []  # it leaves by itself


def test_all_end_with_the_code_of_the_first(store):
    first, second = joined(store, 0)[0], joined(store, 1)[0]
    assert second.tell(3) == Failure(1, 3) == first.tell(6)
    first.close()
    second.close()


def test_a_rank_that_comes_to_its_end_is_left_alone(store, monkeypatch):
    monkeypatch.setattr(signals, "LISTEN_EVERY", 0.01)
    first, followed, _ = joined(store, 0)
    second = joined(store, 1)[0]
    second.tell(3)
    first.close()
    second.close()
    assert not followed.is_set()


def test_a_request_to_stop_is_in_the_store(store):
    rank = joined(store, 0)[0]
    rank.ask_to_stop("SIGTERM")
    assert store.get(STOPPING) == b"SIGTERM"
    rank.close()


def test_a_rank_alone_ends_with_its_own_code():
    assert Peers().tell(4) == Failure(0, 4)
