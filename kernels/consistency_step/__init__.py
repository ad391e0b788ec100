"""The teacher's step and the targets of consistency models."""

from .op import (
    ConsistencyScales,
    SchedulePoint,
    consistency_scales,
    consistency_solver_step,
    consistency_targets,
)

__all__ = [
    "ConsistencyScales",
    "SchedulePoint",
    "consistency_scales",
    "consistency_solver_step",
    "consistency_targets",
]
