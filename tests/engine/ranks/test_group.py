"""What ranks do together that needs no processes."""

import pytest
from cdpo.engine.basics.errors import StopRequested
from together import ThreadRanks, on_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("items", [0, 1, 2, 5])
def test_work_that_is_divided_comes_back_in_order_on_every_rank(monkeypatch, ranks, items):
    monkeypatch.setattr(ThreadRanks, "_why_stop", lambda self: "")
    done: list[tuple[int, int]] = []

    def work(on: ThreadRanks) -> list[int]:
        return on.divided(range(items), lambda item: done.append((on.rank, item)) or item**2)

    assert on_ranks(ranks, work) == [[item**2 for item in range(items)]] * ranks
    assert sorted(done, key=lambda one: one[1]) == [(item % ranks, item) for item in range(items)]


def test_a_request_to_stop_reaches_all_who_share_work(monkeypatch):
    monkeypatch.setattr(ThreadRanks, "_why_stop", lambda self: "SIGTERM" if self.rank else "")
    found = on_ranks(2, lambda on: on.divided(range(4), str))
    assert all(isinstance(error, StopRequested) for error in found), found
