"""Stage 2: optimise the policy on the pair shards, tier by tier.

    deepspeed engine/train.py --recipe recipes/emoji_cdpo.yaml train.steps=200

Goes on from the newest committed checkpoint of the run folder; a finished run says so. Supported:
one GPU, several GPUs or nodes under the `deepspeed` or `torchrun` launcher, CPU; ZeRO 1, 2, 3.
Leaves `metrics.jsonl`, `samples/`, `checkpoints/` and what `export.formats` asks for (`lora/`) in
the run folder.

    deepspeed engine/train.py --recipe R train.optimizer.lr=1e-5 --allow-change train.optimizer.lr

goes on with another value of a key that a checkpoint is held to otherwise.

    python engine/train.py --recipe recipes/sdxl_cdpo.yaml --dry-run --world-size 8

prints what a run will take: parameters, operations, memory of each rank. It needs the model's
configs, and no weights, shards or GPUs; of shards that are there it says which pairs repeat.
"""

from __future__ import annotations

from collections.abc import Sequence

from cdpo.engine.display.terminal import Terminal
from cdpo.engine.ranks import Ranks, run_verb
from cdpo.engine.recipe import Recipe


def main(
    ranks: Ranks, recipe: Recipe, terminal: Terminal, allow_change: Sequence[str] = ()
) -> None:
    """The verb on one rank, after the recipe has been read and the ranks have met.

    In the keys of ``allow_change`` the recipe may differ from the checkpoint's.
    """
    # Imported here: a mistyped recipe is refused before the libraries take seconds to load.
    from cdpo.engine.training.trainer import Trainer

    trainer = Trainer(ranks, recipe, terminal, allow_change)
    terminal.header(f"train  {recipe.run_dir}", trainer.describe())
    if trainer.resume() and trainer.is_finished:
        taken = f"{trainer.cursor.step} of {recipe.train.steps} steps are taken"
        ended = ", where evaluation ended the run" if trainer.evaluation.is_over else ""
        terminal.line(f"nothing to do: {taken}{ended}; see {recipe.run_dir}")
    else:
        trainer.run()
    terminal.line(f"exported: {', '.join(map(str, trainer.exports.folders))}")
    if trainer.exports.note is not None:
        terminal.line(f"note: {trainer.exports.note}")
    trainer.close()


def dry_run(world_size: int, recipe: Recipe, terminal: Terminal) -> None:
    """What the recipe will take on so many ranks, by the model's configs."""
    from cdpo.engine.training.dry_run.plan import print_plan

    if terminal.enabled:
        print_plan(recipe, world_size, terminal)


if __name__ == "__main__":
    run_verb("train", main, dry_run)
