"""In which shards pairs were met, so that one that lies in two of them is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from ..basics.errors import ShardError
from .sample import sample_key


class PairsMet:
    """The pairs of shards by id, each with the name of its shard: 12 bytes a pair.

    They lie in sorted runs, each at least twice as long as the next: a shard is looked up in a few
    of them, however many came before, and a pair is moved no more often than that.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        """Ids (n,) int64, and (n,) int32 the indices of their shards' names."""

    def add(self, shard: str, ids: np.ndarray) -> list[ShardError]:
        """Note the ``ids`` (n,) int64 of a shard; an error for each that another has, which is left
        as it was.
        """
        own, errors = np.sort(ids), list[ShardError]()
        for run, shards in self._runs:
            places = np.minimum(np.searchsorted(run, own), len(run) - 1)
            known = run[places] == own
            errors += self._errors(shard, own[known], shards[places[known]])
            own = own[~known]
        if len(own):
            self._runs.append((own, np.full(len(own), len(self._names), np.int32)))
            self._names.append(shard)
        while len(self._runs) > 1 and len(self._runs[-2][0]) < 2 * len(self._runs[-1][0]):
            ids, shards = (np.concatenate(both) for both in zip(*self._runs[-2:], strict=True))
            order = np.argsort(ids, kind="stable")  # of two sorted halves: a merge
            self._runs[-2:] = [(ids[order], shards[order])]
        return errors

    def _errors(self, shard: str, ids: np.ndarray, others: np.ndarray) -> Iterator[ShardError]:
        for pair_id, other in zip(ids.tolist(), others.tolist(), strict=True):
            reason = f"the pair lies in shard {self._names[other]} as well; run prepare again"
            yield ShardError(shard, reason, sample_key(pair_id), kind="duplicate")


def ids_of(keys: np.ndarray) -> np.ndarray:
    """The ids (n,) int64 of pairs with ``keys`` (n,) bytes; none if one is no id, as reads say."""
    with suppress(ValueError):
        data = bytes.fromhex(b"".join(keys.tolist()).decode())
        if len(data) == 8 * len(keys):
            return np.frombuffer(data, ">i8").astype(np.int64)
    return np.empty(0, np.int64)
