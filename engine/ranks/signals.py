"""What ranks tell each other outside of collectives, and how they are asked to stop.

A rank that waits in a collective hears nothing there of one that has failed or is asked to stop. So
each listens in a thread of its own, over a connection of its own to the store that they have in
common: on the main one a wait for a peer would hold up whatever else is asked.

A run is asked to stop by SIGTERM (a scheduler's preemption), by SIGINT, by the launcher's death. A
request is a wish, granted at the next safe point by all ranks together (:class:`.group.Ranks`). It
is noticed by a thread: Python runs signal handlers in the main thread, between two bytecodes, and
that may be waiting minutes in a collective. If no safe point comes within the grace time the
process leaves all the same; what is committed by then is what the next start goes on from.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

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


SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_EVERY = 0.5  # seconds between two looks at the parent


class StopSignal:
    """Watches for requests to stop while it is entered; ``requested`` tells, and stays true.

    ``overdue(reason)`` is called in the watching thread when ``grace`` seconds have passed since
    the request, and is to end the process. A second SIGINT raises KeyboardInterrupt, for whoever
    insists at a terminal; a second SIGTERM changes nothing: launchers repeat it.

    With ``watch_parent`` the death of the parent counts as a request. Launchers that die leave
    their workers running, still writing; but plain processes may outlive the shell that began them.
    """

    def __init__(
        self,
        grace: float = 300.0,
        overdue: Callable[[str], object] = lambda reason: None,
        watch_parent: bool = False,
    ) -> None:
        self.grace = grace
        self.reason = ""
        self._overdue = overdue
        self._parent = os.getppid() if watch_parent else None
        self._announce: list[Callable[[str], object]] = []
        self._interrupts = 0

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop."""
        return bool(self.reason)

    def __enter__(self) -> StopSignal:
        self._closing = False
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        # The C handler writes the number here at once, whatever the main thread is doing.
        self._previous_fd = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="stop signal", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._closing = True
        self._outbox.close()  # ends the thread's wait
        self._thread.join()
        self._inbox.close()

    def request(self, reason: str) -> None:
        """Note a request; the first one's reason stays."""
        self.reason = self.reason or reason

    def announce_by(self, announce: Callable[[str], object]) -> None:
        """Pass the reason of a request on by ``announce`` too, from a thread of its own: the main
        one may be waiting for ranks that know of nothing, and the watching one has a deadline to
        keep.
        """
        self._announce.append(announce)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        deadline: float | None = None
        announced = 0
        while not self._closing:
            if select.select([self._inbox], [], [], LOOK_EVERY)[0]:
                for number in self._inbox.recv(64):
                    if number in SIGNALS:
                        self.request(signal.Signals(number).name)
            if self._parent is not None and os.getppid() != self._parent:
                self.request("the launcher has died")
            if self.requested and deadline is None:
                deadline = time.monotonic() + self.grace
            if self.requested:
                for announce in self._announce[announced:]:
                    announced += 1
                    threading.Thread(target=announce, args=(self.reason,), daemon=True).start()
            if deadline is not None and time.monotonic() > deadline:
                self._overdue(self.reason)
                return
