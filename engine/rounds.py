"""Rounds: candidates, pairs and training again and again, on what the tuned model draws.

    deepspeed engine/rounds.py --recipe recipes/emoji_cdpo.yaml prompts.validation.count=12

Each of `rounds.count` rounds is a `prepare` and a `train` in a run folder of its own, `round-1`,
`round-2`, ..., on the model that the kept rounds before have left, which is the reference, too
(with `rounds.reference=base` the reference stays the base). A
round that gains nothing on `prompts.validation` is not kept (`rounds.json` says which are): the
next begins where it began. Goes on where it was stopped; a finished run says so. Leaves the sum of
the kept rounds as one adapter of the base (`lora/` and whatever `export.formats` asks for) and a
comparison of the model after each of them, `compare/report.html`.
"""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from cdpo.engine import compare, prepare, train
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.ranks import Ranks, run_verb
from cdpo.engine.ranks.launch import run_lock
from cdpo.engine.ranks.places import check_place, check_places
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.of_rounds import folder_of_round


def main(ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
    """The verb on one rank, after the recipe has been read and the ranks have met."""
    # Imported here: a mistyped recipe is refused before the libraries take seconds to load.
    from cdpo.engine.training.rounds import Series, refuse_other_run

    ranks.on_first(lambda: _check_folders(recipe))
    ranks.on_first(lambda: refuse_other_run(recipe))
    series = Series(ranks, recipe)
    count = recipe.rounds.count
    terminal.header(f"rounds  {recipe.run_dir}", series.describe())
    for number in range(1, count + 1):
        own = series.next_recipe()
        terminal.line(f"round {number} of {count}")
        with run_lock(ranks, Path(own.run_dir)):
            prepare.main(ranks, own, terminal)
            train.main(ranks, series.training_of(own), terminal)
        _free()
        terminal.line(series.told(series.judge()))
    runs = series.export()
    if not runs:
        terminal.line("no round has gained on the validation prompts: there is nothing to export")
        return
    terminal.line(f"exported: {', '.join(map(str, series.folders))}")
    comparison = recipe.compare.model_copy(update={"runs": runs})
    compare.main(ranks, recipe.model_copy(update={"compare": comparison}), terminal)


def _check_folders(recipe: Recipe) -> None:
    """Whether all rounds can be written, before the first of them takes hours."""
    check_places(Path(recipe.run_dir), "compare")
    for number in range(1, recipe.rounds.count + 1):
        folder = folder_of_round(recipe, number)
        check_place(folder, "run_dir", is_folder=True)
        for verb in ("prepare", "train"):
            check_places(folder, verb)


def _free() -> None:
    """The networks of a round, before those of the next are loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_verb("rounds", main)
