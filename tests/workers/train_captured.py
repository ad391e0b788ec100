"""The train verb, compiled for a backend that runs what it gets; how often it was asked, by step.

Prints `captured N` after each step, and when the run is over.
"""

from __future__ import annotations

import torch
from cdpo.engine.models import tuning
from cdpo.engine.ranks import run_verb
from cdpo.engine.train import main
from cdpo.engine.training.trainer import Trainer
from torch import fx

take_step, export = Trainer._take_step, Trainer._export
captured = 0


def run_as_it_is(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
    global captured
    captured += 1
    return graph


def counted(self: Trainer, *pairs: object) -> bool:
    taken = take_step(self, *pairs)
    print(f"captured {captured}", flush=True)
    return taken


def counted_to_the_end(self: Trainer) -> None:
    print(f"captured {captured}", flush=True)
    export(self)


tuning.COMPILE = {"backend": run_as_it_is, "dynamic": False}
tuning._check_compiler = lambda mode, device: None  # type: ignore[assignment]
Trainer._take_step = counted  # type: ignore[method-assign]
Trainer._export = counted_to_the_end  # type: ignore[method-assign]
run_verb("train", main)
