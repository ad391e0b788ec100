"""The teacher's step and the boundary functions of consistency models."""

from .op import ConsistencyOutputs, SchedulePoint, consistency_outputs, consistency_solver_step

__all__ = [
    "ConsistencyOutputs",
    "SchedulePoint",
    "consistency_outputs",
    "consistency_solver_step",
]
