"""The train verb, and what it lets libraries choose: prints `rounding PLACE BENCHMARK TF32` where
the networks compute a loss, where its gradients are computed, where a picture is drawn, and when
the verb has ended, well or not.
"""

from __future__ import annotations

from typing import Any

import torch
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.objectives import Loss, TrainingBatch
from cdpo.engine.ranks import Ranks, run_verb
from cdpo.engine.recipe import Recipe
from cdpo.engine.train import main
from cdpo.engine.training.networks import PolicyAndReference
from cdpo.engine.training.samples import TrainingSamples

loss, draw = PolicyAndReference.loss, TrainingSamples.draw


def tell(place: str) -> None:
    chosen = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    print("rounding", place, *chosen, flush=True)


def watched_loss(self: PolicyAndReference, batch: TrainingBatch) -> Loss:
    tell("loss")
    found = loss(self, batch)
    found.loss.register_hook(lambda _: tell("gradient"))
    return found


def watched_draw(self: TrainingSamples, *arguments: Any) -> None:
    tell("picture")
    draw(self, *arguments)


def watched(ranks: Ranks, recipe: Recipe, terminal: Terminal) -> None:
    try:
        main(ranks, recipe, terminal)
    finally:
        tell("end")


PolicyAndReference.loss = watched_loss  # type: ignore[method-assign]
TrainingSamples.draw = watched_draw  # type: ignore[method-assign]
run_verb("train", watched)
