"""Where verbs write in a run folder: each place must be the folder or the file that it is to be,
before a verb works for hours and cannot put its result there.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..basics.errors import RecipeError

# Folders end in a slash. What a verb only reads is looked at by who reads it.
WRITTEN = {
    "prepare": """
        candidates/ contact_sheet.png latents/ left_out.csv recipe.yaml score_cache/ scores/
        scores.parquet shards/ shards/manifest.json source/
    """,
    "train": """
        checkpoints/ checkpoints/latest csv/ ema/ evaluations/ evaluations.jsonl exported.json
        kohya/ lora/ lora_with_lcm/ merged/ metrics.jsonl recipe.yaml samples/ starts.log
        tensorboard/
    """,
    "cache": "",
    "rounds": """
        after/ evaluations.jsonl exported.json kohya/ lora/ lora_with_lcm/ merged/ metrics.jsonl
        prompts/ recipe.yaml rounds.json
    """,
    "compare": """
        compare/ compare/base/ compare/divergence/ compare/left_out.csv compare/made_of.json
        compare/recipe.yaml
        compare/report.html compare/results.json compare/scores/ compare/side_by_side.png
    """,
}


def check_places(run_dir: Path, verb: str) -> None:
    """RecipeError, which names the place, if one that a verb writes to cannot be written."""
    for name in WRITTEN[verb].split():
        check_place(run_dir / name, "run_dir", is_folder=name.endswith("/"))


def check_place(place: Path, key: str, *, is_folder: bool) -> None:
    """RecipeError if there is something in the way of a folder or file that is to be written, or it
    cannot be written; ``key`` is the recipe's that says where it lies.
    """
    if not os.path.lexists(place):
        return
    if not (place.is_dir() if is_folder else place.is_file()):
        sort = "folder" if is_folder else "file"
        wrong, remedy = "wrong-type", f"is in the way of a {sort} of that name: move it away"
    elif not os.access(place, os.R_OK | os.W_OK | (os.X_OK if is_folder else 0)):
        wrong, remedy = "unwritable", "cannot be read and written: see to its permissions"
    else:
        return
    raise RecipeError(f"{place} {remedy}, or give another {key}", str(place), wrong)
