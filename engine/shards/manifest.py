"""manifest.json: every shard of a set, and the model, VAE and reward that made it.

It is written last, so a folder with a manifest is a finished set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..basics.errors import DataError, told_by
from ..basics.files import LFS_REMEDY, lfs_pointer, replacing
from .contents import Contents, Kind, contents_of

FORMAT_VERSION = 1  # of Manifest.format_version
FILE_NAME = "manifest.json"
MAX_BYTES = 256 * 2**20
MAX_PAIR_BYTES = 256 * 2**20  # as an array: readers make room for it before they see one

Count = Annotated[int, Field(ge=0)]
PositiveInt = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=1, lt=2**24)]
Pixels = tuple[Size, Size]


class Record(BaseModel):
    """A part of the manifest: immutable, typed strictly, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(Record):
    """A file of the set."""

    name: str
    bytes: Annotated[int, Field(ge=1, lt=2**48)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ShardEntry(FileEntry):
    """One tar: ``count`` samples of one tier."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}\.tar$")]
    tier: PositiveInt
    count: Annotated[int, Field(ge=1, lt=2**31)]


class PromptFile(FileEntry):
    """Embeddings of some prompts: see :mod:`.prompts`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}\.safetensors$")]


class StoredText(Record):
    """The embeddings of prompts that go with the shards, and what made them."""

    fingerprint: str
    """Of text encoders and tokenizers, as the part `text` of models/fingerprints.py."""
    precision: str
    """Of the text encoders, as `train.precision` says it."""
    files: Annotated[tuple[PromptFile, ...], Field(min_length=1)]


class ModelSource(Record):
    """A model that had a part in making the shards; ``fingerprint`` is a hash of its weights."""

    path: str
    fingerprint: str


class VaeSource(ModelSource):
    """The VAE whose latents the shards hold: a trainer with another one refuses them, unless they
    are ``raw``.
    """

    scaling_factor: float


class RewardSource(ModelSource):
    """The reward that ranked the candidates; of type `given` where the scores came with them."""

    type: str


class Statistics(Record):
    """What went in and what was left out, for `show` and for reports."""

    prompts: Count = 0
    """Prompts read."""
    prompts_without_pairs: Count = 0
    """Prompts that gave no pair, for any reason."""
    tied_prompts: Count = 0
    """Prompts whose candidates all had one score."""
    candidates: Count = 0
    """Images scored."""
    dropped_candidates: Count = 0
    """Images without a finite score."""
    eligible_pairs: Count = 0
    """Pairs before the budget."""
    pairs_by_tier: tuple[Count, ...] = ()
    """Pairs written, tier 1 first."""
    dropped_remainder_by_tier: tuple[Count, ...] = ()
    """Pairs left out so that all shards of a tier hold equally many."""
    imported: dict[str, Count] | None = None
    """Of an imported data set: its `rows`, and what became of those that are no pair, by reason."""


class Manifest(Record):
    """The table of contents of a set of shards."""

    format_version: Literal[1] = 1
    kind: Kind = "latents"
    """What a sample holds."""
    created_by: str
    """Version of cdpo that wrote the set."""
    fingerprint: str
    """Hash of everything that decided the content (recipe parts, prompts): the same hash means
    that `prepare` has nothing left to do."""
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    lanes: PositiveInt
    tiers: PositiveInt
    resolution: Pixels
    """Height and width of an image in pixels."""
    latent_shape: tuple[Size, Size, Size]
    """(C, h, w) of one image's latents."""
    model: ModelSource
    vae: VaeSource
    reward: RewardSource
    parts: dict[str, str] | None = None
    """Content hashes of all that made the set, by the names of `PARTS` in models/fingerprints.py.
    Sets made before there were any are known by those of `model`, `vae` and `reward` alone."""
    text: StoredText | None = None
    """The embeddings of prompts that go with the set (`data.text: stored`); None if there are none.
    They are no part of its identity: runs with and without them are the same."""
    statistics: Statistics = Statistics()
    shards: tuple[ShardEntry, ...]

    @property
    def contents(self) -> Contents:
        """How the images of a sample are read."""
        return contents_of(self.kind, self.latent_shape, self.resolution)

    @property
    def num_pairs(self) -> int:
        """Pairs in the set."""
        return sum(entry.count for entry in self.shards)

    @model_validator(mode="after")
    def _a_pair_is_of_reasonable_size(self) -> Manifest:
        pixels, values = math.prod(self.resolution), math.prod(self.latent_shape)
        size = 2 * {"raw": 3 * pixels, "moments": 4 * values, "latents": 2 * values}[self.kind]
        if size > MAX_PAIR_BYTES:
            raise ValueError(f"a pair would take {size} bytes, at most {MAX_PAIR_BYTES} are read")
        return self

    @model_validator(mode="after")
    def _shards_fill_the_lanes(self) -> Manifest:
        names = {entry.name for entry in self.shards}
        if len(names) != len(self.shards):
            raise ValueError("two shards have the same name")
        by_tier = shards_by_tier(self.shards)
        if unknown := [tier for tier in by_tier if tier > self.tiers]:
            raise ValueError(f"a shard is of tier {unknown[0]}, but there are {self.tiers} tiers")
        for tier in range(1, self.tiers + 1):
            entries = by_tier.get(tier, [])
            if not entries or len(entries) % self.lanes:
                raise ValueError(
                    f"tier {tier} has {len(entries)} shards, not a multiple of {self.lanes} lanes"
                )
            counts = {entry.count for entry in entries}
            if len(counts) > 1:
                raise ValueError(
                    f"the shards of tier {tier} hold unequal counts, {min(counts)} to {max(counts)}"
                )
        return self


def shards_by_tier(shards: Iterable[ShardEntry]) -> dict[int, list[ShardEntry]]:
    """Shards grouped by tier, in their given order: shard i of a tier belongs to lane i mod L."""
    groups: dict[int, list[ShardEntry]] = defaultdict(list)
    for entry in shards:
        groups[entry.tier].append(entry)
    return dict(groups)


def load_manifest(folder: str | Path, sha256: str | None = None) -> Manifest:
    """Read and check ``folder``/manifest.json; DataError in one line says what is wrong with it."""
    path = Path(folder) / FILE_NAME
    return parse_manifest(_read_bounded(path), str(path), sha256)


def parse_manifest(text: bytes, path: str, sha256: str | None = None) -> Manifest:
    """Check what a manifest.json holds; DataError, naming ``path``, says what is wrong with it.

    ``sha256`` is what it must have, if that is known.
    """
    if lfs_pointer(text):
        raise DataError(f"{path} {LFS_REMEDY}", path, "unreadable")
    found_sha256 = hashlib.sha256(text).hexdigest()
    if sha256 is not None and found_sha256 != sha256:
        raise DataError(
            f"{path}: its sha256 is {found_sha256}, not data.manifest_sha256={sha256}: it is not "
            "the set that the recipe means",
            "data.manifest_sha256",
            "mismatch",
        )
    try:
        found = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError) as error:
        what = f"{path}: not valid JSON ({told_by(error)}); run prepare again"
        raise DataError(what, path, "damaged") from None
    if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
        version = found.get("format_version") if isinstance(found, dict) else None
        raise DataError(
            f"{path}: format_version is {version!r}, this version of cdpo reads {FORMAT_VERSION}; "
            "run prepare again",
            path,
            "unsupported",
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        what, where = _first_of(error)
        raise DataError(f"{path}: {what}", where or path, "damaged") from None


def save_manifest(folder: str | Path, manifest: Manifest) -> Path:
    """Write ``folder``/manifest.json atomically and return its path."""
    path = Path(folder) / FILE_NAME
    with replacing(path) as file:
        file.write(_canonical(manifest, indent=1))
    return path


def manifest_hash(manifest: Manifest) -> str:
    """sha256 of the content, whatever the layout of the file: what checkpoints remember. Where the
    set says which parts made it, the folders they lay in do not count; stored prompts never do.
    """
    manifest = manifest.model_copy(update={"text": None})
    if manifest.parts is None:
        return hashlib.sha256(_canonical(manifest)).hexdigest()
    sources = ("model", "vae", "reward")
    paths = {name: getattr(manifest, name).model_copy(update={"path": ""}) for name in sources}
    return hashlib.sha256(_canonical(manifest.model_copy(update=paths))).hexdigest()


def _canonical(manifest: Manifest, indent: int | None = None) -> bytes:
    # Fields that a set has no use for are left out: sets older than a field keep their hash.
    data = manifest.model_dump(mode="json", exclude_none=True)
    return json.dumps(data, indent=indent, sort_keys=True, ensure_ascii=False).encode()


def _read_bounded(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            # Not MAX_BYTES at once: Python would allocate them before it reads.
            size = os.fstat(file.fileno()).st_size
            text = file.read(min(size, MAX_BYTES) + 1)
    except FileNotFoundError:
        what = "manifest.json is not there" if path.parent.is_dir() else "there is no such folder"
        what = f"no shards in {path.parent} ({what}): run prepare first"
        raise DataError(what, str(path), "missing") from None
    except OSError as error:
        what = f"cannot read {path}: {told_by(error)}"
        raise DataError(what, str(path), "unreadable") from None
    if len(text) > MAX_BYTES:
        what = f"{path}: over {MAX_BYTES} bytes, that is no manifest of ours"
        raise DataError(what, str(path), "too-large")
    return text


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} comes up twice")
    return found


def _first_of(error: ValidationError) -> tuple[str, str]:
    """The first problem in a line, and the dotted place of it in the manifest, "" for the whole."""
    problems = error.errors(include_url=False)
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return (f"{where}: " if where else "") + message + more, where
