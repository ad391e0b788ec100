"""The train verb that takes no step: it resumes, and saves what it holds into folder SAVE_INTO."""

from __future__ import annotations

import os
from pathlib import Path

from cdpo.engine.display.terminal import Terminal
from cdpo.engine.ranks import Ranks, run_verb
from cdpo.engine.recipe import Recipe
from cdpo.engine.training.trainer import Trainer


def main(ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
    trainer = Trainer(ranks, recipe, terminal)
    assert trainer.resume()
    trainer.checkpoints.folder = Path(os.environ["SAVE_INTO"])
    trainer.checkpoints.folder.mkdir(parents=True, exist_ok=True)
    trainer._save()


run_verb("train", main)
