"""The parts of a training step, by the names that a profile shows.

They follow each other and never nest, so their times add up to at most the step's.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch.profiler import record_function

Phase = Literal[
    "data",
    "encode_images",
    "corrupt",
    "encode_prompts",
    "reference",
    "teacher",
    "solver",
    "policy",
    "loss",
    "backward",
    "log",
    "optimizer",
]
PHASES: tuple[Phase, ...] = get_args(Phase)


def phase(name: Phase) -> record_function:
    """What is done inside belongs to this part of the step; some microseconds a call."""
    return record_function(name)
