"""Batches of one rank, read ahead of the step that will use them.

Batches are fetched by position, and the trainer asks for the position of its next step, so a
stage change takes effect at the step it is due, and a batch that was read ahead for a step that
is then skipped over is simply not asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from ..basics.errors import DataError
from ..curriculum.pacing import Pacing, Position
from .batch import PairBatch
from .lanes import LanePlan
from .reader import ShardReaders
from .remote.prefetch import Prefetch
from .remote.store import RemoteStore

DEPTH_PER_WORKER = 2
BATCH_TIMEOUT = 600.0  # seconds
LOOK_EVERY = 0.5  # seconds between two looks at whether to go on waiting


class WaitInterrupted(Exception):
    """Waiting for a batch ended before it came, because whoever waits is asked to stop."""


class PairStream:
    """The pairs of one rank: ``next(step, skips)`` for every optimiser step.

    ``workers`` threads read ahead, two batches each; with 0 a batch is read when it is asked for,
    in ``next`` itself unless it comes from a URL. Whatever a thread raises comes out of the
    ``next`` whose batch it was. No wait in which no shard is opened is longer than ``timeout``
    seconds.
    ``pin`` puts the images where a GPU can copy them from by itself.
    """

    def __init__(
        self,
        plan: LanePlan,
        readers: ShardReaders,
        pacing: Pacing,
        *,
        workers: int = 1,
        timeout: float = BATCH_TIMEOUT,
        pin: bool = False,
    ) -> None:
        plan.check_stages(pacing.stages)
        self.plan, self.readers, self.pacing = plan, readers, pacing
        readers.keep_indexes(2 * len(plan.lanes) * plan.shuffle_shards)  # this window and the next
        self._prefetch: Prefetch | None = None
        threads = workers
        if isinstance(readers.store, RemoteStore):
            self._prefetch = Prefetch(readers.store, plan, pacing)
            readers.keep_files(self._prefetch.shards_in_turns)
            threads = max(1, workers)  # a wait for the network must be one that can be left
        self._timeout = timeout
        self._pin = pin
        self._depth = DEPTH_PER_WORKER * workers
        self._pool = ThreadPoolExecutor(threads, "pair-stream") if threads else None
        self._ahead: dict[Position, Future[PairBatch]] = {}

    def check_present(self) -> None:
        """Raise ShardError if a shard that this rank will read is absent or of the wrong size."""
        reached = [stage for stage in self.pacing.stages if stage.num_steps]
        self.readers.check_present(self.plan.rank_entries(reached))

    def position(self, step: int, skips: Sequence[int]) -> Position:
        """Where ``step`` reads when ``skips[k]`` batches of stage k were skipped so far."""
        return self.pacing.position(step, skips, self.plan.passes_begun)

    def next(
        self, step: int, skips: Sequence[int], interrupted: Callable[[], bool] = lambda: False
    ) -> PairBatch:
        """The batch of optimiser step ``step``; then the following steps are read ahead.

        While it is waited for ``interrupted`` is asked every now and then; where it says so
        WaitInterrupted is raised, and the same call again takes the wait up.
        """
        wanted = self.position(step, skips)
        if self._prefetch is not None:
            self._prefetch.follow(step, skips)
        if self._pool is None:
            return self.fetch(wanted)
        last = min(step + self._depth, self.pacing.total_steps - 1)
        self._read_ahead([wanted, *(self.position(s, skips) for s in range(step + 1, last + 1))])
        self._wait_for(self._ahead[wanted], step, interrupted)
        return self._ahead.pop(wanted).result()

    def _wait_for(
        self, batch: Future[PairBatch], step: int, interrupted: Callable[[], bool]
    ) -> None:
        opened, since = self.readers.num_opened, time.monotonic()
        while not wait([batch], min(LOOK_EVERY, self._timeout)).done:
            if interrupted():
                raise WaitInterrupted
            if opened != self.readers.num_opened:
                opened, since = self.readers.num_opened, time.monotonic()
            elif time.monotonic() - since >= self._timeout:
                place = self.readers.store.location
                raise DataError(
                    f"no batch for step {step}, and no shard for {self._timeout:g} s: is the "
                    f"storage of {place} stalled?",
                    place,
                    "timeout",
                )

    def fetch(self, position: Position) -> PairBatch:
        """Read the batch at ``position`` now."""
        places = self.plan.locate(position)
        entries = [self.plan.entries[shard] for shard in places.shards.tolist()]
        metas, images = self.readers.read_batch(entries, places.samples.tolist())
        batch = PairBatch.collate(metas, images, places.visits)
        return batch.pinned() if self._pin else batch

    def close(self) -> None:
        """Stop reading ahead and let go of the files; may be called twice."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        if self._prefetch is not None:
            self._prefetch.close()
        self.readers.close()

    def _read_ahead(self, positions: Sequence[Position]) -> None:
        """Keep what is on its way and still wanted, drop the rest, start what is missing."""
        assert self._pool is not None
        for position in [*self._ahead.keys() - set(positions)]:
            self._ahead.pop(position).cancel()
        for position in positions:
            if position not in self._ahead:
                self._ahead[position] = self._pool.submit(self.fetch, position)
