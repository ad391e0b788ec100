"""Base against tuned on the same prompts and seeds: scores with intervals, and a report to look at.

    deepspeed engine/compare.py --recipe recipes/emoji_cdpo.yaml

Goes on where it was stopped, to the prompt; a finished run says so. Leaves `compare/results.json`
and the self-contained `compare/report.html` in the run folder.
"""

from __future__ import annotations

from cdpo.engine.display.terminal import Terminal
from cdpo.engine.ranks import Ranks, run_verb
from cdpo.engine.recipe import Recipe


def main(ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
    """The verb on one rank, after the recipe has been read and the ranks have met."""
    # Imported here: a mistyped recipe is refused before the libraries take seconds to load.
    from cdpo.engine.comparing.comparison import Comparison

    comparison = Comparison(ranks, recipe, terminal)
    terminal.header(f"compare  {recipe.run_dir}", comparison.describe())
    if comparison.is_finished:
        terminal.line("nothing to do: the report is made from this adapter and recipe")
        terminal.line(f"report: {comparison.report_path}")
    else:
        comparison.run()


if __name__ == "__main__":
    run_verb("compare", main)
