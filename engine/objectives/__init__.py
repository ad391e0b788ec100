"""Preference losses, one file each, behind :mod:`cdpo.engine.objectives.protocol`."""

from __future__ import annotations

from ..errors import RecipeError
from ..recipe import Objective as ObjectiveSpec
from .diffusion_dpo import DiffusionDPO
from .protocol import Loss, Objective, Predict, TrainingBatch

__all__ = ["Loss", "Objective", "Predict", "TrainingBatch", "build_objective"]


def build_objective(spec: ObjectiveSpec) -> Objective:
    """The objective a recipe names; RecipeError for one that is declared but not built yet."""
    if spec.type != "diffusion_dpo":
        raise RecipeError(
            f"objective.type={spec.type} is not built yet: this version has `diffusion_dpo`"
        )
    return DiffusionDPO(spec)
