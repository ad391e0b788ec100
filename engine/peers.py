"""What ranks tell each other outside of collectives, by the store that they have in common.

A rank that waits in a collective hears nothing there of one that has failed or is asked to stop. So
each listens in a thread of its own, over a connection of its own: on the main one a wait for a peer
would hold up whatever else is asked.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

STOPPING, FAILED = "cdpo/stopping", "cdpo/failed"
LISTEN_EVERY = 0.5  # seconds
SECONDS_TO_FOLLOW = 6.0  # for a rank to come to the same end by itself


@dataclass(frozen=True)
class Failure:
    """How a run ended for the rank that failed first."""

    rank: int
    code: int


class Peers:
    """The other ranks, once they are `joined`; before that, and for one rank alone, nobody listens.

    ``follow(code)`` is called in the listening thread, and is to end the process, when a rank has
    failed and this one is still at work :data:`SECONDS_TO_FOLLOW` later.
    """

    def __init__(self, follow: Callable[[int], object] = lambda code: None) -> None:
        self.failure: Failure | None = None
        """What was heard."""
        self._follow = follow
        self._rank = 0
        self._store: dist.Store | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def join(self, rank: int, world_size: int, store: dist.Store) -> None:
        """Listen from now on."""
        if world_size > 1:
            self._rank = rank
            self._store = store.clone()  # type: ignore[attr-defined]  # their stubs lack it
            self._thread = threading.Thread(target=self._listen, name="peers", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Listen no more."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def ask_to_stop(self, reason: str) -> None:
        """Pass on a request to stop."""
        if self._store is not None:
            with suppress(RuntimeError):  # the store has gone, and the others with it
                self._store.set(STOPPING, reason)

    def tell(self, code: int) -> Failure:
        """Say that this rank has failed; returns the first failure, which all are to end with."""
        own = Failure(self._rank, code)
        if self._store is not None and self.failure is None:
            with suppress(RuntimeError):
                text = json.dumps([own.rank, own.code])
                self.failure = _failure(self._store.compare_set(FAILED, "", text))
        return self.failure or own

    def _listen(self) -> None:
        assert self._store is not None
        with suppress(RuntimeError):
            while not self._closing.wait(LISTEN_EVERY):
                if self._store.check([FAILED]):
                    self.failure = _failure(self._store.get(FAILED))
                    break
        failure = self.failure
        if failure is None or failure.rank == self._rank:
            return
        if not self._closing.wait(SECONDS_TO_FOLLOW):
            self._follow(failure.code)


def _failure(text: bytes) -> Failure:
    return Failure(*json.loads(text))
