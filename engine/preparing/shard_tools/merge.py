"""Making one set of shards, and its statistics, out of several of other prompts or data.

The pairs of all sets are filled into new shards as `prepare` fills them: by a permutation that is
keyed by the pairs' ids. So the order of the sets does not matter, pairs of all of them lie in every
shard, and what is made is byte for byte what one `prepare` would have made of those pairs.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np

from ... import __version__
from ...basics.errors import DataError, RecipeError, told_by
from ...basics.failpoints import failpoint
from ...basics.files import sync_path
from ...models.fingerprints import changed_parts, named
from ...shards.manifest import (
    FILE_NAME,
    Manifest,
    ShardEntry,
    Statistics,
    load_manifest,
    manifest_hash,
    save_manifest,
    shards_by_tier,
)
from ...shards.reader import ShardReaders
from ...shards.sample import PairSample, sample_key
from ...shards.writer import ShardFill, ShardPlan, plan_shards, write_shard

_ADDED = (
    "prompts",
    "prompts_without_pairs",
    "tied_prompts",
    "candidates",
    "dropped_candidates",
    "eligible_pairs",
)


def sum_statistics(parts: Sequence[Statistics], plans: Sequence[ShardPlan]) -> Statistics:
    """Counts of what went in are added; those of shards are of the ``plans``, a tier each, with
    what the sets had left out before.
    """
    dropped = [plan.dropped for plan in plans]
    for part in parts:
        for index, number in enumerate(part.dropped_remainder_by_tier[: len(dropped)]):
            dropped[index] += number
    imported: Counter[str] = Counter()
    for part in parts:
        imported.update(part.imported or {})
    return Statistics(
        **{name: sum(getattr(part, name) for part in parts) for name in _ADDED},
        pairs_by_tier=tuple(plan.num_shards * plan.count for plan in plans),
        dropped_remainder_by_tier=tuple(dropped),
        imported=dict(imported) or None,
    )


@dataclass(frozen=True)
class _Set:
    """One of the sets that are merged."""

    folder: Path
    manifest: Manifest
    readers: ShardReaders


@dataclass(frozen=True)
class _TierPairs:
    """All pairs of a tier, by id: ``ids`` (P,) int64, ``places`` (P, 3) int64, the number of the
    set, of the shard in its manifest, and of the sample in the shard.
    """

    tier: int
    ids: np.ndarray
    places: np.ndarray


def merge_sets(
    folders: Sequence[str | Path],
    into: str | Path,
    *,
    pairs_per_shard: int | None = None,
    on_pairs: Callable[[int], None] = lambda _: None,
) -> tuple[Manifest, bool]:
    """Write the pairs of the sets in ``folders`` as one set; returns its manifest, and whether
    there was anything to do.

    Shards hold at most ``pairs_per_shard`` pairs, by default as many as the largest that went in.
    The folder ``into`` appears when it is whole: until then the shards lie in ``into.partial``,
    which goes when the merge fails; one that was killed leaves it, and the next starts over in it.
    ``on_pairs`` is told of pairs as they are written. Memory:
    32 bytes a pair, and the indexes of all shards.

    Raises DataError when the sets do not belong together, a pair is in two of them, a shard is bad
    or the disk is full; RecipeError when ``into`` is taken.
    """
    into = Path(into)
    sets = [_open(Path(folder)) for folder in folders]
    for other in sets[1:]:
        _check_alike(sets[0], other)
    pairs_per_shard = pairs_per_shard or max(e.count for s in sets for e in s.manifest.shards)
    inputs = _inputs_hash(sets, pairs_per_shard)
    if (done := _done_before(into, inputs)) is not None:
        return done, False
    tiers = _gather(sets)
    lanes = sets[0].manifest.lanes
    plans = [plan_shards(t.tier, len(t.ids), lanes, pairs_per_shard) for t in tiers]
    seed = min(s.manifest.seed for s in sets)
    with _writing(into) as folder:
        entries = []
        for plan, pairs in zip(plans, tiers, strict=True):
            entries += _write_tier(folder, plan, pairs, sets, seed, on_pairs)
        manifest = sets[0].manifest.model_copy(
            update={
                "created_by": __version__,
                "fingerprint": inputs,
                "seed": seed,
                "parts": _parts_of(sets),
                "text": None,
                "statistics": sum_statistics([s.manifest.statistics for s in sets], plans),
                "shards": tuple(entries),
            }
        )
        save_manifest(folder, Manifest.model_validate(manifest.model_dump()))
    return manifest, True


def _open(folder: Path) -> _Set:
    manifest = load_manifest(folder)
    readers = ShardReaders(folder, manifest)
    readers.keep_indexes(len(manifest.shards))
    return _Set(folder, manifest, readers)


def _check_alike(first: _Set, other: _Set) -> None:
    """Raise DataError, naming both values, unless one trainer could take both sets."""
    for key in (
        "kind",
        "latent_shape",
        "resolution",
        "lanes",
        "tiers",
        "vae.fingerprint",
        "vae.scaling_factor",
        "model.fingerprint",
        "reward.type",
        "reward.fingerprint",
    ):
        ours, theirs = map(attrgetter(key), (first.manifest, other.manifest))
        if ours != theirs:
            raise DataError(
                f"{first.folder} and {other.folder} cannot be merged: {key} is {ours} in the "
                f"first and {theirs} in the second; prepare one of them again as the other",
                key,
                "mismatch",
            )
    our_parts, their_parts = first.manifest.parts, other.manifest.parts
    if our_parts and their_parts and (changed := changed_parts(our_parts, their_parts)):
        raise DataError(
            f"{first.folder} and {other.folder} cannot be merged: they were made by another "
            f"{named(changed)}; prepare one of them again as the other",
            f"parts.{changed[0]}",
            "mismatch",
        )


def _parts_of(sets: Sequence[_Set]) -> dict[str, str] | None:
    """What all of the sets, which are alike, say; None if one of them is too old to say it."""
    parts = [one.manifest.parts for one in sets]
    return None if None in parts else parts[0]


def _inputs_hash(sets: Sequence[_Set], pairs_per_shard: int) -> str:
    parts = [*sorted(manifest_hash(one.manifest) for one in sets), str(pairs_per_shard)]
    return hashlib.sha256("merge ".join(parts).encode()).hexdigest()


def _done_before(into: Path, inputs: str) -> Manifest | None:
    """The manifest of the same merge, finished before; RecipeError if anything else is there."""
    if not into.exists():
        return None
    if (into / FILE_NAME).exists():
        manifest = load_manifest(into)
        if manifest.fingerprint == inputs:
            ShardReaders(into, manifest).check_present(manifest.shards)
            return manifest
    told = f"--into {into} is there already and is not this merge: give another folder"
    raise RecipeError(told, "--into", "in-use")


def _gather(sets: Sequence[_Set]) -> list[_TierPairs]:
    """Where all pairs lie. Opens, and so verifies, every shard."""
    tiers = []
    for tier in range(1, sets[0].manifest.tiers + 1):
        ids, places = [], []
        for number, one in enumerate(sets):
            index_of = {entry.name: i for i, entry in enumerate(one.manifest.shards)}
            for entry in shards_by_tier(one.manifest.shards)[tier]:
                keys = one.readers.keys(entry)
                ids.append(_ids_of(keys, one.readers, entry))
                place = np.zeros((len(keys), 3), dtype=np.int64)
                place[:, 0], place[:, 1] = number, index_of[entry.name]
                place[:, 2] = np.arange(len(keys))
                places.append(place)
        tiers.append(_TierPairs(tier, np.concatenate(ids), np.concatenate(places)))
    _refuse_repeats(sets, tiers)
    return tiers


def _ids_of(keys: list[str], readers: ShardReaders, entry: ShardEntry) -> np.ndarray:
    """The pairs' ids, which are their keys; a key that is none is named by reading its sample."""
    try:
        return np.array([int(key, 16) for key in keys], dtype=np.int64)
    except (ValueError, OverflowError):
        for index in range(len(keys)):
            readers.read(entry, index)
        raise


def _refuse_repeats(sets: Sequence[_Set], tiers: Sequence[_TierPairs]) -> None:
    ids = np.concatenate([pairs.ids for pairs in tiers])
    values, counts = np.unique(ids, return_counts=True)
    twice = values[counts > 1].tolist()
    if not twice:
        return
    owners = np.concatenate([pairs.places[:, 0] for pairs in tiers])[ids == twice[0]]
    folders = " and in ".join(str(sets[owner].folder) for owner in owners[:2])
    raise DataError(
        f"{len(twice)} pairs come up twice, e.g. {sample_key(twice[0])} in {folders}: sets that "
        "are merged must be of different prompts or data",
        sample_key(twice[0]),
        "duplicate",
    )


def _write_tier(
    folder: Path,
    plan: ShardPlan,
    pairs: _TierPairs,
    sets: Sequence[_Set],
    seed: int,
    on_pairs: Callable[[int], None],
) -> list[ShardEntry]:
    fill = ShardFill(plan, pairs.ids, seed)
    entries = []
    for index in range(plan.num_shards):
        failpoint("merge.shard")
        samples = _read(pairs.places[fill.members(index)], sets)
        records = ((sample.meta, sample.images) for sample in samples)
        contents = sets[0].manifest.contents
        entries.append(write_shard(folder / plan.name(index), records, contents))
        on_pairs(plan.count)
    return entries


def _read(places: np.ndarray, sets: Sequence[_Set]) -> Iterator[PairSample]:
    for number, shard, sample in places.tolist():
        one = sets[number]
        yield one.readers.read(one.manifest.shards[shard], sample)


def partial_folder(into: str | Path) -> Path:
    """Where a set that is to be ``into`` lies until it is whole."""
    into = Path(into)
    return into.with_name(into.name + ".partial")


@contextmanager
def _writing(into: Path) -> Iterator[Path]:
    """A folder to write in, which becomes ``into`` when the block ends well.

    What a killed merge left in it goes; anything else in it is refused.
    """
    folder = partial_folder(into)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        told = f"cannot write {folder}: {told_by(error)}"
        raise DataError(told, str(folder), "unwritable") from None
    try:
        _lock(lock, folder)
        _clear(folder)
        try:
            yield folder
            os.rename(folder, into)
        except BaseException:
            _clear(folder)
            folder.rmdir()
            raise
        sync_path(into.parent)
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        told = f"{folder} is in use: another merge is writing there"
        raise RecipeError(told, str(folder), "in-use") from None


def _clear(folder: Path) -> None:
    ours = {FILE_NAME, FILE_NAME + ".tmp"}
    found = sorted(folder.iterdir())
    for path in found:
        if path.name not in ours and not path.match("tier-*.tar") and not path.match("*.tar.tmp"):
            told = f"{path} is not of a merge: remove it, or give another --into"
            raise RecipeError(told, str(path), "unknown")
    for path in found:
        path.unlink()
