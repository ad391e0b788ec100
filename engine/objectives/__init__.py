"""Losses over pairs, one file each, behind :mod:`cdpo.engine.objectives.protocol`.

The file of an objective has the name that recipes know it by, and its ``build`` makes it of the
recipe's section: there is no list of them but that of the schema.
"""

from __future__ import annotations

from importlib import import_module

from ..recipe import Objective as ObjectiveSpec
from .protocol import HeldAgainstFrozen, Loss, Networks, Objective, Predict, TrainingBatch
from .rank_weights import rank_weights
from .weighting import timestep_weights

__all__ = [
    "HeldAgainstFrozen",
    "Loss",
    "Networks",
    "Objective",
    "Predict",
    "TrainingBatch",
    "build_objective",
    "rank_weights",
    "timestep_weights",
]


def build_objective(spec: ObjectiveSpec) -> Objective:
    """The objective a recipe names."""
    objective: Objective = import_module(f".{spec.type}", __package__).build(spec)
    return objective
