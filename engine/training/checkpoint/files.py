"""A checkpoint on the disk: a manifest that tells if it has changed, and the files it names."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ...basics.failpoints import failpoint
from ...basics.files import replacing

MANIFEST = "MANIFEST.json"
FORMAT = 2
SEAL = "sha256"
FIELDS = {"step", "skips", "world_size", "identity", "data", "files"}


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a checksum of itself: a digit of the step that flips would go unnoticed."""
    content = {key: value for key, value in manifest.items() if key != SEAL}
    return content | {
        SEAL: hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    }


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Put the sealed manifest into a folder, down to the disk. Raises OSError."""
    with replacing(folder / MANIFEST, error=None) as file:
        file.write(json.dumps(seal(manifest), indent=1).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a committed folder. Raises OSError, or ValueError if it is not as written."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} holds no manifest")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"format {manifest.get('format')}, this version reads {FORMAT}")
    if manifest != seal(manifest) or not manifest.keys() >= FIELDS:
        raise ValueError(f"{MANIFEST} has changed since it was written")
    return manifest


def check_file(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Hold a file against its entry. Raises OSError, or ValueError that says how it differs."""
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{name} is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ValueError(f"{name} has {size} bytes, {entry['bytes']} were written")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise ValueError(f"{name} has changed since it was written")


def sync_and_describe(path: Path) -> dict[str, Any]:
    """Bring a file down to the disk; its entry in the manifest."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        failpoint("checkpoint.synced")
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": path.stat().st_size, "sha256": digest}
