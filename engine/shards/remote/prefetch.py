"""Shards brought into the cache before they are read, in the order of the lanes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from threading import Condition, Thread

from ...basics.errors import CdpoError
from ...curriculum.pacing import Pacing
from ..lanes import LanePlan
from ..manifest import ShardEntry
from .cache import CacheFull
from .store import RemoteStore

MAX_WINDOWS = 256  # looked into at a time: far more than a cache holds ahead of large shards


class Prefetch:
    """Threads that follow the step: the shards it reads come first, then those of later windows,
    later passes and later stages, as many as the cache has room for beside what is in use.

    What cannot be brought is left out: who reads the shard tries again, and says what is wrong.
    """

    def __init__(self, store: RemoteStore, plan: LanePlan, pacing: Pacing) -> None:
        """Raises RecipeError for a cache too small for the shards that are read in turns."""
        self._store, self._plan, self._pacing = store, plan, pacing
        # One more of each lane: the next window opens while readers still hold the last one.
        self.shards_in_turns = len(plan.lanes) * (plan.shuffle_shards + 1)
        stages = [stage for stage in pacing.stages if stage.num_steps]
        self._room = store.check_room(plan.rank_entries(stages), self.shards_in_turns)
        self._wanted: deque[ShardEntry] = deque()
        self._changed = Condition()
        self._closed = False
        self._planned = range(0)  # the steps for which the wanted shards stay the same
        for _ in range(store.spec.threads):
            Thread(target=self._work, name="shard-prefetch", daemon=True).start()

    def follow(self, step: int, skips: Sequence[int]) -> None:
        """Training is about to read ``step``."""
        if step in self._planned:
            return
        upcoming = self.upcoming(step, skips)
        with self._changed:
            self._wanted = deque(upcoming)
            self._changed.notify_all()

    def upcoming(self, step: int, skips: Sequence[int]) -> list[ShardEntry]:
        """The shards of the windows at ``step``, and as many later ones as there is room for."""
        found: dict[str, ShardEntry] = {}
        ahead = 0
        for number, (steps, entries) in enumerate(self._windows(step, skips)):
            fresh = [entry for entry in entries if entry.name not in found]
            if number == 0:
                self._planned = steps
            else:
                ahead += sum(entry.bytes for entry in fresh)
            if ahead > self._room or number == MAX_WINDOWS:
                break
            found |= {entry.name: entry for entry in fresh}
        return [*found.values()]

    def close(self) -> None:
        """End the threads and what they are bringing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._store.close()

    def _windows(self, step: int, skips: Sequence[int]) -> Iterator[tuple[range, list[ShardEntry]]]:
        """Stretches of steps from ``step`` to the end of training, with the shards each reads."""
        while step < self._pacing.total_steps:
            position = self._pacing.position(step, skips, self._plan.passes_begun)
            entries, next_batch = self._plan.window(position)
            stage = position.stage
            end = min(step + next_batch - position.batch, stage.first_step + stage.num_steps)
            yield range(step, end), entries
            step = end

    def _work(self) -> None:
        while (entry := self._next()) is not None:
            try:
                if not self._store.cache.holds(entry.sha256):
                    self._store.fetch_ahead(entry)
            except CacheFull:
                with self._changed:
                    self._wanted.clear()  # until training has moved on
            except CdpoError:
                continue

    def _next(self) -> ShardEntry | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._wanted)
            return None if self._closed else self._wanted.popleft()
