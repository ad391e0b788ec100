"""Fill the frozen-pass cache of a run ahead of it: `cdpo cache fill --recipe R`.

    cdpo cache fill --recipe recipes/emoji_cdpo.yaml speed.frozen_cache=4
    deepspeed engine/cache.py --recipe recipes/emoji_cdpo.yaml speed.frozen_cache=4

The second divides the work among ranks. Asks the frozen networks about every draw of a pair that
the steps of `train` will meet, in its batches, and keeps what they say; what is kept already is
left alone, so it may be stopped and started again.
"""

from __future__ import annotations

from cdpo.engine.display.terminal import Terminal
from cdpo.engine.ranks import Ranks, run_verb
from cdpo.engine.recipe import Recipe


def main(ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
    """The verb on one rank, after the recipe has been read and the ranks have met."""
    # Imported here: a mistyped recipe is refused before the libraries take seconds to load.
    from cdpo.engine.training.frozen.fill import fill

    fill(ranks, recipe, terminal)


if __name__ == "__main__":
    run_verb("cache", main)
