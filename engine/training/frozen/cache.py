"""The frozen-pass cache of a run: looked up on the host by ids, and filled as training goes.

Results stay on the device until they are written: all of them together, at each checkpoint, when
they take :data:`MOST_WAITING` bytes, or when a pair comes again before that. So what lies on the
disk is always the whole history of a rank up to some micro-batch, and a run that was killed finds
for the steps that it takes again what it had found. What other runs add meanwhile is seen by the
next start.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...basics.transfer import send
from ...objectives.kept import Kept
from .segments import SUFFIX, Damaged, Rows, Segment, write_segment

MOST_WAITING = 64 << 20


class _Waiting(NamedTuple):
    pair_ids: np.ndarray
    draws: np.ndarray
    errors: Tensor
    targets: Tensor | None
    led: Tensor | None


class FrozenCache:
    """What is kept under one key; see the module.

    Files that are damaged are named in ``problems``, and what they held is asked for again.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        *,
        draws: int,
        latent_shape: tuple[int, int, int],
        has_targets: bool,
        device: torch.device,
        whole: bool = False,
    ) -> None:
        """``whole``: where a pair is missing ask about its whole batch, whose size then never
        changes, as compiled networks want it.
        """
        self.folder, self.key, self.draws = folder, key, draws
        self.latent_shape, self.has_targets, self.device = latent_shape, has_targets, device
        self.whole = whole
        self.problems: list[str] = []
        self.served = self.asked = self.written = self._told = 0
        self._waiting: list[_Waiting] = []
        self._waiting_keys: set[tuple[int, int]] = set()
        self._waiting_bytes = 0
        self._segments: list[Segment] = []
        self._lost = np.zeros(0, bool)
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            self._read(path)
        self._index()

    def __len__(self) -> int:
        """Draws of pairs that are kept."""
        return sum(len(ids) for ids, _ in self._sorted.values())

    def lacks(self, pair_ids: Tensor, visits: Tensor) -> bool:
        """Whether the frozen networks are to be asked about any of these."""
        ids, draws = pair_ids.numpy(), visits.numpy() % self.draws
        new = self._find(ids, draws) < 0
        wanted = zip(ids[new].tolist(), draws[new].tolist(), strict=True)
        return any(pair not in self._waiting_keys for pair in wanted)

    def look_up(self, pair_ids: Tensor, draws: Tensor) -> Kept:
        """What is known of the draws (B,) int64 of pairs (B,) int64, both on the host."""
        ids, numbers = pair_ids.numpy(), draws.numpy()
        names = list(zip(ids.tolist(), numbers.tolist(), strict=True))
        if not self._waiting_keys.isdisjoint(names):
            self.write()  # it is known, but not here
        found = self._find(ids, numbers)
        while (read := self._targets(found)) is None:  # a later file may have it whole
            self._index()
            found = self._find(ids, numbers)
        targets, led = read
        known = found >= 0
        if self.whole and not known.all():
            known[:], targets, led = False, [], []
        pairs = np.flatnonzero(known)
        firsts: dict[tuple[int, int], int] = {}
        places: list[int] = [0] * len(names)
        missing: list[int] = []
        for pair, name in enumerate(names):
            if not known[pair] and name not in firsts:
                firsts[name] = len(pairs) + len(missing)
                missing.append(pair)
        for place, pair in enumerate(pairs.tolist()):
            places[pair] = place
        for pair, name in enumerate(names):
            if not known[pair]:
                places[pair] = firsts[name]
        self.asked += len(names)
        self.served += len(names) - len(missing)
        asked_ids, asked_draws = ids[missing], numbers[missing]

        def keep(errors: Tensor, targets: Tensor | None, led: Tensor | None) -> None:
            self._keep(_Waiting(asked_ids, asked_draws, errors, targets, led))

        return Kept(
            missing,
            places,
            self._to_device(np.ascontiguousarray(self._errors[found[pairs]].T)),
            self._stacked(targets) if self.has_targets else None,
            led,
            keep,
        )

    def served_since(self) -> int:
        """Pairs that were known, since the last call."""
        self._told, before = self.served, self._told
        return self.served - before

    def write(self) -> None:
        """Write down what waits. DataError where the disk is full."""
        waiting, self._waiting = self._waiting, []
        self._waiting_bytes = 0
        self._waiting_keys.clear()
        if not waiting:
            return
        errors = torch.cat([each.errors.unflatten(0, (2, -1)) for each in waiting], dim=1)
        values = errors.T.cpu().numpy()
        ids = np.concatenate([each.pair_ids for each in waiting])
        draws = np.concatenate([each.draws for each in waiting]).astype(np.int32)
        targets, led = None, np.zeros(len(ids), bool)
        # What is not finite is a matter of this run: it is asked for again
        usable = np.isfinite(values).all(1) & (self._find(ids, draws) < 0)
        if self.has_targets:
            led = self._led(waiting)
            parts = [each.targets for each in waiting if each.targets is not None]
            whole = torch.cat([part.unflatten(0, (2, -1)) for part in parts], dim=1)
            written = torch.from_numpy(np.flatnonzero(led & usable)).to(whole.device)
            targets = whole.index_select(1, written).transpose(0, 1).contiguous().cpu().numpy()
        target_of = np.where(led & usable, np.cumsum(led & usable) - 1, -1).astype(np.int32)
        if usable.any():
            rows = Rows(ids[usable], draws[usable], values[usable], target_of[usable])
            self._read(write_segment(self.folder, self.key, rows, targets))
            self.written += len(rows.pair_ids)
            self._index()

    def _keep(self, new: _Waiting) -> None:
        self._waiting.append(new)
        self._waiting_keys.update(zip(new.pair_ids.tolist(), new.draws.tolist(), strict=True))
        self._waiting_bytes += new.errors.nbytes + (
            0 if new.targets is None else new.targets.nbytes
        )
        if self._waiting_bytes > MOST_WAITING:
            self.write()

    @staticmethod
    def _led(waiting: list[_Waiting]) -> np.ndarray:
        masks = [
            torch.ones(len(each.pair_ids), dtype=torch.bool) if each.led is None else each.led
            for each in waiting
        ]
        return torch.cat(masks).cpu().numpy()

    def _targets(self, found: np.ndarray) -> tuple[list[np.ndarray], list[int]] | None:
        """Of known pairs, and which they are; None if one is damaged, and so is known no more."""
        targets: list[np.ndarray] = []
        led: list[int] = []
        for pair in np.flatnonzero(found >= 0).tolist() if self.has_targets else ():
            segment, row = self._segments[self._segment[found[pair]]], self._row[found[pair]]
            if segment.rows.target_of[row] < 0:
                continue
            try:
                target = segment.target(int(row))
                if target.shape != (2, *self.latent_shape):
                    raise Damaged(f"{segment.path}: a target in it is of another size")
            except Damaged as damaged:
                self._note(damaged)
                self._lost[found[pair]] = True
                return None
            targets.append(target)
            led.append(pair)
        return targets, led

    def _stacked(self, targets: list[np.ndarray]) -> Tensor:
        if not targets:
            return torch.empty((2, 0, *self.latent_shape), dtype=torch.float16, device=self.device)
        return self._to_device(np.stack(targets, axis=1))

    def _to_device(self, values: np.ndarray) -> Tensor:
        return send(torch.from_numpy(values), self.device)

    # Finding

    def _read(self, path: Path) -> None:
        try:
            self._segments.append(Segment(path, self.key))
        except Damaged as damaged:
            self._note(damaged)

    def _note(self, damaged: Damaged) -> None:
        if (what := str(damaged)) not in self.problems:
            self.problems.append(what)

    def _index(self) -> None:
        """Sort the ids of each draw; of two that are equal the older file's comes first."""
        rows = [segment.rows for segment in self._segments]
        ids = np.concatenate([np.zeros(0, np.int64), *(each.pair_ids for each in rows)])
        draws = np.concatenate([np.zeros(0, np.int32), *(each.draws for each in rows)])
        self._errors = np.concatenate([np.zeros((0, 2), np.float32), *(r.errors for r in rows)])
        sizes = [len(each.pair_ids) for each in rows]
        self._segment = np.repeat(np.arange(len(rows)), sizes)
        self._row = np.concatenate([np.zeros(0, np.int64), *(np.arange(size) for size in sizes)])
        self._lost = np.concatenate([self._lost, np.zeros(len(ids) - len(self._lost), bool)])
        self._sorted: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for draw in np.unique(draws).tolist():
            at = np.flatnonzero((draws == draw) & ~self._lost)
            at = at[np.argsort(ids[at], kind="stable")]
            self._sorted[draw] = ids[at], at

    def _find(self, ids: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """(B,) int64 places of what is known, -1 where nothing is."""
        found = np.full(len(ids), -1, np.int64)
        for draw in np.unique(draws).tolist():
            known, at = self._sorted.get(draw, (np.zeros(0, np.int64),) * 2)
            pairs = np.flatnonzero(draws == draw)
            places = np.searchsorted(known, ids[pairs])
            hit = places < len(known)
            hit[hit] = known[places[hit]] == ids[pairs][hit]
            found[pairs[hit]] = at[places[hit]]
        return found
