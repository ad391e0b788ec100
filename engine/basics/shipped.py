"""Files that come with cdpo and are no code: recipes, DeepSpeed configs, the small world."""

from __future__ import annotations

from pathlib import Path


def shipped(folder: str) -> Path:
    """A folder of these, such as ``recipes``: beside ``engine`` in a clone and in a wheel alike."""
    return Path(__file__).resolve().parents[2] / folder
