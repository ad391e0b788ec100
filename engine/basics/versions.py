"""Which code made a file: versions of the packages, and a hash of our own sources."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

from .. import __version__

PACKAGES = ("torch", "deepspeed", "diffusers", "transformers", "peft")


@cache
def code_version() -> dict[str, str]:
    """Versions by package; ``sources`` is a sha256 over engine/ and kernels/ as they are on disk.

    A checkout between releases has edits that no version number tells of.
    """
    engine = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for folder in (engine, engine.parent / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    versions = {name: version(name) for name in PACKAGES}
    return {
        "cdpo": __version__,
        "sources": digest.hexdigest(),
        "python": platform.python_version(),
        **versions,
    }
