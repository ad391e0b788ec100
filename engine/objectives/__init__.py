"""Losses over pairs, one file each, behind :mod:`cdpo.engine.objectives.protocol`."""

from __future__ import annotations

from collections.abc import Callable

from ..recipe import Objective as ObjectiveSpec
from .consistency_dpo import ConsistencyDPO
from .consistency_sft import ConsistencyFineTuning
from .diffusion_dpo import DiffusionDPO
from .protocol import Loss, Networks, Objective, Predict, TrainingBatch
from .sft import SupervisedFineTuning
from .weighting import min_snr_weights

__all__ = [
    "Loss",
    "Networks",
    "Objective",
    "Predict",
    "TrainingBatch",
    "build_objective",
    "min_snr_weights",
]


OBJECTIVES: dict[str, Callable[[ObjectiveSpec], Objective]] = {
    "diffusion_dpo": DiffusionDPO,
    "consistency_dpo": ConsistencyDPO,
    "sft": SupervisedFineTuning,
    "consistency_sft": ConsistencyFineTuning,
}


def build_objective(spec: ObjectiveSpec) -> Objective:
    """The objective a recipe names."""
    return OBJECTIVES[spec.type](spec)
