"""Files that come with cdpo and are no code: recipes, DeepSpeed configs, the small world."""

from __future__ import annotations

import os
from pathlib import Path

FOLDERS = ("recipes", "ds_configs", "assets")


def shipped(folder: str) -> Path:
    """A folder of these, such as ``recipes``: beside ``engine`` in a clone and in a wheel alike."""
    return Path(__file__).resolve().parents[2] / folder


def locate(path: str) -> str:
    """Where a path leads: as it is, or to the shipped file of that name if there is no other.

    So a shipped recipe works from any folder. What opens a file that a recipe names asks here; the
    recipe and all records keep the path as it was written.
    """
    ours = shipped(path)
    is_ours = path.split("/")[0] in FOLDERS and not os.path.exists(path)
    return str(ours) if is_ours and os.path.exists(ours) else path
