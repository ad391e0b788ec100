"""Ways in which a set of shards goes bad on disk, for tests that train on it.

`rewrite` also sets size and checksum in the manifest, as if whatever made the set had written it so
from the start: what is wrong then must be found by whoever reads the tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from shard_sets import tar

Members = list[tuple[str, bytes]]


def read_members(shard: Path) -> Members:
    """Name and content of every member, in order."""
    with tarfile.open(shard) as file:
        return [(member.name, file.extractfile(member).read()) for member in file]  # type: ignore[union-attr]


def keys(shard: Path) -> list[str]:
    """Keys of a shard's samples, in order."""
    return [name.partition(".")[0] for name, _ in read_members(shard) if name.endswith(".json")]


def rewrite(shard: Path, change: Callable[[Members], Members]) -> None:
    """Write the shard with other members, and its manifest to match."""
    replace(shard, tar(change(read_members(shard))))


def replace(shard: Path, content: bytes) -> None:
    """Give the shard other bytes, and its manifest their number and checksum."""
    shard.write_bytes(content)
    now = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def note(manifest: dict[str, Any]) -> None:
        (entry,) = (entry for entry in manifest["shards"] if entry["name"] == shard.name)
        entry.update(now)

    edit_manifest(shard.parent, note)


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def cut_at_last_header(shard: Path) -> None:
    """End the tar where the header of its last member begins: no member is cut in two."""
    with tarfile.open(shard) as file:
        end = file.getmembers()[-1].offset
    replace(shard, shard.read_bytes()[:end])


def change_latents(shard: Path, key: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Put other latents, float16 (2, C, h, w), into one sample."""

    def changed(name: str, content: bytes) -> bytes:
        if name != f"{key}.latents.npy":
            return content
        buffer = io.BytesIO()
        np.save(buffer, change(np.load(io.BytesIO(content), allow_pickle=False)))
        return buffer.getvalue()

    rewrite(shard, lambda members: [(name, changed(name, data)) for name, data in members])


def flip_a_bit(shard: Path) -> None:
    """As a failing disk does: size and manifest stay."""
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
