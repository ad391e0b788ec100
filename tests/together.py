"""Ranks that are threads of the test: what they agree on, without processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from cdpo.engine.ranks import Ranks

SECONDS = 10  # after which a rank counts as left waiting


class _Room:
    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Meets the others at a barrier; BrokenBarrierError for one that is left waiting."""

    room: _Room = field(default_factory=lambda: _Room(1))

    def barrier(self) -> None:
        self.room.barrier.wait(SECONDS)

    def gather(self, value: Any) -> list[Any]:
        self.room.values[self.rank] = value
        self.room.barrier.wait(SECONDS)
        values = list(self.room.values)
        self.room.barrier.wait(SECONDS)
        return values

    def from_first(self, value: Any) -> Any:
        return self.gather(value)[0]


def on_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What ``work`` returns or raises on each of ``count`` ranks."""
    room = _Room(count)

    def one(rank: int) -> Any:
        ranks = ThreadRanks(rank, count, rank, torch.device("cpu"), room=room)
        try:
            return work(ranks)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
