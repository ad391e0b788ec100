"""Stage 1: sample candidates, or read a data set; score, form pairs in tiers, write shards.

    deepspeed engine/prepare.py --recipe recipes/emoji_cdpo.yaml

Goes on where it was stopped, to the prompt; a finished run says so. Leaves `candidates/` (or, of
a data set that was read, `source/`), `scores.parquet` (where a reward ranked them), `shards/` with
`manifest.json`, and `contact_sheet.png` in the run folder.
"""

from __future__ import annotations

from cdpo.engine.display.terminal import Terminal
from cdpo.engine.ranks import Ranks, run_verb
from cdpo.engine.recipe import Recipe


def main(ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
    """The verb on one rank, after the recipe has been read and the ranks have met."""
    # Imported here: a mistyped recipe is refused before the libraries take seconds to load.
    from cdpo.engine.preparing.preparation import Preparation

    preparation = Preparation(ranks, recipe, terminal)
    terminal.header(f"prepare  {recipe.run_dir}", preparation.describe())
    if preparation.is_finished:
        terminal.line(f"nothing to do: {preparation.shards_dir} is complete for this recipe")
    else:
        preparation.run()


if __name__ == "__main__":
    run_verb("prepare", main)
